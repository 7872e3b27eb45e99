"""Chains of thought and puzzles: ours beside GPT-2's, and what thinking again can mend.

python -m bench.reason                        ours, multi- and single-pass; GPT-2 with its chain and without
python -m bench.reason --dataset sudoku       the same on another task; --run.NAME is the flag of reason.py
python -m bench.reason --correct --run.remask 0.3     one thought is spoilt: is the answer right all the same?

All networks are as wide and as deep as each other, and see the same problems for the same seconds. GPT-2
writes by transformers' `generate`, with its cache; a puzzle's cells it reads and writes row after row.
"""

import csv
import dataclasses
import functools
import random
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import metrics
import reason
from bench.gpt import QuestionGPT
from blocks import Layout
from files import UserError, figure, load_checkpoint, load_weights, say, show
from tasks import END, TASKS, Problems, Tokens, load_problems
from training import (
    Run,
    autocast,
    finished,
    matrices_of,
    need,
    pick_device,
    run_name,
    run_script,
    same_settings,
)
from vae import small_gpt

FOREVER = 10**6  # optimizer steps of a run that its seconds end
ROUNDS = 4  # of remasking, after a chain with a spoilt thought has come to its end


@dataclass(frozen=True)
class Config:
    """Settings of a comparison."""

    dataset: str = "mult"  # that of reason.py
    seconds: float = 300.0  # training seconds of each
    ways: tuple[Literal["multi", "single", "chain", "answer"], ...] = ("multi", "single", "chain", "answer")
    evaluations: tuple[int, ...] = (1, 8)  # of ours, for each thought
    correct: bool = False  # the experiment on self-correction instead, after run.max_steps of training
    out: str = "out/bench/{dataset}"  # folder of all runs; one that is finished there is loaded
    run: reason.Config = field(default_factory=reason.Config)

    @staticmethod
    def recipe(given) -> dict:
        """The defaults that a data set has in place of those above."""
        run = dict(dataset=given.dataset, sample_every=50, log_every=10) | reason.Config.recipe(given)
        if given.dataset != "sudoku":
            return dict(run=reason.Config(**run))
        return dict(ways=("multi", "chain"), evaluations=(8, 81), run=reason.Config(**run, tries=16))

    def __post_init__(self):
        need(self, "seconds", 0.1)


def in_folder(cfg: Config, name: str) -> reason.Config:
    """The settings of the run of that name; where it has begun, it is gone on with."""
    folder = Path(cfg.out) / name
    return dataclasses.replace(cfg.run, out=str(folder), resume=(folder / "last.pt").exists())


def seconds_of(cfg, facts: dict) -> float:
    """The training seconds of the run in cfg.out, 0 for none. Raises UserError for other settings or data."""
    path = Path(cfg.out) / "last.pt"
    if not path.exists():
        return 0.0
    checkpoint = load_checkpoint(path, cfg.kind)
    same_settings(cfg, checkpoint["config"], path, "keep it, or choose another --out")
    if checkpoint["facts"]["checksum"] != facts["checksum"]:
        raise UserError(f"{path} was trained on other data than {cfg.dataset} is: choose another --out")
    return checkpoint["seconds"]


# -- GPT-2 -------------------------------------------------------------------------------------------------


@dataclass
class Writing:
    """How GPT-2 writes a chain: thought after thought, then its end token, the last of its vocabulary.

    widths: of the thoughts, where they never differ; else None, and each thought ends in END.
    """

    tokens: Tokens
    widths: list[int] | None

    def encode(self, chains: list[list[str]]) -> Tensor:
        """Targets (N, L), filled up with -100."""
        rows, end = [], [] if self.widths else [END]
        for chain in chains:
            ids = sum([self.tokens.ids(thought) + end for thought in chain], [])
            rows.append(torch.tensor([*ids, self.tokens.V]))
        return pad_sequence(rows, batch_first=True, padding_value=-100)

    def decode(self, row: list[int]) -> list[str]:
        """The thoughts in the ids of one chain."""
        row = row[: row.index(self.tokens.V)] if self.tokens.V in row else row
        if self.widths:
            left = iter(row)
            parts = [list(islice(left, width)) for width in self.widths]
        else:
            ends = [-1, *(i for i, token in enumerate(row) if token == END), len(row)]
            parts = [row[a + 1 : b] for a, b in zip(ends, ends[1:], strict=False)]
        return reason.until_answer([self.tokens.text(part) for part in parts if part])


