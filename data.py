"""Images and texts, from a disk or a hub, become tensors: training and test split, whole in memory."""

import hashlib
import itertools
import math
import os
import re
import unicodedata
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import regex
import torch
from filelock import FileLock
from torch import Tensor

from files import UserError, reason
from tables import HIDDEN, KINDS, SPLITS, Table, read_tables

# -- images ----------------------------------------------------------------------------------------------

TORCHVISION = {"fashionmnist": "FashionMNIST", "mnist": "MNIST", "cifar10": "CIFAR10"}
OFFLINE = (
    "without a network use --dataset digits, --dataset PATH (a folder of images), "
    "or --data_dir with a copy of the files"
)
# Documents, films and tables that Pillow opens, or says that it could open; they are no photos.
NO_IMAGES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}  # of 8 bits a channel


@dataclass
class Images:
    """Both splits: x (N, C, H, W) uint8, labels y (N,) int64 (all -1 without classes); the classes' names.

    left_out: what of a folder was not read.
    """

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    names: list[str]
    left_out: str = ""

    def facts(self) -> dict:
        """What a checkpoint must know to sample and to notice other data."""
        sha = hashlib.sha256(self.x.contiguous().numpy())
        sha.update(self.y.numpy())
        shape, checksum = list(self.x.shape[1:]), sha.hexdigest()[:12]
        return dict(shape=shape, images=len(self.x), names=self.names, checksum=checksum)


def load_images(dataset: str, data_dir: str, image_size: int | None = None, background=None) -> Images:
    """The images of `dataset`: a name, or the path of a folder whose subfolders, if any, are the classes.

    Names: fashionmnist, mnist, cifar10 (torchvision, in data_dir, downloaded where absent), digits (bundled
    with scikit-learn). image_size: images are scaled to cover that square and cropped to its centre.
    background: the colour behind transparent images. Raises UserError for an unknown name, an unreachable
    download, files that do not fit together, or a folder with no image, a broken one, mixed sizes, or what
    can be read in two ways.
    """
    if Path(dataset).is_dir() and dataset.lower() not in (*TORCHVISION, "digits"):
        return from_folder(Path(dataset), image_size, background)
    if dataset.lower() in TORCHVISION:
        images = from_torchvision(TORCHVISION[dataset.lower()], data_dir)
    elif dataset == "digits":
        images = digits()
    else:
        known = ", ".join((*TORCHVISION, "digits"))
        raise UserError(f"no data set or folder {dataset!r}; choose {known}, or the path of a folder")
    if image_size:
        images.x, images.x_test = fit(images.x, image_size), fit(images.x_test, image_size)
    return images


def from_torchvision(name: str, root: str) -> Images:
    """A data set of torchvision, which has its own test split."""
    import torchvision

    load, tensors = getattr(torchvision.datasets, name), []
    for train in (True, False):
        try:
            Path(root).mkdir(parents=True, exist_ok=True)
            # Of the processes of torchrun one downloads, the others wait. Where nobody can write, nobody can.
            lock = FileLock(Path(root) / f".{name}.lock") if os.access(root, os.W_OK) else nullcontext()
            with lock:
                split = load(root, train=train, download=True)
        except Exception as error:  # many types, as the download or a file goes wrong
            what = f"{name} could neither be read from {root} nor be downloaded ({reason(error)})"
            raise UserError(f"{what}; delete files there that are damaged; {OFFLINE}") from error
        x = torch.as_tensor(split.data)
        x = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()
        tensors += [x, torch.as_tensor(split.targets)]
        last = len(split.classes) - 1
        known = (tensors[-1] >= 0) & (tensors[-1] <= last)
        if not 0 < len(x) == known.sum() == len(known) or x.shape[1:] != tensors[0].shape[1:]:
            sizes = f"images {list(x.shape)} beside {list(tensors[0].shape)}"
            got = f"{sizes} and {len(known)} labels, {known.sum()} of them from 0 to {last}"
            raise UserError(f"{name} in --data_dir {root} has {got}; each image needs one, and all one size")
    names = [c.split(" - ")[0] for c in split.classes] if name == "MNIST" else split.classes
    return Images(*tensors, names)


