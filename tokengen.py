"""Text by masked diffusion in blocks of characters: a bound on its likelihood, new text, filled gaps.

    python tokengen.py --dataset manual          Python's own manual: no download
    python tokengen.py                           Tiny Shakespeare; or --dataset book.txt
    python tokengen.py --load out/shakespeare/last.pt --prompt "KING: My ____ is gone" --gap _

Blocks of 1 are autoregression, a block as long as the window is plain masked diffusion. Block diffusion
2503.09573, masked diffusion (MDLM) 2406.07524. The model is in blocks.py.
"""

import hashlib
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F

from blocks import Layout, TokenTransformer, bound, draw_masks, generate
from common.run import Flags, Run, UserError, autocast, check_config, load_model, log, pick_device, run_script
from common.texts import from_json, load_text, save_text, train_tokenizer
from diffusion import Masked


@dataclass(frozen=True)
class Config(Flags):
    # Edit the defaults here, or override any of them on the command line: python tokengen.py --lr 1e-3
    dataset: str = "shakespeare"  # shakespeare (downloaded), manual (Python's own), or a text file
    data_dir: str = "data"  # where downloads are kept
    vocab: int = 0  # tokens of a BPE that is trained on the text; 0: its characters
    lines: bool = False  # each line is a text of its own: windows begin where a line does
    # diffusion and denoiser
    window: int = 128  # tokens that the model sees at a time
    block: int = 16  # tokens of a block, which divides the window
    width: int = 128  # width of the transformer
    depth: int = 6  # number of blocks of the transformer
    # optimisation
    max_steps: int = 5000  # optimizer steps
    batch_size: int = 32  # windows per step, over all processes
    lr: float = 2e-3  # AdamW's learning rate after warm-up
    # sampling
    steps: int = 16  # evaluations of the denoiser for each block
    temperature: float = 0.8  # of the tokens that are drawn; 0 takes the likeliest
    prompt: str = ""  # what a sample begins with
    gap: str | None = None  # character of the prompt for a token to fill in, given its block and those before
    length: int = 400  # tokens of a sample; with --lines at most the window
    samples: int = 3  # texts to write
    score_n: int = 1000  # held-out windows to score; 0: no score
    # the run
    sample_every: int = 500  # steps between scores on 100 held-out windows

    script: ClassVar = "tokengen"

    def __post_init__(self):
        check_config(
            self,
            (self.window % self.block == 0, f"--block must divide the --window of {self.window}"),
            (not self.gap or self.gap in self.prompt, f"--gap {self.gap} is not in the --prompt"),
        )


def facts_of(cfg, text, text_test):
    """What a checkpoint must know of its text: the characters, or the BPE."""
    tokenizer, whole = None, text + text_test
    if cfg.vocab:
        tokenizer = train_tokenizer(re.split("(?<=\n)", text), cfg.vocab, prefix_space=False)
    checksum = hashlib.sha256(whole.encode()).hexdigest()[:12]
    return dict(alphabet="".join(sorted(set(whole))), tokenizer=tokenizer, checksum=checksum)


def vocabulary(facts):
    """The number of tokens; the mask is one more."""
    return len(from_json(*facts["tokenizer"])) if facts["tokenizer"] else len(facts["alphabet"])


def encode(facts, text):
    """Ids (n,) of a text."""
    if facts["tokenizer"]:
        return torch.tensor(from_json(*facts["tokenizer"])(text)["input_ids"], dtype=torch.long)
    ids = [facts["alphabet"].find(character) for character in text]
    if -1 in ids:
        raise UserError(f"{text[ids.index(-1)]!r} is not among the characters of the training text")
    return torch.tensor(ids, dtype=torch.long)


def decode(facts, ids):
    """The text of ids (n,), with ░ or <mask>, the BPE's token 0, for each mask."""
    if facts["tokenizer"]:
        return from_json(*facts["tokenizer"]).decode(ids.where(ids < vocabulary(facts), 0).tolist())
    return "".join((facts["alphabet"] + "░")[i] for i in ids.tolist())


def encode_prompt(cfg, facts):
    """Ids (p,) of the prompt, with the mask at its gaps. UserError where it is too long."""
    pieces = cfg.prompt.split(cfg.gap) if cfg.gap else [cfg.prompt]
    ids = torch.cat([F.pad(encode(facts, piece), (0, 1), value=vocabulary(facts)) for piece in pieces])[:-1]
    if len(ids) >= cfg.window:
        raise UserError(f"the prompt must have fewer than {cfg.window} tokens, got {len(ids)}: shorten it")
    return ids


def window_starts(cfg, facts, ids, stride=1):
    """Positions (N,) in ids where windows begin: every `stride` tokens, or with cfg.lines where lines do."""
    starts = torch.arange(0, len(ids), stride, device=ids.device)
    if cfg.lines:
        starts = (ids == encode(facts, "\n").item()).nonzero()[:, 0] + 1
    starts = starts[starts <= len(ids) - cfg.window]
    if len(starts) < 2:
        raise UserError(f"{len(ids)} tokens have fewer than two windows of {cfg.window}: give more text")
    return starts


