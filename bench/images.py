"""Image diffusion beside its peers, on the same data, device and training seconds.

    pip install -r requirements-dev.txt
    python -m bench.images                  FashionMNIST from ./data; about an hour on a CPU
    python -m bench.images --seconds 0      speed only, about 4 minutes

Peers: diffusers' UNet2DModel and denoising-diffusion-pytorch's Unet, each with its own loss, at comparable
parameter counts. All are unconditional and share the batch, optimizer, learning rate, warm-up, clipping and
EMA of imagen.py; what differs is the network, the recipe, and that ours runs in bf16 where the hardware has
it (but for the row "ours, fp32") while the peers run as they come, in float32.
"""

import csv
import functools
import math
import multiprocessing
import platform
import re
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode

import imagen
import metrics
from bench.timing import interleaved, spread, synchronize
from data import load_images
from diffusion import sample
from files import UserError, figure
from training import autocast, batch_indices, ema_ramp, need, pick_device, run_script


@dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    dataset: str = "fashionmnist"  # any of imagen.py's with classes, one channel and sides divisible by 4
    data_dir: str = "data"  # where torchvision finds its data sets, or puts them
    batch_size: int = 64  # images of a training step
    rounds: int = 7  # interleaved rounds of the speed measurement
    round_steps: int = 4  # training steps of each side in a round
    seconds: float = (
        480.0  # training seconds of each side, scored after a quarter, a half and all; 0: speed only
    )
    seeds: tuple[int, ...] = (0,)  # of the scored training runs
    score_n: int = 250  # samples of a score; at most the number of training images
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda where there is one, else mps or cpu
    out: str = "out/bench/images"  # folder of the table, the figure and the sample grids

    def __post_init__(self):
        need(self, "rounds round_steps batch_size", 1)
        need(self, "seconds", 0)
        need(self, "score_n", 10)
        if not self.seeds:
            raise ValueError("give at least one seed")


class Ours:
    """imagen.py's UNet; `textbook` keeps the network and takes DDPM's recipe (eps, linear betas, plain)."""

    evaluations, usual = 10, 10  # of a scored sample, and as one would use it

    def __init__(self, size: int, device, textbook: bool = False, precision: str = "auto"):
        recipe = dict(predict="eps", schedule="linear", weight="plain") if textbook else {}
        seed = torch.initial_seed() % 2**31  # weights drawn as the peers draw theirs
        self.cfg = imagen.Config(precision=precision, seed=seed, **recipe)
        self.process, self.model = imagen.build(self.cfg, dict(shape=[1, size, size], names=[]), device)
        self.device = device

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model(x, t)

    def loss(self, x: Tensor) -> Tensor:
        with autocast(self.device, self.cfg.precision):
            return self.process.loss(self.model, x).mean()

    def sample(self, model, shape, generator, evaluations: int) -> Tensor:
        settings = dict(sampler="dpm++", steps=evaluations, clip=1.0, generator=generator)
        with autocast(self.device, self.cfg.precision):
            return sample(self.process, model, shape, **settings)


class Diffusers:
    """diffusers' UNet2DModel, DDPMScheduler's training noise and DDIMScheduler's steps."""

    evaluations, usual = 50, 1000

    def __init__(self, size: int, device):
        import diffusers

        self.model = diffusers.UNet2DModel(
            sample_size=size,
            in_channels=1,
            out_channels=1,
            block_out_channels=(24, 48, 96),
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        ).to(device)
        self.noise = diffusers.DDPMScheduler(1000)
        self.ddim = diffusers.DDIMScheduler(1000, timestep_spacing="trailing")

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model(x, t).sample

    def loss(self, x: Tensor) -> Tensor:
        eps, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),), device=x.device)
        return F.mse_loss(self.forward(self.noise.add_noise(x, eps, t), t), eps)

    @torch.no_grad()
    def sample(self, model, shape, generator, evaluations: int) -> Tensor:
        device = next(model.parameters()).device
        x = torch.randn(shape, generator=generator).to(device)
        self.ddim.set_timesteps(evaluations)
        for t in self.ddim.timesteps:
            x = self.ddim.step(model(x, t).sample, t, x).prev_sample
        return x


class Lucidrains:
    """denoising-diffusion-pytorch's Unet and GaussianDiffusion with their defaults (v, sigmoid schedule)."""

    evaluations, usual = 50, 1000

    def __init__(self, size: int, device):
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet, denoising_diffusion_pytorch

        denoising_diffusion_pytorch.tqdm = lambda steps, **_: steps  # no bar for each of its loops
        self.model = Unet(dim=28, dim_mults=(1, 2, 4), channels=1).to(device)
        self.process = GaussianDiffusion(self.model, image_size=size, sampling_timesteps=50).to(device)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model(x, t)

    def loss(self, x: Tensor) -> Tensor:
        return self.process((x + 1) / 2)  # it wants [0, 1]

    @torch.no_grad()
    def sample(self, model, shape, generator, evaluations: int) -> Tensor:
        self.process.model, self.process.sampling_timesteps = model, evaluations
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        x = self.process.ddim_sample(shape)
        self.process.model = self.model
        return x * 2 - 1


