"""tokengen.py in blocks of several widths beside a GPT, and beside textgen.py's reviews.

python -m bench.tokens                  bits a character and characters a second after the same seconds
python -m bench.tokens --planner out/grammar/diffusion/last.pt --run.vocab 4096 --run.window 48 --run.block 4
                                        reviews, in a quarter of the seconds of textgen.py

The GPT is a GPT-NeoX of the library transformers: as wide and as deep, with rotary positions too; it is
trained on the same windows and writes with its cache.
"""

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import bench.text
import textgen
import tokengen
from bench.reason import FOREVER, read_eval, seconds_of
from files import UserError, figure, load_checkpoint, load_weights, say, show
from training import (
    Run,
    autocast,
    matrices_of,
    millions,
    need,
    pick_device,
    run_name,
    run_script,
)


@dataclass(frozen=True)
class Config:
    """Settings of a comparison."""

    dataset: str = "shakespeare"  # that of tokengen.py
    seconds: float = 600.0  # training seconds of each
    blocks: tuple[int, ...] = (1, 4, 16, 128)  # widths of the blocks of ours
    gpt: bool = True  # whether a GPT stands beside them
    planner: str | None = None  # a diffusion of textgen.py: compare reviews with it instead
    share: float = 0.25  # planner: of its training seconds, in which ours are trained
    out: str = "out/bench/{dataset}"  # folder of all runs; one that is finished there is loaded
    run: tokengen.Config = field(default_factory=tokengen.Config)

    @staticmethod
    def recipe(given) -> dict:
        """The defaults that a data set has in place of those above."""
        return dict(run=tokengen.Config(dataset=given.dataset))

    def __post_init__(self):
        need(self, "seconds share", 0.01)


def in_folder(cfg: Config, name: str, block: int) -> tokengen.Config:
    """The settings of the run of that name; where it has begun, it is gone on with."""
    folder = Path(cfg.out) / name
    return dataclasses.replace(
        cfg.run, dataset=cfg.dataset, block=block, out=str(folder), resume=(folder / "last.pt").exists()
    )


# -- the GPT -----------------------------------------------------------------------------------------------


class WindowGPT(nn.Module):
    """A GPT with rotary positions, as wide and as deep as ours, that writes windows; id V begins them."""

    def __init__(self, V: int, run: tokengen.Config, device):
        super().__init__()
        self.V, D = V, run.width
        shape = dict(
            hidden_size=D, intermediate_size=4 * D, num_hidden_layers=run.depth, num_attention_heads=4
        )
        # What is like GPT-2 and our own: all of a head is turned, the MLP comes after the attention.
        like = dict(rotary_pct=1.0, use_parallel_residual=False, hidden_act="gelu", tie_word_embeddings=False)
        ends = dict(bos_token_id=V, eos_token_id=None, pad_token_id=None)
        how = "sdpa" if device.type == "cuda" else "eager"
        longest = run.window + 1
        config = GPTNeoXConfig(
            vocab_size=V + 1,
            max_position_embeddings=longest,
            attn_implementation=how,
            **shape,
            **like,
            **ends,
        )
        self.gpt = GPTNeoXForCausalLM(config)

    def forward(self, x0: Tensor) -> Tensor:
        """Nats (B, W) of each token of windows x0 (B, W)."""
        begin = torch.full_like(x0[:, :1], self.V)
        logits = self.gpt(torch.cat([begin, x0[:, :-1]], dim=1)).logits.float()
        return nn.functional.cross_entropy(logits.movedim(-1, 1), x0, reduction="none")

    @torch.no_grad()
    def write(self, n: int, length: int, temperature: float, prompt=()) -> Tensor:
        """Ids (n, length) of texts that begin with the ids of a prompt, by transformers' cached sampling."""
        begin = torch.tensor([[self.V, *prompt]], device=self.gpt.device).expand(n, -1)
        new = length - len(prompt)
        how = dict(do_sample=temperature > 0, temperature=temperature or None, top_k=0, min_new_tokens=new)
        how |= dict(max_new_tokens=new, attention_mask=torch.ones_like(begin))
        return self.gpt.generate(begin, **how)[:, 1:]


