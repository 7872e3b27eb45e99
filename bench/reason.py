"""Chains of thought and puzzles: ours beside GPT-2, more measures of a run, and what thinking again can fix.

    python -m bench.reason                      ours, multi- and single-pass; GPT-2 with its chain and without
    python -m bench.reason --dataset sudoku     the same on another task; --run.NAME is the flag of reason.py
    python -m bench.reason --dataset sudoku --load out/sudoku/last.pt --tries 32     by evaluations and order
    python -m bench.reason --dataset sudoku --load out/sudoku/last.pt --loops 4 8 16        by compute
    python -m bench.reason --correct            a thought is corrupted: does remasking save the answer?

All networks are as wide and as deep as each other, each loop counted, and see the same problems for as many
seconds. GPT-2 writes by transformers' `generate`, with its cache, a puzzle's cells row after row.
Remasking (ReMDM) 2503.00307.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import reason
from bench.gpt import QuestionGPT
from bench.runs import FOREVER, TimedRun, draw, millions, print_table, run_bench, saved_by, timed
from bench.timing import best_rate
from blocks import Layout
from common.run import UserError, autocast, check_config, log, pick_device, resolve_out
from diffusion import uniform
from tasks.load import load_problems
from tasks.problems import END, MARK, Problems, decode
from vae import small_gpt

ROUNDS = 4  # of remasking, after a chain with a corrupted thought has come to its end
Ask = Callable[[list[str]], list[list[str]]]  # from questions to chains


@dataclass(frozen=True)
class Config:
    """Settings of a comparison."""

    dataset: str = "mult"  # that of reason.py
    seconds: float = 300.0  # training seconds of each
    ways: tuple[Literal["multi", "single", "chain", "answer"], ...] = ("multi", "single", "chain", "answer")
    evaluations: tuple[int, ...] = (1, 8)  # of ours, for each thought
    tries: int = 1  # of each problem, until the judge accepts an answer
    score_n: int = 500  # test problems of a score
    every: int = 50  # steps between points of the learning curves
    load: str | None = None  # measure this checkpoint of reason.py instead
    loops: tuple[int, ...] = ()  # load: over applications of a block instead, at these numbers of loops
    beside: str | None = None  # loops: another checkpoint
    remask: tuple[float, ...] = (
        0.3,
    )  # shares of the tokens that are masked again: --correct; load: of a puzzle
    correct: bool = False  # the study of self-correction instead, after run.max_steps of training
    out: str = "out/bench/{dataset}"  # folder of all runs; one that is finished there is loaded
    run: reason.Config = field(default_factory=reason.Config)

    @staticmethod
    def default(given: "Config") -> "Config":
        recipe = dict(dataset=given.dataset) | reason.Config.RECIPES.get(given.dataset, {})
        settings = dict(run=reason.Config(**recipe))
        if given.dataset == "sudoku":
            settings |= dict(ways=("multi", "chain"), evaluations=(8, 81), tries=16, remask=(0.5, 0.25))
        return Config(**settings)

    def __post_init__(self):
        check_config(
            self,
            (self.score_n > 0, "--score_n must be at least 1"),
            (self.load or not self.loops, "--loops needs a checkpoint: add --load out/NAME/last.pt"),
            (all(n > 0 for n in self.loops), "--loops must be at least 1"),
        )


def in_folder(cfg: Config, name: str, **settings) -> reason.Config:
    """The settings of the run of that name, which is resumed if it has begun."""
    settings = dict(max_steps=FOREVER, sample_every=FOREVER, score_n=0) | settings
    return replace(cfg.run, dataset=cfg.dataset, out=f"{cfg.out}/{name}", resume=True, **settings)


def share(values: list[bool]) -> float:
    return sum(values) / max(1, len(values))


def right_of(ask: Ask, problems: Problems, n: int) -> list[bool]:
    """Which of the first n test problems are right."""
    questions = [question for question, _ in problems.test[:n]]
    return list(map(problems.check, questions, ask(questions)))


def by_kind(right: list[bool], problems: Problems) -> dict[str, str]:
    """The share of right answers for each column of a table: puzzles by their kinds."""
    kinds = {}
    for is_right, (question, _) in zip(right, problems.test, strict=False):
        for kind in problems.kinds(question):
            kinds.setdefault(kind or "right", []).append(is_right)
    return {f"{kind}, n={len(part)}": f"{share(part):.3f}" for kind, part in sorted(kinds.items())}


def rates(ask: Ask, problems: Problems, n: int) -> dict[str, str]:
    """Problems a second in batches of several sizes."""
    questions, cells = [question for question, _ in problems.test[:n]], {}
    for size in sorted({1, min(8, n), min(64, n), n}):
        few = questions[: max(size, 8)]
        parts = [few[i : i + size] for i in range(0, len(few), size)]
        rate = best_rate(lambda parts=parts: list(map(ask, parts)), len(few))
        cells[f"problems/s, batch {size}"] = f"{rate:.3g}"
    return cells


# -- thinking again --------------------------------------------------------------------------------------


@torch.no_grad()
def doubt(model, question: Tensor, x: Tensor, generator=None) -> Tensor:
    """How unsure (B, k) the model is of tokens x (B, k): 1 - p of each, given half of its block's others.

    Two evaluations, since each half of the tokens is masked once; blocks stand on those before as they are.
    """
    half = uniform(x, generator) < 0.5
    clean = torch.cat([question, x], dim=1)[:, : model.layout.c]
    doubts = torch.empty(x.shape, device=x.device)
    for hidden in (half, ~half):
        logits = model(x.masked_fill(hidden, model.mask_id), hidden.float().mean(1), clean).float()
        p = logits.softmax(-1).gather(-1, x[..., None])[..., 0]
        doubts = torch.where(hidden, 1 - p, doubts)
    return doubts


def remasked(cfg: reason.Config, model, ids: Tensor, x: Tensor, remask: float) -> Tensor:
    """Ids (B, q + k) to think on from: the answers x (B, k) to the questions ids (B, q + k), partly masked.

    Masked is the share `remask` of the tokens that were to be found, those of which the model is the least
    sure. ReMDM.
    """
    q, given = ids[:, : model.layout.q], ids[:, model.layout.q :] != model.mask_id
    with autocast(ids.device, cfg.precision):
        doubts = doubt(model, q, x, torch.Generator().manual_seed(cfg.seed)).masked_fill(given, -1.0)
    most = (remask * (~given).sum(1, keepdim=True)).ceil()
    rank = doubts.argsort(1, descending=True).argsort(1)
    return torch.cat([q, x.masked_fill(rank < most, model.mask_id)], dim=1)


def think_on(cfg: reason.Config, model, ids: Tensor) -> tuple[Tensor, int]:
    """Ids (B, k) at the end of thinking from ids (B, q + k), and the evaluations of all B together."""
    *_, xt = reason.think(cfg, model, ids)
    return xt, reason.evaluations(cfg, model, ids)


def try_remasked(run: reason.Config, facts: dict, model, problems: Problems, n: int, remask: float):
    """As `reason.score`, but an answer that the check refuses is not tried from the beginning: `remasked`."""
    questions = [question for question, _ in problems.test[:n]]
    ids = reason.ask(facts, questions).to(next(model.parameters()).device)
    x, spent, right = ids[:, model.layout.q :].clone(), 0, torch.zeros(len(ids), dtype=torch.bool)
    for i in range(run.tries):
        how = reason.at_try(run, i)
        for part in (~right).nonzero()[:, 0].split(run.batch_size):
            start = remasked(how, model, ids[part], x[part], remask) if i else ids[part]
            x[part], cost = think_on(how, model, start)
            spent += cost + 2 * len(part) * (i > 0)  # two, in which the model doubts each token
        right = torch.tensor(list(map(problems.check, questions, decode(facts, x))))
        yield right.tolist(), spent / len(ids)


def trained_on(cfg: Config, problems: Problems, path: str, device: torch.device) -> tuple:
    """The model, facts and saved state of a checkpoint. UserError if it was trained on other problems."""
    _, model, facts = reason.load(path, device)
    if facts != problems.facts:
        raise UserError(f"{path} was trained on other problems than {cfg.dataset}")
    return model, facts, saved_by(reason.Config, path)


def measure(cfg: Config, problems: Problems, device: torch.device) -> None:
    """Print what a checkpoint gets right by evaluations, order and tries; draw it, of the hardest puzzles."""
    model, facts, saved = trained_on(cfg, problems, cfg.load, device)
    rows, curves, n = [], {}, cfg.score_n
    log(f"{cfg.load}: {millions(model)} M parameters, trained {saved['seconds']:.0f} s")
    run = reason.Config(**saved["config"] | dict(tries=cfg.tries))

    def add(name: str, how: reason.Config, points, **more) -> None:
        for i, (right, spent) in enumerate(points, 1):
            shares = by_kind(right, problems)
            of_all = [value for kind, value in shares.items() if kind.startswith("all")]
            curves.setdefault(name, []).append((spent, float(min(of_all or shares.values()))))
            if i & (i - 1) == 0:  # powers of two
                row = {"": name, "steps a thought": how.steps, "tries": i, "evaluations each": f"{spent:.3g}"}
                rows.append(row | shares | more)

    for order in ("confident", "random"):
        for steps in (1, 2, 4, 8, 16, 32, 64):
            once = replace(run, order=order, steps=steps, tries=1)
            fast = {}
            if order == "confident" and steps <= 8 and not problems.axes:
                whole = replace(once, batch_size=n)
                fast = rates(partial(reason.answer, whole, facts, model), problems, n)
            add(f"{order}, one pass", once, reason.score(once, facts, model, problems, n), **fast)
    if cfg.tries > 1:
        for judge in ("rules", "self"):
            judged = replace(run, judge=judge)
            add(f"fresh tries, judge: {judge}", judged, reason.score(judged, facts, model, problems, n))
    for remask in cfg.remask if cfg.tries > 1 else ():
        name = f"the {remask:.0%} least certain masked again"
        add(name, run, try_remasked(run, facts, model, problems, n, remask))
    print_table(rows)
    if problems.axes:
        labels = dict(xlabel="evaluations for each puzzle", ylabel="solved of the hardest kind")
        draw(Path(cfg.out) / "tries.png", curves, ylim=(0, 1.02), **labels)


def by_compute(cfg: Config, problems: Problems, device: torch.device) -> None:
    """Print and draw what checkpoints solve over applications of a block: evaluations x loops x blocks."""
    rows, curves = [], {}
    for path in filter(None, (cfg.load, cfg.beside)):
        model, facts, saved = trained_on(cfg, problems, path, device)
        run = reason.Config(**saved["config"])
        for loops in cfg.loops if run.loops > 1 else (1,):
            model.transformer.loops, name = loops, f"{Path(path).parent.name}, {loops} loops"
            for steps in (1, 2, 4, 8, 16, 32, 64):
                how = replace(run, steps=steps, tries=1)
                right, spent = next(reason.score(how, facts, model, problems, cfg.score_n))
                applied = spent * run.depth * loops
                curves.setdefault(name, []).append((applied, share(right)))
                row = {"": name, "M parameters": millions(model), "evaluations each": f"{spent:.3g}"}
                rows.append(row | {"applications": f"{applied:.3g}"} | by_kind(right, problems))
    print_table(rows)
    labels = dict(xlabel="applications of a block for each puzzle", ylabel="solved", xscale="log")
    draw(Path(cfg.out) / "loops.png", curves, ylim=(0, 1.02), **labels)


# -- GPT-2 -----------------------------------------------------------------------------------------------


class Writer:
    """A GPT-2 that writes the chains of questions: thought after thought, then its end token, id V.

    Each thought ends in END, unless no thought ever needs padding. A puzzle is read as it stands, with the
    end token at open cells.
    """

    def __init__(self, cfg: reason.Config, facts: dict, problems: Problems):
        self.facts, self.V, self.precision = facts, len(facts["alphabet"]) + 1, cfg.precision
        chains = [thoughts for _, thoughts in problems.train]
        widths = {tuple(len(thought.replace("####", MARK)) for thought in chain) for chain in chains}
        self.fixed = widths == {tuple(facts["widths"][1:])}
        self.target = self.encode(chains)  # (N, L)
        self.questions = self.ask([question for question, _ in problems.train])  # (N, q)
        axes = facts["axes"]
        layout = Layout([0, len(axes), len(axes), 1], axes + axes + axes[:1]) if axes else None
        longest = self.questions.shape[1] + self.target.shape[1] + 1
        torch.manual_seed(cfg.seed)
        self.model = QuestionGPT(small_gpt(self.V + 1, cfg.width, cfg.depth * cfg.loops, longest), layout)

    def ask(self, questions: list[str]) -> Tensor:
        """Ids (N, q) of questions."""
        return reason.ask(self.facts, questions)[:, : self.facts["widths"][0] or None]

    def encode(self, chains: list[list[str]]) -> Tensor:
        """Targets (N, L), filled up with -100."""
        number = {c: i for i, c in enumerate(self.facts["alphabet"], 1)}
        end, rows = [] if self.fixed else [END], []
        for chain in chains:
            ids = sum([[number[c] for c in thought.replace("####", MARK)] + end for thought in chain], [])
            rows.append(torch.tensor([*ids, self.V]))
        return pad_sequence(rows, batch_first=True, padding_value=-100)

    def decode(self, row: list[int]) -> list[str]:
        """The thoughts in the ids of one chain, up to its answer."""
        row = row[: row.index(self.V)] if self.V in row else row
        text = "".join(("\0" + self.facts["alphabet"])[i] for i in row)
        letters, widths = iter(text), self.facts["widths"][1:] if self.fixed else []
        parts = ["".join(islice(letters, width)) for width in widths] or text.split("\0")
        chain = [part.replace(MARK, "####") for part in parts if part]
        ends = [i for i, thought in enumerate(chain, 1) if thought.startswith("####")]
        return chain[: ends[0]] if ends else chain

    def chains(self, questions: list[str], model=None, top_p: float = 0.0) -> list[list[str]]:
        """The chains of questions, 1,000 at a time; greedy ones, or drawn."""
        model, rows = model or self.model, []
        for part in self.ask(questions).to(next(model.parameters()).device).split(1000):
            with autocast(part.device, self.precision):
                rows += model.write(part, self.target.shape[1], top_p).tolist()
        return [self.decode(row) for row in rows]

    def try_again(self, questions: list[str], check, n: int) -> list[list[str]]:
        """Greedy chains; those that the check refuses are drawn anew, at most n - 1 times."""
        chains = self.chains(questions)
        for i in range(1, n):
            left = [j for j, question in enumerate(questions) if not check(question, chains[j])]
            torch.manual_seed(i)
            if left:
                again = self.chains([questions[j] for j in left], top_p=1.0)
                chains = [again[left.index(j)] if j in left else chain for j, chain in enumerate(chains)]
        return chains


def train_gpt(cfg: Config, run: reason.Config, problems: Problems, device) -> tuple[Writer, list]:
    """A GPT-2 trained in run.out for cfg.seconds, and its learning curve."""
    facts = problems.facts
    writer = Writer(run, facts, problems)
    model = writer.model.to(device)
    q, target = writer.questions.to(device), writer.target.to(device)
    muon = [p for name, p in model.decoder.transformer.h.named_parameters() if p.dim() == 2]

    def score(ema) -> float:
        return share(right_of(partial(writer.chains, model=ema), problems, 200))

    ends = dict(limit=cfg.seconds, score=score, every=cfg.every)
    with TimedRun(run, model, facts, device, cooldown=0.2, muon=muon, **ends) as timed:
        for _, batch in timed.steps(len(q)):
            asked, wanted = q[batch], target[batch]
            if problems.symmetry:  # as ours: any symmetry of a grid, with any of its cells open
                asked, (low, high) = problems.symmetry(asked), run.masks
                wanted = torch.cat([asked, wanted[:, -1:]], dim=1)
                u = low + (high - low) * torch.rand(len(asked), 1, device=device)
                asked = asked.masked_fill(torch.rand(asked.shape, device=device) < u, writer.V)
            with autocast(device, run.precision):
                loss = timed.model(asked, wanted)
            timed.update(loss)
        writer.model = timed.ema
        return writer, timed.curve


# -- the comparison --------------------------------------------------------------------------------------


def ours(cfg: Config, passes: str, problems: Problems, device: torch.device) -> tuple:
    """A denoiser and its curve; how it answers, for the rates; and which test problems are right."""
    run, facts, n = in_folder(cfg, passes, passes=passes), problems.facts, cfg.score_n

    def score(model) -> float:
        return share(next(reason.score(run, facts, model, problems, 200))[0])

    with timed(reason, limit=cfg.seconds, score=score, every=cfg.every):
        reason.train(run, problems, device)
    _, model, _ = reason.load(f"{run.out}/last.pt", device)
    fast, right = replace(run, steps=cfg.evaluations[0], batch_size=n), {}
    for steps in cfg.evaluations:
        right[str(steps)] = next(reason.score(replace(run, steps=steps), facts, model, problems, n))[0]
    if cfg.tries > 1:
        for flags, _ in reason.score(replace(run, tries=cfg.tries), facts, model, problems, n):
            right[f"{cfg.tries} tries"] = flags
    curve = saved_by(reason.Config, f"{run.out}/last.pt")["extra"]["curve"]
    return model, curve, partial(reason.answer, fast, facts, model), right


def theirs(cfg: Config, name: str, problems: Problems, device: torch.device) -> tuple:
    """The same of a GPT-2."""
    writer, curve = train_gpt(cfg, in_folder(cfg, name), problems, device)
    right = {"a token at a time": right_of(writer.chains, problems, cfg.score_n)}
    if cfg.tries > 1:
        again = partial(writer.try_again, check=problems.check, n=cfg.tries)
        right[f"{cfg.tries} tries"] = right_of(again, problems, cfg.score_n)
    return writer.model, curve, writer.chains, right


def answers_only(problems: Problems) -> Problems:
    """The problems with no thought but the answer."""
    train, test = ([(q, chain[-1:]) for q, chain in part] for part in (problems.train, problems.test))
    return replace(problems, train=train, test=test)


def compare(cfg: Config, problems: Problems, device: torch.device) -> None:
    """Train all, print the table, draw the learning curves."""
    rows, curves = [], {}
    for way in cfg.ways:
        known = answers_only(problems) if way == "answer" else problems
        train, name = (ours, f"ours, {way}-pass") if way in ("multi", "single") else (theirs, f"GPT-2, {way}")
        model, curve, ask, right = train(cfg, way, known, device)
        curves[name] = [(seconds, score) for _, seconds, score in curve]
        learned = [f"{seconds:.0f}" for seconds, score in curves[name] if score >= 0.9]
        row = {"": name, "M parameters": millions(model), "steps": curve[-1][0]}
        row |= {"seconds to 90%": learned[0] if learned else "-"}
        fast = rates(ask, known, cfg.score_n)
        for how, flags in right.items():
            rows.append(row | {"evaluations": how} | by_kind(flags, known) | fast)
            fast = {}  # of the first row only
    log(f"right answers after {cfg.seconds:g} s of training each")
    print_table(rows)
    labels = dict(xlabel="training seconds", ylabel="right answers, 200 test problems", ylim=(0, 1.02))
    draw(Path(cfg.out) / "curves.png", curves, **labels)


# -- self-correction -------------------------------------------------------------------------------------


def spoil(thought: str, rng: random.Random) -> str:
    """The thought with one of its digits changed to another."""
    at = rng.choice([i for i, c in enumerate(thought) if c.isdigit()])
    return thought[:at] + rng.choice([d for d in "0123456789" if d != thought[at]]) + thought[at + 1 :]


def rounds(cfg: Config, run: reason.Config, model, problems: Problems, ids: Tensor) -> list[str]:
    """Right answers, and in brackets the evaluations up to there, of test problems that go on from ids.

    First at the end of the chains, then after each of the ROUNDS, which mask again what the model is the
    least sure of, the corrupted thought not excepted: nothing tells it what is right.
    """
    questions, cells, spent, x = [question for question, _ in problems.test], [], 0, None
    empty = reason.ask(problems.facts, questions).to(ids.device)
    for i in range(1 + ROUNDS):
        if i:
            ids = remasked(replace(run, seed=run.seed + i - 1), model, empty, x, cfg.remask[0])
            spent += 2  # in which the model doubts each token
        x, cost = think_on(replace(run, seed=run.seed + i), model, ids)
        spent += cost / len(ids)
        right = map(problems.check, questions, decode(problems.facts, x))
        cells.append(f"{share(list(right)):.3f} ({spent:.0f})")
    return cells


def self_correction(cfg: Config, problems: Problems, device: torch.device) -> None:
    """A digit of one true thought is corrupted, the model writes the rest: how many answers are right?

    A row for each thought, of a model trained on true thoughts and of one trained on snapshots of its own.
    """
    facts, rows = problems.facts, []
    if cfg.dataset != "mult":
        raise UserError(f"--correct spoils a digit of a partial product: it is for mult, not {cfg.dataset}")
    few = replace(problems, test=problems.test[: cfg.score_n])
    for snapshot in (0.0, 0.5):
        run = in_folder(cfg, f"snapshot{snapshot:g}", snapshot=snapshot, max_steps=cfg.run.max_steps)
        reason.train(run, problems, device)
        model, rng = reason.load(f"{run.out}/last.pt", device)[1], random.Random(run.seed)
        for i in range(min(len(chain) for _, chain in few.test)):
            chains = [(question, list(chain)) for question, chain in few.test]
            for _, chain in chains if i else []:
                chain[i - 1] = spoil(chain[i - 1], rng)
            ids = torch.cat(reason.columns(facts, chains), dim=1).to(device)
            ids[:, sum(facts["widths"][: i + 1]) :] = model.mask_id
            row = {"snapshot": snapshot, "corrupted": f"thought {i}" if i else "nothing"}
            cells = rounds(cfg, run, model, few, ids)
            rows.append(row | {f"round {i}" if i else "chain": cell for i, cell in enumerate(cells)})
    log(f"n={len(few.test)}; {cfg.remask[0]:g} of the tokens are masked again; right answers (evaluations)")
    print_table(rows)


def main(cfg: Config) -> None:
    cfg, device, run = resolve_out(cfg), pick_device(), cfg.run
    problems = load_problems(cfg.dataset, run.train_n, run.digits, run.test)
    problems.kinds = lru_cache(maxsize=None)(problems.kinds)
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    log(f"{cfg.dataset}: {len(problems.train)} training problems, seed {run.seed}; {device}, {threads}")
    study = by_compute if cfg.loops else measure
    study = study if cfg.load else self_correction if cfg.correct else compare
    study(cfg, problems, device)


if __name__ == "__main__":
    run_bench(Config, main, __doc__)
