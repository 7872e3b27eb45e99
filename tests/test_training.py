"""training.py: randomness, EMA, checkpoints, resume after kill -9, signals, two processes."""

import csv
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY

import training
from training import (
    Run,
    UserError,
    batch_indices,
    load_checkpoint,
    load_weights,
    pick_device,
    seed_step,
    write_atomic,
)

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Config:
    out: str
    seed: int = 0
    max_steps: int = 10
    batch_size: int = 4
    lr: float = 1e-2
    warmup: int = 4
    ema_decay: float = 0.9
    log_every: int = 2
    save_every: int = 4
    resume: bool = False
    width: int = 1

    kind = "toy"


X = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))


def begin(cfg, inputs=3, samples=32):
    return Run(
        cfg, torch.nn.Linear(inputs, 1), CPU, dict(samples=samples), cfg.out, cfg.max_steps, cfg.batch_size
    )


def toy(cfg, poison=0, noise=0.1):
    """A linear regression of y = sum x through Run; at step `poison` its loss is not a number."""
    torch.manual_seed(cfg.seed)
    run = begin(cfg)
    for step, batch in run.steps(len(X)):
        target = X[batch].sum(1, keepdim=True) + noise * torch.randn(len(batch), 1)
        loss = (run.model(X[batch]) - target).square().mean()
        run.update(loss * (float("nan") if step == poison else 1))
    return run


def test_batches_are_permutations_and_a_function_of_seed_and_step():
    for n, size in [(10, 4), (7, 7), (5, 12), (1, 3)]:
        stream = torch.cat([batch_indices(n, size, 3, step) for step in range(1, 21)])
        assert len(stream) == 20 * size
        for epoch in stream[: len(stream) // n * n].view(-1, n):
            assert sorted(epoch.tolist()) == list(range(n))
    assert torch.equal(batch_indices(100, 8, 0, 5), batch_indices(100, 8, 0, 5))
    assert not torch.equal(batch_indices(100, 8, 0, 5), batch_indices(100, 8, 1, 5))


def test_draws_are_a_function_of_seed_step_and_rank():
    draws = set()
    for key in [(0, 1, 0), (0, 2, 0), (0, 1, 1), (1, 1, 0)]:
        seed_step(*key)
        first = torch.rand(1).item()
        seed_step(*key)
        assert torch.rand(1).item() == first
        draws.add(first)
    assert len(draws) == 4


def test_update_is_adamw_with_warmup_clipping_and_a_ramped_ema(tmp_path):
    """Against the same three steps written out."""
    run = toy(Config(str(tmp_path / "a"), max_steps=3))
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 1)
    opt, ema = torch.optim.AdamW(net.parameters(), weight_decay=0.0), None
    for step in (1, 2, 3):
        batch = batch_indices(32, 4, 0, step)
        seed_step(0, step)
        target = X[batch].sum(1, keepdim=True) + 0.1 * torch.randn(4, 1)
        (net(X[batch]) - target).square().mean().backward()
        norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
        assert norm > 1  # the clipping is on
        for p in net.parameters():
            p.grad /= norm
        opt.param_groups[0]["lr"] = 1e-2 * step / 4
        opt.step()
        opt.zero_grad()
        decay = min(0.9, (1 + step) / (10 + step))
        now = net.weight.detach().clone()
        ema = now if ema is None else decay * ema + (1 - decay) * now
    torch.testing.assert_close(run.net.weight, net.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run.ema.module.weight, ema, rtol=1e-5, atol=1e-6)
    assert not torch.equal(run.ema.module.weight, run.net.weight)


def test_every_parameter_is_in_one_group_and_stepped_once(tmp_path):
    run = toy(Config(str(tmp_path)))
    grouped = [p for group in run.opt.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, run.net.parameters()))
    assert all(state["step"] == 10 for state in run.opt.state.values())


def test_resume_ends_with_the_same_bits(tmp_path):
    whole = toy(Config(str(tmp_path / "whole"), max_steps=10))
    toy(Config(str(tmp_path / "parts"), max_steps=6))
    parts = toy(Config(str(tmp_path / "parts"), max_steps=10, resume=True))
    assert same(tmp_path / "whole/last.pt", tmp_path / "parts/last.pt")
    assert torch.equal(whole.net.weight, parts.net.weight)


def same(a: Path, b: Path) -> bool:
    a, b = (torch.load(p, weights_only=True) for p in (a, b))

    def equal(x, y):
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x)
        if isinstance(x, list):
            return len(x) == len(y) and all(map(equal, x, y))
        return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y

    return all(equal(a[k], b[k]) for k in ("step", "model", "ema", "opt", "facts"))


