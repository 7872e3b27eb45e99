"""Text diffusion: a VAE turns a paragraph into a few codes, diffusion makes new codes, the VAE's decoder writes them out. PLANNER, 2306.02531.

    python textgen.py --dataset grammar                     small hotel reviews with a known grammar: nothing to download
    python textgen.py --dataset tripadvisor                 hotel reviews (downloaded); or --dataset reviews.csv
    python textgen.py --sample_from out/grammar/diffusion/last.pt --guidance 0
"""
import dataclasses
import hashlib
import math
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import metrics
from data import Codec, Texts, grammar_rating, load_texts, pretrained_codec, train_codec, windows
from diffusion import SCHEDULES, Diffusion, Transformer, noise_shift
from training import Run, UserError, autocast, finished, is_main, load_checkpoint, load_weights, need, pick_device, reason, run_script, show, wait, world_size
from vae import LabelGPT, TextVAE, backbone, corrupt, small_backbones, small_gpt

SIZES = {  # what a field left at 0 or "" becomes
    "tiny": dict(encoder="scratch", decoder="scratch", max_tokens=56, k=28, latent_noise=1.2, shift=4.0, lr=1e-3, vae_steps=5000, vae_batch=32, width=192, depth=6, diffusion_steps=2500, diffusion_batch=128),
    "base": dict(encoder="bert-base-uncased", decoder="gpt2", max_tokens=256, k=16, latent_noise=0.3, shift=2.0, lr=1e-4, vae_steps=50_000, vae_batch=128, width=768, depth=12, diffusion_steps=100_000, diffusion_batch=256),
}

ALARM_FROM = 1000  # steps of the VAE before which its codes may still be ignored


