"""Text diffusion: a VAE turns a paragraph into a few codes, diffusion makes new codes, the VAE's decoder writes them out. PLANNER, 2306.02531.

    python textgen.py --dataset grammar                     small hotel reviews with a known grammar: nothing to download
    python textgen.py --dataset tripadvisor                 hotel reviews (downloaded); or --dataset reviews.csv
    python textgen.py --sample_from out/grammar/diffusion/last.pt --guidance 2
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
from training import Run, UserError, autocast, load_checkpoint, load_weights, pick_device, reason, run_script
from vae import TextVAE, backbone, corrupt, small_backbones

SIZES = {  # what a field left at 0 or "" becomes
    "tiny": dict(encoder="scratch", decoder="scratch", max_tokens=64, d=64, lr=1e-3, vae_steps=3000, vae_batch=32, width=192, depth=6, diffusion_steps=3000, diffusion_batch=128),
    "base": dict(encoder="bert-base-uncased", decoder="gpt2", max_tokens=256, d=128, lr=1e-4, vae_steps=50_000, vae_batch=128, width=768, depth=12, diffusion_steps=100_000, diffusion_batch=256),
}


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
    vocab: int = 2048  # scratch: tokens of the BPE that is trained on the texts
    vae_width: int = 192  # scratch: width of encoder and decoder
    vae_depth: int = 3  # scratch: blocks of encoder and decoder
    k: int = 16  # codes of a text: the encoder's first k states
    d: int = 0  # width of a code
    tanh: bool = True  # bound the codes to (-1, 1)
    variance: Literal["fixed", "learned"] = "fixed"  # of the codes: fixed noise, or PLANNER's learned one with a KL term
    latent_noise: float = 0.15  # fixed: standard deviation of the noise on the codes that the decoder learns from
    beta: float = 0.0  # weight of the KL, in nats a text
    corrupt: Literal["sub", "mask"] = "sub"  # the encoder's input noise: random tokens, or the mask token
    p_max: float = 0.3  # each text is corrupted at a rate drawn from 0..p_max
    vae_steps: int = 0  # optimizer steps of the VAE
    vae_batch: int = 0  # texts of its step
    # -- diffusion --
    condition: Literal["none", "label", "prefix", "column"] = "label"  # the class; the text before; or the text in --condition_column
    T: int = 1000  # timesteps of the forward process
    schedule: Literal["cosine", "linear"] = "cosine"  # noise schedule
    shift: float = 1.0  # above 1: more of the steps at high noise
    predict: Literal["x0", "v", "eps"] = "v"  # what the denoiser's output means
    weight: Literal["min-snr", "plain"] = "min-snr"  # weight of a step's loss
    self_condition: float = 0.5  # share of steps in which the denoiser sees its first guess
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
    guidance: float = 1.0  # classifier-free guidance: 0 off, 1 to 4 strong
    top_p: float = 0.0  # decode greedily (0), or from the smallest set of tokens with this probability
    prompt: str = ""  # prefix and column: the text to go on from; empty: texts of the test split
    score_n: int = 200  # texts of a score; 0: no score after training
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
        "dataset text_column label_column max_tokens encoder decoder vocab vae_width vae_depth k d tanh variance latent_noise beta corrupt p_max seed".split()
    )
    fixed = (*vae_fixed, *"condition_column condition T schedule shift predict weight self_condition label_drop width depth".split())

    def __post_init__(self):
        for name, value in SIZES[self.size].items():
            if not getattr(self, name):
                object.__setattr__(self, name, value)

        def need(names, low, high=math.inf):
            for name in names.split():
                if not low <= getattr(self, name) <= high:
                    raise ValueError(f"{name} must be in [{low}, {high}], got {getattr(self, name)}")

        need("k d vae_depth depth vae_steps vae_batch diffusion_steps diffusion_batch T log_every sample_every save_every", 1)
        need("warmup max_steps batch_size score_n latent_noise beta", 0)
        need("max_tokens", 4, 1024 - self.k)  # GPT-2 has 1024 positions
        need("vocab", 300, 100_000)  # 256 bytes and something
        need("seed", 0, 2**32)
        need("guidance", 0, 1000)
        need("label_drop ema_decay eta p_max top_p self_condition", 0, 1)
        need("lr", 1e-9, 1)
        need("shift", 0.01, 100)
        need("steps", 1, self.T)
        if self.width % 16 or self.vae_width % 48:
            raise ValueError(f"width must be divisible by 16 and vae_width by 48, got {self.width} and {self.vae_width}")
        if self.sample_from and self.score_from:
            raise ValueError("choose one of sample_from and score_from")
        if (self.condition == "column") != bool(self.condition_column):
            raise ValueError("--condition column and --condition_column go together")


class VAEStage(Config):
    fixed = Config.vae_fixed


def stage_config(cfg: Config, stage: str) -> Config:
    """cfg as the training loop of a stage reads it: its folder, steps and batch."""
    steps, batch = getattr(cfg, f"{stage}_steps"), getattr(cfg, f"{stage}_batch")
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


def cut(cfg: Config, codec: Codec, texts: Texts, split: str) -> Pieces:
    """The pieces of a split ("train", pieces overlapping, or "test"); with --condition prefix the second of each two neighbours, given the first."""
    x, y, c = (texts.x, texts.y, texts.c) if split == "train" else (texts.x_test, texts.y_test, texts.c_test)
    rows = []
    for text, label, condition in zip(x, y, c):
        if cfg.condition == "prefix":
            pieces = windows(text, codec.fits, overlap=False)
            rows += [(after, label, before) for before, after in zip(pieces, pieces[1:])]
        else:
            rows += [(piece, label, condition) for piece in windows(text, codec.fits, overlap=split == "train" and cfg.condition != "column")]
    if not rows:
        raise UserError(f"--condition prefix needs texts of more than --max_tokens {cfg.max_tokens} tokens: no text of the {split} split is cut in two")
    x, y, c = map(list, zip(*rows))
    return Pieces(x, torch.tensor(y), c, *codec.encode(x))


def need_batch(n: int, batch_size: int, what: str) -> None:
    if n < batch_size:
        raise UserError(f"{n} {what}, fewer than a batch of {batch_size}: give more texts, or a smaller --batch_size")


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
        parts = small_backbones(codec.vocab, cfg.vae_width, cfg.vae_depth, cfg.max_tokens + cfg.k + 1)
    elif "backbones" in facts and not load:
        parts = [backbone("", config, part) for config, part in zip(facts["backbones"], ("encoder", "decoder"))]
    else:
        try:
            parts = [backbone(name, part=part) for name, part in ((cfg.encoder, "encoder"), (cfg.decoder, "decoder"))]
        except Exception as error:  # no network, no such name, a damaged folder
            raise UserError(f"{cfg.encoder} and {cfg.decoder} could not be had ({reason(error)}); --size tiny needs no download") from error
        facts["backbones"] = [part.config.to_json_string(use_diff=False) for part in parts]
    limit = min(parts[0].config.max_position_embeddings, parts[1].config.n_positions - cfg.k)
    if cfg.max_tokens > limit:
        raise UserError(f"--max_tokens {cfg.max_tokens}, but {cfg.encoder} and {cfg.decoder} take at most {limit} with {cfg.k} codes")
    how = dict(tanh=cfg.tanh, variance=cfg.variance, noise=cfg.latent_noise, beta=cfg.beta, p_max=cfg.p_max)
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
    train, test = cut(cfg, codec, texts, "train"), cut(cfg, codec, texts, "test")
    need_batch(len(train.x), cfg.batch_size, "pieces of text")
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
                if step >= 1000 and ce["shuffled"] - ce["matched"] < 0.1:
                    print("warning: the decoder ignores the codes (posterior collapse): lower --beta or --p_max, or train longer")
    if run.main:
        lines = reconstructions(cfg, codec, run.ema.module, test, device)
        print(f"trained {run.seconds:.0f} s; wrote {run.curve()}, {show(out, 'reconstructions', lines)}", flush=True)


def reconstructions(cfg: Config, codec: Codec, vae: TextVAE, test: Pieces, device) -> list[str]:
    """Eight held-out pieces and what comes back."""
    back = write_texts(codec, vae, encode_all(vae, test.ids[:8], device), dataclasses.replace(cfg, top_p=0.0), device)
    return [line for a, b in zip(test.x, back) for line in (f"original       {a}", f"reconstruction {b}", "")]


def show(out: Path, name: str, lines: list[str]) -> Path:
    """Print the lines and write them to samples/NAME.txt."""
    path = out / "samples" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, ""]))
    print(f"\n-- {name} --", *lines, sep="\n", flush=True)
    return path


# -- main ---------------------------------------------------------------------------------------------------------------


def main(cfg: Config) -> None:
    device = pick_device(cfg.device)
    cfg = dataclasses.replace(cfg, out=cfg.out or f"out/{Path(cfg.dataset).stem.lower()}")
    texts = load_texts(cfg.dataset, cfg.text_column, cfg.label_column, cfg.condition_column)
    if cfg.stage in ("all", "vae"):
        train_vae(cfg, texts, device)


if __name__ == "__main__":
    run_script(Config, main, __doc__)
