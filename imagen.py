"""Image diffusion: trains a denoiser, draws samples, scores them.

python imagen.py --dataset digits                     handwritten digits: nothing to download, two minutes
python imagen.py                                      FashionMNIST (downloaded to ./data)
python imagen.py --sample_from out/digits/last.pt     new samples; --score_from scores a checkpoint again
"""

import dataclasses
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image, ImageDraw
from torch import Tensor

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
from training import (
    Run,
    UserError,
    autocast,
    check_run,
    load_checkpoint,
    load_weights,
    millions,
    need,
    pick_device,
    run_name,
    run_script,
)

CACHE = "out/classifiers"  # the scores' classifiers, one for each data set


@dataclass(frozen=True)
class Config:
    """Hyperparameters. Edit the defaults here, or override any of them: python imagen.py --lr 1e-3"""

    # -- data --
    dataset: str = "fashionmnist"  # fashionmnist, mnist, cifar10, digits (no download), or a folder of images
    data_dir: str = "data"  # where torchvision finds its data sets, or puts them
    image_size: int | None = None  # scale and crop images to this side; None keeps their own
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
        need(self, "max_steps batch_size patch width depth T", 1)
        need(self, "guidance", 0, 1000)
        need(self, "label_drop", 0, 1)
        need(self, "steps", 1, self.T)
        if len(self.channels) != len(self.blocks) or not self.channels or min(self.blocks) < 1:
            got = f"{self.channels} and {self.blocks}"
            raise ValueError(f"channels and blocks need a number a level each, blocks from 1 up, got {got}")
        if any(c < 8 or c % 8 for c in self.channels) or self.width % 16:
            got = f"{self.channels} and {self.width}"
            raise ValueError(f"channels must be multiples of 8 and width a multiple of 16, got {got}")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {self.image_size}")
        if self.guidance and not self.label_drop:
            raise ValueError("guidance needs a denoiser that has also seen no labels: --label_drop above 0")


RECIPES = {  # what a data set needs otherwise than the defaults above; flags override both
    "digits": dict(max_steps=1500),
    "mnist": dict(max_steps=2200),
}


