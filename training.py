"""What every training loop needs once: device, precision, DDP, seeds, EMA, checkpoints, log and curve, and the way a script exits.

Every random draw of a training step is a function of (seed, step, rank), so a run that was killed at any moment and resumed
ends with the same bits as one that was not (on one device, CPU).
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


class UserError(Exception):
    """A mistake that the user can mend: what was got, what is wanted, what to do. `run_script` prints it and exits with status 2."""


OF_THE_RUN = ("seed", "batch_size", "dataset")  # fixed while a run is resumed, though they say nothing of what its weights mean


def need(cfg, names: str, low: float, high: float = math.inf) -> None:
    """Raise ValueError where one of the fields of cfg that `names` lists, with spaces between, is not in [low, high]."""
    for name in names.split():
        if not low <= getattr(cfg, name) <= high:
            raise ValueError(f"{name} must be in [{low}, {high}], got {getattr(cfg, name)}")


def run_script(config_class, main, doc: str) -> None:
    """Read the configuration from the command line and call main(cfg); a UserError is one message and exit status 2.

    With --sample_from or --score_from, where a script has them, the defaults are those of the checkpoint, so that flags override only what they name.
    """
    parse, flags = functools.partial(tyro.cli, config_class, description=doc, use_underscores=True), argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("sample_from", "score_from"):
        flags.add_argument(f"--{name}", f"--{name.replace('_', '-')}", default="", nargs="?")
    try:
        given = flags.parse_known_args()[0]
        path = (given.sample_from or given.score_from) if hasattr(config_class, "sample_from") else ""
        if path and "--help" not in sys.argv:
            saved = load_checkpoint(path, config_class.kind)["config"]
            try:
                default = config_class(**saved | dict(out="", device=config_class.device, resume=False))
            except (TypeError, ValueError) as error:
                raise UserError(f"{path} has a configuration of another version of this script: {error}") from error
            cfg = parse(default=default)
            same_settings(cfg, saved, path, "leave the flag out", but=OF_THE_RUN)
        else:
            cfg = parse()
        main(cfg)
    except (UserError, OSError) as error:  # an OSError names the file
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        leave()


def leave() -> None:
    """Leave the process group of torchrun, if any."""
    if dist.is_initialized():
        gc.collect()  # DDP's reference cycles would keep gloo's threads until the interpreter's end, which then aborts now and then
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


def reason(error: Exception) -> str:
    """The first line of what a library raised."""
    return (str(error) or type(error).__name__).splitlines()[0][:150]


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is cuda where there is one, else mps, else cpu. Raises UserError for one that is not there."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(d for d in have if have[d]) if name == "auto" else name
    if not have[name]:
        raise UserError(f"--device {name} is not available here; choose one of {', '.join(d for d in have if have[d])}, or auto")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies in bfloat16: recent CUDA cards, and CPUs with AVX512-BF16 or AMX."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(device: torch.device, precision: str):
    """Context in which matrix products and convolutions run in bf16 ("bf16", or "auto" where the hardware has it) or float32 ("fp32")."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16" or precision == "auto" and has_bf16(device))


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Make every later draw of torch a function of (seed, step, rank)."""
    torch.manual_seed(hash((seed, step, rank)) % 2**63)  # tuples of ints hash alike in every process


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Indices (batch_size,) of step 1, 2, ...: one seeded permutation of 0..n-1 after the other, cut into batches."""
    start = (step - 1) * batch_size
    epochs = range(start // n, (start + batch_size - 1) // n + 1)
    return torch.cat([permutation(n, seed, epoch) for epoch in epochs])[start - epochs[0] * n :][:batch_size]


@functools.lru_cache(maxsize=2)
def permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(hash((seed, epoch)) % 2**63))


# -- checkpoints --------------------------------------------------------------------------------------------------------


def write_atomic(path: Path, write) -> None:
    """Call write(file) on a temporary file beside `path`, flush it to disk and rename it: a reader sees the old file or the new one."""
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