@dataclass(frozen=True)
class Config:
    """Hyperparameters. Edit the defaults here, or override any of them: python textgen.py --lr 1e-3. Where 0 or "" stands, --size decides."""

    # -- data --
    dataset: str = "tripadvisor"  # grammar (no download), tripadvisor, another hub name, or the path of a csv, jsonl, parquet or txt file
    text_column: str = ""  # column of the texts; empty: guessed
    label_column: str = ""  # column of the classes, such as a rating; empty: guessed
    condition_column: str = ""  # column of the condition, for --condition column
    size: Literal["tiny", "base"] = "tiny"  # tiny: from scratch, for a CPU; base: pretrained BERT and GPT-2, for a GPU
    max_tokens: int = 0  # tokens of a text with its end token; longer texts are cut into pieces between sentences
    # -- VAE --
    encoder: str = ""  # scratch, or a hub name or local folder of a BERT
    decoder: str = ""  # scratch, or a hub name or local folder of a GPT-2
    vocab: int = 4096  # scratch: tokens of the BPE that is trained on the texts
    vae_width: int = 192  # scratch: width of encoder and decoder
    vae_depth: int = 3  # scratch: blocks of encoder and decoder
    k: int = 0  # codes of a text
    span: int = 0  # neighbouring states of the encoder that a code is made of; 0: as many as cover the text; 1: the first k states, as PLANNER's
    pool: Literal["mean", "concat"] = "mean"  # of those states: concat keeps their order, mean is learned from fewer texts
    d: int = 256  # width of a code: wide, so that what noise takes from one number another still says
    tanh: bool = True  # bound the codes to (-1, 1)
    variance: Literal["fixed", "learned"] = "fixed"  # of the codes: fixed noise, or PLANNER's learned one with a KL term
    latent_noise: float = 0.0  # fixed: standard deviation of the noise on the codes that the decoder learns from: more makes new texts more fluent and copies less exact
    beta: float = 0.0  # weight of the KL, in nats a text
    corrupt: Literal["sub", "mask"] = "sub"  # the encoder's input noise: random tokens, or the mask token
    p_max: float = 0.4  # each text is corrupted at a rate drawn from 0..p_max
    vae_steps: int = 0  # optimizer steps of the VAE
    vae_batch: int = 0  # texts of its step
    # -- diffusion --
    condition: Literal["none", "label", "prefix", "column"] = "label"  # the class; the text before; or the text in --condition_column
    T: int = 1000  # timesteps of the forward process
    schedule: Literal["cosine", "linear"] = "cosine"  # noise schedule
    shift: float = 0.0  # above 1: more of the steps at high noise
    predict: Literal["x0", "v", "eps"] = "v"  # what the denoiser's output means
    weight: Literal["min-snr", "plain"] = "plain"  # weight of a step's loss
    self_condition: float = 0.9  # share of steps in which the denoiser sees its first guess
    label_drop: float = 0.1  # share of conditions dropped, for guidance
    width: int = 0  # width of the denoiser
    depth: int = 0  # blocks of the denoiser
    diffusion_steps: int = 0  # optimizer steps of the diffusion
    diffusion_batch: int = 0  # codes of its step
    # -- optimisation --
    max_steps: int = 0  # upper limit on the steps of each stage; 0: none
    batch_size: int = 0  # of both stages; 0: vae_batch and diffusion_batch
    lr: float = 0.0  # AdamW's learning rate after warm-up
    warmup: int = 100  # steps of linear warm-up
    ema_decay: float = 0.999  # upper limit of the EMA's decay; it ramps as (1 + step) / (10 + step)
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of the networks; auto: bf16 where the hardware has it
    compile: bool = False  # compile the networks with torch.compile
    # -- sampling --
    sampler: Literal["dpm++", "ddim", "ddpm"] = "dpm++"  # DPM-Solver++(2M), DDIM, or DDPM's ancestral sampling
    steps: int = 20  # evaluations of the denoiser (two each with guidance)
    eta: float = 0.0  # ddim: 0 without noise, 1 as much as ddpm
    guidance: float = 2.0  # classifier-free guidance: 0 off, 1 to 4 strong
    top_p: float = 0.0  # decode greedily (0), or from the smallest set of tokens with this probability
    prompt: str = ""  # prefix and column: the text to go on from; empty: texts of the test split
    score_n: int = 200  # texts of a score; 0: no score after training
    compare: bool = True  # score: train a GPT-2 of equal size for at most as long, and another for the perplexity
    # -- the run --
    stage: Literal["all", "vae", "diffusion", "sample", "score"] = "all"  # what to do; a finished stage is loaded, not run again
    out: str = ""  # folder of the run; default out/DATASET
    seed: int = 0  # of weights, data order, noise and samples
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda where there is one, else mps, else cpu
    log_every: int = 50  # steps between lines of the log
    sample_every: int = 500  # steps between evaluations
    save_every: int = 500  # steps between checkpoints
    resume: bool = False  # go on with the run in the folder
    sample_from: str = ""  # sample from this checkpoint of the diffusion; no data, no training
    score_from: str = ""  # score this checkpoint on the test split

    kind = "textgen"
    vae_fixed = tuple(
        "dataset text_column label_column size max_tokens encoder decoder vocab vae_width vae_depth k span pool d tanh variance latent_noise beta corrupt p_max batch_size seed".split()
    )
    fixed = (*vae_fixed, *"condition_column condition T schedule shift predict weight self_condition label_drop width depth".split())

    def __post_init__(self):
        for name, value in SIZES[self.size].items():
            if not getattr(self, name):
                object.__setattr__(self, name, value)

        object.__setattr__(self, "span", self.span or -(-self.max_tokens // self.k))

        need(self, "k span d vae_depth depth vae_steps vae_batch diffusion_steps diffusion_batch T log_every sample_every save_every", 1)
        need(self, "warmup max_steps batch_size score_n latent_noise beta", 0)
        need(self, "max_tokens", 4, 1024 - self.k)  # GPT-2 has 1024 positions
        need(self, "vocab", 300, 100_000)  # 256 bytes and something
        need(self, "seed", 0, 2**32)
        need(self, "guidance", 0, 1000)
        need(self, "label_drop ema_decay eta p_max top_p self_condition", 0, 1)
        need(self, "lr", 1e-9, 1)
        need(self, "shift", 0.01, 100)
        need(self, "steps", 1, self.T)
        if self.width % 16 or self.vae_width % 8:
            raise ValueError(f"width must be divisible by 16 and vae_width by 8, got {self.width} and {self.vae_width}")
        if self.k * (self.span - 1) >= self.max_tokens:
            raise ValueError(f"k times span must not go a span beyond max_tokens, {self.max_tokens}, got {self.k} times {self.span}")
        if self.sample_from and self.score_from:
            raise ValueError("choose one of sample_from and score_from")
        if self.guidance and not self.label_drop and self.condition != "none":
            raise ValueError("guidance needs a denoiser that has also seen no condition: --label_drop above 0, or --guidance 0")
        if self.prompt and self.condition in ("none", "label"):
            raise ValueError(f"--prompt is for --condition prefix or column, this is {self.condition}")
        if (self.condition == "column") != bool(self.condition_column):
            raise ValueError("--condition column and --condition_column go together")


class VAEStage(Config):
    fixed = Config.vae_fixed


def stage_config(cfg: Config, stage: str) -> Config:
    """cfg as the training loop of a stage reads it: its folder, steps and batch."""
    steps, batch = (cfg.vae_steps + cfg.diffusion_steps, cfg.vae_batch) if stage in ("baseline", "judge") else (getattr(cfg, f"{stage}_steps"), getattr(cfg, f"{stage}_batch"))
    settings = asdict(cfg) | dict(out=f"{cfg.out}/{stage}", max_steps=min(steps, cfg.max_steps or steps), batch_size=cfg.batch_size or batch)
    return (VAEStage if stage == "vae" else Config)(**settings)


# -- texts to tokens ----------------------------------------------------------------------------------------------------


@dataclass
class Pieces:
    """The texts of a split cut to length: pieces x, their labels y (N,), their conditions c ("" where there are none), ids and targets (N, L)."""

    x: list[str]
    y: Tensor
    c: list[str]
    ids: Tensor
    target: Tensor


def cut(cfg: Config, codec: Codec, texts: Texts, split: str, batch_size: int = 1) -> Pieces:
    """The pieces of a split ("train", pieces overlapping, or "test"); with --condition prefix the second of each two neighbours, given the first.

    Raises UserError where there are none, or fewer than a batch for training.
    """
    x, y, c = (texts.x, texts.y, texts.c) if split == "train" else (texts.x_test, texts.y_test, texts.c_test)
    rows = []
    for text, label, condition in zip(x, y, c):
        if cfg.condition == "prefix":
            pieces = windows(text, codec.fits, overlap=False)
            rows += [(after, label, before) for before, after in zip(pieces, pieces[1:])]
        else:
            rows += [(piece, label, condition) for piece in windows(text, codec.fits, overlap=split == "train" and cfg.condition != "column")]
    if 0 < len(rows) < batch_size:
        raise UserError(f"{len(rows)} pieces of text, fewer than a batch of {batch_size}: give more texts, or a smaller --batch_size")
    if not rows:
        raise UserError(f"--condition prefix needs texts of more than --max_tokens {cfg.max_tokens} tokens: no text of the {split} split is cut in two")
    x, y, c = map(list, zip(*rows))
    if split == "train" and is_main() and (long := sum(not codec.fits(text) for text in c)):
        print(f"{long} of {len(c)} conditions are longer than {cfg.max_tokens} tokens (--max_tokens): what is beyond is not read")
    return Pieces(x, torch.tensor(y), c, *codec.encode(x))


# -- VAE ----------------------------------------------------------------------------------------------------------------


def vae_facts(cfg: Config, texts: Texts, folder: Path) -> dict:
    """What the VAE's checkpoint must know: the tokenizers (those of the checkpoint, where there is one) and the data."""
    if (folder / "last.pt").exists():
        codec = Codec(**load_checkpoint(folder / "last.pt", cfg.kind)["facts"]["codec"])
    elif cfg.encoder == cfg.decoder == "scratch":
        codec = train_codec(texts.x, cfg.vocab, cfg.max_tokens)
    elif "scratch" in (cfg.encoder, cfg.decoder):
        raise UserError(f"--encoder {cfg.encoder} and --decoder {cfg.decoder}: both from scratch, or neither")
    else:
        codec = pretrained_codec(cfg.encoder, cfg.decoder, cfg.max_tokens)
    return dict(stage="vae", codec=asdict(codec), names=texts.names, checksum=texts.checksum(), texts=len(texts.x))


def build_vae(cfg: Config, facts: dict, device: torch.device, load: bool = True) -> TextVAE:
    """The VAE that cfg describes; pretrained parts are read only if `load`, otherwise facts["backbones"] says their shape."""
    torch.manual_seed(cfg.seed)
    codec = Codec(**facts["codec"])
    if cfg.encoder == "scratch":
        parts = small_backbones(codec.vocab, cfg.vae_width, cfg.vae_depth, max(cfg.max_tokens, cfg.k * cfg.span) + cfg.k + 1)
    elif "backbones" in facts and not load:
        parts = [backbone("", config, part) for config, part in zip(facts["backbones"], ("encoder", "decoder"))]
    else:
        try:
            parts = [backbone(name, part=part) for name, part in ((cfg.encoder, "encoder"), (cfg.decoder, "decoder"))]
        except Exception as error:  # no network, no such name, a damaged folder
            raise UserError(f"{cfg.encoder} and {cfg.decoder} could not be had ({reason(error)}); --size tiny needs no download") from error
        facts["backbones"] = [part.config.to_json_string(use_diff=False) for part in parts]
    limit = min(parts[0].config.max_position_embeddings, parts[1].config.n_positions - cfg.k)
    if max(cfg.max_tokens, cfg.k * cfg.span) > limit:
        raise UserError(f"--max_tokens {cfg.max_tokens}, but {cfg.encoder} and {cfg.decoder} take at most {limit} with {cfg.k} codes")
    how = dict(span=cfg.span, pool=cfg.pool, tanh=cfg.tanh, variance=cfg.variance, noise=cfg.latent_noise, beta=cfg.beta, p_max=cfg.p_max)
    return TextVAE(*parts, cfg.k, cfg.d, codec.eos, mask_id=codec.mask if cfg.corrupt == "mask" else None, **how).to(device)


@torch.no_grad()
def encode_all(vae: TextVAE, ids: Tensor, device) -> Tensor:
    """Means (N, k, d) of the codes of ids (N, L)."""
    return torch.cat([vae.encode(part.to(device))[0].cpu() for part in ids.split(256)])


def write_texts(codec: Codec, vae: TextVAE, z: Tensor, cfg: Config, device) -> list[str]:
    """The texts that the decoder writes for codes z (N, k, d), 64 at a time."""
    return [text for part in z.split(64) for text in codec.decode(vae.generate(part.to(device), cfg.max_tokens, cfg.top_p))]


@torch.no_grad()
def alarm(vae: TextVAE, ids: Tensor, target: Tensor, device) -> dict[str, float]:
    """Cross-entropy in nats a token of targets (N, L) under their own codes, under each other's and under zeros: alike, when the codes are ignored."""
    ids, target = ids.to(device), target.to(device)
    z = vae.encode(ids)[0]
    return {name: vae.cross_entropy(codes, target).item() for name, codes in dict(matched=z, shuffled=z.roll(1, 0), zero=torch.zeros_like(z)).items()}


def train_vae(cfg: Config, texts: Texts, device) -> None:
    cfg = stage_config(cfg, "vae")
    facts, out = vae_facts(cfg, texts, Path(cfg.out)), Path(cfg.out)
    codec = Codec(**facts["codec"])
    vae = build_vae(cfg, facts, device)
    train, test = cut(cfg, codec, texts, "train", cfg.batch_size), cut(cfg, codec, texts, "test")
    run = Run(cfg, vae, device, facts)
    if run.main:
        print(f"{cfg.dataset}: {len(texts.x)} training texts in {len(train.x)} pieces of up to {cfg.max_tokens} tokens, {len(texts.x_test)} test texts in {len(test.x)}, {len(texts.names)} classes")
        print(f"VAE: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters, {cfg.k} codes of width {cfg.d}; {device}, {run.world} process(es)", flush=True)
    ids, target = train.ids.to(device), train.target.to(device)
    for step, batch in run.steps(len(ids)):
        with autocast(device, cfg.precision):
            loss = run.model(ids[batch], target[batch])
        run.update(loss)
        if (step % cfg.sample_every == 0 or step == cfg.max_steps) and run.main:
            with run.pause():
                ce = alarm(run.ema.module, test.ids[:128], test.target[:128], device)
                print(f"step {step}: held-out nats a token: " + ", ".join(f"{name} codes {value:.2f}" for name, value in ce.items()), flush=True)
                if step >= ALARM_FROM and len(test.ids) > 1 and ce["shuffled"] - ce["matched"] < 0.1:
                    print("warning: the decoder ignores the codes (posterior collapse): lower --beta or --p_max, or train longer")
    if run.main:
        back = write_texts(codec, run.ema.module, encode_all(run.ema.module, test.ids[:8], device), dataclasses.replace(cfg, top_p=0.0), device)
        lines = [line for a, b in zip(test.x, back) for line in (f"original       {a}", f"reconstruction {b}", "")]
        print(f"trained {run.seconds:.0f} s; wrote {run.curve()}, {show(out, 'reconstructions', lines)}", flush=True)


# -- diffusion ----------------------------------------------------------------------------------------------------------


def build_denoiser(cfg: Config, facts: dict, vae: TextVAE, device) -> tuple[Diffusion, Transformer]:
    """The process and the denoiser that cfg describes, for the codes of vae. Raises UserError where the schedule does not end in noise."""
    torch.manual_seed(cfg.seed)
    classes = len(facts["names"]) if cfg.condition == "label" else 0
    d_context = vae.encoder.config.hidden_size if cfg.condition in ("prefix", "column") else 0
    model = Transformer(cfg.d, cfg.width, cfg.depth, classes=classes, d_context=d_context, self_condition=cfg.self_condition > 0).to(device)
    try:
        alpha_bar = noise_shift(SCHEDULES[cfg.schedule](cfg.T), cfg.shift)
        return Diffusion(alpha_bar, cfg.predict, cfg.weight, self_condition=cfg.self_condition).to(device), model
    except ValueError as error:
        raise UserError(f"--schedule {cfg.schedule} with --T {cfg.T} and --shift {cfg.shift}: {error}") from error


@torch.no_grad()
def conditions(cfg: Config, codec: Codec, vae: TextVAE, y: Tensor, c: list[str], device):
    """The condition of the denoiser for labels y (N,) or texts c: labels, or (None, encoder's states (N, L, D), mask (N, L))."""
    if cfg.condition == "none":
        return torch.full_like(y, -1).to(device)
    if cfg.condition == "label":
        return y.to(device)
    parts = [vae.states(part.to(device)) for part in codec.encode(c)[0].split(256)]
    return None, torch.cat([h.half() for h, _ in parts]), torch.cat([mask for _, mask in parts])


def at(y, index):
    """The rows `index` of a condition."""
    return (None, y[1][index].float(), y[2][index]) if isinstance(y, tuple) else y[index]


def load_vae(cfg: Config, facts: dict, weights: dict, path, device) -> TextVAE:
    vae = build_vae(cfg, facts, device, load=False)
    load_weights(vae, weights, path)
    return vae.eval().requires_grad_(False)


def train_diffusion(cfg: Config, texts: Texts, device) -> None:
    path = Path(cfg.out) / "vae" / "last.pt"
    checkpoint = load_checkpoint(path, cfg.kind)
    if not finished(stage_config(cfg, "vae")):
        raise UserError(f"the VAE in {path} is at step {checkpoint['step']}, before its last: add --resume, with --stage all or vae")
    weights = checkpoint["ema"]
    vae = load_vae(cfg, checkpoint["facts"], weights, path, device)
    cfg, codec = stage_config(cfg, "diffusion"), Codec(**checkpoint["facts"]["codec"])
    digest = hashlib.sha256(b"".join(w.cpu().numpy().tobytes() for w in weights.values())).hexdigest()[:12]
    facts = checkpoint["facts"] | dict(stage="diffusion", checksum=texts.checksum(), vae=digest, vae_seconds=checkpoint["seconds"])
    train = cut(cfg, codec, texts, "train", cfg.batch_size)
    z = encode_all(vae, train.ids, device)
    mean, std = z.mean(0), z.std(0).clamp(min=1e-3)  # (k, d)
    z = ((z - mean) / std).to(device)
    y = conditions(cfg, codec, vae, train.y, train.c, device)
    process, model = build_denoiser(cfg, facts, vae, device)
    run = Run(cfg, model, device, facts, extra=dict(vae=weights, mean=mean, std=std))
    if run.main:
        print(f"denoiser: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, on {len(z)} texts as {cfg.k} codes of width {cfg.d}", flush=True)
    for step, batch in run.steps(len(z)):
        with autocast(device, cfg.precision):
            loss = process.loss(run.model, z[batch], at(y, batch), cfg.label_drop)
        run.update(loss)
        if step % cfg.sample_every == 0 and step < cfg.max_steps and run.main:
            with run.pause():
                bundle = Bundle(cfg, codec, vae, process, run.ema.module, mean, std, facts["names"], device)
                sample(bundle, Path(cfg.out), texts, 1, f"{step:06}")
    if run.main:
        print(f"trained {run.seconds:.0f} s; wrote {run.curve()}", flush=True)


@dataclass
class Bundle:
    """All that turns noise into text: what a checkpoint of the diffusion holds."""

    cfg: Config
    codec: Codec
    vae: TextVAE
    process: Diffusion
    model: torch.nn.Module
    mean: Tensor
    std: Tensor
    names: list[str]
    device: torch.device
    seconds: float = 0.0  # of the training of VAE and denoiser

    def latents(self, ids: Tensor) -> Tensor:
        """Standardised codes (N, k, d) of ids (N, L)."""
        return (encode_all(self.vae, ids, self.device) - self.mean) / self.std

    def write(self, x0: Tensor) -> list[str]:
        """The texts of standardised codes (N, k, d)."""
        return write_texts(self.codec, self.vae, x0 * self.std + self.mean, self.cfg, self.device)

    def sample(self, y: Tensor, c: list[str], seed: int) -> list[str]:
        """New texts for labels y (N,) and conditions c."""
        torch.manual_seed(seed)  # for top_p
        cfg, out, generator = self.cfg, [], torch.Generator().manual_seed(seed)
        condition = conditions(cfg, self.codec, self.vae, y, c, self.device)
        guidance = cfg.guidance if cfg.condition in ("prefix", "column") or cfg.condition == "label" and self.names else 0.0  # towards nothing it is work for nothing
        for part in torch.arange(len(y)).split(256):
            settings = dict(sampler=cfg.sampler, steps=cfg.steps, eta=cfg.eta, guidance=guidance, generator=generator)
            with autocast(self.device, cfg.precision):
                out.append(self.process.sample(self.model, (len(part), cfg.k, cfg.d), at(condition, part.to(self.device)), **settings).cpu())
        return self.write(torch.cat(out))

    @torch.no_grad()
    def guess(self, x0: Tensor, y, t: int, seed: int) -> Tensor:
        """The denoiser's guess, in one evaluation, of standardised codes x0 (N, k, d) noised to step t."""
        x0, t_batch = x0.to(self.device), torch.full((len(x0),), t, device=self.device)
        eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed)).to(self.device)
        xt = self.process.q_sample(x0, t_batch, eps)
        return self.process.predict_x0(self.model(xt, t_batch, at(y, slice(None))).float(), xt, t).cpu()

    def planning(self, ids: Tensor, y: Tensor, c: list[str]) -> list[str]:
        """One held-out text, ids (1, L), noised to several levels and decoded from the denoiser's guess: text that comes into focus."""
        x0, lines = self.latents(ids), []
        condition = conditions(self.cfg, self.codec, self.vae, y, c, self.device)
        for level in (0.02, 0.1, 0.25, 0.5, 0.75, 0.95):
            t = min(range(1, self.cfg.T + 1), key=lambda t: abs(self.process.a[t] ** 2 - level))
            lines.append(f"alpha_bar {self.process.a[t] ** 2:.2f}  {self.write(self.guess(x0, condition, t, self.cfg.seed))[0]}")
        return [*lines, f"its codes       {self.write(x0)[0]}"]

    def interpolation(self, ids: Tensor) -> list[str]:
        """The way between the codes of two texts, ids (2, L), in six steps on the sphere's arc."""
        a, b = self.latents(ids)
        angle = [i / 5 * math.pi / 2 for i in range(6)]
        return [f"{i / 5:.1f}  {text}" for i, text in enumerate(self.write(torch.stack([math.cos(w) * a + math.sin(w) * b for w in angle])))]