def build(cfg: Config, facts: dict, device: torch.device):
    """Process and denoiser as cfg describes them, for images facts["shape"] (C, H, W). Raises UserError."""
    channels, *sides = facts["shape"]
    classes = len(facts["names"])
    torch.manual_seed(cfg.seed)
    if cfg.denoiser == "unet":
        model, divisor = UNet(channels, cfg.channels, cfg.blocks, classes), 2 ** (len(cfg.channels) - 1)
    else:
        model, divisor = ImageTransformer(channels, cfg.width, cfg.depth, cfg.patch, classes), cfg.patch
    if any(side % divisor for side in sides):
        fits = max(1, min(sides) // divisor) * divisor
        way_out = (
            f"add --image_size {fits}, or change --channels and --blocks (unet) or --patch (transformer)"
        )
        needs = f"this {cfg.denoiser} needs sides divisible by {divisor}"
        raise UserError(f"images are {sides[1]}x{sides[0]}, but {needs}: {way_out}")
    try:
        process = Diffusion(*SCHEDULES[cfg.schedule](cfg.T), cfg.predict, cfg.weight)
        SAMPLERS[cfg.sampler][1](process, cfg.steps)  # so that steps which it cannot space fail now
    except ValueError as error:
        got = f"--schedule {cfg.schedule}, --T {cfg.T}, --predict {cfg.predict}, --sampler {cfg.sampler}"
        raise UserError(f"{got}: {error}") from error
    layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
    return process.to(device), model.to(device, memory_format=layout)


def settings(cfg: Config) -> dict:
    """The sampling settings of cfg, by the names that `trajectory` gives them."""
    return dict(sampler=cfg.sampler, steps=cfg.steps, guidance=cfg.guidance, clip=1.0)


def draw(cfg: Config, process: Diffusion, model, shape: list[int], y: Tensor, device: torch.device) -> Tensor:
    """uint8 images (n, C, H, W) of labels y (n,) (-1: any), drawn with cfg.seed."""
    generator, parts = torch.Generator().manual_seed(cfg.seed), []
    for part in y.split(250):
        with autocast(device, cfg.precision):
            x0 = sample(
                process, model, (len(part), *shape), part.to(device), generator=generator, **settings(cfg)
            )
        parts.append(to_uint8(x0))
    return torch.cat(parts)


def to_uint8(x: Tensor) -> Tensor:
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


# -- pictures --------------------------------------------------------------------------------------------


def save_grid(rows: list[Tensor], labels: list[str], path: Path) -> Path:
    """One row of images for each tensor (n, C, H, W) uint8, its label in the margin; small ones enlarged."""
    zoom = max(1, 56 // rows[0].shape[-1])
    h, w = (side * zoom + 2 for side in rows[0].shape[-2:])
    margin = 8 * max(map(len, labels), default=0) + 8
    canvas = Image.new("RGB", (margin + w * max(map(len, rows)), h * len(rows)), "white")
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        ImageDraw.Draw(canvas).text((4, i * h + h // 2 - 7), label, fill="black", font_size=13)
        for j, x in enumerate(row):
            picture = Image.fromarray(x.expand(3, -1, -1).permute(1, 2, 0).numpy())
            canvas.paste(picture.resize((w - 2, h - 2), Image.Resampling.BICUBIC), (margin + j * w, i * h))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)
    return path


def grid(cfg: Config, process: Diffusion, model, facts: dict, device: torch.device, path: Path) -> Path:
    """Ten samples of each class (20 classes at most; 10 rows without any), from the same noise every time."""
    names = facts["names"][:20]
    y = torch.arange(len(names)).repeat_interleave(10) if names else torch.full((100,), -1)
    rows = draw(cfg, process, model, facts["shape"], y, device).split(10)
    return save_grid(list(rows), names or [""] * 10, path)


def film(cfg: Config, process: Diffusion, model, facts: dict, device: torch.device, path: Path) -> Path:
    """One sample as it forms, at ten steps or fewer: xt above, the denoiser's guess of x0 below."""
    y = torch.full((1,), 0 if facts["names"] else -1, device=device)
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
    images = load_images(cfg.dataset, cfg.data_dir, cfg.image_size)
    facts, out = images.facts(), Path(cfg.out)
    process, model = build(cfg, facts, device)
    run = Run(cfg, model, device, facts, out, cfg.max_steps, cfg.batch_size)
    if run.main:
        splits = f"{len(images.x)} training and {len(images.x_test)} test images"
        print(f"{cfg.dataset}: {splits} of {facts['shape']}, {len(images.names)} classes")
        print(f"{cfg.denoiser}: {millions(model)}; {device}, {run.world} process(es)", flush=True)
    x, y = images.x.to(device), images.y.to(device)
    for step, batch in run.steps(len(x)):
        x0, labels = metrics.scale(x[batch]), drop_condition(y[batch], cfg.label_drop)
        with autocast(device, cfg.precision):
            loss = process.loss(run.model, x0, labels).mean()
        run.update(loss)
        if step % cfg.sample_every == 0 and run.main:
            with run.pause():
                grid(cfg, process, run.ema, facts, device, out / "samples" / f"{step:06}.png")
    if run.main:
        files = [grid(cfg, process, run.ema, facts, device, out / "samples" / "grid.png")]
        files += [film(cfg, process, run.ema, facts, device, out / "samples" / "film.png")]
        files += [run.curve(), out / "log.csv", out / "last.pt"]
        print(f"trained {run.seconds:.0f} s; wrote " + ", ".join(map(str, files)))
        try:
            if cfg.score_n:
                score(cfg, process, run.ema, images, device)
        except UserError as error:  # of data without classes there is a run, but no score
            print(f"not scored: {error}")
        print(f"sample again: python imagen.py --sample_from {shlex.quote(str(out / 'last.pt'))}")


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
    print(f"score: n={len(samples)} against {len(images.x_test)} test images; {how}")
    print(f"  in the features of a classifier with test accuracy {accuracy:.3f}:")
    for name, row in metrics.score_images(samples, images, net, device, y).items():
        values = "".join(f"  {key} {value:.4g}" for key, value in row.items())
        print(f"  {name:8}{values}", flush=True)
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
    checkpoint = load_checkpoint(path, cfg.kind)
    facts = checkpoint["facts"]
    process, model = build(cfg, facts, device)
    load_weights(model, checkpoint["ema"], path)
    model.eval()
    tag = f"{cfg.sampler}_{cfg.steps}_guidance{cfg.guidance:g}_seed{cfg.seed}"
    folder = Path(cfg.out) / "samples"
    if cfg.sample_from:
        print("wrote", grid(cfg, process, model, facts, device, folder / f"grid_{tag}.png"))
        print("wrote", film(cfg, process, model, facts, device, folder / f"film_{tag}.png"))
        return
    images = load_images(cfg.dataset, cfg.data_dir, cfg.image_size)
    if images.facts() != facts:
        raise UserError(f"{path} was trained on {facts}, but --dataset {cfg.dataset} is {images.facts()}")
    samples, net = score(cfg, process, model, images, device)
    print("wrote", show_nearest(samples, images, net, device, folder / f"nearest_{tag}.png"))
    try:
        fid = metrics.inception_fid(samples, images.x_test)
        print(f"  Inception FID {fid:.2f} (n={len(samples)} against {len(images.x_test)})")
    except UserError as error:
        print(f"  {error}")


if __name__ == "__main__":
    run_script(Config, main, __doc__)
