"""Faults that meet a run: kills, full disks, a second run, signals, numbers that are not finite, torchrun.

Each kind yields (fault, case, what did not hold or "", the folder of the case).
"""

import csv
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import fault_tools as ft
import torch
from fault_tools import (
    LAST,
    LOG,
    ROOT,
    RUNS,
    WORK,
    after_resume,
    command,
    disturbed,
    fresh,
    script,
    undisturbed,
)

import training

LONG, RARE = 40, dict(save_every=20, log_every=5, sample_every=16)  # a run that is long enough to be met
NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
ENDS = {  # where a signal comes towards the end: in the last step of a stage, or when this file is opened
    "imagen": [
        ("at the last step", ""),
        *(("after training", f"{x}.png") for x in ("curve", "grid", "film")),
    ],
    "textgen": [("at the last step", ""), ("at the last step", "vae")]
    + [("after training", "curve.png"), ("after training", "samples_")],
    "reason": [("at the last step", ""), ("after training", "focus.txt"), ("after training", "curve.png")],
    "tokengen": [
        ("at the last step", ""),
        *(("after training", x) for x in ("curve.png", "focus.txt", "focus.gif")),
    ],
}


# -- what happens in a child -------------------------------------------------------------------------------


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def at_step(step: int, act, stage: str = "") -> None:
    """At that step (of textgen of that stage) act(run, loss) comes first, and gives the loss."""
    update = training.Run.update

    def changed(run, loss):
        here = run.step == step and (run.out.name == "vae") == (stage == "vae")
        return update(run, act(run, loss) if here else loss)

    training.Run.update = changed


def at_files(out: Path, meet) -> None:
    """meet(event, path, flags) comes before each file operation that changes something below out."""

    def hook(event, args):
        if event in ("open", "os.rename", "os.remove", "os.mkdir"):
            path, flags = args[event == "os.rename"], args[2] if event == "open" else os.O_RDWR
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
            if writes and isinstance(path, (str, os.PathLike)) and str(path).startswith(str(out)):
                meet(event, str(path), flags)

    sys.addaudithook(hook)


def crash_at(out: Path, point: int) -> None:
    """Die at a point: before a file operation, or right behind an opening, when the file is still empty."""
    seen = [0]

    def meet(event, path, flags):
        for behind in (False, True)[: 1 + (event == "open")]:
            seen[0] += 1
            if seen[0] == point:
                if behind:
                    os.open(path, flags, 0o644)
                send(signal.SIGKILL)

    at_files(out, meet)


def signal_at(out: Path, what: str, number: int) -> None:
    """The signal comes when a file with `what` in its name is opened for the first time."""
    left = [number]

    def meet(event, path, flags):
        if left and event == "open" and what in path:
            send(left.pop())

    at_files(out, meet)


def signalled(number: int, run, loss):
    send(number)
    return loss


def swap(what: str, run, loss):
    """Put a folder where a file is, a file where a folder is; delete the run's folder for ""."""
    path = run.out / what
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text("a file") if what else None
    else:
        path.unlink(missing_ok=True)
        path.mkdir()
    return loss


def poison(how: str, run, loss):
    """Make the loss not finite, or a gradient, a weight, or an average of one."""
    step, first = run.step, next(run.ema.parameters() if how == "EMA" else run.net.parameters())
    if how == "gradient":
        first.register_hook(lambda gradient: gradient * float("nan") if run.step == step else gradient)
    elif how in ("weight", "EMA"):
        first.data.view(-1)[0] = float("nan")
    return loss * float(how.split()[1]) if " " in how else loss


# -- kills -------------------------------------------------------------------------------------------------


