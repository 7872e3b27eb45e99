"""data.py, images: torchvision's files, digits, and folders as people have them."""

import os
import struct
import weakref
import zlib

import filelock
import numpy as np
import pytest
import torch
from conftest import write_idx
from PIL import Image

import data
from data import load_images, read_image
from files import UserError

WHITE, GREEN = (255, 255, 255), (0, 255, 0)


def picture(path, size=(8, 8), mode="L", colour=100, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **how)


def levels(x):
    """The grey level of each image of one level."""
    return x[:, 0, 0, 0].tolist()


def refused(path, words, **how):
    with pytest.raises(UserError, match=words):
        load_images(str(path), "", **how)


# -- data sets with a name ---------------------------------------------------------------------------------


def test_fashionmnist_is_read_from_an_existing_folder(fake_fashionmnist):
    images = load_images("fashionmnist", str(fake_fashionmnist))
    assert images.x.shape == (120, 1, 28, 28)
    assert images.x_test.shape == (60, 1, 28, 28)
    assert images.x.dtype == torch.uint8
    assert images.y.dtype == torch.int64
    assert images.names[0] == "T-shirt/top"
    assert len(images.names) == 10
    assert (images.x[3, 0, 6:10] == 200).all()
    assert images.y[3] == 3


def test_image_size_scales_every_image(fake_fashionmnist):
    assert load_images("fashionmnist", str(fake_fashionmnist), image_size=16).x.shape == (120, 1, 16, 16)


def test_cifar10_is_colour_channels_first(monkeypatch, tmp_path):
    class Stub:  # what torchvision's CIFAR10 holds once its files are read
        classes = ["airplane", "automobile"]

        def __init__(self, root, train, download):
            self.targets = [0, 1, 1] if train else [1]
            self.data = np.zeros((len(self.targets), 32, 32, 3), dtype=np.uint8)
            self.data[:, 4, 5] = (10, 20, 30)

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Stub)
    images = load_images("cifar10", str(tmp_path))
    assert images.x.shape == (3, 3, 32, 32)
    assert images.x_test.shape == (1, 3, 32, 32)
    assert images.y.tolist() == [0, 1, 1]
    assert images.x[0, :, 4, 5].tolist() == [10, 20, 30]
    assert images.names == ["airplane", "automobile"]


@pytest.mark.parametrize(
    "labels, test_size, words",
    [
        (range(9), 28, r"10, 1, 28, 28\] .* 9 labels, 9 of them"),
        (range(11), 28, "11 labels, 10 of them"),
        ([0] * 9 + [10], 28, "10 labels, 9 of them from 0 to 9"),
        (range(10), 14, r"10, 1, 14, 14\] beside \[10, 1, 28, 28\]"),
    ],
)
def test_files_of_torchvision_that_do_not_fit_together_are_named(labels, test_size, words, tmp_path):
    for split, size, y in [("train", 28, list(labels)), ("t10k", test_size, list(range(10)))]:
        images = torch.zeros(10, size, size, dtype=torch.uint8)
        write_idx(tmp_path / f"FashionMNIST/raw/{split}-images-idx3-ubyte", images)
        write_idx(
            tmp_path / f"FashionMNIST/raw/{split}-labels-idx1-ubyte", torch.tensor(y, dtype=torch.uint8)
        )
    with pytest.raises(UserError, match=f"--data_dir .*{words}"):
        load_images("fashionmnist", str(tmp_path))


def test_of_several_processes_one_downloads(monkeypatch, tmp_path):
    """Whoever reads holds a lock on the folder, and none is needed where nobody can write."""
    held = []

    class Stub:
        classes = ["a"]

        def __init__(self, root, train, download):
            with pytest.raises(filelock.Timeout):
                filelock.FileLock(os.path.join(root, ".CIFAR10.lock")).acquire(timeout=0)
            held.append(train)
            self.targets, self.data = [0], np.zeros((1, 4, 4, 3), dtype=np.uint8)

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Stub)
    load_images("cifar10", str(tmp_path / "new"))
    assert held == [True, False]


