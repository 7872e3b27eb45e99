"""Diffusion of images: train a denoiser, draw samples, score them.

    python imagen.py --dataset digits                           some minutes on a CPU, no download
    python imagen.py                                            FashionMNIST
    python imagen.py --load out/digits/last.pt --samples 20     more samples of a finished run
    python imagen.py --distill out/digits/last.pt               learn to draw them in one evaluation

From Python: process, model, facts = imagen.load("out/digits/last.pt"). The mathematics is in diffusion.py.
"""

import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch

from common.images import load_images
from common.pictures import picture, save_files, save_film, save_picture
from common.run import Flags, Run, UserError, autocast, check_config, load_model, log, pick_device, run_script
from common.scores import load_classifier, permutation, scale, score_images
from diffusion import SAMPLERS, SCHEDULES, Diffusion, ImageTransformer, UNet, drop_condition, trajectory

T = 1000  # timesteps of the forward process


@dataclass(frozen=True)
class Config(Flags):
    # Edit the defaults here, or override any of them on the command line: python imagen.py --lr 1e-3
    dataset: str = "fashionmnist"  # fashionmnist, mnist, cifar10, digits, or the path of a folder of images
    data_dir: str = "data"  # where torchvision keeps its data sets
    image_size: int | None = None  # side to which the images of a folder are scaled and cropped
    # diffusion and denoiser
    schedule: Literal[tuple(SCHEDULES)] = "cosine"  # noise schedule; flow is rectified flow
    predict: Literal["v", "x0", "eps", "flow"] = "v"  # what the output of the denoiser means
    label_drop: float = 0.1  # share of the training labels that are dropped, for guidance
    denoiser: Literal["unet", "transformer"] = "unet"  # network
    channels: tuple[int, ...] = (32, 64, 128)  # unet: width of each level, from full resolution down
    blocks: tuple[int, ...] = (1, 1, 2)  # unet: residual blocks of each level
    width: int = 192  # transformer: width
    depth: int = 6  # transformer: number of blocks
    # optimisation
    max_steps: int = 8000  # optimizer steps
    batch_size: int = 64  # images per step, over all processes
    lr: float = 2e-3  # AdamW's learning rate after warm-up
    # sampling
    sampler: Literal[tuple(SAMPLERS)] = "dpm++"  # DPM-Solver++(2M), DDIM, DDPM or EDM's Heun
    steps: int = 10  # evaluations of the denoiser (twice as many with guidance)
    guidance: float = 0.0  # classifier-free guidance: 0 is off, 1 is strong
    classes: tuple[str, ...] = ()  # names of the classes to draw; none given is all
    samples: int = 10  # of each class
    score_n: int = 500  # samples to score; 0: no score
    # one step
    distill: str | None = None  # train a student that draws this checkpoint's samples in one evaluation
    pairs: int = 20_000  # of noise and sample, from which it learns
    # the run
    sample_every: int = 1000  # steps between pictures of samples

    script: ClassVar = "imagen"
    RECIPES: ClassVar = {"digits": dict(max_steps=1500), "mnist": dict(max_steps=2200)}
    DISTILL: ClassVar = dict(out="out/{dataset}-distilled", max_steps=3000, resume=False)

    def __post_init__(self):
        levels = len(self.channels) == len(self.blocks) and all(c % 8 == 0 < c for c in self.channels)
        check_config(
            self,
            (self.steps <= T, f"--steps must be at most {T}"),
            (self.score_n != 1, "--score_n must be 0 or at least 2"),
            (levels, "--channels takes multiples of 8, one for each of --blocks"),
            (self.label_drop or not self.guidance, "--guidance needs training with --label_drop above 0"),
        )