def train_gpt(run: tokengen.Config, facts: dict, text: str, device, seconds: float) -> WindowGPT:
    """The GPT in run.out, trained for so many seconds, or loaded where it has been."""
    torch.manual_seed(run.seed)
    model = WindowGPT(tokengen.vocabulary(facts), run, device).to(device)
    if seconds_of(run, facts) >= seconds:
        load_weights(model, load_checkpoint(f"{run.out}/last.pt", run.kind)["ema"], run.out)
        return model.eval()
    ids, ids_test, characters = tokengen.splits(run, facts, text)
    ids = ids.to(device)
    begins, windows = tokengen.begins_of(run, facts, ids), ids.unfold(0, run.window, 1)
    test = tokengen.held_out_windows(run, facts, ids_test, 100).to(device)
    matrices = matrices_of(model.gpt.gpt_neox.layers)
    loop = Run(
        run, model, device, facts, run.out, FOREVER, run.batch_size, matrices=matrices, cooldown=run.cooldown
    )
    say(f"{run.out}: {millions(model)}")

    def look(step: int) -> None:
        took = loop.took()
        with loop.pause():
            tokengen.note(loop, step, took, *gpt_bits(run, loop.ema.module, test, characters))

    for _, batch in loop.steps(len(begins), seconds):
        if loop.due(run.sample_every):
            look(loop.step - 1)
        with autocast(device, run.precision):
            loss = loop.model(windows[begins[batch]]).mean()
        loop.update(loss)
    look(loop.step)
    return loop.ema.module.eval()


def gpt_bits(run: tokengen.Config, model: WindowGPT, windows: Tensor, characters: float):
    """Bits a character of windows (N, W), and the standard error."""
    return tokengen.bits_of(lambda part: model(part).sum(1), run, windows, characters)


def gpt_window(run: tokengen.Config, model: WindowGPT, n: int, prompt=()) -> Tensor:
    """Ids (n, window) of new texts, as long as a window, that begin with the ids of a prompt."""
    with autocast(model.gpt.device, run.precision):
        return model.write(n, run.window, run.temperature, prompt)


# -- bits a character --------------------------------------------------------------------------------------


def compare(cfg: Config, device) -> None:
    """Train all, print the table and a sample of each, draw the curves."""
    if any(block < 1 or cfg.run.window % block for block in cfg.blocks):
        raise UserError(f"blocks {cfg.blocks} must divide the window of {cfg.run.window}")
    cfg = dataclasses.replace(cfg, out=cfg.out.replace("{dataset}", run_name(cfg.dataset)))
    text = tokengen.load_text(cfg.dataset, cfg.run.data_dir)
    facts = tokengen.facts_of(cfg.run, text)
    _, ids_test, characters = tokengen.splits(cfg.run, facts, text)
    windows = tokengen.held_out_windows(cfg.run, facts, ids_test, cfg.run.score_n).to(device)
    rows, written, logs = [], [], {}
    if cfg.gpt:
        run = in_folder(cfg, "gpt", 1)
        model = train_gpt(run, facts, text, device, cfg.seconds)
        bits = gpt_bits(run, model, windows, characters)
        rates = []
        for n in (1, 64):
            fast = tokengen.tokens_a_second(functools.partial(gpt_window, run, model, n))
            rates.append(fast * characters)
        logs["GPT"] = read_eval(Path(run.out), "bits")
        rows.append(("GPT", model, "-", bits, rates))
        ids = gpt_window(run, model, 1)[0]
        written += ["[GPT]", *tokengen.decode(facts, ids.tolist()).splitlines()]
    for block in cfg.blocks:
        run = in_folder(cfg, f"block{block}", block)
        if seconds_of(run, facts) < cfg.seconds:
            tokengen.train(dataclasses.replace(run, max_steps=FOREVER), facts, text, device, cfg.seconds)
        model = tokengen.load_model(run, Path(run.out) / "last.pt", device)[0]
        bits, name = tokengen.mean_bits(run, model, windows, characters, run.draws), f"blocks of {block}"
        logs[name] = read_eval(Path(run.out), "bits")
        for steps in sorted({min(4, block), min(run.steps, block)}):
            fast = dataclasses.replace(run, steps=steps)
            rates = [tokengen.rate(fast, model, n) * characters for n in (1, 64)]
            rows.append((name, model, steps, bits, rates))
        ids = tokengen.one_window(run, model, 1)[0]
        written += [f"[{name}]", *tokengen.decode(facts, ids.tolist()).splitlines()]
    print(f"\n{cfg.seconds:g} s of training or more, n={len(windows)} held-out windows of {cfg.run.window}")
    head = "M parameters | training steps | bits a character | steps a block | characters/s at 1 | at 64"
    print(f"| | {head} |", "|---" * 7 + "|", sep="\n")
    for name, model, steps, (bits, error), rates in rows:
        trained = f"{logs[name][-1][0]:.0f}"
        cells = [name, f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}", trained]
        cells += [f"{bits:.3f} +- {error:.3f}", str(steps), *(f"{rate:.3g}" for rate in rates)]
        print(f"| {' | '.join(cells)} |")
    show(cfg.out, "samples", written)
    path = Path(cfg.out) / "curves.png"
    with figure(path, (7, 4)) as (_, ax):
        for name, log in logs.items():
            _, seconds, bits = zip(*log, strict=True)
            ax.plot(seconds, bits, "--" if name == "GPT" else "-", label=name)
        ax.set(xlabel="training seconds", ylabel="bits a character, held out (at most)")
        ax.legend()
    print("wrote", path)


