"""Image diffusion beside its peers, for the same training seconds; and more measures of a finished run.

    python -m bench.images                    FashionMNIST from ./data: speed and quality, an hour on a CPU
    python -m bench.images --seconds 0        speed only, 4 minutes
    python -m bench.images --load out/fashionmnist/last.pt --score_n 10000     FD, KID, precision, recall, FID
    python -m bench.images --load out/fashionmnist/last.pt --student out/fashionmnist-distilled/last.pt
                                              by evaluations

Peers: diffusers' UNet2DModel and denoising-diffusion-pytorch's Unet, each with its own loss, of comparable
size. All are unconditional and share imagen.py's batches, optimizer, warm-up, clipping and EMA. They differ
in network and recipe, and ours runs in bf16 where the hardware has it (not in the row "ours, fp32").
"""

import copy
import platform
import re
import time
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import imagen
from bench.runs import draw, millions, print_table, run_bench, saved_by
from bench.timing import interleaved, spread, synchronize
from common.images import Images, load_images
from common.pictures import picture, save_picture
from common.run import (
    CLIP,
    EMA,
    WARMUP,
    UserError,
    autocast,
    batch_indices,
    check_config,
    log,
    permutation,
    pick_device,
)
from common.scores import frechet_distance, load_classifier, nearest_distance, scale, score_images
from diffusion import SAMPLERS, SCHEDULES, Diffusion, sample


@dataclass(frozen=True)
class Config:
    """Settings of the comparison; with --load those of the measures."""

    dataset: str = "fashionmnist"  # one with classes, a single channel and sides divisible by 4
    data_dir: str = "data"  # where torchvision keeps its data sets
    batch_size: int = 64  # images per training step
    rounds: int = 7  # of the speed measurement, all sides in turn
    round_steps: int = 4  # training steps of each side in a round
    seconds: float = 480.0  # training of each side, scored at a quarter, a half and all; 0: speed only
    score_n: int = 250  # samples of a score
    load: str | None = None  # measure samples of this checkpoint of imagen.py instead
    sampler: Literal[tuple(SAMPLERS)] | None = None  # load: in place of the checkpoint's
    steps: int | None = None  # load: likewise
    guidance: float | None = None  # load: likewise
    student: str | None = None  # load: a student of that checkpoint, to compare them by evaluations instead
    out: str = "out/bench/images"  # folder of the figure and the sample grids

    def __post_init__(self):
        check_config(self, (self.score_n >= 20, "--score_n must be at least 20"))


# -- measures --------------------------------------------------------------------------------------------


def kernel_distance(f: Tensor, g: Tensor) -> float:
    """KID: unbiased squared MMD of features f (N, d), g (M, d) under (x.y / d + 1)^3. KID 1801.01401."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> Tensor:
        k = kernel(a, a)
        return (k.sum() - k.trace()) / (len(a) * (len(a) - 1))

    return (within(f) + within(g) - 2 * kernel(f, g).mean()).item()


def covered(f: Tensor, g: Tensor, k: int = 3) -> float:
    """Share of features f (N, d) in the k-nearest-neighbour balls of g (M, d): precision where g is real.

    Improved precision and recall, 1904.06991 eq. 1 and 2.
    """
    exact = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")
    radius = torch.cat([exact(part, g).kthvalue(k + 1).values for part in g.split(500)])  # the 1st is itself
    inside = [(exact(part, g) <= radius).any(1) for part in f.split(500)]
    return torch.cat(inside).double().mean().item()


def measures(f: Tensor, test: Tensor) -> dict[str, float]:
    """How features f (N, d) compare with those of the test split."""
    distances = dict(FD=frechet_distance(f, test), KIDx1000=1000 * kernel_distance(f, test))
    return distances | dict(precision=covered(f, test), recall=covered(test, f))


def real_features(train: Tensor, n: int) -> Tensor:
    """The features of n training images, those that imagen.py scores too."""
    return train[permutation(len(train), 0)[:n]]


def inception_fid(samples: Tensor, real: Tensor) -> float:
    """The usual FID of uint8 images (N, C, H, W), in Inception-v3's 2048 features, by torchmetrics."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        fid = FrechetInceptionDistance(feature=2048)
    except Exception as error:  # of any type: what the download of the weights raises
        raise UserError(f"no Inception FID ({error}): it needs a download of the weights") from error
    for x, is_real in ((real, True), (samples, False)):
        for part in x.split(100):
            fid.update(part.expand(-1, 3, -1, -1), real=is_real)
    return fid.compute().item()


