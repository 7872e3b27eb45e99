"""Image diffusion: trains a denoiser, draws samples, scores them.

    python imagen.py                                        FashionMNIST (downloaded to ./data), UNet
    python imagen.py --dataset digits --max_steps 1500      handwritten digits: nothing to download, minutes on a CPU
    python imagen.py --sample_from out/digits/last.pt       new samples from a checkpoint; --score_from scores it
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
from diffusion import SCHEDULES, Diffusion, Transformer, UNet
from training import Run, UserError, autocast, load_checkpoint, load_weights, need, pick_device, run_script


CACHE = "out/classifiers"  # the scores' classifiers, one for each data set


@dataclass(frozen=True)
class Config:
    """Hyperparameters. Edit the defaults here, or override any of them: python imagen.py --lr 1e-3"""

    # -- data --
    dataset: str = "fashionmnist"  # fashionmnist, mnist, cifar10, digits (no download), or the path of a folder of images
    data_dir: str = "data"  # where torchvision finds its data sets, or puts them
    image_size: int = 0  # scale and crop images to this side; 0 keeps their own
    # -- diffusion --
    T: int = 1000  # timesteps of the forward process
    schedule: Literal["cosine", "linear"] = "cosine"  # noise schedule
    predict: Literal["v", "x0", "eps"] = "v"  # what the denoiser's output means
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
    max_steps: int = 5000  # optimizer steps
    batch_size: int = 64  # images of a step, over all processes
    lr: float = 2e-3  # AdamW's learning rate after warm-up
    warmup: int = 100  # steps of linear warm-up
    ema_decay: float = 0.999  # upper limit of the EMA's decay; it ramps as (1 + step) / (10 + step)
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of the network; auto: bf16 where the hardware has it
    compile: bool = False  # compile the network with torch.compile
    # -- sampling --
    sampler: Literal["dpm++", "ddim", "ddpm"] = "dpm++"  # DPM-Solver++(2M), DDIM, or DDPM's ancestral sampling
    steps: int = 10  # evaluations of the network (two each with guidance)
    eta: float = 0.0  # ddim: 0 without noise, 1 as much as ddpm
    guidance: float = 0.0  # classifier-free guidance: 0 off, 1 strong
    score_n: int = 500  # samples of a score; at most the number of training images; 0: no score after training
    # -- the run --
    out: str = ""  # folder of the run; default out/DATASET
    seed: int = 0  # of weights, data order, noise and samples
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda where there is one, else mps, else cpu
    log_every: int = 50  # steps between lines of the log
    sample_every: int = 1000  # steps between grids of samples
    save_every: int = 500  # steps between checkpoints
    resume: bool = False  # go on with the run in the folder
    sample_from: str = ""  # sample from this checkpoint; no data, no training
    score_from: str = ""  # score this checkpoint against the test split

    kind = "imagen"  # the script that a checkpoint belongs to (no annotation: not a setting)
    fixed = tuple(  # what a resumed run may not change: the data, the model, and what training makes of them
        "dataset image_size T schedule predict weight label_drop denoiser channels blocks patch width depth batch_size seed".split()
    )

    def __post_init__(self):
        need(self, "max_steps batch_size patch width depth T log_every sample_every save_every", 1)
        need(self, "warmup image_size score_n", 0)
        need(self, "seed", 0, 2**32)
        need(self, "guidance", 0, 1000)
        need(self, "label_drop ema_decay eta", 0, 1)
        need(self, "lr", 1e-9, 1)
        need(self, "steps", 1, self.T)
        if len(self.channels) != len(self.blocks) or not self.channels or min(self.blocks) < 1 or any(c < 8 or c % 8 for c in self.channels):
            raise ValueError(f"channels must be multiples of 8 and blocks at least 1, one each a level, got {self.channels} and {self.blocks}")
        if self.width % 16:
            raise ValueError(f"width must be divisible by 16, got {self.width}")
        if self.guidance and not self.label_drop:
            raise ValueError("guidance needs a denoiser that has also seen images without their class: --label_drop above 0")
        if self.sample_from and self.score_from:
            raise ValueError("choose one of sample_from and score_from")


def build(cfg: Config, facts: dict, device: torch.device):
    """The process and the denoiser that cfg describes, for data of facts["shape"] (C, H, W). Raises UserError where they do not fit."""
    channels, *sides = facts["shape"]
    torch.manual_seed(cfg.seed)
    classes = len(facts["names"])
    if cfg.denoiser == "unet":
        model = UNet(channels, cfg.channels, cfg.blocks, classes)
    else:
        model = Transformer(channels, cfg.width, cfg.depth, patch=cfg.patch, classes=classes)
    if any(side % model.divisor for side in sides):
        fit = f"--image_size {max(1, min(sides) // model.divisor) * model.divisor}, or change --channels and --blocks (unet) or --patch (transformer)"
        raise UserError(f"images are {sides[1]}x{sides[0]}, but this {cfg.denoiser} needs sides divisible by {model.divisor}: add {fit}")
    try:
        process = Diffusion(SCHEDULES[cfg.schedule](cfg.T), cfg.predict, cfg.weight).to(device)
    except ValueError as error:
        raise UserError(f"--schedule {cfg.schedule} with --T {cfg.T}: {error}") from error
    return process, model.to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.preserve_format)


def settings(cfg: Config) -> dict:
    """The sampling settings of cfg, by the names that Diffusion.trajectory gives them."""
    return dict(sampler=cfg.sampler, steps=cfg.steps, eta=cfg.eta, guidance=cfg.guidance, clip=1.0)


def sample(cfg: Config, process: Diffusion, model, shape: list[int], y: Tensor, device: torch.device) -> Tensor:
    """uint8 images (n, C, H, W) of labels y (n,) (-1: any), drawn with cfg.seed."""
    generator, parts = torch.Generator().manual_seed(cfg.seed), []
    for part in y.split(250):
        with autocast(device, cfg.precision):
            x = process.sample(model, (len(part), *shape), part.to(device), generator=generator, **settings(cfg))
        parts.append(to_uint8(x))
    return torch.cat(parts)


def to_uint8(x: Tensor) -> Tensor:
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


# -- pictures -----------------------------------------------------------------------------------------------------------


def save_grid(rows: list[Tensor], labels: list[str], path: Path) -> Path:
    """One row of images for each tensor (n, C, H, W) uint8, its label in the margin; small images are enlarged smoothly."""
    zoom = max(1, 56 // rows[0].shape[-1])
    h, w = (side * zoom + 2 for side in rows[0].shape[-2:])
    margin = 8 * max(map(len, labels), default=0) + 8
    canvas = Image.new("RGB", (margin + w * max(map(len, rows)), h * len(rows)), "white")
    for i, (row, label) in enumerate(zip(rows, labels)):
        ImageDraw.Draw(canvas).text((4, i * h + h // 2 - 7), label, fill="black", font_size=13)
        for j, x in enumerate(row):
            picture = Image.fromarray(x.expand(3, -1, -1).permute(1, 2, 0).numpy())
            canvas.paste(picture.resize((w - 2, h - 2), Image.Resampling.BICUBIC), (margin + j * w, i * h))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)
    return path


def grid(cfg: Config, process: Diffusion, model, facts: dict, device: torch.device, path: Path) -> Path:
    """Ten samples of each class (at most 20 classes; without classes 10 rows), from the same noise at every call."""
    names = facts["names"][:20]
    y = torch.arange(len(names)).repeat_interleave(10) if names else torch.full((100,), -1)
    return save_grid(list(sample(cfg, process, model, facts["shape"], y, device).split(10)), names or [""] * 10, path)


def film(cfg: Config, process: Diffusion, model, facts: dict, device: torch.device, path: Path) -> Path:
    """One sample as it forms, at ten steps or fewer: xt above, the denoiser's guess of x0 below."""
    y = torch.full((1,), 0 if facts["names"] else -1, device=device)
    generator = torch.Generator().manual_seed(cfg.seed)
    with autocast(device, cfg.precision):
        frames = list(process.trajectory(model, (1, *facts["shape"]), y, generator=generator, **settings(cfg)))
    frames = [frames[i] for i in sorted({round(i) for i in torch.linspace(0, len(frames) - 1, 10).tolist()})]
    rows = [torch.cat([to_uint8(f[i]) for f in frames]) for i in (1, 2)]
    return save_grid(rows, ["xt", "x0 guess"], path)


