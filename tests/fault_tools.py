"""What the faults share: a script in a forked child, so that imports are paid once, and what it leaves."""

import csv
import fnmatch
import functools
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import datasets
import torch
from conftest import SMALL_REASON, SMALL_TEXT, SMALL_TOKENS, TINY

import training
from tasks import TASKS, USUAL, grammar_texts

ROOT = Path(training.__file__).parent
WORK = Path(os.environ.get("FAULTS") or tempfile.mkdtemp(prefix="faults_"))
LOG, CSV, TXT = WORK / "log", WORK / "texts.csv", WORK / "sums.txt"
RUNS = {  # the flags of runs of a second
    "imagen": ["--dataset", "digits", *TINY],
    "textgen": ["--dataset", CSV, *SMALL_TEXT, "--score_n", 0],
    "reason": ["--dataset", TXT, *SMALL_REASON, "--votes", 1, "--score_n", 2],
    "tokengen": ["--dataset", TXT, *SMALL_TOKENS, "--length", 40, "--n", 1],
}
LAST = dict.fromkeys(RUNS, "last.pt") | dict(textgen="diffusion/last.pt")
IMPORTS = "imagen textgen reason tokengen PIL.Image matplotlib.pyplot sacrebleu sklearn.datasets "
IMPORTS += (
    "sklearn.linear_model sklearn.feature_extraction.text torchvision.transforms.v2 scipy.spatial.distance"
)


def prepare() -> None:
    """Make the data of the runs, and import once what their children will need."""
    os.environ.update(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", FAULTS=str(WORK))
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT}/tests"
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = WORK / "cache"
    (WORK / "cwd").mkdir()
    texts, rng = grammar_texts().train, random.Random(0)
    sums = dict(TASKS["sums"].make(rng, USUAL) for _ in range(330))
    CSV.write_text("text,label\n" + "".join(f"{x},{texts.y[i]}\n" for i, x in enumerate(texts.x[:200])))
    TXT.write_text(
        "".join(f"{question}||<<{'>> <<'.join(most)}>> {end}\n" for question, (*most, end) in sums.items())
    )
    for name in IMPORTS.split():
        importlib.import_module(name)
    with training.figure(WORK / "warm.png", (6, 4)):
        pass


def command(name: str, steps: int = 8, **flags) -> list:
    """The flags of a run of so many steps, of textgen in both stages unless vae_steps says otherwise."""
    both, often = (
        dict(vae_steps=steps, diffusion_steps=steps),
        dict(save_every=2, log_every=1, sample_every=4),
    )
    flags = (both if name == "textgen" else dict(max_steps=steps)) | often | flags
    return [*RUNS[name], *(part for key, value in flags.items() for part in (f"--{key}", value))]


def script(name: str, *args):
    """What runs the script with these arguments in a child."""

    def task():
        module = importlib.import_module(name)
        sys.argv = [f"{name}.py", *map(str, args)]
        training.run_script(module.Config, module.main, module.__doc__)

    return task