def build(cfg, facts, device):
    """The process and the denoiser that cfg describes, for images facts["shape"] (C, H, W)."""
    (channels, H, W), classes = facts["shape"], len(facts["names"])
    divisor = 2 ** (len(cfg.channels) - 1) if cfg.denoiser == "unet" else 2
    if H % divisor or W % divisor:
        size = max(1, min(H, W) // divisor) * divisor
        raise UserError(f"images are {H} x {W}, not divisible by {divisor}: add --image_size {size}")
    torch.manual_seed(cfg.seed)
    if cfg.denoiser == "unet":
        model = UNet(channels, cfg.channels, cfg.blocks, classes)
    else:
        model = ImageTransformer(channels, cfg.width, cfg.depth, classes=classes)
    try:
        process = Diffusion(*SCHEDULES[cfg.schedule](T), cfg.predict)
        SAMPLERS[cfg.sampler][1](process, cfg.steps)  # fail before training where it has no such steps
    except ValueError as error:
        raise UserError(f"--schedule {cfg.schedule} --sampler {cfg.sampler}: {error}") from error
    layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
    return process.to(device), model.to(device, memory_format=layout)


load = partial(load_model, Config, build)  # load(path): process, denoiser, facts (shape, names of classes)


def sampling(cfg):
    """The settings of cfg as `sample` and `trajectory` take them."""
    generator = torch.Generator().manual_seed(cfg.seed)
    return dict(sampler=cfg.sampler, steps=cfg.steps, guidance=cfg.guidance, clip=1.0, generator=generator)


def to_uint8(x):
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def batches(cfg, process, model, shape, y):
    """Yield, for the labels y (n,) in turn, the step t of the noise, the noise, and x0 (B, C, H, W) each."""
    device, how = process.a_table.device, sampling(cfg)
    for labels in y.split(cfg.batch_size):  # what fits in memory for training fits here
        with autocast(device, cfg.precision):
            states = trajectory(process, model, (len(labels), *shape), labels.to(device), **how)
            t, noise, _ = next(states)
            for *_, guess in states:
                x0 = guess  # the last one: all of them may not fit
        yield t, noise, x0


def draw(cfg, process, model, shape, y):
    """uint8 images (n, C, H, W) of the labels y (n,), -1 for any; cfg.seed decides the noise."""
    return torch.cat([to_uint8(x0) for _, _, x0 in batches(cfg, process, model, shape, y)])


def chosen(cfg, facts):
    """The numbers of cfg.classes, by default of all classes; ten times -1 for data without classes."""
    names = facts["names"]
    if unknown := set(cfg.classes) - set(names):
        raise UserError(f"--classes {' '.join(unknown)}: the classes are {', '.join(names) or 'none'}")
    return [names.index(name) for name in cfg.classes or names] or [-1] * 10


def draw_rows(cfg, process, model, facts):
    """A row for each chosen class: its name, and images (rows, cfg.samples, C, H, W)."""
    numbers = chosen(cfg, facts)
    y = torch.tensor(numbers).repeat(cfg.samples)  # with more samples, the first ones stay the same
    samples = draw(cfg, process, model, facts["shape"], y).unflatten(0, (cfg.samples, -1))
    return [[*facts["names"], ""][i] for i in numbers], samples.transpose(0, 1)


def film(cfg, process, model, facts):
    """Pictures of one sample of each chosen class, at most ten, as they form from noise."""
    device, y = process.a_table.device, torch.tensor(chosen(cfg, facts)[:10])
    with autocast(device, cfg.precision):
        states = list(trajectory(process, model, (len(y), *facts["shape"]), y.to(device), **sampling(cfg)))
    return [picture([""], to_uint8(xt)[None]) for _, xt, _ in states]


def score(cfg, process, model, images, folder):
    """Log how cfg.score_n samples compare with the test images; the folder keeps the classifier."""
    net = load_classifier(images, folder, process.a_table.device)
    y = images.y[permutation(len(images.y), cfg.seed)[: cfg.score_n]]
    x = draw(cfg, process, model, images.x.shape[1:], y), images.x, images.x_test
    how = f"{cfg.sampler}, {cfg.steps} steps, guidance {cfg.guidance:g}, seed {cfg.seed}"
    against = f"n={len(y)} against {len(images.x_test)} test images"
    log(f"score of {against} ({how}):\n  {score_images(*map(net.features, x), y, net)}")


def ask_teacher(cfg, facts, device):
    """A student's model and facts, labels (N,), and the `batches` to learn, of noise that no score draws."""
    process, model, known = load(cfg.distill, device, cfg)
    if known != facts or cfg.sampler == "ddpm":
        raise UserError(f"{cfg.distill} must be trained on this data, no student, and not sampled by ddpm")
    gib = 8 * cfg.pairs * torch.Size(facts["shape"]).numel() / 2**30
    log(f"{cfg.pairs} pairs take {gib:.3f} GiB")
    if gib > 8:
        raise UserError(f"--pairs {cfg.pairs}: more than 8 GiB may not fit in memory, ask for fewer")
    y = torch.tensor(chosen(cfg, facts), device=device).repeat(cfg.pairs)[: cfg.pairs]
    pairs = batches(replace(cfg, seed=10**9 - cfg.seed), process, copy.deepcopy(model), facts["shape"], y)
    how = cfg.sampler, cfg.steps, cfg.guidance, cfg.pairs, cfg.classes, next(model.parameters()).sum().item()
    return model.train(), facts | dict(teacher=how), y, pairs


def train(cfg, images, device):
    facts = images.facts
    process, model = build(cfg, facts, device)
    chosen(cfg, facts)  # an unknown class fails before training, not after
    x, y = images.x.to(device), images.y.to(device)
    if cfg.distill:
        model, facts, y, pairs = ask_teacher(cfg, facts, device)
        cfg = replace(cfg, steps=1, guidance=0.0, label_drop=0.0)
    with Run(cfg, model, facts, device, cooldown=0.2) as run:
        if cfg.distill:
            (t, *_), *both = zip(*pairs, strict=True)
            noise, x = map(torch.cat, both)
        for step, batch in run.steps(len(x)):
            with autocast(device, cfg.precision):
                if cfg.distill:
                    loss = process.regression(run.model, noise[batch], t, x[batch], y[batch])
                else:
                    loss = process.loss(run.model, scale(x[batch]), drop_condition(y[batch], cfg.label_drop))
            run.update(loss.mean())
            if run.due(cfg.sample_every):
                rows = draw_rows(cfg, process, run.ema, facts)
                save_picture(picture(*rows), run.out / f"samples/{step:06}.png")
        if run.due(1):  # once, in the main process
            save_picture(picture(*draw_rows(cfg, process, run.ema, facts)), run.out / "samples/grid.png")
            save_film(film(cfg, process, run.ema, facts), run.out / "samples/film.gif")
            if cfg.score_n and len(images.names) > 1 and len(images.x_test) >= 10:
                score(cfg, process, run.ema, images, run.out)
            log(f"wrote {run.out}; more samples: python imagen.py --load {run.out / 'last.pt'} --samples 20")


def main(cfg):
    if not cfg.load or cfg.score_n:
        images = load_images(cfg.dataset, cfg.data_dir, cfg.image_size)
        what = f"{len(images.x)} training and {len(images.x_test)} test images {tuple(images.x.shape[1:])}"
        log(f"{cfg.dataset}: {what}, classes {', '.join(images.names[:20]) or 'none, so no score'}")
    if not cfg.load:
        return train(cfg, images, pick_device())
    process, model, facts = load(cfg.load, cfg=cfg)
    if "teacher" in facts and (cfg.sampler, cfg.steps) != (facts["teacher"][0], 1):
        raise UserError(f"{cfg.load} is a student, of one evaluation: leave out --steps and --sampler")
    tag = f"{cfg.sampler}_{cfg.steps}_guidance{cfg.guidance:g}_seed{cfg.seed}"
    folder = Path(cfg.load).expanduser().parent
    names, rows = draw_rows(cfg, process, model, facts)
    save_files(names, rows, folder / "samples" / tag)
    tag += "".join(f"_{i}" for i in chosen(cfg, facts) if cfg.classes)
    save_picture(picture(names, rows), folder / f"samples/{tag}.png")
    save_film(film(cfg, process, model, facts), folder / f"samples/{tag}.gif")
    log(f"wrote {folder}/samples: {tag}.png, {tag}.gif, and each sample")
    if cfg.score_n:
        if facts | images.facts != facts:
            raise UserError(f"{cfg.load} was not trained on {cfg.dataset}: it may have seen its test images")
        score(cfg, process, model, images, folder)


if __name__ == "__main__":
    run_script(Config, main, __doc__)
