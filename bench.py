"""Speed and quality beside the peers, in one interleaved run on the same data and device.

    pip install -r requirements-dev.txt
    python bench.py images                                  FashionMNIST from ./data; about 70 minutes on a CPU
    python bench.py images --seconds 0                      speed only, about 4 minutes
    python bench.py text                                    textgen.py beside PLANNER's way of doing the same; about 5 minutes
    python bench.py reason                                  ways to diffuse a chain of thoughts, and GPT-2; about 80 minutes

Peers of images: diffusers' UNet2DModel and denoising-diffusion-pytorch's Unet, each with its own loss, at comparable parameter counts. All are
unconditional and share the batch, optimizer, learning rate (but for one row), warm-up, clipping and EMA of imagen.py; what differs is the network, the recipe, and that
ours runs in bf16 where the hardware has it (but for the row "ours, fp32") while the peers run as they come, in float32.
"""
import csv
import dataclasses
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
import tyro
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import imagen
import metrics
import reason
import textgen
from data import Codec, Problems, load_images, load_problems, load_texts
from training import UserError, autocast, batch_indices, ema_ramp, finished, pick_device, run_script
from vae import TextVAE, corrupt, kl, small_backbones


@dataclass(frozen=True)
class Config:
    """Settings of a comparison."""

    what: tyro.conf.Positional[Literal["images", "text", "reason"]]  # what to compare
    dataset: str = "fashionmnist"  # images: any data set of imagen.py with classes, one channel and sides divisible by 4
    data_dir: str = "data"  # where torchvision finds its data sets, or puts them
    rounds: int = 7  # interleaved rounds of the speed measurement
    round_steps: int = 4  # training steps of each side in a round
    seconds: float = 240.0  # images and reason: training seconds of each side before it is scored; 0 leaves scores out
    digits: tuple[int, int] = (3, 2)  # reason: digits of the two factors
    seeds: tuple[int, ...] = (0, 1, 2)  # seeds of the scored training runs; reason: the first
    score_n: int = 250  # samples of a score; at most the number of training images
    batch_size: int = 64  # images of a training step, or reviews written at a time; reason has its own
    base_batch: int = 8  # text: codes of a diffusion step at the base size
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda where there is one, else mps, else cpu
    out: str = "out/bench"  # folder of the sample grids

    def __post_init__(self):
        if min(self.rounds, self.round_steps, self.batch_size, self.base_batch, len(self.seeds)) < 1 or self.seconds < 0 or self.score_n < 10:
            raise ValueError("rounds, round_steps, batch_size, base_batch and the number of seeds must be at least 1, seconds 0, score_n 10")
        if self.what == "reason" and (self.seconds <= 0 or min(self.digits) < 1 or max(self.digits) > 8):
            raise ValueError(f"reason needs seconds above 0 and digits in 1..8, got {self.seconds} and {self.digits}")


class Ours:
    """imagen.py's UNet; `textbook` keeps the network and takes the recipe of DDPM (eps, linear betas, plain weight); its lr is 2e-4 (appendix B)."""

    usual = 10

    def __init__(self, size: int, device, textbook: bool = False, precision: str = "auto", lr: float = imagen.Config.lr):
        recipe = dict(predict="eps", schedule="linear", weight="plain") if textbook else {}
        self.cfg = imagen.Config(precision=precision, seed=torch.initial_seed() % 2**31, **recipe)  # weights drawn as the peers draw theirs
        self.process, self.model = imagen.build(self.cfg, dict(shape=[1, size, size], names=[]), device)
        self.device, self.lr, self.call = device, lr, lambda model, x, t: model(x, t)

    def loss(self, x: Tensor) -> Tensor:
        with autocast(self.device, self.cfg.precision):
            return self.process.loss(self.model, x)

    def sample(self, model, shape, generator, evaluations: int) -> Tensor:
        with autocast(self.device, self.cfg.precision):
            return self.process.sample(model, shape, sampler="dpm++", steps=evaluations, clip=1.0, generator=generator)