def measure(cfg: Config, images: Images, device: torch.device) -> None:
    """Print the measures of cfg.score_n samples of a checkpoint, and draw their nearest training images."""
    saved = saved_by(imagen.Config, cfg.load)["config"]
    chosen = {name: getattr(cfg, name) for name in ("sampler", "steps", "guidance")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    run = imagen.Config(**saved | chosen | dict(score_n=cfg.score_n))
    process, model, facts = imagen.load(cfg.load, device, run)
    if facts != images.facts:
        raise UserError(f"{cfg.load} was not trained on {cfg.dataset}: it may have seen its test images")
    y = images.y[permutation(len(images.y), run.seed)[: cfg.score_n]]
    samples = imagen.draw(run, process, model, facts["shape"], y)
    net = load_classifier(images, Path(cfg.load).parent, device)
    f, train, test = (net.features(x) for x in (samples, images.x, images.x_test))
    log(f"{run.sampler}, {run.steps} steps, guidance {run.guidance}, n={len(f)} against {len(test)}:")
    log(score_images(f, train, test, y, net))
    print_measures({"samples": measures(f, test), "real": measures(real_features(train, len(f)), test)})
    nearest = images.x[torch.cdist(f[:20], train).argmin(1)]
    pairs = torch.stack([samples[:10], nearest[:10], samples[10:20], nearest[10:]])
    save_grid(["sample", "nearest training image"] * 2, pairs, Path(cfg.out) / "nearest.png")
    try:
        log(f"Inception FID {inception_fid(samples, images.x_test):.2f}")
    except UserError as error:
        log(str(error))


def by_evaluations(cfg: Config, images: Images, device: torch.device) -> None:
    """Print and draw FD, nearest and time of a teacher's samples by evaluations, and of its student's.

    The student's also against the teacher's samples that it learned from: does it copy them?
    """
    for path in (cfg.load, cfg.student):
        known = saved_by(imagen.Config, path)["facts"]
        if known | images.facts != known or ("teacher" in known) != (path == cfg.student):
            raise UserError(f"{path} must be trained on {cfg.dataset}, only --student with --distill")
    net, curves, rows = load_classifier(images, Path(cfg.load).parent, device), {}, []
    order = permutation(len(images.y), 0)
    y, train, test = images.y[order[: cfg.score_n]], net.features(images.x), net.features(images.x_test)
    for name, path, counts in (("teacher", cfg.load, (1, 2, 4, 10, 50)), ("student", cfg.student, (1,))):
        saved, curves[name] = saved_by(imagen.Config, path)["config"], []
        for steps in counts:
            sampler = saved["sampler"] if steps > 2 or name == "student" else "ddim"  # better for so few
            run = imagen.Config(**saved | dict(steps=steps, sampler=sampler))
            process, model, facts = imagen.load(path, device, run)
            start = time.perf_counter()
            samples = imagen.draw(run, process, model, facts["shape"], y)
            row = {"": name, "evaluations": steps, "sampler": sampler}
            row["ms a sample"] = f"{1000 * (time.perf_counter() - start) / len(y):.3g}"
            f = net.features(samples)
            curves[name].append((steps, frechet_distance(f, test)))
            rows.append(row | {"score": score_images(f, train, test, y, net)})
    print_table(rows)
    asked = dict(zip(("sampler", "steps", "guidance", "pairs"), facts["teacher"][:4], strict=True))
    # The student has no label_drop, without which a teacher's guidance is refused.
    asked = replace(run, distill=cfg.load, label_drop=0.1, **asked)
    *_, pairs = imagen.ask_teacher(asked, images.facts, device)
    pool = net.features(torch.cat([imagen.to_uint8(x0) for *_, x0 in pairs]))
    copied = nearest_distance(f, pool) / nearest_distance(test[: len(f)], pool)
    log(f"student, nearest of its {asked.pairs} training samples: {copied:.2f}")
    labels = dict(xlabel="evaluations", ylabel="Fréchet distance to test images")
    draw(Path(cfg.out) / "evaluations.png", curves, xscale="log", yscale="log", **labels)


def print_measures(rows: dict[str, dict[str, float]]) -> None:
    print_table([{"": name} | {k: f"{v:.4g}" for k, v in row.items()} for name, row in rows.items()])


def save_grid(names: list[str], rows: Tensor, path: Path) -> None:
    save_picture(picture(names, rows), path)
    log(f"wrote {path}")


# -- the sides -------------------------------------------------------------------------------------------


class Ours:
    """imagen.py's UNet. textbook: our network with DDPM's recipe (eps, linear betas, plain weights)."""

    evaluations, usual = 10, 10  # of a scored sample, and as one would use it

    def __init__(self, size: int, device, textbook: bool = False, precision: str = "auto"):
        # Weights are drawn with the seed that is set, as the peers draw theirs.
        self.cfg = imagen.Config(precision=precision, seed=torch.initial_seed() % 10**9)
        self.process, self.model = imagen.build(self.cfg, dict(shape=[1, size, size], names=[]), device)
        if textbook:
            self.process = Diffusion(*SCHEDULES["linear"](imagen.T), "eps", "plain").to(device)
        self.device = device

    def loss(self, x: Tensor) -> Tensor:
        with autocast(self.device, self.cfg.precision):
            return self.process.loss(self.model, x).mean()

    def sample(self, model, shape, generator, evaluations: int) -> Tensor:
        how = dict(sampler="dpm++", steps=evaluations, clip=1.0, generator=generator)
        with autocast(self.device, self.cfg.precision):
            return sample(self.process, model, shape, **how)


class Diffusers:
    """diffusers' UNet2DModel, with DDPMScheduler's training noise and DDIMScheduler's steps."""

    evaluations, usual = 50, 1000

    def __init__(self, size: int, device):
        import diffusers

        widths = dict(block_out_channels=(24, 48, 96), norm_num_groups=8)
        down, up = ("DownBlock2D", "AttnDownBlock2D"), ("UpBlock2D", "AttnUpBlock2D")
        widths |= dict(down_block_types=(*down, down[0]), up_block_types=(*up, up[0]))
        model = diffusers.UNet2DModel(sample_size=size, in_channels=1, out_channels=1, **widths)
        self.model = model.to(device)
        self.noise = diffusers.DDPMScheduler(1000)
        self.ddim = diffusers.DDIMScheduler(1000, timestep_spacing="trailing")

    def loss(self, x: Tensor) -> Tensor:
        eps, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),), device=x.device)
        return F.mse_loss(self.model(self.noise.add_noise(x, eps, t), t).sample, eps)

    @torch.no_grad()
    def sample(self, model, shape, generator, evaluations: int) -> Tensor:
        x = torch.randn(shape, generator=generator).to(next(model.parameters()).device)
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

    def loss(self, x: Tensor) -> Tensor:
        return self.process((x + 1) / 2)  # it wants [0, 1]

    @torch.no_grad()
    def sample(self, model, shape, generator, evaluations: int) -> Tensor:
        self.process.model, self.process.sampling_timesteps = model, evaluations
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        x = self.process.ddim_sample(shape)
        self.process.model = self.model
        return x * 2 - 1


