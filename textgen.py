"""Text diffusion: a VAE turns paragraphs into latents, diffusion makes new latents, the VAE writes them out.

    python textgen.py --dataset grammar                 small hotel reviews with a known grammar: no download
    python textgen.py                                   hotel reviews (downloaded); or --dataset reviews.csv
    python textgen.py --sample_from out/grammar/diffusion/last.pt --guidance 0

Both stages are PLANNER's, 2306.02531.
"""

import dataclasses
import hashlib
import math
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypedDict

import torch
from torch import Tensor

import metrics
from data import Codec, Pieces, Texts, cut_texts, load_texts, pretrained_codec, train_codec
from diffusion import SAMPLERS, Diffusion, LatentTransformer, cosine, drop_condition, sample
from files import UserError, all_finite, is_main, load_checkpoint, load_weights, reading, reason, say, show
from tasks import grammar_rating, grammar_texts
from training import (
    FREE,
    Run,
    autocast,
    check_run,
    finished,
    millions,
    need,
    not_fatal,
    pick_device,
    run_name,
    run_script,
    saved_config,
    wait,
)
from vae import TextVAE, pretrained_backbones, small_backbones, substitute, untrained_backbones

T = 1000  # timesteps of the forward process


@dataclass(frozen=True)
class Config:
    """Hyperparameters. Edit the defaults here, or override any of them: python textgen.py --lr 1e-4."""

    # -- data --
    # grammar (no download), tripadvisor, another hub name, or the path of a csv, tsv, jsonl, json, parquet or
    # txt file, or of a folder with such files train.* and test.*
    dataset: str = "tripadvisor"
    text_column: str | None = None  # column of the texts; None: guessed
    label_column: str | None = None  # column of the classes; None: guessed; the word none: no classes
    # tiny: from scratch, for a CPU; base: pretrained BERT and GPT-2, for a GPU; planner: base with PLANNER's
    # own VAE; auto: base where CUDA is there, else tiny
    size: Literal["auto", "tiny", "base", "planner"] = "auto"
    max_tokens: int = 56  # tokens of a text with its end token; longer texts are cut between sentences
    # -- VAE --
    encoder: str = "scratch"  # scratch, or a hub name or local folder of a BERT
    decoder: str = "scratch"  # scratch, or a hub name or local folder of a GPT-2
    vocab: int = 4096  # scratch: tokens of the BPE that is trained on the texts
    vae_width: int = 192  # scratch: width of encoder and decoder
    vae_depth: int = 3  # scratch: blocks of encoder and decoder
    k: int = 28  # latents of a text
    d: int = 256  # width of a latent: wide, so that what noise takes from one number another still says
    span: int = 2  # neighbouring states of the encoder that a latent is made of; let k span cover the text
    pool: Literal["mean", "concat"] = "mean"  # of those: concat keeps their order, mean needs fewer texts
    variance: Literal["fixed", "learned"] = "fixed"  # of the latents: fixed noise, or learned with a KL
    latent_noise: float = 1.2  # fixed: its standard deviation; more: more fluent new texts, less exact copies
    beta: float = 0.0  # learned: weight of the KL, in nats a text
    p_max: float = 0.4  # each text is read with random tokens in it, at a rate drawn from 0..p_max
    vae_steps: int = 5000  # optimizer steps of the VAE
    vae_batch: int = 32  # texts of its step, over all processes
    # -- diffusion --
    condition: str = "label"  # none, label, prefix (the text before), or the name of a column of texts
    shift: float = 4.0  # above 1: more of the steps at high noise
    self_condition: float = 0.9  # share of steps in which the denoiser sees its first guess
    label_drop: float = 0.1  # share of conditions dropped, for guidance
    width: int = 192  # width of the denoiser
    depth: int = 6  # blocks of the denoiser
    diffusion_steps: int = 2500  # optimizer steps of the diffusion
    diffusion_batch: int = 128  # texts of its step, over all processes
    # -- optimisation --
    lr: float = 1e-3  # AdamW's learning rate after warm-up
    warmup: int = 100  # steps of linear warm-up
    ema_decay: float = 0.999  # upper limit of the EMA's decay; it ramps as (1 + step) / (10 + step)
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the hardware has it
    # -- sampling --
    sampler: Literal[tuple(SAMPLERS)] = "dpm++"  # DPM-Solver++(2M), DDIM, DDPM or EDM's Heun
    steps: int = 20  # evaluations of the denoiser (two each with guidance)
    guidance: float = 2.0  # classifier-free guidance: 0 off, 1 to 4 strong
    top_p: float = 0.0  # 0: the likeliest token; else one of the smallest set with this probability
    prompt: str | None = None  # prefix or column: the text to go on from; None: texts of the test split
    score_n: int = 200  # texts of a score; 0: no score after training
    # -- the run --
    out: str = "out/{dataset}"  # folder of the run
    seed: int = 0  # of weights, data order, noise and samples
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda, else mps, else cpu
    log_every: int = 50  # steps between lines of the log
    sample_every: int = 500  # steps between evaluations
    save_every: int = 500  # steps between checkpoints
    resume: bool = False  # go on with the run in the folder
    sample_from: str | None = None  # sample from this checkpoint of the diffusion; no data, no training
    score_from: str | None = None  # score this checkpoint on the test split

    kind = "textgen"  # the script that a checkpoint belongs to (no annotation: not a setting)

    @staticmethod
    def recipe(given) -> dict:
        """The defaults that a data set, or a size, has in place of those above."""
        if given.dataset in RECIPES and given.size in ("auto", "tiny"):
            return RECIPES[given.dataset]
        return RECIPES.get(chosen(given.size), {})

    @property
    def reads_text(self) -> bool:
        """Whether the condition is a text: what stands before, or a column."""
        return self.condition not in ("none", "label")

    @property
    def column(self) -> str | None:
        """The column of the conditions."""
        return None if self.condition in ("none", "label", "prefix") else self.condition

    def __post_init__(self):
        check_run(self)
        need(self, "vae_steps diffusion_steps", 1)
        need(self, "vae_batch diffusion_batch", 1, 100_000)
        need(self, "width vae_width", 8, 16_384)
        need(self, "d", 1, 16_384)
        need(self, "k span vae_depth depth", 1, 1000)
        need(self, "latent_noise beta", 0, 1000)
        need(self, "max_tokens", 4, 1024 - self.k)  # GPT-2 has 1024 positions
        need(self, "vocab", 300, 100_000)  # 256 bytes and something
        need(self, "guidance", 0, 1000)
        need(self, "label_drop p_max top_p self_condition", 0, 1)
        need(self, "shift", 0.01, 100)
        need(self, "steps", 1, T)
        k, span, L = self.k, self.span, self.max_tokens
        if self.width % 16 or self.vae_width % 8:
            raise ValueError("width must be divisible by 16 and vae_width by 8")
        if span > 1 and not k * (span - 1) < L <= k * span:
            raise ValueError(f"k spans must just cover max_tokens {L}, or span be 1; got {k} spans of {span}")
        if self.guidance and not self.label_drop and self.condition != "none":
            raise ValueError("guidance needs --label_drop above 0 in training; or choose --guidance 0")
        if self.prompt and not self.reads_text:
            raise ValueError(f"--prompt is for --condition prefix or a column, this is {self.condition}")