def kill(short: bool):
    """kill -9 at random moments, half of them while a temporary file is there; each run up to three times."""
    for target, name, steps, more in (
        ("imagen", "imagen", LONG, {}),
        ("textgen's VAE", "textgen", 2, dict(vae_steps=LONG)),
        ("textgen's diffusion", "textgen", LONG, dict(vae_steps=2)),
        ("reason", "reason", LONG, {}),
        ("tokengen", "tokengen", LONG, {}),
    ):
        args = command(name, steps, sample_every=16, **more)
        for trial in range(1 if short else 16):
            rng, out = random.Random(f"{target} {trial}"), fresh()
            meddle = partial(kill_soon, rng, out, 0.9 * undisturbed(name, *args)[1])
            for _ in range(rng.randint(0, 2)):
                meddle(pid := ft.start(script(name, *args, "--out", out, "--resume")))
                ft.ended(pid)
            yield (
                f"kill -9, {target}",
                trial,
                disturbed(name, args, out, ["signal 9", "ok"], meddle=meddle),
                out,
            )


def kill_soon(rng: random.Random, out: Path, longest: float, pid: int) -> None:
    ft.wait_for(pid, rng.uniform(0.1, longest))
    if rng.random() < 0.5:
        ft.wait_for(pid, 5, partial(ft.temporaries, out))
        time.sleep(rng.uniform(0, 0.002))
    os.kill(pid, signal.SIGKILL)


def crash(short: bool):
    """kill -9 at every single file operation of a run, before it and right behind each opening."""
    for name in RUNS:
        for point in range(10 if short else 1, 10_000, 50 if short else 1):
            args, out = command(name), fresh()
            got, text = ft.call(script(name, *args, "--out", out), partial(crash_at, out, point))
            if got == "ok":
                break
            wrong = ft.unwanted(got, text, ["signal 9"]) or after_resume(name, args, out)
            yield f"kill -9 at a file operation, {name}", f"point {point}", wrong, out


# -- disks and folders -------------------------------------------------------------------------------------


def half(name: str, args: list, step: int = 5) -> Path:
    """The folder of a run that was killed at that step."""
    out = fresh("half")
    ft.call(script(name, *args, "--out", out), partial(at_step, step, partial(signalled, signal.SIGKILL)))
    return out


def mount(*options) -> bool:
    """Mount a tmpfs; whether that is allowed here."""
    return not subprocess.run(["mount", *map(str, options)], capture_output=True).returncode