class Diffusers:
    """diffusers' UNet2DModel, DDPMScheduler's training noise and DDIMScheduler's steps."""

    usual, lr = 1000, imagen.Config.lr

    def __init__(self, size: int, device):
        import diffusers

        shape = dict(sample_size=size, in_channels=1, out_channels=1, block_out_channels=(24, 48, 96), norm_num_groups=8)
        blocks = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"))
        self.model = diffusers.UNet2DModel(**shape, **blocks).to(device)
        self.noise, self.ddim = diffusers.DDPMScheduler(1000), diffusers.DDIMScheduler(1000, timestep_spacing="trailing")
        self.call = lambda model, x, t: model(x, t).sample

    def loss(self, x: Tensor) -> Tensor:
        eps, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),), device=x.device)
        return torch.nn.functional.mse_loss(self.model(self.noise.add_noise(x, eps, t), t).sample, eps)

    @torch.no_grad()
    def sample(self, model, shape, generator, evaluations: int) -> Tensor:
        device = next(model.parameters()).device
        x = torch.randn(shape, generator=generator).to(device)
        self.ddim.set_timesteps(evaluations)
        for t in self.ddim.timesteps:
            x = self.ddim.step(model(x, t).sample, t, x).prev_sample
        return x


class Lucidrains:
    """denoising-diffusion-pytorch's Unet and GaussianDiffusion with their own defaults (v, sigmoid schedule)."""

    usual, lr = 1000, imagen.Config.lr

    def __init__(self, size: int, device):
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet, denoising_diffusion_pytorch

        denoising_diffusion_pytorch.tqdm = lambda steps, **_: steps  # no bar for each of its loops
        self.model = Unet(dim=28, dim_mults=(1, 2, 4), channels=1).to(device)
        self.process = GaussianDiffusion(self.model, image_size=size, sampling_timesteps=50).to(device)
        self.call = lambda model, x, t: model(x, t)

    def loss(self, x: Tensor) -> Tensor:
        return self.process((x + 1) / 2)  # it wants [0, 1]

    @torch.no_grad()
    def sample(self, model, shape, generator, evaluations: int) -> Tensor:
        self.process.model, self.process.sampling_timesteps = model, evaluations
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        x = self.process.ddim_sample(shape)
        self.process.model = self.model
        return x * 2 - 1


SIDES = {
    "ours": Ours,
    "ours, fp32": lambda size, device: Ours(size, device, precision="fp32"),
    "ours, textbook recipe": lambda size, device: Ours(size, device, textbook=True),
    "ours, textbook recipe and lr": lambda size, device: Ours(size, device, textbook=True, lr=2e-4),
    "diffusers": Diffusers,
    "denoising-diffusion-pytorch": Lucidrains,
}
SCORED = {"ours": 10, "ours, textbook recipe": 10, "ours, textbook recipe and lr": 10, "diffusers": 50, "denoising-diffusion-pytorch": 50}  # evaluations a sample


class Trainer:
    """A side with the optimizer, warm-up, clipping and EMA that all sides share, and its learning rate, imagen.py's but for one row."""

    def __init__(self, side, x: Tensor, batch_size: int, seed: int):
        cfg = imagen.Config()
        self.side, self.x, self.batch_size, self.seed, self.step = side, x, batch_size, seed, 0
        self.params, self.lr = list(side.model.parameters()), lambda step: side.lr * min(1, step / cfg.warmup)
        self.opt = torch.optim.AdamW(self.params, lr=side.lr, weight_decay=0.0, fused=x.device.type != "mps")
        average = lambda ema, new, _: torch._foreach_lerp_(ema, new, 1 - ema_ramp(self.step, cfg.ema_decay))
        self.ema = AveragedModel(side.model, multi_avg_fn=average).eval()

    def train_step(self) -> None:
        self.step += 1
        batch = batch_indices(len(self.x), self.batch_size, self.seed, self.step).to(self.x.device)
        self.side.loss(metrics.scale(self.x[batch])).backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.opt.param_groups[0]["lr"] = self.lr(self.step)
        self.opt.step()
        self.opt.zero_grad()
        self.ema.update_parameters(self.side.model)