def load_bundle(cfg: Config, path: Path, device) -> Bundle:
    """The bundle in a checkpoint of the diffusion. Raises UserError where it is a VAE's, or its parts do not fit."""
    checkpoint = load_checkpoint(path, cfg.kind)
    facts = checkpoint["facts"]
    if facts.get("stage") != "diffusion":
        raise UserError(f"{path} is the checkpoint of a {facts.get('stage')}; sampling and scores need that of the diffusion, out/NAME/diffusion/last.pt")
    extra = checkpoint["extra"]
    vae = load_vae(cfg, facts, extra["vae"], path, device)
    process, model = build_denoiser(cfg, facts, vae, device)
    load_weights(model, checkpoint["ema"], path)
    return Bundle(cfg, Codec(**facts["codec"]), vae, process, model.eval(), extra["mean"], extra["std"], facts["names"], device, facts["vae_seconds"] + checkpoint["seconds"])


def tag(cfg: Config) -> str:
    return f"{cfg.sampler}_{cfg.steps}_guidance{cfg.guidance:g}_seed{cfg.seed}"


def sample(bundle: Bundle, out: Path, texts: Texts | None = None, each: int = 4, name: str = "") -> None:
    """Write samples of every class; or what follows --prompt, or follows conditions of the test split, beside what followed there."""
    cfg = bundle.cfg
    if cfg.condition in ("none", "label"):
        names = dict(enumerate(bundle.names)) if cfg.condition == "label" and bundle.names else {-1: " "}
        y = torch.tensor(list(names)).repeat_interleave(each)
        lines = [f"[{names[i]}] {text}" for i, text in zip(y.tolist(), bundle.sample(y, [""] * len(y), cfg.seed))]
    elif cfg.prompt:
        if not bundle.codec.fits(cfg.prompt):
            raise UserError(f"--prompt is longer than the {cfg.max_tokens} tokens, with an end token, that this checkpoint reads: shorten it")
        lines = [f"given  {cfg.prompt}", *(f"new    {text}" for text in bundle.sample(torch.full((each,), -1), [cfg.prompt] * each, cfg.seed))]
    elif texts:
        test = cut(cfg, bundle.codec, texts, "test")
        new = bundle.sample(test.y[:each], test.c[:each], cfg.seed)
        lines = [line for c, text, x in zip(test.c, new, test.x) for line in (f"given  {c}", f"new    {text}", f"real   {x}", "")]
    else:
        raise UserError(f"this checkpoint goes on from a text (--condition {cfg.condition}): give one with --prompt")
    print("wrote", show(out, name or f"samples_{tag(cfg)}", lines))