def build(cfg, facts, device):
    """The process and the denoiser of windows in blocks."""
    torch.manual_seed(cfg.seed)
    layout = Layout([0] + [cfg.block] * (cfg.window // cfg.block))
    model = TokenTransformer(vocabulary(facts), layout, cfg.width, cfg.depth, rope=True)
    return Masked(model.mask_id), model.to(device)


load = partial(load_model, Config, build)  # load(path): process, denoiser and facts


@torch.no_grad()
def write(cfg, model, prompt):
    """Yield ids (n, L) after each step: texts that begin with prompts (n, p), shorter than a window.
    Each window begins with the second half of the one before. With cfg.gap only the prompt is filled."""
    W, text, generator = model.layout.k, prompt, torch.Generator().manual_seed(cfg.seed)
    how = dict(steps=cfg.steps, temperature=cfg.temperature, generator=generator)
    length = prompt.shape[1] if cfg.gap else min(cfg.length, W if cfg.lines else cfg.length)
    for start in range(0, length, W - W // 2):
        xt = F.pad(text[:, start:], (0, start + W - text.shape[1]), value=model.mask_id)
        with autocast(prompt.device, cfg.precision):
            for _, window in generate(model, prompt[:, :0], xt, **how):
                text = torch.cat([text[:, :start], window], dim=1)[:, :length]
                yield text
                if text.shape[1] == length and (text != model.mask_id).all():
                    return  # the rest of the window is not wanted


def write_samples(cfg, facts, model):
    """cfg.samples texts that begin with the prompt."""
    prompt = encode_prompt(cfg, facts).expand(cfg.samples, -1).to(next(model.parameters()).device)
    *_, samples = write(cfg, model, prompt)
    return [f"[{i}]\n{decode(facts, ids)}\n" for i, ids in enumerate(samples, 1)]


def stratified(B, n, device):
    """Uniform numbers (B, n) in [0, 1], one in each of B n equal parts: less variance. MDLM app. C."""
    order = torch.randperm(B * n, device=device)
    return ((order + torch.rand(B * n, device=device)) / (B * n)).view(B, n)


@torch.no_grad()
def bits_of(cfg, facts, model, text, n, draws=8):
    """Bits per character, at most, of at most n windows (N,) of a text; draws: masks of each."""
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(cfg.seed)
    ids, nats = encode(facts, text).to(device), []
    starts = window_starts(cfg, facts, ids, stride=cfg.window)
    starts = starts[torch.linspace(0, len(starts) - 1, min(n, len(starts))).long()]  # evenly spread
    draws = draws if cfg.block > 1 else 1  # autoregression has one order
    for part in ids.unfold(0, cfg.window, 1)[starts].split(cfg.batch_size):
        with autocast(device, cfg.precision):
            nats.append(bound(model, part[:, :0], part, draws, generator))
    return torch.cat(nats) / (cfg.window * len(text) / len(ids) * math.log(2))


def log_score(bits):
    """Print the mean of bits (N,) and its standard error."""
    error = bits.std() / math.sqrt(len(bits))
    log(f"at most {bits.mean():.4f} +- {error:.4f} bits per character, n={len(bits)} held-out windows")


def train(cfg, text, text_test, device):
    facts = facts_of(cfg, text, text_test)
    ids = encode(facts, text)
    log(f"{cfg.dataset}: {len(ids)} training tokens of {vocabulary(facts)} kinds")
    starts = window_starts(cfg, facts, ids)
    if cut := (starts.diff() > cfg.window).sum():
        log(f"{cut} lines have more than {cfg.window} tokens and are cut: raise --window")
    # Fail before training, not after.
    window_starts(cfg, facts, encode(facts, text_test), cfg.window), encode_prompt(cfg, facts)
    process, model = build(cfg, facts, device)
    layout, windows, starts = model.layout, ids.to(device).unfold(0, cfg.window, 1), starts.to(device)
    with Run(cfg, model, facts, device, cooldown=0.2, muon=model.matrices()) as run:
        for _, batch in run.steps(len(starts)):
            x0 = windows[starts[batch]]
            masked = draw_masks(layout, x0, stratified(len(x0), len(layout.widths), device))
            with autocast(device, cfg.precision):
                loss = process.cross_entropies(run.model, x0, masked, x0[:, : layout.c]).sum() / masked.sum()
            run.update(loss)
            if run.due(cfg.sample_every):
                log_score(bits_of(cfg, facts, run.ema, text_test, 100, draws=4))
        if run.due(1):  # once, in the main process
            save_text(write_samples(cfg, facts, run.ema), run.out / "samples/samples.txt")
            if cfg.score_n:
                log_score(bits_of(cfg, facts, run.ema, text_test, cfg.score_n))


def main(cfg):
    if not cfg.load:
        return train(cfg, *load_text(cfg.dataset, cfg.data_dir, cfg.lines), pick_device())
    _, model, facts = load(cfg.load, cfg=cfg)
    folder = Path(cfg.load).expanduser().parent
    save_text(write_samples(cfg, facts, model), folder / f"samples/seed{cfg.seed}.txt")
    if cfg.score_n:
        texts = load_text(cfg.dataset, cfg.data_dir, cfg.lines)
        if facts_of(cfg, *texts) != facts:
            raise UserError(f"{cfg.load} was not trained on {cfg.dataset}: it may have seen its test part")
        log_score(bits_of(cfg, facts, model, texts[1], cfg.score_n))


if __name__ == "__main__":
    run_script(Config, main, __doc__)
