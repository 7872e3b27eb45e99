"""Scores. Images: distances, precision and recall in the features of a small classifier of the same data, and the usual FID. Texts: below.

A distance means nothing alone: it depends on the features and falls with n. So the value of real training images, at the same n,
against the same test images is always printed beside it.
"""
import hashlib
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Images
from training import UserError, reason, write_atomic


class Classifier(nn.Module):
    """Small convolutional classifier of (N, C, H, W) images in [-1, 1]; `features` (N, 64) are what the distances are taken in."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        layers = []
        for c_in, c_out, side, stride in [(channels, 32, 5, 2), (32, 64, 3, 1), (64, 64, 3, 2), (64, 64, 3, 1)]:
            layers += [nn.Conv2d(c_in, c_out, side, stride, padding=side // 2), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(64, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x).mean(dim=(2, 3))  # (N, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def scale(x: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1]."""
    return x.float() / 127.5 - 1


def load_classifier(images: Images, cache: str, device: torch.device, steps: int = 800) -> tuple[Classifier, float]:
    """The classifier of this data's training split and its accuracy on the test split; trained once (seed 0, random shifts of
    up to 2 pixels), then read from the folder `cache`, where the data's checksum names it.

    Raises UserError where the data has fewer than two classes or ten test images.
    """
    if len(images.names) < 2 or len(images.x_test) < 10:
        got = f"{len(images.names)} classes and {len(images.x_test)} test images"
        raise UserError(f"scores are taken in the features of a classifier: they need at least two classes (subfolders) and 10 test images, got {got}")
    rng = torch.random.get_rng_state()  # the caller's draws stay as they would be without a score
    torch.manual_seed(0)
    net = Classifier(images.x.shape[1], len(images.names)).to(device)
    version = hashlib.sha256(f"{net} {steps}".encode()).hexdigest()[:6]  # another network or training is another file
    path = Path(cache) / f"{images.facts()['checksum']}_{version}.pt"
    if path.exists():
        try:
            net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:  # torch raises a different type for each way in which a file can be broken
            raise UserError(f"the cached classifier {path} is damaged ({reason(error)}); delete it, and it is trained again") from error
    else:
        x, y = scale(images.x).to(device), images.y.to(device)
        opt = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
        lr = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=5e-3, total_steps=steps)
        for _ in range(steps):
            batch = torch.randint(len(x), (128,)).to(device)
            i, j = torch.randint(0, 5, (2,)).tolist()
            H, W = x.shape[2:]
            shifted = F.pad(x[batch], (2, 2, 2, 2), mode="replicate")[:, :, i : i + H, j : j + W]
            F.cross_entropy(net(shifted), y[batch], label_smoothing=0.1).backward()
            opt.step()
            opt.zero_grad()
            lr.step()
        write_atomic(path, lambda f: torch.save(net.state_dict(), f))
    torch.random.set_rng_state(rng)
    net.eval()
    with torch.no_grad():
        guesses = torch.cat([net(scale(part).to(device)).argmax(1).cpu() for part in images.x_test.split(500)])
    return net, (guesses == images.y_test).float().mean().item()


@torch.no_grad()
def features(net: Classifier, x: Tensor, device: torch.device) -> np.ndarray:
    """Features (N, 64) float64 of uint8 images x (N, C, H, W)."""
    return torch.cat([net.features(scale(part).to(device)).cpu() for part in x.split(500)]).double().numpy()


def frechet_distance(f: np.ndarray, g: np.ndarray) -> float:
    """Squared Frechet distance of the Gaussians fitted to features f (N, d) and g (M, d). Heusel et al. 1706.08500 eq. 6."""
    s, r = np.cov(f, rowvar=False), np.cov(g, rowvar=False)
    trace_sqrt = np.sqrt(np.linalg.eigvals(s @ r).real.clip(min=0)).sum()  # trace of (s r)^(1/2)
    return float(((f.mean(0) - g.mean(0)) ** 2).sum() + np.trace(s) + np.trace(r) - 2 * trace_sqrt)


