"""Reasoning: a chain of thoughts made by diffusion, all at once or thought by thought, each given the question and the thoughts before. DoT, 2402.07754.

    python reason.py --dataset sums                         running sums: nothing to download, minutes on a CPU
    python reason.py --dataset mult --digits 3 2            long multiplication, 3 by 2 digits
    python reason.py --sample_from out/mult/diffusion/last.pt --prompt "3 2 1 * 5 4"
"""
import csv
import dataclasses
import math
import random
import re
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metrics
from data import ANSWER, END, TASKS, Problems, Tokens, load_problems
from diffusion import SCHEDULES, Chain, Diffusion, Masked, Transformer, noise_shift
from training import OF_THE_RUN, Run, UserError, autocast, figure, finished, is_main, load_checkpoint, load_weights, need, pick_device, run_script, show, wait
from vae import QuestionGPT, TextVAE, small_backbones, small_gpt


@dataclass(frozen=True)
class Config:
    """Hyperparameters. Edit the defaults here, or override any of them: python reason.py --lr 1e-3"""

    # -- data --
    dataset: str = "mult"  # sums, adds or mult (generated), gsm8k (hub), or the path of a jsonl or txt file, or of a folder with train.jsonl and test.jsonl
    digits: tuple[int, int] = (3, 2)  # mult: digits of the two factors; adds: the first is that of each number
    terms: int = 4  # sums and adds: numbers to add
    train_n: int = 100_000  # training problems, or as many as there are
    form: Literal["equations", "text"] = "equations"  # gsm8k: thoughts are the <<equations>>, or the lines of text
    max_question: int = 1000  # characters of a question
    max_thoughts: int = 16  # thoughts of a chain, the answer among them
    # -- codec: what is diffused --
    codec: Literal["tokens", "latents"] = "tokens"  # one vector for each character, or the k codes that a TextVAE makes of a thought
    k: int = 4  # latents: codes of a thought
    d: int = 32  # latents: width of a code
    vae_width: int = 128  # latents: width of the VAE
    vae_depth: int = 2  # latents: blocks of its encoder and decoder
    vae_steps: int = 1000  # latents: its optimizer steps
    latent_noise: float = 0.15  # latents: standard deviation of the noise on the codes that its decoder learns from
    # -- diffusion --
    process: Literal["masked", "gaussian"] = "masked"  # tokens: masked one by one; any codec: Gaussian noise on its vectors
    passes: Literal["multi", "single"] = "multi"  # a thought at a time, given those before, or the whole chain at once
    T: int = 1000  # timesteps of the forward process
    schedule: Literal["cosine", "linear"] = "cosine"  # gaussian: noise schedule
    shift: float = 0.0  # above 1: more of the steps at high noise, or, masked, more masks while it trains; 0: 3 for masked with weight plain, else 1
    predict: Literal["token", "x0", "v", "eps"] = "token"  # gaussian: what the denoiser's output means; token (logits) for the codec tokens only
    weight: Literal["plain", "min-snr", "elbo"] = "plain"  # weight of a step's loss: min-snr for gaussian, elbo for masked, plain for both
    self_condition: float = 0.0  # share of steps in which the denoiser sees its first guess
    snapshot: float = 0.0  # multi: share of training chains whose earlier thoughts are the model's own guesses of them
    snapshot_temperature: float = 3.0  # tokens: of those guesses; at 1 a model that has learned its task makes no errors to learn from
    positions: Literal["learned", "sinusoid"] = "learned"  # of the denoiser's sequence
    width: int = 128  # width of the denoiser
    depth: int = 4  # blocks of the denoiser
    # -- optimisation --
    max_steps: int = 1000  # optimizer steps
    batch_size: int = 256  # problems of a step
    lr: float = 2e-3  # AdamW's learning rate after warm-up
    warmup: int = 200  # steps of linear warm-up
    ema_decay: float = 0.999  # upper limit of the EMA's decay; it ramps as (1 + step) / (10 + step)
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of the networks; auto: bf16 where the hardware has it
    compile: bool = False  # compile the networks with torch.compile
    # -- sampling --
    sampler: Literal["auto", "confident", "random", "dpm++", "ddim", "ddpm"] = "auto"  # masked: confident or random; gaussian: the others; auto: confident, or ddim
    steps: int = 8  # evaluations of the denoiser for each thought; confident: at most one for each of its tokens
    temperature: float = 0.0  # masked: of the tokens that are drawn, 0: the likeliest; gaussian: of the noise, 0: its mean, 1: as trained
    votes: int = 5  # chains of a majority vote; they are drawn at vote_temperature
    vote_temperature: float = 0.5  # temperature of a vote
    prompt: str = ""  # sample: a question of your own; empty: the first of the test split
    score_n: int = 500  # test problems of a score
    compare: bool = True  # train a GPT-2 of the same width and depth for as long, with its chain and on the answer only
    # -- the run --
    stage: Literal["all", "diffusion", "score", "correct"] = "all"  # correct: the experiment on self-correction; a finished stage is loaded
    out: str = ""  # folder of the run; default out/DATASET
    seed: int = 0  # of weights, data order, noise and samples
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda where there is one, else mps, else cpu
    log_every: int = 50  # steps between lines of the log
    sample_every: int = 500  # steps between evaluations
    save_every: int = 500  # steps between checkpoints
    seconds: float = 0.0  # end a training after so many seconds, if not after max_steps (latents: the VAE's after half of them); 0: no limit
    resume: bool = False  # go on with the run in the folder
    sample_from: str = ""  # answer --prompt, or test questions, from this checkpoint of the diffusion
    score_from: str = ""  # score this checkpoint of the diffusion on the test split

    kind = "reason"
    fixed = tuple(
        "dataset digits terms train_n form max_question max_thoughts codec k d vae_width vae_depth latent_noise process passes T schedule shift predict weight self_condition snapshot snapshot_temperature positions width depth batch_size seed".split()
    )

    def __post_init__(self):
        if not self.shift:
            object.__setattr__(self, "shift", 3.0 if (self.process, self.weight) == ("masked", "plain") else 1.0)
        need(self, "train_n max_question k d vae_depth vae_steps depth max_steps batch_size votes score_n log_every sample_every save_every", 1)
        need(self, "terms max_thoughts T", 2)
        need(self, "warmup seconds latent_noise temperature vote_temperature", 0)
        need(self, "self_condition snapshot ema_decay", 0, 1)
        need(self, "seed", 0, 2**32)
        need(self, "lr", 1e-9, 1)
        need(self, "snapshot_temperature", 0.1, 100)
        need(self, "shift", 0.01, 100)
        need(self, "steps", 1, self.T)
        if min(self.digits) < 1 or max(self.digits) > 8:
            raise ValueError(f"digits must be two numbers in 1..8, got {self.digits}")
        if self.width % 16 or self.vae_width % 8:
            raise ValueError(f"width must be divisible by 16 and vae_width by 8, got {self.width} and {self.vae_width}")
        if self.codec == "latents" and (self.process, self.predict) in (("masked", self.predict), ("gaussian", "token")):
            raise ValueError("--codec latents has no tokens to mask or to name: add --process gaussian --predict v (or x0, eps)")
        if self.weight == ("elbo" if self.process == "gaussian" else "min-snr"):
            raise ValueError(f"--weight {self.weight} is not one of --process {self.process}")
        if self.sampler not in ("auto", *(("confident", "random") if self.process == "masked" else ("dpm++", "ddim", "ddpm"))):
            raise ValueError(f"--sampler {self.sampler} is not one of --process {self.process}")
        if self.snapshot and self.passes == "single":
            raise ValueError("--snapshot is about earlier thoughts: it needs --passes multi")
        if self.sample_from and self.score_from:
            raise ValueError("choose one of sample_from and score_from")
        if self.prompt and not self.sample_from:
            raise ValueError("--prompt is answered from a checkpoint: add --sample_from out/NAME/diffusion/last.pt")


