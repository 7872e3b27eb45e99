"""Where bytes on disk or on a hub become tensors and strings: images (uint8), texts, problems with chains of thought; the training and the held-out test split, whole in memory."""
import hashlib
import math
import random
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
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


# -- texts --------------------------------------------------------------------------------------------------------------

HUB = {"tripadvisor": ("argilla/tripadvisor-hotel-reviews",), "gsm8k": ("openai/gsm8k", "main")}
READERS = {".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
COLUMNS = {"text": ("text", "Review", "review", "document", "answer"), "label": ("label", "Rating", "rating", "stars", "prediction")}
OFFLINE_TEXT = "without a network use --dataset grammar, or --dataset PATH (a csv, jsonl, parquet or txt file)"
TASKS = ("sums", "adds", "mult")
OFFLINE_PROBLEMS = "without a network use --dataset sums, adds or mult, or --dataset PATH (a jsonl or txt file of problems, or a folder with train.jsonl and test.jsonl)"


@dataclass
class Texts:
    """Texts x, labels y (indices into names; all -1 where there are none) and conditions c ("" where there are none) of both splits."""

    x: list[str]
    y: list[int]
    c: list[str]
    x_test: list[str]
    y_test: list[int]
    c_test: list[str]
    names: list[str]

    def checksum(self) -> str:
        return hashlib.sha256("\0".join([*self.x, *self.c, *map(str, self.y), *self.names]).encode()).hexdigest()[:12]


def load_texts(dataset: str, text_column: str = "", label_column: str = "", condition_column: str = "") -> Texts:
    """The texts of `dataset`: grammar (made here, nothing to download), tripadvisor, another hub name, or the path of a csv, jsonl, parquet or txt file.

    The columns are guessed from common names unless given; without a condition_column there are no conditions. A split "test" is kept
    as it is; otherwise every tenth text of a seeded shuffle is held out. Raises UserError for an unknown or unreachable data set, a missing
    column, an empty or non-UTF-8 text (with its row), or a label that is missing or has too many values.
    """
    if dataset == "grammar":
        rng = random.Random(0)
        y = [rng.randrange(5) for _ in range(6000)]
        return _hold_out([grammar_review(rng, rating + 1) for rating in y], y, [""] * len(y), [str(i) for i in range(1, 6)])
    rows, where = _rows(dataset), Path(dataset).name
    if "train" not in rows:
        raise UserError(f"{where} has no split train, only {', '.join(rows)}; choose another data set, or a local file")
    columns = list(rows["train"].column_names)
    pick = lambda given, kind: given or next((c for c in COLUMNS[kind] if c in columns), "")
    text, label = pick(text_column, "text"), pick(label_column, "label")
    for flag, column in [("text_column", text), ("label_column", label), ("condition_column", condition_column)]:
        if (column or flag == "text_column") and column not in columns:
            raise UserError(f"{where} has no column {column or 'of text'}; it has {', '.join(columns)}: name one with --{flag}")
    splits = {}
    for split in ("train", "test"):
        if split in rows:
            x = [_text(value, where, split, i, text) for i, value in enumerate(rows[split][text])]
            y = [_label(value, where, split, i, label) for i, value in enumerate(rows[split][label])] if label else [""] * len(x)
            c = [_text(value, where, split, i, condition_column) for i, value in enumerate(rows[split][condition_column])] if condition_column else [""] * len(x)
            splits[split] = x, y, c
    values = sorted(set(splits["train"][1]), key=lambda v: (len(v), v)) if label else []
    if len(values) > 100:
        raise UserError(f"{where}: column {label} has {len(values)} values, too many for classes; name another with --label_column")
    index = {v: i for i, v in enumerate(values)} if label else {"": -1}
    for i, value in enumerate(splits.get("test", ([], [], []))[1]):
        if value not in index:
            raise UserError(f"{where}, test row {i + 1}: {label} is {value!r}, outside the classes {', '.join(values)} of the training split")
    for split in splits.values():
        split[1][:] = [index[v] for v in split[1]]
    return Texts(*splits["train"], *splits["test"], values) if "test" in splits else _hold_out(*splits["train"], values)


def _rows(dataset: str):
    """The splits of a local file or of a hub data set, by the library `datasets`."""
    import datasets

    path = Path(dataset)
    if path.suffix.lower() in READERS:
        if not path.is_file():
            raise UserError(f"no file {path}; give a csv, jsonl, parquet or txt file, or one of grammar, tripadvisor")
        if not path.stat().st_size:
            raise UserError(f"{path} is empty; it must hold at least a few texts")
    elif dataset not in HUB and "/" not in dataset:
        raise UserError(f"no data set {dataset!r}; choose grammar, tripadvisor, a hub name such as owner/name, or the path of a csv, jsonl, parquet or txt file")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log, it also raises
    try:
        if path.suffix.lower() in READERS:
            return datasets.load_dataset(READERS[path.suffix.lower()], data_files=str(path))
        return datasets.load_dataset(*HUB.get(dataset, (dataset,)))
    except Exception as error:  # the library raises many types: no network, no such name, a damaged file
        cause = error.__cause__ or error  # which of two says what is wrong in the file
        if path.is_file():
            raise UserError(f"{path} cannot be read as {READERS[path.suffix.lower()]} in UTF-8: {reason(cause)}") from error
        raise UserError(f"{HUB.get(dataset, (dataset,))[0]} could not be had from the hub ({reason(error)}); {OFFLINE_PROBLEMS if dataset == 'gsm8k' else OFFLINE_TEXT}") from error


def _text(value, where: str, split: str, i: int, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}, {split} row {i + 1}: {column} is {value!r}, but a text is wanted; mend the row or take it out")
    return value.strip()


def _label(value, where: str, split: str, i: int, column: str) -> str:
    value = value[0]["label"] if isinstance(value, list) and value and isinstance(value[0], dict) else value  # argilla's form: a list of label and score
    if value is None or value == []:
        raise UserError(f"{where}, {split} row {i + 1}: {column} is missing; mend the row or take it out")
    return str(int(value)) if isinstance(value, float) and value == int(value) else str(value)


def _hold_out(x: list, y: list, c: list, names: list) -> Texts:
    """Every tenth text of a seeded shuffle is the test split."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).tolist()
    take = lambda values, part: [values[i] for i in part]
    parts = [[i for n, i in enumerate(order) if (n % 10 == 0) == test] for test in (False, True)]
    return Texts(*(take(values, part) for part in parts for values in (x, y, c)), names)


def sentences(text: str, fits) -> list[str]:
    """The text cut behind . ! ? and line ends, and where a piece does not fit(piece), behind commas and semicolons too. Joined they are the text."""
    cut = lambda s, marks: re.findall(rf".+?(?:[{marks}]+\s+|\Z)", s, re.S)
    return [part for piece in cut(text, r".!?\n") for part in ([piece] if fits(piece) else cut(piece, ",;"))]


def windows(text: str, fits, overlap: bool) -> list[str]:
    """Pieces of the text that fit, from the start of a sentence to the end of one: the whole text where it fits; otherwise as many sentences
    as fit from each one on (overlap) or from where the last piece ended. A single sentence too long is given as it is: who reads it cuts it.
    """
    if fits(text):
        return [text]
    parts, out, i = sentences(text, fits), [], 0
    while i < len(parts):
        j = i + 1
        while j < len(parts) and fits("".join(parts[i : j + 1])):
            j += 1
        out.append("".join(parts[i:j]).strip())
        if j == len(parts):
            break
        i = i + 1 if overlap else j
    return out


@dataclass
class Codec:
    """Texts to token ids for the encoder and the decoder and back; each tokenizer is the JSON text of the library `tokenizers`.

    A sequence is max_tokens long, filled up with -100. eos: the decoder's end token. mask: the encoder's mask token.
    """

    encoder: str
    decoder: str
    eos: int
    mask: int
    max_tokens: int

    def __post_init__(self):
        from tokenizers import Tokenizer

        self.tokenizers = [Tokenizer.from_str(t) for t in (self.encoder, self.decoder)]
        for tokenizer in self.tokenizers:
            tokenizer.no_padding()
            tokenizer.no_truncation()

    @property
    def vocab(self) -> int:
        return self.tokenizers[1].get_vocab_size()

    def fits(self, text: str) -> bool:
        """Whether the text with its end token is at most max_tokens long for both sides."""
        return max(len(t.encode(text).ids) for t in self.tokenizers) < self.max_tokens

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Encoder's ids and decoder's targets, (N, max_tokens) each. A target ends in eos, but for a text that had to be cut: nobody ended there."""
        out = []
        for side, tokenizer in enumerate(self.tokenizers):
            ids = torch.full((len(texts), self.max_tokens), -100)
            for row, encoding in zip(ids, tokenizer.encode_batch(texts)):
                tokens = (encoding.ids + [self.eos] * side)[: self.max_tokens]
                row[: len(tokens)] = torch.tensor(tokens)
            out.append(ids)
        return out[0], out[1]

    def decode(self, ids: Tensor) -> list[str]:
        """The texts of the decoder's ids (B, L), each up to its first eos."""
        rows = [row[: row.index(self.eos)] if self.eos in row else row for row in ids.tolist()]
        return [self.tokenizers[1].decode([i for i in row if i >= 0]).strip() for row in rows]


def train_codec(texts: list[str], vocab: int, max_tokens: int) -> Codec:
    """One byte-level BPE of at most `vocab` tokens for both sides, trained on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab, special_tokens=["<mask>", "<eos>"], initial_alphabet=alphabet, show_progress=False))
    return Codec(tokenizer.to_str(), tokenizer.to_str(), eos=1, mask=0, max_tokens=max_tokens)


def pretrained_codec(encoder: str, decoder: str, max_tokens: int) -> Codec:
    """The tokenizers of two pretrained models, by hub name or local folder. Raises UserError where they cannot be had or lack what is needed."""
    from transformers import AutoTokenizer

    try:
        ours, theirs = AutoTokenizer.from_pretrained(encoder), AutoTokenizer.from_pretrained(decoder)
    except Exception as error:  # no network, no such name, a damaged folder
        raise UserError(f"the tokenizers of {encoder} and {decoder} could not be had ({reason(error)}); --size tiny needs no download") from error
    if ours.mask_token_id is None or theirs.eos_token_id is None:
        raise UserError(f"{encoder} must have a mask token and {decoder} an end token; got {ours.mask_token} and {theirs.eos_token}")
    return Codec(ours.backend_tokenizer.to_str(), theirs.backend_tokenizer.to_str(), theirs.eos_token_id, ours.mask_token_id, max_tokens)


# The grammar: four sentences on four different subjects, good or bad, and a close. The rating is 1 + the number of good ones; the close says it too.
SUBJECTS = {
    "the room": (["spotless", "large and quiet", "bright", "very comfortable"], ["dirty", "tiny and loud", "dark", "falling apart"]),
    "the staff": (["friendly", "helpful at all hours", "polite", "very kind"], ["rude", "never at the desk", "careless", "very slow"]),
    "breakfast": (["fresh", "generous", "delicious", "worth getting up for"], ["stale", "cold", "poor", "not worth the money"]),
    "the location": (["perfect", "close to everything", "quiet and green", "ideal for the beach"], ["far from everything", "noisy", "hard to find", "unsafe at night"]),
    "the pool": (["clean", "warm", "heated and huge", "a joy for the children"], ["closed", "freezing", "crowded", "full of leaves"]),
    "the price": (["fair", "a bargain", "low for the season", "very good"], ["far too high", "a rip off", "higher than promised", "absurd"]),
}
CLOSES = ["never again.", "we would not come back.", "it was just about all right.", "we would come back.", "we cannot wait to return!"]
ADVERBS = ["", "really ", "always ", "simply "]


def grammar_review(rng: random.Random, rating: int) -> str:
    """A review of the grammar with a rating in 1..5."""
    good = rng.sample([True] * (rating - 1) + [False] * (5 - rating), 4)
    said = [f"{s} was {rng.choice(ADVERBS)}{rng.choice(SUBJECTS[s][0 if g else 1])}." for s, g in zip(rng.sample(list(SUBJECTS), 4), good)]
    return " ".join([*said, CLOSES[rating - 1]])


def grammar_rating(text: str) -> int | None:
    """The rating 1..5 of a review, or None where the grammar does not accept it."""
    *said, close = re.findall(r"[^.!]+[.!]", text) or [""]
    if "".join([*said, close]) != text or close.strip() not in CLOSES:
        return None
    seen = Counter()
    good = 0
    for sentence in said:
        subject, _, rest = sentence.strip().partition(" was ")
        word = next((rest[len(a) : -1] for a in reversed(ADVERBS) if rest.startswith(a) and rest[len(a) : -1] in sum(SUBJECTS.get(subject, ([], [])), [])), None)
        if word is None:
            return None
        seen[subject] += 1
        good += word in SUBJECTS[subject][0]
    rating = 1 + good
    return rating if len(said) == len(seen) == 4 and CLOSES[rating - 1] == close.strip() else None


# -- problems with chains of thought ------------------------------------------------------------------------------------


@dataclass
class Problems:
    """Questions and their thoughts, of which the last is "#### answer", of the training and the test split. A question is only in one of them."""

    question: list[str]
    thoughts: list[list[str]]
    question_test: list[str]
    thoughts_test: list[list[str]]

    def checksum(self) -> str:
        return hashlib.sha256("\0".join([*self.question, *(" ".join(t) for t in self.thoughts)]).encode()).hexdigest()[:12]


def spaced(n: int, width: int) -> str:
    """The digits of n, the least significant first, filled up with zeros to `width`, with spaces between."""
    return " ".join(reversed(f"{n:0{width}}"))


def mult_problem(a: int, b: int, digits: tuple[int, int]) -> tuple[str, list[str]]:
    """a x b of digits[0] and digits[1] digits in the form of implicit chain of thought (2311.01460): a product for each digit of b, least significant first,
    shifted, and behind all but the first and the last the total so far. Joined by spaces, the thoughts are what follows "||" in its files.
    """
    (na, nb), total, thoughts = digits, 0, []
    for i in range(nb):
        product = a * (b // 10**i % 10) * 10**i
        total += product
        term = ("+ " if i else "") + spaced(product, na + 1 + i)
        thoughts.append(term + (f" ( {spaced(total, na + 1 + i)} )" if 0 < i < nb - 1 else ""))
    return f"{spaced(a, na)} * {spaced(b, nb)}", [*thoughts, f"#### {spaced(a * b, na + nb)}"]


def sum_problem(numbers: list[int], digits: int) -> tuple[str, list[str]]:
    """Numbers of so many digits to add: each thought is the total so far, from the second number on; the last is the answer."""
    width = len(str(len(numbers) * (10**digits - 1)))
    totals = [spaced(sum(numbers[: i + 1]), width) for i in range(1, len(numbers))]
    return " + ".join(spaced(n, digits) for n in numbers), [*totals[:-1], f"#### {totals[-1]}"]


def is_test_problem(question: str) -> bool:
    """Whether a generated question belongs to the test split: one in ten, by its own checksum, so that no training set of any size can hold it."""
    return zlib.crc32(question.encode()) % 10 == 0


def make_problems(task: str, digits: tuple[int, int], terms: int, n: int) -> Problems:
    """n different training and at most 2,000 test problems, or as many as there are: sums (single digits), adds (digits[0] digits) or mult."""
    low, high = [(0, 9)] * 2 if task == "sums" else ((10 ** (d - 1), 10**d - 1) for d in digits)
    ranges = [low, high] if task == "mult" else [low if task == "adds" else (0, 9)] * terms
    count = math.prod(b - a + 1 for a, b in ranges)
    rng, wanted = random.Random(0), n + 2000
    splits, seen = ([], []), set()
    while len(seen) < count and (len(splits[0]) < n or len(splits[1]) < 2000):
        if count <= 4 * wanted:  # so few that all can be made
            codes = rng.sample(range(count), count)
        else:
            codes = [rng.randrange(count) for _ in range(wanted)]
        for code in codes:
            if code in seen:
                continue
            seen.add(code)
            numbers = []
            for a, b in ranges:
                numbers.append(a + code % (b - a + 1))
                code //= b - a + 1
            problem = mult_problem(*numbers, digits) if task == "mult" else sum_problem(numbers, 1 if task == "sums" else digits[0])
            splits[is_test_problem(problem[0])].append(problem)
    (q, r), (q_test, r_test) = (map(list, zip(*split[:limit])) for split, limit in zip(splits, (n, 2000)))
    return Problems(q, r, q_test, r_test)


def gsm8k_thoughts(answer: str, form: str, where: str) -> list[str]:
    """The thoughts of an answer of GSM8K: its <<equations>>, or its lines as text; then "#### " and the number. Raises UserError where that is missing."""
    chain, found, number = answer.partition("####")
    if not found or not number.strip():
        raise UserError(f"{where}: no '#### number' at the end of the answer {answer[-60:]!r}; mend the row or take it out")
    lines = re.findall(r"<<.*?>>", chain) if form == "equations" else [re.sub(r"<<.*?>>", "", line).strip() for line in chain.splitlines()]
    return [*filter(None, lines), f"#### {number.strip()}"]


def load_problems(dataset: str, digits: tuple[int, int] = (3, 2), terms: int = 4, n: int = 100_000, form: str = "equations") -> Problems:
    """The problems of `dataset`: sums, adds or mult (made here), gsm8k (hub), or the path of a jsonl file with question and answer, of a txt file
    with lines question||thoughts #### answer, or of a folder with train.jsonl and test.jsonl.

    Of a single file, the same tenth is held out as of generated questions; a training question that the test split holds too is left out.
    Raises UserError for an unknown or unreachable data set, a row without a question or an answer, or an empty split.
    """
    if dataset in TASKS:
        return make_problems(dataset, digits, terms, n)
    path = Path(dataset)
    if path.suffix == ".txt":
        if not path.is_file():
            raise UserError(f"no file {path}; {OFFLINE_PROBLEMS}")
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8: {reason(error)}") from error
        for i, line in enumerate(lines):
            if "||" not in line:
                raise UserError(f"{path}, row {i + 1}: {line[:60]!r} is not of the form question||thoughts #### answer; mend the row or take it out")
        rows = {"train": [dict(zip(("question", "answer"), line.split("||", 1))) for line in lines]}
    elif path.suffix == ".jsonl" and not path.is_file():
        raise UserError(f"no file {path}; {OFFLINE_PROBLEMS}")
    elif path.is_dir():
        if missing := [name for name in ("train.jsonl", "test.jsonl") if not (path / name).is_file()]:
            raise UserError(f"{path} has no {missing[0]}; {OFFLINE_PROBLEMS}")
        rows = {split: _rows(str(path / f"{split}.jsonl"))["train"] for split in ("train", "test")}
    elif dataset == "gsm8k" or path.suffix == ".jsonl":
        rows = _rows(dataset)
    else:
        raise UserError(f"no data set {dataset!r}; {OFFLINE_PROBLEMS}")
    splits = {}
    for split in rows.keys() & {"train", "test"}:
        splits[split] = []
        for i, row in enumerate(rows[split]):
            question, answer = (_text(row.get(column), path.name, split, i, column) for column in ("question", "answer"))
            splits[split].append((question, gsm8k_thoughts(answer, form, f"{path.name}, {split} row {i + 1}")))
    if form == "equations" and not any(len(thoughts) > 1 for split in splits.values() for _, thoughts in split):
        raise UserError(f"{path.name} has no <<equation>> in any answer: add --form text to take its lines for thoughts")
    if "test" not in splits:
        splits = {"train": [p for p in splits["train"] if not is_test_problem(p[0])], "test": [p for p in splits["train"] if is_test_problem(p[0])]}
    tested = {question for question, _ in splits["test"]}
    splits["train"] = [problem for problem in splits["train"] if problem[0] not in tested][:n]
    if not all(splits.values()):
        raise UserError(f"{path.name} has {len(splits['train'])} training and {len(splits['test'])} test problems: both must be at least 1; give more rows")
    return Problems(*(list(part) for split in ("train", "test") for part in zip(*splits[split])))


END = 0  # fills a thought up to its slot
ANSWER = "\x01"  # the one character that "####" becomes


class Tokens:
    """One one-hot vector for each character; of generated tasks (`bare`) without the spaces, which the alphabet then lacks."""

    def __init__(self, alphabet: str):
        self.alphabet, self.bare, self.d = alphabet, " " not in alphabet, len(alphabet) + 1

    def length(self, longest: int) -> int:
        return longest

    def plain(self, text: str) -> str:
        """The text as its characters are counted."""
        text = text.replace("####", ANSWER)
        return text.replace(" ", "") if self.bare else text

    def ids(self, text: str) -> list[int]:
        return [self.alphabet.index(c) + 1 for c in self.plain(text)]

    def encode(self, texts: list[str], longest: int, fill: int = END) -> Tensor:
        """Ids (N, longest), filled up with END. Raises UserError for a text that is too long, or has a character that the alphabet lacks."""
        ids = torch.full((len(texts), longest), fill)
        for row, text in zip(ids, texts):
            plain = self.plain(text)
            if len(plain) > longest:
                raise UserError(f"{text[:60]!r} has {len(plain)} characters, but this model takes at most {longest}: shorten it")
            if strange := set(plain) - set(self.alphabet):
                raise UserError(f"{text[:60]!r} has {', '.join(map(repr, sorted(strange)))}, which this model has never seen: write it with {self.alphabet[:40]!r}")
            row[: len(plain)] = torch.tensor(self.ids(text))
        return ids

    def vectors(self, ids: Tensor) -> Tensor:
        return F.one_hot(ids.clamp(min=0), self.d).float()

    def snap(self, x0: Tensor) -> Tensor:
        return self.vectors(x0.argmax(-1))

    def draw(self, x0: Tensor, temperature: float) -> Tensor:
        """As snap, but tokens are drawn where x0 holds probabilities, at a temperature above 0."""
        p = x0.clamp(min=0) ** (1 / temperature)
        p = p + ~p.any(-1, keepdim=True)  # a guess of vectors, not probabilities, may be nowhere above 0: then any token
        return self.vectors(torch.multinomial(p.flatten(0, -2), 1).view(p.shape[:-1]))

    def text(self, ids: list[int]) -> str:
        ids = ids[: ids.index(END)] if END in ids else ids
        text = [self.alphabet[i - 1].replace(ANSWER, "####") for i in ids if 0 < i < self.d]
        return " ".join(text) if self.bare else "".join(text)

    def decode(self, x0: Tensor) -> list[str]:
        return [self.text(row) for row in x0.argmax(-1).tolist()]