def digits() -> Images:
    """The 1,797 digits of 8 x 8 pixels that come with scikit-learn."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = (torch.as_tensor(raw.images) * (255 / 16)).round().to(torch.uint8)[:, None]  # from 0..16
    y, (train, test) = torch.as_tensor(raw.target).long(), hold_out(len(x))
    return Images(x[train], y[train], x[test], y[test], [str(c) for c in raw.target_names])


def hold_out(n: int) -> tuple[Tensor, Tensor]:
    """Row numbers of training and test: every fifth of a seeded shuffle, none of fewer than five."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    held_out = (torch.arange(n) % 5 == 0) & (n >= 5)
    return order[~held_out], order[held_out]


def from_folder(root: Path, image_size: int | None, background: str | None) -> Images:
    """The images below root, all in grey or all in colour; its subfolders are splits, classes, or both."""
    files, left_out = images_below(root)
    splits = find_splits(root, files)
    train, test = splits["train"], splits.get("test", splits.get("val", []))
    if len(splits) == 3:
        left_out.append(f"{len(splits['val'])} images of the split val")
    labels = folder_labels(common_folder(train), train)
    names = sorted(set(labels) - {""})
    if test:
        top = common_folder(test)
        test_labels = folder_labels(top.parent if top.name in names else top, test)
        if names and set(test_labels) == {""}:
            left_out.append(f"{len(test)} images of {top.relative_to(root)}, which have no classes")
            test = []
        elif new := sorted(set(test_labels) - set(labels)):
            way_out = "add them there, or take them out of the test split"
            raise UserError(f"the training images in {root} lack the classes {', '.join(new)}: {way_out}")
        else:
            labels += test_labels
    number = {"": -1} | {name: i for i, name in enumerate(names)}
    n, files, y = len(train), train + test, torch.tensor([number[label] for label in labels])
    if not test:
        rows, held_out = hold_out(n)
        n, order = len(rows), torch.cat([rows, held_out])
        files, y = [files[i] for i in order], y[order]
    x, frames = read_images(files, image_size, background)
    left_out += [f"further frames of {frames} files"] if frames else []
    return Images(x[:n], y[:n], x[n:], y[n:], names, ", ".join(left_out))


def images_below(root: Path) -> tuple[list[Path], list[str]]:
    """The files below root that Pillow can open as images, and how many others there are, by their suffix."""
    from PIL import Image

    kinds = Image.registered_extensions()
    suffixes = {suffix for suffix, kind in kinds.items() if kind in Image.OPEN and kind not in NO_IMAGES}
    files = files_below(root)
    count = Counter(path.suffix.lower() or "without a suffix" for path in files)
    others = [(suffix, n) for suffix, n in count.most_common() if suffix not in suffixes]
    left_out = [f"{n} {suffix}" for suffix, n in others[:8]]
    left_out += [f"{sum(n for _, n in others[8:])} others"] if others[8:] else []
    files = [path for path in files if path.suffix.lower() in suffixes]
    if not files:
        holds = ", ".join(left_out) or "nothing"
        raise UserError(f"no image in {root} or below, but {holds}; save images as .png or .jpg")
    return files, left_out


def files_below(folder: Path, above: tuple[Path, ...] = ()) -> list[Path]:
    """The files below a folder, sorted, but for hidden ones; links are followed, but not in circles."""
    here, found = folder.resolve(), []
    if here in above:
        return []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith(HIDDEN):
            found += files_below(path, (*above, here))
        elif not path.name.startswith(HIDDEN):
            found.append(path)
    return found


def common_folder(files: list[Path]) -> Path:
    """The deepest folder that holds all the files: archives often wrap a folder in folders."""
    return Path(os.path.commonpath([path.parent for path in files]))