RECIPES = {  # what a size or a data set has in place of the defaults; flags override both
    "base": dict(encoder="bert-base-uncased", decoder="gpt2", max_tokens=256, k=16, span=16, latent_noise=0.3)
    | dict(vae_steps=50_000, vae_batch=128, shift=2.0, width=768, depth=12, lr=1e-4)
    | dict(diffusion_steps=100_000, diffusion_batch=256),
    "grammar": dict(
        size="tiny", max_tokens=48, k=6, d=128, span=8, pool="concat", p_max=0.3, vae_steps=3500, shift=5.0
    )
    | dict(diffusion_steps=8000, diffusion_batch=192, sampler="ddpm", steps=200),
}
RECIPES["planner"] = RECIPES["base"] | dict(span=1, variance="learned", beta=1e-5, p_max=0.0)


class Tokenizers(TypedDict):
    """A data.Codec in plain types."""

    encoder: str
    decoder: str
    eos: int
    max_tokens: int


class OfBoth(TypedDict):
    """What the checkpoints of both stages know."""

    stage: str
    codec: Tokenizers
    names: list[str]
    checksum: str


class Facts(OfBoth, total=False):
    """What a checkpoint knows: of pretrained parts their shapes, and in the diffusion's what of the VAE's."""

    backbones: list[str]
    vae: str
    vae_seconds: float


