"""Images become tensors: two splits, whole in memory."""

import hashlib
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from common.run import UserError, is_builtin, log, permutation

TORCHVISION = {"fashionmnist": "FashionMNIST", "mnist": "MNIST", "cifar10": "CIFAR10"}
SUFFIXES = set(".png .jpg .jpeg .jfif .bmp .gif .webp .pgm .ppm .tif .tiff .jp2 .avif .tga .ico".split())
# Pillow's modes of 8 bits a channel, and what they are read as: grey or colour.
MODES = {"1": "L", "L": "L", "LA": "L"} | dict.fromkeys(("P", "RGB", "RGBA", "CMYK", "YCbCr"), "RGB")
HIDDEN = (".", "__MACOSX", "@eaDir", "$RECYCLE.BIN")  # .ipynb_checkpoints, ._photo.png: not the user's files
# Folders of a split: train, test_images, catsTest, val2017. A steam_train is a class.
SPLIT = re.compile(
    "^(?i:train(ing|set|val)?)$|((?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))"
    "(?i:test(ing|set)?|val(id|idation|set)?|dev|eval(uation)?)(?![a-z])"
)


@dataclass
class Images:
    """Both splits: x (N, C, H, W) uint8, labels y (N,) int64 (all -1 without classes); the classes' names."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    names: list[str]

    @property
    def facts(self):
        """What a checkpoint must know to sample, and to notice other data."""
        sha = hashlib.sha256(self.x.contiguous().numpy())
        sha.update(self.y.numpy())
        return dict(shape=list(self.x.shape[1:]), names=self.names, checksum=sha.hexdigest()[:12])


def load_images(dataset, data_dir, size=None):
    """fashionmnist, mnist, cifar10 (torchvision), digits (in scikit-learn), or a folder; size: see `fit`."""
    if is_builtin(dataset, ("digits", *TORCHVISION)):
        images = digits() if dataset == "digits" else from_torchvision(TORCHVISION[dataset], data_dir)
        if size:
            images.x, images.x_test = fit(images.x, size), fit(images.x_test, size)
        return images
    root = Path(os.path.expanduser(dataset))
    if not root.is_dir():
        raise UserError(f"no folder {dataset}: choose one, or digits, {', '.join(TORCHVISION)}")
    return from_folder(root, size)


def digits():
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = (torch.as_tensor(raw.images) * (255 / 16)).round().to(torch.uint8)[:, None]  # from 0..16
    return Images(*split(x, torch.as_tensor(raw.target).long()), [str(c) for c in raw.target_names])


def from_torchvision(name, data_dir):
    parts = []
    for train in (True, False):
        try:
            data = getattr(torchvision.datasets, name)(os.path.expanduser(data_dir), train, download=True)
            x, y = torch.as_tensor(data.data), torch.as_tensor(data.targets)
            if len(x) != len(y) or y.max() >= len(data.classes):
                raise ValueError(f"{len(x)} images, {len(y)} labels up to {y.max()}")
        except Exception as error:  # no network, a damaged file
            what = f"{name} could neither be read from --data_dir {data_dir} nor downloaded ({error!r:.200})"
            raise UserError(f"{what}; --dataset digits and a folder of images need no download") from error
        parts += [x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous(), y]
    return Images(*parts, [c.split(" - ")[0] for c in data.classes])  # MNIST's are "0 - zero"


def split(x, y):
    """Every fifth image of a seeded shuffle is held out, none of fewer than five."""
    order = permutation(len(x), 0)
    test = (torch.arange(len(x)) % 5 == 0) & (len(x) >= 5)
    return x[order[~test]], y[order[~test]], x[order[test]], y[order[test]]


def from_folder(root, size):
    """Images below root, whose folders are classes, or train and test with or without classes inside."""
    files = find_images(root)
    top = Path(os.path.commonpath([path.parent for path in files]))  # archives wrap a folder in folders
    folders = [path.relative_to(top).parts[:-1] for path in files]
    has_test = {parts[:1] for parts in folders} == {("train",), ("test",)}
    test = torch.tensor([has_test and parts[0] == "test" for parts in folders])
    folders = [parts[has_test:] for parts in folders]
    others = {*top.relative_to(root).parts} - {"train"}
    if doubt := sorted(filter(SPLIT.search, others.union(*folders))):
        hint = "rename a class; for splits keep just train and test there, with the classes inside them"
        raise UserError(f"{root} has the folders {', '.join(doubt)}, which may be splits or classes: {hint}")
    y, names = number_classes(files, folders)
    if new := {*y[test].tolist()} - {*y[~test].tolist()}:
        raise UserError(f"{top}/train has no class {names[min(new)]}, but {top}/test has: add or remove it")
    x = read_images(files, size)
    return Images(*((x[~test], y[~test], x[test], y[test]) if has_test else split(x, y)), names)


def find_images(root, above=()):
    """The images below root, in order; the log counts all other files. Links are followed, not in circles."""
    images, others, here = [], Counter(), root.resolve()
    for path in sorted(root.iterdir()) if here not in above else []:
        kind = "hidden" if path.name.startswith(HIDDEN) else path.suffix.lower() or "without a suffix"
        if path.is_dir() and kind != "hidden":
            images += find_images(path, (*above, here))
        elif kind in SUFFIXES:
            images.append(path)
        else:
            others[kind] += 1
    if others:
        log(f"left out of {root}: {', '.join(f'{n} {kind}' for kind, n in others.most_common())}")
    if not images and not above:
        raise UserError(f"no image in {root} or below: save images as .png or .jpg")
    return images


def number_classes(files, folders):
    """Labels (N,) of the files, -1 where none is in a folder, and the classes' names: 2 comes before 10."""
    found = ["".join(parts[:1]) for parts in folders]
    labels = [unicodedata.normalize("NFC", name) for name in found]  # on a Mac é is two characters
    if len(set(labels)) < len(set(found)):
        raise UserError(f"two folders beside {files[0].parent} have one name in two spellings: rename one")
    padded = {name: re.sub(r"\d+", lambda n: n[0].zfill(20), name) for name in set(labels) - {""}}
    names = sorted(padded, key=lambda name: (padded[name], name))
    if names and "" in labels:
        raise UserError(f"{files[labels.index('')]} is in no class folder, other images are: move it there")
    return torch.tensor([names.index(label) if label else -1 for label in labels]), names


