"""What every training loop needs once: device, precision, processes, seeds, EMA, checkpoints, log.

Every random draw of a training step is a function of (seed, step, rank), so a run that was killed at any
moment and resumed ends with the same bits as one that was not (on one device, CPU).
"""

import argparse
import functools
import gc
import io
import json
import math
import os
import re
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, fields
from pathlib import Path

import filelock
import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from files import (
    UserError,
    all_finite,
    check_types,
    figure,
    is_main,
    load_checkpoint,
    load_weights,
    printable,
    read_rows,
    reading,
    reason,
    say,
    write_atomic,
    write_lines,
)

# What a run may change when it is resumed, and a checkpoint when it is sampled from: every field of a Config
# that says nothing of what its weights have learned. All other fields are fixed, also one that is added
# tomorrow. The path of the data is free: its checksum, among the facts, says what data it is.
FREE = frozenset(
    "dataset test out device data_dir precision max_steps vae_steps diffusion_steps lr muon_lr cooldown "
    "warmup ema_decay log_every sample_every save_every resume sample_from score_from sampler order steps "
    "guidance temperature try_temperature top_p votes tries remask prompt gap length draws score_n "
    "classes n".split()
)
OF_THE_TRAINING = frozenset("seed batch_size".split())  # free too where nothing is trained

# A closed terminal sends SIGHUP, and a cluster SIGUSR1 some time before it ends a job. Windows has neither.
SIGNALS = [getattr(signal, name) for name in "SIGINT SIGTERM SIGHUP SIGUSR1".split() if hasattr(signal, name)]


def need(cfg, names: str, low: float, high: float = 10**9) -> None:
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


@contextmanager
def not_fatal(done: str):
    """Turn an error in what comes after a training, which was to be `done`, into a line: the run is whole."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError | OSError | ValueError) and not is_out_of_memory(error):
            raise
        say(f"not {done}: {error}")


def is_out_of_memory(error: Exception) -> bool:
    """Whether there was too little memory; torch says so by a RuntimeError."""
    said = re.search("(out of|not enough|allocate) memory", str(error))  # not: an illegal memory access
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and said is not None


# -- a script: from the command line to the exit status ---------------------------------------------------


def run_script(config_class, main, doc: str) -> None:
    """Read the command line and call main(cfg); a UserError is one message and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what the terminal cannot show is written out
            stream.reconfigure(errors="backslashreplace")
    try:
        with on_signals(stop_now):
            main(read_config(config_class, doc))
    except (UserError, OSError) as error:  # an OSError names the file
        fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        sizes = ", ".join(f"--{field.name}" for field in fields(config_class) if "batch" in field.name)
        fail(f"out of memory ({reason(error)}); lower {sizes}, or the size of the model or the data")
    finally:
        leave()


def fail(text: str) -> None:
    """Print an error and leave with status 2."""
    let_the_main_process_speak()
    print(f"error: {printable(text)}", file=sys.stderr)
    sys.exit(2)


def let_the_main_process_speak() -> None:
    """Wait, in the other processes of torchrun, which ends all as soon as one of them has ended."""
    if not is_main():
        time.sleep(5)


@contextmanager
def on_signals(handler):
    """Call handler(number, frame) at each of SIGNALS, but for one that is ignored (nohup).

    Python allows it in the main thread only; training in any other thread does not see signals.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def stop_now(number: int, _) -> None:
    """Leave at a signal outside of a training's steps."""
    signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
    say(f"stopped by {signal.Signals(number).name}; what was saved is kept")
    sys.exit(128 + number)


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
    parse = functools.partial(parse_flags, config_class, doc)
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
    cfg = parse(default=saved_config(config_class, saved | fresh, path))
    same_settings(cfg, saved, path, "leave the flag out", FREE | OF_THE_TRAINING)
    return cfg


