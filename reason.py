"""Reasoning: chains of thought by masked diffusion, thought by thought. Diffusion of Thought 2402.07754.

python reason.py                                      3 x 2-digit multiplication; nothing to download
python reason.py --dataset sums                       running sums
python reason.py --sample_from out/mult/last.pt --prompt "3 2 1 * 5 4"
"""

import dataclasses
import functools
import math
import re
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

import torch
from torch import Tensor

import metrics
from blocks import Layout, TokenTransformer, generate
from diffusion import Masked
from files import UserError, is_main, load_checkpoint, load_weights, reading, say, show
from tasks import ANSWER, TASKS, Problems, Tokens, load_problems
from training import (
    Run,
    autocast,
    check_run,
    finished,
    millions,
    need,
    not_fatal,
    pick_device,
    run_name,
    run_script,
    saved_config,
    wait,
)

EVAL = "step,seconds,answer,chain"  # the columns of eval.csv
VOTE_TEMPERATURE = 0.5  # at which the chains of a majority vote are drawn


class Facts(TypedDict):
    """What a checkpoint knows of its problems, see `chain_facts`."""

    alphabet: str
    widths: list[int]
    example: str | None
    problems: int
    checksum: str


@dataclass(frozen=True)
class Config:
    """Hyperparameters. Edit the defaults here, or override any of them: python reason.py --lr 1e-3"""

    # -- data --
    dataset: str = "mult"  # sums, adds, mult (made here), gsm8k (hub), or the path of a file or a folder
    digits: tuple[int, int] = (3, 2)  # mult: of the two factors; adds: the first is that of each number
    terms: int = 4  # sums and adds: numbers to add
    train_n: int = 50_000  # training problems, or as many as there are
    form: Literal["equations", "text"] = "equations"  # of a file's thoughts: the <<equations>>, or the lines
    # -- diffusion --
    passes: Literal["multi", "single"] = "multi"  # a thought at a time, or the whole chain at once
    shift: float = 3.0  # times the odds of a mask in training: sampling begins with nothing but masks
    snapshot: float = 0.0  # multi: share of training chains that stand on the model's own guesses
    snapshot_temperature: float = 3.0  # of those guesses; at 1 a trained model makes no errors to learn from
    # -- denoiser --
    width: int = 128  # width of the model
    depth: int = 4  # number of blocks
    # -- optimisation --
    max_steps: int = 1000  # optimizer steps
    batch_size: int = 256  # problems of a step, over all processes
    lr: float = 2e-3  # AdamW's learning rate after warm-up
    warmup: int = 200  # steps of linear warm-up
    ema_decay: float = 0.999  # upper limit of the EMA's decay; it ramps as (1 + step) / (10 + step)
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the hardware has it
    # -- sampling --
    order: Literal["confident", "random"] = "confident"  # of unmasking: the surest tokens first, or any
    steps: int = 8  # evaluations of the denoiser for each thought; at most one for each of its tokens is used
    temperature: float = 0.0  # of the tokens that are drawn; 0 takes the likeliest
    votes: int = 5  # chains of a majority vote; 1: no vote
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

    def __post_init__(self):
        check_run(self)
        need(self, "max_steps steps score_n", 1)
        need(self, "train_n", 1, 10_000_000)
        need(self, "batch_size", 1, 100_000)
        need(self, "width", 16, 16_384)
        need(self, "depth votes", 1, 1000)
        need(self, "temperature", 0, 100)
        need(self, "terms", 2, 100)
        need(self, "snapshot", 0, 1)
        need(self, "snapshot_temperature", 0.1, 100)
        need(self, "shift", 0.01, 100)
        if min(self.digits) < 1 or max(self.digits) > 8:
            raise ValueError(f"digits must be two numbers in 1..8, got {self.digits}")
        if self.width % 16:
            raise ValueError(f"width must be divisible by 16, got {self.width}")
        if self.snapshot and self.passes == "single":
            raise ValueError("--snapshot is about earlier thoughts: it needs --passes multi")
        if self.prompt and not self.sample_from:
            raise ValueError("--prompt is answered from a checkpoint: add --sample_from out/NAME/last.pt")


# -- chains as ids -----------------------------------------------------------------------------------------


def chain_facts(problems: Problems, spaces: bool) -> dict:
    """What a checkpoint must know of its problems, in plain types.

    The alphabet, with the space or without; the widths of the question and of each thought; an example of a
    question, its digits written as 7, where all training questions agree on it; number and checksum.
    """
    questions = problems.question + problems.question_test
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
    parts = [tokens.encode(questions, q)]
    for i, width in enumerate(slots):
        parts.append(tokens.encode([chain[i] if i < len(chain) else "" for chain in thoughts], width))
    return torch.cat(parts, dim=1)


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
    layout = Layout([q, *slots] if cfg.passes == "multi" else [q, sum(slots)])
    return TokenTransformer(len(facts["alphabet"]) + 1, layout, cfg.width, cfg.depth).to(device)


def think(cfg: Config, model: TokenTransformer, q: Tensor, seed: int, xt: Tensor | None = None):
    """Yield (block i, ids (B, k) so far) after each step of the chains of questions q (B, q).

    xt: what is known of them (see `generate`).
    """
    how = dict(steps=cfg.steps, order=cfg.order, temperature=cfg.temperature)
    return generate(model, q, xt, generator=torch.Generator().manual_seed(seed), **how)


