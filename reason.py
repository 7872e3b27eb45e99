"""Reasoning by masked diffusion: a chain, thought by thought, or a puzzle, the surest cell first.

    python reason.py                        3 x 2-digit multiplication: no download, three minutes on a laptop
    python reason.py --dataset sudoku       learns from full grids, solves puzzles (--tries 16: more of them)
    python reason.py --load out/sudoku/last.pt --prompt PUZZLE                 81 cells, "." where open

Diffusion of Thought 2402.07754; the order of unmasking 2502.06768.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from blocks import Layout, TokenTransformer, generate
from common.run import Flags, Run, UserError, autocast, check_config, load_model, log, pick_device, run_script
from diffusion import Masked
from tasks import sudoku
from tasks.load import TASKS, load_problems
from tasks.problems import decode, encode


@dataclass(frozen=True)
class Config(Flags):
    # Edit the defaults here, or override any of them on the command line: python reason.py --lr 1e-3
    dataset: str = "mult"  # mult, countdown, sudoku (made here), gsm8k (hub), or a file or folder of problems
    digits: tuple[int, int] = (3, 2)  # mult: of the two factors
    train_n: int = 50_000  # training problems, or as many as there are
    test: str | None = None  # a file of test problems; sudoku: 81 cells a line, or a csv, also with solutions
    # diffusion and denoiser
    passes: Literal["multi", "single"] = "multi"  # a thought at a time, or the whole chain at once
    masks: tuple[float, float] = (0.0, 1.0)  # least and largest share of masked tokens, before the shift
    shift: float = 3.0  # times the odds of a mask: sampling begins with nothing but masks
    snapshot: float = 0.0  # multi: share of training chains with the model's own thoughts as context
    width: int = 128  # width of the transformer
    depth: int = 4  # number of blocks
    loops: int = 1  # how many times the blocks are applied, the input added each time
    # optimisation
    max_steps: int = 800  # optimizer steps
    batch_size: int = 128  # problems per step, over all processes
    lr: float = 2e-3  # AdamW's learning rate after warm-up
    # sampling
    order: Literal["confident", "random"] = "confident"  # in which tokens are unmasked
    steps: int = 8  # evaluations of the denoiser for each thought, at most one for each token
    temperature: float = 0.0  # of the tokens that are drawn; 0 takes the likeliest
    tries: int = 1  # attempts at each problem, until the judge accepts the answer
    judge: Literal["rules", "self"] = "rules"  # self: half of the answer, masked again, must come back
    try_temperature: float = 1.0  # of all tries but the first
    prompt: str | None = None  # with --load: a question of your own
    score_n: int = 500  # test problems of a score, the first ones
    # the run
    sample_every: int = 500  # steps between scores of 200 test problems

    script: ClassVar = "reason"
    RECIPES: ClassVar = {
        "sudoku": dict(
            train_n=1500, depth=2, loops=8, batch_size=64, max_steps=3000, masks=(0.2, 0.8), shift=1.0
        )
        | dict(steps=81, try_temperature=2.5, score_n=300, sample_every=1000),
        "countdown": dict(passes="single", train_n=200_000, depth=6, max_steps=10_000, shift=1.0, steps=64)
        | dict(try_temperature=2.5, sample_every=1000),
    }

    def __post_init__(self):
        low, high = self.masks
        check_config(
            self,
            (1 <= min(self.digits) <= max(self.digits) <= 8, "--digits must be from 1 to 8"),
            (0 <= low < high <= 1, "--masks must be two shares, the smaller first"),
            (not self.snapshot or self.passes == "multi", "--snapshot needs --passes multi"),
            (self.prompt is None or self.load, "--prompt needs a checkpoint: add --load out/NAME/last.pt"),
            (self.prompt is None or self.prompt.strip(), "--prompt is empty: give a question as in the data"),
        )


def build(cfg, facts, device):
    """The process and the denoiser of chains: a block for each thought, or a single one."""
    q, *thoughts = facts["widths"]
    torch.manual_seed(cfg.seed)
    layout = Layout([q, *thoughts] if cfg.passes == "multi" else [q, sum(thoughts)], facts["axes"])
    model = TokenTransformer(len(facts["alphabet"]) + 1, layout, cfg.width, cfg.depth, loops=cfg.loops)
    return Masked(model.mask_id), model.to(device)


load = partial(load_model, Config, build)  # load(path): process, denoiser, facts; then see `answer`


def ask(facts, questions):
    """Ids (N, q + k) of questions, with masks where the answers belong."""
    q, *thoughts = facts["widths"]
    if facts["axes"]:
        return encode(facts, questions, thoughts[0])
    return F.pad(encode(facts, questions, q), (0, sum(thoughts)), value=len(facts["alphabet"]) + 1)


def think(cfg, model, ids):
    """Yield ids (N, k) of the blocks before and after each step, from ids (N, q + k) with masks."""
    q, known = ids.split([model.layout.q, model.layout.k], dim=1)
    how = cfg.steps, cfg.order, cfg.temperature, torch.Generator().manual_seed(cfg.seed)
    yield known
    with autocast(ids.device, cfg.precision):
        yield from (xt for _, xt in generate(model, q, known, *how))


def answer(cfg, facts, model, questions, ids=None):
    """A chain for each question. ids: (N, q + k), what is known of the chains; by default the questions."""
    chains, ids = [], ask(facts, questions) if ids is None else ids
    for part in ids.to(next(model.parameters()).device).split(cfg.batch_size):  # fits a cache
        *_, xt = think(cfg, model, part)
        chains += decode(facts, xt)
    return chains


def at_try(cfg, i):
    """The settings of try i: all but the first are drawn."""
    return replace(cfg, seed=cfg.seed + i, temperature=cfg.try_temperature if i else cfg.temperature)


def evaluations(cfg, model, ids):
    """Evaluations of the denoiser that fill the masks in ids (N, q + k), summed over N."""
    masked = (ids[:, model.layout.q :] == model.mask_id).split(model.layout.widths, dim=1)
    return sum(block.sum(1).clamp(max=cfg.steps).sum().item() for block in masked)


def judge(cfg, facts, model, questions, chains):
    """Whether each chain is accepted, and the evaluations for that. By the rules, if there are any; or by the
    model, if a chain comes back when a random half of what was asked is masked again. FRM 2606.29150."""
    if cfg.judge == "rules" or cfg.tries == 1:
        check = TASKS[facts["task"]].check if facts["task"] else lambda *_: True
        return list(map(check, questions, chains)), 0
    ids, x = ask(facts, questions), torch.cat(columns(facts, zip(questions, chains, strict=True)), 1)
    kept = torch.rand(ids.shape, generator=torch.Generator().manual_seed(cfg.seed)) < 0.5
    ids = torch.where(kept & (ids == model.mask_id), x, ids)
    again = answer(replace(cfg, temperature=0.0), facts, model, questions, ids)
    return list(map(list.__eq__, again, chains)), evaluations(cfg, model, ids)


def score(cfg, facts, model, problems, n):
    """Yield which of n test problems are right, and the mean evaluations for each, after each of cfg.tries.
    What the judge refuses is tried again from the beginning; if it refuses all tries, the first counts."""
    questions = [question for question, _ in problems.test[:n]]
    left, chains, spent = list(range(len(questions))), {}, 0
    for i in range(cfg.tries):
        how, asked = at_try(cfg, i), [questions[j] for j in left]
        found = answer(how, facts, model, asked)
        accepted, cost = judge(how, facts, model, asked, found)
        spent += cost + evaluations(cfg, model, ask(facts, asked))
        chains |= {j: found[k] for k, j in enumerate(left) if accepted[k] or not i}
        left = [j for k, j in enumerate(left) if not accepted[k]]
        right = [problems.check(question, chains[j]) for j, question in enumerate(questions)]
        yield right, spent / len(questions)


def report(cfg, facts, model, problems):
    """Print scores by evaluations, and after the first and the last try, of each kind of puzzle."""
    kinds = [problems.kinds(question) for question, _ in problems.test[: cfg.score_n]]
    for steps in sorted({1, 4, cfg.steps}) if kinds else []:
        tries = cfg.tries if steps == cfg.steps else 1
        scores = list(score(replace(cfg, steps=steps, tries=tries), facts, model, problems, cfg.score_n))
        for i in sorted({1, tries}):
            right, spent = scores[i - 1]
            log(f"{steps} steps, {i} tries: {spent:.3g} evaluations each")
            for kind in sorted(set().union(*kinds)):
                of_kind = [right[j] for j in range(len(kinds)) if kind in kinds[j]]
                log(f"  {kind} {sum(of_kind) / len(of_kind):.3f} of {len(of_kind)} are right")


def show_answer(cfg, facts, model, question):
    """Print how the chain of a question, or a puzzle, comes into focus in the first try that is accepted."""
    ids = ask(facts, [question]).to(next(model.parameters()).device)
    for i in range(cfg.tries):
        how = at_try(cfg, i)
        states = list(think(how, model, ids))
        if not i:
            first = states
        if judge(how, facts, model, [question], decode(facts, states[-1]))[0] == [True]:
            break
    else:
        log(f"not accepted in --tries {cfg.tries}: try more")
        states = first
    shown = [decode(facts, states[(len(states) - 1) * i // 3])[0] for i in range(4)]
    rows = [question, *map(" | ".join, shown)]
    if facts["axes"]:  # the grids side by side
        rows = ["    ".join(" ".join(grid[i : i + 9]) for (grid,) in shown) for i in range(0, 81, 9)]
    log("\n".join(rows))


def train(cfg, problems, device):
    facts = problems.facts
    process, model = build(cfg, facts, device)
    layout, (low, high) = model.layout, cfg.masks
    ids, thoughts = torch.cat(columns(facts, problems.train), dim=1).to(device), len(facts["widths"]) - 1
    thought = torch.repeat_interleave(torch.tensor(facts["widths"][1:])).to(device)  # (k,): 0 0 0 1 1 ...
    with Run(cfg, model, facts, device, cooldown=0.2, muon=model.matrices()) as run:
        for _, batch in run.steps(len(ids)):
            q, x0 = ids[batch].split([layout.q, layout.k], dim=1)
            x0 = problems.symmetry(x0) if problems.symmetry else x0
            u = low + (high - low) * torch.rand(len(x0), thoughts, device=device)
            t = (cfg.shift * u / (1 + (cfg.shift - 1) * u))[:, thought]
            with autocast(device, cfg.precision):
                clean = torch.cat([q, x0], dim=1)[:, : layout.c]
                if cfg.snapshot:
                    own = snapshot(cfg, process, run.model, x0, clean, t)
                    clean = torch.cat([q, own], dim=1)[:, : layout.c]
                loss = process.loss(run.model, x0, clean, t).mean()
            run.update(loss)
            if run.due(cfg.sample_every):
                right, _ = next(score(cfg, facts, run.ema, problems, 200))
                log(f"  right: {sum(right) / len(right):.3f} of {len(right)} test problems")
        if run.due(1):
            show_answer(cfg, facts, run.ema, problems.test[0][0])
            report(cfg, facts, run.ema, problems)


def columns(facts, problems):
    """Ids (N, width) of the questions of problems, and of each thought; a chain that has ended is padded."""
    rows = [([] if facts["axes"] else [question]) + thoughts for question, thoughts in problems]
    widths = enumerate(filter(None, facts["widths"]))
    return [encode(facts, [row[i] if i < len(row) else "" for row in rows], width) for i, width in widths]


@torch.no_grad()
def snapshot(cfg, process, model, x0, clean, t):
    """x0 (B, k), with the model's own guesses at masked thoughts in a share cfg.snapshot of the chains.
    A later thought that sees these learns not to trust the earlier ones: DoT's scheduled sampling."""
    xt = process.q_sample(x0, t)
    logits = model(xt, t, clean).view(-1, *xt.shape, process.mask_id)[-1]  # of the last loop
    p = (logits.float() / 3).softmax(-1)  # at temperature 1 it makes too few mistakes
    torch.clear_autocast_cache()  # its bf16 copies of the weights have no gradients
    guess = (p / torch.empty_like(p).exponential_()).argmax(-1)  # multinomial would wait for the device
    chosen = torch.rand(len(xt), 1, device=xt.device) < cfg.snapshot
    return torch.where(chosen & (xt == process.mask_id), guess, x0)