def parse_flags(config_class, doc: str, default):
    """The configuration that the command line makes of `default`; the main process alone reports errors."""
    silence = io.StringIO()
    said = (sys.stdout, sys.stderr) if is_main() else (silence, silence)
    try:
        with redirect_stdout(said[0]), redirect_stderr(said[1]):
            return tyro.cli(config_class, description=doc, use_underscores=True, default=default)
    except SystemExit:
        let_the_main_process_speak()
        raise


def saved_config(config_class, saved: dict, path):
    """The configuration that a checkpoint saved. Raises UserError where it is not one of this version."""
    with reading(path):
        for field in fields(config_class):
            check_types(saved.get(field.name, field.default), field.type)
        return config_class(**saved)


def load_averaged(config_class, facts_class, build, cfg, path, device):
    """The network in a checkpoint, of the EMA weights, its facts and its training seconds.

    build(cfg, facts, device) makes the network. cfg: None for the saved configuration.
    """
    checkpoint = load_checkpoint(path, config_class.kind, facts_class)
    cfg = cfg or saved_config(config_class, checkpoint["config"], path)
    with reading(path):
        model = build(cfg, checkpoint["facts"], device)
    load_weights(model, checkpoint["ema"], path)
    return model.eval(), checkpoint["facts"], checkpoint["seconds"]


def run_name(dataset: str) -> str:
    """The name of a data set's run: its own, or that of its file or folder."""
    return Path(dataset).resolve().stem.lower()


def leave() -> None:
    """Leave the process group of torchrun, if any."""
    if dist.is_initialized():
        gc.collect()  # DDP's reference cycles would keep gloo's threads alive: at exit it aborts now and then
        dist.destroy_process_group()


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


def matrices_of(blocks) -> list[Tensor]:
    """The matrices of transformer blocks, without those of the step embedding, which are biases at work."""
    return [p for name, p in blocks.named_parameters() if p.dim() == 2 and "ada" not in name]


def millions(model: nn.Module) -> str:
    """The parameters of a network, in millions."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"


# -- the loop --------------------------------------------------------------------------------------------


def same_settings(cfg, saved: dict, path, way_out: str, free=FREE) -> None:
    """Raise UserError where a field of cfg outside `free` is not as the checkpoint at `path` saved it."""
    with reading(path):  # where tensors stand in it, nothing can be compared
        for name, value in asdict(cfg).items():
            if name not in free and value != saved.get(name):
                raise UserError(f"--{name} {value}, but {path} was trained with {saved.get(name)}: {way_out}")


def finished(cfg, out, max_steps: int, free=FREE) -> bool:
    """Whether `out` holds a checkpoint that needs no more steps. Raises UserError for other settings."""
    path = Path(out) / "last.pt"
    if not path.exists():
        return False
    if is_main():
        lock_folder(path.parent)  # for a moment, so that nobody else is in it, and for what a killed run left
    checkpoint = load_checkpoint(path, cfg.kind)
    same_settings(cfg, checkpoint["config"], path, "keep it, or choose another --out", free)
    return checkpoint["step"] >= max_steps


TEMPORARY = ".*.[0-9]*.tmp"  # as files.write_atomic names them


def lock_folder(out: Path) -> filelock.FileLock:
    """A lock on a run's folder, which the system frees when the process ends, however it ends.

    Raises UserError where another process has it. What a killed run has half written is removed.
    """
    out.mkdir(parents=True, exist_ok=True)
    name = out / ".holder"  # beside the lock, which not every system lets the others read
    holder = name.read_text(errors="replace") if name.is_file() else ""
    lock = filelock.FileLock(out / ".lock", is_singleton=True)  # one program may train here twice, in turn
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        what = f"{out} is in use by another run ({holder or 'a process that did not say who it is'})"
        raise UserError(f"{what}: wait until it ends, or choose another --out") from error
    name.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    for left in [*out.glob(TEMPORARY), *(out / "samples").rglob(TEMPORARY)]:
        left.unlink(missing_ok=True)
    return lock


def ema_ramp(step: int, limit: float) -> float:
    """The EMA's decay at step 1, 2, ...: it grows to `limit`: a short run must forget its first weights."""
    return min(limit, (1 + step) / (10 + step))


