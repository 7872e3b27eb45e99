"""textgen.py beside GPT-2, and beside PLANNER's way of doing the same.

    python -m bench.text        three ratios of speed, in interleaved rounds; 4 minutes on a CPU
    python -m bench.text --load out/tripadvisor/diffusion/last.pt    AuBLEU, robustness, a table with GPT-2

The table trains two GPT-2s on the texts of the checkpoint, in folders beside it, until their held-out loss
rises, or for as long as VAE and denoiser were trained: a "baseline", as large as these two together, which is
given the labels and writes texts; and a "judge", as large as the VAE's decoder and without labels, which says
how surprising texts are (perplexity).
"""

import itertools
import math
import platform
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel, GPT2Config

import textgen
from bench.gpt import LabelGPT, mean_nats
from bench.runs import TimedRun, millions, print_table, run_bench, saved_by
from bench.timing import interleaved, spread
from common import scores, texts
from common.run import autocast, check_config, log, pick_device
from diffusion import drop_condition
from tasks import grammar
from vae import TextVAE, kl, pretrained_backbones, small_backbones, small_gpt, substitute

Rows = list[tuple[str, int, str]]


@dataclass(frozen=True)
class Config:
    """Settings of a comparison."""

    load: str | None = None  # a diffusion of textgen.py: measure it, beside GPT-2
    score_n: int = 200  # load: texts of a score
    rounds: int = 7  # speed: all sides in turn
    round_steps: int = 4  # speed: training steps of each side in a round
    base_batch: int = 8  # speed: texts of a diffusion step at the base size

    def __post_init__(self):
        check_config(self, (self.score_n >= 2, "--score_n must be at least 2"))


# -- measures --------------------------------------------------------------------------------------------


def self_bleu(written: list[str]) -> float:
    """Mean BLEU of each text against all others: 100 where all are alike."""
    from sacrebleu import sentence_bleu

    how = "char" if scores.spaceless(written) else "13a"
    others = [written[:i] + written[i + 1 :] for i in range(len(written))]
    bleus = [sentence_bleu(a, b, tokenize=how).score for a, b in zip(written, others, strict=True)]
    return float(np.mean(bleus))


