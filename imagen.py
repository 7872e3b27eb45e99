"""Image diffusion: trains a denoiser, draws samples, scores them.

python imagen.py --dataset digits                     handwritten digits: nothing to download, two minutes
python imagen.py                                      FashionMNIST (downloaded to ./data)
python imagen.py --sample_from out/digits/last.pt     new samples; --score_from scores a checkpoint again
"""

import dataclasses
import functools
import math
import re
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor, nn

import metrics
from data import Images, load_images
from diffusion import (
    SAMPLERS,
    SCHEDULES,
    Diffusion,
    ImageTransformer,
    UNet,
    drop_condition,
    sample,
    trajectory,
)
from files import UserError, load_checkpoint, load_weights, reading, say, write_atomic
from training import (
    Run,
    autocast,
    check_run,
    millions,
    need,
    not_fatal,
    pick_device,
    run_name,
    run_script,
    saved_config,
)

CACHE = "out/classifiers"  # the scores' classifiers, one for each data set


class Facts(TypedDict):
    """What a checkpoint knows of its data, as data.Images.facts gives it."""

    shape: list[int]
    images: int
    names: list[str]
    checksum: str


@dataclass(frozen=True)
class Config:
    """Hyperparameters. Edit the defaults here, or override any of them: python imagen.py --lr 1e-3"""

    # -- data --
    dataset: str = "fashionmnist"  # fashionmnist, mnist, cifar10, digits (no download), or a folder of images
    data_dir: str = "data"  # where torchvision finds its data sets, or puts them
    image_size: int | None = None  # scale and crop images to this side; None keeps their own
    background: str | None = None  # colour behind transparent images, such as white; None refuses them
    # -- diffusion --
    T: int = 1000  # timesteps of the forward process
    schedule: Literal[tuple(SCHEDULES)] = "cosine"  # noise schedule; flow: rectified flow
    predict: Literal["v", "x0", "eps", "flow"] = "v"  # what the denoiser's output means; flow: eps - x0
    weight: Literal["min-snr", "plain"] = "min-snr"  # weight of a step's loss
    label_drop: float = 0.1  # share of training labels dropped, for guidance
    # -- denoiser --
    denoiser: Literal["unet", "transformer"] = "unet"  # network
    channels: tuple[int, ...] = (32, 64, 128)  # unet: width of each level, from full resolution down
    blocks: tuple[int, ...] = (1, 1, 2)  # unet: residual blocks of each level
    patch: int = 2  # transformer: side of a patch in pixels
    width: int = 192  # transformer: width of the model
    depth: int = 6  # transformer: number of blocks
    # -- optimisation --
    max_steps: int = 8000  # optimizer steps
    batch_size: int = 64  # images of a step, over all processes
    lr: float = 2e-3  # AdamW's learning rate after warm-up
    warmup: int = 100  # steps of linear warm-up
    ema_decay: float = 0.999  # upper limit of the EMA's decay; it ramps as (1 + step) / (10 + step)
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the hardware has it
    # -- sampling --
    sampler: Literal[tuple(SAMPLERS)] = "dpm++"  # DPM-Solver++(2M), DDIM, DDPM or EDM's Heun
    steps: int = 10  # evaluations of the network (two each with guidance)
    guidance: float = 0.0  # classifier-free guidance: 0 off, 1 strong
    classes: tuple[str, ...] = ()  # classes to draw, by name or number; none given: all
    n: int = 10  # samples of each class that sample_from draws, in all for data without classes
    score_n: int = 500  # samples of a score, at most as many as training images; 0: none after training
    # -- the run --
    out: str = "out/{dataset}"  # folder of the run
    seed: int = 0  # of weights, data order, noise and samples
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda where there is one, else mps or cpu
    log_every: int = 50  # steps between lines of the log
    sample_every: int = 1000  # steps between grids of samples
    save_every: int = 500  # steps between checkpoints
    resume: bool = False  # go on with the run in the folder
    sample_from: str | None = None  # sample from this checkpoint; no data, no training
    score_from: str | None = None  # score this checkpoint against the test split

    kind = "imagen"  # the script that a checkpoint belongs to (no annotation: not a setting)

    @staticmethod
    def recipe(given) -> dict:
        return RECIPES.get(given.dataset, {})

    def __post_init__(self):
        check_run(self)
        need(self, "max_steps", 1)
        need(self, "batch_size T n", 1, 100_000)
        need(self, "width", 16, 16_384)
        need(self, "patch depth", 1, 1024)
        need(self, "guidance", 0, 1000)
        need(self, "label_drop", 0, 1)
        need(self, "steps", 1, self.T)
        if self.image_size is not None:
            need(self, "image_size", 1, 4096)
        if not 0 < len(self.channels) == len(self.blocks) or not all(0 < n <= 1000 for n in self.blocks):
            got = f"{self.channels} and {self.blocks}"
            raise ValueError(
                f"channels and blocks need a number a level each, blocks from 1 to 1000, got {got}"
            )
        if any(c % 8 or not 8 <= c <= 16_384 for c in self.channels) or self.width % 16:
            got = f"{self.channels} and {self.width}"
            raise ValueError(f"channels must be multiples of 8 and width a multiple of 16, got {got}")
        try:
            ImageColor.getrgb(self.background or "white")
        except ValueError as error:
            raise ValueError(f"background must be a colour such as white or #ff8800: {error}") from error
        if self.guidance and not self.label_drop:
            raise ValueError("guidance needs a denoiser that has also seen no labels: --label_drop above 0")


