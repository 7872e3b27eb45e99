"""Faults in what a script reads: checkpoints, command lines, files of texts, problems and images.

Each kind yields (fault, case, what did not hold or "", the folder or file of the case).
"""

import copy
import dataclasses
import functools
import importlib
import io
import os
import pickle
import random
import resource
import shutil
import struct
import sys
import zipfile
from pathlib import Path

import fault_tools as ft
import torch
from conftest import write_idx
from fault_tools import LAST, RUNS, TXT, WORK, command, fresh, script
from PIL import Image

import data
import tasks
import tokengen
import training

EXPLODED = WORK / "exploded"  # what a hostile pickle makes, if its code runs


def little_memory() -> None:
    """In a child: what asks for more than 10 GiB fails."""
    resource.setrlimit(resource.RLIMIT_AS, (10 << 30,) * 2)


def flip(rng: random.Random, raw: bytes, low: int = 0, high: int | None = None, n: int = 1) -> bytes:
    """Flip n random bits of the bytes low to high."""
    out = bytearray(raw)
    for _ in range(n):
        out[rng.randrange(low, high or len(raw))] ^= 1 << rng.randrange(8)
    return bytes(out)


# -- checkpoints -------------------------------------------------------------------------------------------

DAMAGED = "cut byte,byte,pickle,tensor,tensor,tensor,16 bytes,directory,hole".replace(
    " byte,", ",byte,"
).split(",")
REFUSED = ["other file", "hostile", "hostile", "not finite", "not finite", "record", "zip bomb"]
WHOLE = "config config config facts facts facts part part lacks lacks more dtype shape opt opt opt".split()
ODD = [
    None,
    "x",
    "",
    -1,
    0,
    1,
    1.5,
    10**30,
    -(10**9),
    float("nan"),
    float("inf"),
    [],
    {},
    True,
    [1, 2],
    [0, 0],
]
ODD += ["../../etc", 7, b"x", torch.zeros(2)]
SHAPES = [torch.zeros(1).expand(10**10), torch.zeros(1).expand(2**40), torch.zeros(0), torch.zeros(())]
SHAPES += [torch.zeros(3, 3).to_sparse(), torch.empty(3, device="meta")]
TYPES = [torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64]


