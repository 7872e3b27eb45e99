"""common/run.py: randomness, EMA, checkpoints, resume, signals, locks, settings, two processes."""

import csv
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import ROOT, TINY

from common import run as runs
from common.run import (
    Flags,
    Muon,
    Run,
    UserError,
    batch_indices,
    is_builtin,
    open_checkpoint,
    resolve_out,
    write_atomic,
)

CPU = torch.device("cpu")
X = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Config(Flags):
    dataset: str = "toy"
    max_steps: int = 10
    batch_size: int = 4
    lr: float = 1e-2
    muon: bool = False  # Muon trains the matrix
    save_every: int = 4
    width: int = 1

    script: ClassVar = "toy"
    RECIPES: ClassVar = {"special": dict(lr=2.0, width=7)}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    for name, value in dict(WARMUP=4, EMA=0.9, LOG_EVERY=3, MUON_LR=0.05).items():
        monkeypatch.setattr(runs, name, value)


def begin(cfg, inputs=3, samples=32):
    torch.manual_seed(cfg.seed)
    net = torch.nn.Linear(inputs, 1)
    runs.WARMUP = 2 if cfg.muon else 4  # which is four steps: with Muon it is twice as long
    muon = dict(muon=[net.weight], cooldown=0.4) if cfg.muon else {}
    return Run(cfg, net, dict(samples=samples), CPU, **muon)


def toy(cfg, poison=0, at=None):
    """A linear regression of y = sum x; the loss of step `poison` is not a number; at(run) in each step."""
    with begin(cfg) as run:
        for step, batch in run.steps(len(X)):
            target = X[batch].sum(1, keepdim=True) + 0.1 * torch.randn(len(batch), 1)
            loss = (run.model(X[batch]) - target).square().mean()
            run.update(loss * (float("nan") if step == poison else 1))
            if at:
                at(run)
    return run


def read(path):
    with open_checkpoint(path / "last.pt", Config) as saved:
        return saved


def same(a: Path, b: Path) -> bool:
    """Whether two checkpoints are equal bit for bit, but for settings and seconds."""

    def equal(x, y):
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x)
        if isinstance(x, list):
            return len(x) == len(y) and all(map(equal, x, y))
        return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y

    a, b = (torch.load(p / "last.pt", weights_only=True) for p in (a, b))
    return all(equal(a[k], b[k]) for k in a.keys() - {"config", "seconds", "rows"})


# -- the loop --------------------------------------------------------------------------------------------


def test_batches_are_permutations_and_a_function_of_seed_and_step():
    for n, size in [(10, 4), (7, 7), (5, 12), (1, 3)]:
        stream = torch.cat([batch_indices(n, size, 3, step) for step in range(1, 21)])
        assert len(stream) == 20 * size
        for epoch in stream[: len(stream) // n * n].view(-1, n):
            assert sorted(epoch.tolist()) == list(range(n))
    assert torch.equal(batch_indices(100, 8, 0, 5), batch_indices(100, 8, 0, 5))
    assert not torch.equal(batch_indices(100, 8, 0, 5), batch_indices(100, 8, 1, 5))


@pytest.mark.parametrize("muon", [False, True])
def test_update_is_the_optimizers_with_warmup_clipping_and_a_ramped_ema(muon, tmp_path):
    """Against the same three steps written out."""
    run = toy(Config(str(tmp_path / "a"), max_steps=3, muon=muon))
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 1)
    opts = [torch.optim.AdamW([net.bias] if muon else net.parameters(), lr=1e-2, weight_decay=0.0)]
    opts += [Muon([net.weight], dict(lr=0.05))] if muon else []  # which has a test of its own
    ema = None
    for step in (1, 2, 3):
        batch = batch_indices(32, 4, 0, step)
        torch.manual_seed(hash((0, step, 0)) % 2**63)
        target = X[batch].sum(1, keepdim=True) + 0.1 * torch.randn(4, 1)
        (net(X[batch]) - target).square().mean().backward()
        norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
        assert norm > 1  # the clipping is on
        for p in net.parameters():
            p.grad /= norm
        for opt, lr in zip(opts, [1e-2, 0.05], strict=False):
            opt.param_groups[0]["lr"] = lr * step / 4
            opt.step()
            opt.zero_grad()
        decay = min(0.9, (1 + step) / (10 + step))
        now = net.weight.detach().clone()
        ema = now if ema is None else decay * ema + (1 - decay) * now
    torch.testing.assert_close(run.net.weight, net.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run.ema.weight, ema, rtol=1e-5, atol=1e-6)
    assert not torch.equal(run.ema.weight, run.net.weight)