# -- codecs: texts to vectors and back ----------------------------------------------------------------------------------
# A codec has d, the width of a vector; length(longest), the vectors of a text of at most `longest` characters; encode(texts, longest), what is
# stored of each; vectors(stored), x0 (B, length, d); snap(x0), the nearest vectors that stand for a text; draw(x0), likewise but
# drawn, at a temperature, where x0 holds probabilities; decode(x0), the texts. The other codec is data.Tokens.


class Latents:
    """The k standardised codes that a frozen TextVAE, with the characters of `tokens` for its own, makes of a text."""

    def __init__(self, tokens: Tokens, vae: TextVAE, longest: int, mean: Tensor, std: Tensor, device):
        self.tokens, self.vae, self.longest, self.d, self.mean, self.std, self.device = tokens, vae, longest, vae.d, mean.to(device), std.to(device), device

    def length(self, longest: int) -> int:
        return self.vae.k

    @torch.no_grad()
    def encode(self, texts: list[str], longest: int = 0) -> Tensor:
        ids = vae_ids(self.tokens, texts, self.longest)
        return torch.cat([(self.vae.encode(part.to(self.device))[0] - self.mean) / self.std for part in ids.split(1024)])

    def vectors(self, codes: Tensor) -> Tensor:
        return codes

    def snap(self, x0: Tensor) -> Tensor:
        return self.encode(self.decode(x0))

    def draw(self, x0: Tensor, temperature: float) -> Tensor:
        return x0

    def decode(self, x0: Tensor) -> list[str]:
        rows = [row for part in (x0 * self.std + self.mean).split(1024) for row in self.vae.generate(part, self.longest).tolist()]
        return [self.tokens.text(row) for row in rows]


def vae_ids(tokens: Tokens, texts: list[str], longest: int) -> Tensor:
    """Ids (N, longest + 1) of texts as the VAE reads and writes them: END once at the end, then -100."""
    ids = F.pad(tokens.encode(texts, longest), (0, 1), value=END)
    return ids.masked_fill((ids == END).cumsum(1) > 1, -100)


# -- chains: where everything stands ------------------------------------------------------------------------------------


