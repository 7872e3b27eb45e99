"""Text diffusion: a VAE turns paragraphs into latents, diffusion makes new latents, the VAE writes them out.

    python textgen.py --dataset grammar                small hotel reviews with a known grammar: no download
    python textgen.py --dataset reviews.csv            your own texts, with a rating or not
    python textgen.py --dataset reviews.csv --size base     the same from pretrained BERT and GPT-2, on a GPU
    python textgen.py --load out/grammar/diffusion/last.pt     more samples of a finished run

Both stages are PLANNER's, 2306.02531. The mathematics is in diffusion.py, the VAE in vae.py.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from common import scores, texts
from common.run import Run, UserError, autocast, load_checkpoint, pick_device, reading, run_script, log, save_text
from common.tables import load_tables
from diffusion import SAMPLERS, Diffusion, LatentTransformer, cosine, drop_condition, sample
from tasks import grammar
from vae import TextVAE, pretrained_backbones, small_backbones, untrained_backbones

T = 1000  # timesteps of the forward process
Tensors = tuple[Tensor, Tensor]  # the encoder's ids and the decoder's targets, (N, L) each


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them on the command line: python textgen.py --lr 1e-4"""

    # data
    dataset: str = "tripadvisor"  # grammar (made here), tripadvisor or owner/name (hub), or a file or folder
    text_column: str | None = None  # column of the texts; by default guessed
    label_column: str | None = None  # column of the classes; by default guessed; "none" is none
    size: Literal["small", "base"] = "small"  # base: pretrained BERT and GPT-2
    max_tokens: int = 56  # of a text with its end token; longer texts are cut at sentence ends
    # VAE
    encoder: str = "scratch"  # or the hub name or folder of a BERT-like model
    decoder: str = "scratch"  # or the hub name or folder of a causal language model
    vocab: int = 4096  # scratch: tokens of the BPE
    vae_width: int = 192  # scratch: width of encoder and decoder
    vae_depth: int = 3  # scratch: blocks of encoder and decoder
    k: int = 28  # latents of a text
    d: int = 256  # width of a latent
    span: int = 2  # neighbouring states of the encoder that make a latent; k * span should cover a text
    pool: Literal["mean", "concat"] = (
        "mean"  # of those states; concat keeps their order, mean needs fewer texts
    )
    variance: Literal["fixed", "learned"] = "fixed"  # of the latents; learned is PLANNER's, with a KL
    latent_noise: float = 1.2  # fixed: standard deviation; more: more fluent samples, less exact copies
    beta: float = 0.0  # learned: weight of the KL
    p_max: float = 0.4  # each text is read with random tokens in it, at a rate drawn from 0..p_max
    vae_steps: int = 5000  # optimizer steps of the VAE
    vae_batch: int = 32  # texts per step of the VAE, over all processes
    # diffusion
    condition: str = "label"  # label, none, or the name of a column of texts
    shift: float = 4.0  # above 1: more of the steps at high noise
    self_condition: float = 0.9  # share of steps in which the denoiser sees its first guess
    label_drop: float = 0.1  # share of the conditions that are dropped, for guidance
    width: int = 192  # width of the denoiser
    depth: int = 6  # blocks of the denoiser
    diffusion_steps: int = 2500  # optimizer steps of the diffusion
    diffusion_batch: int = 128  # texts per step of the diffusion, over all processes
    # optimisation
    lr: float = 1e-3  # AdamW's learning rate after warm-up
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto is bf16 where the hardware has it
    # sampling
    sampler: Literal[tuple(SAMPLERS)] = "dpm++"  # DPM-Solver++(2M), DDIM, DDPM or EDM's Heun
    steps: int = 20  # evaluations of the denoiser (twice as many with guidance)
    guidance: float = 2.0  # classifier-free guidance: 0 is off, 4 is strong
    prompt: str | None = None  # with --load: the text of the condition, if that is a column
    n: int = 4  # samples of each class, or of each text
    score_n: int = 200  # texts of a score; 0 is no score
    # the run
    out: str = "out/{dataset}"  # folder
    seed: int = 0  # of weights, batches, noise and samples
    sample_every: int = 500  # steps between samples
    save_every: int = 250  # steps between checkpoints
    resume: bool = False  # continue the run in the folder
    load: str | None = None  # draw samples from this checkpoint of the diffusion, do not train

    script: ClassVar = "textgen"
    RECIPES: ClassVar = {
        "grammar": dict(
            max_tokens=48, k=6, d=128, span=8, pool="concat", p_max=0.3, vae_steps=3500, shift=5.0
        )
        | dict(diffusion_steps=8000, diffusion_batch=192, sampler="ddpm", steps=200),
        "base": dict(encoder="bert-base-uncased", decoder="gpt2", max_tokens=256, k=16, span=16)
        | dict(latent_noise=0.3, vae_steps=50_000, vae_batch=128, shift=2.0, width=768, depth=12, lr=1e-4)
        | dict(diffusion_steps=100_000, diffusion_batch=256),
    }

    @property
    def column(self) -> str | None:
        """The column of the conditions, if they are texts."""
        return None if self.condition in ("label", "none") else self.condition