@dataclass
class Writer:
    """A GPT-2 and how it writes the chains of questions, of which it reads the first q ids (None: all)."""

    model: QuestionGPT
    writing: Writing
    q: int | None
    longest: int
    precision: str

    def chains(self, ids: Tensor, top_p: float = 0.0) -> list[list[str]]:
        """Chains of questions with ids (N, q + k), 1,000 at a time; greedy ones, or drawn."""
        rows = []
        for part in ids[:, : self.q].split(1000):
            with autocast(part.device, self.precision):
                rows += self.model.generate(self.model.read(part), self.longest, top_p).tolist()
        return [self.writing.decode(row) for row in rows]


def new_writer(cfg: reason.Config, facts: dict, problems: Problems) -> tuple[Writer, Tensor, Tensor]:
    """A GPT-2 with random weights, and the questions (N, q) and targets (N, L) to train it on.

    A puzzle is read as it stands, "." as the end token, which the answer then ends with too.
    """
    tokens, (q, *slots) = Tokens(facts["alphabet"]), facts["widths"]
    questions = reason.asked(facts, problems.question)[:, : q or None]
    fixed = (reason.encode(facts, problems.question, problems.thoughts)[:, q:] != END).all()
    writing = Writing(tokens, slots if fixed else None)
    target = writing.encode(problems.thoughts)
    axes = facts["axes"]
    layout = Layout([0, len(axes), len(axes), 1], axes + axes + axes[:1]) if axes else None
    torch.manual_seed(cfg.seed)
    longest = questions.shape[1] + target.shape[1] + 1
    model = QuestionGPT(small_gpt(tokens.V + 1, cfg.width, cfg.depth, longest), layout)
    return Writer(model, writing, q or None, target.shape[1], cfg.precision), questions, target


def train_gpt(cfg: reason.Config, facts: dict, problems: Problems, device, seconds: float) -> Writer:
    """The GPT-2 in cfg.out, trained for so many seconds, or loaded where it has been."""
    writer, q, target = new_writer(cfg, facts, problems)
    writer.model.to(device)
    if seconds_of(cfg, facts) >= seconds:
        load_weights(writer.model, load_checkpoint(f"{cfg.out}/last.pt", cfg.kind)["ema"], cfg.out)
        writer.model.eval()
        return writer
    q, target = q.to(device), target.to(device)
    questions, truth = problems.question_test[:200], problems.thoughts_test[:200]
    ids_test = reason.asked(facts, questions).to(device)
    matrices = matrices_of(writer.model.decoder.transformer.h)
    run = Run(
        cfg,
        writer.model,
        device,
        facts,
        cfg.out,
        FOREVER,
        cfg.batch_size,
        matrices=matrices,
        cooldown=cfg.cooldown,
    )

    def look(step: int) -> None:
        took = run.took()
        with run.pause():
            chains = dataclasses.replace(writer, model=run.ema.module).chains(ids_test)
            reason.note(run, step, took, metrics.score_chains(chains, questions, truth, problems.check))

    for _, batch in run.steps(len(q), seconds):
        if run.due(cfg.sample_every):
            look(run.step - 1)
        asked, wanted = q[batch], target[batch]
        if problems.is_puzzle:
            grid, end = wanted.split([asked.shape[1], 1], dim=1)
            grid, known = reason.turned(cfg, problems, grid, asked != end)
            asked, wanted = grid.where(known, end), torch.cat([grid, end], dim=1)
        with autocast(device, cfg.precision):
            loss = run.model(asked, wanted)
        run.update(loss)
    look(run.step)
    return dataclasses.replace(writer, model=run.ema.module.eval())


# -- the comparison ----------------------------------------------------------------------------------------


@dataclass
class Way:
    """A trained network beside the others, and the problems as it knows them."""

    name: str
    folder: Path
    model: torch.nn.Module
    facts: dict
    problems: Problems
    ask: dict  # from ids (N, q + k) to chains, in a few ways that have names