class Layout:
    """Where a question and its thoughts stand in the sequence, and which of them see which.

    Each thought has a slot of its own length, the longest of the data at that place, so that the same place always means the same, and in training
    its own step t. widths: characters of the question and of each slot. Multi-pass: a noised thought sees itself, the question and the clean
    thoughts before it, so that all thoughts of a chain are trained in one pass (block-causal). Single-pass: noised thoughts see each other.
    """

    def __init__(self, codec, widths: list[int], passes: str, device):
        self.longest, self.q, self.slots = widths, codec.length(widths[0]), [codec.length(w) for w in widths[1:]]
        self.n = len(self.slots)
        block = torch.repeat_interleave(torch.arange(self.n), torch.tensor(self.slots))  # (k,) the thought of each position
        self.block, self.k, self.passes = block.to(device), len(block), passes
        self.places, self.c = self.q + self.k, self.k - self.slots[-1] if passes == "multi" else 0  # c: clean positions of earlier thoughts
        self.position = torch.cat([self.q + torch.arange(self.k), torch.arange(self.q + self.c)]).to(device)  # (k + q + c,)
        of = torch.cat([block, torch.full((self.q,), -1), block[: self.c]])  # whose a position is: -1 is the question
        noised, row, column = torch.arange(len(of)) < self.k, of[:, None], of[None]
        together = row == column if passes == "multi" else torch.tensor(True)
        see = torch.where(noised, noised[:, None] & together, torch.where(noised[:, None], column < row, column <= row))
        self.see = see[None].to(device)  # (1, k + q + c, k + q + c)

    def cut(self, x: Tensor):
        """x (B, k, ...) in the parts that are sampled in one go."""
        return x.split(self.slots if self.passes == "multi" else [self.k], dim=1)

    def chain(self, codec, q: Tensor, r: Tensor, count: Tensor | None, snapshots: Tensor | None = None) -> tuple[Tensor, Chain]:
        """x0 (B, k, d) and its condition for stored questions q (B, q, ...), thoughts r (B, k, ...) and, where chains differ in length, the
        number of thoughts `count` (B,). snapshots: (B, k, d) stand in the context in place of the true thoughts."""
        x0, see, counted = codec.vectors(r), self.see, None
        if count is not None:
            counted = self.block < count[:, None]  # (B, k)
            see = see & torch.cat([counted, known(q), counted[:, : self.c]], dim=1)[:, None] | torch.eye(see.shape[1], dtype=torch.bool, device=see.device)
        context = torch.cat([codec.vectors(q), (x0 if snapshots is None else snapshots)[:, : self.c]], dim=1)
        return x0, Chain(self.block, context, self.position, see, self.n, count=counted)


def known(q: Tensor) -> Tensor:
    """Which positions (B, q) of stored questions hold something: ids of -1 are padding, codes are never."""
    return q >= 0 if q.dim() == 2 else torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)


@dataclass
class Split:
    """A split as the loops read it: stored questions (N, q, ...), thoughts (N, k, ...), their number (N,) or None where it never varies; and the texts."""

    q: Tensor
    r: Tensor
    count: Tensor | None
    questions: list[str]
    thoughts: list[list[str]]


def problem_facts(cfg: Config, problems: Problems) -> dict:
    """What a checkpoint must know of the problems: alphabet, widths, whether chains differ in length or fill, and their checksum.

    Raises UserError for a question or a chain beyond --max_question and --max_thoughts.
    """
    questions, thoughts = problems.question + problems.question_test, problems.thoughts + problems.thoughts_test
    for i, (question, chain) in enumerate(zip(questions, thoughts)):
        if len(question) > cfg.max_question or len(chain) > cfg.max_thoughts:
            raise UserError(f"{cfg.dataset}: problem {i + 1} ({question[:40]!r}...) has {len(question)} characters and {len(chain)} thoughts, more than --max_question {cfg.max_question} or --max_thoughts {cfg.max_thoughts}")
    characters = {c for text in [*questions, *(t for chain in thoughts for t in chain)] for c in text.replace("####", ANSWER)} - ({" "} if cfg.dataset in TASKS else set())
    tokens = Tokens("".join(sorted(characters)))
    n = max(map(len, thoughts))
    widths = [max(len(tokens.plain(q)) for q in questions), *(max(len(tokens.plain(t[i])) for t in thoughts if i < len(t)) for i in range(n))]
    lengths = {(len(tokens.plain(q)), *(len(tokens.plain(t)) for t in chain)) for q, chain in zip(questions, thoughts)}
    return dict(alphabet=tokens.alphabet, widths=widths, varies=len(lengths) > 1, problems=len(problems.question), checksum=problems.checksum())


# -- the model ----------------------------------------------------------------------------------------------------------


