"""training.py: randomness, EMA, checkpoints, resume after kill -9, signals, two processes."""

import contextlib
import copy
import csv
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY

import training
from files import UserError, load_checkpoint, load_weights, show, write_atomic
from training import Run, batch_indices, not_fatal, pick_device, seed_step

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Config:
    out: str
    seed: int = 0
    max_steps: int = 10
    batch_size: int = 4
    lr: float = 1e-2
    muon_lr: float = 0.0  # above 0, Muon trains the matrix
    cooldown: float = 0.0
    warmup: int = 4
    ema_decay: float = 0.9
    log_every: int = 2
    save_every: int = 4
    sample_every: int = 1000
    resume: bool = False
    width: int = 1

    kind = "toy"


X = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))


def begin(cfg, inputs=3, samples=32):
    net, facts = torch.nn.Linear(inputs, 1), dict(samples=samples)
    matrices = [net.weight] if cfg.muon_lr else []
    more = dict(matrices=matrices, cooldown=cfg.cooldown)
    return Run(cfg, net, CPU, facts, cfg.out, cfg.max_steps, cfg.batch_size, **more)


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


@pytest.mark.parametrize("muon_lr", [0.0, 0.05])
def test_update_is_the_optimizers_with_warmup_clipping_and_a_ramped_ema(muon_lr, tmp_path):
    """Against the same three steps written out."""
    run = toy(Config(str(tmp_path / "a"), max_steps=3, muon_lr=muon_lr))
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 1)
    opts = [torch.optim.AdamW([net.bias] if muon_lr else net.parameters(), lr=1e-2, weight_decay=0.0)]
    opts += [torch.optim.Muon([net.weight], lr=muon_lr, weight_decay=0.0)] if muon_lr else []
    ema = None
    for step in (1, 2, 3):
        batch = batch_indices(32, 4, 0, step)
        seed_step(0, step)
        target = X[batch].sum(1, keepdim=True) + 0.1 * torch.randn(4, 1)
        (net(X[batch]) - target).square().mean().backward()
        norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
        assert norm > 1  # the clipping is on
        for p in net.parameters():
            p.grad /= norm
        for opt, lr in zip(opts, [1e-2, muon_lr], strict=False):
            opt.param_groups[0]["lr"] = lr * step / 4
            opt.step()
            opt.zero_grad()
        decay = min(0.9, (1 + step) / (10 + step))
        now = net.weight.detach().clone()
        ema = now if ema is None else decay * ema + (1 - decay) * now
    torch.testing.assert_close(run.net.weight, net.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run.ema.module.weight, ema, rtol=1e-5, atol=1e-6)
    assert not torch.equal(run.ema.module.weight, run.net.weight)


def test_rates_rise_in_the_warmup_and_fall_to_0_in_the_last_steps(tmp_path):
    run = toy(Config(str(tmp_path), muon_lr=0.05, cooldown=0.4, log_every=1))
    rows = [line.split(",") for line in (tmp_path / "log.csv").read_text().splitlines()[1:]]
    shares = [float(row[2]) / 1e-2 for row in rows]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25], rel=0.01)
    assert run.opts["muon"].param_groups[0]["lr"] == pytest.approx(0.05 / 4)


def test_rates_fall_to_0_at_the_last_second_where_seconds_end_a_run(tmp_path):
    run, shares = begin(Config(str(tmp_path), max_steps=1000, cooldown=0.4, warmup=0, log_every=1)), []
    for step, batch in run.steps(len(X), seconds=10):
        run.seconds = 2.0 * step
        run.update(run.model(X[batch]).square().mean())
        shares.append(run.opts["opt"].param_groups[0]["lr"] / 1e-2)
    assert shares == pytest.approx([1, 1, 1, 0.5, 0], abs=0.01)


@pytest.mark.parametrize("muon_lr", [0.0, 0.05])
def test_every_parameter_is_in_one_group_and_stepped_once(muon_lr, tmp_path):
    run = toy(Config(str(tmp_path), muon_lr=muon_lr))
    grouped = [p for opt in run.opts.values() for group in opt.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, run.net.parameters()))
    assert all(state["step"] == 10 for state in run.opts["opt"].state.values())