def test_digits_need_no_file_and_keep_the_splits_apart():
    images = load_images("digits", "/nowhere")
    assert images.x.shape == (1437, 1, 8, 8)
    assert images.x_test.shape == (360, 1, 8, 8)
    assert (images.x.min(), images.x.max()) == (0, 255)
    assert set(images.y.tolist()) == set(range(10))
    seen = {x.numpy().tobytes() for x in images.x}
    assert sum(x.numpy().tobytes() in seen for x in images.x_test) == 0
    assert images.facts()["checksum"] == "e572b31ecc82"  # checkpoints from before stay valid


def test_a_download_that_fails_names_the_way_out(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST.download", refuse)
    with pytest.raises(UserError, match="nor be downloaded .*--dataset digits.*--data_dir"):
        load_images("fashionmnist", str(tmp_path))


def test_an_unknown_name_is_answered_with_the_known_ones():
    refused("mnits", "'mnits'; choose fashionmnist, mnist, cifar10, digits, or")


# -- folders: which files, which class, which split ----------------------------------------------------------


def test_subfolders_are_classes(tmp_path):
    for i in range(10):
        picture(tmp_path / "dark" / f"{i}.png", colour=i)
        picture(tmp_path / "light" / "deep" / f"{i}.jpg", colour=200 + i)
    images = load_images(str(tmp_path), "")
    assert images.names == ["dark", "light"]
    assert images.x.shape == (16, 1, 8, 8)
    assert images.x_test.shape == (4, 1, 8, 8)
    for x, y in [(images.x, images.y), (images.x_test, images.y_test)]:
        assert torch.equal((x.flatten(1).float().mean(1) > 128).long(), y)


def test_hidden_files_and_what_systems_leave_are_no_images(tmp_path):
    for i, folder in enumerate(["cats", "dogs"]):
        picture(tmp_path / folder / "a.png", colour=i)
        for junk in (f"{folder}/.ipynb_checkpoints", f"{folder}/@eaDir", f"__MACOSX/{folder}", ".git"):
            picture(tmp_path / junk / "a.png", colour=9)
        (tmp_path / folder / "._a.png").write_bytes(b"Mac OS X resource fork")
    images = load_images(str(tmp_path), "")
    assert images.names == ["cats", "dogs"]
    assert sorted(zip(levels(images.x), images.y.tolist(), strict=True)) == [(0, 0), (1, 1)]
    assert images.left_out == ""


def test_links_to_folders_and_files_are_followed_and_circles_are_not(tmp_path):
    picture(tmp_path / "store" / "somewhere" / "a.png", colour=1)
    picture(tmp_path / "store" / "b.png", colour=2)
    picture(tmp_path / "pics" / "dogs" / "c.png", colour=3)
    (tmp_path / "pics" / "cats").symlink_to(tmp_path / "store" / "somewhere")
    (tmp_path / "pics" / "dogs" / "d.png").symlink_to(tmp_path / "store" / "b.png")
    (tmp_path / "pics" / "dogs" / "again").symlink_to(tmp_path / "pics")
    images = load_images(str(tmp_path / "pics"), "")
    assert images.names == ["cats", "dogs"]
    assert sorted(zip(levels(images.x), images.y.tolist(), strict=True)) == [(1, 0), (2, 1), (3, 1)]


@pytest.mark.parametrize("suffix", "png JPG jpeg jfif PGM ppm bmp gif webp tif TIFF jp2 avif tga ico".split())
def test_what_pillow_opens_is_an_image(suffix, tmp_path):
    picture(tmp_path / f"a.{suffix}", size=(16, 16), mode="RGB")
    x = load_images(str(tmp_path), "").x
    assert abs(int(x[0, 0, 0, 0]) - 100) < 3


def test_files_that_are_left_out_are_counted(tmp_path):
    picture(tmp_path / "a.png")
    for name in ("b.heic", "c.HEIC", "notes.txt", "README", "paper.pdf", "film.mpg", "table.h5"):
        (tmp_path / name).write_bytes(b"?")
    left_out = load_images(str(tmp_path), "").left_out
    assert left_out.split(", ")[0] == "2 .heic"
    assert sorted(left_out.split(", ")[1:]) == ["1 .h5", "1 .mpg", "1 .pdf", "1 .txt", "1 without a suffix"]
    for i in range(9):
        (tmp_path / f"x.{i}").write_bytes(b"?")
        (tmp_path / f"y.{i}").write_bytes(b"?")
    assert load_images(str(tmp_path), "").left_out.endswith("2 .6, 9 others")
    (tmp_path / "a.png").unlink()
    refused(tmp_path, "no image in .* but 2 .heic, .*save images as .png or .jpg")


def test_the_first_frame_of_an_animation_is_read_and_the_others_are_counted(tmp_path):
    frames = [Image.new("L", (8, 8), 50 * i) for i in range(1, 4)]
    for suffix in ("gif", "webp", "png"):
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    picture(tmp_path / "still.gif", colour=50)
    images = load_images(str(tmp_path), "")
    assert images.left_out == "further frames of 3 files"
    assert all(abs(level - 50) < 3 for level in levels(images.x))
    frames[0].save(tmp_path / "slices.tif", save_all=True, append_images=frames[1:])
    refused(tmp_path, "slices.tif has several pages or slices")


def test_folders_around_all_images_are_no_class(tmp_path):
    picture(tmp_path / "archive" / "pics" / "a.png")
    (tmp_path / "README.txt").write_text("photos")
    assert load_images(str(tmp_path), "").names == []
    picture(tmp_path / "archive" / "pics" / "cats" / "b.png")
    (tmp_path / "archive" / "pics" / "a.png").rename(tmp_path / "archive" / "pics" / "cats" / "a.png")
    assert load_images(str(tmp_path), "").names == []
    picture(tmp_path / "archive" / "pics" / "dogs" / "c.png")
    assert load_images(str(tmp_path), "").names == ["cats", "dogs"]


def splits(root, folders):
    """In each of the folders two images, whose grey level is 10 times the place of the folder, and 1 more."""
    for i, folder in enumerate(folders.split()):
        picture(root / folder / "a.png", colour=10 * i)
        picture(root / folder / "b.png", colour=10 * i + 1)


@pytest.mark.parametrize(
    "folders, x, y, x_test, y_test, left_out",
    [
        (
            "train/cat train/dog test/cat test/dog",
            [0, 1, 10, 11],
            [0, 0, 1, 1],
            [20, 21, 30, 31],
            [0, 0, 1, 1],
            "",
        ),
        ("TRAINING/cat TRAINING/dog Testing/dog", [0, 1, 10, 11], [0, 0, 1, 1], [20, 21], [1, 1], ""),
        ("train/cat train/dog valid/dog", [0, 1, 10, 11], [0, 0, 1, 1], [20, 21], [1, 1], ""),
        ("train test", [0, 1], [-1, -1], [10, 11], [-1, -1], ""),
        (
            "zip/train/train zip/test/test zip/val",
            [0, 1],
            [-1] * 2,
            [10, 11],
            [-1] * 2,
            "2 images of the split val",
        ),
        (
            "train/cat train/dog test/all",
            [0, 1, 10, 11],
            [0, 0, 1, 1],
            [],
            [],
            "2 images of test/all, which have",
        ),
        ("train/cat train/dog", [0, 1, 10, 11], [0, 0, 1, 1], [], [], ""),
    ],
)
def test_splits_are_read_as_such(folders, x, y, x_test, y_test, left_out, tmp_path):
    splits(tmp_path, folders)
    images = load_images(str(tmp_path), "")
    assert images.left_out.startswith(left_out) and bool(images.left_out) == bool(left_out)
    found = list(zip(levels(images.x), images.y.tolist(), strict=True))
    assert sorted(found) == list(zip(x, y, strict=True))
    assert list(zip(levels(images.x_test), images.y_test.tolist(), strict=True)) == list(
        zip(x_test, y_test, strict=True)
    )


def test_a_test_split_without_classes_leaves_one_to_be_held_out(tmp_path):
    splits(tmp_path, "train/cat train/dog train/cow test")
    images = load_images(str(tmp_path), "")
    assert (len(images.x), len(images.x_test)) == (4, 2)
    assert set(levels(images.x) + levels(images.x_test)) == {0, 1, 10, 11, 20, 21}
    assert images.left_out == "2 images of test, which have no classes"


@pytest.mark.parametrize(
    "folders, words",
    [
        ("car bus train", "the folders train, bus, car: a split .* or classes.*rename a class"),
        ("train test unlabeled", "a split .* or classes"),
        ("train Train test", "a split .* or classes"),
        ("test val", "a split .* or classes"),
        ("training_set test_set", "the folders test_set, training_set: a split .* or classes"),
        ("trainA trainB testA testB", "a split .* or classes"),
        ("cat/train cat/test dog/train dog/test", "a split .* or classes"),
        ("train/cat train/dog test/cat test/bird", "the training images in .* lack the classes bird"),
        ("train test/cat test/dog", "lack the classes cat, dog"),
        ("test", "only .*test holds images"),
        ("pics/val/cat pics/val/dog", "only .*val holds images"),
    ],
)
def test_folders_that_may_be_splits_or_classes_are_refused(folders, words, tmp_path):
    splits(tmp_path, folders)
    refused(tmp_path, words)


def test_class_names_that_only_hold_a_word_of_a_split_are_classes(tmp_path):
    splits(tmp_path, "train_station steam_train airport Airport trainer")
    assert load_images(str(tmp_path), "").names == [
        "Airport",
        "airport",
        "steam_train",
        "train_station",
        "trainer",
    ]


def test_an_image_beside_class_folders_is_named(tmp_path):
    picture(tmp_path / "class" / "a.png")
    picture(tmp_path / "b.png")
    refused(tmp_path, "b.png lies beside the class folders class")


def test_what_data_are_does_not_depend_on_where_they_lie(tmp_path, monkeypatch):
    splits(tmp_path, "pics/cat pics/dog")
    monkeypatch.chdir(tmp_path)
    facts = load_images("pics", "").facts()
    for path in ("./pics", "pics/", str(tmp_path / "pics"), "../" + tmp_path.name + "/pics"):
        assert load_images(path, "").facts() == facts
    (tmp_path / "pics").rename(tmp_path / "moved")
    assert load_images("moved", "").facts() == facts
    monkeypatch.chdir("moved")
    assert load_images(".", "").facts() == facts
    (tmp_path / "moved" / "dog").rename(tmp_path / "moved" / "wolf")
    assert load_images(".", "").facts() != facts


# -- pixels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_as_their_camera_was_held(orientation, tmp_path):
    """Of a 12 x 8 photo the bright left half lies where EXIF's table says, in each format."""
    stored = np.zeros((8, 12), dtype=np.uint8)
    stored[:, :6] = 255
    upright = [None, stored, stored[:, ::-1], stored[::-1, ::-1], stored[::-1], stored.T]
    upright += [np.rot90(stored, -1), stored[::-1, ::-1].T, np.rot90(stored)]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.jpg", "a.png", "a.tif", "a.webp"):
        Image.fromarray(stored).save(tmp_path / name, exif=exif)
        x, _ = read_image(tmp_path / name)
        assert np.abs(x[0].numpy().astype(int) - upright[orientation].astype(int)).max() < 20, name


def test_transparent_images_need_a_background(tmp_path):
    half = Image.new("RGBA", (8, 8), (200, 100, 0, 255))
    half.paste((10, 20, 30, 0), (0, 0, 4, 8))
    half.putpixel((7, 7), (200, 100, 0, 51))
    half.save(tmp_path / "a.png")
    refused(tmp_path, "a.png is transparent: .*--background white")
    x = load_images(str(tmp_path), "", background="#00ff00").x[0]
    assert x[:, 0, 0].tolist() == [0, 255, 0]
    assert x[:, 0, 4].tolist() == [200, 100, 0]
    assert x[:, 7, 7].tolist() == [40, 224, 0]  # a fifth of it


def test_the_background_comes_before_the_scaling(tmp_path):
    """What lies under full transparency never shows, not even at an edge."""
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 8, 16))
    image.save(tmp_path / "a.png")
    x = load_images(str(tmp_path), "", image_size=5, background="black").x[0]
    assert x[0].max() == 0