def synchronize(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def interleaved(sides: dict, rounds: int, device) -> dict[str, list[float]]:
    """Seconds of every side(round) in each round, all sides in turn, after a round that warms up."""
    took = {name: [] for name in sides}
    for r in range(-1, rounds):
        for name, side in sides.items():
            synchronize(device)
            start = time.perf_counter()
            side(r + 1)
            synchronize(device)
            took[name] += [time.perf_counter() - start] * (r >= 0)
    return took


def peak_memory(name: str, size: int, batch_size: int, device_name: str, pipe) -> None:
    """In a process of its own: MiB that three training steps add to the peak (CPU: resident size; CUDA: allocated)."""
    device = pick_device(device_name)
    trainer = Trainer(SIDES[name](size, device), torch.zeros(256, 1, size, size, dtype=torch.uint8, device=device), batch_size, 0)
    peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # getrusage counts the parent too
    before = peak() if sys.platform == "linux" else math.nan
    for _ in range(3):
        trainer.train_step()
    after = peak() if sys.platform == "linux" else math.nan
    pipe.send(torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else after - before)


def spread(values) -> str:
    return f"{np.median(values):.2f} ({min(values):.2f}..{max(values):.2f})"


def speed(cfg: Config, x: Tensor, device) -> None:
    """Print size, speed, memory and sampling time of every side; ratios are taken round by round."""
    trainers = {name: Trainer(make(x.shape[-1], device), x, cfg.batch_size, 0) for name, make in SIDES.items() if "textbook" not in name}  # those have our network
    work = lambda trainer: [trainer.train_step() for _ in range(cfg.round_steps)]
    took = interleaved({name: lambda r, t=trainer: work(t) for name, trainer in trainers.items()}, cfg.rounds, device)
    rates = {name: [cfg.round_steps * cfg.batch_size / seconds for seconds in row] for name, row in took.items()}
    draw = lambda t, r: t.side.sample(t.ema, (64, *x.shape[1:]), torch.Generator().manual_seed(r), 10)
    took = interleaved({name: lambda r, t=trainer: draw(t, r) for name, trainer in trainers.items()}, 3, device)
    times = {name: [seconds * trainers[name].side.usual / 10 for seconds in row] for name, row in took.items()}  # long loops scaled from 10 evaluations
    print("| side | M parameters | MFLOP forward, an image | train images/s | ours / it, a round | peak MiB | evaluations, usual | s for 64 samples, from 10 evaluations |")
    print("|---|---|---|---|---|---|---|---|")
    for name, trainer in trainers.items():
        model = trainer.side.model
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            trainer.side.call(model, torch.zeros(1, *x.shape[1:], device=device), torch.ones(1, dtype=torch.long, device=device))
        here, there = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(target=peak_memory, args=(name, x.shape[-1], cfg.batch_size, cfg.device, there))
        process.start()
        there.close()  # so that a child that dies is an error here, not a wait for ever
        memory = here.recv()
        process.join()
        ratios = [a / b for a, b in zip(rates["ours"], rates[name])]
        cells = [name, f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}", f"{counter.get_total_flops() / 1e6:.0f}"]
        cells += [f"{np.median(rates[name]):.0f}", spread(ratios), f"{memory:.0f}", trainer.side.usual, f"{np.median(times[name]):.1f}"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def quality(cfg: Config, images, device) -> None:
    """Print the distances of every scored side after cfg.seconds of training, for each seed, and their ratio to ours."""
    net, accuracy = metrics.load_classifier(images, imagen.CACHE, device)
    x, scores = images.x.to(device), {name: [] for name in SCORED}
    print(f"\nAfter {cfg.seconds:g} training seconds, n={cfg.score_n} against {len(images.x_test)} test images (classifier accuracy {accuracy:.3f}):")
    for seed in cfg.seeds:
        for name, evaluations in SCORED.items():
            torch.manual_seed(seed)
            trainer = Trainer(SIDES[name](x.shape[-1], device), x, cfg.batch_size, seed)
            start = time.perf_counter()
            while time.perf_counter() - start < cfg.seconds:
                trainer.train_step()
                synchronize(device)
            generator = torch.Generator().manual_seed(seed)
            shapes = [(min(100, cfg.score_n - i), *x.shape[1:]) for i in range(0, cfg.score_n, 100)]
            samples = torch.cat([imagen.to_uint8(trainer.side.sample(trainer.ema, shape, generator, evaluations)) for shape in shapes])
            imagen.save_grid(list(samples[:50].split(10)), [""] * 5, Path(cfg.out) / f"{name}_seed{seed}.png".replace(" ", "_").replace(",", ""))
            rows = metrics.score_images(samples, images, net, device)
            scores[name].append(rows["samples"]["FD"])
            numbers = "  ".join(f"{key} {value:.4g}" for key, value in rows["samples"].items())
            print(f"  seed {seed}  {name} ({trainer.step} steps, {evaluations} evaluations): {numbers}", flush=True)
    print(f"  real training images: FD {rows['real']['FD']:.3g}\n\n| side | FD, median (range) of {len(cfg.seeds)} seeds | its FD / ours, a seed |\n|---|---|---|")
    for name, values in scores.items():
        print(f"| {name} | {spread(values)} | {spread([a / b for a, b in zip(values, scores['ours'])])} |")


def planner_loss(vae: TextVAE, ids: Tensor, target: Tensor) -> Tensor:
    """The loss of vae (with learned variance) by the road that PLANNER's code takes: one run of the encoder for the mean and one for the variance;
    the codes pass through the decoder by themselves, and the text reads its keys and values from that pass's cache."""
    noisy = corrupt(ids, torch.rand(len(ids), device=ids.device) * vae.p_max, vae.encoder.config.vocab_size)
    mean = vae.fc_mean(vae.states(noisy)[0][:, : vae.k]).tanh()
    var = vae.fc_log_var(vae.states(noisy)[0][:, : vae.k]).clamp(-20, 5).exp()
    z = mean + var.sqrt() * torch.randn_like(mean)
    cache = vae.decoder.transformer(inputs_embeds=vae.prefix(z), use_cache=True).past_key_values
    read = torch.nn.functional.pad(target.clamp(min=0)[:, :-1], (1, 0), value=vae.eos)
    logits = vae.decoder(input_ids=read, past_key_values=cache).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100) + vae.beta * kl(mean, var)


def text(cfg: Config, device) -> None:
    """Print three ratios: a step of the VAE, a step of the diffusion, and writing reviews."""
    tiny = textgen.Config(dataset="grammar")
    texts = load_texts("grammar")
    facts = textgen.vae_facts(tiny, texts, Path(cfg.out))
    codec, vae = Codec(**facts["codec"]), textgen.build_vae(tiny, facts, device)
    ids, target = (part[: tiny.vae_batch].to(device) for part in codec.encode(texts.x[: tiny.vae_batch]))
    plain = lambda *parts: TextVAE(*parts, tiny.k, tiny.d, codec.eos, variance="learned", beta=1e-5).to(device)
    parts = small_backbones(codec.vocab, tiny.vae_width, tiny.vae_depth, tiny.max_tokens + tiny.k + 1)
    bert, gpt = (part.config.to_dict() | dict(attn_implementation="sdpa") for part in parts)  # GPT-2's own activation, torch's fused attention
    usual = plain(BertModel(BertConfig(**bert), add_pooling_layer=False), GPT2LMHeadModel(GPT2Config(**gpt | dict(activation_function="gelu_new"))))
    same = plain(*parts)

    def step(model, loss):
        opt = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type != "mps")

        def work(_):
            for _ in range(cfg.round_steps):
                loss().backward()
                opt.step()
                opt.zero_grad()

        return work

    for name, theirs in (("PLANNER's way", usual), ("PLANNER's way on our backbones", same)):
        sides = {"ours": step(vae, lambda: vae(ids, target)), name: step(theirs, lambda: planner_loss(theirs, ids, target))}
        compare(f"VAE step, tiny, batch {tiny.vae_batch}, float32", sides, cfg, device)

    base = textgen.Config(dataset="grammar", size="base")
    encoder = AutoModel.from_config(BertConfig(), add_pooling_layer=False).to(device).eval()  # bert-base's shape, random weights
    process, denoiser = textgen.build_denoiser(base, dict(names=texts.names), vae, device)
    words = torch.randint(1000, 30_000, (cfg.base_batch, base.max_tokens), device=device)
    labels, stored = torch.zeros(cfg.base_batch, dtype=torch.long, device=device), torch.randn(cfg.base_batch, base.k, base.d, device=device)

    def encoded():
        with torch.no_grad():
            return encoder(input_ids=words).last_hidden_state[:, : base.k, : base.d]

    loss = lambda z: process.loss(denoiser, z, labels, base.label_drop)
    sides = {"stored codes": step(denoiser, lambda: loss(stored)), "encoded on the fly": step(denoiser, lambda: loss(encoded()))}
    compare(f"diffusion step, base, batch {cfg.base_batch}, {base.max_tokens} tokens, float32", sides, cfg, device)

    process, denoiser = textgen.build_denoiser(tiny, dict(names=texts.names), vae, device)
    full = dataclasses.replace(tiny, top_p=1.0)  # random weights, read greedily, may end every review at once
    bundle = textgen.Bundle(full, codec, vae.eval(), process, denoiser.eval(), torch.zeros(tiny.k, tiny.d), torch.ones(tiny.k, tiny.d), texts.names, device)
    many = lambda r: bundle.sample(torch.zeros(cfg.batch_size, dtype=torch.long), [""] * cfg.batch_size, r)
    single = lambda r: [bundle.sample(torch.zeros(1, dtype=torch.long), [""], r) for _ in range(4)]
    compare(f"writing {cfg.batch_size} reviews, tiny, 20 steps of diffusion; one by one from 4", {"in a batch": many, "one by one": single}, cfg, device, cfg.batch_size / 4)


