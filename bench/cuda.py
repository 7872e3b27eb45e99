"""What a machine does in a few minutes: steps and samples of every network, and the scripts as a whole.

    python -m bench.cuda                                on a GPU; FashionMNIST from ./data
    python -m bench.cuda --minutes 1 --dataset digits   elsewhere: every row at a tiny size

Each row is written at once, also that of what fails. MFU: share of the rate of bf16 matrices measured here.
"""

import gc
import statistics
import time
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from subprocess import getoutput
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, GPT2Config

import imagen
import reason
import textgen
import tokengen
from bench import images
from bench.runs import FOREVER, run_bench, saved_by, timed
from bench.text import small_parts, training_steps
from bench.timing import interleaved, synchronize
from common.images import load_images
from common.run import UserError, autocast, log, pick_device, write_atomic
from common.scores import scale

# Shares of the time: machine, image steps, imagen.py, its samples, paragraphs, tokens. Then sizes.
SHARES = dict(a=0.03, b=0.28, c=0.25, d=0.06, e=0.21, f=0.17)
SIDES = {"ours": images.Ours} | images.PEERS | {"diffusers in a bare loop, fp32": images.Diffusers}
FULL = dict(matrix=8192, repeat=10, batches=(64, 256, 1024), draws=(1, 1000), imagen=dict(score_n=10_000))
FULL |= dict(sudoku=dict(batch_size=512, max_steps=2500))
TINY = dict(matrix=512, repeat=1, batches=(4, 8), draws=(1, 4), imagen=dict(score_n=20, samples=1))
TINY |= dict(bert=dict(vocab_size=500, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
TINY |= dict(gpt2=dict(vocab_size=500, n_embd=16, n_layer=1, n_head=2), manual=dict(window=32, score_n=4))
TINY |= dict(base=dict(width=16, depth=1, latent_width=16, vae_batch=2, diffusion_batch=2))
TINY |= dict(grammar=dict(vae_width=16, vae_depth=1, width=16, depth=1, steps=2, score_n=4, samples=1))
TINY |= dict(mult=dict(train_n=60), sudoku=dict(train_n=60, batch_size=8, steps=4, score_n=4))


@dataclass(frozen=True)
class Config:
    minutes: float = 8.0  # of all sections
    sections: str = "abcdef"  # which
    dataset: str = "fashionmnist"  # one with classes, a single channel and sides divisible by 4
    data_dir: str = "data"  # where torchvision keeps its data sets
    compile: bool = False  # compile on a CPU too
    out: str = "out/bench/cuda"  # folder of the results, and of a new folder with the runs


class Session:
    """What the rows share; found: speeds, and seconds of first steps."""

    def __init__(self, cfg: Config, device: torch.device):
        self.cfg, self.device, self.cuda, out = cfg, device, device.type == "cuda", Path(cfg.out)
        self.sizes = FULL if self.cuda else TINY
        self.name = torch.cuda.get_device_name(device) if self.cuda else f"{device.type}, TINY sizes"
        self.found, self.x = {}, load_images(cfg.dataset, cfg.data_dir).x.to(device)
        self.folder, self.path = out / time.strftime("%Y-%m-%d_%H-%M-%S"), out / "results.md"
        self.text = self.path.read_text(encoding="utf-8") + "\n" if self.path.exists() else ""
        self.text += f"## {self.folder.name}, {cfg.minutes:g} minutes, {cfg.dataset}\n\n"
        self.text += "section | device | what | result\n---|---|---|---\n"

    def attempt(self, section: str, what: str, work, seconds: float) -> None:
        """Write a row: what work(seconds) returns, or how it fails, and on CUDA the memory it took."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if self.cuda else 0
        try:
            result = work(seconds)
        except Exception as error:  # of any type: no compiler, the memory is full, a peer is not installed
            result = dict(FAILED=f"{type(error).__name__}: {error}"[:300])
        if self.cuda:
            result["peak MiB"] = (torch.cuda.max_memory_allocated() - before) // 2**20
        result = ", ".join(f"{k} {v}" for k, v in result.items()).replace("|", "/")
        row = " ".join(f"{section} | {self.name} | {what} | {result}".split())
        self.text += row + "\n"
        log(f"\n{row}\n")
        write_atomic(self.path, lambda file: file.write(self.text.encode()))


def measured(steps: dict, n: int, seconds: float, device) -> dict[str, float]:
    """Median seconds of each step, in rounds of n of each in turn, as many as fit, at most twenty."""
    sides = {name: lambda _, step=step: [step() for _ in range(n)] and None for name, step in steps.items()}
    took = interleaved(sides, 1, device)
    rounds = int(seconds / sum(map(sum, took.values()))) - 3  # less those two, and one that warms up
    took = interleaved(sides, min(rounds, 20), device) if rounds > 1 else took
    return {name: statistics.median(times) / n for name, times in took.items()}


@cache
def matrix_rate(s: Session, dtype: torch.dtype) -> float:
    """Floating point operations a second in products of two large matrices."""
    a, b = torch.randn(2, s.sizes["matrix"], s.sizes["matrix"], device=s.device).to(dtype)
    product = partial(torch.mm, a, b, out=torch.empty_like(a))
    return 2 * len(a) ** 3 / measured({"": product}, s.sizes["repeat"], 2.0, s.device)[""]


def machine(s: Session, seconds: float) -> dict:
    gpu = "nvidia-smi --query-gpu=driver_version,memory.total,power.limit --format=csv,noheader"
    facts = dict(torch=torch.__version__, CUDA=torch.version.cuda, threads=torch.get_num_threads())
    facts |= {"nvidia-smi": getoutput(gpu), "CPU": getoutput("grep -m1 'model name' /proc/cpuinfo")}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32 without TF32", torch.float32)):
        facts[f"{name} {s.sizes['matrix']}^2"] = f"{matrix_rate(s, dtype) / 1e12:.4g} TFLOP/s"
    return facts


def flops(loss) -> int:
    """Floating point operations of loss() and its gradients: those of products, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()


def ready(s: Session, sides: dict, name: str, B: int, how: str, seconds: float) -> dict:
    """Add a warm training step to the sides; the bare loop has one batch, no clipping, no EMA."""
    if how == "compiled" and s.found.get(how, 0) > 2 * seconds:
        raise UserError(f"no time to compile: it took {s.found[how]:.0f} s")
    torch.manual_seed(0)
    trainer = images.Trainer(SIDES[name](s.x.shape[-1], s.device), s.x, B)
    side, step, x = trainer.side, trainer.train_step, scale(s.x[:B])
    if "bare" in name:
        step = partial(training_steps(side.model, partial(side.loss, x), 1, s.device), 0)
    else:
        side.loss = autocast(s.device, "auto")(side.loss)  # peers in the precision of ours
    count = flops(partial(side.loss, x[:8])) / len(x[:8])
    trainer.opt.zero_grad()
    if how == "compiled":
        torch.compiler.reset()  # else it compiles for batches of any size
        side.model.compile(mode="reduce-overhead" if s.cuda else "default")
    start = time.perf_counter()
    for _ in range(3):  # with CUDA graphs: compile, warm up, record
        step()
    synchronize(s.device)
    s.found[how] = first = time.perf_counter() - start
    sides[name] = step, count, first
    return {"GFLOP/image": f"{count / 1e9:.3g}", "first 3 steps": f"{first:.1f} s"}


def speeds(s: Session, sides: dict, B: int, how: str, seconds: float) -> dict:
    """Images a second, and MFU, of the sides, which take turns; then they are dropped."""
    result, steps = {}, {name: step for name, (step, *_) in sides.items()}
    if not steps:
        raise UserError("no side is ready")
    for name, took in measured(steps, s.sizes["repeat"], seconds, s.device).items():
        share = sides[name][1] * B / took / matrix_rate(s, torch.bfloat16)
        result[name] = f"{B / took:.4g} images/s (MFU {share:.1%})"
        s.found[name, B, how] = 1 / took, sides[name][2]
    sides.clear()
    return result


def whole(script, cfg, start: str) -> dict:
    """Seconds and steps of a script, and what it says of its score: the last lines, from `start` on."""
    said, began = [], time.perf_counter()
    with patch.object(script, "log", lambda text: (said.extend(text.splitlines()), log(text))):
        script.main(cfg)
    result = dict(whole=f"{time.perf_counter() - began:.1f} s")
    right = [float(line.split()[1]) for line in said if line.startswith("  right: ")]  # every 50 steps
    for path in sorted(Path(cfg.out).rglob("last.pt"), reverse=True):
        saved, stage = saved_by(script.Config, path), path.parent.name
        most = getattr(cfg, "max_steps", 0) or getattr(cfg, f"{stage}_steps")
        result[stage] = f"{saved['step']} of {most} steps in {saved['seconds']:.1f} s"
        until = [row[3] for row, share in zip(saved["rows"], right, strict=False) if share >= 0.9]
        result |= {"until 90% are right": f"{until[0]:.1f} s"} if until else {}
    score = said[max(i for i, line in enumerate(said) if start in line) :]
    return result | {"says": " / ".join(line.strip() for line in score if "wrote" not in line)}


def bounded(s: Session, script, name: str, start: str, part: float, seconds: float) -> dict:
    """A script at its recipe, not compiled, whose stages train for a part of the seconds each."""
    settings = script.Config.RECIPES.get(name, {}) | s.sizes.get(name, {}) | dict(dataset=name, compile="off")
    settings |= dict(sample_every=50 if name == "mult" else FOREVER, out=str(s.folder / name))
    with timed(script, limit=part * seconds, score=lambda _: 0.0, every=FOREVER):
        return whole(script, script.Config(**settings), start)


def whole_images(s: Session, seconds: float) -> dict:
    """imagen.py with as many of its steps as fit beside samples and score, compiled if that gets further."""
    torch.compiler.reset()
    B, options = s.sizes["batches"][0], []
    recipe = imagen.Config.RECIPES.get(s.cfg.dataset, {}) | s.sizes["imagen"] | dict(dataset=s.cfg.dataset)
    most = imagen.Config(**recipe).max_steps
    for how, flag in (("eager", "off"), ("compiled", "on")):
        rate, first = s.found.get(("ours", B, how), (0, 0.0))
        steps = max(1, min(most, int((0.6 * seconds - first) * rate)))
        options += [(steps, -first - steps / rate, flag)] if rate else []
    steps, _, flag = max(options, default=(most, 0, "off"))  # without section b all
    recipe |= dict(data_dir=s.cfg.data_dir, batch_size=B, max_steps=steps, out=str(s.folder / "imagen"))
    what = {"steps": f"{steps} of {most}", "--compile": flag, "grid": s.folder / "imagen/samples/grid.png"}
    return what | whole(imagen, imagen.Config(**recipe, compile=flag), "score of")


def drawn(s: Session, name: str, n: int, seconds: float) -> dict:
    """Images a second at the usual evaluations, from ten: of the checkpoint, or a peer's random weights."""
    side, shape = SIDES[name](s.x.shape[-1], s.device), (n, *s.x.shape[1:])
    if name == "ours":
        side.process, side.model, _ = imagen.load(s.folder / "imagen/last.pt", s.device)
    draw = autocast(s.device, "auto")(side.sample)  # peers in the precision of ours
    draw = partial(draw, side.model.eval(), shape, torch.Generator().manual_seed(0), 10)
    rate = n / measured({"": draw}, 1, seconds, s.device)[""] * 10 / side.usual
    return {"images/s": f"{rate:.4g}", "evaluations": f"{side.usual}, measured with 10"}


def base_step(s: Session, stage: str, seconds: float) -> dict:
    """A step of a stage of textgen.py --size base, of random weights on made-up tokens or latents, no EMA."""
    cfg = textgen.Config(size="base", **textgen.Config.RECIPES["base"] | s.sizes.get("base", {}))
    shapes = BertConfig(**s.sizes.get("bert", {})), GPT2Config(**s.sizes.get("gpt2", {}))
    facts = small_parts(s.device)[1] | dict(backbones=[c.to_json_string(use_diff=False) for c in shapes])
    vae = textgen.build_vae(cfg, facts, s.device)
    ids = torch.randint(shapes[0].vocab_size, (cfg.vae_batch, cfg.max_tokens), device=s.device)
    model, loss = vae, partial(vae, ids, ids)
    if stage == "diffusion":
        process, model = textgen.build_denoiser(cfg, facts, vae)
        z = torch.randn(cfg.diffusion_batch, cfg.k, cfg.latent_width, device=s.device)
        loss = partial(process.loss, model, z, torch.zeros(len(z), dtype=torch.long, device=s.device))
    loss = autocast(s.device, cfg.precision)(loss)
    side = partial(training_steps(model, lambda: loss().mean(), 1, s.device), 0)
    took, steps = measured({"": side}, 1, seconds / 2, s.device)[""], getattr(cfg, f"{stage}_steps")
    return {"steps/s": f"{1 / took:.4g}", f"hours for {steps} steps": f"{steps * took / 3600:.3g}"}


def plan(s: Session):
    """Yield each row's section, its share of that section's time, what it is, and its work."""
    yield "a", 1.0, "machine", partial(machine, s)
    for how, share in (("eager", 0.02), ("compiled", 0.15))[: 1 + (s.cuda or s.cfg.compile)]:
        for B in s.sizes["batches"]:
            sides = {}
            for name in ["ours"] if how == "compiled" else [*SIDES][: 4 if B < 128 else 3]:
                yield "b", share, f"{name}, batch {B}, {how}", partial(ready, s, sides, name, B, how)
            yield "b", 0.05, f"batch {B}, {how}, sides in turn", partial(speeds, s, sides, B, how)
    yield "c", 1.0, f"imagen.py, batch {s.sizes['batches'][0]}", partial(whole_images, s)
    for n in s.sizes["draws"]:
        for name in ("ours", *images.PEERS):
            yield "d", 0.16, f"{name}, batch {n}", partial(drawn, s, name, n)
    yield "e", 0.6, "textgen.py on the grammar", partial(bounded, s, textgen, "grammar", "score of", 0.35)
    for stage in ("vae", "diffusion"):
        yield "e", 0.2, f"textgen.py --size base, {stage} step", partial(base_step, s, stage)
    yield "f", 0.3, "reason.py", partial(bounded, s, reason, "mult", " tries: ", 0.6)
    yield "f", 0.45, "reason.py on Sudoku", partial(bounded, s, reason, "sudoku", " tries: ", 0.6)
    yield "f", 0.25, "tokengen.py on the manual", partial(bounded, s, tokengen, "manual", "at most", 0.6)


def main(cfg: Config) -> None:
    s, end = Session(cfg, pick_device()), time.perf_counter() + 60 * cfg.minutes
    rows = [(row, SHARES[row[0]] * row[1]) for row in plan(s) if row[0] in cfg.sections]
    for i, ((section, _, what, work), share) in enumerate(rows):
        left = (end - time.perf_counter()) / sum(share for _, share in rows[i:])
        s.attempt(section, what, work, max(0.5, share * left))
    log(f"wrote {s.path}")


if __name__ == "__main__":
    run_bench(Config, main, __doc__)
