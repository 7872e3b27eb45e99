"""What is said and what is written: messages, tables, figures and checkpoints, which are also read again.

Files are UTF-8, and appear whole or not at all.
"""

import functools
import os
import re
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypedDict

import torch
import typeguard
from torch import nn
from typeguard import CollectionCheckStrategy, TypeCheckError
from typing_extensions import NotRequired

# -- what is said ------------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake that the user can mend: what was got, what is wanted, what to do; the exit status is 2."""


def reason(error: Exception) -> str:
    """The first line of what a library raised."""
    return (str(error) or type(error).__name__).splitlines()[0][:150]


def is_main() -> bool:
    """Whether this process is the one that writes files and prints."""
    return int(os.environ.get("RANK", 0)) == 0


def printable(text: str) -> str:
    """Escape control characters: class names may come from a stranger's checkpoint."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: ascii(found[0])[1:-1], text)


def say(text: str) -> None:
    """Print in the main process, at once."""
    if is_main():
        with suppress(OSError):  # a training outlives its terminal, and the tee behind it
            print(printable(text), flush=True)


# -- files -----------------------------------------------------------------------------------------------


def write_atomic(path: Path, write) -> None:
    """Call write(file) on a temporary file beside `path`, flush it to disk and rename it.

    A reader sees the old file or the new one. Raises UserError where it cannot be written.
    """
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
        kept = "the one before is kept" if path.exists() else "there is none yet"
        message = f"{path} could not be written ({reason(error)}): is the disk full? {kept}"
        raise UserError(f"{message}; make room, then --resume") from error
    finally:
        with suppress(OSError):  # of a folder that is gone or read-only: it is said above
            tmp.unlink(missing_ok=True)


def write_lines(path: Path, lines: list[str]) -> None:
    text = "\n".join([*lines, ""])
    write_atomic(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def read_rows(path: Path, header: str) -> dict[str, list[float]]:
    """The rows of a csv file of numbers, by line; damaged lines are skipped."""
    rows = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            rows[line] = [float(cell) for cell in line.split(",")]
        except ValueError:  # the header, or a damaged row
            continue
    return {line: row for line, row in rows.items() if len(row) == header.count(",") + 1}


def show(out, name: str, lines: list[str]) -> Path:
    """Print the lines and write them to samples/NAME.txt."""
    path = Path(out) / "samples" / f"{name}.txt"
    write_lines(path, lines)
    say("\n".join([f"\n-- {name} --", *lines]))
    return path


@contextmanager
def figure(path: Path, size: tuple[float, float]):
    """A matplotlib figure and its axes, of `size` in inches, written to `path` at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=size, layout="constrained")
    yield fig, ax
    write_atomic(path, functools.partial(fig.savefig, dpi=120, format=path.suffix[1:]))
    plt.close(fig)


# -- checkpoints ------------------------------------------------------------------------------------------


def check_types(value, hint) -> None:
    """Raise TypeCheckError where a value, or anything in it, is not of the type `hint`."""
    typeguard.check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)


def check_crc(path) -> None:
    """Raise ValueError where a record of a checkpoint is not as it was written.

    torch writes a zip file with a CRC-32 for each record, and does not look at it when it reads.
    """
    with zipfile.ZipFile(path) as file:
        if any(record.compress_type for record in file.infolist()):  # a small file could fill the memory
            raise ValueError("compressed")
        if damaged := file.testzip():
            raise ValueError(f"{damaged} is damaged")


@contextmanager
def reading(path):
    """Turn what goes wrong while the contents of a checkpoint are used into a UserError that names it."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # any, since anything can stand in a checkpoint
        detail = " ".join(str(error).split())[:250]
        message = f"{path} does not fit this version of the script, or these settings"
        raise UserError(f"{message} ({type(error).__name__}: {detail}); take another") from error


class Checkpoint(TypedDict):
    """What a checkpoint holds; what its config and its facts are is a matter of its script."""

    kind: str
    config: dict
    facts: dict
    extra: dict
    step: int
    seconds: float
    model: dict
    ema: dict
    opt: dict
    muon: NotRequired[dict]


def load_checkpoint(path, kind: str, facts=dict) -> Checkpoint:
    """The checkpoint of script `kind` at `path`, on the CPU. facts: a TypedDict of what it must know.

    Raises UserError where it is missing, damaged, unsafe or of another script.
    """
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}; a training run writes out/NAME/last.pt")
    try:
        check_crc(path)
        # Tensors and plain types only: a hostile file can run nothing.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different type for each way in which a file can be broken
        cause = f"truncated, or holding code?): {reason(error)}"
        raise UserError(f"{path} is not a checkpoint that can be loaded safely ({cause}") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("kind") != kind:
        raise UserError(
            f"{path} is not a checkpoint of {kind}.py; give one that it has written (out/NAME/last.pt)"
        )
    try:
        check_types(checkpoint, Checkpoint)
        check_types(checkpoint["facts"], facts)
    except TypeCheckError as error:
        raise UserError(f"{path} is not as {kind}.py writes it ({error}); take another") from error
    return checkpoint


def all_finite(tensors) -> bool:
    """Whether all numbers of the tensors are finite."""
    tensors = list(tensors)  # AdamW keeps its step on the CPU, except where it is fused
    return torch.stack([x.isfinite().all().to(tensors[0].device) for x in tensors]).all().item()


def load_weights(model: nn.Module, weights: dict, path) -> None:
    """Load `weights` of the checkpoint at `path`.

    Raises UserError where they are another model's, or are not finite.
    """
    with reading(path):
        model.load_state_dict(weights)
        for name, w in model.state_dict().items():
            if weights[name].dtype != w.dtype:  # torch has converted them without a word
                raise ValueError(f"{name} is of {weights[name].dtype}, the model's of {w.dtype}")
        if not all_finite(model.state_dict().values()):
            raise ValueError("some of its weights are not finite")