# A VAE serves several diffusions.
FREE_IN_VAE = set("condition shift self_condition label_drop width depth diffusion_batch".split())


# -- the parts -------------------------------------------------------------------------------------------


def build_vae(cfg: Config, facts: dict, device: torch.device, pretrained: bool) -> TextVAE:
    """The VAE that cfg describes. pretrained: read its parts by name; without it their weights follow."""
    torch.manual_seed(cfg.seed)
    tokenizer, longest = texts.from_json(*facts["decoder"]), max(cfg.max_tokens, cfg.k * cfg.span)
    if cfg.encoder == "scratch":
        parts = small_backbones(len(tokenizer), cfg.vae_width, cfg.vae_depth, longest + cfg.k + 1)
    elif pretrained:
        try:
            parts = pretrained_backbones(cfg.encoder, cfg.decoder)
        except Exception as error:  # no network, no such name, a damaged folder
            raise UserError(f"{cfg.encoder} and {cfg.decoder} could not be loaded: {error}") from error
        facts["backbones"] = [part.config.to_json_string(use_diff=False) for part in parts]
    else:
        parts = untrained_backbones(*facts["backbones"])
    limits = [getattr(part.config, "max_position_embeddings", 2**30) for part in parts]
    if longest > min(limits[0], limits[1] - cfg.k):
        raise UserError(f"--max_tokens {cfg.max_tokens}: encoder and decoder have {limits} positions")
    how = dict(span=cfg.span, pool=cfg.pool, variance=cfg.variance, noise=cfg.latent_noise)
    vae = TextVAE(*parts, cfg.k, cfg.d, tokenizer.eos_token_id, **how, beta=cfg.beta, p_max=cfg.p_max)
    return vae.to(device)


def build_denoiser(cfg: Config, facts: dict, vae: TextVAE) -> tuple[Diffusion, LatentTransformer]:
    """The process and the denoiser that cfg describes, for the latents of vae."""
    torch.manual_seed(cfg.seed)
    device = vae.fc_mean.weight.device
    classes = len(facts["names"]) if cfg.condition == "label" else 0
    d_context = vae.encoder.config.hidden_size if cfg.column else 0
    process = Diffusion(*cosine(T, cfg.shift), "v", "plain", cfg.self_condition)
    model = LatentTransformer(cfg.d, cfg.width, cfg.depth, classes, d_context, cfg.self_condition > 0)
    return process.to(device), model.to(device)