@dataclass
class Thinker:
    """All that turns a question into a chain: what a checkpoint of the diffusion holds."""

    cfg: Config
    facts: dict
    codec: Tokens | Latents
    layout: Layout
    process: Diffusion | Masked
    model: nn.Module
    device: torch.device

    def encode(self, questions: list[str], thoughts: list[list[str]]) -> Split:
        """Questions and their thoughts as the loops read them."""
        layout, codec, device = self.layout, self.codec, self.device
        how = (layout.longest[0], -1) if isinstance(codec, Tokens) else ()
        slots = [codec.encode([t[i] if i < len(t) else "" for t in thoughts], layout.longest[i + 1]) for i in range(layout.n)]
        count = torch.tensor([len(t) if layout.passes == "multi" else layout.n for t in thoughts], device=device) if self.facts["varies"] else None
        return Split(codec.encode(questions, *how).to(device), torch.cat(slots, dim=1).to(device), count, questions, thoughts)

    def asked(self, **changes) -> "Thinker":
        """The same thinker under other sampling settings."""
        return dataclasses.replace(self, cfg=dataclasses.replace(self.cfg, **changes))

    def settings(self, seed: int) -> dict:
        cfg = self.cfg
        sampler = cfg.sampler if cfg.sampler != "auto" else "confident" if cfg.process == "masked" else "ddim"
        return dict(sampler=sampler, steps=cfg.steps, temperature=cfg.temperature, generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def steps(self, q: Tensor, seed: int, given=(), start: tuple[Tensor, int] | None = None):
        """Yield (thought i, x0 of the thoughts so far (B, ..., d)) after every step of the chains of stored questions q (B, q, ...), until all have
        an answer; at last x0 of the whole chains.

        given: x0 of the first thoughts, kept as they are. start: x0 (B, k, d) of whole chains and the step t to which they are noised to
        begin from. What is finished is read once, along with the next thought's first step, and then only its keys and values are used.
        """
        layout, codec, settings = self.layout, self.codec, self.settings(seed)
        places = torch.arange(layout.k + layout.q + layout.c, device=q.device)  # of thoughts to be made, the question, finished thoughts
        thoughts, question, finished = places.split([layout.k, layout.q, layout.c])
        there, slots, starts = F.pad(known(q), (layout.k, layout.c), value=True), layout.cut(thoughts[None]), layout.cut(start[0]) if start else None
        new, new_at, past, past_at = codec.vectors(q), question, [], question[:0]  # what is finished: not yet read, and read
        done, ended = [], [False] * len(q)
        for i, (at,) in enumerate(slots):
            if i < len(given):
                x0 = given[i]
            else:
                rows, columns, begin = torch.cat([at, new_at]), torch.cat([past_at, at, new_at]), (starts[i], start[1]) if start else None
                see = layout.see[:, rows][:, :, columns] & there[:, None, columns]
                y = Chain(torch.zeros_like(at), new, layout.position[rows], see, past=past, keep=True)
                for x0 in self.ahead(self.process.trajectory(self.model, (len(q), len(at), codec.d), y, start=begin, **settings)):
                    yield i, torch.cat([*done, x0], dim=1)
                past, past_at, new, new_at = y.past, torch.cat([past_at, new_at]), new[:, :0], new_at[:0]
            last = i + 1 == len(slots)
            done.append(x0 if last or i < len(given) else codec.snap(x0))  # what later thoughts read is a text
            if last:
                break
            new, new_at = torch.cat([new, done[-1]], dim=1), torch.cat([new_at, finished[at]])
            if self.facts["varies"]:
                ended = [e or is_answer(text) for e, text in zip(ended, codec.decode(done[-1]))]
                if all(ended):
                    break
        yield i, torch.cat(done, dim=1)

    def ahead(self, trajectory):
        """xt of each step of a process's trajectory; autocast holds for the step, not for who reads it."""
        while True:
            with autocast(self.device, self.cfg.precision):
                step = next(trajectory, None)
            if step is None:
                return
            yield step[1]

    def think(self, q: Tensor, seed: int, given=(), start=None) -> Tensor:
        """x0 (B, k, d) of chains for stored questions q (B, q, ...), 1,000 at a time; see `steps`."""
        parts = []
        for part in torch.arange(len(q), device=q.device).split(1000):
            begin = (start[0][part], start[1]) if start else None
            with autocast(self.device, self.cfg.precision):  # around all steps: the weights are turned to bf16 once
                for _, x0 in self.steps(q[part], seed + len(parts), [x[part] for x in given], begin):
                    pass
            parts.append(F.pad(x0, (0, 0, 0, self.layout.k - x0.shape[1])))  # what lies behind all answers is never read
        return torch.cat(parts)

    def chains(self, x0: Tensor) -> list[list[str]]:
        """The thoughts of chains x0 (B, up to k, d), each chain up to its answer."""
        starts = [sum(self.layout.slots[:i]) for i in range(self.layout.n)]
        texts = (self.codec.decode(x0[:, a : a + w]) for a, w in zip(starts, self.layout.slots) if a < x0.shape[1])
        return [until_answer(list(chain)) for chain in zip(*texts)]

    def score(self, split: Split, seed: int, **changes) -> dict:
        """Scores of the split's questions under the sampling settings `changes`."""
        return metrics.score_chains(self.chains(self.asked(**changes).think(split.q, seed)), split.thoughts)


def is_answer(thought: str) -> bool:
    return thought.lstrip().startswith("####")


def until_answer(chain: list[str]) -> list[str]:
    last = next((i for i, thought in enumerate(chain) if is_answer(thought)), len(chain) - 1)
    return chain[: last + 1]


def build(cfg: Config, facts: dict, extra: dict, device) -> Thinker:
    """Codec, layout, process and denoiser that cfg describes. extra: of the codec latents, the VAE's weights and the codes' mean and std."""
    codec = Tokens(facts["alphabet"])
    if cfg.codec == "latents":
        vae = build_vae(cfg, facts, device)
        load_weights(vae, extra["vae"], cfg.out)
        codec = Latents(codec, vae.eval().requires_grad_(False), max(facts["widths"]), extra["mean"], extra["std"], device)
    layout = Layout(codec, facts["widths"], cfg.passes, device)
    torch.manual_seed(cfg.seed)
    places = layout.places if cfg.positions == "learned" else 0
    model = Transformer(codec.d, cfg.width, cfg.depth, d_context=codec.d, self_condition=cfg.self_condition > 0, places=places).to(device)
    try:
        if cfg.process == "masked":
            process = Masked(cfg.T, cfg.weight, cfg.self_condition, cfg.shift)
        else:
            process = Diffusion(noise_shift(SCHEDULES[cfg.schedule](cfg.T), cfg.shift), cfg.predict, cfg.weight, self_condition=cfg.self_condition)
    except ValueError as error:
        raise UserError(f"--schedule {cfg.schedule} with --T {cfg.T} and --shift {cfg.shift}: {error}") from error
    return Thinker(cfg, facts, codec, layout, process.to(device), model, device)


def build_vae(cfg: Config, facts: dict, device) -> TextVAE:
    torch.manual_seed(cfg.seed)
    vocab, longest = len(facts["alphabet"]) + 1, max(max(facts["widths"]) + 1, cfg.k)
    return TextVAE(*small_backbones(vocab, cfg.vae_width, cfg.vae_depth, longest + cfg.k + 1), cfg.k, cfg.d, END, noise=cfg.latent_noise, p_max=0.0).to(device)


# -- training -----------------------------------------------------------------------------------------------------------


def stage_config(cfg: Config, stage: str) -> Config:
    steps = dict(vae=cfg.vae_steps).get(stage, cfg.max_steps)
    return dataclasses.replace(cfg, out=f"{cfg.out}/{stage}", max_steps=min(steps, cfg.max_steps))


def train(cfg: Config, model: nn.Module, loss, n: int, facts: dict, device, evaluate, extra=None, seconds_before: float = 0.0) -> nn.Module:
    """Train model in cfg.out on loss(run.model, batch) until cfg.max_steps or cfg.seconds; return its EMA.

    evaluate(EMA): scores of held-out problems; they are printed, and kept with the training seconds in eval.csv. seconds_before: those of a
    stage that this one needs; they count.
    """
    if n < cfg.batch_size:
        raise UserError(f"{n} training problems, fewer than a batch of {cfg.batch_size}: give more, or a smaller --batch_size")
    run = Run(cfg, model, device, facts, extra)
    run.seconds = run.seconds if run.resumed else seconds_before
    path = Path(cfg.out) / "eval.csv"
    if run.main:
        print(f"{cfg.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {n} training {'texts' if facts['stage'] == 'vae' else 'problems'}; {device}, {run.world} process(es)", flush=True)
        rows = path.read_text().splitlines()[1:] if run.resumed and path.exists() else []
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(["step,seconds,answer,chain", *(r for r in rows if int(r.split(",")[0]) <= run.step), ""]))

    def note() -> None:
        took = run.seconds + time.perf_counter() - run.logged[1]  # those up to the last line of the log, and since
        with run.pause():
            if run.main:
                scores = evaluate(run.ema.module)
                print(f"step {run.step}, {took:.0f} s: answer {scores['answer']:.3f}, chain {scores['chain']:.3f}, thoughts " + " ".join(f"{a:.2f}" for a in scores["thoughts"]), flush=True)
                with open(path, "a", newline="") as file:
                    csv.writer(file).writerow([run.step, f"{took:.3f}", scores["answer"], scores["chain"]])
            wait()

    for step, batch in run.steps(n, cfg.seconds or math.inf):
        with autocast(device, cfg.precision):
            value = loss(run.model, batch)
        run.update(value)
        if step % cfg.sample_every == 0:
            note()
    if run.step % cfg.sample_every:
        note()
    if run.main:
        print(f"trained {run.seconds:.0f} s; wrote {run.curve()}", flush=True)
    return run.ema.module.eval()


