"""tokengen.py in blocks of several widths beside a GPT, and beside textgen.py's reviews.

    python -m bench.tokens        bits per character and characters/s after the same training seconds
    python -m bench.tokens --planner out/grammar/diffusion/last.pt --run.vocab 4096 --run.window 48
                                  reviews, after a quarter of the training seconds of textgen.py

The GPT is as wide and as deep as ours, is trained by tokengen.py on the same windows, and writes with its
cache.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

import bench.text
import tokengen
from bench.gpt import WindowGPT
from bench.runs import FOREVER, draw, millions, print_table, run_bench, saved_by, timed
from bench.timing import best_rate
from common.run import check_config, load_model, log, pick_device, resolve_out
from common.texts import load_text, save_text
from diffusion import Masked


@dataclass(frozen=True)
class Config:
    """Settings of a comparison."""

    dataset: str = "shakespeare"  # that of tokengen.py
    seconds: float = 600.0  # training seconds of each
    blocks: tuple[int, ...] = (1, 4, 16, 128)  # widths of the blocks of ours
    gpt: bool = True  # whether a GPT stands beside them
    planner: str | None = None  # a diffusion of textgen.py: compare reviews with it instead
    share: float = 0.25  # planner: of its training seconds, for ours
    score_n: int = 1000  # windows of the score; planner: reviews of a row
    every: int = 50  # steps between points of the learning curves
    out: str = "out/bench/{dataset}"  # folder of all runs; one that is finished there is loaded
    run: tokengen.Config = field(default_factory=tokengen.Config)

    def __post_init__(self):
        check_config(self, (min(self.score_n, self.every) >= 2, "--score_n and --every must be at least 2"))


def gpt_or_ours(name: str):
    """Within it, tokengen.py builds a GPT if that is the name."""

    def build(run: tokengen.Config, facts: dict, device: torch.device) -> tuple[Masked, WindowGPT]:
        torch.manual_seed(run.seed)
        gpt = WindowGPT(tokengen.vocabulary(facts), run.window, run.width, run.depth)
        return Masked(gpt.mask_id), gpt.to(device)

    return patch.object(tokengen, "build", build) if name == "GPT" else nullcontext()


@dataclass
class Trained:
    """A network of tokengen.py, or the GPT, its settings and what it knows of the text."""

    name: str
    run: tokengen.Config
    model: torch.nn.Module
    facts: dict
    curve: list[tuple[int, float, float]]

    def write(self, n: int, length: int, prompt: str = "", **settings) -> list[str]:
        """n new texts of so many tokens, or of a window with run.lines."""
        run = replace(self.run, prompt=prompt, length=length, **settings)
        ids = tokengen.encode_prompt(run, self.facts).expand(n, -1).to(next(self.model.parameters()).device)
        *_, ids = tokengen.write(run, self.model, ids)
        return [tokengen.decode(self.facts, row) for row in ids]


def trained(cfg: Config, name: str, block: int, texts: tuple[str, str], device: torch.device) -> Trained:
    """The network of that name, trained for cfg.seconds on the first text, or loaded where it has been."""
    settings = dict(max_steps=FOREVER, sample_every=FOREVER, score_n=0, resume=True)
    folder = Path(cfg.out, name.replace(" ", "_"))
    run = replace(cfg.run, dataset=cfg.dataset, block=block, out=str(folder), **settings)
    facts = tokengen.facts_of(run, *texts)

    def score(model) -> float:
        return tokengen.bits_of(run, facts, model, texts[1], 100, draws=4).mean().item()

    with gpt_or_ours(name):
        with timed(tokengen, limit=cfg.seconds, score=score, every=cfg.every):
            tokengen.train(run, *texts, device)
        _, model, facts = load_model(tokengen.Config, tokengen.build, folder / "last.pt", device)
    return Trained(name, run, model, facts, saved_by(tokengen.Config, folder / "last.pt")["extra"]["curve"])


def compare(cfg: Config, device: torch.device) -> None:
    """Train all, print the table and a sample of each, draw the curves."""
    texts, window, rows, curves, samples = (
        load_text(cfg.run.dataset, cfg.run.data_dir, cfg.run.lines),
        cfg.run.window,
        [],
        {},
        [],
    )
    for name, block in [("GPT", 1)] * cfg.gpt + [(f"blocks of {n}", n) for n in cfg.blocks]:
        ours = trained(cfg, name, block, texts, device)
        bits = tokengen.bits_of(ours.run, ours.facts, ours.model, texts[1], cfg.score_n)
        row = {"": name, "M parameters": millions(ours.model), "training steps": ours.curve[-1][0]}
        row |= {"bits per character": f"{bits.mean():.3f} +- {bits.std() / math.sqrt(len(bits)):.3f}"}
        for steps in sorted({min(4, block), min(cfg.run.steps, block)}):
            write, rates = partial(ours.write, length=window, steps=steps), {}
            for n in (1, 64):
                characters = len("".join(write(n)))
                rates[f"characters/s at {n}"] = f"{best_rate(partial(write, n), characters, 2):.3g}"
            rows.append(row | {"steps a block": steps} | rates)
        curves[name] = [(seconds, value) for _, seconds, value in ours.curve]
        samples += [f"[{name}]", *ours.write(1, window)]
    log(f"{cfg.seconds:g} s of training, n={len(bits)} held-out windows of {window} tokens")
    print_table(rows)
    save_text(samples, Path(cfg.out, "samples.txt"))
    labels = dict(xlabel="training seconds", ylabel="bits per character, held out (at most)")
    draw(Path(cfg.out, "curves.png"), curves, **labels)


# -- reviews ---------------------------------------------------------------------------------------------


def reviews(cfg: Config, device: torch.device) -> None:
    """Print the scores of textgen.py's reviews and of ours, which are trained on nine tenths of its reviews.

    Ours are lines of a text, "5 the room was ...", and are asked for by their first word.
    """
    planner = bench.text.Finished.load(cfg.planner, device)
    out = cfg.out.replace("{dataset}", f"reviews-{Path(planner.writer.cfg.dataset).stem}")
    run = replace(cfg.run, lines=True, length=cfg.run.window)
    cfg = replace(cfg, dataset="reviews", out=out, run=run, seconds=cfg.share * planner.seconds)
    text = "".join(f"{label + 1} {' '.join(review.split())}\n" for review, label, _ in planner.train)
    texts = text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]
    rows = planner.rows(cfg.score_n)
    labels = rows["samples"][1]
    ours = trained(cfg, "reviews", run.block, texts, device)
    for steps in sorted({1, 2, 4, 8, 16, run.block}):
        if steps <= run.block:
            rows[f"tokens, {steps} steps a block"] = ask(ours, labels, steps), labels
    if cfg.gpt:
        rows["GPT"] = ask(trained(cfg, "GPT", 1, texts, device), labels, 1), labels
    table = bench.text.score_rows(planner.writer.cfg.dataset, rows, planner.train)
    if planner.writer.cfg.dataset != "grammar":  # which has a check of its own
        judge = bench.text.train_gpt(planner, "judge", device)
        for name, (written, _) in rows.items():
            table[name]["perplexity"] = bench.text.perplexity(planner, judge, written)
    log(f"n={len(labels)}; textgen.py trained {planner.seconds:.0f} s, tokens {cfg.seconds:.0f} s")
    bench.text.print_scores(table)


def ask(ours: Trained, labels: list[int], steps: int) -> list[str]:
    """A review for each label."""
    reviews = [""] * len(labels)
    for label in sorted(set(labels)):
        places = [i for i, other in enumerate(labels) if other == label]
        lines = ours.write(len(places), ours.run.window, f"{label + 1}", steps=steps)
        for i, line in zip(places, lines, strict=True):
            reviews[i] = line.partition("\n")[0].partition(" ")[2].strip()
    return reviews


def main(cfg: Config) -> None:
    device = pick_device()
    log(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if cfg.planner:
        return reviews(cfg, device)
    compare(resolve_out(replace(cfg, run=replace(cfg.run, dataset=cfg.dataset))), device)


if __name__ == "__main__":
    run_bench(Config, main, __doc__)