def test_resume_refuses_another_model_or_other_data_and_names_it(tmp_path):
    cfg = Config(str(tmp_path))
    toy(cfg)
    with pytest.raises(UserError, match="--resume .* --out"):
        toy(cfg)
    with pytest.raises(UserError, match="--width 2, but .* was trained with 1"):
        toy(replace(cfg, resume=True, width=2))
    with pytest.raises(UserError, match="its samples is 31, but .* was trained with 32"):
        begin(replace(cfg, resume=True), samples=31)
    with pytest.raises(UserError, match="weights of another model"):
        begin(replace(cfg, resume=True), inputs=4)
    toy(replace(cfg, resume=True, lr=1e-3, max_steps=12))  # these may change


def test_loss_that_is_not_finite_stops_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(UserError, match="gradient of step 7 is not finite"):
        toy(Config(str(tmp_path)), poison=7)
    state = load_checkpoint(tmp_path / "last.pt", "toy")
    assert state["step"] == 4 and all(v.isfinite().all() for v in state["model"].values())
    assert toy(Config(str(tmp_path), resume=True)).step == 10


def test_a_bad_state_is_not_saved_even_before_its_loss_is_logged(tmp_path):
    with pytest.raises(UserError, match="gradient of step 4 is not finite"):
        toy(Config(str(tmp_path), log_every=5), poison=4)
    assert not (tmp_path / "last.pt").exists()


def test_a_gradient_that_is_not_finite_is_noticed_in_its_own_step(tmp_path):
    torch.manual_seed(0)
    run = begin(Config(str(tmp_path)))
    run.net.weight.register_hook(lambda grad: grad * float("nan") if run.step == 8 else grad)
    with pytest.raises(UserError, match="gradient of step 8"):
        for _, batch in run.steps(len(X)):
            run.update(run.model(X[batch]).square().mean())
    assert load_checkpoint(tmp_path / "last.pt", "toy")["step"] == 4


def test_log_holds_each_step_once_after_a_crash(tmp_path):
    with pytest.raises(UserError):
        toy(Config(str(tmp_path)), poison=7)  # logged step 6, saved step 4
    toy(Config(str(tmp_path), resume=True))
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows] == [2, 4, 6, 8, 10]
    assert all(float(r["loss"]) > 0 for r in rows)
    assert all(float(r["samples_per_second"]) > 0 for r in rows)


def test_rows_behind_the_checkpoint_are_cut_from_any_table(tmp_path):
    toy(Config(str(tmp_path), max_steps=4))
    path = tmp_path / "eval.csv"
    path.write_text("step,score\n2,0.5\n4,0.6\n6,0.7\n")
    begin(Config(str(tmp_path), resume=True)).keep_rows(path, "step,score")
    assert path.read_text() == "step,score\n2,0.5\n4,0.6\n"


# -- the command line ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flags:
    dataset: str = "plain"
    size: str = "tiny"
    lr: float = 1.0
    steps: int = 3

    @staticmethod
    def recipe(given):
        return dict(lr=2.0, steps=7) if given.dataset == "special" and given.size == "tiny" else {}


@pytest.mark.parametrize(
    "flags, wanted",
    [
        ("", ("plain", 1.0, 3)),
        ("--dataset special", ("special", 2.0, 7)),
        ("--dataset special --steps 5", ("special", 2.0, 5)),
        ("--steps=5 --dataset=special", ("special", 2.0, 5)),
        ("--dataset special --size base", ("special", 1.0, 3)),
    ],
)
def test_a_recipe_sets_the_defaults_of_its_data_set_and_flags_override_it(flags, wanted, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", *flags.split()])
    cfg = training.read_config(Flags, "")
    assert (cfg.dataset, cfg.lr, cfg.steps) == wanted


# -- checkpoints -----------------------------------------------------------------------------------------


def test_write_atomic_leaves_the_old_file_where_the_new_one_fails(tmp_path):
    path = tmp_path / "f"
    write_atomic(path, lambda f: f.write(b"old"))
    with pytest.raises(RuntimeError):
        write_atomic(path, lambda f: (f.write(b"half"), (_ for _ in ()).throw(RuntimeError()))[0])
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    os.link(path, tmp_path / "reader")  # as a reader that has the old file open
    write_atomic(path, lambda f: f.write(b"new"))
    assert path.read_bytes() == b"new" and (tmp_path / "reader").read_bytes() == b"old"


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def test_bad_checkpoints_are_named_and_run_nothing(tmp_path):
    good = dict(kind="toy", config={}, facts={}, extra={}, step=1, seconds=0.0, model={}, ema={}, opt={})
    path = tmp_path / "last.pt"
    with pytest.raises(UserError, match="no checkpoint at .*last.pt"):
        load_checkpoint(path, "toy")
    torch.save(good, path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match="last.pt is not a checkpoint that can be loaded safely"):
        load_checkpoint(path, "toy")
    path.write_bytes(b"")
    with pytest.raises(UserError, match="loaded safely"):
        load_checkpoint(path, "toy")
    torch.save(dict(kind="toy", model={}, step=3), path)
    with pytest.raises(UserError, match="lacks config, ema, extra, facts, opt, seconds"):
        load_checkpoint(path, "toy")
    bomb = Bomb()
    bomb.trace = tmp_path / "exploded"
    torch.save(good | dict(bomb=bomb), path)
    with pytest.raises(UserError, match="loaded safely"):
        load_checkpoint(path, "toy")
    assert not bomb.trace.exists()
    for other in (good | dict(kind="other"), [1, 2]):
        torch.save(other, path)
        with pytest.raises(UserError, match="not a checkpoint of toy.py"):
            load_checkpoint(path, "toy")
    with pytest.raises(UserError, match="weights of another model: .*weight"):
        load_weights(torch.nn.Linear(3, 1), torch.nn.Linear(4, 1).state_dict(), path)


def test_pick_device():
    assert pick_device("auto").type == "cpu" and pick_device("cpu").type == "cpu"  # conftest hides the GPUs
    with pytest.raises(UserError, match="--device cuda is not available here; choose one of cpu"):
        pick_device("cuda")


# -- whole processes -------------------------------------------------------------------------------------


TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]


