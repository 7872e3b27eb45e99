"""Chains of thought: ours beside GPT-2's, and what becomes of a chain with a spoilt thought.

python -m bench.reason                        ours, multi- and single-pass; GPT-2 with its chain and without
python -m bench.reason --run.dataset adds     the same on another task; --run.NAME is the flag of reason.py
python -m bench.reason --correct              one thought is spoilt: is the answer right all the same?

All networks are as wide and as deep as each other, and see the same problems for the same seconds. GPT-2
writes by transformers' `generate`, greedily and with its cache.
"""

import csv
import dataclasses
import functools
import random
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import metrics
import reason
from bench.gpt import QuestionGPT
from diffusion import Masked
from files import UserError, figure, load_checkpoint, load_weights, show
from tasks import END, TASKS, Problems, Tokens, load_problems
from training import Run, autocast, finished, need, pick_device, run_script, same_settings
from vae import small_gpt

FOREVER = 10**6  # optimizer steps of a run that its seconds end


@dataclass(frozen=True)
class Config:
    """Settings of a comparison."""

    seconds: float = 300.0  # training seconds of each
    correct: bool = False  # the experiment on self-correction instead, after run.max_steps of training
    out: str = "out/bench/reason"  # folder of all runs; one that is finished there is loaded
    run: reason.Config = field(
        default_factory=functools.partial(reason.Config, sample_every=50, log_every=10)
    )

    def __post_init__(self):
        need(self, "seconds", 0.1)


def in_folder(cfg: Config, name: str) -> reason.Config:
    """The settings of the run of that name; where it has begun, it is gone on with."""
    folder = Path(cfg.out) / name
    return dataclasses.replace(cfg.run, out=str(folder), resume=(folder / "last.pt").exists())


def seconds_of(cfg: reason.Config) -> float:
    """The training seconds of the run in cfg.out, 0 for none. Raises UserError for other settings."""
    path = Path(cfg.out) / "last.pt"
    if not path.exists():
        return 0.0
    checkpoint = load_checkpoint(path, cfg.kind)
    same_settings(cfg, checkpoint["config"], path, "keep it, or choose another --out")
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
    """A GPT-2 and how it writes the chains of questions."""

    model: QuestionGPT
    writing: Writing
    longest: int
    precision: str

    def chains(self, q: Tensor) -> list[list[str]]:
        """Greedy chains of questions q (N, q), 1,000 at a time."""
        rows = []
        for part in q.split(1000):
            with autocast(q.device, self.precision):
                rows += self.model.generate(self.model.read(part), self.longest).tolist()
        return [self.writing.decode(row) for row in rows]


def train_gpt(cfg: reason.Config, facts: dict, problems: Problems, device, seconds: float) -> Writer:
    """The GPT-2 in cfg.out, trained for so many seconds, or loaded where it has been."""
    ids = reason.encode(facts, problems.question, problems.thoughts).to(device)
    q, slots = ids.tensor_split([facts["widths"][0]], dim=1)
    tokens, fixed = Tokens(facts["alphabet"]), (slots != END).all()
    writing = Writing(tokens, facts["widths"][1:] if fixed else None)
    target = writing.encode(problems.thoughts).to(device)
    torch.manual_seed(cfg.seed)
    decoder = small_gpt(tokens.V + 1, cfg.width, cfg.depth, q.shape[1] + target.shape[1] + 1)
    writer = Writer(QuestionGPT(decoder).to(device), writing, target.shape[1], cfg.precision)
    if seconds_of(cfg) >= seconds:
        load_weights(writer.model, load_checkpoint(f"{cfg.out}/last.pt", cfg.kind)["ema"], cfg.out)
        writer.model.eval()
        return writer
    questions, truth = problems.question_test[:200], problems.thoughts_test[:200]
    q_test = reason.encode(facts, questions, truth)[:, : q.shape[1]].to(device)
    run = Run(cfg, writer.model, device, facts, cfg.out, FOREVER, cfg.batch_size)

    def look(step: int) -> None:
        took = run.took()
        with run.pause():
            chains = dataclasses.replace(writer, model=run.ema.module).chains(q_test)
            reason.note(run, step, took, metrics.score_chains(chains, questions, truth, problems.check))

    for _, batch in run.steps(len(q), seconds):
        if run.due(cfg.sample_every):
            look(run.step - 1)
        with autocast(device, cfg.precision):
            loss = run.model(q[batch], target[batch])
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
    # From questions (N, q) to chains, for some numbers of evaluations a thought; GPT-2 has None of them.
    ask: dict


def answers_only(problems: Problems) -> Problems:
    """The problems with no thought but the answer."""
    last, last_test = ([chain[-1:] for chain in part] for part in (problems.thoughts, problems.thoughts_test))
    return dataclasses.replace(problems, thoughts=last, thoughts_test=last_test)


def ours(cfg: Config, passes: str, facts: dict, problems: Problems, device) -> Way:
    run = dataclasses.replace(in_folder(cfg, passes), passes=passes)
    if seconds_of(run) < cfg.seconds:
        reason.train(dataclasses.replace(run, max_steps=FOREVER), facts, problems, device, cfg.seconds)
    model = reason.load_model(run, Path(run.out) / "last.pt", device)[0]
    ask = {}
    for steps in (1, 8):
        asked = dataclasses.replace(run, steps=steps)
        ask[steps] = functools.partial(reason.chains_of, asked, facts, model, seed=run.seed)
    return Way(f"ours, {passes}-pass", Path(run.out), model, facts, problems, ask)


