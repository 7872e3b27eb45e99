"""What every script needs once: settings, device, the training loop, checkpoints.

The draws of a step follow from (seed, step, rank): a run that is killed and resumed ends with the same bits,
on one device and the same number of threads.
"""

import copy
import gc
import math
import os
import signal
import sys
import time
import zipfile
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
import tyro
from filelock import FileLock, Timeout
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

RANK, WORLD = 0, 1
if dist.is_torchelastic_launched():  # else these two are left over from something else
    RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
WARMUP, CLIP, EMA, LOG_EVERY = 100, 1.0, 0.999, 50
MUON_LR = 0.02  # Muon's learning rate after warm-up
PROGRESS = ("step", "seconds", "losses", "rows")  # attributes of a Run that its checkpoint keeps
# Settings that a resumed run may change; all others must be those the checkpoint was trained with.
FREE = frozenset(
    "dataset out data_dir max_steps vae_steps diffusion_steps lr precision compile sample_every "
    "save_every resume load sampler order steps guidance temperature try_temperature tries judge prompt gap "
    "length samples classes score_n distill pairs".split()
)
FREE_TO_SAMPLE = FREE | {"seed", "loops", "test", "batch_size", "diffusion_batch"}  # with --load


class UserError(Exception):
    """A mistake the user can fix: what we got, what is wrong, what to do. Exit status 2, no traceback."""


def log(text):
    """Print in the main process."""
    if RANK == 0:
        with suppress(OSError):  # a training outlives its terminal
            print(text, flush=True)


def run_script(Config, main, doc):
    """Call main(cfg): flags override the recipe for the size or data set, or the settings of a checkpoint."""
    try:
        parse = partial(tyro.cli, Config, description=doc, use_underscores=True)
        first = parse()
        distill = getattr(first, "distill", None)
        if first.load and (first.resume or distill):
            raise UserError("--load samples from a checkpoint, --resume and --distill train: choose one")
        if path := first.load or distill:
            new = Config.DISTILL if distill else dict(score_n=0, resume=False)
            with open_checkpoint(path, Config) as saved:
                cfg = parse(default=Config(**saved["config"] | new))
            same_settings(cfg, saved["config"], path, FREE_TO_SAMPLE)
        else:
            recipe = Config.RECIPES.get(getattr(first, "size", None)) or Config.RECIPES.get(first.dataset, {})
            cfg = parse(default=Config(**recipe))
        main(cfg)
    except (UserError, OSError) as error:
        if RANK == 0:
            print(f"error: {error}", file=sys.stderr)
        else:
            time.sleep(5)  # torchrun ends all processes with the first: let the main one print
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            gc.collect()  # DDP's reference cycles keep gloo's threads alive, which can abort at exit
            dist.destroy_process_group()


def check_config(cfg, *rules):
    """Raise UserError for a number out of range, or a rule that does not hold."""
    for name, value in asdict(cfg).items():
        least = 1 if type(value) is int and name not in ("seed", "score_n", "vocab") else 0
        most = 1 if name in ("label_drop", "p_max", "self_condition", "snapshot") else 10**9
        if type(value) in (int, float) and not least <= value <= most:
            raise UserError(f"--{name} must be from {least} to {most}, got {value}")
        if name == "width" and value % 16:
            raise UserError(f"--width must be divisible by 16, got {value}")
    for holds, hint in rules:
        if not holds:
            raise UserError(hint)


def is_builtin(dataset, names):
    """Whether a data set is one of the built-in names. UserError if it is also a path."""
    if dataset in names and Path(dataset).exists():
        raise UserError(f"--dataset {dataset} is built in, and a path here too: for the path ./{dataset}")
    return dataset in names


def resolve_out(cfg):
    """cfg with the name of its data set in cfg.out. UserError for a folder inside the data."""
    data = Path(os.path.abspath(os.path.expanduser(cfg.dataset)))
    name = data.stem if data.is_file() else data.name
    out = os.path.expanduser(cfg.out.replace("{dataset}", name))
    if data.is_dir() and Path(os.path.abspath(out)).is_relative_to(data):
        raise UserError(f"--out {out} is inside {data}, and would become data: choose another folder")
    return replace(cfg, out=out)


