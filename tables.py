"""Files and data sets of rows: csv, tsv, jsonl, json, parquet and txt, folders of them, and names on the hub.

Files are read as they stand: `datasets` would guess types, take the words None and NA for missing values,
answer from its cache where a file has changed, and count the reading at a server.
"""

import csv
import io
import json
import os
import re
from pathlib import Path

from files import UserError, reason

HUB = {"tripadvisor": ("argilla/tripadvisor-hotel-reviews",), "gsm8k": ("openai/gsm8k", "main")}
KINDS = "a csv, tsv, jsonl, json, parquet or txt file, or a folder with one as train.* and one as test.*"
Table = list[tuple[str, dict]]  # rows, each behind its place, such as "a.csv row 2 (line 3)"
# What operating systems and programs leave among a user's files: .DS_Store, ._photo.png, .ipynb_checkpoints.
HIDDEN = (".", "__MACOSX", "@eaDir", "$RECYCLE.BIN")
# The names of folders and files that are splits.
SPLITS = dict.fromkeys("train training trainset trainval".split(), "train")
SPLITS |= dict.fromkeys("test testing testset".split(), "test")
SPLITS |= dict.fromkeys("val valid validation valset dev eval evaluation".split(), "val")


def read_tables(dataset: str, offline: str, known: str = "") -> tuple[dict[str, Table], str]:
    """The splits "train" and, if any, "test" of a file, a folder or a hub name; and what of it was left out.

    offline, known: what to do without a network, and what to choose, for messages. Raises UserError for what
    is not there or cannot be read, with its row or line.
    """
    path, source = Path(dataset), HUB.get(dataset)
    if not source and (os.path.exists(path) or re.search(r"\.[A-Za-z]{2,7}$", dataset)):
        if not path.is_dir():
            return {"train": read_file(path, offline)}, ""
        names = sorted(p.name for p in path.iterdir() if not p.name.startswith(HIDDEN))
        picked = pick_splits([name for name in names if Path(name).suffix.lower() in READERS], path)
        tables = {split: read_file(path / name, offline) for split, name in picked.items()}
    elif source or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", dataset):
        found = from_hub(source or (dataset,), offline)
        names, picked = list(found), pick_splits(list(found), dataset)
        tables = {split: numbered(f"{dataset}, {split} row", found[name]) for split, name in picked.items()}
    else:
        raise UserError(f"no data set {dataset!r}; {known}{offline}")
    rest = [name for name in names if name not in picked.values()]
    return tables, f"left out: {', '.join(rest)}" if rest else ""