def start(task, before=None, log: Path = LOG) -> int:
    """Fork: the child calls before() and task(), its output in the file `log`. Returns its process number."""
    log.write_bytes(b"")  # so that nobody reads what the last one printed
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        file = os.open(log, os.O_WRONLY)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(WORK / "cwd")
        if before:
            before()
        task()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        print(end.code if isinstance(end.code, str) else "", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    try:
        sys.stdout.flush()
    finally:
        os._exit(code)


def alive(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def wait_for(pid: int, seconds: float, true=bool) -> None:
    """Wait until true(), until the child has ended, or so many seconds."""
    end = time.time() + seconds
    while time.time() < end and alive(pid) and not true():
        time.sleep(0.001)


def ended(pid: int, log: Path = LOG, seconds: float = 120) -> tuple[str, str]:
    """How the child has ended (ok, message, traceback, hang, signal N, status N), and what it printed."""
    wait_for(pid, seconds)
    hangs = alive(pid)
    os.killpg(pid, signal.SIGKILL)  # nothing happens to one that has ended
    status, text = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), log.read_text(errors="replace")
    if hangs or "Traceback (most recent call last)" in text:
        return "hang" if hangs else "traceback", text
    return {0: "ok", 2: "message"}.get(
        status, f"signal {-status}" if status < 0 else f"status {status}"
    ), text


def call(task, before=None, seconds: float = 120) -> tuple[str, str]:
    return ended(start(task, before), seconds=seconds)


def fresh(name: str = "out") -> Path:
    """A folder below WORK that is not there yet."""
    shutil.rmtree(WORK / name, ignore_errors=True)
    return WORK / name


@functools.cache
def undisturbed(name: str, *args) -> tuple[Path, float]:
    """The folder of a run that nothing disturbs, and its seconds."""
    out, begin = WORK / "whole" / str(len(list(WORK.glob("whole/*")))), time.time()
    got, text = call(script(name, *args, "--out", out))
    assert got == "ok", text
    return out, time.time() - begin


def temporaries(out: Path) -> list[str]:
    return [path.name for path in out.rglob(".*") if path.is_file() and path.name not in (".lock", ".holder")]


def disturbed(name, args, out, wanted, before=None, meddle=None, check=None, but="") -> str:
    """Run a script under a fault: before() in the child, meddle(its number) here; then without it.

    Returns what is wrong: with its end, where it is none of the wanted, or with what check(how it ended, its
    output) finds; then with the resumed run. "" where all is as it should be.
    """
    pid = start(script(name, *args, "--out", out, "--resume"), before)
    if meddle:
        meddle(pid)
    got, text = ended(pid)
    wrong = unwanted(got, text, wanted) or (check(got, text) if check else "")
    return wrong or after_resume(name, args, out, but)


def unwanted(got: str, text: str, wanted=("ok", "message")) -> str:
    """Where a child did not end as wanted: how, its last line, and the last place in the repository."""
    if got in wanted:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    where = [line for line in lines if f'File "{ROOT}/' in line and f'File "{ROOT}/tests' not in line]
    return f"{got}: {lines[-1][:180]} {' '.join(where[-1:])}"


def after_resume(name: str, args: list, out: Path, but: str = "") -> str:
    """What is wrong with the folder once its run is resumed; but: the names of files that may differ."""
    wrong = unwanted(*call(script(name, *args, "--out", out, "--resume")), ["ok"])
    if wrong or temporaries(out):
        return f"--resume: {wrong}" if wrong else f"{temporaries(out)} left"
    found = differences(undisturbed(name, *args)[0], out)
    found = [file for file in found if not fnmatch.fnmatch(Path(file).name, but)]
    return f"{', '.join(found)} not as in an undisturbed run" if found else ""


def differences(a: Path, b: Path) -> list[str]:
    """The files in which two run folders differ, but for wall-clock times and the paths in them."""
    files = {path.relative_to(root) for root in (a, b) for path in root.rglob("[!.]*") if path.is_file()}
    return sorted(str(file) for file in files if content(a / file) != content(b / file))


def content(path: Path):
    """What should be equal in two runs; None where there is no such file."""
    if not path.is_file():
        return None
    if path.name in ("curve.png", "config.json"):
        return "there"
    if path.suffix == ".pt":
        saved = torch.load(path, weights_only=True)
        return plain({key: saved[key] for key in ("step", "facts", "model", "ema", "opt", "extra")})
    if path.suffix == ".csv":
        return [plain(row) for row in csv.DictReader(path.read_text().splitlines())]
    return path.read_bytes()


def plain(x):
    """x with bytes for tensors, without times, so that it can be compared."""
    if isinstance(x, dict):
        return {
            key: plain(x[key]) for key in x if key not in ("seconds", "samples_per_second", "vae_seconds")
        }
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    return (x.dtype, x.shape, x.numpy().tobytes()) if isinstance(x, torch.Tensor) else x


def is_finite(saved: dict) -> bool:
    """Whether all numbers of weights, EMA and optimizer are."""
    tensors = [*saved["model"].values(), *saved["ema"].values()]
    tensors += [value for state in saved["opt"]["state"].values() for value in state.values()]
    return all(bool(value.isfinite().all()) for value in tensors if isinstance(value, torch.Tensor))