RECIPES = {  # what a data set needs otherwise than the defaults above; flags override both
    "digits": dict(max_steps=1500),
    "mnist": dict(max_steps=2200),
}


def build(cfg: Config, facts: dict, device: torch.device):
    """Process and denoiser as cfg describes them, for images facts["shape"] (C, H, W). Raises UserError."""
    channels, H, W = facts["shape"]
    classes, unet = len(facts["names"]), cfg.denoiser == "unet"
    divisor = 2 ** (len(cfg.channels) - 1) if unet else cfg.patch
    if H % divisor or W % divisor or not 0 < min(H, W) <= max(H, W) <= 4096 or channels not in (1, 3):
        fits = max(1, min(H, W, 4096) // divisor) * divisor
        way_out = f"add --image_size {fits}, or change --channels, --blocks (unet) or --patch (transformer)"
        needs = f"this {cfg.denoiser} needs 1 or 3 channels and sides divisible by {divisor}, up to 4096"
        raise UserError(f"images are {W}x{H} with {channels} channels, but {needs}: {way_out}")
    if unet and max(H, W) == divisor and cfg.channels[-1] == 8:  # GroupNorm would norm single numbers
        got = f"--channels {' '.join(map(str, cfg.channels))} make a lowest level of 1x1 with 8 channels"
        raise UserError(f"{got}: give it 16 or more, or fewer levels (of --blocks too)")
    torch.manual_seed(cfg.seed)
    if unet:
        model = UNet(channels, cfg.channels, cfg.blocks, classes)
    else:
        model = ImageTransformer(channels, cfg.width, cfg.depth, cfg.patch, classes)
    try:
        process = Diffusion(*SCHEDULES[cfg.schedule](cfg.T), cfg.predict, cfg.weight)
        SAMPLERS[cfg.sampler][1](process, cfg.steps)  # so that steps which it cannot space fail now
    except ValueError as error:
        got = f"--schedule {cfg.schedule}, --T {cfg.T}, --predict {cfg.predict}, --sampler {cfg.sampler}"
        raise UserError(f"{got}: {error}") from error
    layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
    return process.to(device), model.to(device, memory_format=layout)


def load(path, device: str = "auto", cfg: Config | None = None) -> tuple[Diffusion, nn.Module, dict]:
    """Process, denoiser (the averaged weights) and facts of the checkpoint at `path`, ready to sample from.

    facts: the shape (C, H, W) of its images and the names of its classes. cfg: settings other than those it
    was saved with. Raises UserError for what cannot be loaded.
    """
    device, checkpoint = pick_device(device), load_checkpoint(path, Config.kind, Facts)
    cfg, facts = cfg or saved_config(Config, checkpoint["config"], path), checkpoint["facts"]
    with reading(path):
        process, model = build(cfg, facts, device)
        load_weights(model, checkpoint["ema"], path)
    return process, model.eval(), facts


def settings(cfg: Config) -> dict:
    """The sampling settings of cfg, by the names that `trajectory` gives them."""
    return dict(sampler=cfg.sampler, steps=cfg.steps, guidance=cfg.guidance, clip=1.0)


def draw(cfg: Config, process: Diffusion, model, shape: list[int], y: Tensor, device: torch.device) -> Tensor:
    """uint8 images (n, C, H, W) of labels y (n,) (-1: any), drawn with cfg.seed."""
    generator, parts = torch.Generator().manual_seed(cfg.seed), []
    for part in y.split(cfg.batch_size):  # what fits in memory for training fits here
        with autocast(device, cfg.precision):
            x0 = sample(
                process, model, (len(part), *shape), part.to(device), generator=generator, **settings(cfg)
            )
        parts.append(to_uint8(x0))
    return torch.cat(parts)


def list_classes(names: list[str]) -> str:
    """How many classes there are, and the first ten names."""
    more = ", ..." if len(names) > 10 else ""
    return f"{len(names)} classes ({', '.join(names[:10])}{more})" if names else "no classes"


def chosen(cfg: Config, facts: dict) -> list[int]:
    """The numbers of the classes to draw, [-1] without classes. Raises UserError for one that is unknown."""
    names = facts["names"]
    number = {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}
    for name in cfg.classes:
        if name not in number:
            known = ", ".join(names) or "none, since these data have no classes"
            raise UserError(f"--classes {name} is not among the classes; they are {known}")
    return list(dict.fromkeys(number[name] for name in cfg.classes or names)) or [-1]


def to_uint8(x: Tensor) -> Tensor:
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


# -- pictures --------------------------------------------------------------------------------------------


def save_grid(rows: list[Tensor], labels: list[str], path: Path) -> Path:
    """One row of images for each tensor (n, C, H, W) uint8, its label in the margin; small ones enlarged."""
    import matplotlib

    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 13)
    labels = ["".join(c if c.isprintable() else "?" for c in label) for label in labels]
    zoom = max(1, 56 // rows[0].shape[-1])
    h, w = (side * zoom + 2 for side in rows[0].shape[-2:])
    margin = 8 + math.ceil(max(map(font.getlength, labels)))
    canvas = Image.new("RGB", (margin + w * max(map(len, rows)), h * len(rows)), "white")
    for i, (row, label) in enumerate(zip(rows, labels, strict=False)):
        ImageDraw.Draw(canvas).text((4, i * h + h // 2 - 7), label, fill="black", font=font)
        for j, x in enumerate(row):
            picture = Image.fromarray(x.expand(3, -1, -1).permute(1, 2, 0).numpy())
            canvas.paste(picture.resize((w - 2, h - 2), Image.Resampling.BICUBIC), (margin + j * w, i * h))
    return write_png(canvas, path)


def write_png(picture: Image.Image, path: Path) -> Path:
    write_atomic(path, functools.partial(picture.save, format="PNG"))
    return path


def grid(
    cfg: Config, process: Diffusion, model, facts: dict, device, path: Path, n=0, folder: Path | None = None
) -> Path:
    """Ten samples of each class (20 classes at most; 10 rows without any), from the same noise every time.

    With a folder, n samples of each of all classes (n in all without any), each also a file of its own there.
    """
    names, numbers = facts["names"], chosen(cfg, facts)[: None if folder else 20]
    # One of each class in turn: with a larger n the first ones stay the same.
    y = torch.tensor(numbers).repeat(n or (10 if names else 100))
    samples = draw(cfg, process, model, facts["shape"], y, device)
    if folder:
        save_each(samples, y.tolist(), names, folder)
    if not names:
        return save_grid(list(samples[:200].split(10)), [""] * 20, path)
    rows = [samples[i :: len(numbers)][:10] for i in range(len(numbers))]
    return save_grid(rows[:20], [names[i] for i in numbers], path)


def save_each(samples: Tensor, y: list[int], names: list[str], folder: Path) -> None:
    """Write each sample, of class y, as CLASS_000.png, CLASS_001.png, ... at its own size."""
    for old in folder.glob("*_[0-9][0-9][0-9]*.png"):
        old.unlink()  # of another number of samples, or an earlier state of the checkpoint
    stems = [re.sub(r"[^\w-]+", "_", name)[:60] for name in [*names, "sample"]]  # safe as names of files
    if len(set(map(str.casefold, stems))) < len(stems):  # two would be one
        stems = [f"{i}_{stem}" for i, stem in enumerate(stems)]
    for i, x in enumerate(samples):
        picture = Image.fromarray(x.permute(1, 2, 0).squeeze(-1).numpy())
        write_png(picture, folder / f"{stems[y[i]]}_{i // len(set(y)):03}.png")


def film(cfg: Config, process: Diffusion, model, facts: dict, device: torch.device, path: Path) -> Path:
    """One sample as it forms, at ten steps or fewer: xt above, the denoiser's guess of x0 below."""
    y = torch.tensor(chosen(cfg, facts)[:1], device=device)
    generator = torch.Generator().manual_seed(cfg.seed)
    with autocast(device, cfg.precision):
        frames = list(
            trajectory(process, model, (1, *facts["shape"]), y, generator=generator, **settings(cfg))
        )
    shown = sorted({round(i) for i in torch.linspace(0, len(frames) - 1, 10).tolist()})
    xt, x0 = (torch.cat([to_uint8(frames[i][part]) for i in shown]) for part in (1, 2))
    return save_grid([xt, x0], ["xt", "x0 guess"], path)


# -- what the script does --------------------------------------------------------------------------------


def train(cfg: Config, device: torch.device) -> None:
    """Train, showing samples of the EMA weights on the way; then grid, film, curve and score."""
    images = load_images(cfg.dataset, cfg.data_dir, cfg.image_size, cfg.background)
    facts, out = images.facts(), Path(cfg.out)
    splits = f"{len(images.x)} training and {len(images.x_test)} test images"
    left_out = f"; left out: {images.left_out}" if images.left_out else ""
    shape = " x ".join(map(str, facts["shape"]))
    say(f"{cfg.dataset}: {splits} of {shape}, {list_classes(images.names)}{left_out}")
    chosen(cfg, facts)  # a class that is not there is said now, not after the training
    process, model = build(cfg, facts, device)
    run = Run(cfg, model, device, facts, out, cfg.max_steps, cfg.batch_size)
    say(f"{cfg.denoiser}: {millions(model)}; {device}, {run.world} process(es)")
    x, y = images.x.to(device), images.y.to(device)
    for step, batch in run.steps(len(x)):
        if run.due(cfg.sample_every):
            with run.pause():
                grid(cfg, process, run.ema, facts, device, out / "samples" / f"{step - 1:06}.png")
        x0, labels = metrics.scale(x[batch]), drop_condition(y[batch], cfg.label_drop)
        with autocast(device, cfg.precision):
            loss = process.loss(run.model, x0, labels).mean()
        run.update(loss)
    if run.main:
        files = [grid(cfg, process, run.ema, facts, device, out / "samples" / "grid.png")]
        files += [film(cfg, process, run.ema, facts, device, out / "samples" / "film.png")]
        files += [out / "log.csv", out / "last.pt", run.curve()]
        say(f"trained {run.seconds:.0f} s; wrote " + ", ".join(map(str, files)))
        with not_fatal("scored"):  # of data without classes there is a run, but no score
            if cfg.score_n:
                score(cfg, process, run.ema, images, device)
        say(f"sample again: python imagen.py --sample_from {shlex.quote(str(out / 'last.pt'))}")


def score(cfg: Config, process: Diffusion, model, images: Images, device: torch.device):
    """Print the distances of score_n samples to the test split, and those of as many training images.

    Returns the samples and the classifier. Raises UserError where the data or score_n do not allow a score.
    """
    if cfg.score_n < 10:
        raise UserError(f"--score_n is {cfg.score_n}: give the number of samples, at least 10, better 500")
    net, accuracy = metrics.load_classifier(images, CACHE, device)
    order = torch.randperm(len(images.y), generator=torch.Generator().manual_seed(cfg.seed))[: cfg.score_n]
    y, start = images.y[order], time.perf_counter()
    samples = draw(cfg, process, model, images.x.shape[1:], y, device)
    took = f"{time.perf_counter() - start:.1f} s"
    how = f"{cfg.sampler}, {cfg.steps} steps, guidance {cfg.guidance:g}, seed {cfg.seed}, {took}"
    say(f"score: n={len(samples)} against {len(images.x_test)} test images; {how}")
    say(f"  in the features of a classifier with test accuracy {accuracy:.3f}:")
    for name, row in metrics.score_images(samples, images, net, device, y).items():
        values = "".join(f"  {key} {value:.4g}" for key, value in row.items())
        say(f"  {name:8}{values}")
    return samples, net


def show_nearest(samples: Tensor, images: Images, net, device: torch.device, path: Path) -> Path:
    """Twenty samples, and under each the training image that is nearest in the classifier's features."""
    shown = [metrics.features(net, x, device) for x in (samples[:20], images.x, images.x_test)]
    _, nearest = metrics.nearest_ratio(*shown)
    rows = [samples[:10], images.x[nearest[:10]], samples[10:20], images.x[nearest[10:]]]
    return save_grid(rows, ["sample", "nearest training image"] * 2, path)


def main(cfg: Config) -> None:
    device = pick_device(cfg.device)
    if not (cfg.sample_from or cfg.score_from):
        return train(
            dataclasses.replace(cfg, out=cfg.out.replace("{dataset}", run_name(cfg.dataset))), device
        )
    path = Path(cfg.sample_from or cfg.score_from)
    process, model, facts = load(path, cfg.device, cfg)
    tag = f"{cfg.sampler}_{cfg.steps}_guidance{cfg.guidance:g}_seed{cfg.seed}"
    folder = Path(cfg.out) / "samples"
    if cfg.sample_from:
        path = grid(cfg, process, model, facts, device, folder / f"grid_{tag}.png", cfg.n, folder / tag)
        say(f"wrote {path}, and each sample as a file of its own in {folder / tag}")
        say(f"wrote {film(cfg, process, model, facts, device, folder / f'film_{tag}.png')}")
        return
    images = load_images(cfg.dataset, cfg.data_dir, cfg.image_size, cfg.background)
    if other := [name for name, value in images.facts().items() if value != facts[name]]:
        raise UserError(f"{path} was trained on other data than {cfg.dataset}: {', '.join(other)} differ")
    samples, net = score(cfg, process, model, images, device)
    say(f"wrote {show_nearest(samples, images, net, device, folder / f'nearest_{tag}.png')}")
    try:
        fid = metrics.inception_fid(samples, images.x_test)
        say(f"  Inception FID {fid:.2f} (n={len(samples)} against {len(images.x_test)})")
    except UserError as error:
        say(f"  {error}")


if __name__ == "__main__":
    run_script(Config, main, __doc__)
