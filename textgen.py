"""Text diffusion: a VAE turns texts into latents, diffusion makes new latents, the VAE's decoder writes them.

    python textgen.py --dataset grammar                     small hotel reviews: no download
    python textgen.py --dataset reviews.csv                 your own texts, with ratings or without
    python textgen.py --dataset reviews.csv --size base     from pretrained BERT and GPT-2, on a GPU
    python textgen.py --load out/grammar/diffusion/last.pt  more samples of a finished run

Both stages are PLANNER's, 2306.02531. The mathematics is in diffusion.py, the VAE in vae.py. From Python:
textgen.load("out/grammar/diffusion/last.pt").sample([4, 4, 0]), of labels, or of texts as conditions.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from common import scores, texts
from common.run import (
    Flags,
    Run,
    UserError,
    autocast,
    check_config,
    is_builtin,
    log,
    open_checkpoint,
    pick_device,
    resolve_out,
    run_script,
)
from common.tables import load_from_hub, load_tables
from diffusion import SAMPLERS, Diffusion, LatentTransformer, cosine, drop_condition, sample
from tasks import grammar
from vae import TextVAE, pretrained_backbones, small_backbones, untrained_backbones

T = 1000  # timesteps of the forward process
LABEL_DROP = 0.1  # share of the conditions that are dropped in training, for guidance
# A VAE serves several diffusions.
FREE_IN_VAE = set("condition shift self_condition width depth diffusion_batch".split())

BASE = dict(encoder="bert-base-uncased", decoder="gpt2", max_tokens=256, k=16, span=16, latent_noise=0.3)
BASE |= dict(vae_steps=50_000, vae_batch=128, shift=2.0, width=768, depth=12, lr=1e-4)
BASE |= dict(diffusion_steps=100_000, diffusion_batch=256)


@dataclass(frozen=True)
class Config(Flags):
    # Edit the defaults here, or override any of them on the command line: python textgen.py --lr 1e-4
    dataset: str = "tripadvisor"  # grammar (made here), tripadvisor or owner/name (hub), or a file or folder
    text_column: str | None = None  # column of the texts; by default guessed
    label_column: str | None = None  # column of the classes; by default guessed; "none" is none
    size: Literal["small", "base", "planner"] = "small"  # base and planner: pretrained BERT and GPT-2
    max_tokens: int = 56  # of a text with its end token; longer texts are cut at sentence ends
    # VAE
    encoder: str = "scratch"  # or a BERT-like model, by hub name or folder
    decoder: str = "scratch"  # or a causal language model, by hub name or folder
    vocab: int = 4096  # scratch: tokens of the BPE
    vae_width: int = 192  # scratch: width of encoder and decoder
    vae_depth: int = 3  # scratch: blocks of encoder and decoder
    k: int = 28  # latents of a text
    latent_width: int = 256  # of each latent
    span: int = 2  # neighbouring states of the encoder that make a latent; k * span should cover a text
    pool: Literal["mean", "concat"] = "mean"  # of a span; concat keeps the order, mean needs fewer texts
    variance: Literal["fixed", "learned"] = "fixed"  # of the latents; learned is PLANNER's, with a KL
    latent_noise: float = 1.2  # fixed: standard deviation; more: more fluent samples, less exact copies
    beta: float = 0.0  # learned: weight of the KL
    p_max: float = 0.4  # each text is read with random tokens in it, at a rate drawn from 0..p_max
    vae_steps: int = 5000  # optimizer steps of the VAE
    vae_batch: int = 32  # texts per step of the VAE, over all processes
    # diffusion and denoiser
    condition: str = "label"  # label, none, prefix (the piece before), or a column of texts; up to max_tokens
    shift: float = 4.0  # above 1: more of the steps at high noise
    self_condition: float = 0.9  # share of steps in which the denoiser sees its first guess
    width: int = 192  # width of the denoiser
    depth: int = 6  # blocks of the denoiser
    diffusion_steps: int = 2500  # optimizer steps of the diffusion
    diffusion_batch: int = 128  # texts per step of the diffusion, over all processes
    # optimisation
    lr: float = 1e-3  # AdamW's learning rate after warm-up
    # sampling
    sampler: Literal[tuple(SAMPLERS)] = "dpm++"  # DPM-Solver++(2M), DDIM, DDPM or EDM's Heun
    steps: int = 20  # evaluations of the denoiser (twice as many with guidance)
    guidance: float = 2.0  # classifier-free guidance: 0 is off, 4 is strong
    prompt: str | None = None  # with --load, where the condition is a text: that text
    samples: int = 4  # texts for each class, or for each condition
    score_n: int = 200  # texts to score; 0: no score
    # the run
    sample_every: int = 500  # steps between samples

    script: ClassVar = "textgen"
    RECIPES: ClassVar = dict(
        grammar=dict(max_tokens=48, k=6, latent_width=128, span=8, pool="concat", p_max=0.3, vae_steps=3500)
        | dict(shift=5.0, diffusion_steps=8000, diffusion_batch=192, sampler="ddpm", steps=200),
        base=BASE,
        planner=BASE | dict(span=1, variance="learned", beta=1e-5, p_max=0.0),  # the VAE of the paper
    )

    def __post_init__(self):
        same = (self.encoder == "scratch") == (self.decoder == "scratch")
        check_config(
            self,
            (self.steps <= T, f"--steps must be at most {T}"),
            (self.vae_width % 8 == 0, "--vae_width must be divisible by 8"),
            (same, "--encoder and --decoder: both from scratch or both pretrained"),
        )

    @property
    def reads_text(self):
        """Whether the condition is a text: the piece before, or that of a column."""
        return self.condition not in ("label", "none")


def build_vae(cfg, facts, device):
    """The VAE that cfg describes; of pretrained parts that were read before, the facts know the shape."""
    torch.manual_seed(cfg.seed)
    tokenizer, L = texts.from_json(*facts["decoder"]), max(cfg.max_tokens, cfg.k * cfg.span)
    if cfg.encoder == "scratch":
        parts = small_backbones(len(tokenizer), cfg.vae_width, cfg.vae_depth, L + cfg.k + 1)
    elif "backbones" in facts:
        parts = untrained_backbones(*facts["backbones"])
    else:
        parts = load_from_hub(pretrained_backbones, cfg.encoder, cfg.decoder)
    how = cfg.span, cfg.pool, cfg.variance, cfg.latent_noise, cfg.beta, cfg.p_max
    vae = TextVAE(*parts, cfg.k, cfg.latent_width, tokenizer.eos_token_id, *how)
    try:
        ids = torch.ones(1, L, dtype=torch.long)
        vae.decode(vae.encode(ids)[0], ids)
    except Exception as error:  # of any type: it comes from any model
        raise UserError(f"{cfg.encoder} or {cfg.decoder} cannot read {L} tokens: {error}") from error
    return vae.to(device)


def build_denoiser(cfg, facts, vae):
    """The process and the denoiser that cfg describes, for the latents of vae."""
    torch.manual_seed(cfg.seed)
    device = vae.fc_mean.weight.device
    classes = len(facts["names"]) if cfg.condition == "label" else 0
    d_context = vae.encoder.config.hidden_size if cfg.reads_text else 0
    process = Diffusion(*cosine(T, cfg.shift), "v", "plain", cfg.self_condition)
    sizes = cfg.latent_width, cfg.width, cfg.depth, classes, d_context
    return process.to(device), LatentTransformer(*sizes, cfg.self_condition > 0).to(device)


@dataclass
class Writer:
    """All that turns noise into text: VAE, process, denoiser, and mean and std (k, d) of the latents."""

    cfg: Config
    facts: dict
    vae: TextVAE
    mean: Tensor
    std: Tensor

    def __post_init__(self):
        self.process, self.model = build_denoiser(self.cfg, self.facts, self.vae)
        self.device = self.vae.fc_mean.weight.device
        self.encoder, self.decoder = (texts.from_json(*self.facts[side]) for side in ("encoder", "decoder"))

    def write(self, x0):
        """The texts of standardised latents (N, k, d)."""
        written = []
        for z in (x0 * self.std + self.mean).split(64):
            written += texts.decode(self.decoder, self.vae.generate(z.to(self.device), self.cfg.max_tokens))
        return written

    @torch.no_grad()
    def condition(self, given):
        """The denoiser's y: labels (N,), or of texts (the encoder's states (N, L, D), mask (N, L))."""
        if not self.cfg.reads_text:
            return torch.tensor(given, device=self.device)
        ids = texts.encode(self.encoder, given, self.cfg.max_tokens)
        parts = [self.vae.states(part.to(self.device)) for part in ids.split(256)]
        return torch.cat([h.half() for h, _ in parts]), torch.cat([mask for _, mask in parts])

    def sample(self, given):
        """A new text for each label (-1: none) or each text of the condition; cfg.seed decides the noise."""
        cfg, y, x0 = self.cfg, self.condition(given), []
        guided = cfg.reads_text or cfg.condition == "label" and self.facts["names"]
        how = dict(sampler=cfg.sampler, steps=cfg.steps, guidance=cfg.guidance if guided else 0.0)
        generator = torch.Generator().manual_seed(cfg.seed)
        for part in torch.arange(len(given)).split(cfg.diffusion_batch):  # what fits in training fits here
            shape, y_part = (len(part), cfg.k, cfg.latent_width), rows_of(y, part.to(self.device))
            with autocast(self.device, cfg.precision):
                x0.append(sample(self.process, self.model, shape, y_part, generator=generator, **how).cpu())
        return self.write(torch.cat(x0))


def rows_of(y, index):
    """The rows `index` of a condition."""
    return (y[0][index].float(), y[1][index]) if isinstance(y, tuple) else y[index]


@torch.no_grad()
def encode_all(vae, ids):
    """Means (N, k, d) of the latents of ids (N, L), on the CPU."""
    return torch.cat([vae.encode(part.to(vae.fc_mean.weight.device))[0].cpu() for part in ids.split(256)])


def load(path, device=None, cfg=None):
    """The writer in a checkpoint of the diffusion, with the averaged weights."""
    with open_checkpoint(path, Config) as saved:
        cfg, facts, extra = cfg or Config(**saved["config"]), saved["facts"], saved["extra"]
        vae = build_vae(cfg, facts, pick_device(device))
        vae.load_state_dict(extra["vae"])
        writer = Writer(cfg, facts, vae.eval().requires_grad_(False), extra["mean"], extra["std"])
        writer.model.load_state_dict(saved["ema"])
    return writer


def train_vae(cfg, facts, vae, train, test):
    """Train the VAE in its folder, or load it where it is finished; the averaged weights."""
    device, cfg = vae.fc_mean.weight.device, replace(cfg, out=f"{cfg.out}/vae")
    ids, target = (x.to(device) for x in train)
    with Run(cfg, vae, facts, device, free=FREE_IN_VAE, sizes=(cfg.vae_steps, cfg.vae_batch)) as run:
        for _, batch in run.steps(len(ids)):
            with autocast(device, cfg.precision):
                loss = run.model(ids[batch], target[batch])
            run.update(loss)
            if run.due(cfg.sample_every):
                log(f"  {held_out_nats(run.ema, *(x[:128] for x in test))}")
    return run.ema


@torch.no_grad()
def held_out_nats(vae, ids, target):
    """Nats per token of ids and target (N, L), also given the latents of other texts.
    Where these are alike, the decoder ignores the latents (posterior collapse): lower beta or p_max."""
    z, device, means = encode_all(vae, ids), vae.fc_mean.weight.device, []
    for x in (z, z.roll(1, 0)):
        parts = zip(x.to(device).split(16), target.to(device).split(16), strict=True)  # logits are large
        means.append(sum(vae.cross_entropy(x, y) * (y >= 0).sum() for x, y in parts) / (target >= 0).sum())
    return "held-out nats per token: {:.3f}, given the latents of other texts {:.3f}".format(*means)


def train_diffusion(cfg, facts, vae, train, test, ids):
    """Train the denoiser, or load it where it is finished, on the latents of ids (N, L), those of `train`."""
    weights = {name: w.cpu() for name, w in vae.state_dict().items()}
    facts = facts | dict(vae=[w.flatten()[0].item() for w in weights.values()])
    z = encode_all(vae, ids)
    mean, std = z.mean(0), z.std(0).clamp(min=1e-3)
    writer = Writer(cfg, facts, vae, mean, std)
    z, y = ((z - mean) / std).to(writer.device), writer.condition(conditions(cfg, train))
    sizes = cfg.diffusion_steps, cfg.diffusion_batch
    extra, cfg = dict(vae=weights, mean=mean, std=std), replace(cfg, out=f"{cfg.out}/diffusion")
    with Run(cfg, writer.model, facts, writer.device, extra=extra, sizes=sizes) as run:
        writer.model = run.ema
        for step, batch in run.steps(len(z)):
            y_batch = drop_condition(rows_of(y, batch), LABEL_DROP)
            with autocast(writer.device, cfg.precision):
                loss = writer.process.loss(run.model, z[batch], y_batch).mean()
            run.update(loss)
            if run.due(cfg.sample_every):
                texts.save_text(sample_lines(writer, test), run.out / f"samples/{step:06}.txt")
        if run.due(1):  # once, in the main process
            texts.save_text(sample_lines(writer, test), run.out / "samples/samples.txt")
            if cfg.score_n:
                score(writer, train, test)


def conditions(cfg, rows):
    """The texts, or the labels, that rows are conditioned on; -1 is none."""
    return [c if cfg.reads_text else y if cfg.condition == "label" else -1 for _, y, c in rows]


def sample_lines(writer, rows):
    """cfg.samples new texts for each class, or for the conditions of the first rows where these are texts."""
    cfg, names = writer.cfg, writer.facts["names"]
    shown = dict(enumerate(names)) if cfg.condition == "label" and names else {-1: ""}
    if cfg.reads_text:
        shown = {c: c for c in conditions(cfg, rows[:3])}
    given = [c for c in shown for _ in range(cfg.samples)]
    return [f"[{shown[c]}] {text}" for c, text in zip(given, writer.sample(given), strict=True)]


def score(writer, train, test):
    """Log how held-out texts come back from their latents, and what new texts are like."""
    cfg, n = writer.cfg, writer.cfg.score_n
    held_out, known = texts.shuffled(test, cfg.seed)[:n], texts.shuffled(train, cfg.seed)[:n]
    ids, target = tensors(cfg, writer.encoder, writer.decoder, held_out)
    z, real = encode_all(writer.vae, ids), texts.decode(writer.decoder, target)
    copies = writer.write((z - writer.mean) / writer.std)
    log(f"\nscore of n={len(real)}: BLEU of reconstructions {scores.bleu(copies, real):.1f}")
    log(f"  {held_out_nats(writer.vae, ids, target)}")
    if labelled := len(writer.facts["names"]) > 1:
        classify = scores.text_classifier(*list(zip(*train, strict=True))[:2])
    new = [(text, *row[1:]) for row, text in zip(known, writer.sample(conditions(cfg, known)), strict=True)]
    for name, rows in {"samples": new, "training": known, "held out": held_out}.items():
        written, labels, _ = zip(*rows, strict=True)
        line = f"  {name:9} dist-2 {scores.dist2(written):.3f}"
        if labelled:
            line += f"  label {scores.agreement(classify(written), labels):.3f}"
        if cfg.dataset == "grammar":
            ratings = [grammar.rating_of(text) for text in written]
            line += f"  accepted {1 - ratings.count(None) / len(ratings):.3f}"
            line += f"  rating {scores.agreement(ratings, [label + 1 for label in labels]):.3f}"
        log(line)


def load_texts(cfg):
    tables = dict(train=grammar.rows()) if is_builtin(cfg.dataset, ["grammar"]) else load_tables(cfg.dataset)
    column = cfg.condition if cfg.reads_text and cfg.condition != "prefix" else None
    return texts.read_texts(tables, cfg.dataset, cfg.text_column, cfg.label_column, column)


def tensors(cfg, encoder, decoder, rows):
    """The encoder's ids and the decoder's targets of rows, (N, max_tokens) each."""
    x = [row[0] for row in rows]
    return texts.encode(encoder, x, cfg.max_tokens), texts.encode(decoder, x, cfg.max_tokens, end=True)


def pieces(cfg, encoder, decoder, data):
    """The training and the held-out texts, cut to cfg.max_tokens; pieces of training texts overlap."""
    fits, prefix = texts.fits(encoder, decoder, cfg.max_tokens), cfg.condition == "prefix"
    train = texts.cut_rows(data.train, fits, overlap=not cfg.reads_text, prefix=prefix)
    test = texts.cut_rows(data.test, fits, prefix=prefix)
    if not train or not test:
        raise UserError(f"{cfg.dataset}: too few texts are longer than --max_tokens {cfg.max_tokens}")
    log(f"{cfg.dataset}: {data.columns}; {len(train)} training and {len(test)} test pieces")
    return train, test


def train(cfg):
    data, scratch = load_texts(cfg), cfg.encoder == "scratch"
    facts, path = dict(names=data.names, checksum=data.checksum()), Path(cfg.out, "vae/last.pt")
    if path.exists():  # newer libraries may write tokenizers and configurations differently
        with open_checkpoint(path, Config) as saved:
            facts = saved["facts"] | facts
    elif scratch:
        facts["encoder"] = facts["decoder"] = texts.train_tokenizer([x for x, *_ in data.train], cfg.vocab)
    else:
        facts["encoder"] = texts.pretrained_tokenizer(cfg.encoder)
        facts["decoder"] = texts.pretrained_tokenizer(cfg.decoder)
    encoder, decoder = (texts.from_json(*facts[side]) for side in ("encoder", "decoder"))
    known, held_out = pieces(cfg, encoder, decoder, data)
    inputs, inputs_test = (tensors(cfg, encoder, decoder, rows) for rows in (known, held_out))
    vae = build_vae(cfg, facts, pick_device())
    if not scratch and "backbones" not in facts:
        facts["backbones"] = [p.config.to_json_string(use_diff=False) for p in (vae.encoder, vae.decoder)]
    vae = train_vae(cfg, facts, vae, inputs, inputs_test)
    facts |= dict(conditions=data.checksum(conditions=True))
    train_diffusion(cfg, facts, vae, known, held_out, inputs[0])


def main(cfg):
    prompted = bool(cfg.load and cfg.reads_text)
    check_config(
        cfg,
        (bool(cfg.prompt) == prompted, "--prompt: needed with --load and a text as condition, only there"),
        (cfg.span == 1 or cfg.max_tokens <= cfg.k * cfg.span, "--k times --span must cover --max_tokens"),
    )
    if not cfg.load:
        return train(resolve_out(cfg))
    writer, folder = load(cfg.load, cfg=cfg), Path(cfg.load).expanduser().parent / "samples"
    name = f"{cfg.sampler}_{cfg.steps}_guidance{cfg.guidance:g}_seed{cfg.seed}.txt"
    texts.save_text(sample_lines(writer, [("", -1, cfg.prompt)]), folder / name)
    if cfg.score_n:
        data = load_texts(cfg)
        if data.checksum() != writer.facts["checksum"]:
            raise UserError(f"{cfg.load} was not trained on {cfg.dataset}: it may have seen its test texts")
        score(writer, *pieces(cfg, writer.encoder, writer.decoder, data))


if __name__ == "__main__":
    run_script(Config, main, __doc__)
