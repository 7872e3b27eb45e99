"""What every training loop needs once: device, precision, processes, seeds, EMA, checkpoints, log.

Every random draw of a training step is a function of (seed, step, rank), so a run that was killed at any
moment and resumed ends with the same bits as one that was not (on one device, CPU).
"""

import argparse
import csv
import functools
import gc
import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

# What a run may change when it is resumed, and a checkpoint when it is sampled from: every field of a Config
# that says nothing of what its weights have learned. All other fields are fixed, also one that is added
# tomorrow.
FREE = frozenset(
    "out device data_dir precision max_steps vae_steps diffusion_steps lr warmup ema_decay log_every "
    "sample_every save_every resume sample_from score_from sampler order steps guidance temperature top_p "
    "votes prompt score_n".split()
)
OF_THE_DATA = frozenset("seed batch_size dataset".split())  # free too where nothing is trained


class UserError(Exception):
    """A mistake that the user can mend: what was got, what is wanted, what to do; the exit status is 2."""


def reason(error: Exception) -> str:
    """The first line of what a library raised."""
    return (str(error) or type(error).__name__).splitlines()[0][:150]


def need(cfg, names: str, low: float, high: float = math.inf) -> None:
    """Raise ValueError where one of cfg's fields in `names`, with spaces between, is not in [low, high]."""
    for name in names.split():
        if not low <= getattr(cfg, name) <= high:
            raise ValueError(f"{name} must be in [{low}, {high}], got {getattr(cfg, name)}")


def check_run(cfg) -> None:
    """Raise ValueError for what no run of any script can be asked."""
    need(cfg, "log_every sample_every save_every", 1)
    need(cfg, "warmup score_n", 0)
    need(cfg, "seed", 0, 2**32)
    need(cfg, "ema_decay", 0, 1)
    need(cfg, "lr", 1e-9, 1)
    if cfg.sample_from and cfg.score_from:
        raise ValueError("choose one of sample_from and score_from")


# -- a script: from the command line to the exit status ---------------------------------------------------


def run_script(config_class, main, doc: str) -> None:
    """Read the command line and call main(cfg); a UserError is one message and exit status 2."""
    try:
        main(read_config(config_class, doc))
    except (UserError, OSError) as error:  # an OSError names the file
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        leave()


def read_config(config_class, doc: str):
    """The configuration of the command line.

    Its defaults are those of the dataclass, then what `config_class.recipe`, if any, returns for the data
    set; or, with --sample_from or --score_from, those of the checkpoint. Flags override what they name.
    """
    names = [name for name in ("sample_from", "score_from", "dataset", "size") if hasattr(config_class, name)]
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        flags.add_argument(
            f"--{name}", f"--{name.replace('_', '-')}", default=getattr(config_class, name), nargs="?"
        )
    given = flags.parse_known_args()[0]
    parse = functools.partial(tyro.cli, config_class, description=doc, use_underscores=True)
    path = "sample_from" in names and (given.sample_from or given.score_from)
    if not path or "--help" in sys.argv:
        recipe = config_class.recipe(given) if hasattr(config_class, "recipe") else {}
        return parse(default=config_class(**recipe))
    saved = load_checkpoint(path, config_class.kind)["config"]
    fresh = dict(
        out=str(Path(path).parent),
        device=config_class.device,
        resume=False,
        sample_from=None,
        score_from=None,
    )
    try:
        default = config_class(**saved | fresh)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} has a configuration of another version of this script: {error}") from error
    cfg = parse(default=default)
    same_settings(cfg, saved, path, "leave the flag out", FREE | OF_THE_DATA)
    return cfg


def run_name(dataset: str) -> str:
    """The name of a data set's run: its own, or that of its file or folder."""
    return Path(dataset).resolve().stem.lower()


def leave() -> None:
    """Leave the process group of torchrun, if any."""
    if dist.is_initialized():
        gc.collect()  # DDP's reference cycles would keep gloo's threads alive: at exit it aborts now and then
        dist.destroy_process_group()


def is_main() -> bool:
    """Whether this process is the one that writes files and prints."""
    return int(os.environ.get("RANK", 0)) == 0