# -- score --------------------------------------------------------------------------------------------------------------


def train_gpt(bundle: Bundle, train: Pieces, test: Pieces, out: Path, stage: str) -> LabelGPT:
    """A GPT-2 trained in out/STAGE until its held-out loss rises, or for as long as VAE and denoiser were.

    The "baseline" is as large as VAE and denoiser together and is given the labels; the "judge", which gives the perplexities, is as large
    as the VAE's decoder, is not given them, and has another seed.
    """
    device, codec, path = bundle.device, bundle.codec, out / stage / "last.pt"
    cfg = stage_config(dataclasses.replace(bundle.cfg, out=str(out), seed=bundle.cfg.seed + (stage == "judge"), resume=path.exists()), stage)
    torch.manual_seed(cfg.seed)
    if cfg.decoder == "scratch":
        size, D = sum(p.numel() for net in (bundle.vae, bundle.model) for p in net.parameters()), cfg.vae_width * 3 // 2
        D, depth = (D, max(1, round((size - codec.vocab * D) / (12 * D**2)))) if stage == "baseline" else (cfg.vae_width, cfg.vae_depth)
        decoder = small_gpt(codec.vocab, D, depth, cfg.max_tokens + 1)
    else:
        decoder = backbone(cfg.decoder, part="decoder")
    model = LabelGPT(decoder, len(bundle.names), codec.eos).to(device)
    label = lambda y: y if stage == "baseline" else torch.full_like(y, -1)
    saved = load_checkpoint(path, cfg.kind) if path.exists() else dict(extra=dict(done=False, best=math.inf))
    if saved["extra"]["done"]:
        load_weights(model, saved["ema"], path)
        return model.eval()
    run = Run(cfg, model, device, dict(stage=stage, texts=len(train.x)), extra=saved["extra"])
    print(f"{stage}: a GPT-2 of {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, for at most {bundle.seconds:.0f} s", flush=True)
    target, y = train.target.to(device), label(train.y).to(device)
    for step, batch in run.steps(len(target), bundle.seconds):
        with autocast(device, cfg.precision):
            loss = run.model(y[batch], target[batch])
        run.update(loss)
        if step % min(250, cfg.sample_every) == 0:
            with run.pause():
                now = nats(run.ema.module, label(test.y[:256]), test.target[:256], device)
            print(f"step {step}: held-out nats a token {now:.3f}", flush=True)
            if now > run.extra["best"]:
                break
            run.extra["best"] = now
    run.extra["done"] = True
    run.save()
    return run.ema.module.eval()


