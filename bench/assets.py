"""Draws the pictures of README.md and docs/results.md from finished runs of their commands.

python -m bench.assets      from out/{fashionmnist,grammar,mult,sudoku,shakespeare,bench}
"""

import shutil
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont

import imagen
import reason
import textgen
import tokengen
from bench.runs import run_bench, saved_by
from common.pictures import picture, save_picture
from common.run import log
from diffusion import trajectory
from tasks.problems import decode
from tasks.sudoku import check

FRAMES = 32  # of forming.gif, all of it on one clock
HARD = "................12..3..4...............15.6..27...8........7.......63.4.15.....9."  # 17 clues
COPIES = {  # pictures that a run or a comparison has drawn
    "fashionmnist.png": "fashionmnist/samples/grid.png",
    "quality.png": "bench/images/quality.png",
    "reason.png": "bench/mult/curves.png",
    "tries.png": "bench/sudoku/tries.png",
    "loops.png": "bench/sudoku/loops.png",
    "tokens.png": "bench/shakespeare/curves.png",
}


@dataclass(frozen=True)
class Config:
    """Where the runs are, and where the pictures go."""

    runs: str = "out"  # folder of the runs
    out: str = "docs/assets"  # folder of the pictures


def evenly(states: list, n: int = FRAMES) -> list:
    """n of the states, from the first to the last."""
    return [states[round(i * (len(states) - 1) / (n - 1))] for i in range(n)]


def images(path: Path) -> list[torch.Tensor]:
    """xt (10, C, H, W) uint8 in every frame, an image of each class."""
    process, model, facts = imagen.load(path, "cpu")
    how = imagen.sampling(imagen.Config(sampler="ddim", steps=FRAMES, seed=1))
    states = trajectory(process, model, (10, *facts["shape"]), torch.arange(10), **how)
    return evenly([imagen.to_uint8(xt) for _, xt, _ in states])


def one_step(teacher: Path, student: Path) -> Image.Image:
    """What a teacher and its student make of the same noise, two images of each class."""
    rows = []
    for path in (teacher, student):
        cfg = imagen.Config(**saved_by(imagen.Config, path)["config"])
        process, model, facts = imagen.load(path, "cpu")
        rows.append(imagen.draw(cfg, process, model, facts["shape"], torch.arange(10).repeat(2)))
    return picture(["10 evaluations", "1 evaluation"], torch.stack(rows))


def review(path: Path) -> list[str]:
    """The text that the decoder writes from xt in every frame, of the best rating."""
    writer, y = textgen.load(path, "cpu"), torch.tensor([4])
    cfg = writer.cfg
    how = dict(sampler=cfg.sampler, steps=cfg.steps, generator=torch.Generator().manual_seed(0))
    shape, how = (1, cfg.k, cfg.latent_width), how | dict(guidance=cfg.guidance)
    steps = trajectory(writer.process, writer.model, shape, y, **how)
    return writer.write(torch.cat(evenly([xt for _, xt, _ in steps])))


def thinking(path: Path, question: str) -> list[str]:
    """The thoughts of a question's answer at every step, "_" where masked."""
    _, model, facts = reason.load(path, "cpu")
    cfg = reason.Config(**saved_by(reason.Config, path)["config"])
    states = reason.think(cfg, model, reason.ask(facts, [question]))
    return [" | ".join(decode(facts, xt)[0]) for xt in states]


def forming(runs: Path) -> list[Image.Image]:
    """Images in a row, the review below, then the chain of a multiplication."""
    font, frames = ImageFont.load_default(15), []
    chain = evenly(thinking(runs / "mult/last.pt", "337*24"))
    shown, written = images(runs / "fashionmnist/last.pt"), review(runs / "grammar/diffusion/last.pt")
    for x, text, thoughts in zip(shown, written, chain, strict=True):
        canvas = Image.new("RGB", (760, 206), "white")
        for i, image in enumerate(x):
            photo = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).numpy())
            canvas.paste(photo.resize((70, 70), Image.Resampling.BICUBIC), (8 + 75 * i, 8))
        draw = ImageDraw.Draw(canvas)
        draw.multiline_text((8, 90), textwrap.fill(text, 98), fill="black", font=font, spacing=5)
        draw.text((8, 178), f"733 x 42:  {thoughts}", fill="black", font=font)
        frames.append(canvas.convert("P", palette=Image.Palette.ADAPTIVE, colors=64))
    return frames


