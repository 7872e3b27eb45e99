"""Text by masked diffusion of its characters in blocks: a bound on its likelihood, new text, filled gaps.

    python tokengen.py --dataset manual          Python's own manual: no download
    python tokengen.py                           Tiny Shakespeare; or --dataset book.txt
    python tokengen.py --load out/shakespeare/last.pt --prompt "KING: My ____ is gone" --gap _

Blocks of 1 are autoregression, a block as long as the window is plain masked diffusion. Block diffusion
2503.09573, masked diffusion (MDLM) 2406.07524. The model is in blocks.py.
"""

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from blocks import Layout, TokenTransformer, bound, generate, hide
from common.run import Run, UserError, autocast, load_checkpoint, pick_device, reading, run_script, log, save_text
from common.texts import from_json, to_json, train_tokenizer
from diffusion import Masked

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them on the command line: python tokengen.py --lr 1e-3"""

    # data
    dataset: str = (
        "shakespeare"  # shakespeare (downloaded), manual (Python's own), or the path of a text file
    )
    data_dir: str = "data"  # where downloads are kept
    vocab: int = 0  # tokens of a BPE that is trained on the text; 0: its characters
    lines: bool = False  # each line is a text of its own: windows begin where a line does
    # diffusion
    window: int = 128  # tokens that the model sees at a time
    block: int = 16  # tokens of a block, which divides the window
    # denoiser
    width: int = 128  # width of the transformer
    depth: int = 6  # number of blocks
    # optimisation
    max_steps: int = 5000  # optimizer steps
    batch_size: int = 32  # windows per step, over all processes
    lr: float = 2e-3  # AdamW's learning rate after warm-up
    muon_lr: float = 0.02  # Muon's, which trains the matrices of the transformer
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto is bf16 where the hardware has it
    # sampling
    order: Literal["confident", "random"] = "confident"  # in which tokens are unmasked
    steps: int = 16  # evaluations of the denoiser for each block
    temperature: float = 0.8  # of the tokens that are drawn; 0 takes the likeliest
    prompt: str = ""  # with --load: what a sample begins with
    gap: str | None = None  # character of the prompt that stands for a token to fill in
    length: int = 400  # tokens of a sample; with --lines at most the window
    n: int = 3  # samples
    score_n: int = 1000  # held-out windows of a score; 0 is no score
    # the run
    out: str = "out/{dataset}"  # folder
    seed: int = 0  # of weights, batches, masks and samples
    sample_every: int = 500  # steps between evaluations on 100 held-out windows
    save_every: int = 250  # steps between checkpoints
    resume: bool = False  # continue the run in the folder
    load: str | None = None  # write from this checkpoint, do not train

    script: ClassVar = "tokengen"
    RECIPES: ClassVar = {}


# -- text as ids -----------------------------------------------------------------------------------------


def load_text(dataset: str, data_dir: str) -> tuple[str, str]:
    """The first nine tenths of a text, for training, and the held-out rest: nanoGPT's split."""
    path = Path(data_dir) / "shakespeare.txt" if dataset == "shakespeare" else Path(dataset)
    if dataset == "shakespeare" and not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(SHAKESPEARE, path, progress=False)
        except OSError as error:
            raise UserError(f"{SHAKESPEARE} could not be loaded ({error}): try --dataset manual") from error
    if dataset == "manual":
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
    else:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not a text file in UTF-8 ({error})") from error
    n = int(0.9 * len(text))
    return text[:n], text[n:]


def facts_of(cfg: Config, text: str, text_test: str) -> dict:
    """What a checkpoint must know of its text: the characters, or the BPE."""
    tokenizer = None
    if cfg.vocab:
        tokenizer = to_json(train_tokenizer(text.splitlines(keepends=True), cfg.vocab, prefix_space=False))
    checksum = hashlib.sha256((text + text_test).encode()).hexdigest()[:12]
    return dict(alphabet="".join(sorted(set(text + text_test))), tokenizer=tokenizer, checksum=checksum)


def vocabulary(facts: dict) -> int:
    """The number of tokens; the mask is one more."""
    return len(from_json(*facts["tokenizer"])) if facts["tokenizer"] else len(facts["alphabet"])


