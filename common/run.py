"""What every script needs once: settings, device, the training loop, checkpoints.

All random draws of a step follow from (seed, step, rank), so a run that is killed and resumed ends with the
same bits as one that was not (on one device).
"""

import copy
import math
import os
import signal
import sys
import time
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
WARMUP, COOLDOWN, CLIP, EMA, LOG_EVERY = 100, 0.2, 1.0, 0.999, 50
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Settings that a resumed run may change; all others must be those the checkpoint was trained with.
FREE = frozenset(
    "dataset out data_dir max_steps vae_steps diffusion_steps lr muon_lr precision sample_every save_every "
    "resume load sampler order steps guidance temperature try_temperature tries votes prompt gap length n "
    "score_n".split()
)


class UserError(Exception):
    """A mistake the user can fix: what we got, what we want, what to do. Exit status 2, no traceback."""


def log(text: str) -> None:
    if RANK == 0:
        with suppress(OSError):  # a training outlives its terminal
            print(text, flush=True)


def save_text(lines: list[str], path: Path) -> None:
    """Print lines, and write them to a file."""
    text = "\n".join([*lines, ""])
    write_atomic(path, lambda file: file.write(text.encode()))
    log(f"\n{text}wrote {path}")


# -- settings --------------------------------------------------------------------------------------------