def kernel_distance(f: np.ndarray, g: np.ndarray) -> float:
    """KID: unbiased squared MMD of features f (N, d) and g (M, d) under the kernel (x.y / d + 1)^3. Binkowski et al. 1801.01401."""
    k = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3

    def within(a):
        kaa = k(a, a)
        return (kaa.sum() - np.trace(kaa)) / (len(a) * (len(a) - 1))

    return float(within(f) + within(g) - 2 * k(f, g).mean())


def precision_recall(f: np.ndarray, g: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Share of features f (N, d) inside the k-nearest-neighbour balls of real g (M, d), and of g inside those of f. 1904.06991 eq. 1-2."""
    from scipy.spatial.distance import cdist

    covered = lambda a, b: float((cdist(a, b) <= np.partition(cdist(b, b), k, axis=1)[:, k]).any(axis=1).mean())
    return covered(f, g), covered(g, f)


def nearest_ratio(f: np.ndarray, train: np.ndarray, test: np.ndarray) -> tuple[float, np.ndarray]:
    """Median distance of f (N, d) to its nearest training features, over that of as many test features; and their indices (N,).

    About 1: as far from the training set as unseen real images are; near 0: copies.
    """
    from scipy.spatial.distance import cdist

    to_train = cdist(f, train)
    return float(np.median(to_train.min(1)) / np.median(cdist(test[: len(f)], train).min(1))), to_train.argmin(1)


def score_images(samples: Tensor, images: Images, net: Classifier, device: torch.device, y: Tensor | None = None) -> dict[str, dict[str, float]]:
    """Rows "samples" and "real" (as many training images): distances to the test split FD and KID (times 1000), precision, recall;
    for the samples also nearest (see nearest_ratio) and, where their labels y (n,) are given, the share that the classifier reads so.

    samples: (n, C, H, W) uint8, n at most the number of training images.
    """
    train, test = features(net, images.x, device), features(net, images.x_test, device)
    pick = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: len(samples)].numpy()
    f, rows = features(net, samples, device), {}
    for name, g in [("samples", f), ("real", train[pick])]:
        precision, recall = precision_recall(g, test)
        rows[name] = dict(FD=frechet_distance(g, test), KIDx1000=kernel_distance(g, test) * 1000, precision=precision, recall=recall)
    rows["samples"]["nearest"] = nearest_ratio(f, train, test)[0]
    if y is not None:
        weight, bias = (p.detach().cpu().double().numpy() for p in (net.head.weight, net.head.bias))
        rows["samples"]["label"] = float(((f @ weight.T + bias).argmax(1) == y.numpy()).mean())
    return rows


def inception_fid(samples: Tensor, real: Tensor) -> float:
    """The usual FID of uint8 images (N, C, H, W) in Inception-v3's 2048 features, by torchmetrics.

    Raises UserError where the library is not installed, or its weights are not on disk and cannot be downloaded.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        fid = FrechetInceptionDistance(feature=2048)
    except Exception as error:  # ModuleNotFoundError, or whatever the download raises
        raise UserError(f"Inception FID is not to be had: {reason(error)}. It needs requirements-dev.txt and one download of the weights") from error
    for x, is_real in [(real, True), (samples, False)]:
        for part in x.split(100):
            fid.update(part.expand(-1, 3, -1, -1) if part.shape[1] == 1 else part, real=is_real)
    return fid.compute().item()


# -- texts --------------------------------------------------------------------------------------------------------------


def bleu(texts: list[str], references: list[str]) -> float:
    """Corpus BLEU of each text against its reference, 0..100, by sacrebleu with its own tokenizer."""
    import sacrebleu

    return sacrebleu.corpus_bleu(texts, [references]).score


def aubleu(points: list[tuple[float, float]]) -> float:
    """Area under BLEU over alpha_bar, for (alpha_bar, BLEU) points: trapezoids, as PLANNER's code has it."""
    a, b = np.array(sorted(points)).T
    return float(np.trapezoid(b, a))


def ngrams(text: str, n: int) -> list[tuple]:
    words = text.split()
    return list(zip(*(words[i:] for i in range(n))))


def score_texts(texts: list[str], train: list[str], references: int = 50) -> dict[str, float]:
    """What texts are like, without a reference: dist-n, the share of different n-grams among all; entropy of the words in nats; rep-4, the share
    of 4-grams that a text has said before (mean over texts); self-BLEU of the first `references` texts against each other; nearest, the mean
    cosine of each text to its nearest training text (TF-IDF of words and pairs); words a text.
    """
    import sacrebleu
    from sklearn.feature_extraction.text import TfidfVectorizer

    grams = {n: [g for t in texts for g in ngrams(t, n)] for n in (1, 2)}
    counts = np.unique([g[0] for g in grams[1]] or [""], return_counts=True)[1]
    share = counts / counts.sum()
    rep = [1 - len(set(g)) / len(g) for g in (ngrams(t, 4) for t in texts) if g]
    few = texts[:references]
    selfs = [sacrebleu.sentence_bleu(t, few[:i] + few[i + 1 :]).score for i, t in enumerate(few)] if len(few) > 1 else [math.nan]
    vectors = TfidfVectorizer(ngram_range=(1, 2)).fit(train)
    nearest = (vectors.transform(texts) @ vectors.transform(train).T).max(axis=1).toarray().mean()
    dist = {f"dist{n}": len(set(grams[n])) / max(1, len(grams[n])) for n in (1, 2)}
    return dist | dict(entropy=float(-(share * np.log(share)).sum()), rep4=float(np.mean(rep)) if rep else math.nan, selfBLEU=float(np.mean(selfs)),
                       nearest=float(nearest), words=len(grams[1]) / len(texts))


def gpt2_perplexity(device: torch.device, name: str = "gpt2"):
    """A function from texts to their perplexity under a pretrained GPT-2 (hub name or folder): exp of the mean nats of all tokens but each text's
    first; texts are cut at 512 tokens. Raises UserError where the weights are not on disk and cannot be downloaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name).to(device).eval()
    except Exception as error:  # no network, no such name, a damaged folder
        raise UserError(f"{name} is not on disk and could not be downloaded ({reason(error)})") from error

    @torch.no_grad()
    def perplexity(texts: list[str]) -> float:
        nats, n = 0.0, 0
        for text in texts:
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=512).input_ids.to(device)
            if ids.shape[1] > 1:
                nats += F.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:], reduction="sum").item()
                n += ids.shape[1] - 1
        return math.exp(nats / n) if n else math.nan

    return perplexity


def text_classifier(x: list[str], y: list[int], x_test: list[str], y_test: list[int]):
    """A function from texts to labels (logistic regression on TF-IDF of words and pairs, fitted to x, y), and its accuracy on x_test. y: two classes or more."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=1000)).fit(x, y)
    return lambda texts: model.predict(texts).tolist(), float(model.score(x_test, y_test))


# -- answers ------------------------------------------------------------------------------------------------------------


def answer_of(chain: list[str]) -> str | None:
    """The answer of a chain: what follows "####" in its last thought, without spaces and commas; None where there is none."""
    found = re.fullmatch(r"####(.*)", chain[-1].strip(), re.S) if chain else None
    return (re.sub(r"[\s,]", "", found[1]) or None) if found else None


def majority(answers: list[str | None]) -> str | None:
    """The answer given most often, the earliest of equals; None only where none was given. Self-consistency, 2203.11171."""
    given = [answer for answer in answers if answer is not None]
    return max(given, key=given.count) if given else None


def score_chains(chains: list[list[str]], truth: list[list[str]]) -> dict:
    """Shares of chains with the right answer, with every thought right, and without an answer; and for each place the share of right thoughts there.

    Thoughts are compared without spaces; one that is missing, or malformed, is wrong.
    """
    bare = lambda thought: "".join(thought.split())
    same = lambda a, b: len(a) == len(b) and all(bare(x) == bare(y) for x, y in zip(a, b))
    at = [[i < len(a) and bare(a[i]) == bare(b[i]) for a, b in zip(chains, truth) if i < len(b)] for i in range(max(map(len, truth)))]
    mean = lambda values: sum(values) / len(values)
    return dict(answer=mean([answer_of(a) is not None and answer_of(a) == answer_of(b) for a, b in zip(chains, truth)]),
                chain=mean([same(a, b) for a, b in zip(chains, truth)]), unended=mean([answer_of(a) is None for a in chains]), thoughts=list(map(mean, at)))
