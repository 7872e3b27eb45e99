"""Reasoning by masked diffusion: chains of thought, thought by thought, and puzzles, the surest cell first.

python reason.py                                      3 x 2-digit multiplication; nothing to download
python reason.py --dataset sudoku                     grids that are made here, with one solution each
python reason.py --sample_from out/sudoku/last.pt --prompt "53..7....6..195....98....6.8...6...34..8.3..17..."

Diffusion of Thought 2402.07754, orders of unmasking 2502.06768, remasking (ReMDM) 2503.00307.
"""

import dataclasses
import functools
import itertools
import math
import re
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

import metrics
from blocks import Layout, TokenTransformer, doubt, generate
from diffusion import Masked
from files import UserError, figure, is_main, say, show
from tasks import ANSWER, TASKS, USUAL, Problems, Size, Tokens, load_problems
from training import (
    Run,
    autocast,
    check_run,
    finished,
    load_averaged,
    matrices_of,
    millions,
    need,
    not_fatal,
    pick_device,
    run_name,
    run_script,
    wait,
)

EVAL = "step,seconds,answer,chain"  # the columns of eval.csv
VOTE_TEMPERATURE = 0.5  # at which the chains of a majority vote are drawn
SHOWN_TRIES = (1, 2, 4, 8, 16, 32, 64, 128)  # of a score


class Facts(TypedDict):
    """What a checkpoint knows of its problems, see `chain_facts`."""

    alphabet: str
    widths: list[int]
    example: str | None
    axes: list[list[int]] | None
    problems: int
    checksum: str