def transparent(mode):
    """An image whose left pixel is transparent, and whose right one is not, as (image, how to save it)."""
    image = Image.new("P" if mode in ("P", "P bytes") else mode, (2, 1))
    if mode == "LA":
        image.putdata([(9, 0), (77, 255)])
        return image, {}
    image.putpalette([9, 9, 9, 77, 77, 77]) if image.mode == "P" else None
    image.putdata([0, 1] if image.mode == "P" else [9, 77] if mode == "L" else [(9, 9, 9), (77, 77, 77)])
    colour = {"P": 0, "P bytes": b"\x00\xff", "L": 9, "RGB": (9, 9, 9)}[mode]
    return image, dict(transparency=colour)


@pytest.mark.parametrize("mode", ["LA", "P", "P bytes", "L", "RGB"])
def test_every_kind_of_transparency_is_seen(mode, tmp_path):
    image, how = transparent(mode)
    image.save(tmp_path / "a.png", **how)
    refused(tmp_path, "a.png is transparent")
    grey = load_images(str(tmp_path), "", background="white").x[0]
    assert len(grey) == (1 if mode in ("L", "LA") else 3)
    assert grey[:, 0].T.tolist() == [[255] * len(grey), [77] * len(grey)]
    x = load_images(str(tmp_path), "", background="lime").x[0]
    assert x[:, 0].T.tolist() == [[0, 255, 0], [77, 77, 77]]