def load_checkpoint(path, kind: str) -> dict:
    """The checkpoint of script `kind` at `path`, on the CPU. Raises UserError where it is missing, damaged, unsafe or of another script."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}; a training run writes out/NAME/last.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # plain types only: a hostile file can run nothing
    except Exception as error:  # torch raises a different type for each way in which a file can be broken
        raise UserError(f"{path} is not a checkpoint that can be loaded safely (truncated, or holding code?): {reason(error)}") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("kind") != kind:
        raise UserError(f"{path} is not a checkpoint of {kind}.py; give one that {kind}.py has written (out/NAME/last.pt)")
    if missing := {"config", "facts", "step", "model", "ema", "opt"} - checkpoint.keys():
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}: it was not written whole by {kind}.py; train again, or take another")
    return checkpoint


def same_settings(cfg, saved: dict, path, way_out: str, but: tuple = ()) -> None:
    """Raise UserError where a field of cfg.fixed, but for those in `but`, is not as the checkpoint at `path` saved it."""
    for name in cfg.fixed:
        if name not in but and getattr(cfg, name) != saved.get(name):
            raise UserError(f"--{name} {getattr(cfg, name)}, but {path} was trained with {saved.get(name)}: {way_out}")


def finished(cfg) -> bool:
    """Whether cfg.out holds a checkpoint that needs no more training. Raises UserError where that has other settings than cfg in what cfg.fixed names."""
    path = Path(cfg.out) / "last.pt"
    if not path.exists():
        return False
    checkpoint = load_checkpoint(path, cfg.kind)
    same_settings(cfg, checkpoint["config"], path, "keep it, or choose another --out")
    return checkpoint["step"] >= cfg.max_steps or 0 < getattr(cfg, "seconds", 0) <= checkpoint["seconds"]


def show(out: Path, name: str, lines: list[str]) -> Path:
    """Print the lines and write them to samples/NAME.txt."""
    path = out / "samples" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, ""]))
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
    fig.savefig(path, dpi=120)
    plt.close(fig)


def load_weights(model: nn.Module, weights: dict, path) -> None:
    """Load `weights` of the checkpoint at `path`. Raises UserError where they are another model's."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        detail = " ".join(str(error).split())[:250]
        raise UserError(f"{path} holds the weights of another model: {detail}") from error


def ema_ramp(step: int, limit: float) -> float:
    """The EMA's decay at step 1, 2, ...: it grows to `limit`, so that a short run forgets its first weights."""
    return min(limit, (1 + step) / (10 + step))


# -- the loop -----------------------------------------------------------------------------------------------------------


