"""The commands of the pages parse, those of the README run at a tiny size, and what they name exists."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial

import pytest
import tyro
from conftest import ROOT
from test_textgen import save_pretrained

import imagen

README, RESULTS, NOTES = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/results.md", "docs/notes.md")
)
PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
TINY = "--width 32 --depth 1 "
SIZE = dict(
    imagen=TINY + "--channels 8 16 --blocks 1 1 --batch_size 16 --max_steps 2 --score_n 40",
    textgen=TINY
    + "--max_tokens 48 --k 4 --span 12 --latent_width 8 --vae_width 32 --vae_depth 1 --vocab 400 "
    "--vae_steps 2 --vae_batch 16 --diffusion_steps 2 --diffusion_batch 16 --score_n 8 --steps 4",
    reason=TINY + "--batch_size 16 --max_steps 2 --train_n 300 --steps 2 --score_n 8",
    tokengen=TINY + "--batch_size 8 --max_steps 2 --score_n 4 --length 64",
)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.S)


def commands(page: str) -> list[list[str]]:
    """The words of each command in a page's bash blocks."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def inline_commands(page: str) -> list[list[str]]:
    """The words of each command on our scripts inside a line of text or a table."""
    return [shlex.split(code) for code in re.findall(r"`(python [^`\n]+)`", page)]


def split(words: list[str]) -> tuple[str, list[str]]:
    """The module that a command runs, and its flags."""
    i = next(i for i, word in enumerate(words) if word.endswith(".py") or word.startswith("bench."))
    return words[i].removesuffix(".py").replace("/", "."), words[i + 1 :]


ALL = [words for page in (README, RESULTS) for words in commands(page) + inline_commands(page)]


@pytest.mark.parametrize(
    "words", [words for words in ALL if words[0] in ("python", "torchrun")], ids=" ".join
)
def test_every_command_parses(words):
    module, flags = split(words)
    Config = importlib.import_module(module).Config
    parse = partial(tyro.cli, Config, args=flags, use_underscores=True)
    cfg = parse()
    if not getattr(cfg, "load", None) and hasattr(Config, "RECIPES"):
        parse(default=Config(**Config.RECIPES.get(cfg.dataset, {})))


def test_install_and_test_commands_are_those_of_ci():
    ci = (ROOT / ".ci/run").read_text()
    for words in commands(README):
        if words[0] in ("pip", "pytest"):
            assert words[0] == "pytest" or (ROOT / words[-1]).is_file()
            if "requirements.txt" not in words:
                assert re.search(rf"^{' '.join(words)}( |$)", ci, re.M), words


def test_quoted_code_stands_in_the_code():
    quoted = [block for block in blocks(README, "python") if not block.startswith("import")]
    source = (ROOT / "diffusion.py").read_text()
    assert quoted
    for part in "".join(quoted).strip("\n").split("\n\n\n"):
        indented = re.sub(r"^(?=.)", "    ", part, flags=re.M)
        assert part in source or indented in source, part


def test_files_and_pictures_exist():
    for folder, page in ((ROOT, README), (ROOT / "docs", RESULTS), (ROOT / "docs", NOTES)):
        links = re.findall(r"\]\((?!https?:)([^)#]+)", page)
        assert all((folder / link).exists() for link in links), links
    names = re.findall(r"`([\w/]+(?:\.py|/))`", README)
    assert names and all((ROOT / name).exists() for name in names), names
    assert {path.name for path in ROOT.glob("*.py")} <= set(names)


# -- running them ----------------------------------------------------------------------------------------


def write_data(folder):
    """What a reader of the page has of their own: photos, reviews, texts and problems."""
    from PIL import Image

    for i in range(48):
        path = folder / f"photos/{'cat' if i % 2 else 'dog'}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 36), (5 * i, 80, 120)).save(path)
    rows = [f"we slept well in room number {i}.,{i % 5 + 1},a room of {i}" for i in range(60)]
    (folder / "reviews.csv").write_text("\n".join(["review,stars,title", *rows]))
    (folder / "book.txt").write_text("".join(f"It was the best of {i} times, said he.\n" for i in range(400)))
    (folder / "poems.txt").write_text("".join(f"a rose is a rose, {i}\n" for i in range(400)))
    problems = [
        dict(
            question=f"Tom has {i} and gets {i + 1}.", answer=f"<<{i}+{i + 1}={2 * i + 1}>> #### {2 * i + 1}"
        )
        for i in range(40)
    ]
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, problems)))
    (folder / "puzzles.csv").write_text(f"question,rating\n{PUZZLE},0\n")
    (folder / "valid.txt").write_text("5 6 3 2 * 7 4 3 4||5 5 5 6 1 + 0 0 6 4 9 0 #### 5 5 6 0 8 2 0 1\n" * 9)


def small(script: str, flags: list[str], folder) -> list[str]:
    """Flags that make a command small and keep it off the network."""
    if "--load" in flags:
        return []
    parts = ["--pairs", "32"] if "--distill" in flags else []
    if "base" in flags:
        parts = ["--encoder", save_pretrained(folder, "bert"), "--decoder", save_pretrained(folder, "gpt2")]
    return [*SIZE[script].split(), *map(str, parts)]


@pytest.mark.slow
def test_every_command_of_the_readme_runs(tmp_path, fake_fashionmnist, cli, monkeypatch):
    """In order, in one folder: later commands load what earlier ones trained."""
    write_data(tmp_path)
    shutil.copytree(fake_fashionmnist, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(imagen, "load_classifier", partial(imagen.load_classifier, steps=2))
    for words in commands(README):
        if words[0] in ("python", "torchrun"):
            script, flags = split(words)
            flags = ["problems.jsonl" if flag == "gsm8k" else flag for flag in flags]
            flags += small(script, flags, tmp_path)
            if words[0] == "python":
                status, printed = cli(script, *flags)
            else:
                options = [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    *words[1 : words.index(f"{script}.py")],
                ]
                env = os.environ | dict(OMP_NUM_THREADS="1")
                flags = [ROOT / f"{script}.py", *flags, "--score_n", "0"]
                done = subprocess.run([*options, *flags], capture_output=True, env=env)
                status, printed = done.returncode, done.stderr.decode()
            assert status == 0, f"{' '.join(words)}\n{printed}"
    for block in blocks(README, "python"):
        if block.startswith("import"):
            exec(block, {})