# -- reviews -----------------------------------------------------------------------------------------------


def reviews(cfg: Config, device) -> None:
    """Print the score of textgen.py's reviews and of ours, which are trained on nine tenths of its reviews.

    Ours are lines of a text, "5 the room was ...", and are asked for by their first word.
    """
    writer, train, test = bench.text.read_writer(cfg.planner, device)
    out = cfg.out.replace("{dataset}", f"reviews-{run_name(writer.cfg.dataset)}")
    lines_of_one_window = dataclasses.replace(cfg.run, lines=True, length=cfg.run.window)
    cfg = dataclasses.replace(cfg, dataset="reviews", out=out, run=lines_of_one_window)
    lines = []
    for row, y in zip(writer.codec.decode(train.target), train.y.tolist(), strict=True):
        lines.append(f"{y + 1} {' '.join(row.split())}\n")
    text, seconds = "".join(lines), cfg.share * writer.seconds
    run = in_folder(cfg, "reviews", cfg.run.block)
    facts = tokengen.facts_of(run, text)
    if seconds_of(run, facts) < seconds:
        tokengen.train(dataclasses.replace(run, max_steps=FOREVER), facts, text, device, seconds)
    model, _, took = tokengen.load_model(run, Path(run.out) / "last.pt", device)
    rows = textgen.new_and_real(writer, train, test)
    y = rows["samples"][1]
    for steps in sorted({1, 2, 4, 8, 16, run.block}):
        if steps <= run.block:
            written = ask(dataclasses.replace(run, steps=steps), facts, model, y)
            rows[f"tokens, {steps} steps a block"] = (written, y)
    if cfg.gpt:
        gpt = in_folder(cfg, "gpt", 1)
        rows["GPT"] = (ask(gpt, facts, train_gpt(gpt, facts, text, device, seconds), y), y)
    scores = textgen.score_rows(writer.cfg, rows, train, test)
    if writer.cfg.dataset != "grammar":  # which has a check of its own
        judge = bench.text.train_gpt(writer, train, test, Path(cfg.planner).parent, "judge")
        for name, (new, _) in rows.items():
            scores[name]["perplexity"] = bench.text.judged(writer, judge, new)
    print(
        f"\nn={len(y)}; textgen.py trained {writer.seconds:.0f} s, tokens {took:.0f} s, blocks of {run.block}"
    )
    bench.text.print_scores(scores)
    shown = [f"[{label + 1}] {row}" for row, label in zip(written, y.tolist(), strict=True)]
    show(cfg.out, "reviews", shown[:20])


def ask(run: tokengen.Config, facts: dict, model, y: Tensor) -> list[str]:
    """A review of each rating y (n,), 0 the lowest, by ours or by the GPT."""
    found: list[str] = [""] * len(y)
    for rating in sorted(set(y.tolist())):
        places = [i for i, label in enumerate(y.tolist()) if label == rating]
        prompt, n = tokengen.encode(facts, f"{rating + 1}"), len(places)
        if isinstance(model, WindowGPT):
            ids = gpt_window(run, model, n, prompt.tolist())
        else:
            ids = tokengen.samples(dataclasses.replace(run, n=n), model, prompt)[0]
        for place, row in zip(places, ids.tolist(), strict=True):
            found[place] = tokengen.decode(facts, row).partition("\n")[0].partition(" ")[2].strip()
    return found


def main(cfg: Config) -> None:
    device = pick_device(cfg.run.device)
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    reviews(cfg, device) if cfg.planner else compare(cfg, device)


if __name__ == "__main__":
    run_script(Config, main, __doc__)