@torch.no_grad()
def nats(model: LabelGPT, y: Tensor, target: Tensor, device) -> float:
    """Mean nats a token of targets (N, L) under labels y (N,)."""
    parts = [(model(a.to(device), b.to(device)).item(), (b >= 0).sum().item()) for a, b in zip(y.split(64), target.split(64))]
    return sum(ce * n for ce, n in parts) / sum(n for _, n in parts)


def score(bundle: Bundle, texts: Texts, out: Path) -> None:
    """Print how well texts are copied through the codes, how the denoiser does at each noise level, and what its own texts are like."""
    cfg, codec, vae, device = bundle.cfg, bundle.codec, bundle.vae, bundle.device
    train, test = cut(cfg, codec, texts, "train"), cut(cfg, codec, texts, "test")
    order = torch.randperm(len(test.x), generator=torch.Generator().manual_seed(cfg.seed))[: cfg.score_n]
    if len(order) < 2:
        raise UserError(f"a score needs two held-out texts or more, got {len(test.x)} and --score_n {cfg.score_n}")
    x, ids = [codec.decode(test.target[i : i + 1])[0] for i in order.tolist()], test.ids[order]
    greedy = dataclasses.replace(bundle, cfg=dataclasses.replace(cfg, top_p=0.0))
    torch.manual_seed(cfg.seed)
    noisy = corrupt(ids, torch.full((len(ids),), 0.3), codec.vocab if codec.encoder == codec.decoder else vae.encoder.config.vocab_size)
    clean, robust = (metrics.bleu(greedy.write(greedy.latents(i)), x) for i in (ids, noisy))
    copied = metrics.bleu([codec.tokenizers[0].decode([i for i in row if i >= 0]).strip() for row in noisy.tolist()], x)
    ce = alarm(vae, ids, test.target[order], device)
    print(f"score: n={len(x)} held-out pieces, seed {cfg.seed}")
    print(f"  VAE: BLEU {clean:.1f}, of 30% substituted {robust:.1f} (that text itself {copied:.1f}); nats a token with matched codes {ce['matched']:.2f}, shuffled {ce['shuffled']:.2f}, zero {ce['zero']:.2f}", flush=True)

    few = order[:100]
    condition = conditions(cfg, codec, vae, test.y[few], [test.c[i] for i in few.tolist()], device)
    x0, grid = greedy.latents(test.ids[few]), []
    for t in [max(1, round(cfg.T * j / 10)) for j in range(10, 0, -1)]:
        grid.append((bundle.process.a[t] ** 2, metrics.bleu(greedy.write(greedy.guess(x0, condition, t, cfg.seed)), x[: len(few)])))
    ceiling = metrics.bleu(greedy.write(x0), x[: len(few)])
    area = metrics.aubleu([*grid, (1.0, ceiling)])
    print(f"  AuBLEU {area:.1f} of {ceiling:.1f} (n={len(few)}): " + ", ".join(f"{a:.2f}: {b:.1f}" for a, b in grid), flush=True)

    pick = torch.randperm(len(train.x), generator=torch.Generator().manual_seed(cfg.seed))[: cfg.score_n].tolist()
    y = train.y[pick]
    start = time.perf_counter()
    made = bundle.sample(y, [train.c[i] for i in pick], cfg.seed)
    print(f"  samples: {tag(cfg)}, {time.perf_counter() - start:.1f} s", flush=True)
    real = [codec.decode(train.target[i : i + 1])[0] for i in pick]
    held_out = [codec.decode(row[None])[0] for row in test.target[: cfg.score_n]]
    guess, accuracy = metrics.text_classifier(train.x, train.y.tolist(), test.x, test.y.tolist()) if len(bundle.names) > 1 else (None, math.nan)
    if guess:
        print(f"  label: share read as the class asked for by a classifier that is right on {accuracy:.3f} of held-out texts")
    judge = train_gpt(bundle, train, test, out, "judge") if cfg.compare else None

    gpt2 = None
    if cfg.compare and cfg.score_from:  # not after every training: it may be a download
        try:
            gpt2 = metrics.gpt2_perplexity(device)
        except UserError as error:
            print(f"  no perplexity under GPT-2: {error}")

    def row(name: str, texts: list[str], labels: Tensor) -> None:
        values = metrics.score_texts(texts, train.x)
        if judge:
            values["perplexity"] = math.exp(nats(judge, torch.full((len(texts),), -1), codec.encode(texts)[1], device))
        if gpt2:
            values["GPT-2's"] = gpt2(texts)
        if guess:
            values["label"] = sum(a == b for a, b in zip(guess(texts), labels.tolist())) / len(texts)
        if cfg.dataset == "grammar":
            ratings = [grammar_rating(text) for text in texts]
            values |= dict(accepted=sum(r is not None for r in ratings) / len(texts), rating=sum(r == i + 1 for r, i in zip(ratings, labels.tolist())) / len(texts))
        print(f"  {name:16}" + "".join(f"  {key} {value:.3g}" for key, value in values.items()), flush=True)

    row("samples", made, y)
    row("training", real, y)
    row("held out", held_out, test.y[: cfg.score_n])
    if cfg.compare:
        baseline = train_gpt(bundle, train, test, out, "baseline")
        for top_p in (0.7, 0.92, 1.0):
            torch.manual_seed(cfg.seed)
            ids = [baseline.generate(baseline.read(part.to(device)), cfg.max_tokens, top_p) for part in y.split(64)]
            row(f"GPT-2 top-p {top_p:g}", [text for part in ids for text in codec.decode(part)], y)
    show(out, f"planning_{tag(cfg)}", bundle.planning(test.ids[order[:1]], test.y[order[:1]], [test.c[order[0]]]))
    show(out, f"interpolation_{tag(cfg)}", bundle.interpolation(test.ids[order[:2]]))