PEERS = {"diffusers": Diffusers, "denoising-diffusion-pytorch": Lucidrains}
TIMED = {"ours": Ours, "ours, fp32": partial(Ours, precision="fp32")} | PEERS
SCORED = {"ours": Ours, "ours, textbook recipe": partial(Ours, textbook=True)} | PEERS


class Trainer:
    """A side with imagen.py's optimizer, learning rate, warm-up, clipping and EMA."""

    def __init__(self, side, x: Tensor, batch_size: int):
        self.side, self.x, self.batch_size, self.step = side, x, batch_size, 0
        self.lr, self.params = imagen.Config().lr, list(side.model.parameters())
        fused = x.device.type != "mps"
        self.opt = torch.optim.AdamW(self.params, lr=self.lr, weight_decay=0.0, fused=fused)
        self.ema = copy.deepcopy(side.model).eval().requires_grad_(False)

    def train_step(self) -> None:
        self.step += 1
        batch = batch_indices(len(self.x), self.batch_size, 0, self.step).to(self.x.device)
        self.side.loss(scale(self.x[batch])).backward()
        nn.utils.clip_grad_norm_(self.params, CLIP)
        self.opt.param_groups[0]["lr"] = self.lr * min(1, self.step / WARMUP)
        self.opt.step()
        self.opt.zero_grad()
        decay = min(EMA, (1 + self.step) / (10 + self.step)) if self.step > 1 else 0.0
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), self.params, 1 - decay)


# -- speed -----------------------------------------------------------------------------------------------


