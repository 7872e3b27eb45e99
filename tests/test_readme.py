"""Every command of README.md and RESULTS.md runs, at a tiny size, in the order in which it stands there; and their claims about files hold."""
import os
import re
import shlex
import subprocess
import sys

from conftest import ROOT, SMALL_REASON, SMALL_TEXT, TINY

README = (ROOT / "README.md").read_text() + (ROOT / "RESULTS.md").read_text()
SIZE = {
    "imagen.py": [*TINY, "--max_steps", "2", "--score_n", "40"],
    "textgen.py": [*SMALL_TEXT, "--max_steps", "2", "--score_n", "8"],
    "reason.py": [*SMALL_REASON, "--max_steps", "2", "--score_n", "8"],
    "bench.py": "--digits 2 1 --rounds 1 --round_steps 1 --seconds 0.2 --seeds 0 --score_n 40 --dataset digits --batch_size 8 --base_batch 1".split(),
}


def commands():
    """The commands of the README's bash blocks: continued lines joined, chains split."""
    for block in re.findall(r"```bash\n(.*?)```", README, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split("#")[0].split("&&"):
                if command.strip():
                    yield command.strip()


def test_every_command_runs(tmp_path, fake_fashionmnist):
    """Installation and pytest itself are .ci/run's part; here their files must exist."""
    ran, reviews = 0, tmp_path / "reviews.csv"
    reviews.write_text("Review,Rating\n" + "\n".join(f"the room was number {i} and we slept well.,{i % 5 + 1}" for i in range(60)))
    for command in commands():
        words = shlex.split(command)
        if words[:2] == ["pip", "install"]:
            assert words[2] == "-r" and (ROOT / words[3]).is_file(), command
        elif words[0] in ("pytest", "git", "cd", "source", "gunzip", "mkdir", "cp") or words[:3] == ["python", "-m", "venv"]:
            continue
        else:
            launcher = [sys.executable] if words[0] == "python" else [sys.executable, "-m", "torch.distributed.run"]
            assert words[0] in ("python", "torchrun"), f"a command that this test does not know: {command}"
            script = next(w for w in words if w.endswith(".py"))
            size = [] if "_from" in command else list(SIZE[script])
            if script in ("imagen.py", "bench.py") and "_from" not in command and "digits" not in command:
                size += ["--data_dir", str(fake_fashionmnist)]
            size += ["--dataset", "fashionmnist"] * ("mnist" in words) + ["--dataset", str(reviews)] * ("tripadvisor" in words)  # nothing is downloaded
            words = [str(ROOT / w) if w == script else w for w in words[1:]] + size
            done = subprocess.run([*launcher, *words], cwd=tmp_path, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            ran += 1
    assert ran >= 6


def test_ci_installs_and_tests_by_the_commands_of_the_readme():
    ci, known = (ROOT / ".ci/run").read_text(), list(commands())
    for command in ("pip install -r requirements-dev.txt", "pytest"):
        assert command in known and re.search(rf"^{re.escape(command)}", ci, re.M), command


def test_no_placeholder_is_left():
    assert not re.search(r"@[A-Z_]+@", README)


def test_files_and_pictures_named_exist_and_every_module_is_named():
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README) + re.findall(r"^\| `([\w/.-]+)` \|", README, re.M):
        assert (ROOT / name).exists(), name
    for module in ROOT.glob("*.py"):
        assert f"`{module.name}`" in README, module.name