def main(cfg):
    if cfg.tries > 1 and cfg.judge == "rules" and cfg.dataset not in TASKS:
        raise UserError(f"{cfg.dataset} has answers, but no rules that tell a right one: add --judge self")
    if cfg.load:
        _, model, facts = load(cfg.load, cfg=cfg)
        if facts["task"] != (cfg.dataset if cfg.dataset in TASKS else ""):
            raise UserError(f"{cfg.load} was trained on other problems than {cfg.dataset}")
        if cfg.prompt is not None:
            spaced = cfg.prompt.strip() if " " in facts["alphabet"] else "".join(cfg.prompt.split())
            return show_answer(cfg, facts, model, sudoku.read(cfg.prompt) if facts["axes"] else spaced)
    problems = load_problems(cfg.dataset, cfg.train_n, cfg.digits, cfg.test)
    log(f"{cfg.dataset}: {len(problems.train)} + {len(problems.test)} problems, such as {problems.train[0]}")
    if not cfg.load:
        return train(cfg, problems, pick_device())
    if problems.facts != facts:
        raise UserError(f"{cfg.load} learned other problems, or some of --test: give the --test of training")
    show_answer(cfg, facts, model, problems.test[0][0])
    report(cfg, facts, model, problems)


if __name__ == "__main__":
    run_script(Config, main, __doc__)
