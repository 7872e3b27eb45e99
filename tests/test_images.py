"""common/images.py: what is read from torchvision's files, the digits and folders, and what is refused."""

import io
import re
import struct
import unicodedata
import zipfile
import zlib

import numpy as np
import pytest
import torch
from conftest import SHARED, write_idx
from PIL import Image

from common.images import load_images, read_image
from common.run import UserError


def picture(path, size=(8, 8), mode="L", colour=100, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **how)


def load(path, **how):
    return load_images(str(path), "", **how)


def levels(x):
    """The grey level of each image of one level."""
    return x[:, 0, 0, 0].tolist()


def pairs(images):
    """Level and label of all images, sorted."""
    x, y = torch.cat([images.x, images.x_test]), torch.cat([images.y, images.y_test])
    return sorted(zip(levels(x), y.tolist(), strict=True))


def folders_of_two(root, folders):
    """In each of the folders two images, whose grey level is 10 times the place of the folder, and 1 more."""
    for i, folder in enumerate(folders):
        picture(root / folder / "a.png", colour=10 * i)
        picture(root / folder / "b.png", colour=10 * i + 1)


def refused(path, name="", **how):
    with pytest.raises(UserError) as caught:
        load(path, **how)
    assert name in str(caught.value)


# -- data sets with a name ---------------------------------------------------------------------------------


def test_fashionmnist_is_read_from_an_existing_folder(fake_fashionmnist):
    images = load_images("fashionmnist", str(fake_fashionmnist))
    assert (images.x.shape, images.x_test.shape) == ((120, 1, 28, 28), (60, 1, 28, 28))
    assert (images.x.dtype, images.y.dtype) == (torch.uint8, torch.int64)
    assert images.names[0] == "T-shirt/top" and len(images.names) == 10
    assert (images.x[3, 0, 6:10] == 200).all() and images.y[3] == 3
    assert load_images("fashionmnist", str(fake_fashionmnist), size=16).x.shape == (120, 1, 16, 16)


def test_the_home_folder_has_a_short_name(fake_fashionmnist, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(fake_fashionmnist))
    assert len(load_images("fashionmnist", "~").x) == 120
    monkeypatch.setenv("HOME", str(tmp_path))
    picture(tmp_path / "pics/a.png")
    assert len(load("~/pics").x) == 1


@pytest.mark.parametrize("labels", [range(10), range(9), range(11), [0] * 9 + [10]])
def test_files_of_mnist_are_read_or_refused_where_they_do_not_fit_together(labels, tmp_path):
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"MNIST/raw/{part}-images-idx3-ubyte", torch.zeros(10, 28, 28).byte())
        write_idx(tmp_path / f"MNIST/raw/{part}-labels-idx1-ubyte", torch.tensor(labels).byte())
    if labels == range(10):
        assert load_images("mnist", str(tmp_path)).names == list("0123456789")
        return
    with pytest.raises(UserError, match=str(tmp_path)):
        load_images("mnist", str(tmp_path))


def test_cifar10_is_channels_first(monkeypatch, tmp_path):
    class Stub:  # what torchvision's CIFAR10 holds once its files are read
        classes = ["airplane", "automobile"]

        def __init__(self, root, train, download):
            self.targets = [0, 1, 1] if train else [1]
            self.data = np.zeros((len(self.targets), 32, 32, 3), dtype=np.uint8)
            self.data[:, 4, 5] = (10, 20, 30)

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Stub)
    images = load_images("cifar10", str(tmp_path / "new"))
    assert (images.x.shape, images.x_test.shape) == ((3, 3, 32, 32), (1, 3, 32, 32))
    assert images.y.tolist() == [0, 1, 1] and images.y_test.tolist() == [1]
    assert images.x[0, :, 4, 5].tolist() == [10, 20, 30]
    assert images.names == Stub.classes