# One VAE serves several diffusions. What a size stands for is compared, not its name.
OF_THE_DIFFUSION = frozenset("condition shift self_condition label_drop width depth diffusion_batch".split())
FREE_IN = {"vae": FREE | {"size"} | OF_THE_DIFFUSION, "diffusion": FREE | {"size"}}

ALARM_FROM = 1000  # steps of the VAE before which its latents may still be ignored


def chosen(size: str) -> str:
    """The size that "auto" stands for on this machine."""
    return size if size != "auto" else "base" if torch.cuda.is_available() else "tiny"


def texts_of(cfg: Config) -> Texts:
    """The texts of cfg.dataset."""
    if cfg.dataset != "grammar":
        return load_texts(cfg.dataset, cfg.text_column, cfg.label_column, cfg.column)
    if column := cfg.column or cfg.text_column or cfg.label_column:
        raise UserError(f"the grammar has no column {column}: --condition label, none or prefix")
    return grammar_texts()


def split_pieces(cfg: Config, codec: Codec, texts: Texts, name: str, batch: int = 1) -> Pieces:
    """The pieces of split `name`, "train" or "test", at least a batch; those of training texts overlap."""
    overlap = name == "train" and not cfg.reads_text
    pieces = cut_texts(getattr(texts, name), codec, overlap, prefix=cfg.condition == "prefix")
    if len(pieces.x) < batch:
        raise UserError(f"{len(pieces.x)} pieces of text are fewer than a batch of {batch}: give more texts")
    # Only where a single character has more tokens than that.
    cut = int((pieces.target != codec.eos).all(1).sum())
    if cut:
        say(f"{cut} of {len(pieces.x)} pieces ({name}) are cut at --max_tokens {cfg.max_tokens}")
    long = sum(not codec.fits(text) for text in pieces.c) if cfg.reads_text else 0
    if long and is_main():
        say(f"{long} of {len(pieces.c)} conditions ({name}) are read up to --max_tokens {cfg.max_tokens}")
    return pieces


# -- the VAE ---------------------------------------------------------------------------------------------


def pick_codec(cfg: Config, texts: Texts, path: Path) -> Codec:
    """The tokenizers: those of the checkpoint at `path`, if any, otherwise trained or pretrained ones."""
    if path.exists():
        with reading(path):
            return Codec(**load_checkpoint(path, cfg.kind, Facts)["facts"]["codec"])
    if cfg.encoder == cfg.decoder == "scratch":
        return train_codec(texts.train.x, cfg.vocab, cfg.max_tokens)
    if "scratch" in (cfg.encoder, cfg.decoder):
        raise UserError("--encoder and --decoder: both from scratch, or neither")
    return pretrained_codec(cfg.encoder, cfg.decoder, cfg.max_tokens)


def build_vae(cfg: Config, facts: dict, device: torch.device) -> TextVAE:
    """The VAE that cfg describes; pretrained parts are read where the facts do not yet hold their shape."""
    torch.manual_seed(cfg.seed)
    codec, longest = Codec(**facts["codec"]), max(cfg.max_tokens, cfg.k * cfg.span)
    if cfg.encoder == "scratch":
        parts = small_backbones(codec.vocab, cfg.vae_width, cfg.vae_depth, longest + cfg.k + 1)
    elif "backbones" in facts:
        parts = untrained_backbones(*facts["backbones"])
    else:
        try:
            parts = pretrained_backbones(cfg.encoder, cfg.decoder)
        except Exception as error:  # no network, no such name, a damaged folder
            what = f"{cfg.encoder} and {cfg.decoder} could not be loaded ({reason(error)})"
            raise UserError(f"{what}; --size tiny needs no download") from error
        facts["backbones"] = [part.config.to_json_string(use_diff=False) for part in parts]
    limit = min(parts[0].config.max_position_embeddings, parts[1].config.n_positions - cfg.k)
    if longest > limit:
        raise UserError(f"--max_tokens {longest}: {cfg.encoder} and {cfg.decoder} take at most {limit}")
    how = dict(span=cfg.span, pool=cfg.pool, variance=cfg.variance, noise=cfg.latent_noise)
    return TextVAE(*parts, cfg.k, cfg.d, codec.eos, **how, beta=cfg.beta, p_max=cfg.p_max).to(device)


