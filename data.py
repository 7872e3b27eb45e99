"""Where bytes on disk or on a hub become tensors. Images: uint8, the training and the held-out test split, whole in memory."""
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from training import UserError, reason

TORCHVISION = {"fashionmnist": "FashionMNIST", "mnist": "MNIST", "cifar10": "CIFAR10"}
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
OFFLINE = "without a network use --dataset digits, --dataset PATH (a folder of images), or --data_dir with a copy of the files"


@dataclass
class Images:
    """x (N, C, H, W) uint8 and labels y (N,) int64 of both splits (y all -1 where there are no classes), and the classes' names."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    names: list[str]

    def facts(self) -> dict:
        """What a checkpoint must know to sample and to notice other data: shape, number and checksum of training images, class names."""
        checksum = hashlib.sha256(self.x.numpy().tobytes() + self.y.numpy().tobytes()).hexdigest()[:12]
        return dict(shape=list(self.x.shape[1:]), images=len(self.x), names=self.names, checksum=checksum)


def load_images(dataset: str, data_dir: str, image_size: int = 0) -> Images:
    """The data set `dataset`: fashionmnist, mnist or cifar10 (torchvision, in data_dir, downloaded where absent), digits
    (bundled with scikit-learn), or the path of a folder of images whose subfolders, if any, are the classes.

    image_size: if not 0, images are scaled to cover that square and cropped to its centre. Raises UserError for an unknown name, an
    unreachable download, or a folder with no image, a broken one or mixed sizes.
    """
    if dataset.lower() in TORCHVISION:
        images = _torchvision(TORCHVISION[dataset.lower()], data_dir)
    elif dataset == "digits":
        images = _digits()
    elif Path(dataset).is_dir():
        return _folder(Path(dataset), image_size)
    else:
        raise UserError(f"no data set or folder {dataset!r}; choose {', '.join(TORCHVISION)}, digits, or the path of a folder of images")
    if image_size:
        images.x, images.x_test = _fit(images.x, image_size), _fit(images.x_test, image_size)
    return images


def _torchvision(name: str, root: str) -> Images:
    import torchvision

    try:
        train, test = (getattr(torchvision.datasets, name)(root, train=split, download=True) for split in (True, False))
    except Exception as error:  # URLError, RuntimeError or OSError, as the download or the file goes wrong
        raise UserError(f"{name} is not in {root} and could not be downloaded ({reason(error)}); {OFFLINE}") from error
    tensors = []
    for split in (train, test):
        x = torch.as_tensor(split.data)
        tensors += [x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous(), torch.as_tensor(split.targets)]
    return Images(*tensors, [c.split(" - ")[0] if name == "MNIST" else c for c in train.classes])


def _digits() -> Images:
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = (torch.as_tensor(raw.images) * (255 / 16)).round().to(torch.uint8)[:, None]  # (1797, 1, 8, 8), from 0..16
    return _split(x, torch.as_tensor(raw.target).long(), [str(c) for c in raw.target_names])


def _folder(root: Path, image_size: int) -> Images:
    import numpy as np
    from PIL import Image

    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise UserError(f"no image in {root}; its files, or those of its subfolders, must end in one of {' '.join(sorted(SUFFIXES))}")
    arrays = []
    for path in files:
        try:
            with Image.open(path) as image:
                arrays.append(np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB")))
        except Exception as error:  # PIL raises many types for a broken file
            raise UserError(f"{path} cannot be read as an image ({error}); repair it or take it out of the folder") from error
    if any(a.ndim == 3 for a in arrays):  # one image in colour: all in colour
        arrays = [a if a.ndim == 3 else np.stack([a] * 3, axis=-1) for a in arrays]
    tensors = [torch.as_tensor((a[None] if a.ndim == 2 else a.transpose(2, 0, 1)).copy()) for a in arrays]
    if image_size:
        tensors = [_fit(x[None], image_size)[0] for x in tensors]
    for path, x in zip(files, tensors):
        if x.shape != tensors[0].shape:
            h, w, H, W = *tensors[0].shape[1:], *x.shape[1:]
            raise UserError(f"mixed sizes: {files[0]} is {w}x{h}, {path} is {W}x{H}; add --image_size 32 (say) to bring all to one size")
    names = sorted({p.relative_to(root).parts[0] for p in files if p.parent != root})
    stray = [p for p in files if p.parent == root]
    if names and stray:
        raise UserError(f"{stray[0]} lies beside the class folders {', '.join(names[:3])}...; move it into one of them")
    y = torch.tensor([names.index(p.relative_to(root).parts[0]) if names else -1 for p in files])
    return _split(torch.stack(tensors), y, names)


def _split(x: Tensor, y: Tensor, names: list[str]) -> Images:
    """Every fifth image of a seeded shuffle is the test split."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held_out = (torch.arange(len(x)) % 5 == 0) & (len(x) >= 5)  # of fewer than five images, none
    test, train = order[held_out], order[~held_out]
    return Images(x[train], y[train], x[test], y[test], names)


def _fit(x: Tensor, size: int) -> Tensor:
    """x (N, C, H, W) uint8 scaled until its shorter side is `size`, then cropped to the centre square."""
    from torchvision.transforms.v2 import functional as tv

    return tv.center_crop(tv.resize(x, [size], antialias=True), [size])