def test_digits_need_no_file_and_keep_the_splits_apart():
    images = load_images("digits", "/nowhere")
    assert (images.x.shape, images.x_test.shape) == ((1437, 1, 8, 8), (360, 1, 8, 8))
    assert (images.x.min(), images.x.max()) == (0, 255)
    assert set(images.y.tolist()) == set(range(10))
    seen = {x.numpy().tobytes() for x in images.x}
    assert not any(x.numpy().tobytes() in seen for x in images.x_test)
    assert images.facts == dict(shape=[1, 8, 8], names=list("0123456789"), checksum="e572b31ecc82")
    assert load_images("digits", "/nowhere", size=16).x_test.shape == (360, 1, 16, 16)


def test_a_download_that_fails_names_what_needs_none(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST.download", refuse)
    with pytest.raises(UserError, match="digits"):
        load_images("fashionmnist", str(tmp_path))


def test_what_is_neither_a_name_nor_a_folder_is_refused(tmp_path, monkeypatch):
    refused("mnits", "mnits")
    picture(tmp_path / "a.png")
    refused(tmp_path / "a.png", "a.png")
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "digits/a.png")
    refused("digits", "./digits")  # the built-in data set or the folder?
    assert len(load("./digits").x) == 1
    (tmp_path / "loop").symlink_to("loop")
    refused("loop", "loop")


# -- folders: which files, which class, which split --------------------------------------------------------


def test_subfolders_are_classes_and_a_fifth_is_held_out(tmp_path):
    for i in range(10):
        picture(tmp_path / "dark" / f"{i}.png", colour=i)
        picture(tmp_path / "light" / "deep" / f"{i}.jpg", colour=200 + i)
    images = load(tmp_path)
    assert images.names == ["dark", "light"]
    assert (images.x.shape, images.x_test.shape) == ((16, 1, 8, 8), (4, 1, 8, 8))
    assert all(label == (level > 128) for level, label in pairs(images))
    assert len(set(levels(images.x) + levels(images.x_test))) == 20


@pytest.mark.parametrize("n, held_out", [(1, 0), (4, 0), (5, 1), (9, 2)])
def test_of_few_images_none_is_held_out(n, held_out, tmp_path):
    for i in range(n):
        picture(tmp_path / "only" / f"{i}.png", colour=i)
    images = load(tmp_path)
    assert (len(images.x), len(images.x_test)) == (n - held_out, held_out)
    assert pairs(images) == [(i, -1) for i in range(n)] and images.names == []  # one folder is no class


