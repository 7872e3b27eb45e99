"""Diffusion of images: train a denoiser, draw samples, score them.

    python imagen.py --dataset digits                   handwritten digits: no download, two minutes on a CPU
    python imagen.py                                    FashionMNIST
    python imagen.py --load out/digits/last.pt --n 20   more samples of a finished run (--score_n: a score)

The mathematics is in diffusion.py.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image

from common.images import Images, load_images
from common.run import Run, UserError, autocast, load_checkpoint, pick_device, reading, run_script, log
from common.scores import score_images
from diffusion import SAMPLERS, SCHEDULES, Diffusion, ImageTransformer, UNet, drop_condition, sample


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them on the command line: python imagen.py --lr 1e-3"""

    # data
    dataset: str = "fashionmnist"  # fashionmnist, mnist, cifar10, digits, or the path of a folder of images
    data_dir: str = "data"  # where torchvision keeps its data sets
    image_size: int | None = None  # side to which the images of a folder are scaled and cropped
    # diffusion
    T: int = 1000  # timesteps of the forward process
    schedule: Literal[tuple(SCHEDULES)] = "cosine"  # noise schedule; flow is rectified flow
    predict: Literal["v", "x0", "eps", "flow"] = "v"  # what the output of the denoiser means
    label_drop: float = 0.1  # share of the training labels that are dropped, for guidance
    # denoiser
    denoiser: Literal["unet", "transformer"] = "unet"  # network
    channels: tuple[int, ...] = (32, 64, 128)  # unet: width of each level, from full resolution down
    blocks: tuple[int, ...] = (1, 1, 2)  # unet: residual blocks of each level
    patch: int = 2  # transformer: side of a patch in pixels
    width: int = 192  # transformer: width
    depth: int = 6  # transformer: number of blocks
    # optimisation
    max_steps: int = 8000  # optimizer steps
    batch_size: int = 64  # images per step, over all processes
    lr: float = 2e-3  # AdamW's learning rate after warm-up
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto is bf16 where the hardware has it
    # sampling
    sampler: Literal[tuple(SAMPLERS)] = "dpm++"  # DPM-Solver++(2M), DDIM, DDPM or EDM's Heun
    steps: int = 10  # evaluations of the denoiser (twice as many with guidance)
    guidance: float = 0.0  # classifier-free guidance: 0 is off, 1 is strong
    n: int = 10  # samples of each class
    score_n: int = 500  # samples to score after training; 0 is no score
    # the run
    out: str = "out/{dataset}"  # folder
    seed: int = 0  # of weights, batches, noise and samples
    sample_every: int = 1000  # steps between pictures of samples
    save_every: int = 250  # steps between checkpoints
    resume: bool = False  # continue the run in the folder
    load: str | None = None  # draw samples from this checkpoint, do not train

    script: ClassVar = "imagen"
    RECIPES: ClassVar = {"digits": dict(max_steps=1500), "mnist": dict(max_steps=2200)}


def build(cfg: Config, facts: dict, device: torch.device) -> tuple[Diffusion, nn.Module]:
    """The process and the denoiser that cfg describes, for images facts["shape"] (C, H, W)."""
    (channels, H, W), classes = facts["shape"], len(facts["names"])
    divisor = 2 ** (len(cfg.channels) - 1) if cfg.denoiser == "unet" else cfg.patch
    if H % divisor or W % divisor:
        raise UserError(f"images are {H} x {W}, but sides must be divisible by {divisor}: see --image_size")
    torch.manual_seed(cfg.seed)
    if cfg.denoiser == "unet":
        model = UNet(channels, cfg.channels, cfg.blocks, classes)
    else:
        model = ImageTransformer(channels, cfg.width, cfg.depth, cfg.patch, classes)
    process = Diffusion(*SCHEDULES[cfg.schedule](cfg.T), cfg.predict)
    layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
    return process.to(device), model.to(device, memory_format=layout)