LOG = "step,loss,lr,seconds,samples_per_second"  # the columns of log.csv
# What AdamW and Muon keep of each weight, by their names in a checkpoint.
KEPT = {"opt": ("step", "exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}


class Run:
    """A training run in its folder: `for step, batch in run.steps(n): run.update(loss of run.model)`.

    cfg: a script's Config, of which seed, lr, warmup, ema_decay, log_every, save_every, sample_every and
    resume are read here. facts: what the data says and sampling needs, in plain types; a resumed run must
    agree with it. extra: tensors that sampling needs, kept in the checkpoint as they are (a frozen network).
    free: the fields that a resumed run may change. matrices: weights that Muon is to train at the rate of
    cfg.muon_lr, AdamW all others. cooldown: share of the run, the last one, in which the rates fall to 0.
    run.model is the network to train, run.ema the averaged one to sample from. Raises UserError where the
    folder holds a run already and cfg.resume is off, where the two do not fit, or where another process is at
    work in the folder.
    """

    def __init__(
        self,
        cfg,
        model,
        device,
        facts: dict,
        out,
        max_steps: int,
        batch_size: int,
        extra=None,
        free=FREE,
        matrices=(),
        cooldown: float = 0.0,
    ):
        self.cfg, self.facts, self.extra, self.cooldown = cfg, facts, extra or {}, cooldown
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
        chosen = set(matrices)
        others = [p for p in self.net.parameters() if p not in chosen]
        self.opts = {"opt": torch.optim.AdamW(others, lr=cfg.lr, weight_decay=0.0, fused=fused)}
        if matrices:
            self.opts["muon"] = torch.optim.Muon(matrices, lr=cfg.muon_lr, weight_decay=0.0)
        self.highest = {name: opt.param_groups[0]["lr"] for name, opt in self.opts.items()}  # after warm-up
        self.paused = False
        self.lock = lock_folder(self.out) if self.main else None
        path = self.out / "last.pt"
        self.resumed = path.exists()
        if self.resumed and not cfg.resume:
            raise UserError(f"{path} exists already: add --resume to go on with it, or choose another --out")
        if self.resumed:
            self._load(path, free)
        elif cfg.resume:
            say(f"nothing to resume: there is no {path}; starting from step 0")
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        ids = [device.index] if device.type == "cuda" else None
        self.model = DistributedDataParallel(self.net, device_ids=ids) if self.world > 1 else self.net

    def steps(self, n: int, seconds: float = math.inf):
        """Yield (step, indices of this process's part of the batch) for n samples, until max_steps.

        Or until the first line of the log after so many seconds. In between, log, save, obey signals.
        """
        signals, bar, self.limit = [], None, seconds

        def on_signal(number, _):
            signals.append(number)
            signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
            if self.paused:  # the step before is saved
                self._stop(number, self.step - 1)

        with on_signals(on_signal):
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
                if self.lock:
                    self.lock.release()  # what is still to come is made anew each time
            if signals:  # it came after the last step had looked for one
                self._stop(signals[0], self.step)

    def _after_step(self, bar, signals: list[int], seconds: float) -> None:
        """Log and save where it is time for it; where a signal came to any process, save, and leave."""
        stop = torch.tensor(signals[0] if signals else 0)
        if self.world > 1:  # between CPUs, so that no process waits for its device
            dist.all_reduce(stop, op=dist.ReduceOp.MAX)
        last = self.step == self.max_steps
        if self.step % self.cfg.log_every == 0 or last or stop:
            self._log(bar)
            last = last or self.seconds >= seconds
        # Before samples, too: they may need more memory than there is.
        if last or stop or 0 in (self.step % self.cfg.save_every, self.step % self.cfg.sample_every):
            self.save()
        if stop:
            bar.close()
            self._stop(stop.item(), self.step)

    def _stop(self, number: int, step: int) -> None:
        how = "saved; add --resume to the command to go on"
        say(f"stopped by {signal.Signals(number).name} at step {step}, {how}")
        sys.exit(128 + number)

    def due(self, every: int) -> bool:
        """Whether, at the start of a step, what the one before has made is to be looked at: every so often.

        It is saved by now; a run that was killed in between, and is resumed, looks again. Only in the main
        process.
        """
        return self.main and self.step > 1 and (self.step - 1) % every == 0

    def update(self, loss: Tensor) -> None:
        """One step on a scalar loss: backward, clip the gradient to norm 1, optimizers with warm-up, EMA."""
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        rate = min(1.0, self.step / max(1, self.cfg.warmup))
        if self.cooldown:
            left = min((self.max_steps + 1 - self.step) / self.max_steps, 1 - self.seconds / self.limit)
            rate = min(rate, max(0.0, left) / self.cooldown)
        for name, opt in self.opts.items():
            opt.param_groups[0]["lr"] = self.highest[name] * rate
            opt.step()
            opt.zero_grad()
        self.ema.update_parameters(self.net)
        # Read only at the next line of the log: no wait for the device. A gradient that is not finite shows
        # too.
        self.losses.append(loss.detach() + 0 * norm)

    def save(self) -> None:
        """Write last.pt: configuration, facts, step, weights, EMA and optimizer, in plain types."""
        self._check_finite()  # so that the last good checkpoint stays the last one
        if not all_finite(self._tensors()):
            raise UserError(self._not_finite("a weight, or its average,", self.step))
        state = dict(kind=self.cfg.kind, config=asdict(self.cfg), facts=self.facts, extra=self.extra)
        state |= dict(step=self.step, seconds=self.seconds)
        state |= {name: opt.state_dict() for name, opt in self.opts.items()}
        state |= dict(model=self.net.state_dict(), ema=self.ema.module.state_dict())
        if self.main:
            write_atomic(self.out / "last.pt", lambda file: torch.save(state, file))

    def took(self) -> float:
        """The training seconds up to now."""
        return self.seconds + time.perf_counter() - self.logged[1]

    @contextmanager
    def pause(self):
        """Leave what happens inside (sampling, scoring) out of the seconds and the draws of a step."""
        start, self.paused = time.perf_counter(), True
        yield
        self.paused = False
        self.logged = (self.logged[0], self.logged[1] + time.perf_counter() - start)
        seed_step(self.cfg.seed, self.step, self.rank)

    def curve(self) -> Path:
        """Draw log.csv as curve.png."""
        rows = read_rows(self.out / "log.csv", LOG).values()
        with figure(self.out / "curve.png", (6, 4)) as (_, ax):
            ax.plot([row[0] for row in rows], [row[1] for row in rows])
            ax.set(xlabel="step", ylabel="training loss", yscale="log")
            ax.set_title(printable(ascii(str(self.out))[1:-1]), parse_math=False)
        return self.out / "curve.png"

    def _batch(self, n: int) -> Tensor:
        local = self.batch_size // self.world
        indices = batch_indices(n, self.batch_size, self.cfg.seed, self.step)
        return indices[self.rank * local :][:local].to(self.device)

    def _average(self, ema: list, params: list, _) -> None:
        torch._foreach_lerp_(ema, params, 1 - ema_ramp(self.step, self.cfg.ema_decay))

    def _tensors(self) -> list[Tensor]:
        """The weights, their averages and what the optimizers keep of each."""
        tensors = [*self.net.parameters(), *self.net.buffers(), *self.ema.module.parameters()]
        for opt in self.opts.values():
            for state in opt.state.values():
                tensors += state.values()
        return tensors

    def _load(self, path: Path, free) -> None:
        old = load_checkpoint(path, self.cfg.kind)
        same_settings(self.cfg, old["config"], path, "keep it, or choose another --out", free)
        for name, value in self.facts.items():
            with reading(path):
                if (was := old["facts"].get(name)) != value:
                    message = (
                        f"its {name} is {value}, but {path} was trained with {was}; choose another --out"
                    )
                    raise UserError(f"--resume on other data: {message}")
        load_weights(self.net, old["model"], path)
        load_weights(self.ema.module, old["ema"], path)
        with reading(path):
            for name, opt in self.opts.items():
                opt.load_state_dict(opt.state_dict() | dict(state=old[name]["state"]))
                for p in opt.param_groups[0]["params"]:
                    for what in KEPT[name]:
                        if opt.state[p][what].shape != (() if what == "step" else p.shape):
                            raise ValueError("the optimizer's state is not that of these weights")
            if not all_finite(self._tensors()) or old["step"] < 1 or not 0 <= old["seconds"] < math.inf:
                raise ValueError("the optimizer's state, the step or the seconds are not finite")
        self.ema.n_averaged += old["step"]  # not zero: the next update averages, it does not copy
        self.step, self.seconds = old["step"], old["seconds"]
        say(f"resumed {path} at step {self.step}")

    def _begin(self) -> tqdm:
        """Make the folder, cut log.csv to where the checkpoint stands, start the clock; the progress bar."""
        if self.main:
            (self.out / "curve.png").unlink(missing_ok=True)  # it is drawn last, and says that all is there
            write_lines(self.out / "config.json", [json.dumps(asdict(self.cfg), indent=2)])
            self.keep_rows(self.out / "log.csv", LOG)
        self.logged = (self.step, time.perf_counter())
        hidden = not (self.main and sys.stderr.isatty())
        return tqdm(total=self.max_steps, initial=self.step, unit="step", disable=hidden, dynamic_ncols=True)

    def keep_rows(self, path: Path, header: str, new: str = "") -> None:
        """Write a csv file anew: its rows, the step in front, that the checkpoint has seen, and a new one.

        A killed run may have written some that it will now write again.
        """
        rows = read_rows(path, header) if self.resumed or new else {}
        before = int(new.split(",")[0]) if new else self.step + 1
        kept = [line for line, row in rows.items() if row[0] < before]
        write_lines(path, list(filter(None, [header, *kept, new])))

    def _check_finite(self) -> None:
        losses = torch.stack(self.losses).float() if self.losses else torch.zeros(1, device=self.device)
        if self.world > 1:
            dist.all_reduce(losses)
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            step = self.step - len(losses) + 1 + bad[0].item()
            raise UserError(self._not_finite("the loss or the gradient", step))

    def _not_finite(self, what: str, step: int) -> str:
        keeps = f"{self.out / 'last.pt'} keeps the last good state, if any"
        return f"{what} of step {step} is not finite; {keeps}: lower --lr, then --resume"

    def _log(self, bar) -> None:
        """Read the losses since the last log, write them down. All processes agree on the seconds."""
        self._check_finite()
        loss = torch.stack(self.losses).float().mean() if self.losses else torch.zeros((), device=self.device)
        step, start = self.logged
        now = time.perf_counter()
        # The seconds are the main process's, which pauses for what it does alone.
        seconds = torch.tensor(self.seconds + now - start if self.main else 0.0, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(loss)
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        self.seconds, loss = seconds.item(), loss.item() / self.world
        self.losses, self.logged = [], (self.step, now)
        rate = (self.step - step) / (now - start)
        if self.main:
            lr, path = self.opts["opt"].param_groups[0]["lr"], self.out / "log.csv"
            row = f"{self.step},{loss:.6f},{lr:.3g},{self.seconds:.2f},{rate * self.batch_size:.1f}"
            if not path.exists():  # the folder is gone: go on, the next checkpoint is worth more than it
                write_lines(path, [LOG])
            with open(path, "a", encoding="utf-8") as file:
                file.write(row + "\n")
            bar.set_postfix_str(f"loss {loss:.4f}")
            if bar.disable:
                left = (self.max_steps - self.step) / rate
                progress = f"step {self.step}/{self.max_steps}  loss {loss:.4f}"
                say(f"{progress}  {rate:.1f} steps/s  {left:.0f} s left")