@torch.no_grad()
def encode_all(vae: TextVAE, ids: Tensor, device) -> Tensor:
    """Means (N, k, d) of the latents of ids (N, L)."""
    return torch.cat([vae.encode(part.to(device))[0].cpu() for part in ids.split(256)])


@torch.no_grad()
def held_out_nats(vae: TextVAE, texts: Pieces, device) -> dict[str, float]:
    """Nats a token of texts under their own latents, under each other's and under zeros.

    Where these are alike, the decoder ignores the latents (posterior collapse).
    """
    target, z = texts.target.to(device), vae.encode(texts.ids.to(device))[0]
    under = dict(matched=z, shuffled=z.roll(1, 0), zero=torch.zeros_like(z))
    return {name: vae.cross_entropy(latents, target).item() for name, latents in under.items()}


def train_vae(cfg: Config, texts: Texts, out: Path, device) -> None:
    """Train the VAE in the folder `out`."""
    codec = pick_codec(cfg, texts, out / "last.pt")
    facts = dict(
        stage="vae", codec=asdict(codec), names=texts.names, checksum=texts.checksum(conditions=False)
    )
    vae = build_vae(cfg, facts, device)
    # Too few for the diffusion is said now, not after the VAE's hours.
    train = split_pieces(cfg, codec, texts, "train", max(cfg.vae_batch, cfg.diffusion_batch))
    test = split_pieces(cfg, codec, texts, "test")
    run = Run(cfg, vae, device, facts, out, cfg.vae_steps, cfg.vae_batch, free=FREE_IN["vae"])
    say(f"{len(texts.train.x)} training texts in {len(train.x)} pieces, {len(test.x)} held-out pieces")
    say(f"VAE: {millions(vae)}, {cfg.k} latents of width {cfg.d}, on {device}")
    ids, target = train.ids.to(device), train.target.to(device)
    for step, batch in run.steps(len(ids)):
        if run.due(cfg.sample_every):
            with run.pause():
                look(run, test, device, step - 1)
        with autocast(device, cfg.precision):
            loss = run.model(ids[batch], target[batch])
        run.update(loss)
    if run.main:
        look(run, test, device, run.step)
        few, lines = test.first(8), []
        z = encode_all(run.ema.module, few.ids, device).to(device)
        for text, copy in zip(few.x, codec.decode(run.ema.module.generate(z, cfg.max_tokens)), strict=True):
            lines += [f"original       {text}", f"reconstruction {copy}", ""]
        show(out, "reconstructions", lines)
        say(f"trained {run.seconds:.0f} s; wrote {run.curve()}")


def look(run: Run, test: Pieces, device, step: int) -> None:
    """Print the nats of held-out texts after a step of the VAE, and warn where the latents are ignored."""
    nats = held_out_nats(run.ema.module, test.first(128), device)
    say(f"step {step}: {told(nats)}")
    if step >= ALARM_FROM and len(test.x) > 1 and nats["shuffled"] - nats["matched"] < 0.1:
        say("warning: the decoder ignores the latents: lower --beta or --p_max, or train longer")


def told(nats: dict[str, float]) -> str:
    """`held_out_nats` in words."""
    return "held-out nats a token under " + ", ".join(f"{z} latents {value:.2f}" for z, value in nats.items())


# -- the diffusion ---------------------------------------------------------------------------------------


def load_vae(cfg: Config, facts: dict, weights: dict, path, device) -> TextVAE:
    """The frozen VAE of a checkpoint, from what is in it alone: nothing is downloaded in its name."""
    with reading(path):
        if cfg.encoder != "scratch" and "backbones" not in facts:
            raise ValueError(f"the shapes of {cfg.encoder} and {cfg.decoder} are missing")
        vae = build_vae(cfg, facts, device)
    load_weights(vae, weights, path)
    return vae.eval().requires_grad_(False)


def build_denoiser(cfg: Config, facts: dict, vae: TextVAE, device) -> tuple[Diffusion, LatentTransformer]:
    """The process and the denoiser that cfg describes, for the latents of vae."""
    torch.manual_seed(cfg.seed)
    classes = len(facts["names"]) if cfg.condition == "label" else 0
    d_context = vae.encoder.config.hidden_size if cfg.reads_text else 0
    process = Diffusion(*cosine(T, cfg.shift), "v", "plain", cfg.self_condition)
    model = LatentTransformer(cfg.d, cfg.width, cfg.depth, classes, d_context, cfg.self_condition > 0)
    return process.to(device), model.to(device)