def speed(cfg: Config, x: Tensor) -> None:
    """Print size, speed and sampling time of every side; ratios are taken round by round."""
    size, device, rows = x.shape[-1], x.device, []
    trainers = {name: Trainer(make(size, device), x, cfg.batch_size) for name, make in TIMED.items()}

    def train(trainer, _) -> None:
        for _ in range(cfg.round_steps):
            trainer.train_step()

    def draw_samples(trainer, r: int) -> None:
        trainer.side.sample(trainer.ema, (64, 1, size, size), torch.Generator().manual_seed(r), 10)

    trained = {name: partial(train, trainer) for name, trainer in trainers.items()}
    trained = interleaved(trained, cfg.rounds, device)
    drawn = {name: partial(draw_samples, trainer) for name, trainer in trainers.items()}
    drawn = interleaved(drawn, 3, device)
    for name, trainer in trainers.items():
        side = trainer.side
        ratios = [theirs / ours for theirs, ours in zip(trained[name], trained["ours"], strict=True)]
        row = {"side": name, "M parameters": millions(side.model)}
        row |= {"images/s": f"{cfg.round_steps * cfg.batch_size / np.median(trained[name]):.0f}"}
        row |= {"ours / it": spread(ratios), "usual evaluations": side.usual}
        row |= {"s for 64 samples": f"{np.median(drawn[name]) * side.usual / 10:.1f}"}  # from 10 evaluations
        rows.append(row)
    print_table(rows)


# -- quality ---------------------------------------------------------------------------------------------


def score_side(trainer: Trainer, cfg: Config, path: Path) -> Tensor:
    """cfg.score_n samples (n, C, H, W) uint8 of a side as it is; the first twenty are drawn."""
    generator, parts = torch.Generator().manual_seed(0), []
    for n in torch.zeros(cfg.score_n).split(100):
        shape = (len(n), *trainer.x.shape[1:])
        x0 = trainer.side.sample(trainer.ema, shape, generator, trainer.side.evaluations)
        parts.append(imagen.to_uint8(x0))
    samples = torch.cat(parts)
    save_grid([""], samples[None, :20], path)
    return samples


def quality(cfg: Config, images: Images, device: torch.device) -> None:
    """Print and draw the distances of every side on the way to cfg.seconds of training."""
    net = load_classifier(images, Path(cfg.out), device)
    x, train, test = images.x.to(device), net.features(images.x), net.features(images.x_test)
    real = measures(real_features(train, cfg.score_n), test)
    marks, rows = (cfg.seconds / 4, cfg.seconds / 2, cfg.seconds), {}
    curves = {"real training images": [(mark, real["FD"]) for mark in marks]}
    for name, make in SCORED.items():
        torch.manual_seed(0)
        trainer, seconds, curves[name] = Trainer(make(x.shape[-1], device), x, cfg.batch_size), 0.0, []
        for mark in marks:
            while seconds < mark:
                start = time.perf_counter()
                trainer.train_step()
                synchronize(device)
                seconds += time.perf_counter() - start
            picture = Path(cfg.out) / f"{re.sub('[^a-z]+', '-', name)}.png"
            row = measures(net.features(score_side(trainer, cfg, picture)), test)
            rows[f"{name}, {mark:g} s, {trainer.step} steps"] = row
            curves[name].append((mark, row["FD"]))
    log(f"\nn={cfg.score_n} against {len(test)} test images")
    print_measures(rows | {"real training images": real})
    labels = dict(xlabel="training seconds", ylabel="Fréchet distance to test images")
    draw(Path(cfg.out) / "quality.png", curves, xscale="log", yscale="log", **labels)


def main(cfg: Config) -> None:
    device, images = pick_device(), load_images(cfg.dataset, cfg.data_dir)
    if cfg.load:
        return (by_evaluations if cfg.student else measure)(cfg, images, device)
    C, H, W = images.x.shape[1:]
    if C != 1 or H != W or W % 4:
        raise UserError(f"the peers need one channel and sides divisible by 4, got {(C, H, W)}")
    libraries = [f"{name} {version(name)}" for name in ("torch", "diffusers", "denoising-diffusion-pytorch")]
    where = f"{device}, {torch.get_num_threads()} threads, {platform.machine()}, {', '.join(libraries)}"
    log(f"{cfg.dataset}, {len(images.x)} training images, batch {cfg.batch_size}; {where}")
    speed(cfg, images.x.to(device))
    if cfg.seconds:
        quality(cfg, images, device)


if __name__ == "__main__":
    run_bench(Config, main, __doc__)