# -- what the script does -----------------------------------------------------------------------------------------------


def train(cfg: Config, device: torch.device) -> None:
    """Train, showing samples of the EMA weights on the way; then grid, film, curve and score."""
    images = load_images(cfg.dataset, cfg.data_dir, cfg.image_size)
    facts, out = images.facts(), Path(cfg.out)
    process, model = build(cfg, facts, device)
    run = Run(cfg, model, device, facts)
    if run.main:
        print(f"{cfg.dataset}: {len(images.x)} training and {len(images.x_test)} test images of {facts['shape']}, {len(images.names)} classes")
        print(f"{cfg.denoiser}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; {device}, {run.world} process(es)", flush=True)
    x, y = images.x.to(device), images.y.to(device)
    for step, batch in run.steps(len(x)):
        with autocast(device, cfg.precision):
            loss = process.loss(run.model, metrics.scale(x[batch]), y[batch], cfg.label_drop)
        run.update(loss)
        if step % cfg.sample_every == 0 and run.main:
            with run.pause():
                grid(cfg, process, run.ema, facts, device, out / "samples" / f"{step:06}.png")
    if run.main:
        files = [grid(cfg, process, run.ema, facts, device, out / "samples" / "grid.png")]
        files += [film(cfg, process, run.ema, facts, device, out / "samples" / "film.png"), run.curve(), out / "log.csv", out / "last.pt"]
        print(f"trained {run.seconds:.0f} s; wrote " + ", ".join(map(str, files)))
        try:
            score(cfg, process, run.ema, images, device)
        except UserError as error:
            print(f"not scored: {error}")
        print(f"sample again: python imagen.py --sample_from {shlex.quote(str(out / 'last.pt'))}")