def answers_only(problems: Problems) -> Problems:
    """The problems with no thought but the answer."""
    last, last_test = ([chain[-1:] for chain in part] for part in (problems.thoughts, problems.thoughts_test))
    return dataclasses.replace(problems, thoughts=last, thoughts_test=last_test)


def ours(cfg: Config, passes: str, facts: dict, problems: Problems, device) -> Way:
    run = dataclasses.replace(in_folder(cfg, passes), passes=passes)
    if seconds_of(run, facts) < cfg.seconds:
        reason.train(dataclasses.replace(run, max_steps=FOREVER), facts, problems, device, cfg.seconds)
    model = reason.load_model(run, Path(run.out) / "last.pt", device)[0]
    ask = {}
    for steps in cfg.evaluations:
        asked = dataclasses.replace(run, steps=steps)
        ask[str(steps)] = functools.partial(reason.chains_of, asked, facts, model, seed=run.seed)
    if run.tries > 1 and problems.check:
        ask[f"{run.tries} tries"] = functools.partial(last_try, run, facts, model, problems)
    return Way(f"ours, {passes}-pass", Path(run.out), model, facts, problems, ask)


def last_try(run: reason.Config, facts: dict, model, problems: Problems, ids: Tensor) -> list[list[str]]:
    *_, (_, chains, _) = reason.tries(
        run, facts, model, ids, problems.question_test[: len(ids)], problems.check
    )
    return chains


def theirs(cfg: Config, name: str, facts: dict, problems: Problems, device) -> Way:
    run = in_folder(cfg, name)
    writer = train_gpt(run, facts, problems, device, cfg.seconds)
    ask = {"a token at a time": writer.chains}
    if run.tries > 1 and problems.check:
        ask[f"{run.tries} tries"] = functools.partial(write_again, writer, problems, run.tries)
    return Way(f"GPT-2, {name}", Path(run.out), writer.model, facts, problems, ask)


def write_again(writer: Writer, problems: Problems, n: int, ids: Tensor) -> list[list[str]]:
    """Greedy chains; those that do not pass the check are drawn anew, from all of the distribution."""
    chains = writer.chains(ids)
    for i in range(1, n):
        right = [
            metrics.is_right(chain, question, None, problems.check)
            for chain, question in zip(chains, problems.question_test, strict=False)
        ]
        left = [at for at, passed in enumerate(right) if not passed]
        if not left:
            break
        torch.manual_seed(i)
        for at, chain in zip(left, writer.chains(ids[left], top_p=1.0), strict=True):
            chains[at] = chain
    return chains


def groups_of(problems: Problems, n: int) -> dict[str, list[int]]:
    """The test problems that a column of the table is about: puzzles by their number of clues."""
    groups = {}
    for i, question in enumerate(problems.question_test[:n]):
        groups.setdefault(problems.task.kind(question) if problems.is_puzzle else "right", []).append(i)
    return dict(sorted(groups.items()))


def table_rows(way: Way, n: int, device) -> tuple[list[str], str]:
    """The rows of a way in the table, and the problems a second of its fastest sampling."""
    ids, rows = reason.asked(way.facts, way.problems.question_test[:n]).to(device), []
    groups, log = groups_of(way.problems, n).values(), read_eval(way.folder)
    learned = [f"{seconds:.0f}" for _, seconds, answer in log if answer >= 0.9]
    size = f"{sum(p.numel() for p in way.model.parameters()) / 1e6:.2f}"
    for name, ask in way.ask.items():
        cells, chains = [way.name, size, f"{log[-1][0]:.0f}", learned[0] if learned else "-", name], ask(ids)
        for group in groups:
            picked = (
                [part[i] for i in group]
                for part in (chains, way.problems.question_test, way.problems.thoughts_test)
            )
            cells.append(f"{metrics.score_chains(*picked, way.problems.check)['answer']:.3f}")
        rows.append(f"| {' | '.join(cells)} |")
    first = next(iter(way.ask))
    return rows, f"  {way.name}, {first}:{reason.rates(way.ask[first], ids)}"


def read_eval(folder: Path, column="answer") -> list[tuple[float, float, float]]:
    """Step, training seconds and a column, the share of right answers, of each evaluation of a run."""
    with open(folder / "eval.csv", encoding="utf-8") as file:
        return [(float(r["step"]), float(r["seconds"]), float(r[column])) for r in csv.DictReader(file)]


