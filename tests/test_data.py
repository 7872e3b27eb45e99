"""data.py: torchvision's files, digits, folders of images, and what each says of bad input."""
import numpy as np
import pytest
import torch
from PIL import Image

from data import load_images
from training import UserError


def picture(path, size=(8, 8), mode="L", colour=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def test_fashionmnist_is_read_from_an_existing_folder(fake_fashionmnist):
    images = load_images("fashionmnist", str(fake_fashionmnist))
    assert images.x.shape == (120, 1, 28, 28) and images.x_test.shape == (60, 1, 28, 28)
    assert images.x.dtype == torch.uint8 and images.y.dtype == torch.int64
    assert images.names[0] == "T-shirt/top" and len(images.names) == 10
    assert (images.x[3, 0, 6:10] == 200).all() and images.y[3] == 3
    assert load_images("fashionmnist", str(fake_fashionmnist), image_size=16).x.shape == (120, 1, 16, 16)


def test_cifar10_is_colour_channels_first(monkeypatch):
    class Stub:  # what torchvision's CIFAR10 holds once its files are read
        classes = ["airplane", "automobile"]

        def __init__(self, root, train, download):
            self.targets = [0, 1, 1] if train else [1]
            self.data = np.zeros((len(self.targets), 32, 32, 3), dtype=np.uint8)
            self.data[:, 4, 5] = (10, 20, 30)

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Stub)
    images = load_images("cifar10", "")
    assert images.x.shape == (3, 3, 32, 32) and images.x_test.shape == (1, 3, 32, 32) and images.y.tolist() == [0, 1, 1]
    assert images.x[0, :, 4, 5].tolist() == [10, 20, 30] and images.names == ["airplane", "automobile"]


def test_digits_need_no_file_and_keep_the_splits_apart():
    images = load_images("digits", "/nowhere")
    assert images.x.shape == (1437, 1, 8, 8) and images.x_test.shape == (360, 1, 8, 8)
    assert images.x.max() == 255 and images.x.min() == 0 and set(images.y.tolist()) == set(range(10))
    seen = {x.numpy().tobytes() for x in images.x}
    assert sum(x.numpy().tobytes() in seen for x in images.x_test) == 0


def test_unreachable_download_names_the_way_out(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST.download", refuse)
    with pytest.raises(UserError, match="could not be downloaded .*--dataset digits.*--data_dir"):
        load_images("fashionmnist", str(tmp_path))


def test_unknown_name():
    with pytest.raises(UserError, match="no data set or folder 'mnits'; choose fashionmnist, mnist, cifar10, digits, or"):
        load_images("mnits", "data")


def test_folder_with_classes(tmp_path):
    for i in range(10):
        picture(tmp_path / "dark" / f"{i}.png", colour=i)
        picture(tmp_path / "light" / "deep" / f"{i}.jpg", colour=200 + i)
    images = load_images(str(tmp_path), "")
    assert images.names == ["dark", "light"] and images.x.shape == (16, 1, 8, 8) and images.x_test.shape == (4, 1, 8, 8)
    for x, y in [(images.x, images.y), (images.x_test, images.y_test)]:
        assert torch.equal((x.flatten(1).float().mean(1) > 128).long(), y)


def test_folder_without_classes_colour_and_grey_together(tmp_path):
    picture(tmp_path / "a.png", mode="RGB", colour=(255, 0, 0))
    picture(tmp_path / "b.png", colour=7)
    images = load_images(str(tmp_path), "")
    assert images.x.shape == (2, 3, 8, 8) and images.names == [] and (images.y == -1).all() and len(images.x_test) == 0
    assert images.x[0, :, 0, 0].tolist() == [255, 0, 0] and images.x[1, :, 0, 0].tolist() == [7, 7, 7]


def test_bad_folders_name_the_file_and_the_way_out(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image in .*empty"):
        load_images(str(tmp_path / "empty"), "")
    picture(tmp_path / "broken" / "a.png")
    (tmp_path / "broken" / "b.png").write_bytes((tmp_path / "broken" / "a.png").read_bytes()[:40])
    with pytest.raises(UserError, match="b.png cannot be read as an image"):
        load_images(str(tmp_path / "broken"), "")
    picture(tmp_path / "mixed" / "a.png")
    picture(tmp_path / "mixed" / "b.png", size=(12, 10))
    with pytest.raises(UserError, match="a.png is 8x8, .*b.png is 12x10; add --image_size"):
        load_images(str(tmp_path / "mixed"), "")
    assert load_images(str(tmp_path / "mixed"), "", image_size=8).x.shape == (2, 1, 8, 8)
    picture(tmp_path / "stray" / "class" / "a.png")
    picture(tmp_path / "stray" / "b.png")
    with pytest.raises(UserError, match="b.png lies beside the class folders class"):
        load_images(str(tmp_path / "stray"), "")