def disk(short: bool):
    """Full disks: a tmpfs of many sizes where mounting is allowed, and a limit on the size of a file."""
    folder = WORK / "mounted"
    folder.mkdir()
    for name in RUNS:
        args = command(name)
        sizes = [path.stat().st_size // 1024 for path in undisturbed(name, *args)[0].rglob("*")]
        for kib in spread(4, sum(sizes) + 300, (name == "imagen") if short else 24):
            if mount("-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder):
                got, text = ft.call(script(name, *args, "--out", folder / "run"))
                mount("-o", "remount,size=64m", folder)
                wrong = ft.unwanted(got, text) or after_resume(name, args, folder / "run")
                subprocess.run(["umount", folder], check=True)
                yield f"disk full, a tmpfs, {name}", f"{kib} KiB", wrong, None
        begun = half(name, args)
        for kib in spread(8, max(sizes) + 2, 1 if short else 20):
            out = shutil.copytree(begun, fresh())
            limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (kib * 1024,) * 2)
            wrong = disturbed(name, args, out, ["ok", "message"], limit)
            yield f"disk full, RLIMIT_FSIZE, {name}", f"{kib} KiB", wrong, out


def spread(low: int, high: int, n: int) -> list[int]:
    """n numbers between the two."""
    return [low + (high - low) * (2 * i + 1) // (2 * n) for i in range(n)]


def folders(short: bool):
    """Files that become unwritable in mid-run, until they are taken away; a run's folder that is deleted."""
    whats = ["", "log.csv", "eval.csv", "last.pt", "config.json", "samples"]
    for name, what in [(name, what) for name in RUNS for what in whats[: 1 if short else 6]]:
        out, args = fresh(), command(name, log_every=1 if what else 4)  # 4: the first file anew is last.pt
        got, text = ft.call(script(name, *args, "--out", out), partial(at_step, 5, partial(swap, what)))
        path = (out / LAST[name]).with_name(what or "none")
        if path.is_file() if what == "samples" else path.is_dir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        but = {"": "*", "samples": "000004.*"}.get(what, what)  # what was taken away stays away
        wrong = ft.unwanted(got, text) or after_resume(name, args, out, but)
        yield f"unwritable file, deleted folder, {name}", f"{what or 'all'} gone at step 5", wrong, out


def damaged(lines: list[str]) -> dict[str, bytes]:
    """A table of numbers in many states of damage."""
    whole = "\n".join([*lines, ""]).encode()
    head, body = whole[: len(lines[0]) + 1], whole[len(lines[0]) + 1 :]
    return {
        "last row torn": whole[:-4].rpartition(b",")[0],
        "blank lines": whole.replace(b"\n", b"\n\n"),
        "NUL behind": whole + bytes(40),
        "NUL in a row": head + bytes(9) + b"\n" + body,
        "words": head + b"what,is,this,row,for\n" + body,
        "empty": b"",
        "no header": body,
        "header only": head,
        "UTF-16": whole.decode().encode("utf-16"),
        "not UTF-8": whole + b"\xff\xfe\x00\xd8\n",
        "nan": whole + b"nan,nan,nan,nan,nan\n",
        "windows line ends": whole.replace(b"\n", b"\r\n"),
    }


def logs(short: bool):
    """log.csv and eval.csv damaged before a resume, which keeps the rows that parse, and those alone."""
    for name, what in [
        ("imagen", "log.csv"),
        ("textgen", "log.csv"),
        ("reason", "log.csv"),
        ("reason", "eval.csv"),
        ("tokengen", "eval.csv"),
    ]:
        args = command(name)
        begun = half(name, args)
        _, *rows = lines = (begun / LAST[name]).with_name(what).read_text().splitlines()
        for case, raw in list(damaged(lines).items())[7 if short else 0 :: 9 if short else 1]:
            out = shutil.copytree(begun, fresh())
            path = (out / LAST[name]).with_name(what)
            path.write_bytes(raw)
            wrong = after_resume(name, args, out, but=what)
            kept = path.read_text(errors="replace").splitlines()[1:]
            whole = raw.decode(errors="replace").splitlines()
            steps = {row.split(",")[0] for row in rows if row in whole and int(row.split(",")[0]) <= 4}
            lost = steps - {row.split(",")[0] for row in kept}
            odd = [row for row in kept if not re.fullmatch(r"\d+(,[\d.e+-]+)+", row)]
            wrong = wrong or (f"lost {lost}, kept {odd}" if lost or odd else "")
            yield f"damaged log.csv, eval.csv, {name}", f"{what}, {case}", wrong, out


# -- two runs, signals -------------------------------------------------------------------------------------


def two(short: bool):
    """Two runs in one folder: one ends as if alone, the other exits with 2 and says who holds the folder."""
    for name in RUNS:
        steps = LONG * (2 if name in ("reason", "tokengen") else 1)  # their steps are short
        args, files = command(name, steps, **RARE), [WORK / "first", WORK / "second"]
        for delay, more in [(0.15, []), (0, []), (0, ["--resume"])] * 5 if not short else [(0.15, [])]:
            out, pids = half(name, args, 25) if more else fresh(), []
            for file in files:
                pids.append(ft.start(script(name, *args, "--out", out, *more), log=file))
                time.sleep(delay)
            ends = [ft.ended(pid, file) for pid, file in zip(pids, files, strict=True)]
            if sorted(got for got, _ in ends) == ["message", "ok"]:
                (_, said), won = max(
                    zip(ends, pids[::-1], strict=True), key=lambda end: end[0][0] == "message"
                )
                named = str(out) in said and (not delay or str(won) in said)  # at once, it has not yet said
                wrong = "" if named else f"{said[-200:]!r} does not say that {won} holds {out}"
                wrong = wrong or ", ".join(ft.differences(undisturbed(name, *args)[0], out))
            else:
                wrong = "; ".join(ft.unwanted(got, text, []) for got, text in ends)
            yield f"two runs in a folder, {name}", f"{delay} s later {more}", wrong, out


def obeyed(name: str, out: Path, number: int, stage: str, got: str, text: str) -> str:
    """What is wrong with a run that was sent a signal: no message, steps lost, or that it went on."""
    if got == "ok" or not text:  # it was over, or had not begun
        return ""
    logged = [0, *map(int, re.findall(r"^step (\d+)/", text, re.M))][-1]
    if stage == "vae" and (out / LAST[name]).exists():
        return "the next stage was trained"
    said = f"{number.name} is not named" if number.name not in text else ""
    return said or (f"step {logged} is not saved" if saved_step(name, out) < logged else "")


def saved_step(name: str, out: Path) -> int:
    """The step of the last checkpoint, of the stage that came last."""
    there = [path for path in (out / LAST[name], out / "vae/last.pt") if path.exists()]
    return torch.load(there[0], weights_only=True)["step"] if there else 0


def signals(short: bool):
    """Signals: the step is saved, the exit status is 128 + the number, a resume ends as if none came."""
    for name in RUNS:
        for case, where, number in [(*end, number) for end in ENDS[name] for number in NUMBERS][
            :: 5 if short else 1
        ]:
            args, out = command(name), fresh()
            before = partial(signal_at, out, where, number)
            if case == "at the last step":
                before = partial(at_step, 8, partial(signalled, number), where)
            check = partial(obeyed, name, out, number, where)
            wrong = disturbed(name, args, out, [f"status {128 + number}"], before, check=check, but="log.csv")
            yield f"signals {case}, {name}", f"{number.name} {where}", wrong, out
    for name in ["imagen"] if short else RUNS:
        args = command(name, LONG, **RARE)
        for i, number in enumerate(NUMBERS[:1] if short else NUMBERS * 8):
            out, seconds = fresh(), random.Random(f"{name} {i}").uniform(0.2, undisturbed(name, *args)[1])
            wanted = [f"status {128 + number}", "ok", f"signal {number}"]
            check = partial(obeyed, name, out, number, "")
            meddle = partial(send_soon, seconds, number)
            wrong = disturbed(name, args, out, wanted, meddle=meddle, check=check, but="log.csv")
            yield f"signals at random, {name}", f"{i}, {number.name}", wrong, out
        for first, second in [(a, b) for a in NUMBERS[:2] for b in NUMBERS][:: 7 if short else 1]:
            out, meddle = fresh(), partial(send_twice, first, second)
            wanted = [f"status {128 + first}", f"signal {second}"]
            wrong = disturbed(name, args, out, wanted, meddle=meddle, but="log.csv")
            yield f"signals twice, {name}", f"{first.name}, {second.name}", wrong, out
        ignore, out = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN), fresh()
        meddle = partial(send_twice, signal.SIGHUP, signal.SIGHUP)
        yield f"SIGHUP under nohup, {name}", "", disturbed(name, args, out, ["ok"], ignore, meddle), out


def send_soon(seconds: float, number: int, pid: int) -> None:
    ft.wait_for(pid, seconds)
    os.kill(pid, number)


def send_twice(first: int, second: int, pid: int) -> None:
    ft.wait_for(pid, 60, lambda: "step 5/" in LOG.read_text())
    os.kill(pid, first)
    time.sleep(0.005)
    os.kill(pid, second)


# -- not finite --------------------------------------------------------------------------------------------


def finite(short: bool):
    """NaN and inf at a step: it is named, the last good checkpoint stays, nothing is drawn."""
    hows = ["loss nan", "loss inf", "loss -inf", "gradient", "weight", "EMA"]
    everys = [(1, 2, 4), (5, 3, 2), (50, 50, 4)]  # log, save, sample
    cases = [(how, every, k) for k in (8, 3, 6) for every in everys for how in hows]
    places = [("imagen", ""), ("textgen", "vae"), *((name, "") for name in ("textgen", "reason", "tokengen"))]
    for n, (name, stage) in enumerate(places):
        for how, (log, save, draw), k in cases[n + 2 : n + 3] if short else cases:
            args, out = command(name, log_every=log, save_every=save, sample_every=draw), fresh()
            before = partial(at_step, k, partial(poison, how), stage)
            check = partial(named, out, how, k, stage)
            but = "" if log == 1 else "log.csv"  # its first row after a resume is of the steps since then
            wrong = disturbed(name, args, out, ["message"], before, check=check, but=but)
            where = f"{how} at step {k}, log {log}, save {save}, sample {draw}"
            yield f"not finite, {name} {stage}".strip(), where, wrong, out


def named(out: Path, how: str, k: int, stage: str, got: str, text: str) -> str:
    """What is wrong with the message of a run that was poisoned at step k, what it saved or what it drew."""
    lines = [line for line in text.splitlines() if "not finite" in line]
    said = [int(step) for step in re.findall(r"step (\d+)", lines[0])] if lines else [0]
    if said[0] != k and not (how in ("weight", "EMA") and said[0] > k):
        return f"step {k} is not named: {lines}"
    for path in out.rglob("last.pt"):
        if not ft.is_finite(torch.load(path, weights_only=True)):
            return f"{path} is saved"
    drawn = [path.name for path in out.rglob("samples/*") if path.stem.isdigit() and int(path.stem) >= k]
    for path in out.rglob("eval.csv"):
        drawn += [row["step"] for row in csv.DictReader(path.open()) if int(row["step"]) >= k]
    return f"{drawn} was drawn" if drawn and not stage else ""


# -- torchrun ----------------------------------------------------------------------------------------------


def torchrun(*args):
    """What runs a script under torchrun with two processes in a child, of which it becomes the agent."""
    head = ["-u", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    return partial(os.execv, sys.executable, [sys.executable, *head, *map(str, args)])


def rank_of(agent: int, rank: int) -> int:
    """The process number of a rank."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return next(
        int(pid) for pid in children if b"\0RANK=%d\0" % rank in Path(f"/proc/{pid}/environ").read_bytes()
    )


def dead_rank(short: bool):
    """torchrun, two processes: SIGTERM to the agent, kill -9 of a rank, NaN in one rank, wrong flags."""
    for case, name, rank in [
        ("SIGTERM", "imagen", -1),
        ("SIGTERM", "textgen", -1),
        ("SIGTERM", "reason", -1),
        ("SIGTERM", "tokengen", -1),
        ("kill -9", "imagen", 0),
        ("kill -9", "imagen", 1),
    ][: 1 if short else 6]:
        out, last = fresh(), dict(textgen="--diffusion_steps").get(name, "--max_steps")
        args = command(name, 4, log_every=100_000, save_every=10, sample_every=100_000)
        pid = ft.start(torchrun(ROOT / f"{name}.py", *args, last, 100_000, "--out", out))
        ft.wait_for(pid, 120, (out / LAST[name]).exists)
        os.kill(pid if rank < 0 else rank_of(pid, rank), signal.SIGTERM if rank < 0 else signal.SIGKILL)
        got, text = ft.ended(pid, seconds=20)
        ignored = got == "hang" or rank < 0 and "stopped by SIGTERM" not in text
        wrong = ft.unwanted(got, text, []) if ignored else ""
        step = saved_step(name, out)
        end = ft.call(script(name, *args, last, step + 2, "--out", out, "--resume"))
        wrong = wrong or ("" if step >= 10 else f"step {step} saved") or ft.unwanted(*end, ["ok"])
        yield f"torchrun, {case}, {name}", f"rank {rank}", wrong, out
    for said, more in [
        ("step 7 is not finite", []),
        ("lr must be", ["--lr", 7]),
        ("what", ["--what", 1]),
        ("nowhere", ["--dataset", "nowhere"]),
        ("batch of 15", ["--batch_size", 15]),
    ][: 0 if short else 5]:
        out = fresh()
        args = [*command("imagen", 12, save_every=20, sample_every=20), "--out", out, *more]
        got, text = ft.ended(ft.start(torchrun(Path(__file__), *args)), seconds=60)
        errors = [line for line in text.splitlines() if said in line]
        wrong = ft.unwanted(got, text, []) if got == "hang" or (out / "last.pt").exists() else ""
        wrong = wrong or (f"said {len(errors)} times: {errors}" if len(errors) != 1 else "")
        yield "torchrun, one message for a mistake", str(more or "NaN in one rank"), wrong, out


if __name__ == "__main__":  # under torchrun, see above: the loss of the second process is poisoned at step 7
    import imagen

    at_step(7, lambda run, loss: loss * float("nan") if run.rank == 1 else loss)
    training.run_script(imagen.Config, imagen.main, "")
