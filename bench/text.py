"""textgen.py beside GPT-2 and beside PLANNER's way of doing the same.

python -m bench.text                    three ratios of speed, in interleaved rounds; about 5 minutes on a CPU
python -m bench.text --checkpoint out/tripadvisor/diffusion/last.pt      quality: the score's table with GPT-2

The table trains two GPT-2s on the texts of the checkpoint, in folders beside it, until their held-out loss
rises, or for as long as VAE and denoiser were trained: a "baseline", as large as these two together, which is
given the labels and writes texts; and a "judge", as large as the VAE's decoder and without labels, which says
how surprising texts are (perplexity).
"""

import dataclasses
import math
import platform
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

import textgen
from bench.gpt import LabelGPT, mean_nats
from bench.timing import interleaved, spread
from data import Pieces
from diffusion import drop_condition
from files import UserError, load_checkpoint, load_weights, reason
from tasks import grammar_texts
from training import Run, autocast, millions, need, pick_device, run_script, saved_config
from vae import TextVAE, kl, pretrained_backbones, small_backbones, small_gpt, substitute


@dataclass(frozen=True)
class Config:
    """Settings of a comparison."""

    checkpoint: str | None = None  # of a diffusion of textgen.py: print its table of quality
    rounds: int = 7  # speed: interleaved rounds
    round_steps: int = 4  # speed: training steps of each side in a round
    batch_size: int = 64  # speed: reviews written at a time
    base_batch: int = 8  # speed: texts of a diffusion step at the base size
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda, else mps, else cpu

    def __post_init__(self):
        need(self, "rounds round_steps batch_size base_batch", 1)


# -- quality ---------------------------------------------------------------------------------------------


def quality(path: Path, device) -> None:
    """Print the rows of textgen.py's score and those of the baseline GPT-2, with perplexities."""
    writer, train, test = read_writer(path, device)
    judge, baseline = (train_gpt(writer, train, test, path.parent, name) for name in ("judge", "baseline"))
    rows = textgen.new_and_real(writer, train, test)
    y = rows["samples"][1]
    for top_p in (0.7, 0.92, 1.0):
        rows[f"GPT-2 top-p {top_p:g}"] = (write_reviews(writer, baseline, y, top_p), y)
    scores = textgen.score_rows(writer.cfg, rows, train, test)
    for name, (new, _) in rows.items():
        scores[name]["perplexity"] = judged(writer, judge, new)
    try:
        perplexity = load_gpt2(device)
        for name, (new, _) in rows.items():
            scores[name]["GPT-2's"] = perplexity(new)
    except UserError as error:
        print(f"no perplexity under GPT-2: {error}")
    print(f"\n{path}, {writer.tag}, n={len(y)}\n")
    print_scores(scores)


def read_writer(path, device) -> tuple[textgen.Writer, Pieces, Pieces]:
    """The writer in a checkpoint of the diffusion, and the training and held-out pieces of its texts."""
    cfg = saved_config(textgen.Config, load_checkpoint(path, textgen.Config.kind)["config"], path)
    texts = textgen.texts_of(cfg)
    writer = textgen.load_writer(cfg, path, device, texts)
    train, test = (textgen.split_pieces(cfg, writer.codec, texts, name) for name in ("train", "test"))
    return writer, train, test


def print_scores(scores: dict[str, dict[str, float]]) -> None:
    """Print the measures of rows as a table."""
    names = list(scores["samples"])
    print(f"| | {' | '.join(names)} |\n|---{'|---' * len(names)}|")
    for name, values in scores.items():
        print(f"| {name} | {' | '.join(f'{value:.3g}' for value in values.values())} |")


def train_gpt(writer: textgen.Writer, train: Pieces, test: Pieces, out: Path, name: str) -> LabelGPT:
    """The "baseline" or the "judge", trained in out/NAME; where it has been trained, it is loaded."""
    device, path = writer.device, out / name / "last.pt"
    seed = writer.cfg.seed + (name == "judge")  # other weights, another order than the baseline's
    cfg = dataclasses.replace(writer.cfg, seed=seed, resume=path.exists())
    torch.manual_seed(seed)
    model = LabelGPT(make_decoder(writer, name), len(writer.names), writer.codec.eos).to(device)
    saved = load_checkpoint(path, cfg.kind) if path.exists() else dict(extra=dict(done=False, best=math.inf))
    if saved["extra"]["done"]:
        load_weights(model, saved["ema"], path)
        return model.eval()
    labelled = name == "baseline"
    y, y_test = (p.y if labelled else torch.full_like(p.y, -1) for p in (train, test.first(256)))
    y, target, target_test = y.to(device), train.target.to(device), test.first(256).target
    steps = cfg.vae_steps + cfg.diffusion_steps
    run = Run(cfg, model, device, dict(stage=name), path.parent, steps, cfg.vae_batch, saved["extra"])
    print(f"{name}: a GPT-2 of {millions(model)}, for at most {writer.seconds:.0f} s", flush=True)
    for step, batch in run.steps(len(target), writer.seconds):
        with autocast(device, cfg.precision):
            loss = run.model(y[batch], target[batch])
        run.update(loss)
        if step % min(250, cfg.sample_every) == 0:
            with run.pause():
                nats = mean_nats(run.ema.module, y_test, target_test, device)
            print(f"step {step}: held-out nats a token {nats:.3f}", flush=True)
            if nats > run.extra["best"]:
                break
            run.extra["best"] = nats
    run.extra["done"] = True
    run.save()
    return run.ema.module.eval()