def start(*command, **env):
    command = [sys.executable, "-u", *map(str, command)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | env, **pipes)


def digits(out, *args):
    return ["imagen.py", "--dataset", "digits", "--out", out, *TINY, "--log_every", "2", *args]


def send_at(process, text, number):
    """Send signal `number` when the output reaches a line with `text`; return the rest of the output."""
    for line in process.stdout:
        if text in line:
            process.send_signal(number)
            break
    return process.communicate(timeout=200)[0]


def test_run_killed_at_any_moment_and_resumed_ends_with_the_same_bits(tmp_path):
    process = start(*digits(tmp_path / "whole", "--max_steps", 60, "--save_every", 20))
    process.communicate(timeout=200)
    assert process.returncode == 0
    process = start(*digits(tmp_path / "killed", "--max_steps", 60, "--save_every", 20))
    send_at(process, "step 32/", signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert load_checkpoint(tmp_path / "killed/last.pt", "imagen")["step"] == 20
    process = start(*digits(tmp_path / "killed", "--max_steps", 60, "--save_every", 20, "--resume"))
    printed = process.communicate(timeout=200)[0]
    assert process.returncode == 0 and "at step 20" in printed, printed
    assert same(tmp_path / "whole/last.pt", tmp_path / "killed/last.pt")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, number):
    process = start(*digits(tmp_path, "--max_steps", 4000, "--save_every", 4000))
    printed = send_at(process, "step 10/", number)
    assert process.returncode == 128 + number
    assert "--resume" in printed
    assert 10 <= load_checkpoint(tmp_path / "last.pt", "imagen")["step"] < 4000


TWO = """
import os, sys, torch
sys.path[:0] = [{tests!r}, {root!r}]
import test_training as t
run = t.toy(t.Config(sys.argv[1], max_steps=8), noise=0.0)
del run
t.training.leave()
"""


def test_two_processes_train_on_the_same_global_batch(tmp_path):
    """Without noise, two gloo processes end with the weights of one and the loss of the whole batch."""
    script = tmp_path / "two.py"
    script.write_text(TWO.format(tests=str(ROOT / "tests"), root=str(ROOT)))
    toy(Config(str(tmp_path / "one"), max_steps=8), noise=0.0)
    process = start(*TORCHRUN, script, tmp_path / "two", OMP_NUM_THREADS="1")
    printed = process.communicate(timeout=200)[0]
    assert process.returncode == 0, printed
    one, two = (load_checkpoint(tmp_path / name / "last.pt", "toy") for name in ("one", "two"))
    for part in ("model", "ema"):
        torch.testing.assert_close(one[part], two[part], rtol=1e-5, atol=1e-6)
    one, two = (losses(tmp_path / name / "log.csv") for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-4)


def losses(path):
    with open(path) as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_signal_to_two_processes_stops_both_with_one_checkpoint(tmp_path):
    """torchrun passes the signal on at different moments; the processes agree at the next log."""
    command = digits(tmp_path / "run", "--max_steps", 4000, "--save_every", 4000)
    process = start(*TORCHRUN, *command, OMP_NUM_THREADS="1")
    for line in process.stdout:
        if "step 10/" in line:
            process.send_signal(signal.SIGTERM)
            break
    printed = process.communicate(timeout=200)[0]
    assert "stopped by SIGTERM at step" in printed, printed
    assert 10 <= load_checkpoint(tmp_path / "run/last.pt", "imagen")["step"] < 4000


def test_torchrun_trains_imagen_with_one_writer(tmp_path):
    process = start(*TORCHRUN, *digits(tmp_path / "run", "--max_steps", 4), OMP_NUM_THREADS="1")
    printed = process.communicate(timeout=200)[0]
    assert process.returncode == 0, printed
    assert printed.count("sample again:") == 1
    assert len((tmp_path / "run/log.csv").read_text().splitlines()) == 3


def test_bf16_where_the_hardware_has_it():
    with training.autocast(CPU, "bf16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with training.autocast(CPU, "fp32"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    with training.autocast(CPU, "auto"):
        assert ((torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16) == training.has_bf16(CPU)