# -- main ---------------------------------------------------------------------------------------------------------------


def main(cfg: Config) -> None:
    device = pick_device(cfg.device)
    given = cfg.sample_from or cfg.score_from
    cfg = dataclasses.replace(cfg, out=cfg.out or (str(Path(given).parent) if given else f"out/{Path(cfg.dataset).stem.lower()}"))
    if cfg.sample_from:
        return sample(load_bundle(cfg, Path(given), device), Path(cfg.out))
    texts = load_texts(cfg.dataset, cfg.text_column, cfg.label_column, cfg.condition_column)
    if given:
        own = {name: 0 for name, value in (("batch_size", cfg.diffusion_batch), ("max_steps", cfg.diffusion_steps)) if getattr(cfg, name) == value}
        cfg = dataclasses.replace(cfg, **own)  # those of the diffusion's stage are not those of the GPT-2s beside it
        bundle, was = load_bundle(cfg, Path(given), device), load_checkpoint(given, cfg.kind)["facts"]["checksum"]
        if was != texts.checksum():
            raise UserError(f"{cfg.dataset} is not the data that {given} was trained on (checksum {texts.checksum()}, not {was}): a score needs its training and test split")
        return score(bundle, texts, Path(cfg.out))
    for stage, train in (("vae", train_vae), ("diffusion", train_diffusion)):
        if cfg.stage in ("all", stage):
            if finished(stage_config(cfg, stage)):
                print(f"{cfg.out}/{stage}/last.pt is finished: loaded, not trained again")
            else:
                train(cfg, texts, device)
            wait()
    path = Path(cfg.out) / "diffusion" / "last.pt"
    if cfg.stage in ("all", "sample", "score") and is_main():
        bundle = load_bundle(cfg, path, device)
        if cfg.stage != "score":
            sample(bundle, path.parent, texts)
        if cfg.stage == "score" or cfg.stage == "all" and cfg.score_n:
            if cfg.compare and world_size() > 1:
                print("under torchrun no GPT-2 is trained for comparison; without it, --score_from does so")
                bundle.cfg = dataclasses.replace(cfg, compare=False)
            try:
                score(bundle, texts, path.parent)
            except UserError as error:
                if cfg.stage == "score":
                    raise
                print(f"not scored: {error}")
        print(f"sample again: python textgen.py --sample_from {shlex.quote(str(path))}")


if __name__ == "__main__":
    run_script(Config, main, __doc__)