def judged(writer: textgen.Writer, judge: LabelGPT, texts: list[str]) -> float:
    """The perplexity of texts, by the judge."""
    target = writer.codec.encode(texts)[1]
    return math.exp(mean_nats(judge, torch.full((len(texts),), -1), target, writer.device))


def make_decoder(writer: textgen.Writer, name: str) -> GPT2LMHeadModel:
    """The judge's decoder is like the VAE's; the baseline's makes up for encoder and denoiser by its size."""
    cfg, vocab = writer.cfg, writer.codec.vocab
    if cfg.decoder != "scratch":
        return pretrained_backbones(cfg.encoder, cfg.decoder)[1]
    D, depth = cfg.vae_width, cfg.vae_depth
    if name == "baseline":
        size = sum(p.numel() for p in (*writer.vae.parameters(), *writer.model.parameters()))
        D = cfg.vae_width * 3 // 2
        depth = max(1, round((size - vocab * D) / (12 * D**2)))
    return small_gpt(vocab, D, depth, cfg.max_tokens + 1)


@torch.no_grad()
def write_reviews(writer: textgen.Writer, model: LabelGPT, y: Tensor, top_p: float) -> list[str]:
    """What the GPT-2 writes for labels y (N,)."""
    torch.manual_seed(writer.cfg.seed)
    texts = []
    for part in y.split(64):
        ids = model.generate(model.read(part.to(writer.device)), writer.cfg.max_tokens, top_p)
        texts += writer.codec.decode(ids)
    return texts


def load_gpt2(device, name: str = "gpt2"):
    """A function from texts to their perplexity under a pretrained GPT-2 (hub name or folder).

    That is exp of the mean nats of all tokens but each text's first; texts are cut at 512 tokens. Raises
    UserError where the weights are not on disk and cannot be downloaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name).to(device).eval()
    except Exception as error:  # no network, no such name, a damaged folder
        raise UserError(f"{name} is not on disk and could not be downloaded ({reason(error)})") from error

    @torch.no_grad()
    def perplexity(texts: list[str]) -> float:
        nats, n = 0.0, 0
        for text in texts:
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=512).input_ids.to(device)
            if ids.shape[1] > 1:
                logits = model(ids).logits[0, :-1].float()
                nats += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
                n += ids.shape[1] - 1
        return math.exp(nats / n) if n else math.nan

    return perplexity


# -- speed -----------------------------------------------------------------------------------------------


def planner_loss(vae: TextVAE, ids: Tensor, target: Tensor) -> Tensor:
    """The loss of vae (span 1, learned variance) by the road that PLANNER's code takes.

    The encoder runs once for the mean and once for the variance; the latents pass through the decoder by
    themselves, and the text reads its keys and values from that pass's cache.
    """
    p = torch.rand(len(ids), device=ids.device) * vae.p_max
    noisy = substitute(ids, p, vae.encoder.config.vocab_size)
    mean = vae.fc_mean(vae.states(noisy)[0][:, : vae.k]).tanh()
    var = vae.fc_log_var(vae.states(noisy)[0][:, : vae.k]).clamp(-20, 5).exp()
    z = mean + var.sqrt() * torch.randn_like(mean)
    cache = vae.decoder.transformer(inputs_embeds=vae.prefix(z), use_cache=True).past_key_values
    read = F.pad(target.clamp(min=0)[:, :-1], (1, 0), value=vae.eos)
    logits = vae.decoder(input_ids=read, past_key_values=cache).logits
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)
    return loss + vae.beta * kl(mean, var)


def training_steps(model, loss, n: int, device):
    """A function that takes n optimizer steps of model on loss()."""
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type != "mps")

    def work(r: int) -> None:
        for _ in range(n):
            loss().backward()
            opt.step()
            opt.zero_grad()

    return work


def compare(title: str, sides: dict, rounds: int, device, scale: float = 1.0) -> None:
    """Print the seconds of two sides, those of the second times `scale`, and their ratio, round by round."""
    took = interleaved(sides, rounds, device)
    (a, ours), (b, theirs) = took.items()
    theirs = [seconds * scale for seconds in theirs]
    ratios = [there / here for here, there in zip(ours, theirs, strict=True)]
    seconds = f"{a} {np.median(ours):.3f} s, {b} {np.median(theirs):.3f} s"
    print(f"{title}: {seconds}, ratio {spread(ratios)}", flush=True)


def tiny_parts(device):
    """The grammar's texts, and what textgen.py at its defaults makes of them: cfg, codec, facts, VAE."""
    cfg, texts = textgen.Config(dataset="grammar"), grammar_texts()
    codec = textgen.pick_codec(cfg, texts, Path("no checkpoint"))
    facts = dict(codec=dataclasses.asdict(codec), names=texts.names)
    return texts, cfg, codec, facts, textgen.build_vae(cfg, facts, device)