def rows_of(y, index):
    """The rows `index` of a condition."""
    return (y[0][index].float(), y[1][index]) if isinstance(y, tuple) else y[index]


def train_diffusion(cfg: Config, texts: Texts, out: Path, device) -> None:
    """Train the diffusion in the folder `out`, over the latents of the VAE beside it."""
    path = out.parent / "vae" / "last.pt"
    checkpoint = load_checkpoint(path, cfg.kind, Facts)
    weights, facts = checkpoint["ema"], checkpoint["facts"]
    if facts["checksum"] != texts.checksum(conditions=False):
        raise UserError(f"{path} was trained on other texts than {cfg.dataset} has now; choose another --out")
    codec, vae = Codec(**facts["codec"]), load_vae(cfg, facts, weights, path, device)
    digest = hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights.values())).hexdigest()[:12]
    facts |= dict(stage="diffusion", checksum=texts.checksum(), vae=digest, vae_seconds=checkpoint["seconds"])
    train = split_pieces(cfg, codec, texts, "train", cfg.diffusion_batch)
    z = encode_all(vae, train.ids, device)
    mean, std = z.mean(0), z.std(0).clamp(min=1e-3)  # (k, d)
    z = ((z - mean) / std).to(device)
    process, model = build_denoiser(cfg, facts, vae, device)
    writer = Writer(cfg, codec, vae, process, model, mean, std, facts["names"], device)
    y = writer.condition(train.y, train.c)
    sizes, extra = (cfg.diffusion_steps, cfg.diffusion_batch), dict(vae=weights, mean=mean, std=std)
    run = Run(cfg, model, device, facts, out, *sizes, extra, FREE_IN["diffusion"])
    say(f"denoiser: {millions(model)}, on the latents of {len(z)} texts")
    for step, batch in run.steps(len(z)):
        if run.due(cfg.sample_every):
            with run.pause():
                writer.model = run.ema.module
                show_samples(writer, out, texts, each=1, name=f"{step - 1:06}")
        y_batch = drop_condition(rows_of(y, batch), cfg.label_drop)
        with autocast(device, cfg.precision):
            loss = process.loss(run.model, z[batch], y_batch).mean()
        run.update(loss)
    if run.main:
        say(f"trained {run.seconds:.0f} s; wrote {run.curve()}")