def textbook(size: int, device) -> Ours:
    return Ours(size, device, textbook=True)


def float32(size: int, device) -> Ours:
    return Ours(size, device, precision="fp32")


TIMED = {
    "ours": Ours,
    "ours, fp32": float32,
    "diffusers": Diffusers,
    "denoising-diffusion-pytorch": Lucidrains,
}
SCORED = {
    "ours": Ours,
    "ours, textbook recipe": textbook,
    "diffusers": Diffusers,
    "denoising-diffusion-pytorch": Lucidrains,
}


class Trainer:
    """A side with imagen.py's optimizer, learning rate, warm-up, clipping and EMA."""

    def __init__(self, side, x: Tensor, batch_size: int, seed: int):
        self.side, self.x, self.batch_size, self.seed, self.step = side, x, batch_size, seed, 0
        self.cfg, self.params = imagen.Config(), list(side.model.parameters())
        fused = x.device.type != "mps"
        self.opt = torch.optim.AdamW(self.params, lr=self.cfg.lr, weight_decay=0.0, fused=fused)
        self.ema = AveragedModel(side.model, multi_avg_fn=self.average).eval()

    def average(self, ema: list, params: list, _) -> None:
        torch._foreach_lerp_(ema, params, 1 - ema_ramp(self.step, self.cfg.ema_decay))

    def train_step(self) -> None:
        self.step += 1
        batch = batch_indices(len(self.x), self.batch_size, self.seed, self.step).to(self.x.device)
        self.side.loss(metrics.scale(self.x[batch])).backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.opt.param_groups[0]["lr"] = self.cfg.lr * min(1, self.step / self.cfg.warmup)
        self.opt.step()
        self.opt.zero_grad()
        self.ema.update_parameters(self.side.model)


# -- speed -----------------------------------------------------------------------------------------------


def resident_peak() -> float:
    """MiB of this process's largest resident size; Linux only, as getrusage counts the parent's too."""
    if sys.platform != "linux":
        return math.nan
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def peak_memory(name: str, size: int, batch_size: int, device_name: str, pipe) -> None:
    """In a process of its own: MiB that three training steps add to the peak (CUDA: that they allocate)."""
    device = pick_device(device_name)
    x = torch.zeros(256, 1, size, size, dtype=torch.uint8, device=device)
    trainer, before = Trainer(TIMED[name](size, device), x, batch_size, 0), resident_peak()
    for _ in range(3):
        trainer.train_step()
    on_cuda = device.type == "cuda"
    pipe.send(torch.cuda.max_memory_allocated() / 2**20 if on_cuda else resident_peak() - before)


def memory_of(name: str, size: int, cfg: Config) -> float:
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=peak_memory, args=(name, size, cfg.batch_size, cfg.device, there))
    process.start()
    there.close()  # so that a child that dies is an error here, not a wait for ever
    peak = here.recv()
    process.join()
    return peak