def vae_speed(bench: Config, device) -> None:
    """A step of the VAE beside PLANNER's way of it, with BERT and GPT-2 as they come and as ours are."""
    texts, cfg, codec, _, vae = tiny_parts(device)
    ids, target = (part.to(device) for part in codec.encode(texts.train.x[: cfg.vae_batch]))
    parts = small_backbones(codec.vocab, cfg.vae_width, cfg.vae_depth, cfg.max_tokens + cfg.k + 1)
    bert, gpt = (part.config.to_dict() | dict(attn_implementation="sdpa") for part in parts)
    bert = BertModel(BertConfig(**bert), add_pooling_layer=False)
    gpt = GPT2LMHeadModel(GPT2Config(**gpt | dict(activation_function="gelu_new")))
    for name, theirs in (("PLANNER's way", (bert, gpt)), ("PLANNER's way on our backbones", parts)):
        plain = TextVAE(*theirs, cfg.k, cfg.d, codec.eos, variance="learned", beta=1e-5).to(device)
        our_loss, their_loss = partial(vae, ids, target), partial(planner_loss, plain, ids, target)
        sides = {
            "ours": training_steps(vae, our_loss, bench.round_steps, device),
            name: training_steps(plain, their_loss, bench.round_steps, device),
        }
        compare(f"VAE step, tiny, batch {cfg.vae_batch}, float32", sides, bench.rounds, device)


def diffusion_speed(bench: Config, device) -> None:
    """A step of the diffusion at the base size on stored latents, and with BERT encoding on the fly."""
    _, _, _, facts, vae = tiny_parts(device)
    cfg = textgen.Config(size="base", **textgen.RECIPES["base"])
    bert = AutoModel.from_config(BertConfig(), add_pooling_layer=False).to(device).eval()  # bert-base's shape
    process, denoiser = textgen.build_denoiser(cfg, facts, vae, device)
    B = bench.base_batch
    words = torch.randint(1000, 30_000, (B, cfg.max_tokens), device=device)
    y, stored = torch.zeros(B, dtype=torch.long, device=device), torch.randn(B, cfg.k, cfg.d, device=device)

    def loss(z: Tensor = stored) -> Tensor:
        return process.loss(denoiser, z, drop_condition(y, cfg.label_drop)).mean()

    def loss_on_the_fly() -> Tensor:
        with torch.no_grad():
            z = bert(input_ids=words).last_hidden_state[:, : cfg.k, : cfg.d]
        return loss(z)

    sides = {
        "stored latents": training_steps(denoiser, loss, bench.round_steps, device),
        "encoded on the fly": training_steps(denoiser, loss_on_the_fly, bench.round_steps, device),
    }
    compare(f"diffusion step, base, batch {B}, float32", sides, bench.rounds, device)


def writing_speed(bench: Config, device) -> None:
    """Reviews written in a batch and one by one."""
    _, cfg, codec, facts, vae = tiny_parts(device)
    process, denoiser = textgen.build_denoiser(cfg, facts, vae, device)
    cfg = dataclasses.replace(cfg, top_p=1.0)  # read greedily, random weights may end every review at once
    mean, std = torch.zeros(cfg.k, cfg.d), torch.ones(cfg.k, cfg.d)
    parts = (codec, vae.eval(), process, denoiser.eval(), mean, std, facts["names"], device)

    def write(r: int, n: int) -> None:
        writer = textgen.Writer(dataclasses.replace(cfg, seed=r), *parts)
        writer.sample(torch.zeros(n, dtype=torch.long), [""] * n)

    def one_by_one(r: int) -> None:
        for _ in range(4):
            write(r, 1)

    n = bench.batch_size
    title = f"writing {n} reviews, tiny, {cfg.steps} evaluations; one by one from 4"
    sides = {"in a batch": partial(write, n=n), "one by one": one_by_one}
    compare(title, sides, bench.rounds, device, n / 4)


def main(cfg: Config) -> None:
    device = pick_device(cfg.device)
    if cfg.checkpoint:
        return quality(Path(cfg.checkpoint), device)
    machine = f"{device}, {torch.get_num_threads()} threads, {platform.machine()}; torch {torch.__version__}"
    print(f"{machine}; {cfg.rounds} interleaved rounds\n")
    vae_speed(cfg, device)
    diffusion_speed(cfg, device)
    writing_speed(cfg, device)


if __name__ == "__main__":
    run_script(Config, main, __doc__)