def chains_of(cfg: Config, facts: dict, model: TokenTransformer, q: Tensor, seed: int) -> list[list[str]]:
    """The chains of questions q (N, q), made 1,000 at a time, until each has its answer."""
    answer, chains = Tokens(facts["alphabet"]).ids("####")[0], []
    widths = torch.tensor(facts["widths"][1:])
    starts = widths.cumsum(0) - widths  # of the thoughts
    for part in q.split(1000):
        with autocast(q.device, cfg.precision):  # around all steps: the weights are turned to bf16 once
            for i, xt in think(cfg, model, part, seed + len(chains)):
                end = sum(model.layout.widths[: i + 1])
                known = (xt[:, :end] != model.mask_id).all()
                if known and (xt[:, starts[starts < end]] == answer).any(1).all():
                    break
        chains += decode(facts, xt)
    return chains


def focus(cfg: Config, facts: dict, model: TokenTransformer, question: str) -> list[str]:
    """The chain of one question as it comes into focus, a line for each step: "_" is a token still masked."""
    tokens, lines = Tokens(facts["alphabet"]), [f"question  {question}"]
    q = tokens.encode([question], facts["widths"][0]).to(next(model.parameters()).device)
    with autocast(q.device, cfg.precision):
        states = list(think(cfg, model, q, cfg.seed))
    for i, xt in states:
        shown = xt[0, : sum(model.layout.widths[: i + 1])].tolist()
        characters = ["_" if token == model.mask_id else tokens.text([token]) for token in shown]
        lines.append(f"thought {i + 1}  " + (" " if tokens.bare else "").join(filter(None, characters)))
    return [*lines, "chain     " + " | ".join(decode(facts, states[-1][1])[0])]


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
    q_test = encode(facts, questions, truth)[:, : layout.q].to(device)
    run = Run(cfg, model, device, facts, cfg.out, cfg.max_steps, cfg.batch_size)
    size = f"{millions(model)}, {len(ids)} training problems"
    say(f"{run.out}: {size}; {device}, {run.world} process(es)")

    def look(step: int) -> None:
        took = run.took()
        with run.pause():
            chains = chains_of(cfg, facts, run.ema.module, q_test, cfg.seed)
            note(run, step, took, metrics.score_chains(chains, questions, truth, problems.check))

    for _, batch in run.steps(len(ids), seconds):
        if run.due(cfg.sample_every):
            look(run.step - 1)
        q, x0 = ids[batch].split([layout.q, layout.k], dim=1)
        u = torch.rand(len(batch), len(slots), device=device)  # each thought has a step of its own
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
    """The EMA weights in a checkpoint, its facts and its training seconds. cfg: None for the saved one."""
    checkpoint = load_checkpoint(path, Config.kind, Facts)
    cfg = cfg or saved_config(Config, checkpoint["config"], path)
    with reading(path):
        model = build(cfg, checkpoint["facts"], device)
    load_weights(model, checkpoint["ema"], path)
    return model.eval(), checkpoint["facts"], checkpoint["seconds"]


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
    """Print scores and rates of chains at 1 to 64 evaluations a thought, and the score of a vote."""
    questions, truth = (part[: cfg.score_n] for part in (problems.question_test, problems.thoughts_test))
    n, device = len(questions), next(model.parameters()).device
    q = encode(facts, questions, truth)[:, : model.layout.q].to(device)
    size = f"{millions(model)}, trained {seconds:.0f} s"
    say(f"score: n={n} test problems, seed {cfg.seed}; {device}, {torch.get_num_threads()} threads; {size}")

    for steps in (1, 2, 4, 8, 16, 32, 64):
        asked = dataclasses.replace(cfg, steps=steps)
        chains = chains_of(asked, facts, model, q, cfg.seed)
        line = row(f"{steps} evaluations", metrics.score_chains(chains, questions, truth, problems.check))
        fast = rates(functools.partial(chains_of, asked, facts, model, seed=0), q) if steps <= 8 else ""
        say(line + fast)
    if cfg.votes == 1:
        return
    asked = dataclasses.replace(cfg, temperature=VOTE_TEMPERATURE)
    runs = [chains_of(asked, facts, model, q, cfg.seed + 1000 * i) for i in range(cfg.votes)]
    first = metrics.score_chains(runs[0], questions, truth, problems.check)
    say(row(f"temperature {VOTE_TEMPERATURE:g}", first))
    right = 0
    for question, true, *chains in zip(questions, truth, *runs, strict=True):
        elected = metrics.majority(list(map(metrics.answer_of, chains)))
        right += metrics.is_right(elected, question, true, problems.check)
    say(f"  {f'vote of {cfg.votes} of those':22}  answer {right / n:.3f}")


def check_question(cfg: Config, facts: dict) -> None:
    """Raise UserError where all training questions look alike, and the prompt does not."""
    if facts["example"] not in (None, sevens(cfg.prompt)):
        looks = f"it must look like {facts['example']!r}"
        if cfg.dataset in TASKS:
            looks += ", least significant digit first"
        raise UserError(f"--prompt {cfg.prompt!r} is no question that this model has learned: {looks}")


def main(cfg: Config) -> None:
    cfg = dataclasses.replace(cfg, out=cfg.out.replace("{dataset}", run_name(cfg.dataset)))
    device, given = pick_device(cfg.device), cfg.sample_from or cfg.score_from
    if cfg.prompt:
        model, facts, _ = load_model(cfg, Path(given), device)
        check_question(cfg, facts)
        show(cfg.out, "focus", focus(cfg, facts, model, cfg.prompt))
        return
    problems = load_problems(cfg.dataset, cfg.digits, cfg.terms, cfg.train_n, cfg.form)
    if problems.note:
        say(problems.note)
    path, facts = Path(given or f"{cfg.out}/last.pt"), chain_facts(problems, spaces=cfg.dataset not in TASKS)
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