@dataclass(frozen=True)
class Config:
    """Hyperparameters. Edit the defaults here, or override any of them: python reason.py --lr 1e-3"""

    # -- data --
    dataset: str = "mult"  # mult, adds, sums, countdown, sudoku (made here), gsm8k (hub), or a path
    digits: tuple[int, int] = (3, 2)  # mult: of the two factors; adds: the first is that of each number
    terms: int = 4  # sums, adds: numbers to add; countdown: numbers to reach the target with
    side: Literal[4, 6, 9] = 9  # sudoku: of the grid
    train_n: int = 50_000  # training problems, or as many as there are
    form: Literal["equations", "text"] = "equations"  # of a file's thoughts: the <<equations>>, or the lines
    test: str | None = None  # a file of test problems, in place of those that the data set has
    # -- diffusion --
    passes: Literal["multi", "single"] = "multi"  # a thought at a time, or the whole chain at once
    masks: tuple[float, float] = (0.0, 1.0)  # least and largest share of masked tokens in training
    shift: float = 3.0  # times the odds of a mask in training: sampling begins with nothing but masks
    snapshot: float = 0.0  # multi: share of training chains that stand on the model's own guesses
    snapshot_temperature: float = 3.0  # of those guesses; at 1 a trained model makes no errors to learn from
    # -- denoiser --
    width: int = 128  # width of the model
    depth: int = 4  # number of blocks
    # -- optimisation --
    max_steps: int = 800  # optimizer steps
    batch_size: int = 128  # problems of a step, over all processes
    lr: float = 2e-3  # AdamW's learning rate after warm-up
    muon_lr: float = 0.02  # likewise Muon's, which trains the matrices of the blocks
    warmup: int = 200  # steps of linear warm-up
    cooldown: float = 0.2  # share of the steps, the last ones, in which the learning rates fall to 0
    ema_decay: float = 0.999  # upper limit of the EMA's decay; it ramps as (1 + step) / (10 + step)
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the hardware has it
    # -- sampling --
    order: Literal["confident", "margin", "random"] = "confident"  # of unmasking tokens: see `unmask`
    steps: int = 8  # evaluations of the denoiser for each thought; at most one for each of its tokens is used
    temperature: float = 0.0  # of the tokens that are drawn; 0 takes the likeliest
    votes: int = 5  # chains of a majority vote; 1: no vote
    tries: int = 1  # at most so many for each problem, where there is a check to tell whether it is solved
    try_temperature: float = 1.0  # of all tries but the first
    remask: float = 1.0  # share of the tokens, those that are the least sure, that a new try masks again
    prompt: str | None = None  # a question of your own, answered from --sample_from
    score_n: int = 500  # test problems of a score
    # -- the run --
    out: str = "out/{dataset}"  # folder of the run
    seed: int = 0  # of weights, data order, noise and samples
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda, else mps, else cpu
    log_every: int = 50  # steps between lines of the log
    sample_every: int = 500  # steps between evaluations on 200 test problems
    save_every: int = 500  # steps between checkpoints
    resume: bool = False  # go on with the run in the folder
    sample_from: str | None = None  # answer --prompt, or a test question, from this checkpoint
    score_from: str | None = None  # score this checkpoint on the test split

    kind = "reason"  # the script that a checkpoint belongs to (no annotation: not a setting)

    @staticmethod
    def recipe(given) -> dict:
        """The defaults that a data set has in place of those above."""
        return RECIPES.get(given.dataset, {})

    def __post_init__(self):
        check_run(self)
        need(self, "max_steps steps score_n", 1)
        need(self, "train_n", 1, 10_000_000)
        need(self, "batch_size", 1, 100_000)
        need(self, "width", 16, 16_384)
        need(self, "depth votes tries", 1, 1000)
        need(self, "remask", 0.01, 1)
        need(self, "temperature try_temperature", 0, 100)
        need(self, "terms", 2, 6 if self.dataset == "countdown" else 100)  # more take long to be found
        need(self, "snapshot cooldown", 0, 1)
        need(self, "snapshot_temperature", 0.1, 100)
        need(self, "shift", 0.01, 100)
        need(self, "muon_lr", 1e-9, 1)
        if min(self.digits) < 1 or max(self.digits) > 8:
            raise ValueError(f"digits must be two numbers in 1..8, got {self.digits}")
        if not 0 <= self.masks[0] < self.masks[1] <= 1:
            raise ValueError(f"masks must be two shares, the smaller first, got {self.masks}")
        if self.width % 16:
            raise ValueError(f"width must be divisible by 16, got {self.width}")
        if self.snapshot and self.passes == "single":
            raise ValueError("--snapshot is about earlier thoughts: it needs --passes multi")
        if self.prompt and not self.sample_from:
            raise ValueError("--prompt is answered from a checkpoint: add --sample_from out/NAME/last.pt")


RECIPES = {  # what a data set has in place of the defaults; flags override both
    "sudoku": dict(train_n=1500, depth=6, batch_size=64, max_steps=7500, masks=(0.2, 0.8), shift=1.0)
    | dict(steps=81, try_temperature=2.5, sample_every=1000, score_n=300),
    "countdown": dict(terms=3, passes="single", train_n=200_000, depth=6, max_steps=10_000, shift=1.0)
    | dict(steps=64, try_temperature=2.5, sample_every=1000),
}


def size_of(cfg: Config) -> Size:
    """How large the problems are."""
    return Size(cfg.digits, cfg.terms, cfg.side)


# -- chains as ids -----------------------------------------------------------------------------------------


def chain_facts(problems: Problems, spaces: bool, size=USUAL) -> dict:
    """What a checkpoint must know of its problems, in plain types.

    The alphabet, with the space or without; the widths of the question and of each thought; an example of a
    question, its digits written as 7, where all training questions agree on it; where the cells of a puzzle
    stand, whose question has no place of its own; number and checksum.
    """
    axes = problems.task.axes(size) if problems.is_puzzle else None
    questions = [""] if axes else problems.question + problems.question_test
    chains = problems.thoughts + problems.thoughts_test
    characters = set("".join([*questions, *map("".join, chains)]).replace("####", ANSWER))
    tokens = Tokens("".join(sorted(characters | {" "} if spaces else characters - {" "})))
    slots = [[chain[i] for chain in chains if i < len(chain)] for i in range(max(map(len, chains)))]
    widths = [max(len(tokens.plain(text)) for text in texts) for texts in [questions, *slots]]
    examples = {sevens(question) for question in problems.question}
    return dict(
        alphabet=tokens.alphabet,
        widths=widths,
        example=examples.pop() if len(examples) == 1 else None,
        axes=axes,
        problems=len(problems.question),
        checksum=problems.checksum(),
    )


