"""Images and texts, from a disk or a hub, become tensors: training and test split, whole in memory."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from training import UserError, reason

# -- images ----------------------------------------------------------------------------------------------

TORCHVISION = {"fashionmnist": "FashionMNIST", "mnist": "MNIST", "cifar10": "CIFAR10"}
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
OFFLINE = (
    "without a network use --dataset digits, --dataset PATH (a folder of images), "
    "or --data_dir with a copy of the files"
)


@dataclass
class Images:
    """Both splits: x (N, C, H, W) uint8, labels y (N,) int64 (all -1 without classes); the classes' names."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    names: list[str]

    def facts(self) -> dict:
        """What a checkpoint must know to sample and to notice other data."""
        data = self.x.numpy().tobytes() + self.y.numpy().tobytes()
        checksum = hashlib.sha256(data).hexdigest()[:12]
        return dict(shape=list(self.x.shape[1:]), images=len(self.x), names=self.names, checksum=checksum)


def load_images(dataset: str, data_dir: str, image_size: int | None = None) -> Images:
    """The images of `dataset`: a name, or the path of a folder whose subfolders, if any, are the classes.

    Names: fashionmnist, mnist, cifar10 (torchvision, in data_dir, downloaded where absent), digits (bundled
    with scikit-learn). image_size: images are scaled to cover that square and cropped to its centre. Raises
    UserError for an unknown name, an unreachable download, or a folder with no image, a broken one or mixed
    sizes.
    """
    if Path(dataset).is_dir() and dataset.lower() not in (*TORCHVISION, "digits"):
        return from_folder(Path(dataset), image_size)
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

    tensors = []
    for train in (True, False):
        try:
            split = getattr(torchvision.datasets, name)(root, train=train, download=True)
        except (
            Exception
        ) as error:  # URLError, RuntimeError or OSError, as the download or the file goes wrong
            what = f"{name} is not in {root} and could not be downloaded ({reason(error)})"
            raise UserError(f"{what}; {OFFLINE}") from error
        x = torch.as_tensor(split.data)
        x = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()
        tensors += [x, torch.as_tensor(split.targets)]
    names = [c.split(" - ")[0] for c in split.classes] if name == "MNIST" else split.classes
    return Images(*tensors, names)


def digits() -> Images:
    """The 1,797 digits of 8 x 8 pixels that come with scikit-learn."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = (torch.as_tensor(raw.images) * (255 / 16)).round().to(torch.uint8)  # from 0..16
    return hold_out(x[:, None], torch.as_tensor(raw.target).long(), [str(c) for c in raw.target_names])


def from_folder(root: Path, image_size: int | None) -> Images:
    """The images below root, all in grey or all in colour; subfolders of root are classes."""
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise UserError(f"no image in {root} or below: no file ends in one of {' '.join(sorted(SUFFIXES))}")
    names, y = class_folders(root, files)
    images = [read_image(path) for path in files]
    channels = max(len(x) for x in images)  # one image in colour: all in colour
    images = [x.expand(channels, -1, -1) for x in images]
    if image_size:
        images = [fit(x[None], image_size)[0] for x in images]
    for path, x in zip(files, images, strict=True):
        if x.shape != images[0].shape:
            h, w, H, W = *images[0].shape[1:], *x.shape[1:]
            got = f"mixed sizes: {files[0]} is {w}x{h}, {path} is {W}x{H}"
            raise UserError(f"{got}; add --image_size 32 (say) to bring all to one size")
    return hold_out(torch.stack(images), torch.tensor(y), names)


def class_folders(root: Path, files: list[Path]) -> tuple[list[str], list[int]]:
    """The names of the subfolders of root, if any, and the number of that of each file, -1 without any."""
    names = sorted({p.relative_to(root).parts[0] for p in files if p.parent != root})
    stray = [p for p in files if p.parent == root]
    if names and stray:
        folders = ", ".join(names[:3])
        raise UserError(f"{stray[0]} lies beside the class folders {folders}...; move it into one of them")
    return names, [names.index(p.relative_to(root).parts[0]) if names else -1 for p in files]


def read_image(path: Path) -> Tensor:
    """The image at path as uint8, (1, H, W) where it is grey and (3, H, W) where it is in colour."""
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    try:
        with Image.open(path) as image:
            return pil_to_tensor(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except Exception as error:  # PIL raises many types for a broken file
        raise UserError(f"{path} cannot be read as an image ({error}); repair it or take it out") from error


def hold_out(x: Tensor, y: Tensor, names: list[str]) -> Images:
    """Every fifth image of a seeded shuffle is the test split; of fewer than five images none is."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held_out = (torch.arange(len(x)) % 5 == 0) & (len(x) >= 5)
    test, train = order[held_out], order[~held_out]
    return Images(x[train], y[train], x[test], y[test], names)