def test_rates_rise_in_the_warmup_and_fall_to_0_in_the_cooldown(tmp_path):
    rates = []

    def at(run):
        rates.append([opt.param_groups[0]["lr"] for opt in run.opts])

    toy(Config(str(tmp_path), muon=True), at=at)
    shares = [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert [lr / 1e-2 for lr, _ in rates] == pytest.approx(shares)
    assert [lr / 0.05 for _, lr in rates] == pytest.approx(shares)


def test_every_parameter_is_stepped_once_by_one_optimizer(tmp_path):
    run = toy(Config(str(tmp_path), muon=True))
    grouped = [p for opt in run.opts for p in opt.param_groups[0]["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, run.net.parameters()))
    assert all(state["step"] == 10 for state in run.opts[0].state.values())


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_muon_steps_as_torch_s_and_orthogonally(shape):
    """Five steps beside torch's; from torch's own Newton-Schulz ours differs by bfloat16's rounding only."""
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    sides = Muon([ours], dict(lr=0.1)), torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0)
    for i in range(5):
        ours.grad = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        theirs.grad, before = ours.grad.clone(), ours.detach().clone()
        for side in sides:
            side.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01)
        sizes = torch.linalg.svdvals((ours - before).detach()) / 0.1 / max(1, shape[0] / shape[1]) ** 0.5
        assert 0.6 < sizes.min() and sizes.max() < 1.3
    zero = torch.nn.Parameter(torch.ones(shape))
    zero.grad = torch.zeros(shape)
    Muon([zero], dict(lr=0.1)).step()
    assert (zero == 1).all()  # the first step of a layer behind one that starts at zero


# -- promise 1: resume -----------------------------------------------------------------------------------


def log_of(path):
    with open(path / "log.csv") as file:
        return [(row["step"], row["loss"], row["lr"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("muon", [False, True])
def test_resume_ends_with_the_same_bits_and_the_same_log(muon, tmp_path):
    """Killed at step 7, after the save of step 4, which is no step of the log."""

    class Killed(BaseException):
        pass

    def kill(run):
        if run.step == 7:
            raise Killed

    cfg = Config(str(tmp_path / "whole"), muon=muon)
    toy(cfg)
    parts = replace(cfg, out=str(tmp_path / "parts"))
    with pytest.raises(Killed):
        toy(parts, at=kill)
    assert read(tmp_path / "parts")["step"] == 4
    toy(replace(parts, resume=True))
    assert same(tmp_path / "whole", tmp_path / "parts")
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")
    assert [step for step, _, _ in log_of(tmp_path / "whole")] == ["3", "6", "9", "10"]


def test_resume_refuses_another_model_or_other_data_and_names_it(tmp_path):
    cfg = Config(str(tmp_path))
    toy(replace(cfg, max_steps=5))
    for other, inputs, samples, word in [
        (cfg, 3, 32, "--resume"),
        (replace(cfg, resume=True, width=2), 3, 32, "--width"),
        (replace(cfg, resume=True), 3, 31, "other data"),
        (replace(cfg, resume=True), 4, 32, "last.pt"),
    ]:
        with pytest.raises(UserError, match=word):
            begin(other, inputs, samples)
    toy(replace(cfg, resume=True, lr=1e-3, max_steps=12))  # these may change
    assert toy(replace(cfg, max_steps=12, lr=1e-3)).step == 12  # a finished run needs no --resume


# -- promise 2: checkpoints ------------------------------------------------------------------------------


def test_write_atomic_leaves_the_old_file_where_the_new_one_fails(tmp_path):
    path = tmp_path / "f"
    write_atomic(path, lambda f: f.write(b"old"))

    def write(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="f could not be written.*No space left"):
        write_atomic(path, write)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    os.link(path, tmp_path / "reader")  # as a reader that has the old file open
    write_atomic(path, lambda f: f.write(b"new"))
    assert path.read_bytes() == b"new" and (tmp_path / "reader").read_bytes() == b"old"


def test_a_tensor_that_does_not_fit_on_the_disk_is_one_error(tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # fails as a full disk does
    try:
        with pytest.raises(UserError, match="File too large"):  # torch hides it behind "unexpected pos"
            write_atomic(tmp_path / "f", lambda file: torch.save(torch.zeros(300_000), file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    def save(state, file):
        file.write(b"half of a checkpoint")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        toy(Config(str(tmp_path)), at=lambda run: run.step == 5 and monkeypatch.setattr(torch, "save", save))
    monkeypatch.undo()
    assert read(tmp_path)["step"] == 4 and not list(tmp_path.glob(".*.tmp"))


def test_a_flipped_bit_in_a_checkpoint_is_noticed_or_changes_nothing(tmp_path):
    toy(Config(str(tmp_path)))
    path, rng, noticed = tmp_path / "last.pt", random.Random(0), 0
    sound, state = path.read_bytes(), read(tmp_path)
    for _ in range(100):
        flipped = bytearray(sound)
        flipped[rng.randrange(len(sound))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            assert str(read(tmp_path)) == str(state)
        except UserError:
            noticed += 1
    assert noticed > 30


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def test_bad_checkpoints_are_named_and_run_nothing(tmp_path):
    path, bomb = tmp_path / "last.pt", Bomb()
    with pytest.raises(UserError, match="last.pt"):
        read(tmp_path)
    toy(Config(str(tmp_path)))
    good, sound = torch.load(path, weights_only=True), path.read_bytes()
    bomb.trace = tmp_path / "exploded"
    for data in (sound[:300], b"", b"not a checkpoint"):
        path.write_bytes(data)
        with pytest.raises(UserError, match="last.pt"):
            read(tmp_path)
    strange = [good | more for more in (dict(script="imagen"), dict(config=dict(x=1)), dict(bomb=bomb))]
    for state in ([1, 2], dict(step=3), *strange):
        torch.save(state, path)
        with pytest.raises(UserError, match="last.pt"):
            read(tmp_path)
    assert not bomb.trace.exists()


# -- promise 3: one run in a folder ----------------------------------------------------------------------


def test_a_folder_is_one_runs_at_a_time_and_free_after_a_kill(tmp_path):
    code = "import time; from test_run import Config, begin\n"
    code += f"run = begin(Config({str(tmp_path)!r})); print('ready', flush=True); time.sleep(60)"
    here = dict(cwd=ROOT / "tests", stdout=subprocess.PIPE, text=True)
    other = subprocess.Popen([sys.executable, "-c", code], **here)
    assert other.stdout.readline() == "ready\n"
    with pytest.raises(UserError, match="in use"):
        toy(Config(str(tmp_path)))
    other.kill()
    other.wait()
    assert toy(Config(str(tmp_path))).step == 10


def test_the_lock_is_held_until_the_last_file_and_a_refused_run_keeps_none(tmp_path):
    cfg = Config(str(tmp_path))
    with begin(cfg) as run:
        for _, batch in run.steps(len(X)):
            run.update(run.model(X[batch]).square().mean())
        with pytest.raises(UserError, match="in use"):
            begin(cfg)
    try:
        begin(replace(cfg, width=2))
    except UserError as error:  # a notebook keeps the traceback, and the run in it
        assert begin(cfg).step == 10 and error


# -- promise 4: signals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_step_saves_and_leaves_the_handlers_as_they_were(tmp_path, name, capsys):
    number, due = getattr(signal, name), []
    before = signal.getsignal(number)

    def at(run):
        if run.step == 3:
            os.kill(os.getpid(), number)
            due.append(run.due(1))  # no samples first

    with pytest.raises(SystemExit) as end:
        toy(Config(str(tmp_path), save_every=100), at=at)
    assert end.value.code == 128 + number and "--resume" in capsys.readouterr().out
    assert read(tmp_path)["step"] == 3 and due == [False]
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_acts_at_once(tmp_path):
    def at(run):
        if run.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
            while not run.signal:  # two that wait at once would be one
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        toy(Config(str(tmp_path)), at=at)
    assert read(tmp_path)["step"] == 4


def test_a_training_in_a_thread_needs_no_signals(tmp_path):
    steps = []
    thread = threading.Thread(target=lambda: steps.append(toy(Config(str(tmp_path))).step))
    thread.start()
    thread.join()
    assert steps == [10]


# -- promise 5: what is not finite -----------------------------------------------------------------------


@pytest.mark.parametrize("poison", [4, 5, 6, 7])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path, poison):
    with pytest.raises(UserError, match="not finite"):
        toy(Config(str(tmp_path)), poison=poison)
    if poison > 4:
        assert read(tmp_path)["step"] == 4
        assert toy(Config(str(tmp_path), resume=True)).step == 10
    else:
        assert not (tmp_path / "last.pt").exists()


def test_a_gradient_that_is_not_finite_is_noticed(tmp_path):
    def at(run):
        if run.step == 6:
            run.net.weight.register_hook(lambda grad: grad * float("nan"))

    with pytest.raises(UserError, match="not finite"):
        toy(Config(str(tmp_path)), at=at)
    assert read(tmp_path)["step"] == 4


# -- settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, wanted",
    [
        ("", ("toy", 1e-2, 1)),
        ("--dataset special", ("special", 2.0, 7)),
        ("--width=5 --dataset=special", ("special", 2.0, 5)),
    ],
)
def test_a_recipe_sets_the_defaults_of_its_data_set_and_flags_override_it(flags, wanted, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["toy.py", "--out", "x", *flags.split()])
    seen = []
    runs.run_script(Config, seen.append, "")
    assert (seen[0].dataset, seen[0].lr, seen[0].width) == wanted


def test_memory_that_runs_out_is_one_message(tmp_path):
    with pytest.raises(UserError, match="a batch of 4 does not fit"), begin(Config(str(tmp_path))) as run:
        for _ in run.steps(len(X)):
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_more_processes_than_devices_are_refused(monkeypatch):
    monkeypatch.setattr(runs, "WORLD", 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(UserError, match="nproc_per_node"):
        runs.pick_device("mps")
    assert runs.pick_device("cpu").type == "cpu"


def test_compile_without_a_compiler_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda _: 1 / 0)
    with pytest.raises(UserError, match="--compile off"):
        begin(Config(str(tmp_path), compile="on"))
    begin(Config(str(tmp_path))).lock.release()  # auto is off on a CPU


@pytest.mark.slow
def test_a_compiled_run_has_the_same_losses_resumes_and_is_shared(tmp_path, cli):
    def train(name, *flags):
        status, printed = cli("imagen", *tiny, "--out", tmp_path / name, *flags)
        assert status == 0, printed
        with open(tmp_path / name / "log.csv") as file:
            return [float(row["loss"]) for row in csv.DictReader(file)]

    tiny = "--dataset digits --denoiser transformer --width 16 --depth 1 --score_n 0".split()
    plain = train("plain", "--max_steps", 9)
    assert train("on", "--max_steps", 5, "--compile", "on")
    assert train("on", "--max_steps", 9, "--compile", "on", "--resume")[-1] == pytest.approx(
        plain[-1], rel=1e-3
    )
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "imagen.py", *tiny]
    command += ["--max_steps", 4, "--compile", "on", "--out", "two"]
    assert script(*command, cwd=tmp_path).wait() == 0


def test_the_folder_of_a_run_has_the_name_of_its_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("data.v1.2", "data.v1.3", "home/pictures"):
        (tmp_path / folder).mkdir(parents=True)
    Path("reviews.v2.csv").touch()
    Path("loop").symlink_to("loop")
    names = {"digits": "digits", "data.v1.2": "data.v1.2", "data.v1.3/": "data.v1.3", "loop": "loop"}
    names |= {"reviews.v2.csv": "reviews.v2", "~/pictures": "pictures", "owner/name": "name"}
    for dataset, name in names.items():
        assert resolve_out(Config(dataset=dataset)).out == f"out/{name}"
    assert resolve_out(Config("~/runs", dataset="digits")).out == str(tmp_path / "home/runs")
    with pytest.raises(UserError, match="would become data"):
        resolve_out(Config("data.v1.2/out", dataset="data.v1.2"))


def test_a_path_with_the_name_of_a_built_in_data_set_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_builtin("digits", ["digits"]) and not is_builtin("./digits", ["digits"])
    Path("digits").mkdir()
    with pytest.raises(UserError, match="./digits"):
        is_builtin("digits", ["digits"])


# -- processes -------------------------------------------------------------------------------------------


def script(*args, cwd, **settings):
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    return subprocess.Popen([sys.executable, *map(str, args)], cwd=cwd, env=env, text=True, **settings)


IMAGEN = [ROOT / "imagen.py", "--dataset", "digits", *TINY, "--save_every", "5", "--out", "run"]


@pytest.mark.slow
def test_ranks_left_in_the_environment_are_not_torchruns(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert script(*IMAGEN, "--max_steps", "2", cwd=tmp_path).wait() == 0
    assert (tmp_path / "run/samples/grid.png").exists()


@pytest.mark.slow
def test_a_closed_stderr_does_not_end_a_run(tmp_path):
    command = ["-c", "import os, sys; os.close(2); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"]
    assert script(*command, *IMAGEN, "--max_steps", "2", cwd=tmp_path).wait() == 0
    assert (tmp_path / "run/samples/grid.png").exists()


@pytest.mark.slow
def test_kill_9_and_resume_end_with_the_same_bits(tmp_path):
    long = [*IMAGEN, "--max_steps", "60"]
    assert script(*long, "--out", "whole", cwd=tmp_path).wait() == 0
    process, rng = script(*long, cwd=tmp_path), random.Random(1)
    for _ in range(3):
        while not (tmp_path / "run/last.pt").exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(rng.random())
        process.kill()
        process.wait()
        process = script(*long, "--resume", cwd=tmp_path)
        time.sleep(4 * rng.random())
    assert process.wait() == 0
    assert same(tmp_path / "whole", tmp_path / "run")
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "run")


def torchrun(*args, **settings):
    launcher = "-m torch.distributed.run --nproc_per_node 2 --master_port 29613".split()
    return script(*launcher, *args, **settings)


@pytest.mark.slow
def test_two_processes_train_as_one_batch_and_stop_at_one_step(tmp_path):
    assert torchrun(*IMAGEN, "--max_steps", "20", cwd=tmp_path).wait() == 0
    with open_checkpoint(tmp_path / "run/last.pt", __import__("imagen").Config) as saved:
        assert saved["step"] == 20
    long = [*IMAGEN, "--out", "stopped", "--max_steps", "100000"]
    process = torchrun(*long, cwd=tmp_path, stdout=subprocess.PIPE)
    while "step 50" not in process.stdout.readline():
        pass
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGTERM)
    out = process.communicate(timeout=60)[0]
    assert "stopped at step" in out
    step = int(out.split("stopped at step ")[1].split()[0])
    with open_checkpoint(tmp_path / "stopped/last.pt", __import__("imagen").Config) as saved:
        assert saved["step"] == step >= 50