def sevens(question: str) -> str:
    """The question with every digit written as 7."""
    return re.sub(r"\d", "7", question)


def encode(facts: dict, questions: list[str], thoughts: list[list[str]]) -> Tensor:
    """Ids (N, q + k) of questions and their thoughts, each filled up to its width with END.

    So is the slot of a thought that a chain does not have: that a chain has ended is learned.
    """
    tokens, (q, *slots) = Tokens(facts["alphabet"]), facts["widths"]
    parts = [tokens.encode(questions if q else [""] * len(questions), q)]
    for i, width in enumerate(slots):
        parts.append(tokens.encode([chain[i] if i < len(chain) else "" for chain in thoughts], width))
    return torch.cat(parts, dim=1)


def asked(facts: dict, questions: list[str]) -> Tensor:
    """Ids (N, q + k) of questions alone, with the mask (id V) at all that is to be found.

    A puzzle's question is the answer with "." for the mask.
    """
    q, *slots = facts["widths"]
    if facts["axes"]:
        return Tokens(facts["alphabet"] + ".").encode(questions, slots[0])
    tokens = Tokens(facts["alphabet"])
    return F.pad(tokens.encode(questions, q), (0, sum(slots)), value=tokens.V)


def decode(facts: dict, xt: Tensor) -> list[list[str]]:
    """The thoughts in ids xt (B, k), of each chain those up to its answer."""
    tokens = Tokens(facts["alphabet"])
    thoughts = [tokens.decode(part) for part in xt.split(facts["widths"][1:], dim=1)]
    return [until_answer(list(chain)) for chain in zip(*thoughts, strict=True)]


def until_answer(chain: list[str]) -> list[str]:
    ends = [i for i, thought in enumerate(chain) if thought.lstrip().startswith("####")]
    return chain[: ends[0] + 1] if ends else chain


# -- the model, and how it thinks --------------------------------------------------------------------------


def build(cfg: Config, facts: dict, device: torch.device) -> TokenTransformer:
    """The denoiser of chains: a block for each thought, or a single one."""
    q, *slots = facts["widths"]
    torch.manual_seed(cfg.seed)
    layout = Layout([q, *slots] if cfg.passes == "multi" else [q, sum(slots)], facts["axes"])
    return TokenTransformer(len(facts["alphabet"]) + 1, layout, cfg.width, cfg.depth).to(device)


def think(cfg: Config, model: TokenTransformer, ids: Tensor, seed: int):
    """Yield (block i, ids (B, k) so far) after each step from ids (B, q + k), masked where not known."""
    q, xt = ids.split([model.layout.q, model.layout.k], dim=1)
    how = dict(steps=cfg.steps, order=cfg.order, temperature=cfg.temperature)
    return generate(model, q, xt, generator=torch.Generator().manual_seed(seed), **how)


def conclude(cfg: Config, model: TokenTransformer, ids: Tensor, seed: int) -> Tensor:
    """Ids (B, k) at the end of thinking from ids (B, q + k)."""
    with autocast(ids.device, cfg.precision):
        states = [xt for _, xt in think(cfg, model, ids, seed)]
    return states[-1] if states else ids[:, model.layout.q :]


