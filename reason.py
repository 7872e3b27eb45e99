"""Reasoning by masked diffusion: a chain, thought by thought, or a puzzle, the surest cell first.

    python reason.py                        3 x 2-digit multiplication: no download, three minutes on a laptop
    python reason.py --dataset sudoku       learns from full grids, solves puzzles (--tries 16: more of them)
    python reason.py --load out/sudoku/last.pt --prompt "53..7....6..195....98....6.8...6...34..8.3..17..."

Diffusion of Thought 2402.07754; the order of unmasking 2502.06768.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from blocks import Layout, TokenTransformer, generate
from common.run import Run, UserError, autocast, load_checkpoint, pick_device, reading, run_script, log
from diffusion import Masked
from tasks import sudoku
from tasks.load import load_problems
from tasks.problems import Problem, Problems, decode, encode, majority


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them on the command line: python reason.py --lr 1e-3"""

    # data
    dataset: str = "mult"  # mult, countdown, sudoku (made here), gsm8k (hub), or a file of problems
    digits: tuple[int, int] = (3, 2)  # mult: of the two factors
    train_n: int = 50_000  # training problems, or as many as there are
    # diffusion
    passes: Literal["multi", "single"] = "multi"  # a thought at a time, or the whole chain at once
    masks: tuple[float, float] = (0.0, 1.0)  # least and largest share of masked tokens in training
    shift: float = 3.0  # times the odds of a mask: sampling begins with nothing but masks
    # denoiser
    width: int = 128  # width of the transformer
    depth: int = 4  # number of blocks
    # optimisation
    max_steps: int = 800  # optimizer steps
    batch_size: int = 128  # problems per step, over all processes
    lr: float = 2e-3  # AdamW's learning rate after warm-up
    muon_lr: float = 0.02  # Muon's, which trains the matrices of the blocks
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto is bf16 where the hardware has it
    # sampling
    order: Literal["confident", "random"] = "confident"  # in which tokens are unmasked
    steps: int = 8  # evaluations of the denoiser for each thought
    temperature: float = 0.0  # of the tokens that are drawn; 0 takes the likeliest
    tries: int = 1  # at most so many for each problem, until a check of the rules accepts the answer
    try_temperature: float = 1.0  # of all tries but the first
    votes: int = 1  # chains of which the most frequent answer counts; they differ with --temperature 0.5
    prompt: str | None = None  # with --load: a question of your own
    score_n: int = 500  # test problems of a score
    # the run
    out: str = "out/{dataset}"  # folder
    seed: int = 0  # of weights, batches, masks and samples
    sample_every: int = 500  # steps between scores of 200 test problems
    save_every: int = 250  # steps between checkpoints
    resume: bool = False  # continue the run in the folder
    load: str | None = None  # answer from this checkpoint, do not train

    script: ClassVar = "reason"
    RECIPES: ClassVar = {
        "sudoku": dict(train_n=1500, depth=6, batch_size=64, max_steps=7500, masks=(0.2, 0.8), shift=1.0)
        | dict(steps=81, try_temperature=2.5, score_n=300),
        "countdown": dict(passes="single", train_n=200_000, depth=6, max_steps=10_000, shift=1.0, steps=64)
        | dict(try_temperature=2.5),
    }


def build(cfg: Config, facts: dict, device: torch.device) -> TokenTransformer:
    """The denoiser of chains: a block for each thought, or a single one."""
    q, *thoughts = facts["widths"]
    torch.manual_seed(cfg.seed)
    layout = Layout([q, *thoughts] if cfg.passes == "multi" else [q, sum(thoughts)], facts["axes"])
    return TokenTransformer(len(facts["alphabet"]) + 1, layout, cfg.width, cfg.depth).to(device)


def load(path, cfg: Config | None = None) -> tuple[TokenTransformer, dict]:
    """The denoiser (the averaged weights) and the facts of a checkpoint."""
    checkpoint = load_checkpoint(path, Config)
    with reading(path):
        model = build(cfg or Config(**checkpoint["config"]), checkpoint["facts"], pick_device())
        model.load_state_dict(checkpoint["ema"])
    return model.eval(), checkpoint["facts"]


# -- answers ---------------------------------------------------------------------------------------------


def ask(facts: dict, questions: list[str]) -> Tensor:
    """Ids (N, q + k) of questions, with the mask at all that is to be found."""
    q, *thoughts = facts["widths"]
    if facts["axes"]:
        return encode(facts, questions, thoughts[0])
    return F.pad(encode(facts, questions, q), (0, sum(thoughts)), value=len(facts["alphabet"]) + 1)


def think(cfg: Config, model: TokenTransformer, ids: Tensor):
    """Yield (thought i, ids (N, k) so far) after each step from ids (N, q + k), masked where not known."""
    q, xt = ids.split([model.layout.q, model.layout.k], dim=1)
    how = dict(steps=cfg.steps, order=cfg.order, temperature=cfg.temperature)
    with autocast(ids.device, cfg.precision):
        yield from generate(model, q, xt, generator=torch.Generator().manual_seed(cfg.seed), **how)


def chains_of(cfg: Config, facts: dict, model: TokenTransformer, questions: list[str]) -> list[list[str]]:
    """The chains of questions, 1,000 at a time."""
    chains, ids = [], ask(facts, questions).to(next(model.parameters()).device)
    for part in ids.split(1000):
        *_, (_, xt) = think(cfg, model, part)
        chains += decode(facts, xt)
    return chains