def find_splits(root: Path, files: list[Path]) -> dict[str, list[Path]]:
    """The files of the splits train, test and val where these are all that root holds; else all are train.

    Raises UserError where only the test split has images.
    """
    top = common_folder(files)
    if any(SPLITS.get(part.lower()) in ("test", "val") for part in top.relative_to(root).parts):
        raise UserError(f"only {top} holds images: to train on them give --dataset {top}, else add a train/")
    folders = {}
    for path in files:
        folders.setdefault(path.relative_to(top).parts[0], []).append(path)
    splits = {SPLITS.get(name.lower()): paths for name, paths in folders.items()}
    clear = "train" in splits and None not in splits and len(splits) == len(folders)
    return splits if clear else {"train": files}


def folder_labels(top: Path, files: list[Path]) -> list[str]:
    """For each file the subfolder of top in which it is, "" for top itself.

    Raises UserError where both occur, or where a folder may be a class or a split.
    """
    folders = [path.relative_to(top).parts[:-1] for path in files]
    labels = [parts[0] if parts else "" for parts in folders]
    names = sorted(set().union(*folders))
    if names and "" in labels:
        stray, classes = files[labels.index("")], sorted(set(labels) - {""})
        raise UserError(
            f"{stray} lies beside the class folders {', '.join(classes[:3])}...; move it into one"
        )
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", " ".join(names))  # of trainA, test_set, val2017
    kinds = {SPLITS.get(word.lower()) for word in words} - {None}
    if kinds - {"train"} or any(name.lower() in SPLITS for name in names):
        names.sort(key=lambda name: name.lower() not in SPLITS)  # those in doubt come first
        what = f"in {top} are the folders {', '.join(names[:10])}: a split (train, test, val) or classes?"
        way_out = "for splits keep just train, test and val at the top, with the classes in them"
        raise UserError(f"{what} {way_out}; rename a class that is called so")
    return labels


def read_images(files: list[Path], size: int | None, background: str | None) -> tuple[Tensor, int]:
    """The images (N, C, H, W) uint8, and how many files have further frames, which are left out."""
    x, frames = None, 0
    for i, path in enumerate(files):
        image, more = read_image(path, background)
        image, frames = fit(image[None], size)[0] if size else image, frames + more
        if x is None:  # as large as all will be: no image is held twice, or before it is scaled
            x = torch.empty(len(files), *image.shape, dtype=torch.uint8)
        if image.shape[1:] != x.shape[2:]:
            h, w, H, W = *x.shape[2:], *image.shape[1:]
            got = f"mixed sizes: {files[0]} is {w}x{h}, {path} is {W}x{H}"
            raise UserError(f"{got}; add --image_size 32 (say) to bring all to one size")
        if len(image) > x.shape[1]:  # one image in colour: all in colour
            x = x.expand(-1, 3, -1, -1).contiguous()
        x[i] = image
    return x, frames


def read_image(path: Path, background: str | None = None) -> tuple[Tensor, bool]:
    """The image at path as uint8, and whether its file has further frames.

    (1, H, W) where it is grey and (3, H, W) where it is in colour, upright, on the background where it is
    transparent. Raises UserError for what is broken or can be read in two ways.
    """
    from PIL import Image, ImageColor, ImageOps
    from torchvision.transforms.v2.functional import pil_to_tensor

    try:
        # Not by its path: what Pillow maps into memory (a plain TIFF) it turns wrongly.
        Image.init()
        formats = sorted(Image.OPEN.keys() - NO_IMAGES)
        with open(path, "rb") as stream, Image.open(stream, formats=formats) as file:
            kind, packing, more = file.format, str(file.tile), getattr(file, "is_animated", False)
            image = ImageOps.exif_transpose(file)
    except Exception as error:  # PIL raises many types for a broken file
        raise UserError(f"{path} cannot be read as an image ({error}); repair it or take it out") from error
    if kind == "TIFF" and more:
        raise UserError(f"{path} has several pages or slices; save each as a file of its own")
    # Pillow does not find the transparent colour of a PNG whose values it has scaled to 8 bits.
    lost = "transparency" in image.info and image.mode != "P" and ";" in packing
    if lost or ";16" in packing or image.mode not in MODES:
        what = f"{path} (mode {image.mode}) cannot be read without guessing its range or colours"
        raise UserError(f"{what}: save it with 8 bits a channel, for example by `magick mogrify -depth 8`")
    grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            if background is None:
                raise UserError(f"{path} is transparent: choose what is behind it, say --background white")
            colour = ImageColor.getrgb(background)[:3]
            image = Image.alpha_composite(Image.new("RGBA", image.size, colour), image)
            grey = grey and len(set(colour)) == 1
    return pil_to_tensor(image.convert("L" if grey else "RGB")), more