def read_images(files, size):
    """The images (N, C, H, W), all in colour (C = 3) if one is."""
    x = []
    for path in files:
        x.append(read_image(path, size))
        if x[-1].shape[1:] != x[0].shape[1:]:
            raise UserError(f"{files[0]} and {path} differ in size: add --image_size 32 (say)")
    channels = max(map(len, x))
    return torch.stack([image.expand(channels, -1, -1) for image in x])


def read_image(path, size):
    """An upright image (1 or 3, H, W) uint8. What can be read in two ways is refused."""
    try:  # From its path, Pillow would map an uncompressed TIFF into memory, and then turn it wrongly.
        with open(path, "rb") as file, Image.open(file) as raw:
            frames = raw.format != "MPO" and getattr(raw, "n_frames", 1)  # in a phone's photo: a preview
            packing, image = str(raw.tile), ImageOps.exif_transpose(raw)
    except Exception as error:  # Pillow raises many types
        raise UserError(f"{path} cannot be read as an image ({error})") from error
    clear = "transparency" in image.info or image.mode[-1] == "A" and image.getextrema()[-1][0] < 255
    if image.mode not in MODES or ";16" in packing or clear or frames > 1:  # Pillow cuts RGB;16 to 8 bits
        found = f"mode {image.mode}{', transparent' * clear}{', animated' * (frames > 1)}"
        raise UserError(f"{path} ({found}) must be one opaque image of 8 bits a channel: convert it")
    x = tv.pil_to_tensor(image.convert(MODES[image.mode]))
    return fit(x, size) if size else x


def fit(x, size):
    """Images (..., H, W) scaled until the shorter side is `size`, then cropped to the centre square."""
    return tv.center_crop(tv.resize(x, [size], antialias=True), [size])