def compare(cfg: Config, problems: Problems, device) -> None:
    """Train all, print the table, draw the learning curves."""
    spaces, n = cfg.run.dataset not in TASKS, cfg.run.score_n
    ways = []
    for name in cfg.ways:
        known = answers_only(problems) if name == "answer" else problems
        facts = reason.chain_facts(known, spaces, reason.size_of(cfg.run))
        train = ours if name in ("multi", "single") else theirs
        ways.append(train(cfg, name, facts, known, device))
    tables, rates = zip(*[table_rows(way, n, device) for way in ways], strict=True)
    groups = [f"{name}, n={len(group)}" for name, group in groups_of(problems, n).items()]
    print(f"\nright answers after {cfg.seconds:g} s of training each")
    print(f"| way | M parameters | steps | seconds to 90% | evaluations a thought | {' | '.join(groups)} |")
    print("|---" * (5 + len(groups)) + "|", *sum(tables, []), *rates, sep="\n")
    path = Path(cfg.out) / "curves.png"
    with figure(path, (7, 4)) as (_, ax):
        for way in ways:
            _, seconds, right = zip(*read_eval(way.folder), strict=True)
            ax.plot(seconds, right, "--" if "GPT-2" in way.name else "-", label=way.name)
        ax.set(xlabel="training seconds", ylabel="right answers, 200 test problems", ylim=(0, 1.02))
        ax.legend()
    print("wrote", path)


# -- self-correction ---------------------------------------------------------------------------------------


def spoil(thought: str, digits: str, rng: random.Random) -> str:
    """The thought with one of its digits changed to another of `digits`."""
    at = rng.choice([i for i, c in enumerate(thought) if c in digits])
    return thought[:at] + rng.choice([d for d in digits if d != thought[at]]) + thought[at + 1 :]


def think_on(
    cfg: reason.Config, facts: dict, model, problems: Problems, ids: Tensor
) -> list[tuple[float, float]]:
    """(evaluations so far, right answers) of test problems that go on from ids (N, q + k), after each round.

    The first ends the chains. Each of the ROUNDS after it masks again what the model is the least sure of,
    the spoilt thought not excepted: nothing tells it what is right.
    """
    asked, truth = reason.asked(facts, problems.question_test).to(ids.device), problems.thoughts_test
    points, spent, x = [], 0, None
    for i in range(1 + ROUNDS):
        if i:
            ids = reason.remasked(cfg, model, asked, x, cfg.seed + i - 1)
            spent += 2  # in which the model doubts each token
        x = reason.conclude(cfg, model, ids, cfg.seed + i)
        spent += reason.evaluations(cfg, model, ids) / len(ids)
        scores = metrics.score_chains(reason.decode(facts, x), problems.question_test, truth, problems.check)
        points.append((spent, scores["answer"]))
    return points


def self_correction(cfg: Config, problems: Problems, device) -> list[str]:
    """A digit of one true thought is spoilt, and what follows is the model's own: how many answers are right?

    A line for each thought, of a model trained on true thoughts and of one trained on snapshots of its own;
    a curve of each is drawn.
    """
    facts = reason.chain_facts(problems, cfg.run.dataset not in TASKS)
    digits = "".join(c for c in facts["alphabet"] if c.isdigit())
    problems = with_digits(problems, digits, cfg.run.score_n)
    n, shortest = len(problems.question_test), min(map(len, problems.thoughts_test))
    lines = [f"right answers, n={n}, {cfg.run.steps} evaluations a thought; then rounds of remasking"]
    lines.append(f"{cfg.run.remask:g} of the tokens, and the evaluations up to there")
    curves = {}
    for snapshot in (0.0, 0.5):
        run = dataclasses.replace(in_folder(cfg, f"snapshot{snapshot:g}"), snapshot=snapshot)
        if not finished(run, run.out, run.max_steps):
            reason.train(run, facts, problems, device)
        model, rng = reason.load_model(run, Path(run.out) / "last.pt", device)[0], random.Random(run.seed)
        for i in range(shortest):
            chains = [list(chain) for chain in problems.thoughts_test]
            for chain in chains if i else []:
                chain[i - 1] = spoil(chain[i - 1], digits, rng)
            ids = reason.encode(facts, problems.question_test, chains).to(device)
            ids[:, sum(facts["widths"][: i + 1]) :] = model.mask_id
            name = f"snapshot {snapshot:<4g}  {f'thought {i} spoilt' if i else 'nothing spoilt':18}"
            curves[name] = think_on(run, facts, model, problems, ids)
            lines.append(name + told(curves[name]))
    draw_curves(Path(cfg.out) / "correct.png", curves)
    return lines