def fit(x: Tensor, size: int) -> Tensor:
    """x (N, C, H, W) uint8 scaled until its shorter side is `size`, then cropped to the centre square."""
    from torchvision.transforms.v2 import functional as tv

    return tv.center_crop(tv.resize(x, [size], antialias=True), [size])


# -- texts -----------------------------------------------------------------------------------------------

TEXT_COLUMNS = ("text", "review", "document", "answer")  # in capitals or not
LABEL_COLUMNS = ("label", "rating", "stars", "prediction")
OFFLINE_TEXT = f"without a network use --dataset grammar, or --dataset PATH ({KINDS})"


@dataclass
class Split:
    """Texts x, their labels y (-1 where there are none) and conditions c ("" where there are none)."""

    x: list[str]
    y: list[int]
    c: list[str]

    def take(self, rows: list[int]) -> "Split":
        """The rows of these numbers."""
        return Split([self.x[i] for i in rows], [self.y[i] for i in rows], [self.c[i] for i in rows])


@dataclass
class Texts:
    """The texts of both splits and the names of the classes, which a label y counts.

    note: which columns they were read from, and what was left out.
    """

    train: Split
    test: Split
    names: list[str]
    note: str = ""

    def checksum(self, conditions: bool = True) -> str:
        """Twelve digits that change with the training texts, their labels and, if asked, their conditions."""
        parts = [*self.train.x, *(self.train.c if conditions else []), *map(str, self.train.y), *self.names]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def load_texts(dataset: str, text_column=None, label_column=None, condition_column=None) -> Texts:
    """The texts of `dataset`: tripadvisor, another hub name, or the path of a file or folder.

    The columns of texts and labels are guessed from common names unless given; the label_column "none" means
    none. Without a condition_column there are no conditions. A split "test", or "val" where there is none,
    is kept as it is; otherwise every tenth text of a seeded shuffle is held out. Raises UserError for an
    unknown or unreachable data set, a missing column, a single file of fewer than three texts, a text that is
    missing or broken (with its row), or a label that is missing or has too many values.
    """
    known = "choose grammar, tripadvisor, another hub name such as owner/name, or a path; "
    tables, left_out = read_tables(dataset, OFFLINE_TEXT, known)
    where = Path(dataset).name or dataset
    columns = list(dict.fromkeys(itertools.chain.from_iterable(row for _, row in tables["train"])))
    declined = (label_column or "").lower() == "none" and label_column not in columns
    text = text_column or guess(TEXT_COLUMNS, columns)
    label = None if declined else label_column or guess(LABEL_COLUMNS, columns)
    for flag, column in dict(text_column=text, label_column=label, condition=condition_column).items():
        need_column(where, columns, flag, column)
    splits = {name: read_split(table, text, label, condition_column) for name, table in tables.items()}
    names = class_names(splits["train"].y, f"{where}: column {label}")
    for name, split in splits.items():
        split.y = class_numbers(split.y, names, tables[name], label)
    if "test" in splits:
        texts = Texts(splits["train"], splits["test"], names)
    elif len(splits["train"].x) > 2:
        texts = hold_out_texts(splits["train"], names)
    else:
        got = f"{where} has {len(splits['train'].x)} texts, each in a line of a txt or a row of a table"
        raise UserError(f"{got}: give at least two to train on and one to hold out")
    found = f"labels from column {label} (classes {', '.join(names)})" if label else "no labels"
    if not label and not declined and len(columns) > 1:
        missed = f"no label column found among {', '.join(columns)}: trained without labels"
        found = f"{missed}; name one with --label_column"
    texts.note = "; ".join(filter(None, [f"{where}: texts from column {text}, {found}", left_out]))
    return texts