def train_vae(cfg: Config, facts: dict, problems: Problems, device) -> None:
    cfg, tokens = dataclasses.replace(stage_config(cfg, "vae"), seconds=cfg.seconds / 2), Tokens(facts["alphabet"])
    if finished(cfg):
        return
    vae, texts = build_vae(cfg, facts, device), sorted({text for q, chain in zip(problems.question, problems.thoughts) for text in (q, *chain)})
    longest = max(facts["widths"])
    ids = vae_ids(tokens, texts, longest).to(device)
    held_out = sorted({t for q, chain in zip(problems.question_test, problems.thoughts_test) for t in (q, *chain)} - set(texts)) or texts  # of a small task all texts are known
    held_out = held_out[:: max(1, len(held_out) // 500)][:500]
    unseen = vae_ids(tokens, held_out, longest).to(device)

    def evaluate(vae) -> dict:
        back = [tokens.text(row) for row in vae.generate(vae.encode(unseen)[0], longest + 1).tolist()]
        right = sum(a == b for a, b in zip(back, held_out)) / len(held_out)
        return dict(answer=right, chain=right, thoughts=[right])  # the share of texts that come back

    train(cfg, vae, lambda model, batch: model(ids[batch], ids[batch]), len(ids), facts | dict(stage="vae"), device, evaluate)


def train_diffusion(cfg: Config, facts: dict, problems: Problems, device) -> None:
    extra, seconds, path = {}, 0.0, Path(cfg.out) / "diffusion" / "last.pt"
    if path.exists():  # its codes are those of its own VAE
        extra = load_checkpoint(path, cfg.kind)["extra"]
    elif cfg.codec == "latents":
        train_vae(cfg, facts, problems, device)
        wait()
        vae = load_checkpoint(f"{cfg.out}/vae/last.pt", cfg.kind)
        extra, seconds = dict(vae=vae["ema"], mean=torch.zeros(cfg.k, cfg.d), std=torch.ones(cfg.k, cfg.d)), vae["seconds"]
        codes = build(cfg, facts, extra, device).codec.encode([t for chain in problems.thoughts[:5000] for t in chain])
        extra |= dict(mean=codes.mean(0).cpu(), std=codes.std(0).clamp(min=1e-3).cpu())
    cfg = stage_config(cfg, "diffusion")
    thinker = build(cfg, facts, extra, device)
    layout, codec, process = thinker.layout, thinker.codec, thinker.process
    split = thinker.encode(problems.question, problems.thoughts)
    test = thinker.encode(problems.question_test[:200], problems.thoughts_test[:200])

    def loss(model, batch: Tensor) -> Tensor:
        q, r, count = split.q[batch], split.r[batch], None if split.count is None else split.count[batch]
        x0, y = layout.chain(codec, q, r, count)
        if cfg.snapshot:
            own = codec.draw(process.guess(model, x0, y), cfg.snapshot_temperature)
            keep = torch.rand(len(x0), 1, 1, device=device) >= cfg.snapshot
            x0, y = layout.chain(codec, q, r, count, snapshots=torch.where(keep, x0, own))
        return process.loss(model, x0, y)

    evaluate = lambda model: dataclasses.replace(thinker, model=model).score(test, cfg.seed)
    train(cfg, thinker.model, loss, len(split.q), facts | dict(stage="diffusion"), device, evaluate, extra, seconds)


def gpt_targets(tokens: Tokens, facts: dict, thoughts: list[list[str]], stage: str) -> Tensor:
    """Targets (N, L) of the baseline: the chain ("chain") or its last thought ("answer"), then its end token; thoughts of various length end in END each."""
    end, rows = len(facts["alphabet"]) + 1, []
    for chain in last_only(thoughts, stage):
        ids = [tokens.ids(t) + [END] * facts["varies"] for t in chain]
        rows.append([i for thought in ids for i in thought] + [end])
    target = torch.full((len(rows), max(map(len, rows))), -100)
    for row, ids in zip(target, rows):
        row[: len(ids)] = torch.tensor(ids)
    return target


def gpt_chains(tokens: Tokens, facts: dict, rows: list[list[int]], stage: str) -> list[list[str]]:
    """The thoughts in the ids that the baseline wrote."""
    end, widths, chains = len(facts["alphabet"]) + 1, facts["widths"][1:] if stage == "chain" else facts["widths"][-1:], []
    for row in rows:
        row = row[: row.index(end)] if end in row else row
        if facts["varies"]:
            marks = [-1, *(i for i, token in enumerate(row) if token == END), len(row)]
            parts = [row[a + 1 : b] for a, b in zip(marks, marks[1:]) if b > a + 1]
        else:
            starts = [sum(widths[:i]) for i in range(len(widths))]
            parts = [row[a : a + w] for a, w in zip(starts, widths)]
        chains.append(until_answer([tokens.text(part) for part in parts]) if parts else [])
    return chains


@dataclass
class Baseline:
    """The autoregressive GPT-2 of a stage, "chain" or "answer"."""

    facts: dict
    stage: str
    model: QuestionGPT
    longest: int
    precision: str
    device: torch.device

    def read(self, questions: list[str]) -> Tensor:
        return Tokens(self.facts["alphabet"]).encode(questions, self.facts["widths"][0], -1).to(self.device)

    def chains(self, questions: list[str]) -> list[list[str]]:
        """Its greedy chains, 1,000 at a time."""
        rows = []
        for part in self.read(questions).split(1000):
            with autocast(self.device, self.precision):
                rows += self.model.generate(self.model.read(part), self.longest).tolist()
        return gpt_chains(Tokens(self.facts["alphabet"]), self.facts, rows, self.stage)


def train_baseline(cfg: Config, stage: str, thinker: Thinker, problems: Problems, seconds: float) -> Baseline:
    """The trained baseline of a stage, as wide and as deep as the thinker; it is trained for so many seconds, or loaded where it has been."""
    facts, device = thinker.facts, thinker.device
    cfg, tokens = dataclasses.replace(stage_config(cfg, stage), max_steps=10**6, seconds=seconds, resume=False), Tokens(facts["alphabet"])
    if (Path(cfg.out) / "last.pt").exists():  # with --score_from these may be others than those of the training
        saved = load_checkpoint(f"{cfg.out}/last.pt", cfg.kind)["config"]
        cfg = dataclasses.replace(cfg, resume=True, **{name: saved[name] for name in OF_THE_RUN})
    target = gpt_targets(tokens, facts, problems.thoughts, stage).to(device)
    torch.manual_seed(cfg.seed)
    decoder = small_gpt(tokens.d + 1, cfg.width, cfg.depth, facts["widths"][0] + target.shape[1] + 1)
    baseline = Baseline(facts, stage, QuestionGPT(decoder).to(device), target.shape[1], cfg.precision, device)
    if finished(cfg):
        load_weights(baseline.model, load_checkpoint(f"{cfg.out}/last.pt", cfg.kind)["ema"], cfg.out)
        baseline.model.eval()
        return baseline
    q, truth = baseline.read(problems.question), last_only(problems.thoughts_test[:200], stage)
    evaluate = lambda model: metrics.score_chains(dataclasses.replace(baseline, model=model).chains(problems.question_test[:200]), truth)
    baseline.model = train(cfg, baseline.model, lambda model, batch: model(q[batch], target[batch]), len(q), facts | dict(stage=stage), device, evaluate)
    return baseline


def last_only(thoughts: list[list[str]], stage: str) -> list[list[str]]:
    """The chains as a baseline of the stage writes them."""
    return thoughts if stage == "chain" else [chain[-1:] for chain in thoughts]


# -- what the script does -----------------------------------------------------------------------------------------------


def load_thinker(cfg: Config, path: Path, device) -> tuple[Thinker, float]:
    """The thinker in a checkpoint of the diffusion, and its training seconds."""
    checkpoint = load_checkpoint(path, cfg.kind)
    if checkpoint["facts"].get("stage") != "diffusion":
        raise UserError(f"{path} is the checkpoint of a {checkpoint['facts'].get('stage')}; give that of the diffusion, out/NAME/diffusion/last.pt")
    thinker = build(cfg, checkpoint["facts"], checkpoint["extra"], device)
    load_weights(thinker.model, checkpoint["ema"], path)
    thinker.model.eval()
    return thinker, checkpoint["seconds"]


def focus(thinker: Thinker, question: str) -> list[str]:
    """The chain of one question as it comes into focus, a line for each step that changed it: "_" is a token still masked."""
    lines, tokens = [f"question  {question}"], thinker.codec if isinstance(thinker.codec, Tokens) else None
    for i, x0 in thinker.steps(thinker.encode([question], [[""] * thinker.layout.n]).q, thinker.cfg.seed):
        if tokens:
            text = " ".join(tokens.text([token]) if there else "_" for there, token in zip(x0[0].any(-1).tolist(), x0[0].argmax(-1).tolist()))
        else:
            text = " | ".join(thinker.chains(x0)[0])
        if text != lines[-1].split("  ", 1)[1]:
            lines.append(f"thought {i + 1}  {text}")
    return [*lines, "chain     " + " | ".join(thinker.chains(x0)[0])]


def check_question(cfg: Config, question: str) -> None:
    """Raises UserError for a question that is not of the form of the task."""
    digit = lambda n: " ".join([r"\d"] * n)
    form = dict(sums=r" \+ ".join([r"\d"] * cfg.terms), adds=r" \+ ".join([digit(cfg.digits[0])] * cfg.terms), mult=rf"{digit(cfg.digits[0])} \* {digit(cfg.digits[1])}").get(cfg.dataset)
    if form and not re.fullmatch(form, question):
        example = form.replace(r"\d", "7").replace("\\", "")
        raise UserError(f"--prompt {question!r} is not a question of --dataset {cfg.dataset} with these sizes; it looks like {example!r}, least significant digit first")


def rate(work, n: int) -> float:
    """Problems a second of work(), the best of three."""
    took = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return n / min(took)


def score(thinker: Thinker, problems: Problems, path: Path, seconds: float) -> None:
    """Print the scores of the chains at 1 to 64 evaluations a thought, of a vote, and of the autoregressive baselines, which are trained for as many
    seconds as the checkpoint at path was."""
    cfg, device, n, baselines = thinker.cfg, thinker.device, min(thinker.cfg.score_n, len(problems.question_test)), {}
    for stage in ("chain", "answer") if cfg.compare else ():  # by all processes
        baselines[stage] = train_baseline(cfg, stage, thinker, problems, seconds)
    if not is_main():
        return
    split = thinker.encode(problems.question_test[:n], problems.thoughts_test[:n])
    print(f"score: n={n} test problems, seed {cfg.seed}; {device}, {torch.get_num_threads()} threads; trained {seconds:.0f} s, {sum(p.numel() for p in thinker.model.parameters()) / 1e6:.2f} M parameters")

    def row(name: str, scores: dict, ask=None) -> None:
        timed = lambda b: rate(lambda: [ask(slice(i, i + b)) for i in range(0, min(n, max(b, 8)), b)], min(n, max(b, 8)))  # problems a second in batches of b
        rates = "  problems/s in batches of " + ", ".join(f"{b}: {timed(b):.3g}" for b in sorted({1, min(8, n), min(64, n), n})) if ask else ""
        print(f"  {name:22}  answer {scores['answer']:.3f}  chain {scores['chain']:.3f}  unended {scores['unended']:.3f}  thoughts " + " ".join(f"{a:.2f}" for a in scores["thoughts"]) + rates, flush=True)

    for steps in (s for s in (1, 2, 4, 8, 16, 32, 64) if s <= cfg.T):
        asked = thinker.asked(steps=steps)
        row(f"diffusion, {steps} steps", asked.score(split, cfg.seed), (lambda part: asked.chains(asked.think(split.q[part], 0))) if steps <= 8 else None)
    if cfg.votes > 1:
        drawn = thinker.asked(temperature=cfg.vote_temperature)
        runs = [drawn.chains(drawn.think(split.q, cfg.seed + 1000 * i)) for i in range(cfg.votes)]
        row(f"at temperature {cfg.vote_temperature:g}", metrics.score_chains(runs[0], split.thoughts))
        elected = [metrics.majority([metrics.answer_of(c) for c in chains]) for chains in zip(*runs)]
        print(f"  {f'vote of {cfg.votes} of those':22}  answer {sum(a is not None and a == metrics.answer_of(b) for a, b in zip(elected, split.thoughts)) / n:.3f}")
    for stage, baseline in baselines.items():
        row(f"GPT-2, {stage}", metrics.score_chains(baseline.chains(split.questions), last_only(split.thoughts, stage)), lambda part: baseline.chains(split.questions[part]))
        print(f"    trained {load_checkpoint(f'{cfg.out}/{stage}/last.pt', cfg.kind)['seconds']:.0f} s, {sum(p.numel() for p in baseline.model.parameters()) / 1e6:.2f} M parameters")
    if baselines and (path.parent / "eval.csv").exists():
        print("wrote", learning_curves({"diffusion": path.parent} | {f"GPT-2, {stage}": Path(cfg.out) / stage for stage in baselines}, Path(cfg.out) / "curves.png"))


def learning_curves(runs: dict[str, Path], path: Path) -> Path:
    """Draw the accuracy of the answers over the training seconds of several runs, from their eval.csv."""
    import matplotlib

    with figure(path, (9, 4)) as (fig, ax):
        colors = matplotlib.colormaps["tab20"]
        for i, (name, folder) in enumerate(runs.items()):
            rows = list(csv.DictReader(open(folder / "eval.csv")))
            style = dict(color="black", linestyle=":" if "answer" in name else "--") if name.startswith("GPT-2") else dict(color=colors(i))
            ax.plot([float(r["seconds"]) for r in rows], [float(r["answer"]) for r in rows], label=name, **style)
        ax.set(xlabel="training seconds", ylabel="share of right answers, test problems", ylim=(0, 1.02))
        fig.legend(loc="outside right upper")
    return path


def spoil(text: str, digits: str, rng: random.Random) -> str:
    """The text with one of its digits changed to another of `digits`."""
    at = rng.choice([i for i, c in enumerate(text) if c in digits])
    return text[:at] + rng.choice([c for c in digits if c != text[at]]) + text[at + 1 :]


def correct(cfg: Config, facts: dict, problems: Problems, device) -> None:
    """The experiment on self-correction: one thought of a true chain is spoilt; how often is the answer right all the same, with and without snapshots?"""
    if cfg.passes == "single":
        raise UserError("--stage correct spoils a thought and lets the later ones follow: it needs --passes multi")
    digits = "".join(c for c in facts["alphabet"] if c.isdigit())
    chosen = [i for i, chain in enumerate(problems.thoughts_test) if len(chain) > 1 and all(set(t) & set(digits) for t in chain[:-1])][: cfg.score_n]
    if not chosen or len(digits) < 2:
        raise UserError(f"--stage correct needs test problems with a thought that holds a digit before the answer; {cfg.dataset} has none")
    runs = {s: dataclasses.replace(cfg, snapshot=s, out=f"{cfg.out}/snapshot{s:g}") for s in (0.0, cfg.snapshot or 0.5)}
    for one in runs.values():
        if not finished(stage_config(one, "diffusion")):
            train_diffusion(one, facts, problems, device)
        wait()
    if not is_main():
        return
    results = {}
    for snapshot, one in runs.items():
        thinker, _ = load_thinker(one, Path(one.out) / "diffusion/last.pt", device)
        split = thinker.encode([problems.question_test[i] for i in chosen], [problems.thoughts_test[i] for i in chosen])
        answers = lambda x0: metrics.score_chains(thinker.chains(x0), split.thoughts)["answer"]
        rows = {"nothing spoilt": (answers(thinker.think(split.q, cfg.seed)), math.nan)}
        shortest, rng = min(map(len, split.thoughts)), random.Random(cfg.seed)
        for i in range(shortest - 1):
            bad = [[*chain[:i], spoil(chain[i], digits, rng), *chain[i + 1 :]] for chain in split.thoughts]
            x0 = thinker.codec.vectors(thinker.encode(split.questions, bad).r)
            given = list(thinker.layout.cut(x0))[: i + 1]
            first = thinker.think(split.q, cfg.seed, given)
            again = thinker.think(split.q, cfg.seed + 1, start=(first, cfg.T // 2))
            rows[f"thought {i + 1} spoilt"] = answers(first), answers(again)
        results[snapshot] = rows
    lines = [f"right answers, n={len(chosen)}, {cfg.steps} steps a thought, seed {cfg.seed}; second round: the whole chain, noised to T/2, once more"]
    for snapshot, rows in results.items():
        lines += [f"snapshot {snapshot:<4g}  {name:18}  {a:.3f}" + ("" if math.isnan(b) else f"  second round {b:.3f}") for name, (a, b) in rows.items()]
    show(Path(cfg.out), "correct", lines)

    bars = [(f"snapshot {s:g}{round_}", [pair[j] for pair in rows.values()]) for s, rows in results.items() for j, round_ in enumerate(("", ", second round"))]
    with figure(Path(cfg.out) / "correct.png", (9, 3.5)) as (fig, ax):
        for i, (name, values) in enumerate(bars):
            ax.bar([x + i / 5 for x in range(len(values))], values, width=1 / 5, label=name)
        ax.set_xticks([x + 0.3 for x in range(len(rows))], rows)
        ax.set(ylabel="share of right answers", ylim=(0, 1.02))
        fig.legend(loc="outside right upper")
    print("wrote", Path(cfg.out) / "correct.png")


def main(cfg: Config) -> None:
    device, given = pick_device(cfg.device), Path(cfg.sample_from or cfg.score_from)
    if cfg.sample_from or cfg.score_from:
        cfg = dataclasses.replace(cfg, out=cfg.out or str(given.parent.parent if given.parent.name == "diffusion" else given.parent))
        thinker, seconds = load_thinker(cfg, given, device)
        if cfg.prompt:
            check_question(cfg, cfg.prompt)
            return show(given.parent, "focus", focus(thinker, cfg.prompt))
    cfg = dataclasses.replace(cfg, out=cfg.out or f"out/{Path(cfg.dataset).stem.lower()}")
    problems = load_problems(cfg.dataset, cfg.digits, cfg.terms, cfg.train_n, cfg.form)
    facts, path = problem_facts(cfg, problems), Path(cfg.out) / "diffusion" / "last.pt"
    if cfg.stage == "correct":
        return correct(cfg, facts, problems, device)
    if not (cfg.sample_from or cfg.score_from):
        if finished(stage_config(cfg, "diffusion")):
            if is_main():
                print(f"{path} is finished: loaded, not trained again")
        elif cfg.stage != "score":
            if is_main():
                print(f"{cfg.dataset}: {len(problems.question)} training and {len(problems.question_test)} test problems; {problems.question[0]} -> {' | '.join(problems.thoughts[0])}")
            train_diffusion(cfg, facts, problems, device)
        wait()
        if cfg.stage == "diffusion":
            return
        given, (thinker, seconds) = path, load_thinker(cfg, path, device)
    if thinker.facts["checksum"] != facts["checksum"]:
        raise UserError(f"{cfg.dataset} is not the data that {given} was trained on: a score needs its training and test split")
    if is_main():
        show(given.parent, "focus", focus(thinker, problems.question_test[0]))
    if not cfg.sample_from:
        score(thinker, problems, given, seconds)
    if is_main():
        print(f"sample again: python reason.py --sample_from {shlex.quote(str(given))} --prompt {shlex.quote(problems.question_test[0])}")


if __name__ == "__main__":
    run_script(Config, main, __doc__)