def encode(facts: dict, text: str) -> Tensor:
    """Ids (n,) of a text."""
    if facts["tokenizer"]:
        return torch.tensor(from_json(*facts["tokenizer"])(text)["input_ids"], dtype=torch.long)
    number = {character: i for i, character in enumerate(facts["alphabet"])}
    if strange := set(text) - number.keys():
        raise UserError(f"{sorted(strange)} are not among the characters of the training text")
    return torch.tensor([number[character] for character in text], dtype=torch.long)


def decode(facts: dict, ids: Tensor) -> str:
    if facts["tokenizer"]:
        return from_json(*facts["tokenizer"]).decode(ids.tolist())
    return "".join(facts["alphabet"][i] for i in ids.tolist())


def windows_of(cfg: Config, facts: dict, ids: Tensor, stride: int = 1) -> Tensor:
    """Windows (N, window) of ids (L,): every `stride` tokens, or with cfg.lines after each end of a line."""
    windows = ids.unfold(0, cfg.window, 1) if len(ids) >= cfg.window else ids.new_empty(0, cfg.window)
    if cfg.lines:
        begins = (ids == encode(facts, "\n").item()).nonzero()[:, 0] + 1
        windows = windows[begins[begins < len(windows)]]
    else:
        windows = windows[::stride]
    if len(windows) < 2:
        raise UserError(f"{len(ids)} tokens are too few for two windows of {cfg.window}: give more text")
    return windows


# -- the model, and how it writes ------------------------------------------------------------------------