def score(cfg: Config, facts: dict, model, problems: Problems, n: int) -> tuple[float, float]:
    """The share of n test problems that are right, and the mean evaluations of the denoiser for each.

    An answer that the check of the rules refuses is tried again from the beginning, up to cfg.tries times.
    """
    questions = [question for question, _ in problems.test[:n]]
    masked = (ask(facts, questions)[:, model.layout.q :] == model.mask_id).split(model.layout.widths, dim=1)
    cost = cfg.votes * sum(
        block.sum(1).clamp(max=cfg.steps) for block in masked
    )  # (n,): evaluations of a try
    left, spent = list(range(len(questions))), 0
    for i in range(cfg.tries):
        how = replace(cfg, temperature=cfg.try_temperature) if i else cfg
        votes = []
        for seed in range(cfg.seed + i * cfg.votes, cfg.seed + (i + 1) * cfg.votes):
            votes.append(chains_of(replace(how, seed=seed), facts, model, [questions[j] for j in left]))
        chains = [majority(chains) for chains in zip(*votes, strict=True)]
        spent += cost[left].sum().item()
        left = [j for j, chain in zip(left, chains, strict=True) if not problems.check(questions[j], chain)]
        if not left:
            break
    return 1 - len(left) / len(questions), spent / len(questions)


def report(cfg: Config, facts: dict, model: TokenTransformer, problems: Problems) -> None:
    """Show an answer, and print scores by evaluations per thought and by tries."""
    show_answer(cfg, facts, model, problems.test[0][0])
    for steps, tries in sorted({(1, 1), (8, 1), (cfg.steps, 1), (cfg.steps, cfg.tries)}):
        right, spent = score(replace(cfg, steps=steps, tries=tries), facts, model, problems, cfg.score_n)
        n = len(problems.test[: cfg.score_n])
        log(f"{steps} steps, {tries} tries: {right:.3f} of {n} are right, {spent:.1f} evaluations each")


def show_answer(cfg: Config, facts: dict, model: TokenTransformer, question: str) -> None:
    """Print how the chain of a question, or a puzzle, comes into focus."""
    ids = ask(facts, [question]).to(next(model.parameters()).device)
    states = [xt for _, xt in think(cfg, model, ids)]
    for xt in states[:: max(1, len(states) // 8)] + states[-1:]:
        chain = decode(facts, xt)[0]
        rows = [chain[0][i : i + 9] for i in range(0, 81, 9)]
        log("\n".join([*rows, ""]) if facts["axes"] else " | ".join(chain))


# -- training --------------------------------------------------------------------------------------------


def train(cfg: Config, problems: Problems, device: torch.device) -> None:
    facts = problems.facts
    model = build(cfg, facts, device)
    layout, process, widths = model.layout, Masked(model.mask_id), facts["widths"]
    ids = torch.cat(columns(facts, problems.train), dim=1).to(device)
    thought = torch.repeat_interleave(torch.tensor(widths[1:])).to(device)  # (k,): 0 0 0 1 1 ...
    blocks = model.transformer.blocks.named_parameters()
    run = Run(cfg, model, facts, device, muon=[p for name, p in blocks if p.dim() == 2 and "ada" not in name])
    for _, batch in run.steps(len(ids)):
        q, x0 = ids[batch].split([layout.q, layout.k], dim=1)
        x0 = problems.symmetry(x0) if problems.symmetry else x0
        low, high = cfg.masks
        u = low + (high - low) * torch.rand(len(batch), len(widths) - 1, device=device)  # of each thought
        t = (cfg.shift * u / (1 + (cfg.shift - 1) * u))[:, thought]
        with autocast(device, cfg.precision):
            loss = process.loss(run.model, x0, torch.cat([q, x0], dim=1)[:, : layout.c], t).mean()
        run.update(loss)
        if run.due(cfg.sample_every):
            log(f"  right: {score(cfg, facts, run.ema, problems, 200)[0]:.3f} of 200 test problems")
    if run.due(1):
        report(cfg, facts, run.ema, problems)


def columns(facts: dict, problems: list[Problem]) -> list[Tensor]:
    """Ids (N, width) of the questions of problems, and of each thought; a chain that has ended is padded."""
    rows = [([] if facts["axes"] else [question]) + thoughts for question, thoughts in problems]
    ids = []
    for i, width in enumerate(filter(None, facts["widths"])):
        ids.append(encode(facts, [row[i] if i < len(row) else "" for row in rows], width))
    return ids


def main(cfg: Config) -> None:
    if cfg.load:
        model, facts = load(cfg.load, cfg)
        if cfg.prompt:
            return show_answer(cfg, facts, model, sudoku.read(cfg.prompt) if facts["axes"] else cfg.prompt)
    problems = load_problems(cfg.dataset, cfg.train_n, cfg.digits)
    if cfg.tries > 1 and not problems.by_rule:
        raise UserError(f"--tries needs rules that tell a right answer: {cfg.dataset} has only the answers")
    sizes = f"{len(problems.train)} training and {len(problems.test)} test problems"
    log(f"{cfg.dataset}: {sizes}, such as {problems.train[0]}")
    if not cfg.load:
        cfg = replace(cfg, out=cfg.out.replace("{dataset}", Path(cfg.dataset).stem))
        return train(cfg, problems, pick_device())
    if problems.facts != facts:
        raise UserError(f"{cfg.load} was trained on other problems than {cfg.dataset}")
    report(cfg, facts, model, problems)


if __name__ == "__main__":
    run_script(Config, main, __doc__)