def distinct(written: list[str], n: int) -> float:
    """The share of different n-grams of words among all; of characters where the texts are `spaceless`."""
    words = [list("".join(text.split())) if scores.spaceless(written) else text.split() for text in written]
    grams = [gram for row in words for gram in zip(*(row[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / max(1, len(grams))


def nearest_cosine(written: list[str], train: list[str]) -> float:
    """Mean cosine of each text to its nearest training text, in TF-IDF of words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    unit = "char" if scores.spaceless(train) else "word"
    vectors = TfidfVectorizer(analyzer=unit, ngram_range=(1, 2)).fit(train)
    cosine = (vectors.transform(written) @ vectors.transform(train).T).max(axis=1).toarray()
    return float(cosine.mean())


def score_rows(dataset: str, rows: dict[str, tuple[list[str], list[int]]], train: Rows) -> dict[str, dict]:
    """The measures of rows of (texts, labels).

    label: the share that a classifier reads as labelled. Of the grammar's texts also accepted: the share that
    it accepts, and rating: the share with the rating that the label says.
    """
    known, labels = [text for text, _, _ in train], [label for _, label, _ in train]
    classify = scores.text_classifier(known, labels) if len(set(labels)) > 1 else None
    table = {}
    for name, (written, y) in rows.items():
        row = {f"dist-{n}": distinct(written, n) for n in (1, 2)}
        row |= {"self-BLEU": self_bleu(written[:50]), "nearest": nearest_cosine(written, known)}
        if classify:
            row["label"] = scores.agreement(classify(written), y)
        if dataset == "grammar":
            ratings = [grammar.rating_of(text) for text in written]
            row["accepted"] = 1 - ratings.count(None) / len(ratings)
            row["rating"] = scores.agreement(ratings, [label + 1 for label in y])
        table[name] = row
    return table


def print_scores(table: dict[str, dict[str, float]]) -> None:
    print_table([{"": name} | {k: f"{v:.3g}" for k, v in row.items()} for name, row in table.items()])


# -- a finished run --------------------------------------------------------------------------------------


@dataclass
class Finished:
    """A run of textgen.py: its writer, its training and held-out pieces, and its training seconds."""

    folder: Path
    writer: textgen.Writer
    train: Rows
    test: Rows
    seconds: float

    @staticmethod
    def load(path, device: torch.device) -> "Finished":
        folder, writer = Path(path).parent, textgen.load(path, device)
        cfg = writer.cfg
        train, test = textgen.pieces(cfg, writer.encoder, writer.decoder, textgen.load_texts(cfg))
        stages = (folder / "last.pt", folder.parent / "vae/last.pt")
        seconds = sum(saved_by(textgen.Config, stage)["seconds"] for stage in stages)
        return Finished(folder, writer, train, test, seconds)

    def rows(self, n: int) -> dict[str, tuple[list[str], list[int]]]:
        """Texts and labels: new ones under the conditions of n training texts, these, and held-out ones."""
        known = texts.shuffled(self.train, self.writer.cfg.seed)[:n]
        rows = {"samples": known, "training": known, "held out": self.test[:n]}
        rows = {name: ([row[0] for row in part], [row[1] for row in part]) for name, part in rows.items()}
        new = self.writer.sample(textgen.conditions(self.writer.cfg, known))
        return rows | {"samples": (new, rows["training"][1])}

    def tensors(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """The encoder's ids and the decoder's targets of rows, (N, max_tokens) each."""
        return textgen.tensors(self.writer.cfg, self.writer.encoder, self.writer.decoder, rows)


def quality(cfg: Config, device: torch.device) -> None:
    """Print how texts come back from their latents, and the table of new ones beside GPT-2's."""
    run = Finished.load(cfg.load, device)
    held_out = texts.shuffled(run.test, run.writer.cfg.seed)[: cfg.score_n]
    score_vae(run, held_out)
    score_denoiser(run, held_out[:100])
    judge, baseline = (train_gpt(run, name, device) for name in ("judge", "baseline"))
    rows = run.rows(cfg.score_n)
    y = rows["samples"][1]
    for top_p in (0.7, 0.92, 1.0):
        rows[f"GPT-2 top-p {top_p:g}"] = write_reviews(run, baseline, y, top_p), y
    table = score_rows(run.writer.cfg.dataset, rows, run.train)
    for name, (written, _) in rows.items():
        table[name]["perplexity"] = perplexity(run, judge, written)
    log(f"\n{cfg.load}, n={len(y)}, trained {run.seconds:.0f} s")
    print_scores(table)


@torch.no_grad()
def score_vae(run: Finished, rows: Rows) -> None:
    """Print BLEU of texts written back from their latents, also with 30% of the tokens substituted; nats."""
    writer, (ids, target) = run.writer, run.tensors(rows)
    real = texts.decode(writer.decoder, target)
    torch.manual_seed(writer.cfg.seed)
    spoilt = substitute(ids, torch.full((len(ids),), 0.3), writer.vae.encoder.config.vocab_size)
    bleus = []
    for x in (ids, spoilt):
        z = (textgen.encode_all(writer.vae, x) - writer.mean) / writer.std
        bleus.append(scores.bleu(writer.write(z), real))
    read = [[i for i in row if i >= 0] for row in spoilt.tolist()]
    read = [writer.encoder.decode(row, skip_special_tokens=True).strip() for row in read]
    of = f"of 30% substituted tokens {bleus[1]:.1f}, where that text itself has {scores.bleu(read, real):.1f}"
    log(f"VAE, n={len(real)}: BLEU {bleus[0]:.1f}, {of}")
    z, target = textgen.encode_all(writer.vae, ids).to(writer.device), target.to(writer.device)
    under = {"its own": z, "another text's": z.roll(1, 0), "zero": torch.zeros_like(z)}
    nats = [f"{name} latents {writer.vae.cross_entropy(x, target):.2f}" for name, x in under.items()]
    log(f"nats per token under {', '.join(nats)}")


@torch.no_grad()
def score_denoiser(run: Finished, rows: Rows) -> None:
    """Print AuBLEU: the area, over alpha_bar, under the BLEU of texts written from noised latents. PLANNER.

    The denoiser guesses the clean latents in one evaluation.
    """
    writer, (ids, target), points = run.writer, run.tensors(rows), []
    process, real = writer.process, texts.decode(writer.decoder, target)
    y = textgen.rows_of(writer.condition(textgen.conditions(writer.cfg, rows)), slice(None))
    x0 = (textgen.encode_all(writer.vae, ids) - writer.mean) / writer.std
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(writer.cfg.seed))
    for t in range(textgen.T, 0, -textgen.T // 10):
        xt = (process.a[t] * x0 + process.s[t] * eps).to(writer.device)
        guess = process.guess(writer.model, xt, torch.full((len(x0),), t, device=writer.device), y)
        points.append((process.a[t] ** 2, scores.bleu(writer.write(guess.cpu()), real)))
    points.append((1.0, scores.bleu(writer.write(x0), real)))
    log(f"AuBLEU {area(points):.1f} of {points[-1][1]:.1f}, n={len(real)}; by alpha_bar:")
    log(", ".join(f"{alpha_bar:.2f}: {bleu:.1f}" for alpha_bar, bleu in points))


def area(points: list[tuple[float, float]]) -> float:
    """Area under points (x, y), in ascending order of x, by trapezoids, as PLANNER's code has it."""
    return sum((b - a) * (y + z) / 2 for (a, y), (b, z) in itertools.pairwise(points))


# -- GPT-2 -----------------------------------------------------------------------------------------------


def train_gpt(run: Finished, name: str, device: torch.device) -> LabelGPT:
    """The "baseline" or the "judge", trained in a folder beside the run, or loaded where it has been."""
    writer, seed = run.writer, run.writer.cfg.seed + (name == "judge")  # other weights, another order
    cfg = replace(writer.cfg, seed=seed, out=str(run.folder / name), resume=True)
    torch.manual_seed(seed)
    eos = writer.decoder.eos_token_id
    model = LabelGPT(make_decoder(run, name), len(writer.facts["names"]), eos).to(device)
    y, y_test = (torch.tensor([label for _, label, _ in rows]) for rows in (run.train, run.test[:256]))
    if name == "judge":
        y, y_test = torch.full_like(y, -1), torch.full_like(y_test, -1)
    target, target_test = (run.tensors(rows)[1] for rows in (run.train, run.test[:256]))
    y, target = y.to(device), target.to(device)
    sizes = cfg.vae_steps + cfg.diffusion_steps, cfg.vae_batch
    log(f"{name}: a GPT-2 of {millions(model)} M parameters, for at most {run.seconds:.0f} s")
    held_out = partial(mean_nats, y=y_test, target=target_test)
    ends = dict(limit=run.seconds, score=held_out, every=min(250, cfg.sample_every), early_stop=True)
    with TimedRun(cfg, model, dict(stage=name), device, sizes=sizes, **ends) as timed:
        for _, batch in timed.steps(len(target)):
            with autocast(device, cfg.precision):
                loss = timed.model(y[batch], target[batch])
            timed.update(loss)
        return timed.ema


def perplexity(run: Finished, judge: LabelGPT, written: list[str]) -> float:
    """The perplexity of texts, by the judge."""
    target = run.tensors([(text, -1, "") for text in written])[1]
    return math.exp(mean_nats(judge, torch.full((len(written),), -1), target))


def make_decoder(run: Finished, name: str):
    """The judge's decoder is like the VAE's; the baseline's makes up for encoder and denoiser by its size."""
    writer, cfg = run.writer, run.writer.cfg
    if cfg.decoder != "scratch":
        return pretrained_backbones(cfg.encoder, cfg.decoder)[1]
    D, depth, vocab = cfg.vae_width, cfg.vae_depth, len(writer.decoder)
    if name == "baseline":
        size = sum(p.numel() for p in (*writer.vae.parameters(), *writer.model.parameters()))
        D = cfg.vae_width * 3 // 2
        depth = max(1, round((size - vocab * D) / (12 * D**2)))
    return small_gpt(vocab, D, depth, cfg.max_tokens + 1)


def write_reviews(run: Finished, model: LabelGPT, labels: list[int], top_p: float) -> list[str]:
    """What the GPT-2 writes for labels."""
    torch.manual_seed(run.writer.cfg.seed)
    written = []
    for part in torch.tensor(labels).split(64):
        ids = model.write(part.to(run.writer.device), run.writer.cfg.max_tokens, top_p)
        written += texts.decode(run.writer.decoder, ids)
    return written


# -- speed -----------------------------------------------------------------------------------------------


def planner_loss(vae: TextVAE, ids: Tensor, target: Tensor) -> Tensor:
    """The loss of vae (span 1, learned variance) by the road that PLANNER's code takes.

    The encoder runs once for the mean and once for the variance; the latents pass through the decoder by
    themselves, and the text reads its keys and values from that pass's cache.
    """
    p = torch.rand(len(ids), device=ids.device) * vae.p_max
    noisy = substitute(ids, p, vae.encoder.config.vocab_size)
    mean = vae.fc_mean(vae.states(noisy)[0][:, : vae.k]).tanh()
    var = vae.fc_log_var(vae.states(noisy)[0][:, : vae.k]).clamp(-20, 5).exp()
    z = mean + var.sqrt() * torch.randn_like(mean)
    cache = vae.decoder.transformer(inputs_embeds=vae.prefix(z), use_cache=True).past_key_values
    read = F.pad(target.clamp(min=0)[:, :-1], (1, 0), value=vae.eos)
    logits = vae.decoder(input_ids=read, past_key_values=cache).logits
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)
    return loss + vae.beta * kl(mean, var)


def training_steps(model, loss, n: int, device):
    """A function that takes n optimizer steps of model on loss()."""
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type != "mps")

    def work(_) -> None:
        for _ in range(n):
            loss().backward()
            opt.step()
            opt.zero_grad()

    return work


def compare(title: str, sides: dict, rounds: int, device) -> None:
    """Print the seconds of two sides and their ratio, round by round."""
    (a, ours), (b, theirs) = interleaved(sides, rounds, device).items()
    ratios = [there / here for here, there in zip(ours, theirs, strict=True)]
    seconds = f"{a} {np.median(ours):.3f} s, {b} {np.median(theirs):.3f} s"
    log(f"{title}: {seconds}, ratio {spread(ratios)}")


@cache
def small_parts(device) -> tuple[textgen.Config, dict, TextVAE, Rows]:
    """What textgen.py at its defaults makes of the grammar: cfg, facts, VAE and training texts."""
    cfg = textgen.Config(dataset="grammar")
    data = textgen.load_texts(cfg)
    tokenizer = texts.train_tokenizer([text for text, _, _ in data.train], cfg.vocab)
    facts = dict(names=data.names, encoder=tokenizer, decoder=tokenizer)
    return cfg, facts, textgen.build_vae(cfg, facts, device), data.train


def vae_speed(bench: Config, device) -> None:
    """A step of the VAE beside PLANNER's way of it, with BERT and GPT-2 as they come and as ours are."""
    cfg, facts, vae, rows = small_parts(device)
    tokenizer = texts.from_json(*facts["decoder"])
    ids, target = textgen.tensors(cfg, tokenizer, tokenizer, rows[: cfg.vae_batch])
    ids, target = ids.to(device), target.to(device)
    parts = small_backbones(len(tokenizer), cfg.vae_width, cfg.vae_depth, cfg.max_tokens + cfg.k + 1)
    bert, gpt = (part.config.to_dict() | dict(attn_implementation="sdpa") for part in parts)
    bert = BertModel(BertConfig(**bert), add_pooling_layer=False)
    gpt = AutoModelForCausalLM.from_config(GPT2Config(**gpt | dict(activation_function="gelu_new")))
    for name, theirs in (("PLANNER's way", (bert, gpt)), ("PLANNER's way on our backbones", parts)):
        plain = TextVAE(*theirs, cfg.k, cfg.latent_width, vae.eos, variance="learned", beta=1e-5).to(device)
        our_loss, their_loss = partial(vae, ids, target), partial(planner_loss, plain, ids, target)
        sides = {
            "ours": training_steps(vae, our_loss, bench.round_steps, device),
            name: training_steps(plain, their_loss, bench.round_steps, device),
        }
        compare(f"VAE step, batch {cfg.vae_batch}, float32", sides, bench.rounds, device)


def diffusion_speed(bench: Config, device) -> None:
    """A step of the diffusion at the base size on stored latents, and with BERT encoding on the fly."""
    _, facts, vae, _ = small_parts(device)
    cfg = textgen.Config(size="base", **textgen.Config.RECIPES["base"])
    bert = AutoModel.from_config(BertConfig(), add_pooling_layer=False).to(device).eval()  # bert-base's shape
    process, denoiser = textgen.build_denoiser(cfg, facts, vae)
    B = bench.base_batch
    words = torch.randint(1000, 30_000, (B, cfg.max_tokens), device=device)
    y = torch.zeros(B, dtype=torch.long, device=device)
    stored = torch.randn(B, cfg.k, cfg.latent_width, device=device)

    def loss(z: Tensor = stored) -> Tensor:
        return process.loss(denoiser, z, drop_condition(y, textgen.LABEL_DROP)).mean()

    def loss_on_the_fly() -> Tensor:
        with torch.no_grad():
            z = bert(input_ids=words).last_hidden_state[:, : cfg.k, : cfg.latent_width]
        return loss(z)

    sides = {
        "stored latents": training_steps(denoiser, loss, bench.round_steps, device),
        "encoded on the fly": training_steps(denoiser, loss_on_the_fly, bench.round_steps, device),
    }
    compare(f"diffusion step, base, batch {B}, float32", sides, bench.rounds, device)


def main(cfg: Config) -> None:
    device = pick_device()
    if cfg.load:
        return quality(cfg, device)
    where = f"{device}, {torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"
    log(f"{where}, {cfg.rounds} interleaved rounds")
    vae_speed(cfg, device)
    diffusion_speed(cfg, device)


if __name__ == "__main__":
    run_bench(Config, main, __doc__)