@pytest.mark.parametrize("muon_lr", [0.0, 0.05])
def test_resume_ends_with_the_same_bits(muon_lr, tmp_path):
    whole = toy(Config(str(tmp_path / "whole"), max_steps=10, muon_lr=muon_lr))
    toy(Config(str(tmp_path / "parts"), max_steps=6, muon_lr=muon_lr))
    parts = toy(Config(str(tmp_path / "parts"), max_steps=10, muon_lr=muon_lr, resume=True))
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

    return all(equal(a.get(k), b.get(k)) for k in ("step", "model", "ema", "opt", "muon", "facts"))


def test_resume_refuses_another_model_or_other_data_and_names_it(tmp_path):
    cfg = Config(str(tmp_path))
    toy(cfg)
    with pytest.raises(UserError, match="--resume .* --out"):
        toy(cfg)
    with pytest.raises(UserError, match="--width 2, but .* was trained with 1"):
        toy(replace(cfg, resume=True, width=2))
    with pytest.raises(UserError, match="its samples is 31, but .* was trained with 32"):
        begin(replace(cfg, resume=True), samples=31)
    with pytest.raises(
        UserError, match="does not fit this version of the script, or these settings .*weight"
    ):
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
    for error in (RuntimeError("file write failed"), OSError(28, "No space left on device")):

        def write(file, error=error):
            file.write(b"half")
            raise error

        with pytest.raises(
            UserError, match=f"f could not be written .*{error.args[-1]}.* one before is kept"
        ):
            write_atomic(path, write)
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
    with pytest.raises(UserError, match="last.pt is not as toy.py writes it"):
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
    with pytest.raises(UserError, match="does not fit .*weight"):
        load_weights(torch.nn.Linear(3, 1), torch.nn.Linear(4, 1).state_dict(), path)


def test_pick_device():
    assert pick_device("auto").type == "cpu" and pick_device("cpu").type == "cpu"  # conftest hides the GPUs
    with pytest.raises(UserError, match="--device cuda is not available here; choose one of cpu"):
        pick_device("cuda")


# -- nothing lost ------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_a_checkpoint_is_noticed_or_changes_nothing(tmp_path):
    toy(Config(str(tmp_path)))
    path, rng, noticed = tmp_path / "last.pt", random.Random(0), 0
    sound, state = path.read_bytes(), load_checkpoint(path, "toy")
    for _ in range(150):
        flipped = bytearray(sound)
        flipped[rng.randrange(len(sound))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            assert str(load_checkpoint(path, "toy")) == str(state)
        except UserError:
            noticed += 1
    assert noticed > 50


def test_a_folder_is_one_runs_at_a_time_and_free_after_a_kill(tmp_path):
    code = "import time; from test_training import Config, begin\n"
    code += f"run = begin(Config({str(tmp_path)!r})); print('ready', flush=True); time.sleep(60)"
    here = dict(cwd=ROOT / "tests", stdout=subprocess.PIPE, text=True)
    other = subprocess.Popen([sys.executable, "-c", code], **here)
    assert other.stdout.readline() == "ready\n"
    with pytest.raises(UserError, match=f"in use by another run .process {other.pid} on "):
        toy(Config(str(tmp_path)))
    other.kill()
    other.wait()
    theirs = [tmp_path / ".notes.tmp", tmp_path / "other/.last.pt.99.tmp"]
    ours = [tmp_path / ".last.pt.123.tmp", tmp_path / "samples/.grid.png.123.tmp"]
    for path in (*theirs, *ours):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half of a file")
    assert toy(Config(str(tmp_path))).step == 10
    assert all(path.exists() for path in theirs) and not any(path.exists() for path in ours)


@pytest.mark.parametrize("part", ["weight", "average"])
def test_a_weight_that_is_not_finite_is_not_saved(tmp_path, part):
    torch.manual_seed(0)
    run = begin(Config(str(tmp_path)))
    with pytest.raises(UserError, match="a weight, or its average, of step 8 is not finite"):
        for step, batch in run.steps(len(X)):
            run.update(run.model(X[batch]).square().mean())
            if step == 8:
                net = run.net if part == "weight" else run.ema.module
                net.weight.data[0, 0] = float("nan")
    assert load_checkpoint(tmp_path / "last.pt", "toy")["step"] == 4


def test_weights_that_are_not_finite_or_of_another_type_are_not_loaded(tmp_path):
    weights = torch.nn.Linear(3, 1).state_dict()
    for odd in (weights["weight"] * float("inf"), weights["weight"].double(), weights["weight"].long()):
        with pytest.raises(UserError, match="last.pt does not fit"):
            load_weights(torch.nn.Linear(3, 1), weights | dict(weight=odd), tmp_path / "last.pt")


@pytest.mark.parametrize("odd", [torch.zeros(2), torch.zeros(1), None, "x", 10**30, float("nan")])
@pytest.mark.parametrize("part, name", [("config", "width"), ("facts", "samples")])
def test_settings_and_facts_that_cannot_be_compared_are_named(tmp_path, part, name, odd):
    toy(Config(str(tmp_path), max_steps=4))
    state = load_checkpoint(tmp_path / "last.pt", "toy")
    state[part][name] = odd
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(UserError, match="last.pt"):
        toy(Config(str(tmp_path), resume=True))


@pytest.mark.parametrize("part, kept, muon_lr", [("opt", "exp_avg", 0.0), ("muon", "momentum_buffer", 0.05)])
def test_an_odd_optimizer_state_is_named(part, kept, muon_lr, tmp_path):
    toy(Config(str(tmp_path), max_steps=4, muon_lr=muon_lr))
    path = tmp_path / "last.pt"
    state = load_checkpoint(path, "toy")
    average = state[part]["state"][0][kept]
    for odd in (average[0], average * float("nan"), 3, None):
        broken = copy.deepcopy(state)
        broken[part]["state"][0][kept] = odd
        torch.save(broken, path)
        with pytest.raises(UserError, match="last.pt does not fit"):
            toy(Config(str(tmp_path), resume=True, muon_lr=muon_lr))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
@pytest.mark.parametrize("when", [3, 10])
def test_every_signal_is_obeyed_in_its_own_step_and_the_last_one_too(tmp_path, capsys, name, when):
    run = begin(Config(str(tmp_path), log_every=100, save_every=100))
    with pytest.raises(SystemExit) as end:
        for step, batch in run.steps(len(X)):
            run.update(run.model(X[batch]).square().mean())
            if step == when:
                os.kill(os.getpid(), getattr(signal, name))
    assert end.value.code == 128 + getattr(signal, name)
    assert f"stopped by {name} at step {when}, saved; add --resume" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "last.pt", "toy")["step"] == when