def theirs(cfg: Config, name: str, facts: dict, problems: Problems, device) -> Way:
    run = in_folder(cfg, name)
    writer = train_gpt(run, facts, problems, device, cfg.seconds)
    return Way(f"GPT-2, {name}", Path(run.out), writer.model, facts, problems, {None: writer.chains})


def table_row(way: Way, n: int, device) -> tuple[str, str]:
    """The row of a way in the table, and the problems a second of its fastest sampling."""
    questions, truth = way.problems.question_test[:n], way.problems.thoughts_test[:n]
    q = reason.encode(way.facts, questions, truth)[:, : way.facts["widths"][0]].to(device)
    right = {}
    for steps, ask in way.ask.items():
        right[steps] = metrics.score_chains(ask(q), questions, truth, way.problems.check)["answer"]
    log = read_eval(way.folder)
    learned = [f"{seconds:.0f}" for _, seconds, answer in log if answer >= 0.9]
    size = f"{sum(p.numel() for p in way.model.parameters()) / 1e6:.2f}"
    cells = [way.name, size, f"{log[-1][0]:.0f}", learned[0] if learned else "-"]
    cells += [f"{right[steps]:.3f}" if steps in right else "" for steps in (1, 8, None)]
    first = min(way.ask, key=lambda steps: steps or 0)
    return f"| {' | '.join(cells)} |", f"  {way.name:24}{reason.rates(way.ask[first], q)}"


def read_eval(folder: Path) -> list[tuple[float, float, float]]:
    """Step, training seconds and share of right answers of each evaluation of a run."""
    with open(folder / "eval.csv", encoding="utf-8") as file:
        return [(float(r["step"]), float(r["seconds"]), float(r["answer"])) for r in csv.DictReader(file)]


def compare(cfg: Config, problems: Problems, device) -> None:
    """Train all, print the table, draw the learning curves."""
    spaces, last = cfg.run.dataset not in TASKS, answers_only(problems)
    facts, facts_last = reason.chain_facts(problems, spaces), reason.chain_facts(last, spaces)
    ways = [ours(cfg, passes, facts, problems, device) for passes in ("multi", "single")]
    ways += [theirs(cfg, "chain", facts, problems, device), theirs(cfg, "answer", facts_last, last, device)]
    rows, rates = zip(*[table_row(way, cfg.run.score_n, device) for way in ways], strict=True)
    print(f"\nright answers, n={cfg.run.score_n}, after {cfg.seconds:g} s of training each")
    print("| way | M parameters | steps | seconds to 90% | 1 evaluation a thought | 8 | a token at a time |")
    print("|---|---|---|---|---|---|---|", *rows, "with 1 evaluation a thought:", *rates, sep="\n")
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


def right_after(
    cfg: reason.Config, facts: dict, model, problems: Problems, xt: Tensor
) -> tuple[float, float]:
    """Right answers of test problems with ids xt (N, q + k), masked where unknown; and after a second round.

    For that, each token of the chain is masked again with probability one half.
    """
    q, xt = xt.split([model.layout.q, model.layout.k], dim=1)
    shares, truth = [], problems.thoughts_test
    for _ in range(2):
        with autocast(q.device, cfg.precision):
            *_, (_, xt) = reason.think(cfg, model, q, cfg.seed + len(shares), xt)
        chains = reason.decode(facts, xt)
        shares.append(metrics.score_chains(chains, problems.question_test, truth, problems.check)["answer"])
        torch.manual_seed(cfg.seed)
        xt = Masked(model.mask_id).q_sample(xt, torch.full((len(xt),), 0.5, device=xt.device))
    return shares[0], shares[1]


def self_correction(cfg: Config, problems: Problems, device) -> list[str]:
    """A digit of one true thought is spoilt, and what follows is the model's own: how many answers are right?

    A line for each thought, of a model trained on true thoughts and of one trained on snapshots of its own.
    """
    facts = reason.chain_facts(problems, cfg.run.dataset not in TASKS)
    digits = "".join(c for c in facts["alphabet"] if c.isdigit())
    problems = with_digits(problems, digits, cfg.run.score_n)
    n, shortest = len(problems.question_test), min(map(len, problems.thoughts_test))
    lines = [f"right answers, n={n}, {cfg.run.steps} evaluations a thought, and in a second round"]
    for snapshot in (0.0, 0.5):
        run = dataclasses.replace(in_folder(cfg, f"snapshot{snapshot:g}"), snapshot=snapshot)
        if not finished(run, run.out, run.max_steps):
            reason.train(run, facts, problems, device)
        model, rng = reason.load_model(run, Path(run.out) / "last.pt", device)[0], random.Random(run.seed)
        for i in range(shortest):
            chains = [list(chain) for chain in problems.thoughts_test]
            for chain in chains if i else []:
                chain[i - 1] = spoil(chain[i - 1], digits, rng)
            xt = reason.encode(facts, problems.question_test, chains).to(device)
            xt[:, sum(facts["widths"][: i + 1]) :] = model.mask_id
            first, second = right_after(run, facts, model, problems, xt)
            name = f"thought {i} spoilt" if i else "nothing spoilt"
            lines.append(f"snapshot {snapshot:<4g}  {name:18}  {first:.3f}  {second:.3f}")
    return lines


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
    device, run = pick_device(cfg.run.device), cfg.run
    problems = load_problems(run.dataset, run.digits, run.terms, run.train_n, run.form)
    sizes = f"{len(problems.question)} training problems, seed {run.seed}"
    print(f"{run.dataset}: {sizes}; {device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    if cfg.correct:
        show(cfg.out, "correct", self_correction(cfg, problems, device))
    else:
        compare(cfg, problems, device)


if __name__ == "__main__":
    run_script(Config, main, __doc__)