def score(cfg: Config, process: Diffusion, model, images: Images, device: torch.device) -> tuple[Tensor, metrics.Classifier]:
    """Print the distances of score_n samples to the test split, and those of as many training images; return the samples and the classifier."""
    if cfg.score_n < 10:
        raise UserError(f"--score_n is {cfg.score_n}: give the number of samples to score, at least 10, better 500")
    net, accuracy = metrics.load_classifier(images, CACHE, device)
    order = torch.randperm(len(images.y), generator=torch.Generator().manual_seed(cfg.seed))[: cfg.score_n]
    start = time.perf_counter()
    y = images.y[order]
    samples = sample(cfg, process, model, images.x.shape[1:], y, device)
    how = f"{cfg.sampler}, {cfg.steps} steps, guidance {cfg.guidance:g}, seed {cfg.seed}, {time.perf_counter() - start:.1f} s"
    print(f"score: n={len(samples)} against {len(images.x_test)} test images; {how}; features of a classifier with test accuracy {accuracy:.3f}")
    for name, row in metrics.score_images(samples, images, net, device, y).items():
        print(f"  {name:8}" + "".join(f"  {key} {value:.4g}" for key, value in row.items()), flush=True)
    return samples, net


def main(cfg: Config) -> None:
    device = pick_device(cfg.device)
    path = Path(cfg.sample_from or cfg.score_from)
    if not (cfg.sample_from or cfg.score_from):
        return train(dataclasses.replace(cfg, out=cfg.out or f"out/{Path(cfg.dataset).resolve().name.lower()}"), device)
    cfg = dataclasses.replace(cfg, out=cfg.out or str(path.parent))
    checkpoint = load_checkpoint(path, cfg.kind)
    facts = checkpoint["facts"]
    process, model = build(cfg, facts, device)
    load_weights(model, checkpoint["ema"], path)
    model.eval()
    tag = f"{cfg.sampler}_{cfg.steps}_eta{cfg.eta:g}_guidance{cfg.guidance:g}_seed{cfg.seed}"
    if cfg.sample_from:
        for picture in (grid, film):
            print("wrote", picture(cfg, process, model, facts, device, Path(cfg.out) / "samples" / f"{picture.__name__}_{tag}.png"))
        return
    images = load_images(cfg.dataset, cfg.data_dir, cfg.image_size)
    if images.facts() != facts:
        raise UserError(f"{path} was trained on {facts}, but --dataset {cfg.dataset} is {images.facts()}")
    samples, net = score(cfg, process, model, images, device)
    shown = samples[:20]
    _, nearest = metrics.nearest_ratio(metrics.features(net, shown, device), *(metrics.features(net, x, device) for x in (images.x, images.x_test)))
    rows = [shown[:10], images.x[nearest[:10]], shown[10:], images.x[nearest[10:]]]
    print("wrote", save_grid(rows, ["sample", "nearest training image"] * 2, Path(cfg.out) / "samples" / f"nearest_{tag}.png"))
    try:
        print(f"  Inception FID {metrics.inception_fid(samples, images.x_test):.2f} (n={len(samples)} against {len(images.x_test)})")
    except UserError as error:
        print(f"  {error}")


if __name__ == "__main__":
    run_script(Config, main, __doc__)