def run_script(Config, main, doc: str) -> None:
    """Read the command line and call main(cfg).

    The defaults are those at the top of the script, then those of Config.RECIPES for the size or the data
    set; with --load they are the checkpoint's. Flags override them all.
    """
    try:
        parse = partial(tyro.cli, Config, description=doc, use_underscores=True)
        first = parse()
        if first.load:
            saved = load_checkpoint(first.load, Config)["config"]
            cfg = parse(default=Config(**saved | dict(score_n=0)))
            same_settings(cfg, saved, first.load, FREE | {"seed", "batch_size", "diffusion_batch"})
        else:
            recipe = Config.RECIPES.get(getattr(first, "size", None)) or Config.RECIPES.get(first.dataset, {})
            cfg = parse(default=Config(**recipe))
        main(cfg)
    except (UserError, OSError) as error:
        if RANK == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def pick_device() -> torch.device:
    """cuda or mps where there is one, else cpu."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return device


def autocast(device: torch.device, precision: str):
    """Matrix products in bfloat16 ("bf16"; "auto": where the hardware has it) or float32 ("fp32")."""
    hardware = torch.cpu._is_avx512_bf16_supported() if device.type == "cpu" else device.type == "cuda"
    wanted = precision == "bf16" or precision == "auto" and hardware
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


# -- checkpoints -----------------------------------------------------------------------------------------


def write_atomic(path: Path, write) -> None:
    """Call write(file) on a temporary file and rename it: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.tmp")
    with open(tmp, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(tmp, path)


@contextmanager
def reading(path):
    """Turn whatever goes wrong with the contents of a checkpoint into a UserError that names it."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any type: a file can be damaged, or made up, in any way
        raise UserError(f"{path} is not a checkpoint that fits here: {error!r:.400}") from error


def load_checkpoint(path, Config) -> dict:
    """A checkpoint that this script wrote. Only tensors and plain types are read, so no code can run."""
    with reading(path):
        with zipfile.ZipFile(path) as file:  # torch writes a CRC for each tensor but never checks it
            if damaged := file.testzip():
                raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["script"] != Config.script:
            raise ValueError(f"it belongs to {checkpoint['script']}.py, not to {Config.script}.py")
        return checkpoint | dict(config=asdict(Config(**checkpoint["config"])))


def same_settings(cfg, saved: dict, path, free) -> None:
    for name, now in asdict(cfg).items():
        if name not in free and now != saved[name]:
            raise UserError(f"--{name} {now}, but {path} was trained with {saved[name]}")


# -- the loop --------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(hash((seed, epoch)) % 2**63))


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Indices (batch_size,) of step 1, 2, ...: permutations of 0..n-1, in turn, cut into batches."""
    start = (step - 1) * batch_size
    epochs = range(start // n, (start + batch_size - 1) // n + 1)
    return torch.cat([permutation(n, seed, epoch) for epoch in epochs])[start - epochs[0] * n :][:batch_size]


class Run:
    """A training run and its folder: `for step, batch in run.steps(len(data)): ...; run.update(loss)`.

    run.model is the network to train (under torchrun in a DDP wrapper), run.ema the averaged one to sample
    from. facts: what sampling needs to know about the data; a resumed run must have the same. muon: matrices
    that Muon trains in place of AdamW; the rates then fall to 0 at the end of the run. free: more settings
    that a resumed run may change. extra: tensors that sampling needs too. A finished run has no steps left.
    """

    def __init__(
        self, cfg, model, facts, device, muon=(), max_steps=None, batch_size=None, free=(), extra=None
    ):
        self.cfg, self.facts, self.extra = cfg, facts, extra or {}
        self.device, self.out = device, Path(cfg.out)
        self.max_steps, self.batch_size = max_steps or cfg.max_steps, batch_size or cfg.batch_size
        self.net, self.ema = model, copy.deepcopy(model).eval().requires_grad_(False)
        chosen = set(muon)
        others = [p for p in model.parameters() if p not in chosen]
        self.opts = [torch.optim.AdamW(others, lr=cfg.lr, weight_decay=0.0, fused=device.type != "mps")]
        if muon:
            self.opts += [torch.optim.Muon(muon, lr=cfg.muon_lr, weight_decay=0.0)]
        self.step, self.seconds, self.losses, self.signal = 0, 0.0, [], 0
        if RANK == 0:
            self._lock()
        path = self.out / "last.pt"
        if path.exists():
            self._load(path, FREE | set(free))
            if self.step < self.max_steps and not cfg.resume:
                raise UserError(f"{path} is unfinished: add --resume to continue it, or choose another --out")
        if self.batch_size % WORLD:
            raise UserError(f"a batch of {self.batch_size} cannot be shared by {WORLD} processes")
        if WORLD > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        self.model = DistributedDataParallel(model) if WORLD > 1 else model

    def steps(self, n: int):
        """Yield (step, indices of this process's share of the batch) for n samples; save on the way.

        SIGINT and SIGTERM let the step finish, save and end the program; a second one ends it at once.
        """
        self._begin_log()
        share = self.batch_size // WORLD
        hidden = RANK > 0 or not sys.stderr.isatty()
        handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        with tqdm(total=self.max_steps, initial=self.step, disable=hidden) as bar:
            while self.step < self.max_steps:
                self.step += 1
                torch.manual_seed(hash((self.cfg.seed, self.step, RANK)) % 2**63)
                batch = batch_indices(n, self.batch_size, self.cfg.seed, self.step)
                self.start = time.perf_counter()
                yield self.step, batch[RANK * share :][:share].to(self.device)
                bar.update()
                stop = torch.tensor(self.signal)  # the number of a signal that came to any process, or 0
                if WORLD > 1:
                    dist.all_reduce(stop, op=dist.ReduceOp.MAX)
                if stop or self.step % self.cfg.save_every == 0 or self.step == self.max_steps:
                    self.save()
                if stop:
                    log(f"stopped at step {self.step} and saved: add --resume to the command to continue")
                    sys.exit(128 + int(stop))
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if RANK == 0:
            self._draw_curve()

    def _on_signal(self, number: int, _) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def _lock(self) -> None:
        """Keep a lock on the folder, which ends with this process."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.out / ".lock")
        try:
            self.lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(f"{self.out} is in use by another run: wait, or choose another --out") from error

    def due(self, every: int) -> bool:
        """Whether the main process is to show something after this step."""
        return RANK == 0 and self.step % every == 0

    def update(self, loss: Tensor) -> None:
        """One step of the optimizers on a scalar loss, then of the EMA."""
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), CLIP)
        rate = min(1.0, self.step / WARMUP)
        if len(self.opts) > 1:  # a run with Muon cools down
            rate = min(rate, (self.max_steps + 1 - self.step) / (COOLDOWN * self.max_steps))
        for opt in self.opts:
            opt.param_groups[0]["lr"] = opt.defaults["lr"] * rate
            opt.step()
            opt.zero_grad()
        decay = min(EMA, (1 + self.step) / (10 + self.step))  # a short run must forget its first weights
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.net.parameters()), 1 - decay)
        self.losses.append(loss.detach() + 0 * norm)  # not finite where the gradient is not
        self.seconds += time.perf_counter() - self.start
        if self.step % LOG_EVERY == 0 or self.step == self.max_steps:
            self._log(rate * self.cfg.lr)

    def save(self) -> None:
        """Write last.pt, unless a weight is not finite."""
        if not all(p.isfinite().all() for p in self.net.parameters()):
            raise UserError(
                f"weights of step {self.step} are not finite; {self.out} keeps the last good ones"
            )
        state = dict(script=self.cfg.script, config=asdict(self.cfg), facts=self.facts, step=self.step)
        state |= dict(
            extra=self.extra, seconds=self.seconds, model=self.net.state_dict(), ema=self.ema.state_dict()
        )
        state |= dict(opts=[opt.state_dict()["state"] for opt in self.opts])
        if RANK == 0:
            write_atomic(self.out / "last.pt", lambda file: torch.save(state, file))

    def _load(self, path: Path, free) -> None:
        old = load_checkpoint(path, type(self.cfg))
        same_settings(self.cfg, old["config"], path, free)
        if old["facts"] != self.facts:
            raise UserError(f"{path} was trained on other data: choose another --out")
        with reading(path):
            self.net.load_state_dict(old["model"])
            self.ema.load_state_dict(old["ema"])
            for opt, state in zip(self.opts, old["opts"], strict=True):
                opt.load_state_dict(opt.state_dict() | dict(state=state))
            self.step, self.seconds = old["step"], old["seconds"]
        log(f"loaded {path}, step {self.step} of {self.max_steps}")

    def _begin_log(self) -> None:
        """Start log.csv, or cut from it the rows after the checkpoint, which will be written again."""
        path, rows = self.out / "log.csv", []
        if self.step:
            rows = [row for row in path.read_text().splitlines()[1:] if int(row.split(",")[0]) <= self.step]
        text = "\n".join(["step,loss,lr,seconds", *rows, ""])
        if RANK == 0:
            write_atomic(path, lambda file: file.write(text.encode()))

    def _log(self, lr: float) -> None:
        loss, self.losses = torch.stack(self.losses).mean(), []
        if WORLD > 1:
            dist.all_reduce(loss)
        loss = loss.item() / WORLD
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is not finite by step {self.step}; {self.out} keeps the last good weights"
            )
        log(f"step {self.step}/{self.max_steps}  loss {loss:.4f}  {self.seconds:.0f} s")
        if RANK == 0:
            with open(self.out / "log.csv", "a") as file:
                file.write(f"{self.step},{loss:.6f},{lr:.3g},{self.seconds:.2f}\n")

    def _draw_curve(self) -> None:
        rows = [line.split(",") for line in (self.out / "log.csv").read_text().splitlines()[1:]]
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        axes.semilogy([int(row[0]) for row in rows], [float(row[1]) for row in rows])
        axes.set(xlabel="step", ylabel="training loss")
        figure.savefig(self.out / "curve.png", dpi=120)