@dataclass
class Writer:
    """All that turns noise into text: what a checkpoint of the diffusion holds."""

    cfg: Config
    codec: Codec
    vae: TextVAE
    process: Diffusion
    model: torch.nn.Module
    mean: Tensor  # (k, d) of the training latents
    std: Tensor
    names: list[str]
    device: torch.device
    seconds: float = math.nan  # of the training of VAE and denoiser

    def latents(self, ids: Tensor) -> Tensor:
        """Standardised latents (N, k, d) of ids (N, L)."""
        return (encode_all(self.vae, ids, self.device) - self.mean) / self.std

    def write(self, x0: Tensor) -> list[str]:
        """The texts of standardised latents (N, k, d)."""
        texts = []
        for z in (x0 * self.std + self.mean).split(64):
            ids = self.vae.generate(z.to(self.device), self.cfg.max_tokens, self.cfg.top_p)
            texts += self.codec.decode(ids)
        return texts

    @torch.no_grad()
    def condition(self, y: Tensor, c: list[str]):
        """The denoiser's condition for labels y (N,) or texts c, as cfg.condition says.

        It is labels (N,), or (the encoder's states (N, L, D), mask (N, L)).
        """
        if not self.cfg.reads_text:
            return (y if self.cfg.condition == "label" else torch.full_like(y, -1)).to(self.device)
        parts = [self.vae.states(ids.to(self.device)) for ids in self.codec.encode(c)[0].split(256)]
        return torch.cat([h.half() for h, _ in parts]), torch.cat([mask for _, mask in parts])

    def sample(self, y: Tensor, c: list[str]) -> list[str]:
        """New texts for labels y (N,) or texts c."""
        cfg, x0 = self.cfg, []
        torch.manual_seed(cfg.seed)  # for top_p
        generator = torch.Generator().manual_seed(cfg.seed)
        condition = self.condition(y, c)
        guided = cfg.reads_text or cfg.condition == "label" and self.names
        how = dict(sampler=cfg.sampler, steps=cfg.steps, guidance=cfg.guidance if guided else 0.0)
        for part in torch.arange(len(y)).split(cfg.diffusion_batch):  # as many as the training had room for
            shape, rows = (len(part), cfg.k, cfg.d), rows_of(condition, part.to(self.device))
            with autocast(self.device, cfg.precision):
                x0.append(sample(self.process, self.model, shape, rows, generator=generator, **how).cpu())
        return self.write(torch.cat(x0))

    def guess(self, x0: Tensor, condition, t: int) -> Tensor:
        """The denoiser's guess, in one evaluation, of standardised latents x0 (N, k, d) noised to step t."""
        eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(self.cfg.seed))
        xt = (self.process.a[t] * x0 + self.process.s[t] * eps).to(self.device)
        t_batch = torch.full((len(x0),), t, device=self.device)
        return self.process.guess(self.model, xt, t_batch, rows_of(condition, slice(None))).cpu()

    def planning(self, text: Pieces) -> list[str]:
        """A held-out text noised to several levels and written from the guess of its latents: into focus."""
        x0, condition, lines = self.latents(text.ids), self.condition(text.y, text.c), []
        alpha_bar = [a**2 for a in self.process.a]
        for level in (0.02, 0.1, 0.25, 0.5, 0.75, 0.95):
            t = min(range(1, T + 1), key=lambda t, level=level: abs(alpha_bar[t] - level))
            lines.append(f"alpha_bar {alpha_bar[t]:.2f}  {self.write(self.guess(x0, condition, t))[0]}")
        return [*lines, f"its latents     {self.write(x0)[0]}"]

    def interpolation(self, ids: Tensor) -> list[str]:
        """The way between the latents of two texts, ids (2, L), in six steps on the sphere's arc."""
        a, b = self.latents(ids)
        way = [i / 5 for i in range(6)]
        x0 = torch.stack([math.cos(w * math.pi / 2) * a + math.sin(w * math.pi / 2) * b for w in way])
        return [f"{w:.1f}  {text}" for w, text in zip(way, self.write(x0), strict=True)]

    @property
    def tag(self) -> str:
        """The settings of sampling, for the names of files."""
        return f"{self.cfg.sampler}_{self.cfg.steps}_guidance{self.cfg.guidance:g}_seed{self.cfg.seed}"


def load(path, device="auto") -> Writer:
    """The writer in a checkpoint of the diffusion at `path`, with its settings: for use from Python.

    `load(path).sample(y, c)` are new texts; .process, .model and .vae are its parts.
    """
    return load_writer(None, path, pick_device(device))


def load_writer(cfg: Config | None, path, device, texts: Texts | None = None) -> Writer:
    """The writer in a checkpoint of the diffusion. cfg: None for the settings that were saved with it.

    Raises UserError for a VAE's, for one whose parts do not fit, and for one trained on other texts.
    """
    checkpoint = load_checkpoint(path, Config.kind, Facts)
    cfg = cfg or saved_config(Config, checkpoint["config"], path)
    facts, extra = checkpoint["facts"], checkpoint["extra"]
    if facts["stage"] != "diffusion":
        wanted = "give that of the diffusion, out/NAME/diffusion/last.pt"
        raise UserError(f"{path} is the checkpoint of a {facts['stage']}; {wanted}")
    if texts and texts.checksum() != facts["checksum"]:
        raise UserError(f"{cfg.dataset} is not the data of {path}: a score needs its training and test split")
    with reading(path):
        vae = load_vae(cfg, facts, extra["vae"], path, device)
        process, model = build_denoiser(cfg, facts, vae, device)
        load_weights(model, checkpoint["ema"], path)
        for part in ("mean", "std"):
            if extra[part].shape != (cfg.k, cfg.d) or not all_finite([extra[part]]):
                raise ValueError(f"the {part} of its latents is not finite, or of another shape")
        seconds = facts["vae_seconds"] + checkpoint["seconds"]
        parts = (Codec(**facts["codec"]), vae, process, model.eval(), extra["mean"], extra["std"])
        return Writer(cfg, *parts, facts["names"], device, seconds)