def guess(names: tuple, columns: list[str]) -> str | None:
    """The column that has the first of these names, in capitals or not."""
    spelled = {column.lower(): column for column in reversed(columns)}
    return next((spelled[name] for name in names if name in spelled), None)


def need_column(where: str, columns: list[str], flag: str, column: str | None) -> None:
    """Raise UserError where `column` is not among the columns; only that of the texts must be given."""
    if column not in columns and (column or flag == "text_column"):
        what = f"no column {column or 'of text'}; it has {', '.join(columns)[:300]}: name one with --{flag}"
        raise UserError(f"{where} has {what} (in a csv the first line must name the columns)")


def read_split(table: Table, text: str, label: str | None, condition: str | None) -> Split:
    """The columns of a table, with labels as strings ("" where there is no such column)."""
    x = [text_of(row.get(text), f"{place}: {text}") for place, row in table]
    y, c = [""] * len(x), [""] * len(x)
    if label:
        y = [label_of(row.get(label), f"{place}: {label}") for place, row in table]
    if condition:
        c = [text_of(row.get(condition), f"{place}: {condition}") for place, row in table]
    return Split(x, y, c)


def text_of(value, where: str, wanted: str = "a text") -> str:
    """The text without spaces around it. Raises UserError for none; `where` names its row and column."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where} is {value!r:.60}, but {wanted} is wanted; mend the row or take it out")
    if broken := re.search("[\0\ud800-\udfff]", value):
        raise UserError(f"{where} holds {broken[0]!r}, no character of a text; mend the row or take it out")
    return value.strip()


def label_of(value, where: str) -> str:
    """The label as a string: of " 5", "5.0", 5 and 5.0 it is "5". Raises UserError where there is none."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("label")  # argilla's form: a list of label and score
    if value in (None, []) or isinstance(value, str) and not value.strip():
        raise UserError(f"{where} is missing; mend the row or take it out")
    if isinstance(value, int) or isinstance(value, float) and math.isfinite(value):
        value = str(value)
    label = unicodedata.normalize("NFC", text_of(value, where, "a word or a number"))
    return re.sub(r"^(-?[0-9]+(?:\.[0-9]*[1-9])?)\.?0*$", r"\1", label) if "." in label else label


def class_names(labels: list[str], where: str) -> list[str]:
    """The different labels, shorter ones first, so that "10" follows "9"; none where all are ""."""
    names = sorted(set(labels) - {""}, key=lambda name: (len(name), name))
    if len(names) > 100:
        way = "give another --label_column, or none"
        raise UserError(f"{where} has {len(names)} values, too many for classes; {way}")
    return names


def class_numbers(labels: list[str], names: list[str], table: Table, column: str | None) -> list[int]:
    """The place of each label in names, -1 for "". Raises UserError for a label that names lacks."""
    number = {name: i for i, name in enumerate(names)} | {"": -1}
    for label, (place, _) in zip(labels, table, strict=True):
        if label not in number:
            known = f"outside the classes {', '.join(names)} of the training split"
            raise UserError(f"{place}: {column} is {label!r}, {known}")
    return [number[label] for label in labels]


def hold_out_texts(split: Split, names: list[str]) -> Texts:
    """Every tenth text of a seeded shuffle is the test split."""
    order = torch.randperm(len(split.x), generator=torch.Generator().manual_seed(0)).tolist()
    train = [i for n, i in enumerate(order) if n % 10]
    return Texts(split.take(train), split.take(order[::10]), names)