def test_classes_are_numbered_as_people_count(tmp_path):
    names = ["1", "2", "02", "10", "a 2", "a 10", "b", "Z"]
    folders_of_two(tmp_path, names)
    images = load(tmp_path)
    assert images.names == ["1", "02", "2", "10", "Z", "a 2", "a 10", "b"]
    number = {10 * i: images.names.index(name) for i, name in enumerate(names)}
    assert all(label == number[level // 10 * 10] for level, label in pairs(images))


def test_accents_have_two_spellings_and_a_class_one_name(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    folders_of_two(tmp_path, [f"{decomposed}", "tea"])
    assert load(tmp_path).names == [composed, "tea"]
    folders_of_two(tmp_path, [composed])
    refused(tmp_path, str(tmp_path))


def test_hidden_files_and_what_systems_leave_are_counted_not_read(tmp_path, capsys):
    for i, folder in enumerate(["cats", "dogs"]):
        picture(tmp_path / folder / "a.png", colour=i)
        for junk in (f"{folder}/.ipynb_checkpoints", f"{folder}/@eaDir", f"__MACOSX/{folder}", ".git"):
            picture(tmp_path / junk / "a.png", colour=9)
        (tmp_path / folder / "._a.png").write_bytes(b"Mac OS X resource fork")
    images = load(tmp_path)
    assert images.names == ["cats", "dogs"] and pairs(images) == [(0, 0), (1, 1)]
    assert re.findall(r"(\d+) hidden", capsys.readouterr().out) == ["3", "3", "2"]


def test_files_that_are_left_out_are_counted(tmp_path, capsys):
    picture(tmp_path / "a.png")
    for name in ("b.heic", "c.HEIC", "notes.txt", "README", "paper.pdf", "film.mpg", "table.h5"):
        (tmp_path / name).write_bytes(b"?")
    assert len(load(tmp_path).x) == 1
    printed = capsys.readouterr().out
    assert "2 .heic" in printed
    assert all(f"1 {kind}" in printed for kind in (".txt", ".pdf", ".mpg", ".h5", "without a suffix"))
    (tmp_path / "a.png").unlink()
    refused(tmp_path, str(tmp_path))
    refused(tmp_path / "none", "none")


def test_links_are_followed_and_circles_are_not(tmp_path):
    picture(tmp_path / "store" / "somewhere" / "a.png", colour=1)
    picture(tmp_path / "store" / "b.png", colour=2)
    picture(tmp_path / "pics" / "dogs" / "c.png", colour=3)
    (tmp_path / "pics" / "cats").symlink_to(tmp_path / "store" / "somewhere")
    (tmp_path / "pics" / "dogs" / "d.png").symlink_to(tmp_path / "store" / "b.png")
    (tmp_path / "pics" / "dogs" / "again").symlink_to(tmp_path / "pics")
    (tmp_path / "pics" / "self").symlink_to(tmp_path / "pics")
    images = load(tmp_path / "pics")
    assert images.names == ["cats", "dogs"] and pairs(images) == [(1, 0), (2, 1), (3, 1)]
    (tmp_path / "pics" / "dogs" / "e.png").symlink_to("e.png")
    refused(tmp_path / "pics", "e.png")


def test_folders_around_all_images_are_no_class(tmp_path):
    pics = tmp_path / "archive [1]" / "pics"
    picture(pics / "a.png")
    (tmp_path / "README.txt").write_text("photos")
    assert load(tmp_path).names == []
    (pics / "cats").mkdir()
    (pics / "a.png").rename(pics / "cats" / "a.png")
    assert load(tmp_path).names == []
    picture(pics / "dogs" / "c.png")
    assert load(tmp_path).names == ["cats", "dogs"]


@pytest.mark.parametrize(
    "folders, train, test",
    [
        ("train/cat train/dog test/cat test/dog", {0: 0, 1: 0, 10: 1, 11: 1}, {20: 0, 21: 0, 30: 1, 31: 1}),
        ("train/cat train/dog test/dog", {0: 0, 1: 0, 10: 1, 11: 1}, {20: 1, 21: 1}),
        ("zip/train zip/test", {0: -1, 1: -1}, {10: -1, 11: -1}),
        ("train/cat train/dog", {0: 0, 1: 0, 10: 1, 11: 1}, {}),
    ],
)
def test_splits_are_read_as_such(folders, train, test, tmp_path):
    folders_of_two(tmp_path, folders.split())
    images = load(tmp_path)
    assert dict(zip(levels(images.x), images.y.tolist(), strict=True)) == train
    assert dict(zip(levels(images.x_test), images.y_test.tolist(), strict=True)) == test


IN_DOUBT = (  # may be splits or classes, or some images have no class
    "car bus train; train test unlabeled; train val test; train valid; Train Test; train Train test; "
    "test val; test; training_set test_set; trainA trainB testA testB; images test_images; cats cats_test; "
    "cats catsTest; cat val2017; cat/train cat/test dog/train dog/test; train/train test/test; class/cat .; "
    "pics/val/cat pics/val/dog; train/cat train/dog test/cat test/bird; train/cat train/dog test; "
    "train/cat train/dog test/all; train test/cat test/dog"
)


@pytest.mark.parametrize("folders", IN_DOUBT.split("; "))
def test_folders_in_doubt_are_refused(folders, tmp_path):
    folders_of_two(tmp_path, folders.split())
    refused(tmp_path, str(tmp_path))


def test_class_names_that_only_hold_a_word_of_a_split_are_classes(tmp_path):
    names = ["Airport", "airport", "contest", "steam_train", "train_station", "trainer"]
    folders_of_two(tmp_path, names)
    assert load(tmp_path).names == names


def test_what_data_are_does_not_depend_on_where_they_lie(tmp_path, monkeypatch):
    folders_of_two(tmp_path, ["pics/cat", "pics/dog"])
    monkeypatch.chdir(tmp_path)
    facts = load("pics").facts
    for path in ("./pics", "pics/", tmp_path / "pics", f"../{tmp_path.name}/pics"):
        assert load(path).facts == facts
    (tmp_path / "pics").rename(tmp_path / "moved")
    monkeypatch.chdir("moved")
    assert load(".").facts == facts
    (tmp_path / "moved" / "dog").rename(tmp_path / "moved" / "wolf")
    assert load(".").facts != facts


# -- pixels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", "png JPG jpeg jfif PGM ppm bmp gif webp tif TIFF jp2 avif tga ico".split())
def test_what_pillow_opens_is_an_image(suffix, tmp_path):
    picture(tmp_path / f"a.{suffix}", size=(16, 16), mode="RGB")
    assert abs(int(load(tmp_path).x[0, 0, 0, 0]) - 100) < 3


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif", "mpo.jpg"])
def test_animations_and_pages_are_refused_but_not_a_phones_photo_with_its_preview(suffix, tmp_path):
    path, frames = tmp_path / f"a.{suffix}", [Image.new("RGB", (8, 8), (i, i, i)) for i in (250, 50)]
    frames[0].save(path, "MPO" if suffix == "mpo.jpg" else None, save_all=True, append_images=frames[1:])
    if suffix != "mpo.jpg":
        refused(tmp_path, path.name)
        frames[0].save(path)
    assert abs(levels(load(tmp_path).x)[0] - 250) < 3


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
        x = read_image(tmp_path / name, None)
        assert np.abs(x[0].numpy().astype(int) - upright[orientation].astype(int)).max() < 20, name


@pytest.mark.parametrize(
    "mode, pixels, transparency",
    [
        ("LA", [(9, 0), (77, 255)], None),
        ("RGBA", [(9, 9, 9, 254), (77, 77, 77, 255)], None),
        ("P", [0, 1], 0),
        ("P", [0, 1], b"\x00\xff"),
        ("L", [9, 77], 9),
        ("RGB", [(9, 9, 9), (77, 77, 77)], (9, 9, 9)),
    ],
)
def test_every_kind_of_transparency_is_refused(mode, pixels, transparency, tmp_path):
    image = Image.new(mode, (2, 1))
    image.putdata(pixels)
    image.save(tmp_path / "a.png", **({} if transparency is None else dict(transparency=transparency)))
    refused(tmp_path, "a.png")


@pytest.mark.parametrize("name", ["a.png", "a.tif", "float.tif", "int.tif", "a.pgm", "a.jp2"])
def test_more_than_8_bits_of_grey_are_refused(name, tmp_path):
    values = np.arange(256, dtype=np.float32 if "float" in name else np.int32 if "int" in name else np.uint16)
    Image.fromarray(values.reshape(16, 16) * 16).save(tmp_path / name)
    refused(tmp_path, name)


def write_png(path, depth, colour_type, pixels, transparency=b""):
    """A PNG of two pixels in a row, of any depth, which Pillow cannot write."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, colour_type, 0, 0, 0))]
    parts += [(b"tRNS", transparency)] if transparency else []
    file = b"\x89PNG\r\n\x1a\n"
    for name, content in [*parts, (b"IDAT", zlib.compress(b"\0" + pixels)), (b"IEND", b"")]:
        file += struct.pack(">I", len(content)) + name + content
        file += struct.pack(">I", zlib.crc32(name + content))
    path.write_bytes(file)


@pytest.mark.parametrize(
    "depth, colour_type, pixels, transparency",
    [
        (16, 2, struct.pack(">6H", 3780, 0, 0x0800, 0x0100, 0x00FF, 0x0234), b""),  # colours of 12 bits
        (16, 2, struct.pack(">6H", 9, 9, 9, 0, 0, 0), struct.pack(">3H", 9, 9, 9)),
        (2, 0, bytes([0b11010000]), struct.pack(">H", 3)),  # Pillow does not find the transparent level
    ],
)
def test_where_pillow_loses_something_is_refused(depth, colour_type, pixels, transparency, tmp_path):
    write_png(tmp_path / "a.png", depth, colour_type, pixels, transparency)
    refused(tmp_path, "a.png")


def test_greys_of_2_bits_are_spread(tmp_path):
    write_png(tmp_path / "a.png", 2, 0, bytes([0b11010000]))
    assert load(tmp_path).x[0].tolist() == [[[255, 85]]]


@pytest.mark.parametrize(
    "name, mode, colour, seen",
    [
        ("a.png", "1", 1, [255]),
        ("a.png", "LA", (7, 255), [7]),
        ("a.png", "P", 1, [255, 0, 0]),
        ("a.png", "RGBA", (1, 2, 3, 255), [1, 2, 3]),
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
    x = read_image(tmp_path / name, None)[:, 0, 0].tolist()
    assert len(x) == len(seen) and max(abs(a - b) for a, b in zip(x, seen, strict=True)) < 3


def test_a_grey_image_beside_one_in_colour_is_read_in_colour(tmp_path):
    for i, name in enumerate("abcd"):
        mode, colour = ("RGB", (255, i, 0)) if i % 2 else ("L", 7 + i)
        picture(tmp_path / f"{name}.png", mode=mode, colour=colour)
    images = load(tmp_path)
    assert images.x.shape == (4, 3, 8, 8)
    assert sorted(images.x[:, :, 0, 0].tolist()) == [[7, 7, 7], [9, 9, 9], [255, 1, 0], [255, 3, 0]]
    assert images.names == [] and (images.y == -1).all()


def test_sizes_must_be_one_or_be_made_one_from_the_centre_squares(tmp_path):
    stripes = np.repeat(np.array([0, 100, 200], dtype=np.uint8), 4)
    Image.fromarray(np.tile(stripes, (4, 1))).save(tmp_path / "a.png")
    picture(tmp_path / "b.png", size=(10, 16))
    refused(tmp_path, "b.png")
    images = load(tmp_path, size=4)
    assert images.x.shape == (2, 1, 4, 4) and images.x.unique().tolist() == [100]


def test_what_is_no_image_of_a_screen_is_named(tmp_path):
    good = io.BytesIO()
    Image.new("L", (8, 8)).save(good, "PNG")
    for content in (b"", b"no image", good.getvalue()[:40]):
        (tmp_path / "b.png").write_bytes(content)
        refused(tmp_path, "b.png")
    (tmp_path / "b.png").unlink()
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    refused(tmp_path, "b.png")
    (tmp_path / "b.png").unlink()
    picture(tmp_path / "a.tif", mode="LAB", colour=(50, 10, 10))
    refused(tmp_path, "a.tif")


def test_a_file_that_may_not_be_read_is_named_with_its_own_error(tmp_path, monkeypatch):
    """Permissions do not stop the superuser, as whom tests may run: open refuses in their place."""
    picture(tmp_path / "a.png")

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    refused(tmp_path, "Permission denied")


# -- folders as people have them ---------------------------------------------------------------------------

# Checksums as at aca34c9, but for i05_numbers, whose classes are numbered otherwise; refused if none.
FIELD = """
04_ipynb_checkpoints/pics 53fbefeafbf0, 06_splits/classes 2f674b8f5273, 06_splits/plain b5752e9313aa,
09_formats/pgm_only 1e4c86536e04, 10_names/写真 素材 560385ed7549, 11_few/one 0ea67818763a,
11_few/oneclass cfa343657704, 11_few/wrapped 824581ead245, i05_numbers 4a3a1f4b3ac9,
02_grey16/scans , 02_grey16/tiff12 , 03_alpha/logos_palette , 06_splits/trainval , 09_formats/pics """


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
@pytest.mark.parametrize("case", FIELD[1:].replace("\n", " ").split(", "))
def test_folders_as_people_have_them_are_right_or_refused(case):
    folder, checksum = case.rsplit(" ", 1)
    if checksum:
        assert load(SHARED / "field" / folder).facts["checksum"] == checksum
    else:
        refused(SHARED / "field" / folder, folder)


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
def test_the_emoji_are_as_they_were(tmp_path):
    zipfile.ZipFile(SHARED / "data/emoji/emoji_noto_32.zip").extractall(tmp_path)
    assert load(tmp_path).facts["checksum"] == "69558f10de0d"
