"""Text by masked diffusion of its characters in blocks: a bound on its likelihood, new text, filled gaps.

python tokengen.py --dataset manual                   Python's own manual: nothing to download
python tokengen.py                                    Tiny Shakespeare (downloaded to ./data)
python tokengen.py --sample_from out/shakespeare/last.pt --prompt "KING: My ____ is gone" --gap _

Blocks of 1 are autoregression, a block as long as the window is plain masked diffusion. Block diffusion
2503.09573, masked diffusion (MDLM) 2406.07524.
"""

import dataclasses
import functools
import hashlib
import http.client
import math
import shlex
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from blocks import Layout, TokenTransformer, bound, generate, hide
from data import Codec, train_codec
from diffusion import Masked
from files import (
    UserError,
    is_main,
    reason,
    say,
    show,
    write_atomic,
)
from training import (
    Run,
    autocast,
    check_run,
    load_averaged,
    matrices_of,
    millions,
    need,
    not_fatal,
    pick_device,
    run_name,
    run_script,
)

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
OFFLINE = "without a network use --dataset manual, or --dataset PATH of a text file"
EVAL = "step,seconds,bits,error"  # the columns of eval.csv
HIDDEN = "░"  # is shown for what is still masked


class Facts(TypedDict):
    """What a checkpoint knows of its text: its characters, or a BPE's JSON; its length and checksum."""

    alphabet: str
    tokenizer: str | None
    characters: int
    checksum: str


@dataclass(frozen=True)
class Config:
    """Hyperparameters. Edit the defaults here, or override any of them: python tokengen.py --lr 1e-3"""

    # -- data --
    dataset: str = "shakespeare"  # that (downloaded), manual (Python's own), or the path of a text file
    data_dir: str = "data"  # where what is downloaded is put
    vocab: int = 0  # tokens of a BPE that is trained on the text; 0: its characters
    lines: bool = False  # each line is a text of its own: windows begin where a line does
    # -- diffusion --
    window: int = 128  # tokens that the model sees at a time
    block: int = 16  # tokens of a block, which divides the window; 1: autoregression
    masks: tuple[float, float] = (0.0, 1.0)  # least and largest share of masked tokens of a block, rounded up
    # -- denoiser --
    width: int = 128  # width of the model
    depth: int = 6  # number of blocks of the transformer
    # -- optimisation --
    max_steps: int = 5000  # optimizer steps
    batch_size: int = 32  # windows of a step, over all processes
    lr: float = 2e-3  # AdamW's learning rate after warm-up
    muon_lr: float = 0.02  # likewise Muon's, which trains the matrices of the blocks
    warmup: int = 200  # steps of linear warm-up
    cooldown: float = 0.2  # share of the steps, the last ones, in which the learning rates fall to 0
    ema_decay: float = 0.999  # upper limit of the EMA's decay; it ramps as (1 + step) / (10 + step)
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the hardware has it
    # -- sampling --
    order: Literal["confident", "margin", "random"] = "confident"  # of unmasking tokens: see `unmask`
    steps: int = 16  # evaluations of the denoiser for each block; at most one for each of its tokens is used
    temperature: float = 0.8  # of the tokens that are drawn; 0 takes the likeliest
    prompt: str = ""  # what a sample begins with
    gap: str | None = None  # character of the prompt that stands for a token to be filled in
    length: int = 400  # tokens of a sample; with lines at most the window
    n: int = 3  # samples
    score_n: int = 1000  # windows of the held-out text in a score, evenly spread
    draws: int = 8  # masks of each of them
    # -- the run --
    out: str = "out/{dataset}"  # folder of the run
    seed: int = 0  # of weights, data order, noise and samples
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda, else mps, else cpu
    log_every: int = 50  # steps between lines of the log
    sample_every: int = 500  # steps between evaluations on 100 held-out windows
    save_every: int = 500  # steps between checkpoints
    resume: bool = False  # go on with the run in the folder
    sample_from: str | None = None  # sample from this checkpoint; no data, no training
    score_from: str | None = None  # score this checkpoint on the held-out text

    kind = "tokengen"  # the script that a checkpoint belongs to (no annotation: not a setting)

    def __post_init__(self):
        check_run(self)
        need(self, "max_steps steps length n score_n draws block", 1)
        need(self, "batch_size", 1, 100_000)
        need(self, "width", 16, 16_384)
        need(self, "depth", 1, 1000)
        need(self, "window", 2, 16_384)
        need(self, "temperature", 0, 100)
        need(self, "cooldown", 0, 1)
        need(self, "muon_lr", 1e-9, 1)
        if self.vocab:
            need(self, "vocab", 300, 100_000)  # bytes alone are 256
        if not 0 <= self.masks[0] < self.masks[1] <= 1:
            raise ValueError(f"masks must be two shares, the smaller first, got {self.masks}")
        if self.width % 16:
            raise ValueError(f"width must be divisible by 16, got {self.width}")
        if self.window % self.block:
            raise ValueError(f"block must divide the window of {self.window}, got {self.block}")
        if self.prompt and not self.sample_from:
            raise ValueError("--prompt is for samples of a checkpoint: add --sample_from out/NAME/last.pt")
        if self.gap is not None and len(self.gap) != 1:
            raise ValueError(f"gap must be a single character, got {self.gap!r}")
        if self.gap is not None and self.gap not in self.prompt:
            raise ValueError(f"there is no gap in the prompt {self.prompt!r}: write {self.gap!r} where it is")