# -- texts to tokens -------------------------------------------------------------------------------------


@dataclass
class Codec:
    """Texts to token ids for the encoder and the decoder and back.

    Each tokenizer is the JSON text of the library `tokenizers`. A sequence is max_tokens long, filled up
    with -100. eos: the decoder's end token.
    """

    encoder: str
    decoder: str
    eos: int
    max_tokens: int

    def __post_init__(self):
        from tokenizers import Tokenizer

        # Trained here the two sides are one, and each text need be measured only once.
        self.different = [Tokenizer.from_str(side) for side in dict.fromkeys((self.encoder, self.decoder))]
        self.tokenizers = [self.different[0], self.different[-1]]
        if not 0 <= self.eos < self.vocab:
            raise ValueError(f"the end token {self.eos} is none of the {self.vocab} tokens")
        for tokenizer in self.tokenizers:
            tokenizer.no_padding()
            tokenizer.no_truncation()
            tokenizer.encode_special_tokens = True  # where a text says "<eos>", it is text

    @property
    def vocab(self) -> int:
        """Tokens of the decoder."""
        return self.tokenizers[1].get_vocab_size()

    def fits(self, text: str) -> bool:
        """Whether the text with its end token is at most max_tokens long for both sides."""
        return max(len(t.encode(text)) for t in self.different) < self.max_tokens

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Encoder's ids and decoder's targets, (N, max_tokens) each.

        A target ends in eos, but for a text that had to be cut: nobody ended there.
        """
        sides = []
        for tokenizer, end in zip(self.tokenizers, ([], [self.eos]), strict=True):
            ids = torch.full((len(texts), self.max_tokens), -100)
            for row, encoding in zip(ids, tokenizer.encode_batch(texts), strict=True):
                tokens = [*encoding.ids, *end][: self.max_tokens]
                row[: len(tokens)] = torch.tensor(tokens)
            sides.append(ids)
        return sides[0], sides[1]

    def decode(self, ids: Tensor) -> list[str]:
        """The texts of the decoder's ids (N, L), each up to its first eos."""
        texts = []
        for row in ids.tolist():
            row = row[: row.index(self.eos)] if self.eos in row else row
            texts.append(self.tokenizers[1].decode([i for i in row if i >= 0]).strip())
        return texts