class Writer:
    """All that turns noise into text: VAE, process, denoiser, and mean and std (k, d) of the latents."""

    def __init__(self, cfg: Config, facts: dict, vae: TextVAE, mean: Tensor, std: Tensor):
        self.cfg, self.facts, self.vae, self.mean, self.std = cfg, facts, vae, mean, std
        self.process, self.model = build_denoiser(cfg, facts, vae)
        self.device = vae.fc_mean.weight.device
        self.encoder, self.decoder = (texts.from_json(*facts[side]) for side in ("encoder", "decoder"))

    def write(self, x0: Tensor) -> list[str]:
        """The texts of standardised latents (N, k, d)."""
        written = []
        for z in (x0 * self.std + self.mean).split(64):
            ids = self.vae.generate(z.to(self.device), self.cfg.max_tokens)
            written += texts.decode(self.decoder, ids)
        return written

    @torch.no_grad()
    def condition(self, rows: list[texts.Row]):
        """The denoiser's condition y: labels (N,), or (the encoder's states (N, L, D), mask (N, L))."""
        if not self.cfg.column:
            labels = [y if self.cfg.condition == "label" else -1 for _, y, _ in rows]
            return torch.tensor(labels, device=self.device)
        ids = texts.encode(self.encoder, [c for _, _, c in rows], self.cfg.max_tokens)
        parts = [self.vae.states(part.to(self.device)) for part in ids.split(256)]
        return torch.cat([h.half() for h, _ in parts]), torch.cat([mask for _, mask in parts])

    def sample(self, rows: list[texts.Row]) -> list[str]:
        """New texts under the conditions of rows; cfg.seed decides the noise."""
        cfg, y, x0 = self.cfg, self.condition(rows), []
        guided = cfg.column or cfg.condition == "label" and self.facts["names"]
        how = dict(sampler=cfg.sampler, steps=cfg.steps, guidance=cfg.guidance if guided else 0.0)
        generator = torch.Generator().manual_seed(cfg.seed)
        for part in torch.arange(len(rows)).split(cfg.diffusion_batch):  # what fits in training fits here
            shape, y_part = (len(part), cfg.k, cfg.d), rows_of(y, part.to(self.device))
            with autocast(self.device, cfg.precision):
                x0.append(sample(self.process, self.model, shape, y_part, generator=generator, **how).cpu())
        return self.write(torch.cat(x0))


def rows_of(y, index: Tensor):
    """The rows `index` of a condition."""
    return (y[0][index].float(), y[1][index]) if isinstance(y, tuple) else y[index]


@torch.no_grad()
def encode_all(vae: TextVAE, ids: Tensor) -> Tensor:
    """Means (N, k, d) of the latents of ids (N, L), on the CPU."""
    return torch.cat([vae.encode(part.to(vae.fc_mean.weight.device))[0].cpu() for part in ids.split(256)])


def load(path, cfg: Config | None = None) -> Writer:
    """The writer in a checkpoint of the diffusion (the averaged weights), ready to sample from."""
    checkpoint = load_checkpoint(path, Config)
    cfg, facts, extra = cfg or Config(**checkpoint["config"]), checkpoint["facts"], checkpoint["extra"]
    with reading(path):
        if facts["stage"] != "diffusion":
            raise UserError(f"{path} is the checkpoint of a VAE: give that of the diffusion beside it")
        vae = build_vae(cfg, facts, pick_device(), pretrained=False)
        vae.load_state_dict(extra["vae"])
        writer = Writer(cfg, facts, vae.eval().requires_grad_(False), extra["mean"], extra["std"])
        writer.model.load_state_dict(checkpoint["ema"])
    writer.model.eval()
    return writer


# -- the two stages --------------------------------------------------------------------------------------


def train_vae(cfg: Config, facts: dict, train: Tensors, test: Tensors, device: torch.device) -> TextVAE:
    """Train the VAE in its folder, or load it where it is finished; the averaged weights."""
    vae = build_vae(cfg, facts, device, pretrained=True)
    sizes = dict(max_steps=cfg.vae_steps, batch_size=cfg.vae_batch)
    run = Run(replace(cfg, out=f"{cfg.out}/vae"), vae, facts, device, free=FREE_IN_VAE, **sizes)
    ids, target = (x.to(device) for x in train)
    for _, batch in run.steps(len(ids)):
        with autocast(device, cfg.precision):
            loss = run.model(ids[batch], target[batch])
        run.update(loss)
        if run.due(cfg.sample_every):
            log(f"  {held_out_nats(run.ema, *test)}")
    return run.ema