def puzzles_by_evaluations(cfg: Config, problems: Problems, device) -> list[str]:
    """Share of solved minimal puzzles by evaluations: in one pass, in fresh tries, and with remasking."""
    facts = reason.chain_facts(problems, False, reason.size_of(cfg.run))
    way = ours(cfg, "multi", facts, problems, device)
    run = dataclasses.replace(in_folder(cfg, "multi"), passes="multi")
    hard = [q for q in problems.question_test if problems.task.kind(q) == "minimal"][: run.score_n]
    ids, curves = reason.asked(facts, hard).to(device), {}

    def points(chosen: reason.Config) -> list[tuple[float, float]]:
        found = reason.tries(chosen, facts, way.model, ids, hard, problems.check)
        return [(spent, metrics.share(right)) for spent, _, right in found]

    for order in ("confident", "margin", "random"):
        one = dataclasses.replace(run, order=order, tries=1)
        curves[f"{order}, one pass"] = []
        for steps in (1, 2, 4, 8, 16, 32, len(facts["axes"])):
            curves[f"{order}, one pass"] += points(dataclasses.replace(one, steps=steps))
    for share in (1.0, 0.5, 0.25):
        name = "fresh tries" if share == 1 else f"the {share:.0%} least sure masked again"
        curves[name] = points(dataclasses.replace(run, remask=share))
    draw_curves(Path(cfg.out) / "correct.png", curves)
    lines = [f"solved minimal puzzles, n={len(hard)}, at (evaluations a puzzle)"]
    for name, found in curves.items():
        lines.append(f"{name:36}" + told(found))
    return lines


def told(points: list[tuple[float, float]]) -> str:
    """Shares of right answers, and behind each the evaluations up to there."""
    return "  ".join(f"{right:.3f} ({spent:.0f})" for spent, right in points)


def draw_curves(path: Path, curves: dict[str, list[tuple[float, float]]]) -> None:
    """Draw shares of right answers over evaluations."""
    with figure(path, (7, 4)) as (_, ax):
        for name, points in curves.items():
            ax.plot(*zip(*points, strict=True), "o-", label=name)
        ax.set(xlabel="evaluations of the denoiser for each problem", ylabel="right answers", ylim=(0, 1.02))
        ax.legend(loc="lower right")
    say(f"wrote {path}")


def with_digits(problems: Problems, digits: str, n: int) -> Problems:
    """The problems with at most n test problems, such that each thought before the answer has a digit."""
    chosen = []
    for question, chain in zip(problems.question_test, problems.thoughts_test, strict=True):
        if len(chain) > 1 and all(set(thought) & set(digits) for thought in chain[:-1]):
            chosen.append((question, chain))
    if not chosen or len(digits) < 2:
        raise UserError(
            "no test problem has a thought with a digit before the answer: choose another data set"
        )
    questions, chains = map(list, zip(*chosen[:n], strict=True))
    return dataclasses.replace(problems, question_test=questions, thoughts_test=chains)


def main(cfg: Config) -> None:
    cfg = dataclasses.replace(cfg, out=cfg.out.replace("{dataset}", run_name(cfg.dataset)))
    device, run = pick_device(cfg.run.device), cfg.run
    problems = load_problems(run.dataset, reason.size_of(run), run.train_n, run.form, run.test)
    sizes = f"{len(problems.question)} training problems, seed {run.seed}"
    print(f"{run.dataset}: {sizes}; {device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    if cfg.correct:
        experiment = puzzles_by_evaluations if problems.is_puzzle else self_correction
        show(cfg.out, "correct", experiment(cfg, problems, device))
    else:
        compare(cfg, problems, device)


if __name__ == "__main__":
    run_script(Config, main, __doc__)