class Bomb:
    """What a hostile pickle calls when it is loaded."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def damage(kind: str, rng: random.Random, sound: bytes) -> bytes:
    """A checkpoint that was damaged: it is refused, or the result is the same."""
    at = rng.randrange(len(sound) - 4096)
    with zipfile.ZipFile(io.BytesIO(sound)) as file:
        records = [info for info in file.infolist() if info.file_size > 8]
    record = rng.choice(
        [info for info in records if ("data.pkl" if kind == "pickle" else "/data/") in info.filename]
    )
    begin = record.header_offset + 30 + sum(struct.unpack_from("<HH", sound, record.header_offset + 26))
    if kind == "cut":
        return sound[:at]
    if kind == "hole":
        return sound[:at] + bytes(4096) + sound[at + 4096 :]
    if kind == "byte":
        return flip(rng, sound)
    if kind == "directory":
        return flip(rng, sound, len(sound) - 3000)
    return flip(rng, sound, begin, begin + record.file_size, 16 if kind == "16 bytes" else 1)


def forge(kind: str, rng: random.Random, sound: bytes, state: dict, foreign: bytes) -> bytes:
    """No checkpoint of this script, a hostile one, or numbers that are not finite: refused where used."""
    if kind == "other file":
        part = dict(state)
        del part[rng.choice(list(state))]
        files = [foreign, b"", b"{}", rng.randbytes(2000), bytes(len(sound)), b"PK\x05\x06" + bytes(18)]
        return rng.choice([*files, saved(part), saved([1]), saved("x"), saved({1}), pickle.dumps(dict(a=1))])
    if kind == "hostile":
        path, write = str(EXPLODED), f"open({str(EXPLODED)!r}, 'w')"
        calls = [(os.system, (f"touch {path}",)), (eval, (write,)), (exec, (write,)), (open, (path, "w"))]
        bomb, place = Bomb(*rng.choice(calls)), rng.choice([*state, "top", "alone"])
        new = bomb if place == "alone" else state | {place: bomb}
        return rng.choice([saved(new), saved(new, _use_new_zipfile_serialization=False), pickle.dumps(bomb)])
    if kind == "not finite":
        return with_weight(rng, state, lambda w: torch.full_like(w, rng.choice([float("nan"), float("inf")])))
    out, name = (
        io.BytesIO(),
        "data.pkl" if kind == "zip bomb" else rng.choice(["data.pkl", "data/0", "data/3"]),
    )
    with zipfile.ZipFile(io.BytesIO(sound)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.namelist():
            if not record.endswith(f"/{name}"):
                new.writestr(record, old.read(record))
            elif kind == "zip bomb":
                new.writestr(record, bytes(300_000_000))
    return out.getvalue()


def oddity(kind: str, rng: random.Random, state: dict) -> bytes:
    """A whole checkpoint with something odd in it: it is refused, or used as it is."""
    odd = rng.choice(ODD)
    if kind == "part":
        return saved(state | {rng.choice(list(state)): odd})
    if kind == "dtype":
        return with_weight(rng, state, lambda w: w.to(rng.choice(TYPES)))
    if kind == "shape":
        return with_weight(rng, state, lambda w: rng.choice([*SHAPES, w.flatten()[:1], w[None]]))
    if kind == "more":
        return saved(
            state | dict(config=state["config"] | {rng.choice(["new", "kind", "__class__", "self", ""]): 1})
        )
    if kind == "opt":
        name = rng.choice([name for name in training.KEPT if name in state])
        opt = copy.deepcopy(state[name])
        one, group = opt["state"][rng.choice(list(opt["state"]))], opt["param_groups"][0]
        part, key = rng.choice(
            [(opt["state"], 0), (group, "lr"), (group, "params"), *((one, key) for key in one)]
        )
        part[key] = rng.choice(
            [odd, part[key][:-1] if key == "params" else None, list(one.values())[-1].flatten()[:1]]
        )
        return saved(state | {name: opt})
    place = rng.choice(["config", "facts", "model", "ema"]) if kind == "lacks" else kind
    new = dict(state[place])
    name = rng.choice(list(new))
    new[name] = odd
    if kind == "lacks":
        del new[name]
    return saved(state | {place: new})


def with_weight(rng: random.Random, state: dict, change) -> bytes:
    """The checkpoint with change(weight) for a weight, or its average."""
    part = rng.choice(["model", "ema"])
    name = rng.choice([key for key, w in state[part].items() if w.is_floating_point()])
    return saved(state | {part: state[part] | {name: change(state[part][name])}})


def saved(state, **how) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, **how)
    return file.getvalue()


def checkpoint(short: bool):
    """Mutated checkpoints, read by --sample_from and by --resume."""
    bases = {name: ft.undisturbed(name, *command(name))[0] for name in RUNS}
    for name, base in bases.items():
        sound = (base / LAST[name]).read_bytes()
        foreign = (bases["imagen" if name == "reason" else "reason"] / "last.pt").read_bytes()
        state = torch.load(io.BytesIO(sound), weights_only=True)
        wanted = [outcome(name, base, sound, resume) for resume in (False, True)]
        assert [got for got, _, _ in wanted] == ["ok", "ok"], wanted
        plan = [*DAMAGED, *REFUSED, *WHOLE]
        for i in range(6 if short else 352):
            kind, rng = plan[(i * 5 if short else i) % len(plan)], random.Random(f"{name} {i}")
            resume = bool((i + i // len(plan)) % 2)
            if kind in DAMAGED:
                raw = damage(kind, rng, sound)
            else:
                raw = forge(kind, rng, sound, state, foreign) if kind in REFUSED else oddity(kind, rng, state)
            got, text, result = outcome(name, base, raw, resume)
            wrong = "code was run" if EXPLODED.exists() else ft.unwanted(got, text)
            if got == "ok" and kind not in WHOLE and result != wanted[resume][2]:
                wrong = wrong or "read without a word, with another result"
            file = WORK / "mutated.pt"
            file.write_bytes(raw)
            yield (
                f"mutated checkpoints, {name}",
                f"{i}, {kind}, {'resume' if resume else 'sample'}",
                wrong,
                file,
            )


def outcome(name: str, base: Path, raw: bytes, resume: bool) -> tuple[str, str, object]:
    """How reading these bytes ends, what it prints, and what comes of it."""
    EXPLODED.unlink(missing_ok=True)
    out, last = shutil.copytree(base, fresh()), dict(textgen="--diffusion_steps").get(name, "--max_steps")
    (out / LAST[name]).write_bytes(raw)
    few = dict(
        imagen=["--steps", 2],
        textgen=["--steps", 2, "--guidance", 0],
        reason=["--prompt", "1 + 2 + 3 + 4"],
        tokengen=["--prompt", "1 + 2"],
    )
    args = ["--sample_from", out / LAST[name], "--out", out / "again", *few[name]]
    if resume:
        args = [*command(name), last, 9, "--out", out, "--resume"]
    got, text = ft.call(script(name, *args), little_memory, seconds=60)
    if got != "ok":
        return got, text, None
    if resume and not ft.is_finite(torch.load(out / LAST[name], weights_only=True)):
        return "not finite saved", text, None
    files = [out / LAST[name]] if resume else sorted((out / "again").rglob("*.*"))
    return got, text, [ft.content(path) for path in files]


# -- command lines -----------------------------------------------------------------------------------------

WORDS = "nan inf -inf 1e30 -1 0 1 2.5 x None $HOME Zoë -- - true 1,2 [1] {dataset} a/../b 0x10 1_0".split()
WORDS += [str(10**30), str(-(10**30)), "", " ", "a\nb", "\udcff\udcfe", "\x1b[31m"]


def one_step() -> None:
    """In a child: training ends after a step; the terminal is ASCII, and there is little memory."""
    steps = training.Run.steps

    def few(run, *args):
        run.max_steps = min(run.max_steps, run.step + 1)
        return steps(run, *args)

    training.Run.steps = few
    sys.stdout.reconfigure(encoding="ascii", errors="strict")
    little_memory()


def lines(short: bool):
    """Command lines with odd values, without values, unknown flags: status 0, or a message and status 2."""
    for name in RUNS:
        fields = [field.name for field in dataclasses.fields(importlib.import_module(name).Config)]
        for i in range(12 if short else 350):
            rng, odd = random.Random(f"{name} {i}"), []
            for _ in range(rng.randint(1, 2)):
                odd += [f"--{rng.choice([*fields, *fields, 'what', '', '-', 'LR', 'no-resume'])}"]
                odd += [rng.choice(WORDS) for _ in range(rng.choice([0, 1, 1, 1, 1, 2]))]
            got, text = ft.call(script(name, *command(name, 1), "--out", fresh(), *odd), one_step, seconds=60)
            shutil.rmtree(WORK / "cwd")
            (WORK / "cwd").mkdir()
            wrong = ft.unwanted(got, text) or ("" if text.strip() else "nothing was said")
            yield f"odd command lines, {name}", f"{i}, {odd}", wrong, None


# -- data --------------------------------------------------------------------------------------------------

ENCODINGS = ["utf-16", "utf-16-be", "utf-32", "latin-1", "utf-8-sig", "cp037", "shift-jis"]
MARKS = ['"', "\r", "\n\n\n", "\u2028", "\f", "\ufeff", "{", "]", "\t", ";", "\\", "||", "####", "<<"]


def mutate(rng: random.Random, raw: bytes) -> bytes:
    """A file that is damaged, or in another encoding."""
    at, some = rng.randrange(len(raw)), rng.randint(1, 50)
    text = raw.decode("utf-8", errors="replace")
    return rng.choice(
        [
            raw[:at],
            raw[at:],
            raw[:at] + bytes(some) + raw[at:],
            raw[:at] + rng.randbytes(some) + raw[at:],
            raw[:at] + rng.choice(MARKS).encode() + raw[at:],
            flip(rng, raw, n=rng.choice([1, 1, 5, 100])),
            text.encode(rng.choice(ENCODINGS), errors="replace"),
        ]
    )


def read(load, *args) -> str:
    """What is wrong with the end of a child that loads data: neither success nor a UserError."""

    def task():
        try:
            load(*map(str, args))
        except training.UserError as error:
            sys.exit(str(error))

    got, text = ft.call(task, little_memory, seconds=30)
    return ft.unwanted(got, text, ["ok", "status 1"])


def tables(folder: Path, rows: list[dict]) -> list[Path]:
    """The rows as files of all forms, made in a child, since pyarrow starts threads."""

    def write():
        import pandas

        table = pandas.DataFrame(rows)
        table.to_csv(folder / "data.csv", index=False)
        table.to_csv(folder / "data.tsv", index=False, sep="\t")
        table.to_json(folder / "data.jsonl", orient="records", lines=True)
        table.to_json(folder / "data.json", orient="records")
        table.to_parquet(folder / "data.parquet")
        (folder / "data.txt").write_text("\n".join("||".join(map(str, row.values())) for row in rows))

    folder.mkdir()
    assert ft.call(write)[0] == "ok"
    return sorted(folder.iterdir())


def texts(short: bool):
    """Damaged files of texts, of problems, and of a text to be cut into windows."""
    reviews = [dict(text=f"the room was large, number {i} – très bien.", label=i % 3) for i in range(30)]
    answers = [line.partition("||") for line in TXT.read_text().splitlines()[:60]]
    problems = [dict(question=question, answer=chain) for question, _, chain in answers]
    whole = functools.partial(tokengen.load_text, data_dir="")
    for name, load, rows in [
        ("load_texts", data.load_texts, reviews),
        ("load_problems", tasks.load_problems, problems),
        ("load_text", whole, reviews),
    ]:
        files = tables(fresh("sound"), rows)
        for i in range(12 if short else 420):
            rng, file, folder = random.Random(f"{name} {i}"), files[i % len(files)], fresh()
            path = folder / rng.choice([file.name, file.name.upper(), f"Zoë $ {file.name}"])
            folder.mkdir()
            path.write_bytes(mutate(rng, file.read_bytes()) if i >= len(files) else file.read_bytes())
            yield f"damaged files, {name}", f"{i}, {path.name}", read(load, path), folder


def images(short: bool):
    """Damaged images in folders, and damaged idx files."""
    for i in range(12 if short else 420):
        rng, folder, suffix = (
            random.Random(f"image {i}"),
            fresh(),
            ["png", "jpg", "gif", "tiff", "webp", "bmp"][i % 6],
        )
        for n in range(6):
            path = (
                folder
                / "ab"[n % 2]
                / rng.choice([f"{n}.{suffix}", f"{n}.{suffix.upper()}", f"\udcff{n}.{suffix}"])
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new(rng.choice(["RGB", "L"]), (8, 8), 40 * n).save(
                path, {"jpg": "jpeg"}.get(suffix, suffix)
            )
        if i >= 6:
            path.write_bytes(mutate(rng, path.read_bytes()))
        yield "damaged images in a folder", f"{i}, {suffix}", read(data.load_images, folder, "none"), folder
    for i in range(6 if short else 160):
        rng, folder = random.Random(f"idx {i}"), fresh()
        for split, n in [("train", 30), ("t10k", 10)]:
            y = torch.arange(n, dtype=torch.uint8) % 10
            write_idx(
                folder / f"FashionMNIST/raw/{split}-images-idx3-ubyte", y[:, None, None].expand(n, 28, 28)
            )
            write_idx(folder / f"FashionMNIST/raw/{split}-labels-idx1-ubyte", y)
        path = rng.choice(sorted(folder.rglob("*-ubyte")))
        raw = path.read_bytes()
        path.write_bytes(
            rng.choice([mutate(rng, raw), flip(rng, raw, 0, 8), raw[:-1], raw[:-784], raw + raw[-1:]])
        )
        yield "damaged idx files", f"{i}, {path.name}", read(data.load_images, "fashionmnist", folder), folder