@torch.no_grad()
def held_out_nats(vae: TextVAE, ids: Tensor, target: Tensor) -> str:
    """Nats per token of ids and target (N, L), also under latents of other texts.

    Where these are alike, the decoder ignores the latents (posterior collapse): lower beta or p_max.
    """
    z, target = encode_all(vae, ids[:128]).to(vae.fc_mean.weight.device), target[:128]
    own, others = (vae.cross_entropy(x, target.to(x.device)) for x in (z, z.roll(1, 0)))
    return f"held-out nats per token: {own:.3f}, under the latents of other texts {others:.3f}"


def train_diffusion(cfg: Config, facts: dict, vae: TextVAE, train: list, test: list, ids: Tensor) -> None:
    """Train the denoiser, or load it where it is finished, on the latents of ids (N, L), those of `train`."""
    weights = {name: w.cpu() for name, w in vae.state_dict().items()}
    digest = hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights.values())).hexdigest()[:12]
    z = encode_all(vae, ids)
    mean, std = z.mean(0), z.std(0).clamp(min=1e-3)
    writer = Writer(cfg, facts | dict(stage="diffusion", vae=digest), vae, mean, std)
    z, y = ((z - mean) / std).to(writer.device), writer.condition(train)
    sizes = dict(max_steps=cfg.diffusion_steps, batch_size=cfg.diffusion_batch)
    extra, cfg = dict(vae=weights, mean=mean, std=std), replace(cfg, out=f"{cfg.out}/diffusion")
    run = Run(cfg, writer.model, writer.facts, writer.device, extra=extra, **sizes)
    writer.model = run.ema
    for step, batch in run.steps(len(z)):
        y_batch = drop_condition(rows_of(y, batch), cfg.label_drop)
        with autocast(writer.device, cfg.precision):
            loss = writer.process.loss(run.model, z[batch], y_batch).mean()
        run.update(loss)
        if run.due(cfg.sample_every):
            save_text(samples(writer, test), run.out / f"samples/{step:06}.txt")
    if run.due(1):  # once, in the main process
        save_text(samples(writer, test), run.out / "samples/samples.txt")
        log(f"more samples: python textgen.py --load {run.out / 'last.pt'} --guidance 0")
        if cfg.score_n:
            score(writer, train, test)


# -- samples and scores ----------------------------------------------------------------------------------