START = dict(shift=1.0)  # where the search for reason.py's defaults began, with masks drawn evenly: what most ways change one thing of

WAYS = {  # to diffuse a chain: what each sets in place of reason.py's defaults
    "masked, multi-pass, more masks (the default)": {},
    "likewise, sinusoids as positions": dict(positions="sinusoid"),
    "likewise, single-pass": dict(passes="single"),
    "masked, multi-pass": START,
    "masked, sinusoids as positions": START | dict(positions="sinusoid"),
    "masked, single-pass": START | dict(passes="single"),
    "masked, weight elbo": START | dict(weight="elbo"),
    "masked, self-conditioning": START | dict(self_condition=0.5),
    "gaussian, multi-pass, loss on tokens": START | dict(process="gaussian"),
    "gaussian, self-conditioning": START | dict(process="gaussian", self_condition=0.5),
    "gaussian, t at less noise (shift 0.5)": START | dict(process="gaussian", shift=0.5),
    "gaussian, loss on vectors (x0)": START | dict(process="gaussian", predict="x0"),
    "gaussian, single-pass": START | dict(process="gaussian", passes="single"),
    "latents": START | dict(codec="latents", process="gaussian", predict="x0", vae_steps=600),
}

TOLD = {  # otherwise, to a masked, multi-pass way: what becomes of the thoughts of a chain, and of each text
    "masked, most significant digit first": (lambda thoughts: thoughts, lambda text: re.sub(r"\d( \d)+", lambda digits: digits[0][::-1], text)),
    "masked, one long thought before the answer": (lambda thoughts: [" ".join(thoughts[:-1]), thoughts[-1]], lambda text: text),
    "masked, no thought but the answer": (lambda thoughts: thoughts[-1:], lambda text: text),
}