def from_hub(source: tuple, offline: str) -> dict:
    """All splits of a data set on the hub, by the library `datasets`."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log, it also raises
    try:
        return datasets.load_dataset(*source)
    except Exception as error:  # many types: no network, no such name, a damaged file
        raise UserError(
            f"{source[0]} could not be loaded from the hub ({reason(error)}); {offline}"
        ) from error


def pick_splits(names: list[str], where) -> dict[str, str]:
    """The name of the split train and, if any, that of the split test, or of val where there is no test."""
    spelled = {SPLITS.get(Path(name).stem.lower()): name for name in reversed(names)}
    if "train" not in spelled:
        has = ", ".join(names) or "other files"
        raise UserError(f"{where} has no split train, only {has}; wanted is {KINDS}")
    picked = dict(train=spelled["train"], test=spelled.get("test", spelled.get("val")))
    return {split: name for split, name in picked.items() if name}


def numbered(what: str, rows) -> Table:
    return [(f"{what} {n}", row) for n, row in enumerate(rows, 1)]


def read_file(path: Path, offline: str) -> Table:
    """The rows of a file as they stand there. Raises UserError where there are none, or it cannot be read."""
    kind = path.suffix.lower()
    if not os.path.isfile(path):
        raise UserError(f"no file {path}; {offline}")
    if kind not in READERS:
        raise UserError(f"{path} cannot be read: unpack it, or save it as csv in UTF-8; wanted is {KINDS}")
    try:
        table = [(f"{path.name} {place}", row) for place, row in READERS[kind](path)]
    except Exception as error:  # OSError, ValueError, csv.Error, RecursionError, and what pyarrow raises
        raise UserError(f"{path} cannot be read as {kind[1:]} in UTF-8: {reason(error)}") from error
    for place, row in table:
        if not isinstance(row, dict):
            raise UserError(f"{place} is {row!r:.60}, but an object is wanted, with names of columns")
    if not table:
        raise UserError(f"{path} is empty; it must hold at least a few rows")
    return table


def read_utf8(path: Path) -> str:
    """The characters of a file. Raises ValueError, with the line, for another encoding."""
    raw = path.read_bytes()
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"byte 0x{raw[error.start]:02x} in line {line}: save it as UTF-8") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"a NUL character in line {line}: take it out, or save UTF-16 as UTF-8")
    return text.replace("\ufeff", "")  # the mark of the encoding, also where files were joined


def lines_of(text: str) -> list[str]:
    """The lines of a text, which U+2028, U+0085 and a form feed do not cut."""
    return re.split(r"\r\n|[\r\n]", text)


def read_txt(path: Path) -> Table:
    """A text in each line; blank ones are none."""
    lines = numbered("line", lines_of(read_utf8(path)))
    return [(place, dict(text=line)) for place, line in lines if line.strip()]


def read_json(path: Path) -> Table:
    """An object in each line; of a .json an array of objects, or an object with one such array."""
    text, table = read_utf8(path), []
    if path.suffix.lower() == ".json" and not re.match(r"\s*\{.*\}\s*\n\s*\{", text):
        found = json.loads(text)
        arrays = [value for value in found.values() if isinstance(value, list)] if type(found) is dict else []
        found = arrays[0] if len(arrays) == 1 else found
        if not isinstance(found, list):
            raise ValueError("an array of objects is wanted, or an object with one such array")
        return numbered("entry", found)
    for place, line in numbered("line", lines_of(text)):
        try:
            table += [(place, json.loads(line))] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"{place} is not JSON ({error.msg}): write one object in each line") from error
    return table


def read_csv(path: Path) -> Table:
    """Rows of fields, between which stands what the header has most of: a tab, a semicolon or a comma."""
    text, table, columns, line = read_utf8(path), [], None, 1
    header = re.sub(r'"[^"]*"', "", re.search(r"[^\r\n]*\S[^\r\n]*|\Z", text)[0])
    mark = max("\t;,", key=header.count)
    mark = mark if mark in header else ","
    csv.field_size_limit(2**31 - 1)
    # strict: an unclosed quote is an error; else it would swallow the rows behind it.
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=mark, skipinitialspace=True, strict=True)
    try:
        for row in rows:
            place, line = f"row {len(table) + 1} (line {line})", rows.line_num + 1
            if not any(map(str.strip, row)):  # a blank line
                continue
            if columns is None:
                columns = [name.strip() for name in row]
                if len(set(filter(None, columns))) < sum(map(bool, columns)):
                    raise ValueError(f"two columns of {', '.join(columns)} have one name")
            elif len(row) != len(columns):
                got = f"{place} has {len(row)} fields, the header {len(columns)}"
                raise ValueError(f"{got}: put texts with {mark!r} inside in double quotes")
            elif mark == "\t" and any(mark in cell and "\n" in cell for cell in row):
                raise ValueError(f"{place} has tabs and lines inside double quotes: is one quote unclosed?")
            else:
                table.append((place, dict(zip(columns, row, strict=True))))
    except csv.Error as error:
        raise ValueError(f"the row from line {line} on: {error} (double the quotes inside quotes)") from error
    return table


def read_parquet(path: Path) -> Table:
    import pyarrow.parquet

    return numbered("row", pyarrow.parquet.ParquetFile(path).read().to_pylist())


READERS = {".csv": read_csv, ".tsv": read_csv, ".jsonl": read_json, ".json": read_json, ".txt": read_txt}
READERS[".parquet"] = read_parquet