def samples(writer: Writer, rows: list[texts.Row]) -> list[str]:
    """Lines with cfg.n new texts of each class; or given the prompt, or the conditions of the first rows."""
    cfg, names = writer.cfg, writer.facts["names"]
    if cfg.column:
        kinds = [("", -1, cfg.prompt)] if cfg.prompt else rows[:3]
        if not kinds:
            raise UserError(f"this model writes given a text, {cfg.column}: add a --prompt")
    else:
        kinds = [("", i, name) for i, name in enumerate(names)] if cfg.condition == "label" and names else []
        kinds = kinds or [("", -1, "")]
    kinds = [kinds[i // cfg.n] for i in range(len(kinds) * cfg.n)]
    return [f"[{name}] {text}" for (_, _, name), text in zip(kinds, writer.sample(kinds), strict=True)]


def score(writer: Writer, train: list[texts.Row], test: list[texts.Row]) -> None:
    """Print how held-out texts come back from their latents, and what new texts are like."""
    cfg, generator = writer.cfg, torch.Generator().manual_seed(writer.cfg.seed)
    train, test = shuffled(train, generator), shuffled(test, generator)
    known, held_out = train[: cfg.score_n], test[: cfg.score_n]
    ids, target = tensors(cfg, writer.encoder, writer.decoder, held_out)
    copies = writer.write((encode_all(writer.vae, ids) - writer.mean) / writer.std)
    real = texts.decode(writer.decoder, target)
    log(f"\nscore of n={len(real)}: BLEU of reconstructions {scores.bleu(copies, real):.1f}")
    log(f"  {held_out_nats(writer.vae, ids, target)}")
    classify = scores.text_classifier(train) if len(writer.facts["names"]) > 1 else None
    new = [(text, *row[1:]) for row, text in zip(known, writer.sample(known), strict=True)]
    for name, rows in dict(samples=new, training=known, held_out=held_out).items():
        written, labels = [text for text, _, _ in rows], [label for _, label, _ in rows]
        line = f"  {name:9} dist-2 {scores.dist2(written):.3f}"
        if classify:
            line += f"  label {scores.agreement(classify(written), labels):.3f}"
        if cfg.dataset == "grammar":
            ratings = [grammar.rating_of(text) for text in written]
            line += f"  accepted {1 - ratings.count(None) / len(ratings):.3f}"
            line += f"  rating {scores.agreement(ratings, [label + 1 for label in labels]):.3f}"
        log(line)


def shuffled(rows: list, generator: torch.Generator) -> list:
    return [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]


# -- main ------------------------------------------------------------------------------------------------


def tensors(cfg: Config, encoder, decoder, rows: list[texts.Row]) -> Tensors:
    """The encoder's ids and the decoder's targets of rows, (N, max_tokens) each."""
    x = [text for text, _, _ in rows]
    return texts.encode(encoder, x, cfg.max_tokens), texts.encode(decoder, x, cfg.max_tokens, end=True)


def load_texts(cfg: Config) -> texts.Texts:
    tables = dict(train=grammar.rows()) if cfg.dataset == "grammar" else load_tables(cfg.dataset)
    return texts.read_texts(tables, cfg.dataset, cfg.text_column, cfg.label_column, cfg.column)


def pieces(cfg: Config, encoder, decoder, data: texts.Texts) -> tuple[list[texts.Row], list[texts.Row]]:
    """The training and the held-out texts, cut to cfg.max_tokens; pieces of training texts overlap."""
    fits = texts.fits(encoder, decoder, cfg.max_tokens)
    train, test = texts.cut_rows(data.train, fits, overlap=not cfg.column), texts.cut_rows(data.test, fits)
    log(f"{cfg.dataset}: {len(train)} training and {len(test)} test pieces, classes {data.names}")
    return train, test


def train(cfg: Config) -> None:
    """Train both stages."""
    if cfg.span > 1 and not cfg.k * (cfg.span - 1) < cfg.max_tokens <= cfg.k * cfg.span:
        raise UserError(f"--k {cfg.k} --span {cfg.span} must just cover --max_tokens {cfg.max_tokens}")
    if (cfg.encoder == "scratch") != (cfg.decoder == "scratch"):
        raise UserError("--encoder and --decoder: both scratch, or both pretrained")
    data = load_texts(cfg)
    if cfg.encoder == "scratch":
        encoder = decoder = texts.train_tokenizer([text for text, _, _ in data.train], cfg.vocab)
    else:
        encoder, decoder = map(texts.pretrained_tokenizer, (cfg.encoder, cfg.decoder))
    facts = dict(stage="vae", names=data.names, checksum=data.checksum())
    facts |= dict(encoder=texts.to_json(encoder), decoder=texts.to_json(decoder))
    known, held_out = pieces(cfg, encoder, decoder, data)
    ids, target = tensors(cfg, encoder, decoder, known)
    vae = train_vae(cfg, facts, (ids, target), tensors(cfg, encoder, decoder, held_out), pick_device())
    train_diffusion(cfg, facts, vae, known, held_out, ids)


def main(cfg: Config) -> None:
    if not cfg.load:
        return train(replace(cfg, out=cfg.out.replace("{dataset}", Path(cfg.dataset).stem)))
    writer = load(cfg.load, cfg)
    tag = f"{cfg.sampler}_{cfg.steps}_guidance{cfg.guidance:g}_seed{cfg.seed}"
    save_text(samples(writer, []), Path(cfg.load).parent / f"samples/{tag}.txt")
    if cfg.score_n:
        data = load_texts(cfg)
        if data.checksum() != writer.facts["checksum"]:
            raise UserError(f"{cfg.load} was not trained on {cfg.dataset}: it may have seen its test texts")
        score(writer, *pieces(cfg, writer.encoder, writer.decoder, data))


if __name__ == "__main__":
    run_script(Config, main, __doc__)
