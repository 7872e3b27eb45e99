"""Images become tensors: two splits, whole in memory."""

import glob
import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.run import UserError, log

TORCHVISION = {"fashionmnist": "FashionMNIST", "mnist": "MNIST", "cifar10": "CIFAR10"}
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".pgm", ".ppm", ".tif", ".tiff"}
SPLIT = re.compile("(?i:(?<![a-z])(train|training|test|testing|val|valid|validation|dev|eval))(?![a-z])")


@dataclass
class Images:
    """Both splits: x (N, C, H, W) uint8, labels y (N,) int64 (all -1 without classes); the classes' names."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    names: list[str]

    @property
    def facts(self) -> dict:
        """What a checkpoint must know to sample, and to notice other data."""
        sha = hashlib.sha256(self.x.contiguous().numpy().tobytes() + self.y.numpy().tobytes())
        return dict(shape=list(self.x.shape[1:]), names=self.names, checksum=sha.hexdigest()[:12])


def load_images(dataset: str, data_dir: str, size: int | None = None) -> Images:
    """fashionmnist, mnist, cifar10 (torchvision), digits (in scikit-learn), or the path of a folder."""
    if dataset == "digits":
        images = digits()
    elif dataset in TORCHVISION:
        images = from_torchvision(TORCHVISION[dataset], data_dir)
    elif Path(dataset).is_dir():
        return from_folder(Path(dataset), size)
    else:
        raise UserError(f"no data set {dataset!r}: choose digits, {', '.join(TORCHVISION)}, a folder")
    if size:
        images.x, images.x_test = fit(images.x, size), fit(images.x_test, size)
    return images


def digits() -> Images:
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = (torch.as_tensor(raw.images) * (255 / 16)).round().to(torch.uint8)[:, None]  # from 0..16
    y = torch.as_tensor(raw.target).long()
    return Images(*split(x, y), [str(c) for c in raw.target_names])


def from_torchvision(name: str, root: str) -> Images:
    import torchvision

    parts = []
    for train in (True, False):
        try:
            data = getattr(torchvision.datasets, name)(root, train=train, download=True)
        except Exception as error:  # no network, a damaged file
            what = f"{name} is not in {root} and could not be downloaded ({error})"
            raise UserError(f"{what}; --dataset digits needs no download") from error
        x = torch.as_tensor(data.data)
        parts += [
            x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous(),
            torch.as_tensor(data.targets),
        ]
    return Images(*parts, data.classes)


def split(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A fifth of a seeded shuffle is held out."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test = torch.arange(len(x)) % 5 == 0
    return x[order[~test]], y[order[~test]], x[order[test]], y[order[test]]


def from_folder(root: Path, size: int | None) -> Images:
    """Images in root/CLASS/, or all in root; or such in root/train and root/test. All else is refused."""
    if (root / "train").is_dir():
        if others := {p.name for p in root.iterdir() if p.is_dir()} - {"train", "test"}:
            raise UserError(f"{root} holds {sorted(others)} beside train: keep just train and test there")
        x, y, names = read_folder(root / "train", size)
        x_test, y_test, test_names = read_folder(root / "test", size)
        if names != test_names or x.shape[1:] != x_test.shape[1:]:
            raise UserError(
                f"{root}/train and {root}/test have other classes or sizes: {names} and {test_names}"
            )
        return Images(x, y, x_test, y_test, names)
    x, y, names = read_folder(root, size)
    return Images(*split(x, y), names)


def read_folder(root: Path, size: int | None) -> tuple[Tensor, Tensor, list[str]]:
    """Images (N, C, H, W), labels (N,) and the names of the classes, which are the subfolders."""
    found = [Path(p) for p in sorted(glob.glob(f"{root}/**/*", recursive=True)) if not Path(p).is_dir()]
    files = [p for p in found if p.suffix.lower() in SUFFIXES]
    if others := Counter(p.suffix.lower() for p in found if p not in files):
        log(f"left out of {root}: {', '.join(f'{n} {suffix}' for suffix, n in others.items())}")
    folders = [p.relative_to(root).parts[:-1] for p in files]
    names = sorted({parts[0] for parts in folders if parts})
    if {len(parts) for parts in folders} not in ({0}, {1}) or any(map(SPLIT.search, names)):
        raise UserError(
            f"{root} must hold images, or one folder of images per class; found {names or 'none'}"
        )
    x = [read_image(p, size) for p in files]
    if len({image.shape for image in x}) > 1:
        raise UserError(f"images in {root} differ in size or colour: save them alike, or add --image_size 32")
    return torch.stack(x), torch.tensor([names.index(parts[0]) if parts else -1 for parts in folders]), names


def read_image(path: Path, size: int | None) -> Tensor:
    """An upright image (1 or 3, H, W) uint8. What can be read in two ways is refused."""
    from PIL import Image, ImageOps
    from torchvision.transforms.v2.functional import pil_to_tensor

    try:
        with open(path, "rb") as file, Image.open(file) as raw:
            frames, image = getattr(raw, "n_frames", 1), ImageOps.exif_transpose(raw)
    except Exception as error:  # Pillow raises many types
        raise UserError(f"{path} cannot be read as an image ({error})") from error
    if frames > 1 or image.mode not in ("1", "L", "P", "RGB") or image.has_transparency_data:
        raise UserError(
            f"{path} (mode {image.mode}, {frames} frames) must be one opaque image of 8 bits a channel"
        )
    x = pil_to_tensor(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    return fit(x, size) if size else x


def fit(x: Tensor, size: int) -> Tensor:
    """Images (..., H, W) scaled until the shorter side is `size`, then cropped to the centre square."""
    from torchvision.transforms.v2 import functional as tv

    return tv.center_crop(tv.resize(x, [size], antialias=True), [size])