# -- text as ids -------------------------------------------------------------------------------------------


def load_text(dataset: str, data_dir: str) -> str:
    """The text of a data set. Raises UserError where it cannot be had, or is not UTF-8."""
    if dataset == "manual":
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    path = Path(dataset)
    if dataset == "shakespeare":
        path = Path(data_dir) / "shakespeare.txt"
        if not path.exists():
            try:
                with urllib.request.urlopen(SHAKESPEARE, timeout=30) as answer:
                    text = answer.read()
                if not text.startswith(b"First Citizen:"):  # a network's page of its own
                    raise OSError("what came is not Shakespeare")
            except (OSError, http.client.HTTPException) as error:
                raise UserError(f"{SHAKESPEARE} could not be loaded ({reason(error)}); {OFFLINE}") from error
            write_atomic(path, lambda file: file.write(text))
    if not path.is_file():
        raise UserError(f"no text {dataset!r}; choose shakespeare or manual, or give the path of a text file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a text in UTF-8 ({reason(error)}): save it as one") from error


def cut(text: str) -> tuple[str, str]:
    """The first nine tenths of a text, for training, and the held-out rest: nanoGPT's split."""
    n = int(0.9 * len(text))
    return text[:n], text[n:]


def checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def facts_of(cfg: Config, text: str) -> dict:
    """What a checkpoint must know of its text, in plain types."""
    lines = cut(text)[0].splitlines(keepends=True)
    codec = train_codec(lines, cfg.vocab, 0, prefix_space=False) if cfg.vocab else None
    return dict(
        alphabet="".join(sorted(set(text))),
        tokenizer=codec and codec.decoder,
        characters=len(text),
        checksum=checksum(text),
    )


@functools.lru_cache(maxsize=4)
def codec_of(tokenizer: str) -> Codec:
    return Codec(tokenizer, tokenizer, eos=1, max_tokens=0)


def vocabulary(facts: dict) -> int:
    """How many tokens there are."""
    return codec_of(facts["tokenizer"]).vocab if facts["tokenizer"] else len(facts["alphabet"])


def encode(facts: dict, text: str) -> Tensor:
    """Ids (n,) of a text. Raises UserError for characters that are new."""
    if facts["tokenizer"]:
        return torch.tensor(codec_of(facts["tokenizer"]).tokenizers[0].encode(text).ids, dtype=torch.long)
    number = {character: i for i, character in enumerate(facts["alphabet"])}
    if strange := sorted(set(text) - set(number)):
        raise UserError(f"{', '.join(map(repr, strange))} is not among the characters of the training text")
    return torch.tensor([number[character] for character in text], dtype=torch.long)


def decode(facts: dict, ids: list[int]) -> str:
    """The text of ids; HIDDEN for the mask."""
    if not facts["tokenizer"]:
        return "".join((facts["alphabet"] + HIDDEN)[i] for i in ids)
    V, tokenizer, parts = vocabulary(facts), codec_of(facts["tokenizer"]).tokenizers[0], [[]]
    for i in ids:  # between the masks, since a character can have several tokens
        parts += [[i], []] if i == V else []
        parts[-1] += [i] if i != V else []
    return "".join(HIDDEN if part == [V] else tokenizer.decode(part) for part in parts)


def encode_prompt(cfg: Config, facts: dict) -> Tensor:
    """Ids (p,) of the prompt, the mask at its gaps. Raises UserError where it is too long."""
    mask = torch.tensor([vocabulary(facts)])
    pieces = cfg.prompt.split(cfg.gap) if cfg.gap else [cfg.prompt]
    ids = [encode(facts, pieces[0])]
    for piece in pieces[1:]:
        ids += [mask, encode(facts, piece)]
    ids = torch.cat(ids)
    if len(ids) >= cfg.window:
        got = f"the prompt has {len(ids)} tokens"
        raise UserError(f"{got}, but this model sees {cfg.window}: give at most {cfg.window - 1}")
    if len(ids) >= cfg.length and not cfg.gap:
        raise UserError(f"the prompt has {len(ids)} tokens, and so would have the sample: raise --length")
    return ids