def told(problems: Problems, thoughts, text) -> Problems:
    """The same problems with their chains and texts changed."""
    questions, chains = (problems.question, problems.question_test), (problems.thoughts, problems.thoughts_test)
    (q, q_test), (r, r_test) = ([text(q) for q in part] for part in questions), ([[text(t) for t in thoughts(chain)] for chain in part] for part in chains)
    return Problems(q, r, q_test, r_test)


def reasoning(cfg: Config, device) -> None:
    """Train every way of WAYS (latents: with its VAE), START on the problems of TOLD, and GPT-2 of the same width and depth with its chain and on
    the answer only, for cfg.seconds each; print and draw what each learned. What is finished in the folder already is loaded."""
    given, runs, rows = load_problems("mult", cfg.digits), {}, []
    for name in [*WAYS, *TOLD]:
        out, changes = f"{cfg.out}/reason/{re.sub('[^a-z0-9]+', '-', name).strip('-')}", WAYS.get(name, START)
        one = reason.Config(digits=cfg.digits, out=out, seconds=cfg.seconds, max_steps=10**6, sample_every=50, log_every=10, seed=cfg.seeds[0], device=cfg.device, **changes)
        if name in TOLD or not runs:  # the ways share their problems
            problems = told(given, *TOLD[name]) if name in TOLD else given
            facts = reason.problem_facts(one, problems)
        if not finished(reason.stage_config(one, "diffusion")):
            reason.train_diffusion(dataclasses.replace(one, resume=(Path(out) / "diffusion/last.pt").exists()), facts, problems, device)
        runs[name] = Path(out) / "diffusion"
        thinker, _ = reason.load_thinker(one, runs[name] / "last.pt", device)
        split = thinker.encode(problems.question_test[: cfg.score_n], problems.thoughts_test[: cfg.score_n])
        rows.append((name, thinker.model, *(thinker.score(split, one.seed, steps=steps)["answer"] for steps in (1, 8))))
        if len(runs) == 1:
            plain, default, questions = one, thinker, split
    for stage in ("chain", "answer"):
        baseline = reason.train_baseline(plain, stage, default, given, cfg.seconds)
        right = metrics.score_chains(baseline.chains(questions.questions), reason.last_only(questions.thoughts, stage))["answer"]
        runs[f"GPT-2, {stage}"] = Path(plain.out) / stage
        rows.append((f"GPT-2, {stage}", baseline.model, math.nan, right))
    print(f"\n| way | M parameters | steps in {cfg.seconds:g} s | seconds to 90% | right answers, 1 evaluation a thought | 8 evaluations |\n|---|---|---|---|---|---|")
    for name, model, one, eight in rows:
        log = list(csv.DictReader(open(runs[name] / "eval.csv")))
        there = next((r["seconds"] for r in log if float(r["answer"]) >= 0.9), "-")
        print(f"| {name} | {sum(p.numel() for p in model.parameters()) / 1e6:.2f} | {log[-1]['step']} | {there} | {'-' if math.isnan(one) else f'{one:.3f}'} | {eight:.3f} |")
    print("wrote", reason.learning_curves(runs, Path(cfg.out) / "reason/curves.png"))


