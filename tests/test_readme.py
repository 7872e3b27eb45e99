"""Every command of README.md and RESULTS.md runs, at a tiny size; and what they say of files holds."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL_REASON, SMALL_TEXT, TINY

PAGES = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "RESULTS.md"))
SIZE = {
    "imagen.py": [*TINY, "--max_steps", "2", "--score_n", "40"],
    "textgen.py": [*SMALL_TEXT, "--vae_steps", "2", "--diffusion_steps", "2", "--score_n", "8"],
    "reason.py": [*SMALL_REASON, "--max_steps", "2", "--score_n", "8"],
    "tokengen.py": "--width 32 --depth 1 --batch_size 8 --max_steps 2 --score_n 4 --length 64".split(),
    "bench.images": "--dataset digits --rounds 1 --round_steps 1 --seconds 0.2 --score_n 40".split(),
    "bench.text": "--rounds 1 --round_steps 1".split(),
    "bench.tokens": "--seconds 0.2 --run.width 32 --run.depth 1 --run.batch_size 4 --run.score_n 4".split(),
    "bench.reason": "--seconds 0.2 --run.digits 2 1 --run.batch_size 8 --run.score_n 8".split(),
}


def commands() -> list[str]:
    """The commands of the pages' bash blocks: continued lines joined, chains split, comments left out."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", PAGES, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            found += [command.strip() for command in line.split("#")[0].split("&&") if command.strip()]
    return found


def python_blocks() -> list[str]:
    """The code on the page: quoted from the modules, or, where it begins with an import, to run."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)


def arguments(words: list[str], fashionmnist, reviews) -> list[str]:
    """The words of a command on our scripts, with flags that make it small and keep it off the network."""
    script = words[2] if words[1] == "-m" else next(word for word in words if word.endswith(".py"))
    small = [] if "_from" in " ".join(words) or "--checkpoint" in words else list(SIZE.get(script, []))
    if script == "imagen.py" and "digits" not in words and "--sample_from" not in words:
        small += ["--data_dir", str(fashionmnist)] + ["--dataset", "fashionmnist"] * ("mnist" in words)
    if script in ("tokengen.py", "bench.tokens") and "_from" not in " ".join(words):
        small += ["--dataset", "manual"] + ["--out", "out/shakespeare"] * ("manual" not in words)
    if script == "textgen.py" and "grammar" not in words and "_from" not in " ".join(words):
        small += ["--dataset", str(reviews), "--out", "out/tripadvisor"]
    return [
        str(ROOT / word) if word == script and script.endswith(".py") else word for word in words[1:]
    ] + small


@pytest.fixture
def reviews(tmp_path):
    path, rows = (
        tmp_path / "reviews.csv",
        [f"the room was number {i} and we slept well.,{i % 5 + 1}" for i in range(60)],
    )
    path.write_text("\n".join(["Review,Rating", *rows]))
    return path


def test_every_command_runs(tmp_path, fake_fashionmnist, reviews):
    """Installation and pytest itself are .ci/run's part; here their files must exist."""
    ran = 0
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    for command in commands():
        words = shlex.split(command)
        if words[:2] == ["pip", "install"]:
            assert (ROOT / words[3]).is_file(), command
        elif words[0] not in ("pytest", "git", "cd", "source") and words[:3] != ["python", "-m", "venv"]:
            assert words[0] in ("python", "torchrun"), f"a command that this test does not know: {command}"
            torchrun = [sys.executable, "-m", "torch.distributed.run"]
            launcher = torchrun if words[0] == "torchrun" else [sys.executable]
            words = arguments(words, fake_fashionmnist, reviews)
            done = subprocess.run([*launcher, *words], cwd=tmp_path, capture_output=True, text=True, env=env)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            ran += 1
    assert ran >= 6
    for block in python_blocks():
        if block.startswith("import"):
            done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, env=env)
            assert done.returncode == 0, done.stderr.decode()


def test_ci_installs_and_tests_by_the_commands_of_the_readme():
    ci = (ROOT / ".ci/run").read_text()
    for command in ("pip install -r requirements-dev.txt", "pytest"):
        assert command in commands()
        assert re.search(rf"^{re.escape(command)}", ci, re.M), command


def test_code_that_is_quoted_stands_so_in_the_code():
    source = "".join((ROOT / name).read_text() for name in ("diffusion.py", "imagen.py"))
    quoted = [block for block in python_blocks() if not block.startswith("import")]
    assert quoted
    for block in quoted:
        for part in block.strip("\n").split("\n\n\n"):
            indented = re.sub(r"^(?=.)", "    ", part, flags=re.M)
            assert part in source or indented in source, part


def test_pictures_and_files_that_are_named_exist():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", PAGES)
    files = re.findall(r"^\| `([\w/.-]+)` \|", PAGES, re.M)
    for name in [*pictures, *files]:
        assert (ROOT / name).exists(), name


def test_every_module_is_named():
    for module in ROOT.glob("*.py"):
        assert f"`{module.name}`" in PAGES, module.name