def speed(cfg: Config, x: Tensor, device) -> None:
    """Print size, speed, memory and sampling time of every side; ratios are taken round by round."""
    size = x.shape[-1]
    trainers = {name: Trainer(make(size, device), x, cfg.batch_size, 0) for name, make in TIMED.items()}

    def train(trainer, _) -> None:
        for _ in range(cfg.round_steps):
            trainer.train_step()

    def draw(trainer, r: int) -> None:
        trainer.side.sample(trainer.ema, (64, 1, size, size), torch.Generator().manual_seed(r), 10)

    training = {name: functools.partial(train, trainer) for name, trainer in trainers.items()}
    drawing = {name: functools.partial(draw, trainer) for name, trainer in trainers.items()}
    trained, drawn = interleaved(training, cfg.rounds, device), interleaved(drawing, 3, device)
    head = "side, M parameters, MFLOP an image, images/s in training, ours / it, peak MiB, usual evaluations"
    head = [*head.split(", "), "s for 64 samples (from 10 evaluations)"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for name, trainer in trainers.items():
        side, one = trainer.side, torch.ones(1, dtype=torch.long, device=device)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            side.forward(torch.zeros(1, 1, size, size, device=device), one)
        images = cfg.round_steps * cfg.batch_size
        ratios = [theirs / ours for theirs, ours in zip(trained[name], trained["ours"], strict=True)]
        cells = [
            name,
            f"{sum(p.numel() for p in side.model.parameters()) / 1e6:.2f}",
            f"{counter.get_total_flops() / 1e6:.0f}",
            f"{images / np.median(trained[name]):.0f}",
            spread(ratios),
            f"{memory_of(name, size, cfg):.0f}",
            f"{side.usual}",
            f"{np.median(drawn[name]) * side.usual / 10:.1f}",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)


# -- quality ---------------------------------------------------------------------------------------------


def score_side(trainer: Trainer, name: str, cfg: Config, images, net, device) -> dict:
    """The scores of score_n samples of a side as it is; the first fifty are drawn."""
    generator, parts = torch.Generator().manual_seed(trainer.seed), []
    for n in torch.zeros(cfg.score_n).split(100):
        shape = (len(n), *images.x.shape[1:])
        x0 = trainer.side.sample(trainer.ema, shape, generator, trainer.side.evaluations)
        parts.append(imagen.to_uint8(x0))
    samples = torch.cat(parts)
    file = f"{re.sub('[^a-z0-9]+', '-', name)}-{trainer.seed}.png"
    imagen.save_grid(list(samples[:50].split(10)), [""] * len(samples[:50].split(10)), Path(cfg.out) / file)
    return metrics.score_images(samples, images, net, device)


def quality(cfg: Config, images, device) -> None:
    """Print, and write to quality.csv, the distances of every side on the way to cfg.seconds of training."""
    net, accuracy = metrics.load_classifier(images, imagen.CACHE, device)
    x, rows = images.x.to(device), []
    against = f"n={cfg.score_n} against {len(images.x_test)} test images, classifier accuracy {accuracy:.3f}"
    print(f"\nAfter so many training seconds, {against}:")
    for seed in cfg.seeds:
        for name, make in SCORED.items():
            torch.manual_seed(seed)
            trainer, seconds = Trainer(make(x.shape[-1], device), x, cfg.batch_size, seed), 0.0
            for mark in (cfg.seconds / 4, cfg.seconds / 2, cfg.seconds):
                start = time.perf_counter() - seconds
                while seconds < mark:
                    trainer.train_step()
                    synchronize(device)
                    seconds = time.perf_counter() - start
                scores = score_side(trainer, name, cfg, images, net, device)
                values = scores["samples"]
                rows.append(dict(side=name, seed=seed, seconds=mark, steps=trainer.step, **values))
                numbers = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
                how = f"{mark:g} s, {trainer.step} steps, {trainer.side.evaluations} evaluations"
                print(f"  seed {seed}  {name} ({how}): {numbers}", flush=True)
    real = scores["real"]["FD"]
    print(f"  real training images: FD {real:.3g}")
    with open(Path(cfg.out) / "quality.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    print("wrote", draw_quality(rows, real, Path(cfg.out) / "quality.png"))


def draw_quality(rows: list[dict], real: float, path: Path) -> Path:
    """The distance of every side over its training seconds, the median of the seeds."""
    with figure(path, (6, 3.6)) as (_, ax):
        for name in SCORED:
            seconds = sorted({row["seconds"] for row in rows})
            own = [[row["FD"] for row in rows if (row["side"], row["seconds"]) == (name, s)] for s in seconds]
            ax.plot(seconds, [np.median(values) for values in own], marker="o", label=name)
        ax.axhline(real, color="black", linestyle=":", label="real training images")
        ax.set(
            xlabel="training seconds", ylabel="Fréchet distance to test images", yscale="log", xscale="log"
        )
        ax.legend(fontsize=8)
    return path


def main(cfg: Config) -> None:
    device, images = pick_device(cfg.device), load_images(cfg.dataset, cfg.data_dir)
    C, H, W = images.x.shape[1:]
    if C != 1 or H != W or W % 4:
        fit = "one channel and square images of a side divisible by 4"
        raise UserError(f"the peers are set up for {fit}, got {(C, H, W)}; choose another --dataset")
    try:
        names = ("torch", "diffusers", "denoising-diffusion-pytorch")
        libraries = ", ".join(f"{name} {version(name)}" for name in names)
    except PackageNotFoundError as error:
        how = "the peers come with: pip install -r requirements-dev.txt"
        raise UserError(f"{error.name} is not installed; {how}") from error
    where = f"{device}, {torch.get_num_threads()} threads, {platform.machine()}"
    print(f"{cfg.dataset}, {len(images.x)} training images, batch {cfg.batch_size}; {where}; {libraries}\n")
    speed(cfg, images.x.to(device), device)
    if cfg.seconds:
        quality(cfg, images, device)


if __name__ == "__main__":
    run_script(Config, main, __doc__)