def load(path, cfg: Config | None = None) -> tuple[Diffusion, nn.Module, dict]:
    """Process, denoiser (the averaged weights) and facts of a checkpoint, ready to sample from."""
    checkpoint = load_checkpoint(path, Config)
    with reading(path):
        process, model = build(cfg or Config(**checkpoint["config"]), checkpoint["facts"], pick_device())
        model.load_state_dict(checkpoint["ema"])
    return process, model.eval(), checkpoint["facts"]


def draw(cfg: Config, process: Diffusion, model, shape: list[int], y: Tensor) -> Tensor:
    """uint8 images (n, C, H, W) of the labels y (n,), -1 for any; cfg.seed decides the noise."""
    device, generator = process.a_table.device, torch.Generator().manual_seed(cfg.seed)
    how = dict(sampler=cfg.sampler, steps=cfg.steps, guidance=cfg.guidance, clip=1.0, generator=generator)
    parts = []
    for labels in y.split(cfg.batch_size):  # what fits in memory for training fits here
        with autocast(device, cfg.precision):
            x0 = sample(process, model, (len(labels), *shape), labels.to(device), **how)
        parts.append(((x0.cpu() + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(parts)


def save_samples(cfg: Config, process: Diffusion, model, facts: dict, path: Path) -> None:
    """A picture of cfg.n samples of each class, a row per class; the noise is the same each time."""
    classes = range(len(facts["names"])) or [-1]
    y = torch.tensor(list(classes)).repeat_interleave(cfg.n)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(make_grid(draw(cfg, process, model, facts["shape"], y) / 255, nrow=cfg.n), path)
    log(f"wrote {path}")


def score(cfg: Config, process: Diffusion, model, images: Images) -> None:
    """Print the distance of cfg.score_n samples, and of as many training images, to the test images."""
    y = images.y[torch.randperm(len(images.y), generator=torch.Generator().manual_seed(0))[: cfg.score_n]]
    samples = draw(cfg, process, model, images.facts["shape"], y)
    log(f"n={len(y)}: {score_images(samples, y, images, process.a_table.device)}")


def train(cfg: Config, images: Images, device: torch.device) -> None:
    facts = images.facts
    process, model = build(cfg, facts, device)
    run = Run(cfg, model, facts, device)
    x, y = images.x.to(device), images.y.to(device)
    for step, batch in run.steps(len(x)):
        x0, labels = x[batch] / 127.5 - 1, drop_condition(y[batch], cfg.label_drop)
        with autocast(device, cfg.precision):
            loss = process.loss(run.model, x0, labels).mean()
        run.update(loss)
        if run.due(cfg.sample_every):
            save_samples(cfg, process, run.ema, facts, run.out / f"samples/{step:06}.png")
    if run.due(1):  # once, in the main process
        save_samples(cfg, process, run.ema, facts, run.out / "samples/grid.png")
        if cfg.score_n and images.names:
            score(cfg, process, run.ema, images)
        log(f"more samples: python imagen.py --load {run.out / 'last.pt'} --n 20")


def main(cfg: Config) -> None:
    if not cfg.load or cfg.score_n:
        images = load_images(cfg.dataset, cfg.data_dir, cfg.image_size)
        log(f"{cfg.dataset}: {len(images.x)} training and {len(images.x_test)} test images, {images.facts}")
    if not cfg.load:
        out = cfg.out.replace("{dataset}", Path(cfg.dataset).stem)
        return train(replace(cfg, out=out), images, pick_device())
    process, model, facts = load(cfg.load, cfg)
    tag = f"{cfg.sampler}_{cfg.steps}_guidance{cfg.guidance:g}_seed{cfg.seed}"
    save_samples(cfg, process, model, facts, Path(cfg.load).parent / f"samples/{tag}.png")
    if cfg.score_n:
        if images.facts != facts:
            raise UserError(f"{cfg.load} was not trained on {cfg.dataset}: it may have seen its test images")
        score(cfg, process, model, images)


if __name__ == "__main__":
    run_script(Config, main, __doc__)