def line_ends(facts: dict, ids: Tensor) -> Tensor:
    """Where lines of ids end, (N,)."""
    return (ids == encode(facts, "\n").item()).nonzero()[:, 0]


def begins_of(cfg: Config, facts: dict, ids: Tensor, apart: int = 1) -> Tensor:
    """Where windows of ids begin, (N,): every `apart` tokens, or with cfg.lines behind each end of a line."""
    n = len(ids) - cfg.window + 1
    if not cfg.lines:
        return torch.arange(0, n, apart, device=ids.device)
    begins = line_ends(facts, ids) + 1
    return begins[begins < n]


def held_out_windows(cfg: Config, facts: dict, ids: Tensor, n: int) -> Tensor:
    """At most n windows (n, window) of ids, evenly spread; they do not overlap, but for those of lines."""
    begins = begins_of(cfg, facts, ids, cfg.window)
    spread = torch.linspace(0, len(begins) - 1, min(n, len(begins))).long()
    return ids.unfold(0, cfg.window, 1)[begins[spread]]


# -- the model, and how it writes --------------------------------------------------------------------------


def build(cfg: Config, facts: dict, device: torch.device) -> TokenTransformer:
    """The denoiser of windows in blocks."""
    torch.manual_seed(cfg.seed)
    layout = Layout([0] + [cfg.block] * (cfg.window // cfg.block))
    return TokenTransformer(vocabulary(facts), layout, cfg.width, cfg.depth, rotary=True).to(device)


def load(path, device="auto"):
    """(process, model, facts) of the checkpoint at `path`, with the EMA weights: for use from Python."""
    model, facts, _ = load_model(None, path, pick_device(device))
    return Masked(model.mask_id), model, facts


def load_model(cfg: Config | None, path, device: torch.device) -> tuple[TokenTransformer, dict, float]:
    """The denoiser in a checkpoint, its facts and its training seconds: see `load_averaged`."""
    return load_averaged(Config, Facts, build, cfg, path, device)


@torch.no_grad()
def write(cfg: Config, model: TokenTransformer, prompt: Tensor, length: int):
    """Yield ids (n, L) so far after each step, from prompts (n, p) on: masked where they have a gap.

    Each window after the first begins with the second half of the one before.
    """
    text, W, generator = prompt, model.layout.k, torch.Generator().manual_seed(cfg.seed)
    how = dict(steps=cfg.steps, order=cfg.order, temperature=cfg.temperature, generator=generator)
    nothing, length = prompt[:, :0], max(length, prompt.shape[1])
    while text.shape[1] < length or (text[:, :length] == model.mask_id).any():
        known = text[:, -(W // 2) :] if text.shape[1] >= W else text
        before = text[:, : text.shape[1] - known.shape[1]]
        xt = F.pad(known, (0, W - known.shape[1]), value=model.mask_id)
        with autocast(prompt.device, cfg.precision):
            for _, window in generate(model, nothing, xt, **how):
                text = torch.cat([before, window], dim=1)
                yield text[:, :length]
                if text.shape[1] >= length and (text[:, :length] != model.mask_id).all():
                    return  # the rest of the window is not wanted


def samples(cfg: Config, model: TokenTransformer, prompt: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Ids (n, L) of n samples that begin with a prompt (p,), and the states (L,) of the first on its way."""
    prompt, states = prompt.expand(cfg.n, -1).to(next(model.parameters()).device), []
    length = min(cfg.length, cfg.window) if cfg.lines else cfg.length
    # A prompt with gaps is filled, and not gone on with.
    for ids in write(cfg, model, prompt, prompt.shape[1] if cfg.gap else length):
        states.append(ids[0].cpu())
    return ids, states


def show_samples(cfg: Config, facts: dict, model: TokenTransformer, out: Path) -> None:
    """Print n samples, and the first one as it comes into focus, which is drawn as a moving picture too."""
    ids, states = samples(cfg, model, encode_prompt(cfg, facts))
    lines, focus = [], []
    for i, row in enumerate(ids.tolist()):
        lines += [f"[{i + 1}]", *decode(facts, row).splitlines()]
    show(out, "samples", lines)
    texts = [decode(facts, state.tolist()) for state in states]
    for i in range(5):
        focus += [f"({i + 1})", *texts[round(i * (len(texts) - 1) / 4)].splitlines()]
    show(out, "focus", focus)
    say(f"wrote {draw_film(texts, out / 'samples' / 'focus.gif')}")


def draw_film(texts: list[str], path: Path) -> Path:
    """A text as it is written, in at most 60 frames."""
    import matplotlib

    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSansMono.ttf", 14)
    shown, frames = [], []
    for i in range(60):
        text = texts[round(i * (len(texts) - 1) / 59)]
        shown.append(
            [line[j : j + 90] for line in text.splitlines() for j in range(0, len(line) or 1, 90)][:40]
        )
    lines, width = max(map(len, shown)), max(len(line) for text in shown for line in text)
    for text in shown:
        canvas = Image.new("RGB", (24 + 9 * max(20, width), 24 + 19 * lines), "white")
        ImageDraw.Draw(canvas).multiline_text((12, 10), "\n".join(text), fill="black", font=font, spacing=3)
        frames.append(canvas.convert("P", palette=Image.Palette.ADAPTIVE, colors=16))
    how = dict(save_all=True, append_images=frames[1:], duration=[100] * 59 + [3000], loop=0)
    write_atomic(path, lambda file: frames[0].save(file, format="GIF", **how))
    return path


# -- training ----------------------------------------------------------------------------------------------


def splits(cfg: Config, facts: dict, text: str) -> tuple[Tensor, Tensor, float]:
    """Ids of the first nine tenths, for training, and of the held-out rest, and characters a token of that.

    Raises UserError where one of the two is shorter than two windows, or has fewer than two lines.
    """
    ids, ids_test = (encode(facts, part) for part in cut(text))
    if min(len(ids), len(ids_test)) < 2 * cfg.window:
        got = f"{len(ids)} training and {len(ids_test)} held-out tokens, and two windows are {2 * cfg.window}"
        raise UserError(f"{got}: give more text, or a smaller --window")
    if cfg.lines:
        found = [len(begins_of(cfg, facts, part)) if "\n" in text else 0 for part in (ids, ids_test)]
        if min(found) < 2:
            got = f"{found[0]} lines begin a training window and {found[1]} a held-out one"
            raise UserError(f"{got}, at least 2 are wanted: give more text, or leave out --lines")
    return ids, ids_test, len(cut(text)[1]) / len(ids_test)


def train(cfg: Config, facts: dict, text: str, device, seconds: float = math.inf) -> None:
    """Train until cfg.max_steps, or for so many seconds, with the bound of 100 windows on the way."""
    ids, ids_test, characters = splits(cfg, facts, text)
    model = build(cfg, facts, device)
    layout, process, matrices = model.layout, Masked(model.mask_id), matrices_of(model.body.blocks)
    how = dict(matrices=matrices, cooldown=cfg.cooldown)
    run = Run(cfg, model, device, facts, cfg.out, cfg.max_steps, cfg.batch_size, **how)
    size = f"{len(ids)} training and {len(ids_test)} held-out tokens of {vocabulary(facts)} kinds"
    say(f"{cfg.dataset}: {size}; {millions(model)}; {device}, {run.world} process(es)")
    if cfg.lines and (long := (line_ends(facts, ids).diff() > cfg.window).sum().item()):
        say(f"{long} lines have more than {cfg.window} tokens: their ends are left out; see --window")
    ids = ids.to(device)
    begins, windows = begins_of(cfg, facts, ids), ids.unfold(0, cfg.window, 1)
    test = held_out_windows(cfg, facts, ids_test, 100).to(device)

    def look(step: int) -> None:
        took = run.took()
        with run.pause():
            bits, error = mean_bits(cfg, run.ema.module, test, characters, draws=4)
        note(run, step, took, bits, error)

    for _, batch in run.steps(len(begins), seconds):
        if run.due(cfg.sample_every):
            look(run.step - 1)
        x0 = windows[begins[batch]]
        u = cfg.masks[0] + (cfg.masks[1] - cfg.masks[0]) * stratified(len(x0), len(layout.widths), device)
        hidden = hide(layout, x0, u)
        with autocast(device, cfg.precision):
            loss = process.errors(run.model, x0, hidden, x0[:, : layout.c]).sum() / hidden.sum()
        run.update(loss)
    if run.main:
        look(run.step)
        say(f"trained {run.seconds:.0f} s; wrote {run.curve()}")


def stratified(B: int, n: int, device) -> Tensor:
    """Uniform numbers (B, n) in [0, 1), one in each of B n equal parts: less variance. MDLM C."""
    order = torch.randperm(B * n, device=device)
    return ((order + torch.rand(B * n, device=device)) / (B * n)).clamp(max=1 - 1e-6).view(B, n)


def note(run: Run, step: int, took: float, bits: float, error: float) -> None:
    """Print the bits of a step, after `took` training seconds, and add them to eval.csv."""
    say(f"step {step}, {took:.0f} s: {bits:.3f} +- {error:.3f} bits a character, held out")
    run.keep_rows(run.out / "eval.csv", EVAL, f"{step},{took:.3f},{bits},{error}")


# -- scores ------------------------------------------------------------------------------------------------


def mean_bits(cfg: Config, model, windows: Tensor, characters: float, draws: int) -> tuple[float, float]:
    """Bits a character of windows (N, window), at most, and the standard error.

    characters: of a token, on average.
    """
    generator, draws = torch.Generator().manual_seed(cfg.seed), draws if cfg.block > 1 else 1
    return bits_of(lambda part: bound(model, part[:, :0], part, draws, generator), cfg, windows, characters)


@torch.no_grad()
def bits_of(nats_of, cfg: Config, windows: Tensor, characters: float) -> tuple[float, float]:
    """The mean of nats_of(windows) (N,), in bits a character, and its standard error."""
    nats = []
    for part in windows.split(cfg.batch_size):
        with autocast(part.device, cfg.precision):
            nats.append(nats_of(part))
    bits = torch.cat(nats) / (windows.shape[1] * characters * math.log(2))
    return bits.mean().item(), (bits.std() / math.sqrt(len(bits))).item()


def score(cfg: Config, facts: dict, model, text: str, seconds: float) -> None:
    """Print the bound on the bits a character of held-out windows, and the rates of writing."""
    _, ids, characters = splits(cfg, facts, text)
    device = next(model.parameters()).device
    windows = held_out_windows(cfg, facts, ids, cfg.score_n).to(device)
    bits, error = mean_bits(cfg, model, windows, characters, cfg.draws)
    of = "exactly" if cfg.block == 1 else f"at most, {cfg.draws} masks each"
    say(f"score: n={len(windows)} held-out windows of {cfg.window}, seed {cfg.seed}; {device}")
    say(f"  block {cfg.block}: {bits:.4f} +- {error:.4f} bits a character ({of})")
    fast = [f"{rate(cfg, model, n) * characters:.3g} at batch {n}" for n in (1, 64)]
    say(f"  {millions(model)}, trained {seconds:.0f} s; characters a second: {', '.join(fast)}")


def one_window(cfg: Config, model, n: int) -> Tensor:
    """Ids (n, window) of new texts, as long as a window."""
    cfg, nothing = dataclasses.replace(cfg, n=n, length=cfg.window), torch.zeros(0, dtype=torch.long)
    return samples(cfg, model, nothing)[0]


def rate(cfg: Config, model, n: int) -> float:
    """Tokens a second that are written, n windows at a time."""
    return tokens_a_second(lambda: one_window(cfg, model, n))


def tokens_a_second(write_ids) -> float:
    """Tokens a second that write_ids() gives; the better of two rounds."""
    took = []
    for _ in range(2):
        start = time.perf_counter()
        ids = write_ids()
        took.append(time.perf_counter() - start)
    return ids.numel() / min(took)


def main(cfg: Config) -> None:
    cfg = dataclasses.replace(cfg, out=cfg.out.replace("{dataset}", run_name(cfg.dataset)))
    device, given = pick_device(cfg.device), cfg.sample_from or cfg.score_from
    if cfg.sample_from:
        model, facts, _ = load_model(cfg, Path(given), device)
        if cfg.gap and cfg.block < cfg.window:
            say(f"behind its block of {cfg.block} a gap sees nothing: train with --block {cfg.window}")
        show_samples(cfg, facts, model, Path(cfg.out))
        return
    text = load_text(cfg.dataset, cfg.data_dir)
    path = Path(given or f"{cfg.out}/last.pt")
    if not given:
        train(cfg, facts_of(cfg, text), text, device)
    if not is_main():
        return
    model, trained, seconds = load_model(cfg, path, device)
    if trained["checksum"] != checksum(text):
        raise UserError(f"{cfg.dataset} is not the text that {path} was trained on: choose that")
    if cfg.score_from:
        score(cfg, trained, model, text, seconds)
        return
    show_samples(cfg, trained, model, Path(cfg.out))
    with not_fatal("scored"):
        score(cfg, trained, model, text, seconds)
    say(f'go on with a text: python tokengen.py --sample_from {shlex.quote(str(path))} --prompt "..."')


if __name__ == "__main__":
    run_script(Config, main, __doc__)