def fit(x: Tensor, size: int) -> Tensor:
    """x (N, C, H, W) uint8 scaled until its shorter side is `size`, then cropped to the centre square."""
    from torchvision.transforms.v2 import functional as tv

    return tv.center_crop(tv.resize(x, [size], antialias=True), [size])


# -- texts -----------------------------------------------------------------------------------------------

HUB = {"tripadvisor": ("argilla/tripadvisor-hotel-reviews",), "gsm8k": ("openai/gsm8k", "main")}
READERS = {".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
TEXT_COLUMNS = ("text", "Review", "review", "document", "answer")
LABEL_COLUMNS = ("label", "Rating", "rating", "stars", "prediction")
OFFLINE_TEXT = (
    "without a network use --dataset grammar, or --dataset PATH (a csv, jsonl, parquet or txt file)"
)


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
    """The texts of both splits and the names of the classes, which a label y counts."""

    train: Split
    test: Split
    names: list[str]

    def checksum(self, conditions: bool = True) -> str:
        """Twelve digits that change with the training texts, their labels and, if asked, their conditions."""
        parts = [*self.train.x, *(self.train.c if conditions else []), *map(str, self.train.y), *self.names]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def load_texts(dataset: str, text_column=None, label_column=None, condition_column=None) -> Texts:
    """The texts of `dataset`: tripadvisor, another hub name, or the path of a csv, jsonl, parquet or txt.

    The columns of texts and labels are guessed
    from common names unless given; without a condition_column there are no conditions. A split "test" is
    kept as it is; otherwise every tenth text of a seeded shuffle is held out. Raises UserError for an unknown
    or unreachable data set, a missing column, an empty or non-UTF-8 text (with its row), or a label that is
    missing or has too many values.
    """
    tables, where = rows(dataset), Path(dataset).name
    if "train" not in tables:
        raise UserError(f"{where} has no split train, only {', '.join(tables)}; choose another data set")
    columns = tables["train"].column_names
    text = text_column or next((c for c in TEXT_COLUMNS if c in columns), None)
    label = label_column or next((c for c in LABEL_COLUMNS if c in columns), None)
    for flag, column in dict(text_column=text, label_column=label, condition=condition_column).items():
        need_column(where, columns, flag, column)
    train = read_split(tables["train"], f"{where}, train", text, label, condition_column)
    names = class_names(train.y, f"{where}: column {label}")
    train.y = class_numbers(train.y, names, f"{where}, train", label)
    if "test" not in tables:
        return hold_out_texts(train, names)
    test = read_split(tables["test"], f"{where}, test", text, label, condition_column)
    test.y = class_numbers(test.y, names, f"{where}, test", label)
    return Texts(train, test, names)


def need_column(where: str, columns: list[str], flag: str, column: str | None) -> None:
    """Raise UserError where `column` is not among the columns; only that of the texts must be given."""
    if column not in columns and (column or flag == "text_column"):
        what = f"no column {column or 'of text'}; it has {', '.join(columns)}"
        raise UserError(f"{where} has {what}: name one with --{flag}")


def rows(dataset: str, offline: str = OFFLINE_TEXT):
    """The splits, as tables, of a local file or of a hub data set, by the library `datasets`.

    offline: what to do without a network, for the message. Raises UserError where they cannot be had.
    """
    import datasets

    path = Path(dataset)
    reader = READERS.get(path.suffix.lower())
    if reader and not path.is_file():
        raise UserError(f"no file {path}; {offline}")
    if reader and not path.stat().st_size:
        raise UserError(f"{path} is empty; it must hold at least a few rows")
    if not reader and dataset not in HUB and "/" not in dataset:
        known = "grammar, tripadvisor, a hub name such as owner/name, or a csv, jsonl, parquet or txt file"
        raise UserError(f"no data set {dataset!r}; choose {known}")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log, it also raises
    source = HUB.get(dataset, (dataset,))
    try:
        if reader:
            return datasets.load_dataset(reader, data_files=str(path))
        return datasets.load_dataset(*source)
    except Exception as error:  # many types: no network, no such name, a damaged file
        if reader:
            cause = reason(error.__cause__ or error)  # which of the two says what is wrong in the file
            raise UserError(f"{path} cannot be read as {reader} in UTF-8: {cause}") from error
        raise UserError(f"{source[0]} could not be had from the hub ({reason(error)}); {offline}") from error


def read_split(table, where: str, text: str, label: str | None, condition: str | None) -> Split:
    """The columns of a table, with labels as strings ("" where there is no such column)."""
    x = [text_of(value, f"{where} row {i + 1}: {text}") for i, value in enumerate(table[text])]
    y, c = [""] * len(x), [""] * len(x)
    if label:
        y = [label_of(value, f"{where} row {i + 1}: {label}") for i, value in enumerate(table[label])]
    if condition:
        c = [text_of(value, f"{where} row {i + 1}: {condition}") for i, value in enumerate(table[condition])]
    return Split(x, y, c)


def text_of(value, where: str) -> str:
    """The text without spaces around it. Raises UserError for none; `where` names its row and column."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where} is {value!r}, but a text is wanted; mend the row or take it out")
    return value.strip()


def label_of(value, where: str) -> str:
    """The label as a string; 3.0 is "3". Raises UserError where there is none."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = value[0]["label"]  # argilla's form: a list of label and score
    if value is None or value == []:
        raise UserError(f"{where} is missing; mend the row or take it out")
    return str(int(value)) if isinstance(value, float) and value == int(value) else str(value)


def class_names(labels: list[str], where: str) -> list[str]:
    """The different labels, shorter ones first, so that "10" follows "9"; none where all are ""."""
    names = sorted(set(labels) - {""}, key=lambda name: (len(name), name))
    if len(names) > 100:
        raise UserError(f"{where} has {len(names)} values, too many for classes; give another --label_column")
    return names


def class_numbers(labels: list[str], names: list[str], where: str, column: str | None) -> list[int]:
    """The place of each label in names, -1 for "". Raises UserError for a label that names lacks."""
    number = {name: i for i, name in enumerate(names)} | {"": -1}
    for i, label in enumerate(labels):
        if label not in number:
            known = f"outside the classes {', '.join(names)} of the training split"
            raise UserError(f"{where} row {i + 1}: {column} is {label!r}, {known}")
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

        self.tokenizers = [Tokenizer.from_str(side) for side in (self.encoder, self.decoder)]
        for tokenizer in self.tokenizers:
            tokenizer.no_padding()
            tokenizer.no_truncation()

    @property
    def vocab(self) -> int:
        """Tokens of the decoder."""
        return self.tokenizers[1].get_vocab_size()

    def fits(self, text: str) -> bool:
        """Whether the text with its end token is at most max_tokens long for both sides."""
        return max(len(t.encode(text).ids) for t in self.tokenizers) < self.max_tokens

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


def train_codec(texts: list[str], vocab: int, max_tokens: int) -> Codec:
    """One byte-level BPE of at most `vocab` tokens for both sides, trained on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<mask>", "<eos>"],  # ids 0, which nothing uses, and 1
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Codec(tokenizer.to_str(), tokenizer.to_str(), eos=1, max_tokens=max_tokens)


def pretrained_codec(encoder: str, decoder: str, max_tokens: int) -> Codec:
    """The tokenizers of two pretrained models, by hub name or local folder.

    Raises UserError where they cannot be had, or where the decoder has no end token.
    """
    from transformers import AutoTokenizer

    try:
        ours, theirs = (AutoTokenizer.from_pretrained(name) for name in (encoder, decoder))
    except Exception as error:  # no network, no such name, a damaged folder
        what = f"the tokenizers of {encoder} and {decoder} could not be had ({reason(error)})"
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
    from where the last piece ended. A single sentence too long is given as it is: who reads it cuts it.
    """
    if fits(text):
        return [text]
    parts, pieces, i = sentences(text, fits), [], 0
    while i < len(parts):
        j = i + 1
        while j < len(parts) and fits("".join(parts[i : j + 1])):
            j += 1
        pieces.append("".join(parts[i:j]).strip())
        if j == len(parts):
            break
        i = i + 1 if overlap else j
    return pieces


def sentences(text: str, fits) -> list[str]:
    """The text cut behind . ! ? and line ends, and a sentence that does not fit behind commas too.

    Joined they are the text.
    """
    parts = []
    for sentence in re.findall(r".+?(?:[.!?\n]+\s+|\Z)", text, re.S):
        parts += [sentence] if fits(sentence) else re.findall(r".+?(?:[,;]+\s+|\Z)", sentence, re.S)
    return parts