def build(cfg: Config, facts: dict, device: torch.device) -> TokenTransformer:
    """The denoiser of windows in blocks."""
    if cfg.window % cfg.block:
        raise UserError(f"--block {cfg.block} must divide --window {cfg.window}")
    torch.manual_seed(cfg.seed)
    layout = Layout([0] + [cfg.block] * (cfg.window // cfg.block))
    return TokenTransformer(vocabulary(facts), layout, cfg.width, cfg.depth, rope=True).to(device)


def load(path, cfg: Config | None = None) -> tuple[TokenTransformer, dict]:
    """The denoiser (the averaged weights) and the facts of a checkpoint."""
    checkpoint = load_checkpoint(path, Config)
    with reading(path):
        model = build(cfg or Config(**checkpoint["config"]), checkpoint["facts"], pick_device())
        model.load_state_dict(checkpoint["ema"])
    return model.eval(), checkpoint["facts"]


def write(cfg: Config, model: TokenTransformer, prompt: Tensor) -> Tensor:
    """Ids (n, L) of texts that begin with prompts (n, p), which may hold masks, and are cfg.length long.

    Each window after the first begins with the second half of the one before. A prompt with masks is filled.
    """
    W, text, generator = model.layout.k, prompt, torch.Generator().manual_seed(cfg.seed)
    how = dict(steps=cfg.steps, order=cfg.order, temperature=cfg.temperature, generator=generator)
    length = min(cfg.length, W) if cfg.lines else cfg.length
    length = prompt.shape[1] if cfg.gap else max(length, prompt.shape[1])
    while text.shape[1] < length or (text[:, :length] == model.mask_id).any():
        before = text[:, : -(W // 2)] if text.shape[1] >= W else text[:, :0]
        known = text[:, before.shape[1] :]
        xt = F.pad(known, (0, W - known.shape[1]), value=model.mask_id)
        with autocast(prompt.device, cfg.precision):
            for _, window in generate(model, prompt[:, :0], xt, **how):
                text = torch.cat([before, window], dim=1)
                if text.shape[1] >= length and (text[:, :length] != model.mask_id).all():
                    break  # the rest of the window is not wanted
    return text[:, :length]


def samples(cfg: Config, facts: dict, model: TokenTransformer) -> list[str]:
    """cfg.n texts that begin with the prompt."""
    pieces = cfg.prompt.split(cfg.gap) if cfg.gap else [cfg.prompt]
    ids = encode(facts, pieces[0])
    for piece in pieces[1:]:
        ids = torch.cat([ids, torch.tensor([model.mask_id]), encode(facts, piece)])
    if len(ids) >= cfg.window:
        raise UserError(f"the prompt has {len(ids)} tokens, but this model sees {cfg.window}: shorten it")
    prompt = ids.expand(cfg.n, -1).to(next(model.parameters()).device)
    return [f"[{i}]\n{decode(facts, row)}\n" for i, row in enumerate(write(cfg, model, prompt), 1)]


# -- training and score ----------------------------------------------------------------------------------


def stratified(B: int, n: int, device) -> Tensor:
    """Uniform numbers (B, n) in [0, 1), one in each of B n equal parts: less variance. MDLM app. C."""
    order = torch.randperm(B * n, device=device)
    return ((order + torch.rand(B * n, device=device)) / (B * n)).clamp(max=1 - 1e-6).view(B, n)


@torch.no_grad()
def score(cfg: Config, facts: dict, model, text: str, n: int, draws: int = 8) -> str:
    """The bound on the bits per character of n windows of a text, with `draws` masks each."""
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(cfg.seed)
    ids, nats = encode(facts, text).to(device), []
    windows = windows_of(cfg, facts, ids, stride=cfg.window)
    windows = windows[torch.linspace(0, len(windows) - 1, min(n, len(windows))).long()]  # evenly spread
    draws = draws if cfg.block > 1 else 1  # autoregression has one order
    for part in windows.split(cfg.batch_size):
        with autocast(device, cfg.precision):
            nats.append(bound(model, part[:, :0], part, draws, generator))
    characters = len(text) / len(ids)  # per token
    bits = torch.cat(nats) / (cfg.window * characters * math.log(2))
    error = bits.std() / math.sqrt(len(bits))
    kind = "exactly" if cfg.block == 1 else "at most"
    return f"{bits.mean():.4f} +- {error:.4f} bits per character, {kind}, of {len(bits)} held-out windows"


def train(cfg: Config, text: str, text_test: str, device: torch.device) -> None:
    facts = facts_of(cfg, text, text_test)
    model = build(cfg, facts, device)
    layout, process = model.layout, Masked(model.mask_id)
    blocks = model.transformer.blocks.named_parameters()
    run = Run(cfg, model, facts, device, muon=[p for name, p in blocks if p.dim() == 2 and "ada" not in name])
    windows = windows_of(cfg, facts, encode(facts, text).to(device))
    for _, batch in run.steps(len(windows)):
        x0 = windows[batch]
        hidden = hide(layout, x0, stratified(len(x0), len(layout.widths), device))
        with autocast(device, cfg.precision):
            loss = process.errors(run.model, x0, hidden, x0[:, : layout.c]).sum() / hidden.sum()
        run.update(loss)
        if run.due(cfg.sample_every):
            log("  " + score(cfg, facts, run.ema, text_test, 100, draws=4))
    if run.due(1):  # once, in the main process
        save_text(samples(cfg, facts, run.ema), run.out / "samples/samples.txt")
        if cfg.score_n:
            log(score(cfg, facts, run.ema, text_test, cfg.score_n))
        log(f'continue a text: python tokengen.py --load {run.out / "last.pt"} --prompt "..."')


def main(cfg: Config) -> None:
    if cfg.load:
        model, facts = load(cfg.load, cfg)
        save_text(samples(cfg, facts, model), Path(cfg.load).parent / f"samples/seed{cfg.seed}.txt")
    if not cfg.load or cfg.score_n:
        text, text_test = load_text(cfg.dataset, cfg.data_dir)
    if not cfg.load:
        out = cfg.out.replace("{dataset}", Path(cfg.dataset).stem)
        return train(replace(cfg, out=out), text, text_test, pick_device())
    if cfg.score_n:
        if facts_of(cfg, text, text_test) != facts:
            raise UserError(
                f"{cfg.load} was not trained on {cfg.dataset}: it may have seen its held-out part"
            )
        log(score(cfg, facts, model, text_test, cfg.score_n))


if __name__ == "__main__":
    run_script(Config, main, __doc__)