def writing(path: Path) -> list[Image.Image]:
    """A text as it is written, block by block."""
    _, model, facts = tokengen.load(path, "cpu")
    cfg = tokengen.Config(**saved_by(tokengen.Config, path)["config"])
    cfg = replace(cfg, prompt="JULIET: ", length=300)
    states = [ids[0] for ids in tokengen.write(cfg, model, tokengen.encode_prompt(cfg, facts)[None])]
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSansMono.ttf", 14)
    pages = []
    for ids in evenly(states, 60):
        lines = tokengen.decode(facts, ids).split("\n")
        pages.append([line[i : i + 90] for line in lines for i in range(0, len(line) or 1, 90)])
    height, frames = max(map(len, pages)), []
    for lines in pages:
        canvas = Image.new("RGB", (834, 24 + 19 * height), "white")
        ImageDraw.Draw(canvas).multiline_text((12, 10), "\n".join(lines), fill="black", font=font, spacing=3)
        frames.append(canvas.convert("P", palette=Image.Palette.ADAPTIVE, colors=16))
    return frames


def grid(puzzle: str, xt: torch.Tensor, p: torch.Tensor, caption: str) -> Image.Image:
    """A puzzle with cells xt (81,), where open its likeliest digits by p (81, V): the bluer, the surer."""
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 20)
    canvas = Image.new("RGB", (310, 334), "white")
    draw = ImageDraw.Draw(canvas)
    for cell, (sure, guess) in enumerate(zip(*(x.tolist() for x in p.max(-1)), strict=True)):
        place, grey = (20 + 34 * (cell % 9), 20 + 34 * (cell // 9)), 0 if puzzle[cell] != "." else 110
        known = xt[cell] != p.shape[-1]  # the mask's id
        colour = (grey, grey, grey) if known else (*[round(255 - 225 * sure**2)] * 2, 255)
        draw.text(place, str(xt[cell].item() if known else guess), colour, font, anchor="mm")
    for k in range(10):
        colour, at = "black" if k % 3 == 0 else "lightgrey", 3 + 34 * k
        draw.line((at, 3, at, 309), colour)
        draw.line((3, at, 309, at), colour)
    draw.text((6, 321), caption, "black", font.font_variant(size=13), anchor="lm")
    return canvas.convert("P", palette=Image.Palette.ADAPTIVE, colors=64)


@torch.no_grad()
def looping(path: Path, puzzle: str, steps: int = 6) -> list[Image.Image]:
    """A puzzle in every loop of every evaluation, then what became of it."""
    _, model, facts = reason.load(path, "cpu")
    cfg = replace(reason.Config(**saved_by(reason.Config, path)["config"]), steps=steps)
    *states, last = reason.think(cfg, model, reason.ask(facts, [puzzle]))
    frames, model = [], model.train()  # which returns the logits of all loops
    for i, xt in enumerate(states, 1):
        loops = model(xt, None, xt[:, :0])[:, 0].softmax(-1)  # (loops, 81, V)
        for loop, p in enumerate(loops, 1):
            frames.append(grid(puzzle, xt[0], p, f"evaluation {i} of {steps}, loop {loop}"))
    solved = check(puzzle, decode(facts, last)[0])
    return [*frames, grid(puzzle, last[0], p, "solved" if solved else "not solved")]


def save_gif(frames: list[Image.Image], milliseconds: int, path: Path) -> None:
    times = [milliseconds] * (len(frames) - 1) + [3000]
    save_picture(frames[0], path, save_all=True, append_images=frames[1:], duration=times, loop=0)


def main(cfg: Config) -> None:
    runs, out = Path(cfg.runs), Path(cfg.out)
    save_gif(forming(runs), 120, out / "forming.gif")
    save_gif(writing(runs / "shakespeare/last.pt"), 100, out / "writing.gif")
    teacher, student = runs / "fashionmnist/last.pt", runs / "fashionmnist-distilled/last.pt"
    save_picture(one_step(teacher, student), out / "one_step.png")
    save_gif(looping(runs / "sudoku/last.pt", HARD), 150, out / "loops.gif")
    for name, source in COPIES.items():
        shutil.copy(runs / source, out / name)
    drawn = [*COPIES, "forming.gif", "writing.gif", "one_step.png", "loops.gif"]
    log(f"wrote {', '.join(sorted(drawn))} to {out}")


if __name__ == "__main__":
    run_bench(Config, main, __doc__)