def chains_of(cfg: Config, facts: dict, model: TokenTransformer, ids: Tensor, seed: int) -> list[list[str]]:
    """The chains of questions with ids (N, q + k), 1,000 at a time, until each has its answer."""
    chains, ends = [], Tokens(facts["alphabet"]).ids("####") if ANSWER in facts["alphabet"] else []
    widths = torch.tensor(facts["widths"][1:])
    starts = widths.cumsum(0) - widths  # of the thoughts
    for part in ids.split(1000):
        with autocast(ids.device, cfg.precision):  # around all steps: the weights are turned to bf16 once
            for i, xt in think(cfg, model, part, seed + len(chains)):
                end = sum(model.layout.widths[: i + 1])
                known = (xt[:, :end] != model.mask_id).all()
                if ends and known and (xt[:, starts[starts < end]] == ends[0]).any(1).all():
                    break
        chains += decode(facts, xt)
    return chains


def focus(cfg: Config, facts: dict, model: TokenTransformer, question: str) -> list[str]:
    """The chain of one question as it comes into focus: "_" is a token still masked.

    A line for each step, or for a puzzle four grids side by side; its cells by the step at which they were
    settled are drawn as samples/focus.png. Shown is the first try that is right, or the last of cfg.tries.
    """
    tokens, lines = Tokens(facts["alphabet"]), [f"question  {question}"]
    check = TASKS[cfg.dataset].check if cfg.dataset in TASKS else None
    ids = asked(facts, [question]).to(next(model.parameters()).device)
    for i in range(cfg.tries):
        with autocast(ids.device, cfg.precision):
            states = [(0, ids[:, model.layout.q :]), *think(at_try(cfg, i), model, ids, cfg.seed + i)]
        right = check is None or metrics.is_right(decode(facts, states[-1][1])[0], question, None, check)
        if right:
            break
    lines += [] if right else [f"not solved; more than --tries {cfg.tries} may help"]
    if facts["axes"]:
        draw_settled(states, facts, Path(cfg.out) / "samples" / "focus.png")
        return lines + side_by_side(facts, states)
    for i, xt in states[1:]:
        characters = characters_of(facts, xt[:, : sum(model.layout.widths[: i + 1])])
        lines.append(f"thought {i + 1}  " + (" " if tokens.bare else "").join(filter(None, characters)))
    return [*lines, "chain     " + " | ".join(decode(facts, states[-1][1])[0])]