def world_size() -> int:
    """The number of processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def wait() -> None:
    """Wait until every process of torchrun is here: what one of them wrote, the others can read."""
    if dist.is_initialized():
        dist.barrier()


# -- device, precision, seeds ----------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is cuda where there is one, else mps, else cpu. Raises UserError."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    here = [device for device, there in have.items() if there]
    name = here[0] if name == "auto" else name
    if name not in here:
        raise UserError(f"--device {name} is not available here; choose one of {', '.join(here)}, or auto")
    if name != "cuda":
        return torch.device(name)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)  # of NCCL's barriers too
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies in bfloat16: recent CUDA cards, and CPUs with AVX512-BF16 or AMX."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(device: torch.device, precision: str):
    """Products and convolutions in bf16 ("bf16"; "auto": where the hardware has it) or float32 ("fp32")."""
    bf16 = precision == "bf16" or precision == "auto" and has_bf16(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Make every later draw of torch a function of (seed, step, rank)."""
    torch.manual_seed(hash((seed, step, rank)) % 2**63)  # tuples of ints hash alike in every process


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Indices (batch_size,) of step 1, 2, ...: seeded permutations of 0..n-1, one after the other, cut up."""
    start = (step - 1) * batch_size
    epochs = range(start // n, (start + batch_size - 1) // n + 1)
    return torch.cat([permutation(n, seed, epoch) for epoch in epochs])[start - epochs[0] * n :][:batch_size]


@functools.lru_cache(maxsize=2)
def permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(hash((seed, epoch)) % 2**63))


def millions(model: nn.Module) -> str:
    """The parameters of a network, in millions."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"


# -- files -----------------------------------------------------------------------------------------------


def write_atomic(path: Path, write) -> None:
    """Call write(file) on a temporary file beside `path`, flush it to disk and rename it.

    A reader sees the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(tmp, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def write_lines(path: Path, lines: list[str]) -> None:
    write_atomic(path, lambda file: file.write("\n".join([*lines, ""]).encode()))


def load_checkpoint(path, kind: str) -> dict:
    """The checkpoint of script `kind` at `path`, on the CPU.

    Raises UserError where it is missing, damaged, unsafe or of another script.
    """
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}; a training run writes out/NAME/last.pt")
    try:
        # Tensors and plain types only: a hostile file can run nothing.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different type for each way in which a file can be broken
        cause = f"truncated, or holding code?): {reason(error)}"
        raise UserError(f"{path} is not a checkpoint that can be loaded safely ({cause}") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("kind") != kind:
        raise UserError(
            f"{path} is not a checkpoint of {kind}.py; give one that it has written (out/NAME/last.pt)"
        )
    if missing := {"config", "facts", "step", "seconds", "model", "ema", "opt", "extra"} - checkpoint.keys():
        lacks = ", ".join(sorted(missing))
        raise UserError(
            f"{path} lacks {lacks}: it was not written whole by {kind}.py; train again, or take another"
        )
    return checkpoint


def load_weights(model: nn.Module, weights: dict, path) -> None:
    """Load `weights` of the checkpoint at `path`. Raises UserError where they are another model's."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        detail = " ".join(str(error).split())[:250]
        raise UserError(f"{path} holds the weights of another model: {detail}") from error


def same_settings(cfg, saved: dict, path, way_out: str, free=FREE) -> None:
    """Raise UserError where a field of cfg outside `free` is not as the checkpoint at `path` saved it."""
    for name, value in asdict(cfg).items():
        if name not in free and value != saved.get(name):
            raise UserError(f"--{name} {value}, but {path} was trained with {saved.get(name)}: {way_out}")


def finished(cfg, out, max_steps: int, free=FREE) -> bool:
    """Whether `out` holds a checkpoint that needs no more steps. Raises UserError for other settings."""
    path = Path(out) / "last.pt"
    if not path.exists():
        return False
    checkpoint = load_checkpoint(path, cfg.kind)
    same_settings(cfg, checkpoint["config"], path, "keep it, or choose another --out", free)
    return checkpoint["step"] >= max_steps


def show(out, name: str, lines: list[str]) -> Path:
    """Print the lines and write them to samples/NAME.txt."""
    path = Path(out) / "samples" / f"{name}.txt"
    write_lines(path, lines)
    print(f"\n-- {name} --", *lines, sep="\n", flush=True)
    return path


@contextmanager
def figure(path: Path, size: tuple[float, float]):
    """A matplotlib figure and its axes, of `size` in inches, written to `path` at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=size, layout="constrained")
    yield fig, ax
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
    plt.close(fig)


# -- the loop --------------------------------------------------------------------------------------------


def ema_ramp(step: int, limit: float) -> float:
    """The EMA's decay at step 1, 2, ...: it grows to `limit`: a short run must forget its first weights."""
    return min(limit, (1 + step) / (10 + step))