def test_a_signal_while_samples_are_drawn_is_obeyed_at_once(tmp_path, capsys):
    run = begin(Config(str(tmp_path), sample_every=3))
    with pytest.raises(SystemExit) as end:
        for _, batch in run.steps(len(X)):
            if run.due(3):
                with run.pause():
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(60)
            run.update(run.model(X[batch]).square().mean())
    assert end.value.code == 143 and "at step 3, saved" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "last.pt", "toy")["step"] == 3


def test_a_signal_that_nohup_ignores_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run = begin(Config(str(tmp_path)))
        for step, batch in run.steps(len(X)):
            run.update(run.model(X[batch]).square().mean())
            if step == 3:
                os.kill(os.getpid(), signal.SIGHUP)
        assert run.step == 10 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_training_in_a_thread_needs_no_signals(tmp_path):
    steps = []
    for more in (10, 12):  # and the folder is free for the next one
        cfg = Config(str(tmp_path), max_steps=more, resume=more > 10)
        thread = threading.Thread(target=lambda cfg=cfg: steps.append(toy(cfg).step))
        thread.start()
        thread.join()
    assert steps == [10, 12]


def test_samples_are_due_after_a_save_again_after_a_kill_and_disturb_no_draw(tmp_path):
    """The draws of a step come after those of the samples, which must leave no trace."""

    def train(out, every, stop=10, resume=False):
        seen, run = [], begin(Config(str(tmp_path / out), max_steps=stop, sample_every=every, resume=resume))
        for step, batch in run.steps(len(X)):
            if run.due(every):
                assert load_checkpoint(tmp_path / out / "last.pt", "toy")["step"] == step - 1
                with run.pause():
                    seen.append((step - 1, torch.randn(()).item()))
            run.update((run.model(X[batch]) - torch.randn(len(batch), 1)).square().mean())
        return [step for step, _ in seen], run.net.weight

    torch.manual_seed(0)
    steps, weight = train("a", every=3)
    assert steps == [3, 6, 9]
    torch.manual_seed(0)
    assert torch.equal(train("b", every=1000)[1], weight)
    torch.manual_seed(0)
    assert train("c", every=3, stop=6)[0] == [3]
    assert train("c", every=3, resume=True)[0] == [6, 9]


