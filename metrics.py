"""Numbers for samples of images, texts and chains of thought.

Images: distances, precision and recall in the features of a small classifier of the same data, and the usual
FID. A distance means nothing alone: it depends on the features and falls with n. So that of real training
images, at the same n and against the same test images, is always printed beside it.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Images
from files import UserError, check_crc, reason, write_atomic
from tasks import answer_of


class Classifier(nn.Module):
    """Small classifier of images (N, C, H, W) in [-1, 1]; distances are taken in its `features` (N, 64)."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        layers = []
        for c_in, c_out, side, stride in [
            (channels, 32, 5, 2),
            (32, 64, 3, 1),
            (64, 64, 3, 2),
            (64, 64, 3, 1),
        ]:
            convolution = nn.Conv2d(c_in, c_out, side, stride, padding=side // 2)
            layers += [convolution, nn.BatchNorm2d(c_out), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(64, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x).mean(dim=(2, 3))  # (N, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def scale(x: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1]."""
    return x.float() / 127.5 - 1


def load_classifier(images: Images, cache: str, device: torch.device, steps=800) -> tuple[Classifier, float]:
    """The classifier of this data's training split, and its accuracy on the test split.

    It is trained once, with seed 0 and random shifts of up to 2 pixels, then read from the folder `cache`,
    where the data's checksum names it. Raises UserError where the data has fewer than two classes, or ten
    images in a split.
    """
    if len(images.names) < 2 or min(len(images.x), len(images.x_test)) < 10:
        got = f"{len(images.names)} classes, {len(images.x)} training and {len(images.x_test)} test images"
        need = "at least two classes (subfolders) and 10 images in each split"
        raise UserError(f"scores are taken in the features of a classifier, which needs {need}, got {got}")
    rng = torch.random.get_rng_state()  # the caller's draws stay as they would be without a score
    torch.manual_seed(0)
    net = Classifier(images.x.shape[1], len(images.names)).to(device)
    version = hashlib.sha256(f"{net} {steps}".encode()).hexdigest()[:6]  # another network is another file
    path = Path(cache) / f"{images.facts()['checksum']}_{version}.pt"
    if path.exists():
        try:
            check_crc(path)
            net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:  # torch raises a different type for each way in which a file can be broken
            damage = f"the cached classifier {path} is damaged ({reason(error)})"
            raise UserError(f"{damage}; delete it, and it is trained again") from error
    else:
        train_classifier(net, images, device, steps)
        write_atomic(path, lambda file: torch.save(net.state_dict(), file))
    torch.random.set_rng_state(rng)
    net.eval()
    with torch.no_grad():
        logits = torch.cat([net(scale(part).to(device)).cpu() for part in images.x_test.split(500)])
    return net, (logits.argmax(1) == images.y_test).float().mean().item()


def train_classifier(net: Classifier, images: Images, device: torch.device, steps: int) -> None:
    x, y = images.x.to(device), images.y.to(device)
    opt = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    lr = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=5e-3, total_steps=steps)
    H, W = x.shape[2:]
    for _ in range(steps):
        batch = torch.randint(len(x), (128,)).to(device)
        i, j = torch.randint(0, 5, (2,)).tolist()
        padded = F.pad(scale(x[batch]), (2, 2, 2, 2), mode="replicate")
        logits = net(padded[:, :, i : i + H, j : j + W])
        F.cross_entropy(logits, y[batch], label_smoothing=0.1).backward()
        opt.step()
        opt.zero_grad()
        lr.step()


@torch.no_grad()
def features(net: Classifier, x: Tensor, device: torch.device) -> np.ndarray:
    """Features (N, 64) float64 of uint8 images x (N, C, H, W)."""
    return torch.cat([net.features(scale(part).to(device)).cpu() for part in x.split(500)]).double().numpy()


def frechet_distance(f: np.ndarray, g: np.ndarray) -> float:
    """Squared Fréchet distance of the Gaussians fitted to f (N, d) and g (M, d). FID 1706.08500 eq. 6."""
    s, r = np.cov(f, rowvar=False), np.cov(g, rowvar=False)
    trace_sqrt = np.sqrt(np.linalg.eigvals(s @ r).real.clip(min=0)).sum()  # trace of (s r)^(1/2)
    return float(((f.mean(0) - g.mean(0)) ** 2).sum() + np.trace(s) + np.trace(r) - 2 * trace_sqrt)


def kernel_distance(f: np.ndarray, g: np.ndarray) -> float:
    """KID: unbiased squared MMD of features f (N, d), g (M, d) under (x.y / d + 1)^3. KID 1801.01401."""
    from sklearn.metrics.pairwise import polynomial_kernel  # whose defaults are that kernel

    def within(a):
        k = polynomial_kernel(a)
        return (k.sum() - np.trace(k)) / (len(a) * (len(a) - 1))

    return float(within(f) + within(g) - 2 * polynomial_kernel(f, g).mean())


def precision_recall(f: np.ndarray, g: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Share of features f (N, d) in the k-nearest-neighbour balls of g (M, d), real ones, and vice versa.

    Improved precision and recall 1904.06991 eq. 1 and 2.
    """
    from sklearn.metrics import pairwise_distances_chunked
    from sklearn.neighbors import NearestNeighbors

    def covered(a, b):
        radius = (
            NearestNeighbors(n_neighbors=k + 1).fit(b).kneighbors(b)[0][:, k]
        )  # the 0th is the point itself
        inside = pairwise_distances_chunked(a, b, reduce_func=lambda part, _: (part <= radius).any(axis=1))
        return float(np.concatenate(list(inside)).mean())

    return covered(f, g), covered(g, f)


def nearest_ratio(f: np.ndarray, train: np.ndarray, test: np.ndarray) -> tuple[float, np.ndarray]:
    """Median distance of f (N, d) to the nearest training features over that of test features; which (N,).

    About 1: as far from them as unseen real images are; near 0: copies.
    """
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=1).fit(train)
    distance, nearest = search.kneighbors(f)
    return float(np.median(distance) / np.median(search.kneighbors(test[: len(f)])[0])), nearest[:, 0]


def score_images(
    samples: Tensor, images: Images, net: Classifier, device: torch.device, y=None
) -> dict[str, dict]:
    """Rows "samples" (n, C, H, W) uint8 and "real", as many training images, against the test split.

    FD and KID (times 1000), precision and recall; of samples also nearest (see `nearest_ratio`) and label,
    the share that the classifier reads as their labels y (n,), where these are given.
    """
    train, test = features(net, images.x, device), features(net, images.x_test, device)
    pick = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: len(samples)].numpy()
    f, rows = features(net, samples, device), {}
    for name, g in [("samples", f), ("real", train[pick])]:
        precision, recall = precision_recall(g, test)
        distances = dict(FD=frechet_distance(g, test), KIDx1000=kernel_distance(g, test) * 1000)
        rows[name] = distances | dict(precision=precision, recall=recall)
    rows["samples"]["nearest"] = nearest_ratio(f, train, test)[0]
    if y is not None:
        weight, bias = (p.detach().cpu().double().numpy() for p in (net.head.weight, net.head.bias))
        rows["samples"]["label"] = float(((f @ weight.T + bias).argmax(1) == y.numpy()).mean())
    return rows


def inception_fid(samples: Tensor, real: Tensor) -> float:
    """The usual FID of uint8 images (N, C, H, W) in Inception-v3's 2048 features, by torchmetrics.

    Raises UserError where the library is not installed, or its weights are not on disk and cannot be
    downloaded.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        fid = FrechetInceptionDistance(feature=2048)
    except Exception as error:  # ModuleNotFoundError, or whatever the download raises
        needs = "it needs requirements-dev.txt and one download of the weights"
        raise UserError(f"no Inception FID ({reason(error)}): {needs}") from error
    for x, is_real in [(real, True), (samples, False)]:
        for part in x.split(100):
            fid.update(part.expand(-1, 3, -1, -1) if part.shape[1] == 1 else part, real=is_real)
    return fid.compute().item()


# -- texts -----------------------------------------------------------------------------------------------


# Scripts that put no spaces between words: Thai, Lao, Myanmar, Khmer, Japanese and Chinese.
SPACELESS = (
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
TOKENIZERS = {"words": "13a", "characters": "char"}  # sacrebleu's names


def unit(texts: list[str]) -> str:
    """What texts are counted in: "characters" where a fifth of these are of such scripts, else "words"."""
    text = "".join(texts)
    return "characters" if 5 * len(re.findall(SPACELESS, text)) > len(text) else "words"


def bleu(texts: list[str], references: list[str]) -> float:
    """Corpus BLEU of each text against its reference, 0..100, by sacrebleu, of words or characters (`unit`).

    NaN where no reference has four of these: BLEU would be 0 even of a copy.
    """
    from sacrebleu import corpus_bleu

    how = TOKENIZERS[unit(references)]
    copied = corpus_bleu(references, [references], tokenize=how).score
    return corpus_bleu(texts, [references], tokenize=how).score if copied else math.nan


def self_bleu(texts: list[str], counted: str = "words") -> float:
    """Mean BLEU of each text against all others; NaN for a single one."""
    from sacrebleu import sentence_bleu

    others = [texts[:i] + texts[i + 1 :] for i in range(len(texts))] if len(texts) > 1 else []
    how = TOKENIZERS[counted]
    scores = [sentence_bleu(a, b, tokenize=how).score for a, b in zip(texts, others, strict=False)]
    return float(np.mean(scores)) if scores else math.nan


def aubleu(points: list[tuple[float, float]]) -> float:
    """Area under BLEU over alpha_bar, for (alpha_bar, BLEU) points: trapezoids, as PLANNER's code has it."""
    from scipy.integrate import trapezoid

    alpha_bar, values = np.array(sorted(points)).T
    return float(trapezoid(values, alpha_bar))


def ngrams(text: str, n: int, counted: str = "words") -> list[tuple]:
    """The n-grams of the words or the characters of a text."""
    words = text.split()
    words = words if counted == "words" else "".join(words)
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def tfidf(texts: list[str], sublinear: bool = False):
    """TF-IDF of words and pairs of them; of characters where the texts are counted so, or have no words."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = unit(texts) == "words" and re.search(r"\w\w", " ".join(texts))
    return TfidfVectorizer(analyzer="word" if words else "char", ngram_range=(1, 2), sublinear_tf=sublinear)


def score_texts(texts: list[str], train: list[str]) -> dict[str, float]:
    """What texts are like, without a reference.

    dist1, dist2: the share of different n-grams among all. entropy: of the words, in nats. rep4: the share of
    4-grams that a text has said before, mean over texts. selfBLEU: of the first 50. nearest: mean cosine of
    each text to its nearest training text (`tfidf`). words: of a text. Where training texts are counted in
    characters (`unit`), all of these are.
    """
    counted, grams = unit(train), {}
    for n in (1, 2, 4):
        grams[n] = [ngrams(text, n, counted) for text in texts]
    one, two = (list(itertools.chain.from_iterable(grams[n])) for n in (1, 2))
    p = np.unique([word for (word,) in one], return_counts=True)[1] / max(1, len(one))
    repeated = [1 - len(set(fours)) / len(fours) for fours in grams[4] if fours]
    vectors = tfidf(train).fit(train)
    cosine = (vectors.transform(texts) @ vectors.transform(train).T).max(axis=1).toarray()
    return {
        "dist1": len(set(one)) / max(1, len(one)),
        "dist2": len(set(two)) / len(two) if two else math.nan,
        "entropy": float((p * np.log(1 / p)).sum()),
        "rep4": float(np.mean(repeated)) if repeated else math.nan,
        "selfBLEU": self_bleu(texts[:50], counted),
        "nearest": float(cosine.mean()),
        counted: len(one) / len(texts),
    }


def text_classifier(x: list[str], y: list[int], x_test: list[str], y_test: list[int]):
    """A function from texts to labels, fitted to x and y (two classes or more), and its accuracy on x_test.

    It is a logistic regression on TF-IDF (`tfidf`).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(tfidf(x, sublinear=True), LogisticRegression(C=10, max_iter=1000)).fit(x, y)
    return model.predict, float(model.score(x_test, y_test))


def share(values: Iterable[bool]) -> float:
    """The share of the values that are true; 0 of none."""
    values = list(values)
    return sum(values) / max(1, len(values))


def agreement(a: list, b: list) -> float:
    """The share of places at which two lists of equal length agree."""
    return share(x == y for x, y in zip(a, b, strict=True))


# -- answers ---------------------------------------------------------------------------------------------


def majority(chains: list[list[str]]) -> list[str] | None:
    """The first chain with the answer given most often; None where none has one. Self-consistency 2203.11171.

    Of answers given equally often it is the earliest.
    """
    answers = list(map(answer_of, chains))
    given = [answer for answer in answers if answer is not None]
    return chains[answers.index(max(given, key=given.count))] if given else None


def is_right(chain: list[str] | None, question: str, truth: list[str], check=None) -> bool:
    """Whether a chain passes check(question, chain); without a check, whether it has the true answer."""
    if not chain:
        return False
    if check is None:
        return answer_of(chain) is not None and answer_of(chain) == answer_of(truth)
    try:
        return check(question, chain)
    except ValueError:  # the check cannot read it
        return False


def without_spaces(chains: list[list[str]]) -> list[list[str]]:
    return [["".join(thought.split()) for thought in chain] for chain in chains]


def score_chains(chains: list[list[str]], questions: list[str], truth: list[list[str]], check=None) -> dict:
    """Shares of chains whose "answer" is right, that are the true "chain", and that are "unended" (without an
    answer); and for each place the share of right "thoughts" there.

    Thoughts are compared without spaces; one that is missing is wrong. check: as in `is_right`.
    """
    bare, true = without_spaces(chains), without_spaces(truth)
    right = [is_right(*row, check) for row in zip(chains, questions, truth, strict=True)]
    thoughts = []
    for i in range(max(map(len, true))):
        have = [a[i : i + 1] == b[i : i + 1] for a, b in zip(bare, true, strict=True) if i < len(b)]
        thoughts.append(share(have))
    unended = share(answer_of(chain) is None for chain in chains)
    return dict(answer=share(right), chain=agreement(bare, true), unended=unended, thoughts=thoughts)