def compare(title: str, sides: dict, cfg: Config, device, scale: float = 1.0) -> None:
    """Print the seconds of two sides, those of the second times `scale`, and their ratio, round by round."""
    took = interleaved(sides, cfg.rounds, device)
    (a, ours), (b, theirs) = took.items()
    theirs = [seconds * scale for seconds in theirs]
    print(f"{title}: {a} {np.median(ours):.3f} s, {b} {np.median(theirs):.3f} s, ratio {spread([t / o for o, t in zip(ours, theirs)])}", flush=True)


def main(cfg: Config) -> None:
    device = pick_device(cfg.device)
    if cfg.what == "text":
        print(f"{device}, {torch.get_num_threads()} threads, {platform.machine()}; torch {version('torch')}, transformers {version('transformers')}; {cfg.rounds} interleaved rounds\n")
        return text(cfg, device)
    if cfg.what == "reason":
        print(f"mult {cfg.digits}, n={cfg.score_n}, seed {cfg.seeds[0]}; {device}, {torch.get_num_threads()} threads, {platform.machine()}; torch {version('torch')}\n")
        return reasoning(cfg, device)
    images = load_images(cfg.dataset, cfg.data_dir)
    if images.x.shape[1] != 1 or images.x.shape[-1] % 4 or images.x.shape[-1] != images.x.shape[-2]:
        raise UserError(f"the peers are set up for one channel and square images of a side divisible by 4, got {tuple(images.x.shape[1:])}; choose another --dataset")
    try:
        libraries = ", ".join(f"{p} {version(p)}" for p in ("torch", "diffusers", "denoising-diffusion-pytorch"))
    except PackageNotFoundError as error:
        raise UserError(f"{error.name} is not installed; the peers come with: pip install -r requirements-dev.txt") from error
    print(f"{cfg.dataset}, {len(images.x)} training images, batch {cfg.batch_size}; {device}, {torch.get_num_threads()} threads, {platform.machine()}; {libraries}\n")
    speed(cfg, images.x.to(device), device)
    if cfg.seconds:
        quality(cfg, images, device)


if __name__ == "__main__":
    run_script(Config, main, __doc__)