def test_rows_that_parse_survive_a_damaged_table(tmp_path):
    toy(Config(str(tmp_path)))
    path = tmp_path / "log.csv"
    header, *rows = path.read_bytes().splitlines()
    damaged = [
        b"",
        rows[0],
        b"\0" * 40,
        rows[1] + b",7",
        b"\xff\xfe",
        rows[2],
        b"6,x,1,1,1",
        rows[3][:4],
        b"1e,",
    ]
    path.write_bytes(b"\r\n".join(damaged))
    toy(Config(str(tmp_path), resume=True, max_steps=12))
    lines = path.read_bytes().splitlines()
    assert lines[:3] == [header, rows[0], rows[2]] and lines[3].startswith(b"12,") and len(lines) == 4
    path.unlink()
    toy(Config(str(tmp_path), resume=True, max_steps=14)).curve()


def test_a_folder_that_is_deleted_during_the_run_is_made_again(tmp_path):
    out = tmp_path / "run"
    run = begin(Config(str(out)))
    for step, batch in run.steps(len(X)):
        run.update(run.model(X[batch]).square().mean())
        if step == 5:
            shutil.rmtree(out)
    run.curve()
    assert load_checkpoint(out / "last.pt", "toy")["step"] == 10
    assert [row.split(",")[0] for row in (out / "log.csv").read_text().splitlines()] == [
        "step",
        "6",
        "8",
        "10",
    ]


# -- what is said ------------------------------------------------------------------------------------------


def test_out_of_memory_is_one_message_that_names_the_setting(capsys, monkeypatch):
    @dataclass(frozen=True)
    class Batches(Flags):
        batch_size: int = 3

    monkeypatch.setattr(sys, "argv", ["script.py"])
    for ask in (lambda cfg: torch.empty(10**16), lambda cfg: bytearray(10**17)):
        with pytest.raises(SystemExit) as end:
            training.run_script(Batches, ask, "")
        assert end.value.code == 2
        assert "error: out of memory" in (said := capsys.readouterr().err) and "lower --batch_size" in said


def test_a_run_outlives_its_terminal(tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)  # as a tee that Ctrl-C has ended
    with open(writer, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        assert toy(Config(str(tmp_path))).step == 10
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            broken.close()
    assert load_checkpoint(tmp_path / "last.pt", "toy")["step"] == 10


def test_a_curve_of_an_earlier_end_is_no_sign_of_this_one(tmp_path):
    toy(Config(str(tmp_path))).curve()
    toy(Config(str(tmp_path), resume=True, max_steps=12))
    assert not (tmp_path / "curve.png").exists()


def test_other_errors_are_not_taken_for_a_users(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(RuntimeError, match="a bug"):
        training.run_script(Flags, lambda cfg: (_ for _ in ()).throw(RuntimeError("a bug")), "")
    assert not training.is_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))


def test_a_signal_outside_of_a_training_is_one_line(capsys, monkeypatch):
    def main(cfg):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as end:
        training.run_script(Flags, main, "")
    assert end.value.code == 130
    assert capsys.readouterr().out == "stopped by SIGINT; what was saved is kept\n"
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_what_steers_a_terminal_is_written_out(capsys, tmp_path):
    show(tmp_path, "names", ["\x1b[2Jcat", "Überraschung 猫"])
    assert "\\x1b[2Jcat\nÜberraschung 猫\n" in capsys.readouterr().out
    with not_fatal("scored"):
        raise ValueError("empty \x07 vocabulary")
    assert capsys.readouterr().out == "not scored: empty \\x07 vocabulary\n"
    with not_fatal("scored"):
        torch.empty(10**16)
    assert capsys.readouterr().out.startswith("not scored: ")
    with pytest.raises(KeyError), not_fatal("scored"):  # a mistake of ours
        raise KeyError


def test_a_terminal_that_knows_only_ascii_gets_replacements(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.setattr(sys, "stdout", terminal)
    training.run_script(Flags, lambda cfg: print("猫"), "")
    terminal.flush()
    assert terminal.buffer.getvalue() == b"\\u732b\n"


def test_a_curve_is_drawn_for_any_name_of_a_folder(tmp_path):
    out = tmp_path / "a$b_$c {猫}\udcff"
    assert toy(Config(str(out))).curve().stat().st_size > 1000


def test_a_checkpoints_settings_must_be_of_the_types_of_this_version(tmp_path):
    good = dict(dataset="plain", size="tiny", lr=1, steps=3)
    assert training.saved_config(Flags, good, "last.pt") == Flags()
    for odd in (dict(lr="x"), dict(steps=1.5), dict(dataset=None), dict(more=1)):
        with pytest.raises(UserError, match="last.pt does not fit this version"):
            training.saved_config(Flags, good | odd, "last.pt")


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