def side_by_side(facts: dict, states: list) -> list[str]:
    """Four grids of a puzzle, from the clues to the answer."""
    side, grids, lines = math.isqrt(len(facts["axes"])), [], []
    for i in range(4):
        characters = characters_of(facts, states[(len(states) - 1) * i // 3][1])
        grids.append([character or " " for character in characters])
    for row in range(side):
        lines.append("    ".join(" ".join(grid[row * side :][:side]) for grid in grids))
    return lines


def characters_of(facts: dict, xt: Tensor) -> list[str]:
    """The character of each of the ids xt (1, k): "_" for the mask, "" for END."""
    tokens = Tokens(facts["alphabet"] + "_")
    return [tokens.text([token]) for token in xt[0].tolist()]


def draw_settled(states: list, facts: dict, path: Path) -> None:
    """Draw an answer, each cell in the colour of the step at which it was settled; clues are white."""
    side, mask_id = math.isqrt(len(facts["axes"])), len(facts["alphabet"]) + 1
    when = sum((xt[0] == mask_id).long() for _, xt in states).view(side, side).tolist()
    characters = iter(characters_of(facts, states[-1][1]))
    with figure(path, (4.6, 4)) as (fig, ax):
        image = ax.imshow([[step or math.nan for step in row] for row in when], cmap="viridis_r", alpha=0.6)
        for row, column in itertools.product(range(side), repeat=2):
            style = dict(weight="normal" if when[row][column] else "bold", ha="center", va="center")
            ax.text(column, row, next(characters), **style)
        for cell, (*_, box) in enumerate(facts["axes"]):  # a line where another box begins
            row, column = divmod(cell, side)
            if column and facts["axes"][cell - 1][-1] != box:
                ax.plot([column - 0.5] * 2, [row - 0.5, row + 0.5], "k")
            if row and facts["axes"][cell - side][-1] != box:
                ax.plot([column - 0.5, column + 0.5], [row - 0.5] * 2, "k")
        ax.set(xticks=[], yticks=[])
        fig.colorbar(image, label="settled at evaluation")


# -- thinking again ---------------------------------------------------------------------------------------


def at_try(cfg: Config, i: int) -> Config:
    """The settings of try i: all but the first are drawn."""
    return dataclasses.replace(cfg, temperature=cfg.try_temperature) if i else cfg


def remasked(cfg: Config, model: TokenTransformer, ids: Tensor, x: Tensor, seed: int) -> Tensor:
    """Ids (B, q + k) to think on from: the answers x (B, k) to the questions ids (B, q + k), partly masked.

    Masked is the share cfg.remask of the tokens that were to be found, those of which the model is the least
    sure. ReMDM.
    """
    q, given = ids[:, : model.layout.q], ids[:, model.layout.q :] != model.mask_id
    with autocast(ids.device, cfg.precision):
        doubts = doubt(model, q, x, torch.Generator().manual_seed(seed)).masked_fill(given, -1.0)
    most = (cfg.remask * (~given).sum(1, keepdim=True)).ceil()
    rank = doubts.argsort(1, descending=True).argsort(1)
    return torch.cat([q, x.masked_fill(rank < most, model.mask_id)], dim=1)


def evaluations(cfg: Config, model: TokenTransformer, ids: Tensor) -> int:
    """Evaluations that it takes to think on from ids (B, q + k), of all B together."""
    blocks = (ids[:, model.layout.q :] == model.mask_id).split(model.layout.widths, dim=1)
    return sum(int(masked.sum(1).clamp(max=cfg.steps).sum()) for masked in blocks)


def tries(cfg: Config, facts: dict, model: TokenTransformer, ids: Tensor, questions: list[str], check):
    """Yield (evaluations a problem so far, chains, which of them are right) after each of cfg.tries.

    A chain that passes the check is kept; any other is tried again, remasked, at cfg.try_temperature.
    """
    x, right, spent = ids[:, model.layout.q :].clone(), torch.zeros(len(ids), dtype=torch.bool), 0
    for i in range(cfg.tries):
        for part in (~right).nonzero()[:, 0].split(1000):
            start = ids[part]
            if i and cfg.remask < 1:
                start = remasked(cfg, model, start, x[part], cfg.seed + i)
                spent += 2 * len(part)  # in which the model doubts each token
            x[part] = conclude(at_try(cfg, i), model, start, cfg.seed + i)
            spent += evaluations(cfg, model, start)
        chains = decode(facts, x)
        right = torch.tensor(
            [metrics.is_right(*row, None, check) for row in zip(chains, questions, strict=True)]
        )
        yield spent / len(ids), chains, right.tolist()


# -- training ----------------------------------------------------------------------------------------------


def train(cfg: Config, facts: dict, problems: Problems, device, seconds: float = math.inf) -> None:
    """Train until cfg.max_steps, or for so many seconds, with scores of 200 test problems on the way."""
    if len(problems.question) < cfg.batch_size:
        got = f"{len(problems.question)} training problems, fewer than a batch of {cfg.batch_size}"
        raise UserError(f"{got}: give more, or a smaller --batch_size")
    model = build(cfg, facts, device)
    layout, process, slots = model.layout, Masked(model.mask_id), facts["widths"][1:]
    thought = torch.repeat_interleave(torch.tensor(slots)).to(device)  # (k,): 0 0 0 1 1 ...
    ids = encode(facts, problems.question, problems.thoughts).to(device)
    questions, truth = problems.question_test[:200], problems.thoughts_test[:200]
    ids_test = asked(facts, questions).to(device)
    matrices = matrices_of(model.body.blocks)
    run = Run(
        cfg,
        model,
        device,
        facts,
        cfg.out,
        cfg.max_steps,
        cfg.batch_size,
        matrices=matrices,
        cooldown=cfg.cooldown,
    )
    size = f"{millions(model)}, {len(ids)} training problems"
    say(f"{run.out}: {size}; {device}, {run.world} process(es)")

    def look(step: int) -> None:
        took = run.took()
        with run.pause():
            chains = chains_of(cfg, facts, run.ema.module, ids_test, cfg.seed)
            note(run, step, took, metrics.score_chains(chains, questions, truth, problems.check))

    for _, batch in run.steps(len(ids), seconds):
        if run.due(cfg.sample_every):
            look(run.step - 1)
        q, x0 = ids[batch].split([layout.q, layout.k], dim=1)
        if problems.is_puzzle:  # which is learned from full grids: its clues are a state like any other
            x0, _ = turned(cfg, problems, x0, x0)
        u = torch.rand(len(batch), len(slots), device=device)  # each thought has a step of its own
        u = cfg.masks[0] + (cfg.masks[1] - cfg.masks[0]) * u
        t = (cfg.shift * u / (1 + (cfg.shift - 1) * u))[:, thought]
        with autocast(device, cfg.precision):
            clean = torch.cat([q, x0], dim=1)[:, : layout.c]
            if cfg.snapshot:
                own = snapshots(cfg, process, run.model, x0, clean, t)
                clean = torch.cat([q, own], dim=1)[:, : layout.c]
            loss = process.loss(run.model, x0, clean, t).mean()
        run.update(loss)
    if run.main:
        look(run.step)
        say(f"trained {run.seconds:.0f} s; wrote {run.curve()}")


def turned(cfg: Config, problems: Problems, x0: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Grids x0 (B, k), each as one of its symmetries shows it, and where their clues are then (B, k)."""
    cells, values = problems.task.symmetry(len(x0), size_of(cfg), x0.device)
    return values.gather(1, x0.gather(1, cells)), known.gather(1, cells)


def snapshots(cfg: Config, process: Masked, model, x0: Tensor, clean: Tensor, t: Tensor) -> Tensor:
    """x0 (B, k), in a share cfg.snapshot of the chains as the model guesses it from masked thoughts.

    A later thought that stands on these learns not to trust the ones before it: DoT's coupled sampling.
    """
    xt = process.q_sample(x0, t)
    with torch.no_grad():
        logits = model(xt, t, clean).float()
    torch.clear_autocast_cache()  # the bf16 copies of the weights that this made have no gradients
    p = (logits / cfg.snapshot_temperature).softmax(-1)
    guess = torch.multinomial(p.flatten(0, 1), 1).view_as(xt)
    chosen = torch.rand(len(xt), 1, device=xt.device) < cfg.snapshot
    return torch.where(chosen & (xt == process.mask_id), guess, x0)


def note(run: Run, step: int, took: float, scores: dict) -> None:
    """Print the scores of a step, after `took` training seconds, and add them to eval.csv."""
    thoughts = " ".join(f"{share:.2f}" for share in scores["thoughts"])
    shares = f"answer {scores['answer']:.3f}, chain {scores['chain']:.3f}, thoughts {thoughts}"
    say(f"step {step}, {took:.0f} s: {shares}")
    run.keep_rows(run.out / "eval.csv", EVAL, f"{step},{took:.3f},{scores['answer']},{scores['chain']}")


# -- what the script does ----------------------------------------------------------------------------------


def load(path, device="auto"):
    """(process, model, facts) of the checkpoint at `path`, with the EMA weights: for use from Python."""
    model, facts, _ = load_model(None, path, pick_device(device))
    return Masked(model.mask_id), model, facts


def load_model(cfg: Config | None, path, device: torch.device) -> tuple[TokenTransformer, dict, float]:
    """The denoiser in a checkpoint, its facts and its training seconds: see `load_averaged`."""
    return load_averaged(Config, Facts, build, cfg, path, device)


def rates(ask, q: Tensor) -> str:
    """Problems a second that ask(questions) answers in batches of several sizes, the best of three rounds."""
    sizes, text = sorted({1, min(8, len(q)), min(64, len(q)), len(q)}), []
    for size in sizes:
        parts, took = q[: max(size, 8)].split(size), []
        for _ in range(3):
            start = time.perf_counter()
            for part in parts:
                ask(part)
            took.append(time.perf_counter() - start)
        text.append(f"{size}: {sum(map(len, parts)) / min(took):.3g}")
    return "  problems/s in batches of " + ", ".join(text)


def row(name: str, scores: dict) -> str:
    shares = "  ".join(f"{key} {scores[key]:.3f}" for key in ("answer", "chain", "unended"))
    return f"  {name:22}  {shares}  thoughts " + " ".join(f"{share:.2f}" for share in scores["thoughts"])


def score(cfg: Config, facts: dict, model: TokenTransformer, problems: Problems, seconds: float) -> None:
    """Print the scores of test problems, by evaluations: of chains with their rates, of puzzles by order."""
    questions = problems.question_test[: cfg.score_n]
    ids = asked(facts, questions).to(next(model.parameters()).device)
    size = f"{millions(model)}, trained {seconds:.0f} s"
    where = f"{ids.device}, {torch.get_num_threads()} threads"
    say(f"score: n={len(questions)} test problems, seed {cfg.seed}; {where}; {size}")
    if problems.is_puzzle:
        score_puzzles(cfg, facts, model, problems, ids)
    else:
        score_chains(cfg, facts, model, problems, ids)


def score_chains(cfg: Config, facts: dict, model: TokenTransformer, problems: Problems, ids: Tensor) -> None:
    """Print scores and rates of chains at 1 to 64 evaluations a thought, and the score of a vote."""
    questions, truth = (part[: len(ids)] for part in (problems.question_test, problems.thoughts_test))
    for steps in (1, 2, 4, 8, 16, 32, 64):
        ask = functools.partial(chains_of, dataclasses.replace(cfg, steps=steps), facts, model, seed=cfg.seed)
        line = row(f"{steps} evaluations", metrics.score_chains(ask(ids), questions, truth, problems.check))
        say(line + (rates(ask, ids) if steps <= 8 else ""))
    if cfg.tries > 1 and problems.check:
        for i, (spent, chains, _) in enumerate(tries(cfg, facts, model, ids, questions, problems.check)):
            if i + 1 in SHOWN_TRIES:
                scores = metrics.score_chains(chains, questions, truth, problems.check)
                say(row(f"{i + 1} tries, {spent:.3g} evals", scores))
    if cfg.votes == 1:
        return
    drawn = dataclasses.replace(cfg, temperature=VOTE_TEMPERATURE)
    runs = [chains_of(drawn, facts, model, ids, cfg.seed + 1000 * i) for i in range(cfg.votes)]
    first = metrics.score_chains(runs[0], questions, truth, problems.check)
    say(row(f"temperature {VOTE_TEMPERATURE:g}", first))
    right = 0
    for question, true, *chains in zip(questions, truth, *runs, strict=True):
        right += metrics.is_right(metrics.majority(chains), question, true, problems.check)
    say(f"  {f'vote of {cfg.votes} of those':22}  answer {right / len(ids):.3f}")


def score_puzzles(cfg: Config, facts: dict, model: TokenTransformer, problems: Problems, ids: Tensor) -> None:
    """Print a table of solved puzzles by order of unmasking, by evaluations and by the number of clues.

    Then those that are solved in so many tries, in the order of cfg.
    """
    questions = problems.question_test[: len(ids)]
    kinds = list(map(problems.task.kind, questions))
    names = sorted(set(kinds))
    say("\n| order | evaluations | " + " | ".join(f"{name}, n={kinds.count(name)}" for name in names) + " |")
    say("|---" * (2 + len(names)) + "|")

    def table_row(name: str, spent: float, right: list[bool]) -> None:
        shares = [metrics.share(r for r, kind in zip(right, kinds, strict=True) if kind == n) for n in names]
        say(f"| {name} | {spent:.3g} | " + " | ".join(f"{share:.3f}" for share in shares) + " |")

    for order in ("confident", "margin", "random"):
        for steps in sorted({1, 4, 16, model.layout.k}):
            chosen = dataclasses.replace(cfg, order=order, steps=steps, tries=1)
            for spent, _, right in tries(chosen, facts, model, ids, questions, problems.check):
                table_row(order, spent, right)
    for i, (spent, _, right) in enumerate(tries(cfg, facts, model, ids, questions, problems.check)):
        if i + 1 in SHOWN_TRIES:
            table_row(f"{cfg.order}, {i + 1} tries", spent, right)


def check_question(cfg: Config, facts: dict) -> str:
    """The prompt as a question of the task. Raises UserError where it is none."""
    if facts["axes"]:
        puzzle, remark = TASKS[cfg.dataset].read(cfg.prompt, size_of(cfg))
        if remark:
            say(f"{remark}: this is one")
        return puzzle
    if facts["example"] not in (None, sevens(cfg.prompt)):
        looks = f"it must look like {facts['example']!r}"
        if cfg.dataset in TASKS:
            looks += ", least significant digit first"
        raise UserError(f"--prompt {cfg.prompt!r} is no question that this model has learned: {looks}")
    return cfg.prompt


def main(cfg: Config) -> None:
    cfg = dataclasses.replace(cfg, out=cfg.out.replace("{dataset}", run_name(cfg.dataset)))
    device, given = pick_device(cfg.device), cfg.sample_from or cfg.score_from
    if cfg.prompt:
        model, facts, _ = load_model(cfg, Path(given), device)
        show(cfg.out, "focus", focus(cfg, facts, model, check_question(cfg, facts)))
        return
    problems = load_problems(cfg.dataset, size_of(cfg), cfg.train_n, cfg.form, cfg.test)
    if problems.note:
        say(problems.note)
    path = Path(given or f"{cfg.out}/last.pt")
    facts = chain_facts(problems, cfg.dataset not in TASKS, size_of(cfg))
    done = not given and finished(cfg, cfg.out, cfg.max_steps)
    if done and path.with_name("curve.png").exists():
        say(f"{path} is finished: loaded, not trained again")
    elif not given:
        # The curve comes last: without one the run was killed in between, and what is missing is made.
        cfg = dataclasses.replace(cfg, resume=cfg.resume or done)
        sizes = f"{len(problems.question)} training and {len(problems.question_test)} test problems"
        say(f"{cfg.dataset}: {sizes}; {problems.question[0]} -> {' | '.join(problems.thoughts[0])}")
        train(cfg, facts, problems, device)
        wait()
    if not is_main():
        return
    model, trained, seconds = load_model(cfg, path, device)
    if trained["checksum"] != facts["checksum"]:
        raise UserError(
            f"{cfg.dataset} is not the data that {path} was trained on: its test split may be known"
        )
    question = problems.question_test[0]
    show(cfg.out, "focus", focus(cfg, trained, model, question))
    if cfg.score_from:
        score(cfg, trained, model, problems, seconds)
    elif not cfg.sample_from:
        with not_fatal("scored"):
            score(cfg, trained, model, problems, seconds)
    command = f"python reason.py --sample_from {shlex.quote(str(path))} --prompt {shlex.quote(question)}"
    say(f"answer a question: {command}")


if __name__ == "__main__":
    run_script(Config, main, __doc__)