def pick_device(device=None):
    """The device asked for; by default cuda or mps where there is one, else cpu."""
    device = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if device.type != "cpu" and WORLD > 1:
        if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.accelerator.device_count():
            raise UserError(f"each process needs its own {device.type} device: lower --nproc_per_node")
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    return device


def autocast(device, precision):
    """Matrix products in bfloat16 ("bf16"; "auto": where the hardware has it) or float32 ("fp32")."""
    hardware = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    if device.type == "cuda":  # older cards emulate it
        hardware = torch.cuda.is_bf16_supported(including_emulation=False)
    wanted = precision == "bf16" or precision == "auto" and hardware
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def write_atomic(path, write):
    """Call write(file) on a temporary file and rename it: a reader sees the old file or the new one."""
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as error:  # torch.save: the latter, in place of the former
        with suppress(OSError):
            tmp.unlink()  # half of a file may fill a disk
        raise UserError(f"{path} could not be written, old one kept: {error.__context__ or error}") from error


@contextmanager
def open_checkpoint(path, Config):
    """`with open_checkpoint(path, Config) as saved:` reads a checkpoint that this script wrote.
    What goes wrong with its contents, also inside the `with`, becomes a UserError. No code in it can run."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}: a run writes last.pt into its folder")
    try:
        with zipfile.ZipFile(path) as file:  # torch writes a CRC for each tensor but never checks it
            if damaged := file.testzip():
                raise ValueError(f"{damaged} is damaged")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["script"] != Config.script:
            raise ValueError(f"it belongs to {saved['script']}.py, not to {Config.script}.py")
        yield saved | dict(config=asdict(Config(**saved["config"])))
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any type: a file can be damaged, or made up, in any way
        raise UserError(f"{path} is not a checkpoint that fits here: {error!r:.400}") from error


def load_model(Config, build, path, device=None, cfg=None):
    """Process, model (what `build` makes of them, with the averaged weights) and facts of a checkpoint."""
    with open_checkpoint(path, Config) as saved:
        process, model = build(cfg or Config(**saved["config"]), saved["facts"], pick_device(device))
        model.load_state_dict(saved["ema"])
    return process, model.eval(), saved["facts"]


def same_settings(cfg, saved, path, free):
    for name, now in asdict(cfg).items():
        if name not in free and now != saved[name]:
            raise UserError(f"--{name} {now}, but {path} was trained with {saved[name]}: give that")


@dataclass(frozen=True)
class Flags:  # of every script
    out: str = "out/{dataset}"  # folder
    seed: int = 0  # of weights, batches, noise and samples
    save_every: int = 250  # steps between checkpoints
    resume: bool = False  # continue the run in the folder
    load: str | None = None  # sample or answer from this checkpoint, do not train
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto is bf16 where the hardware has it
    compile: Literal["auto", "on", "off"] = "auto"  # auto is on for long runs with CUDA
    RECIPES: ClassVar = {}  # settings for a data set or a size


@lru_cache(maxsize=2)
def permutation(n, seed):
    """The numbers 0..n-1 in an order that the seed decides."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def batch_indices(n, batch_size, seed, step):
    """Indices (batch_size,) of step 1, 2, ...: permutations of 0..n-1, in turn, cut into batches."""
    start = (step - 1) * batch_size
    epochs = range(start // n, (start + batch_size - 1) // n + 1)
    order = torch.cat([permutation(n, hash((seed, epoch)) % 2**63) for epoch in epochs])
    return order[start - epochs[0] * n :][:batch_size]


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by five Newton-Schulz steps. kellerjordan.github.io/posts/muon; 2502.16982.
    torch.optim.Muon does these in bfloat16, which takes 12 times as long on a CPU that emulates it."""

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            m = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)).lerp_(p.grad, 0.05)
            x, ratio = nn.functional.normalize(p.grad.lerp(m, 0.95), dim=(0, 1)), p.shape[0] / p.shape[1]
            x = x.T if ratio > 1 else x
            for _ in range(5):
                A = x @ x.T
                x = 3.4445 * x + (2.0315 * A @ A - 4.775 * A) @ x
            p.sub_(x.T if ratio > 1 else x, alpha=self.param_groups[0]["lr"] * max(1, ratio) ** 0.5)


class Run(AbstractContextManager):
    """A training run and its folder, which is locked until the end of the `with`.
        with Run(cfg, model, facts, device) as run:
            for step, batch in run.steps(len(data)):
                run.update(loss of run.model on data[batch])

    run.model is the network to train, run.ema the averaged one to sample from. facts: what sampling needs to
    know about the data; extra: what else it needs. muon: matrices that Muon trains in place of AdamW.
    cooldown: share of the steps in which the rates fall to 0. free: more settings that a resumed run may
    change. sizes: (steps, batch) instead of cfg's. A finished run has no steps left. Raises UserError for a
    folder in use, or with another run."""

    def __init__(self, cfg, model, facts, device, *, cooldown=0.0, muon=(), extra=None, free=(), sizes=None):
        self.cfg, self.facts, self.extra, self.cooldown = resolve_out(cfg), facts, extra or {}, cooldown
        self.device, self.out = device, Path(self.cfg.out)
        self.max_steps, self.batch_size = sizes or (cfg.max_steps, cfg.batch_size)
        if self.batch_size % WORLD:
            raise UserError(f"a batch of {self.batch_size} cannot be shared by {WORLD} processes")
        self.net, self.ema = model, copy.deepcopy(model).eval().requires_grad_(False)
        others = [p for p in model.parameters() if p not in set(muon)]
        self.opts = [torch.optim.AdamW(others, cfg.lr, weight_decay=0, fused=device.type in ("cpu", "cuda"))]
        if muon:
            self.opts += [Muon(muon, dict(lr=MUON_LR))]
        self.step, self.seconds, self.losses, self.rows = 0, 0.0, [], []  # rows: of log.csv
        self.signal, self.handlers = 0, {}
        self.lock = FileLock(self.out / ".lock")
        try:
            self._open(FREE | set(free))
            self._compile()
        except BaseException:
            self.lock.release()
            raise
        self.model = DistributedDataParallel(model) if WORLD > 1 else model

    def _compile(self):
        """Compile the network; "auto" is on CUDA, where enough steps are left to pay for it."""
        cuda, wanted = self.device.type == "cuda", self.cfg.compile
        if wanted == "on" or wanted == "auto" and cuda and self.max_steps - self.step >= 5000:
            try:
                torch.compile(torch.sin)(torch.ones(1, device=self.device))
            except Exception as error:  # of several types
                raise UserError(f"no compiler works here, add --compile off: {error!r:.400}") from error
            self.net.compile(mode="reduce-overhead" if cuda else "default")  # the former: CUDA graphs

    def _open(self, free):
        """Lock the folder, and load the checkpoint in it."""
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            if RANK == 0:
                self.lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(f"{self.out} is in use by another run: wait, or choose another --out") from error
        path = self.out / "last.pt"
        if path.exists():
            self._load(path, free)
            if self.step < self.max_steps and not self.cfg.resume:
                raise UserError(f"{path} is unfinished: add --resume to continue it, or choose another --out")
        if WORLD > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")

    def __exit__(self, kind, error, _):
        self._restore_handlers()
        self.lock.release()
        if kind is torch.OutOfMemoryError:
            raise UserError(f"a batch of {self.batch_size} does not fit, half of it may: {error}") from error

    def steps(self, n):
        """Yield (step, indices of this process's share of the batch) for n samples; save on the way.
        SIGINT and SIGTERM let the step finish, save and exit; a second one acts at once."""
        share = self.batch_size // WORLD
        with suppress(ValueError):  # not the main thread: then signals are not ours
            numbers = signal.SIGINT, signal.SIGTERM
            self.handlers = {number: signal.signal(number, self._on_signal) for number in numbers}
        hidden = RANK > 0 or not (sys.stderr and sys.stderr.isatty())
        with tqdm(total=self.max_steps, initial=self.step, disable=hidden) as bar:
            while self.step < self.max_steps:
                self.step += 1
                torch.manual_seed(hash((self.cfg.seed, self.step, RANK)) % 2**63)
                batch = batch_indices(n, self.batch_size, self.cfg.seed, self.step)
                self.start = time.perf_counter()
                batch = batch[RANK * share :][:share]
                # From pinned memory the copy does not wait for the device.
                batch = batch.pin_memory() if self.device.type == "cuda" else batch
                yield self.step, batch.to(self.device, non_blocking=True)
                bar.update()
                stop = torch.tensor(self.signal)  # the number of a signal that came to any process, or 0
                if WORLD > 1:
                    dist.all_reduce(stop, op=dist.ReduceOp.MAX)
                if stop or self.step % self.cfg.save_every == 0 or self.step == self.max_steps:
                    self.save()
                if stop:
                    log(f"stopped at step {self.step} and saved: add --resume to the command to continue")
                    sys.exit(128 + int(stop))
        self._restore_handlers()

    def _on_signal(self, number, _):
        self.signal = number
        if WORLD == 1:  # torchrun repeats a signal to its processes
            self._restore_handlers()

    def _restore_handlers(self):
        while self.handlers:
            signal.signal(*self.handlers.popitem())

    def due(self, every):
        """Whether the main process samples or scores after this step."""
        return RANK == 0 and self.step % every == 0 and not self.signal

    def update(self, loss):
        """One step of the optimizers on a scalar loss, then of the EMA."""
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), CLIP)
        rate = min(1.0, self.step / (WARMUP * len(self.opts)))  # with Muon twice as long
        if self.cooldown:
            rate = min(rate, (self.max_steps + 1 - self.step) / self.max_steps / self.cooldown)
        for opt in self.opts:
            opt.param_groups[0]["lr"] = opt.defaults["lr"] * rate
            opt.step()
            opt.zero_grad()
        # A short run must forget its first weights: the decay rises, and the first step copies.
        decay = min(EMA, (1 + self.step) / (10 + self.step)) if self.step > 1 else 0.0
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.net.parameters()), 1 - decay)
        self.losses.append(loss.detach() + 0 * norm)  # not finite where the gradient is not
        if self.step % LOG_EVERY == 0 or self.step == self.max_steps:
            self._log(rate * self.cfg.lr)
        else:
            self.seconds += time.perf_counter() - self.start

    def _log(self, lr):
        loss, self.losses = torch.stack(self.losses).mean(), []
        if WORLD > 1:
            dist.all_reduce(loss)
        loss = loss.item() / WORLD  # waits for the device
        self.seconds += time.perf_counter() - self.start
        if not math.isfinite(loss):
            raise UserError(f"the loss is not finite by step {self.step}: lower --lr; any last.pt is older")
        log(f"step {self.step}/{self.max_steps}  loss {loss:.4f}  {self.seconds:.0f} s")
        self.rows.append(f"{self.step},{loss:.6f},{lr:.3g},{self.seconds:.2f}")
        if RANK == 0:
            text = "\n".join(["step,loss,lr,seconds", *self.rows, ""])
            write_atomic(self.out / "log.csv", lambda file: file.write(text.encode()))

    def save(self):
        """Write last.pt. UserError for a weight that is not finite."""
        if not all(p.isfinite().all() for p in self.net.parameters()):
            raise UserError(f"weights of step {self.step} are not finite: lower --lr; any last.pt is older")
        state = dict(script=self.cfg.script, config=asdict(self.cfg), facts=self.facts, extra=self.extra)
        state |= dict(model=self.net.state_dict(), ema=self.ema.state_dict())
        state["opts"] = [opt.state_dict()["state"] for opt in self.opts]
        state |= {name: getattr(self, name) for name in PROGRESS}
        if RANK == 0:
            write_atomic(self.out / "last.pt", lambda file: torch.save(state, file))

    def _load(self, path, free):
        with open_checkpoint(path, type(self.cfg)) as old:
            same_settings(self.cfg, old["config"], path, free)
            if old["facts"] != self.facts:
                raise UserError(f"{path} was trained on other data: choose another --out")
            self.net.load_state_dict(old["model"])
            self.ema.load_state_dict(old["ema"])
            for opt, state in zip(self.opts, old["opts"], strict=True):
                opt.load_state_dict(opt.state_dict() | dict(state=state))
            vars(self).update({name: old[name] for name in PROGRESS})
            self.losses = [loss.to(self.device) for loss in self.losses]
        log(f"loaded {path}, step {self.step} of {self.max_steps}")