class Run:
    """One training run in its folder cfg.out: `for step, batch in run.steps(n): run.update(loss of run.model on batch)`.

    cfg: a script's Config with out, seed, device, precision, compile, max_steps, batch_size, lr, warmup, ema_decay, log_every,
    save_every and resume, and the class constants kind (the script's name) and fixed (fields that a resumed run may not change). facts: what the
    data says and sampling needs (plain types); a resumed run must agree with it. extra: tensors that sampling needs, kept in the
    checkpoint as they are (a frozen network). run.model is the network to train, run.ema the averaged one to sample from.
    Raises UserError where the folder holds a run already and cfg.resume is off, or where the two do not fit.
    """

    def __init__(self, cfg, model: nn.Module, device: torch.device, facts: dict, extra: dict | None = None):
        self.cfg, self.kind, self.device, self.facts, self.extra = cfg, cfg.kind, device, facts, extra or {}
        self.out, self.step, self.seconds, self.losses = Path(cfg.out), 0, 0.0, []
        self.rank, self.world = int(os.environ.get("RANK", 0)), world_size()
        if cfg.batch_size % self.world:
            raise UserError(f"--batch_size {cfg.batch_size} must be divisible by the {self.world} processes of torchrun")
        self.net = model.to(device)
        self.ema = AveragedModel(self.net, multi_avg_fn=self._average).eval()
        self.opt = torch.optim.AdamW(self.net.parameters(), lr=cfg.lr, weight_decay=0.0, fused=device.type != "mps")
        path = self.out / "last.pt"
        if path.exists() and not cfg.resume:
            raise UserError(f"{path} exists already: add --resume to go on with that run, or choose another folder with --out")
        self.resumed = path.exists()
        if self.resumed:
            self._load(path)
        elif cfg.resume and self.main:
            print(f"nothing to resume: there is no {path}; starting from step 0")
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if cfg.compile:
            self.net.compile()  # in place: names in the checkpoint stay plain
        ids = [device.index] if device.type == "cuda" else None
        self.model = DistributedDataParallel(self.net, device_ids=ids) if self.world > 1 else self.net

    @property
    def main(self) -> bool:
        return is_main()

    def steps(self, n: int, seconds: float = math.inf):
        """Yield (step, indices of this process's part of the batch) for n samples, until max_steps, or the first line of the log after so
        many training seconds; log, save and stop at signals in between."""
        cfg, local, signals = self.cfg, self.cfg.batch_size // self.world, []

        def on_signal(number, _):
            signals.append(number)
            signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

        before = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        if self.main:
            self.out.mkdir(parents=True, exist_ok=True)
            write_atomic(self.out / "config.json", lambda f: f.write(json.dumps(asdict(cfg), indent=2).encode()))
            self._trim_log()
        bar = tqdm(total=cfg.max_steps, initial=self.step, unit="step", disable=not (self.main and sys.stderr.isatty()), dynamic_ncols=True)
        self.logged = (self.step, time.perf_counter())
        try:
            while self.step < cfg.max_steps and (self.seconds < seconds or not self.step):
                self.step += 1
                part = slice(self.rank * local, (self.rank + 1) * local)
                indices = batch_indices(n, cfg.batch_size, cfg.seed, self.step)[part].to(self.device)
                seed_step(cfg.seed, self.step, self.rank)
                yield self.step, indices
                bar.update()
                last, stop = self.step == cfg.max_steps, 0
                if self.step % cfg.log_every == 0 or last or (signals and self.world == 1):
                    stop = self._log(bar, signals[0] if signals else 0)
                    last = last or self.seconds >= seconds
                if self.step % cfg.save_every == 0 or last or stop:
                    self.save()
                if stop and not last:
                    bar.close()
                    if self.main:
                        print(f"stopped by {signal.Signals(stop).name} at step {self.step}, saved; add --resume to the command to go on", flush=True)
                    sys.exit(128 + stop)
        finally:
            bar.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def update(self, loss: Tensor) -> None:
        """One optimizer step on a scalar loss: backward, clip the gradient's norm to 1, AdamW with linear warm-up, EMA. The loss is read later."""
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        for group in self.opt.param_groups:
            group["lr"] = self.cfg.lr * min(1.0, self.step / max(1, self.cfg.warmup))
        self.opt.step()
        self.opt.zero_grad()
        self.ema.update_parameters(self.net)
        self.losses.append(loss.detach() + 0 * norm)  # a gradient that is not finite shows too

    def save(self) -> None:
        """Write last.pt: config, facts, step, weights, EMA and optimizer, as tensors and plain types."""
        self._check_finite()  # so that the last good checkpoint stays the last one
        state = dict(kind=self.kind, config=asdict(self.cfg), facts=self.facts, step=self.step, seconds=self.seconds, extra=self.extra)
        state |= dict(model=self.net.state_dict(), ema=self.ema.module.state_dict(), opt=self.opt.state_dict())
        if self.main:
            write_atomic(self.out / "last.pt", lambda f: torch.save(state, f))

    def _average(self, ema: list, params: list, _) -> None:
        torch._foreach_lerp_(ema, params, 1 - ema_ramp(self.step, self.cfg.ema_decay))

    def _load(self, path: Path) -> None:
        old = load_checkpoint(path, self.kind)
        same_settings(self.cfg, old["config"], path, "keep it, or choose another --out")
        for name, value in self.facts.items():
            if old["facts"].get(name) != value:
                raise UserError(f"--resume on other data: its {name} is {value}, but {path} was trained with {old['facts'].get(name)}; choose another --out")
        load_weights(self.net, old["model"], path)
        load_weights(self.ema.module, old["ema"], path)
        self.opt.load_state_dict(old["opt"])
        self.ema.n_averaged += old["step"]  # not zero: the next update averages, it does not copy
        self.step, self.seconds = old["step"], old["seconds"]
        if self.main:
            print(f"resumed {path} at step {self.step}")

    def _check_finite(self) -> None:
        losses = torch.stack(self.losses).float() if self.losses else torch.zeros(1, device=self.device)
        if self.world > 1:
            dist.all_reduce(losses)
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            step = self.step - len(losses) + 1 + bad[0].item()
            raise UserError(f"the loss or the gradient of step {step} is not finite; {self.out / 'last.pt'} keeps the last good state, if any: lower --lr, then --resume")

    def _log(self, bar, stop: int) -> int:
        """Read the losses since the last log, write them down, and return the signal that some process got, or 0: all agree on it, and on the seconds."""
        self._check_finite()
        losses = torch.stack(self.losses).mean().cpu() if self.losses else torch.zeros(())
        step, start = self.logged
        now = time.perf_counter()
        state = torch.tensor(losses.item(), device=self.device)
        seconds = self.seconds + now - start if self.main else 0.0  # the main process's, which pauses for what it does alone
        shared = torch.tensor([stop, seconds], dtype=torch.float64, device=self.device if self.device.type != "mps" else "cpu")
        if self.world > 1:
            dist.all_reduce(state)
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        state, stop, self.seconds = state.item() / self.world, int(shared[0]), shared[1].item()
        self.losses, self.logged = [], (self.step, now)
        rate = (self.step - step) / (now - start)
        if self.main:
            with open(self.out / "log.csv", "a", newline="") as file:
                row = [self.step, f"{state:.6f}", f"{self.opt.param_groups[0]['lr']:.3g}", f"{self.seconds:.2f}", f"{rate * self.cfg.batch_size:.1f}"]
                csv.writer(file).writerow(row)
            bar.set_postfix_str(f"loss {state:.4f}")
            if bar.disable:
                left = (self.cfg.max_steps - self.step) / rate
                print(f"step {self.step}/{self.cfg.max_steps}  loss {state:.4f}  {rate:.1f} steps/s  {left:.0f} s left", flush=True)
        return stop

    @contextmanager
    def pause(self):
        """Leave what happens inside (sampling, scoring) out of the rate and of the training seconds."""
        start = time.perf_counter()
        yield
        self.logged = (self.logged[0], self.logged[1] + time.perf_counter() - start)

    def _trim_log(self) -> None:
        """Keep of log.csv what the checkpoint has seen: a killed run may have logged steps that it will now do again."""
        path, header = self.out / "log.csv", "step,loss,lr,seconds,samples_per_second"
        rows = path.read_text().splitlines()[1:] if self.resumed and path.exists() else []
        rows = [r for r in rows if int(r.split(",")[0]) <= self.step]
        write_atomic(path, lambda f: f.write("\n".join([header, *rows, ""]).encode()))

    def curve(self) -> Path:
        """Draw log.csv as curve.png."""
        rows = list(csv.DictReader(open(self.out / "log.csv")))
        with figure(self.out / "curve.png", (6, 4)) as (_, ax):
            ax.plot([int(r["step"]) for r in rows], [float(r["loss"]) for r in rows])
            ax.set(xlabel="step", ylabel="training loss", yscale="log", title=str(self.out))
        return self.out / "curve.png"