def test_an_alpha_channel_that_hides_nothing_is_no_transparency(tmp_path):
    picture(tmp_path / "a.png", mode="RGBA", colour=(1, 2, 3, 255))
    picture(tmp_path / "b.png", mode="LA", colour=(7, 255))
    assert read_image(tmp_path / "a.png")[0][:, 0, 0].tolist() == [1, 2, 3]
    assert read_image(tmp_path / "b.png")[0][:, 0, 0].tolist() == [7]


@pytest.mark.parametrize("name", ["a.png", "a.tif", "float.tif", "int.tif", "a.pgm", "a.jp2"])
def test_more_than_8_bits_of_grey_are_refused(name, tmp_path):
    values = np.arange(256, dtype=np.float32 if "float" in name else np.int32 if "int" in name else np.uint16)
    Image.fromarray(values.reshape(16, 16) * 16).save(tmp_path / name)
    refused(tmp_path, f"{name} .mode .* cannot be read without guessing its range .*mogrify -depth 8")


def png(path, depth, colour_type, pixels, transparent=b""):
    """A PNG of two pixels in a row, of any depth, which Pillow cannot write."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, colour_type, 0, 0, 0))]
    parts += [(b"tRNS", transparent)] if transparent else []
    file = b"\x89PNG\r\n\x1a\n"
    for name, content in [*parts, (b"IDAT", zlib.compress(b"\0" + pixels)), (b"IEND", b"")]:
        crc = zlib.crc32(name + content)
        file += struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)
    path.write_bytes(file)


def test_colours_of_16_bits_are_refused_too_and_greys_of_2_bits_are_spread(tmp_path):
    png(
        tmp_path / "rgb.png", 16, 2, struct.pack(">6H", 3780, 0, 0x0800, 0x0100, 0x00FF, 0x0234)
    )  # of 12 bits
    with pytest.raises(UserError, match="rgb.png .mode RGB. cannot be read without guessing its range"):
        read_image(tmp_path / "rgb.png")
    png(tmp_path / "grey.png", 2, 0, bytes([0b11010000]))
    assert read_image(tmp_path / "grey.png")[0].tolist() == [[[255, 85]]]


def test_a_transparent_colour_that_pillow_does_not_find_is_refused(tmp_path):
    png(tmp_path / "rgb.png", 16, 2, struct.pack(">6H", 9, 9, 9, 0, 0, 0), struct.pack(">3H", 9, 9, 9))
    png(tmp_path / "grey.png", 2, 0, bytes([0b11010000]), struct.pack(">H", 3))
    for name in ("rgb.png", "grey.png"):
        with pytest.raises(UserError, match=f"{name} .mode .* cannot be read without guessing"):
            read_image(tmp_path / name, "white")


@pytest.mark.parametrize(
    "name, mode, colour, seen",
    [
        ("a.png", "1", 1, [255]),
        ("a.png", "P", 1, [255, 0, 0]),
        ("a.jpg", "CMYK", (0, 255, 255, 0), [255, 0, 0]),
        ("a.tif", "YCbCr", (76, 85, 255), [254, 0, 0]),
        ("a.gif", "L", 33, [33, 33, 33]),
    ],
)
def test_other_modes_keep_their_colours(name, mode, colour, seen, tmp_path):
    image = Image.new(mode, (8, 8), colour)
    if mode == "P":
        image.putpalette([0, 0, 255, 255, 0, 0])
    image.save(tmp_path / name)
    x = read_image(tmp_path / name)[0][:, 0, 0].tolist()
    assert len(x) == len(seen) and max(abs(a - b) for a, b in zip(x, seen, strict=True)) < 3


def test_colours_that_are_not_of_a_screen_are_refused(tmp_path):
    picture(tmp_path / "a.tif", mode="LAB", colour=(50, 10, 10))
    refused(tmp_path, "a.tif .mode LAB. cannot be read without guessing")


def test_a_grey_image_beside_one_in_colour_is_read_in_colour(tmp_path):
    for i, name in enumerate("abcd"):
        picture(
            tmp_path / f"{name}.png", mode="RGB" if i % 2 else "L", colour=(255, i, 0) if i % 2 else 7 + i
        )
    images = load_images(str(tmp_path), "")
    assert images.x.shape == (4, 3, 8, 8)
    assert sorted(images.x[:, :, 0, 0].tolist()) == [[7, 7, 7], [9, 9, 9], [255, 1, 0], [255, 3, 0]]
    assert images.names == []
    assert (images.y == -1).all()
    assert len(images.x_test) == 0


def test_a_folder_without_an_image_is_refused(tmp_path):
    refused(tmp_path, "no image in .* but nothing")


def test_a_broken_image_is_named(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    refused(tmp_path, "b.png cannot be read as an image")
    (tmp_path / "b.png").unlink()
    (tmp_path / "c.png").symlink_to(tmp_path / "gone.png")
    refused(tmp_path, "c.png cannot be read as an image")


def test_images_of_mixed_sizes_are_named_and_image_size_mends_them(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", size=(12, 10))
    refused(tmp_path, r"[ab].png is (8x8|12x10), .*[ab].png is (8x8|12x10); add --image_size")
    assert load_images(str(tmp_path), "", image_size=8).x.shape == (2, 1, 8, 8)


def test_no_more_than_one_image_is_held_at_its_own_size(tmp_path, monkeypatch):
    for i in range(6):
        picture(tmp_path / f"{i}.png", size=(40, 30), colour=i)
    held, most = weakref.WeakSet(), 0

    def counted(*args):
        nonlocal most
        most = max(most, len(held))
        image, more = read_image(*args)
        held.add(image)
        return image, more

    monkeypatch.setattr(data, "read_image", counted)
    images = load_images(str(tmp_path), "", image_size=4)
    assert most <= 1
    assert images.x.untyped_storage().data_ptr() == images.x_test.untyped_storage().data_ptr()  # and once
    assert sorted(levels(images.x) + levels(images.x_test)) == list(range(6))


@pytest.mark.parametrize("folders", [("images", "test_images"), ("cats", "cats_test"), ("cat", "val2017")])
def test_a_folder_that_may_be_a_split_is_refused_also_without_a_train(tmp_path, folders):
    for folder in folders:
        (tmp_path / folder).mkdir()
        Image.new("L", (4, 4)).save(tmp_path / folder / "a.png")
    refused(tmp_path, "a split .train, test, val. or classes")