def train_codec(texts: list[str], vocab: int, max_tokens: int, prefix_space=True) -> Codec:
    """One byte-level BPE of at most `vocab` tokens for both sides, trained on the texts.

    prefix_space: whether the first word of a text is written like any other, with a space before it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<mask>", "<eos>"],  # ids 0, which nothing uses, and 1
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    parts = []
    for text in texts:  # a word of very many characters is learned in parts: whole it would take minutes
        endless = re.search(r"\S{1000}|\s{1000}", text)
        parts += re.findall(".{1,100}", text, re.S) if endless else [text]
    tokenizer.train_from_iterator(parts, trainer)
    return Codec(tokenizer.to_str(), tokenizer.to_str(), eos=1, max_tokens=max_tokens)


def pretrained_codec(encoder: str, decoder: str, max_tokens: int) -> Codec:
    """The tokenizers of two pretrained models, by hub name or local folder.

    Raises UserError where they cannot be had, or where the decoder has no end token.
    """
    from transformers import AutoTokenizer

    try:
        ours, theirs = (AutoTokenizer.from_pretrained(name) for name in (encoder, decoder))
    except Exception as error:  # no network, no such name, a damaged folder
        what = f"the tokenizers of {encoder} and {decoder} could not be loaded ({reason(error)})"
        raise UserError(f"{what}; --size tiny needs no download") from error
    if theirs.eos_token_id is None:
        raise UserError(f"the tokenizer of {decoder} has no end token: give a GPT-2 with --decoder")
    jsons = [side.backend_tokenizer.to_str() for side in (ours, theirs)]
    return Codec(*jsons, eos=theirs.eos_token_id, max_tokens=max_tokens)


@dataclass
class Pieces:
    """Texts cut to length: x, their labels y (N,), conditions c, ids and targets (N, L)."""

    x: list[str]
    y: Tensor
    c: list[str]
    ids: Tensor
    target: Tensor

    def take(self, rows) -> "Pieces":
        """The pieces of these numbers."""
        rows = torch.as_tensor(rows)
        x, c = ([part[i] for i in rows.tolist()] for part in (self.x, self.c))
        return Pieces(x, self.y[rows], c, self.ids[rows], self.target[rows])

    def first(self, n: int) -> "Pieces":
        """The first n pieces, or all where there are fewer."""
        return self.take(range(min(n, len(self.x))))


def cut_texts(split: Split, codec: Codec, overlap: bool = False, prefix: bool = False) -> Pieces:
    """The pieces of the split's texts: see `windows`; with `prefix`, each but the first under the one before.

    Raises UserError where there are none, which only a prefix can bring about.
    """
    pieces = Split([], [], [])
    for text, label, condition in zip(split.x, split.y, split.c, strict=True):
        parts = windows(text, codec.fits, overlap and not prefix)
        before = parts[:-1] if prefix else [condition] * len(parts)
        parts = parts[1:] if prefix else parts
        pieces.x += parts
        pieces.y += [label] * len(parts)
        pieces.c += before
    if not pieces.x:
        longer = f"texts of more than --max_tokens {codec.max_tokens} tokens: no text is cut in two"
        raise UserError(f"--condition prefix needs {longer}")
    return Pieces(pieces.x, torch.tensor(pieces.y), pieces.c, *codec.encode(pieces.x))


def windows(text: str, fits, overlap: bool) -> list[str]:
    """Pieces of the text that fit, from the start of a sentence to the end of one.

    The whole text where it fits(text); otherwise as many sentences as fit, from each one on (overlap) or
    from where the last piece ended. What is too long for a sentence: see `sentences`.
    """
    if fits(text):
        return [text]
    parts, pieces, i, j = sentences(text, fits), [], 0, 0
    while j < len(parts):
        j = max(j, i + 1)  # what begins later ends no earlier
        while j < len(parts) and fits("".join(parts[i : j + 1])):
            j += 1
        pieces.append("".join(parts[i:j]).strip())
        i = i + 1 if overlap else j
    return list(filter(None, pieces))  # a very long space is no piece


# The shortest text up to the end of a sentence or clause. Behind marks that are not ASCII's need be no space.
SENTENCE = r"(?V1s).+?(?:[.!?\n…]{1,20}\s+|[\p{Sentence_Terminal}--[\0-~]]+[\p{Pe}\p{Pf}]*\s*|\Z)"
CLAUSE = r"(?V1s).+?(?:[,;]\s+|[[\p{Terminal_Punctuation}…]--[\0-~]]\s*|\Z)"


def sentences(text: str, fits) -> list[str]:
    """The text cut behind the ends of sentences and lines, and a sentence that does not fit behind commas.

    A part between commas that does not fit is cut into as long ones as fit: between words, and a word too
    long between characters, of which accents and joined emoji are a part. Joined they are the text.
    """
    parts = []
    for sentence in regex.findall(SENTENCE, text):
        for part in [sentence] if fits(sentence) else regex.findall(CLAUSE, sentence):
            words = []
            for word in [part] if fits(part) else regex.findall(r"(?s).+?(?:\s+|\Z)", part):
                words += [word] if fits(word) else packed(regex.findall(r"\X", word), fits)
            parts += packed(words, fits)
    return parts


def packed(parts: list[str], fits) -> list[str]:
    """Neighbours joined to the longest strings that fit, which doubling and halving find."""
    joined, i = [], 0
    while i < len(parts):
        n, more = 1, 1
        while more:
            if i + n + more <= len(parts) and fits("".join(parts[i : i + n + more])):
                n, more = n + more, 2 * more
            else:
                more //= 2
        joined.append("".join(parts[i : i + n]))
        i += n
    return joined