def show_samples(writer: Writer, out: Path, texts: Texts | None, each=4, name: str | None = None) -> None:
    """Write samples of every class; or what follows --prompt, or what follows held-out texts."""
    cfg, lines = writer.cfg, []
    if not cfg.reads_text:
        labelled = cfg.condition == "label" and writer.names
        names = dict(enumerate(writer.names)) if labelled else {-1: " "}
        y = torch.tensor(list(names)).repeat_interleave(each)
        new = writer.sample(y, [""] * len(y))
        lines = [f"[{names[i]}] {text}" for i, text in zip(y.tolist(), new, strict=True)]
    elif cfg.prompt:
        if not writer.codec.fits(cfg.prompt):
            raise UserError(
                f"--prompt must have fewer than {cfg.max_tokens} tokens, --max_tokens: shorten it"
            )
        new = writer.sample(torch.full((each,), -1), [cfg.prompt] * each)
        lines = [f"given  {cfg.prompt}", *(f"new    {text}" for text in new)]
    elif texts:
        few = split_pieces(cfg, writer.codec, texts, "test").first(each)
        for c, text, x in zip(few.c, writer.sample(few.y, few.c), few.x, strict=True):
            lines += [f"given  {c}", f"new    {text}", f"real   {x}", ""]
    else:
        raise UserError(f"this checkpoint goes on from a text (--condition {cfg.condition}): give a --prompt")
    say(f"wrote {show(out, name or f'samples_{writer.tag}', lines)}")


# -- the score -------------------------------------------------------------------------------------------


def score(writer: Writer, texts: Texts, out: Path) -> None:
    """Print how texts come back from their latents, how the denoiser guesses, and what new texts are like."""
    cfg, codec = writer.cfg, writer.codec
    train, test = (split_pieces(cfg, codec, texts, name) for name in ("train", "test"))
    if min(len(test.x), cfg.score_n) < 2:
        raise UserError(f"a score needs two held-out texts, got {len(test.x)} and --score_n {cfg.score_n}")
    order = torch.randperm(len(test.x), generator=torch.Generator().manual_seed(cfg.seed))
    held_out = test.take(order[: cfg.score_n])
    say(f"score: n={len(held_out.x)} held-out pieces, seed {cfg.seed}")
    greedy = dataclasses.replace(writer, cfg=dataclasses.replace(cfg, top_p=0.0))
    score_vae(greedy, held_out)
    score_denoiser(greedy, held_out.first(100))
    start = time.perf_counter()
    rows = new_and_real(writer, train, test)
    say(f"  samples: {writer.tag}, {time.perf_counter() - start:.1f} s")
    for name, values in score_rows(cfg, rows, train, test).items():
        known = {key: value for key, value in values.items() if not math.isnan(value)}
        say(f"  {name:10}" + "".join(f"  {key} {value:.3g}" for key, value in known.items()))
    show(out, f"planning_{writer.tag}", writer.planning(held_out.first(1)))
    show(out, f"interpolation_{writer.tag}", writer.interpolation(held_out.first(2).ids))


def score_vae(writer: Writer, held_out: Pieces) -> None:
    """Print BLEU of texts written back from their latents, also with 30% of the tokens substituted; nats."""
    codec, vae, ids = writer.codec, writer.vae, held_out.ids
    real = codec.decode(held_out.target)
    torch.manual_seed(writer.cfg.seed)
    spoilt = substitute(ids, torch.full((len(ids),), 0.3), vae.encoder.config.vocab_size)
    read = [codec.tokenizers[0].decode([i for i in row if i >= 0]).strip() for row in spoilt.tolist()]
    clean, robust = (metrics.bleu(writer.write(writer.latents(tokens)), real) for tokens in (ids, spoilt))
    copied, unit = metrics.bleu(read, real), metrics.unit(real)
    if math.isnan(clean):
        say(f"  VAE: no BLEU and no AuBLEU, since no held-out text has four {unit}")
    else:
        beside = f"of 30% substituted {robust:.1f}, where that text itself has {copied:.1f}"
        say(f"  VAE: BLEU of {unit} {clean:.1f}; {beside}")
    say(f"  {told(held_out_nats(vae, held_out, writer.device))}")