class Run:
    """A training run in its folder: `for step, batch in run.steps(n): run.update(loss of run.model)`.

    cfg: a script's Config, of which seed, precision, lr, warmup, ema_decay, log_every, save_every and resume
    are read here. facts: what the data says and sampling needs, in plain types; a resumed run must agree with
    it. extra: tensors that sampling needs, kept in the checkpoint as they are (a frozen network). free: the
    fields that a resumed run may change. run.model is the network to train, run.ema the averaged one to
    sample from. Raises UserError where the folder holds a run already and cfg.resume is off, or where the two
    do not fit.
    """

    def __init__(
        self, cfg, model, device, facts: dict, out, max_steps: int, batch_size: int, extra=None, free=FREE
    ):
        self.cfg, self.facts, self.extra = cfg, facts, extra or {}
        self.device, self.out, self.max_steps, self.batch_size = device, Path(out), max_steps, batch_size
        self.step, self.seconds, self.losses = 0, 0.0, []
        self.main, self.rank, self.world = is_main(), int(os.environ.get("RANK", 0)), world_size()
        if batch_size % self.world:
            raise UserError(
                f"a batch of {batch_size} must be divisible by the {self.world} processes of torchrun"
            )
        self.net = model.to(device)
        self.ema = AveragedModel(self.net, multi_avg_fn=self._average).eval()
        fused = device.type != "mps"
        self.opt = torch.optim.AdamW(self.net.parameters(), lr=cfg.lr, weight_decay=0.0, fused=fused)
        path = self.out / "last.pt"
        self.resumed = path.exists()
        if self.resumed and not cfg.resume:
            raise UserError(f"{path} exists already: add --resume to go on with it, or choose another --out")
        if self.resumed:
            self._load(path, free)
        elif cfg.resume and self.main:
            print(f"nothing to resume: there is no {path}; starting from step 0")
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        ids = [device.index] if device.type == "cuda" else None
        self.model = DistributedDataParallel(self.net, device_ids=ids) if self.world > 1 else self.net

    def steps(self, n: int, seconds: float = math.inf):
        """Yield (step, indices of this process's part of the batch) for n samples, until max_steps.

        Or until the first line of the log after so many seconds. In between, log, save, obey signals.
        """
        signals, bar = [], None

        def on_signal(number, _):
            signals.append(number)
            signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            bar = self._begin()
            while self.step < self.max_steps and (self.seconds < seconds or self.step == 0):
                self.step += 1
                seed_step(self.cfg.seed, self.step, self.rank)
                yield self.step, self._batch(n)
                bar.update()
                self._after_step(bar, signals, seconds)
        finally:
            if bar is not None:
                bar.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _after_step(self, bar, signals: list[int], seconds: float) -> None:
        """Log and save where it is time for it; where a signal came, save, say how to go on, and exit."""
        last, stop = self.step == self.max_steps, 0
        if self.step % self.cfg.log_every == 0 or last or (signals and self.world == 1):
            stop = self._log(bar, signals[0] if signals else 0)
            last = last or self.seconds >= seconds
        if self.step % self.cfg.save_every == 0 or last or stop:
            self.save()
        if stop and not last:
            bar.close()
            if self.main:
                how = "saved; add --resume to the command to go on"
                print(f"stopped by {signal.Signals(stop).name} at step {self.step}, {how}", flush=True)
            sys.exit(128 + stop)

    def update(self, loss: Tensor) -> None:
        """One step on a scalar loss: backward, clip the gradient to norm 1, AdamW with warm-up, EMA."""
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        for group in self.opt.param_groups:
            group["lr"] = self.cfg.lr * min(1.0, self.step / max(1, self.cfg.warmup))
        self.opt.step()
        self.opt.zero_grad()
        self.ema.update_parameters(self.net)
        # Read only at the next line of the log: no wait for the device. A gradient that is not finite shows
        # too.
        self.losses.append(loss.detach() + 0 * norm)

    def save(self) -> None:
        """Write last.pt: configuration, facts, step, weights, EMA and optimizer, in plain types."""
        self._check_finite()  # so that the last good checkpoint stays the last one
        state = dict(kind=self.cfg.kind, config=asdict(self.cfg), facts=self.facts, extra=self.extra)
        state |= dict(step=self.step, seconds=self.seconds, opt=self.opt.state_dict())
        state |= dict(model=self.net.state_dict(), ema=self.ema.module.state_dict())
        if self.main:
            write_atomic(self.out / "last.pt", lambda file: torch.save(state, file))

    def took(self) -> float:
        """The training seconds up to now."""
        return self.seconds + time.perf_counter() - self.logged[1]

    @contextmanager
    def pause(self):
        """Leave what happens inside (sampling, scoring) out of the rate and of the training seconds."""
        start = time.perf_counter()
        yield
        self.logged = (self.logged[0], self.logged[1] + time.perf_counter() - start)

    def curve(self) -> Path:
        """Draw log.csv as curve.png."""
        with open(self.out / "log.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        with figure(self.out / "curve.png", (6, 4)) as (_, ax):
            ax.plot([int(row["step"]) for row in rows], [float(row["loss"]) for row in rows])
            ax.set(xlabel="step", ylabel="training loss", yscale="log", title=str(self.out))
        return self.out / "curve.png"

    def _batch(self, n: int) -> Tensor:
        local = self.batch_size // self.world
        indices = batch_indices(n, self.batch_size, self.cfg.seed, self.step)
        return indices[self.rank * local :][:local].to(self.device)

    def _average(self, ema: list, params: list, _) -> None:
        torch._foreach_lerp_(ema, params, 1 - ema_ramp(self.step, self.cfg.ema_decay))

    def _load(self, path: Path, free) -> None:
        old = load_checkpoint(path, self.cfg.kind)
        same_settings(self.cfg, old["config"], path, "keep it, or choose another --out", free)
        for name, value in self.facts.items():
            if old["facts"].get(name) != value:
                was = old["facts"].get(name)
                message = f"its {name} is {value}, but {path} was trained with {was}; choose another --out"
                raise UserError(f"--resume on other data: {message}")
        load_weights(self.net, old["model"], path)
        load_weights(self.ema.module, old["ema"], path)
        self.opt.load_state_dict(old["opt"])
        self.ema.n_averaged += old["step"]  # not zero: the next update averages, it does not copy
        self.step, self.seconds = old["step"], old["seconds"]
        if self.main:
            print(f"resumed {path} at step {self.step}")

    def _begin(self) -> tqdm:
        """Make the folder, cut log.csv to where the checkpoint stands, start the clock; the progress bar."""
        if self.main:
            self.out.mkdir(parents=True, exist_ok=True)
            write_lines(self.out / "config.json", [json.dumps(asdict(self.cfg), indent=2)])
            self.keep_rows(self.out / "log.csv", "step,loss,lr,seconds,samples_per_second")
        self.logged = (self.step, time.perf_counter())
        hidden = not (self.main and sys.stderr.isatty())
        return tqdm(total=self.max_steps, initial=self.step, unit="step", disable=hidden, dynamic_ncols=True)

    def keep_rows(self, path: Path, header: str) -> None:
        """Keep the rows of a csv file, the step in front, that the checkpoint has seen.

        A killed run may have written some that it will now write again.
        """
        rows = path.read_text(encoding="utf-8").splitlines()[1:] if self.resumed and path.exists() else []
        write_lines(path, [header, *(row for row in rows if int(row.split(",")[0]) <= self.step)])

    def _check_finite(self) -> None:
        losses = torch.stack(self.losses).float() if self.losses else torch.zeros(1, device=self.device)
        if self.world > 1:
            dist.all_reduce(losses)
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            step = self.step - len(losses) + 1 + bad[0].item()
            keeps = f"{self.out / 'last.pt'} keeps the last good state, if any"
            raise UserError(
                f"the loss or the gradient of step {step} is not finite; {keeps}: lower --lr, then --resume"
            )

    def _log(self, bar, stop: int) -> int:
        """Read the losses since the last log, write them down; return the signal that some process got, or 0.

        All processes agree on it, and on the seconds.
        """
        self._check_finite()
        loss = torch.stack(self.losses).float().mean() if self.losses else torch.zeros((), device=self.device)
        step, start = self.logged
        now = time.perf_counter()
        # The seconds are the main process's, which pauses for what it does alone.
        seconds = self.seconds + now - start if self.main else 0.0
        shared = torch.tensor([float(stop), seconds], dtype=torch.float64)
        if self.world > 1:
            shared = shared.to(self.device)
            dist.all_reduce(loss)
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        loss, stop, self.seconds = loss.item() / self.world, int(shared[0]), shared[1].item()
        self.losses, self.logged = [], (self.step, now)
        rate = (self.step - step) / (now - start)
        if self.main:
            lr = self.opt.param_groups[0]["lr"]
            with open(self.out / "log.csv", "a", newline="", encoding="utf-8") as file:
                row = [f"{loss:.6f}", f"{lr:.3g}", f"{self.seconds:.2f}", f"{rate * self.batch_size:.1f}"]
                csv.writer(file).writerow([self.step, *row])
            bar.set_postfix_str(f"loss {loss:.4f}")
            if bar.disable:
                left = (self.max_steps - self.step) / rate
                progress = f"step {self.step}/{self.max_steps}  loss {loss:.4f}"
                print(f"{progress}  {rate:.1f} steps/s  {left:.0f} s left", flush=True)
        return stop
