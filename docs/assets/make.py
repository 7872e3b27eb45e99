"""Draws the README's pictures from finished runs of its commands.

python assets/make.py               from out/{fashionmnist,grammar,mult,sudoku,shakespeare,bench}
"""

import shutil
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parent.parent))

import imagen  # noqa: E402
import reason  # noqa: E402
import textgen  # noqa: E402
from diffusion import trajectory  # noqa: E402
from files import load_checkpoint  # noqa: E402
from training import run_script  # noqa: E402

FRAMES = 32  # of the moving picture, all of it on one clock


@dataclass(frozen=True)
class Config:
    """Where the runs are, and where the pictures go."""

    runs: str = "out"  # folder of the runs
    out: str = str(Path(__file__).parent)  # folder of the pictures

    kind = "assets"


def evenly(frames: list) -> list:
    """FRAMES of them, or fewer repeated, from the first to the last."""
    return [frames[round(i * (len(frames) - 1) / (FRAMES - 1))] for i in range(FRAMES)]


def images(path: Path) -> list[torch.Tensor]:
    """xt (10, C, H, W) uint8 in every frame, one image of each class."""
    process, model, facts = imagen.load(path, "cpu")
    y, how = torch.arange(10), dict(sampler="ddim", steps=FRAMES, clip=1.0)
    generator = torch.Generator().manual_seed(1)
    steps = trajectory(process, model, (10, *facts["shape"]), y, generator=generator, **how)
    return evenly([imagen.to_uint8(xt) for _, xt, _ in steps])


def review(path: Path, rating: int = 5) -> list[str]:
    """The text that the decoder writes from xt in every frame."""
    writer, y = textgen.load(path, "cpu"), torch.tensor([rating - 1])
    cfg = writer.cfg
    how = dict(sampler=cfg.sampler, steps=cfg.steps, guidance=cfg.guidance)
    generator = torch.Generator().manual_seed(0)
    steps = trajectory(writer.process, writer.model, (1, cfg.k, cfg.d), y, generator=generator, **how)
    return writer.write(torch.cat(evenly([xt for _, xt, _ in steps])))


def chain(path: Path, question: str = "3 3 7 * 2 4") -> list[str]:
    """The chain of thoughts in every frame, a "_" for every token that is still masked."""
    _, model, facts = reason.load(path, "cpu")
    cfg = reason.Config(**load_checkpoint(path, "reason")["config"])
    lines = reason.focus(cfg, facts, model, question)[1:-1]
    return evenly([line.split("  ", 1)[1] for line in lines])


def frame(x: torch.Tensor, text: str, thoughts: str) -> Image.Image:
    """Images in a row, the review below, then the chain."""
    canvas = Image.new("RGB", (760, 206), "white")
    for i, image in enumerate(x):
        picture = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).numpy())
        canvas.paste(picture.resize((70, 70), Image.Resampling.BICUBIC), (8 + 75 * i, 8))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    draw.multiline_text((8, 90), textwrap.fill(text, 98), fill="black", font=font, spacing=5)
    draw.text((8, 178), f"733 x 42:  {thoughts}", fill="black", font=font)
    return canvas.convert("P", palette=Image.Palette.ADAPTIVE, colors=64)


def main(cfg: Config) -> None:
    runs, out = Path(cfg.runs), Path(cfg.out)
    shown = images(runs / "fashionmnist/last.pt")
    written = review(runs / "grammar/diffusion/last.pt")
    thought = chain(runs / "mult/last.pt")
    frames = [frame(*parts) for parts in zip(shown, written, thought, strict=True)]
    hold = [120] * (FRAMES - 1) + [3000]  # milliseconds
    frames[0].save(out / "forming.gif", save_all=True, append_images=frames[1:], duration=hold, loop=0)
    shutil.copy(runs / "fashionmnist/samples/grid.png", out / "fashionmnist.png")
    shutil.copy(runs / "bench/images/quality.png", out / "quality.png")
    shutil.copy(runs / "sudoku/samples/focus.png", out / "sudoku.png")
    shutil.copy(runs / "bench/mult/correct.png", out / "again.png")
    shutil.copy(runs / "bench/sudoku/correct.png", out / "tries.png")
    shutil.copy(runs / "bench/mult/curves.png", out / "reason.png")
    shutil.copy(runs / "shakespeare/samples/focus.gif", out / "writing.gif")
    shutil.copy(runs / "bench/shakespeare/curves.png", out / "tokens.png")
    print("wrote", ", ".join(str(path) for path in sorted(out.glob("*.[gp][in][fg]"))))


if __name__ == "__main__":
    run_script(Config, main, __doc__)