def score_denoiser(writer: Writer, held_out: Pieces) -> None:
    """Print AuBLEU: BLEU of texts written from the guess of their noised latents, over alpha_bar. PLANNER."""
    real, condition = writer.codec.decode(held_out.target), writer.condition(held_out.y, held_out.c)
    x0, points = writer.latents(held_out.ids), []
    ceiling = metrics.bleu(writer.write(x0), real)
    if math.isnan(ceiling):  # no text is long enough for it
        return
    for tenths in range(10, 0, -1):
        t = T * tenths // 10
        guess = writer.write(writer.guess(x0, condition, t))
        points.append((writer.process.a[t] ** 2, metrics.bleu(guess, real)))
    area = metrics.aubleu([*points, (1.0, ceiling)])
    grid = ", ".join(f"{alpha_bar:.2f}: {bleu:.1f}" for alpha_bar, bleu in points)
    say(f"  AuBLEU {area:.1f} of {ceiling:.1f} (n={len(real)}): {grid}")


def new_and_real(writer: Writer, train: Pieces, test: Pieces) -> dict[str, tuple[list[str], Tensor]]:
    """Texts and their labels: new ones under the conditions of training texts, these, and held-out ones."""
    cfg, codec = writer.cfg, writer.codec
    order = torch.randperm(len(train.x), generator=torch.Generator().manual_seed(cfg.seed))
    few, held_out = train.take(order[: cfg.score_n]), test.first(cfg.score_n)
    return {
        "samples": (writer.sample(few.y, few.c), few.y),
        "training": (codec.decode(few.target), few.y),
        "held out": (codec.decode(held_out.target), held_out.y),
    }


def score_rows(cfg: Config, rows: dict, train: Pieces, test: Pieces) -> dict[str, dict[str, float]]:
    """The measures of rows of (texts, labels); see `metrics.score_texts`.

    label: the share that a classifier reads as labelled. Of the grammar accepted: the share that it accepts,
    and rating: the share with the rating that the label says.
    """
    scores = {name: metrics.score_texts(texts, train.x) for name, (texts, _) in rows.items()}
    if len(set(train.y.tolist())) > 1:
        read, accuracy = metrics.text_classifier(train.x, train.y.tolist(), test.x, test.y.tolist())
        say(f"  label: as read by a classifier that is right on {accuracy:.3f} of held-out texts")
        for name, (texts, y) in rows.items():
            scores[name]["label"] = metrics.agreement(read(texts), y.tolist())
    if cfg.dataset == "grammar":
        for name, (texts, y) in rows.items():
            ratings = [grammar_rating(text) for text in texts]
            scores[name]["accepted"] = sum(rating is not None for rating in ratings) / len(texts)
            scores[name]["rating"] = metrics.agreement(ratings, (y + 1).tolist())
    return scores


# -- main ------------------------------------------------------------------------------------------------


def main(cfg: Config) -> None:
    device, out = pick_device(cfg.device), Path(cfg.out.replace("{dataset}", run_name(cfg.dataset)))
    if cfg.sample_from:
        return show_samples(load_writer(cfg, cfg.sample_from, device), out, None)
    if is_main() and not cfg.score_from:
        why = "CUDA is here" if torch.cuda.is_available() else "there is no CUDA here"
        why = why if cfg.size == "auto" else "as a flag or the recipe of the data says"
        say(f"size {chosen(cfg.size)}: {why}")
    texts = texts_of(cfg)
    if texts.note:
        say(texts.note)
    if cfg.score_from:
        return score(load_writer(cfg, cfg.score_from, device, texts), texts, out)
    for stage, train, steps in (
        ("vae", train_vae, cfg.vae_steps),
        ("diffusion", train_diffusion, cfg.diffusion_steps),
    ):
        if not finished(cfg, out / stage, steps, FREE_IN[stage]):
            train(cfg, texts, out / stage, device)
        # The curve comes last: without one the run was killed in between, or copied from elsewhere.
        elif not (out / stage / "curve.png").exists():
            train(dataclasses.replace(cfg, resume=True), texts, out / stage, device)
        else:
            say(f"{out / stage / 'last.pt'} is finished: loaded, not trained again")
        wait()
    if is_main():
        path = out / "diffusion" / "last.pt"
        writer = load_writer(cfg, path, device, texts)
        show_samples(writer, path.parent, texts)
        with not_fatal("scored"):
            if cfg.score_n:
                score(writer, texts, path.parent)
        say(f"sample again: python textgen.py --sample_from {shlex.quote(str(path))}")


if __name__ == "__main__":
    run_script(Config, main, __doc__)
