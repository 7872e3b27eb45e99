"""common/tables.py: what is read of a file, a folder or the hub; and what is refused."""

import json
import os
import shutil
import time

import datasets
import pytest
from conftest import SHARED
from huggingface_hub import constants

from common.run import UserError
from common.tables import lines, load_from_hub, load_tables, read_text

FIELD = SHARED / "field"
ROWS = [dict(text=f"text {i}", label=str(i % 3), about=f"topic {i}") for i in range(30)]


def write(path, content):
    """A file of characters, or of bytes as they are; returns its name."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def pairs(rows):
    return [(row["text"].strip(), row["label"].strip()) for row in rows]


# -- one reader of text --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, text",
    [
        (b"caf\xc3\xa9 \xf0\x9f\x91\x8d", "café 👍"),
        ("\ufeffa\n\ufeffb\n".encode(), "a\nb\n"),
        ("\ufeff".encode(), ""),
        ("a\r\n\u2028\x0c\x85".encode(), "a\r\n\u2028\x0c\x85"),
        (b"", ""),
    ],
)
def test_a_text_is_what_is_in_the_file_without_marks_of_its_encoding(content, text, tmp_path):
    write(tmp_path / "a.txt", content)
    assert read_text(tmp_path / "a.txt") == text


@pytest.mark.parametrize(
    "content, line",
    [
        ("a text\n".encode("utf-16-le"), 1),
        ("a text\n".encode("utf-16-be"), 1),
        ("a text\n".encode("utf-16"), 1),
        ("a text\n".encode("utf-32-le"), 1),
        (b"a\nb\r\nc\0d\n", 3),
        (b"a\rcaf\xe9\r", 2),
        (b"a\n\xed\xa0\xbd\n", 2),
        (b"a\n\xf0\x9f\x91", 2),
    ],
)
def test_what_is_not_utf_8_is_refused_with_its_line(content, line, tmp_path):
    write(tmp_path / "a.txt", content)
    with pytest.raises(UserError, match=rf"a\.txt line {line}\b"):
        read_text(tmp_path / "a.txt")


def test_only_line_ends_end_a_line():
    assert lines("a\u2028b\x0cc\x85d\r\n\r\ne\rf\n") == ["a\u2028b\x0cc\x85d", "", "e", "f", ""]


# -- rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".JSONL", ".json", ".csv", ".tsv", ".parquet"])
def test_rows_are_the_same_in_every_kind_of_file(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    elif "json" in suffix.lower():
        write(path, json.dumps(ROWS, indent=1) if suffix == ".json" else "\n".join(map(json.dumps, ROWS)))
    else:
        separator = "\t" if suffix == ".tsv" else ","
        write(path, "\n".join(map(separator.join, [ROWS[0], *(row.values() for row in ROWS)])))
    assert load_tables(str(path)) == dict(train=ROWS)


@pytest.mark.parametrize("suffix", [".txt", ".text", ".TXT"])
def test_lines_are_rows_and_blank_ones_are_none(suffix, tmp_path):
    path = write(tmp_path / f"a{suffix}", "\ufeffa\u2028b\x0cc\x85d\r\n\r\n  \n e\rf||<<1+1=2>> #### 2 \n\n")
    read = [row["text"] for row in load_tables(path)["train"]]
    assert read == ["a\u2028b\x0cc\x85d", " e", "f||<<1+1=2>> #### 2 "]


GOOD = [("a, b", "x"), ("c; d", "y"), ("e\tf", "x"), ("N/A", "None"), ("None", "NA"), ("null", "null")]
SPELLINGS = {
    "quoted.csv": 'text,label\n"a, b",x\nc; d,y\ne\tf,x\nN/A,None\nNone,NA\nnull,null\n',
    "semicolon.csv": 'text;label\na, b;x\n"c; d";y\ne\tf;x\nN/A;None\nNone;NA\nnull;null\n',
    "named.csv": 'text;label;"a,b,c,d"\na, b;x;\n"c; d";y;\ne\tf;x;\nN/A;None;\nNone;NA;\nnull;null;\n',
    "tab.tsv": 'text\tlabel\na, b\tx\nc; d\ty\n"e\tf"\tx\nN/A\tNone\nNone\tNA\nnull\tnull\n',
    "commas.tsv": 'label\ttext\t,,\nx\ta, b\t\ny\tc; d\t\nx\t"e\tf"\t\nNone\tN/A\t\nNA\tNone\t\nnull\tnull\t',
    "tab.csv": '"text"\t"label"\na, b\tx\nc; d\ty\n"e\tf"\tx\nN/A\tNone\nNone\tNA\nnull\tnull\n',
    "excel.csv": 'sep=;\r\ntext;label\r\na, b;x\r\n"c; d";y\r\ne\tf;x\r\nN/A;None\r\nNone;NA\r\nnull;null',
    "excel2.csv": '\ufeff"sep=,"\ntext,label\n"a, b",x\nc; d,y\ne\tf,x\nN/A,None\nNone,NA\nnull,null\n',
    "BOM.CSV": '\ufefftext,label\n"a, b",x\nc; d,y\ne\tf,x\nN/A,None\nNone,NA\nnull,null\n',
    "joined.csv": '\ufefftext,label\n"a, b",x\nc; d,y\n\ufeffe\tf,x\nN/A,None\nNone,NA\nnull,null\n',
    "spaced.csv": 'text , label\n"a, b", x\nc; d, "y"\ne\tf,x \n N/A,None\nNone,NA\nnull,null\n',
    "crlf.csv": 'text,label\r\n"a, b",x\r\n\r\nc; d,y\r\ne\tf,x\r\n,\r\nN/A,None\r\nNone,NA\r\nnull,null\r\n',
    "mac.csv": 'text,label\r"a, b",x\rc; d,y\re\tf,x\rN/A,None\rNone,NA\rnull,null',
    "index.csv": ',text,label,\n0,"a, b",x,\n1,c; d,y,\n2,e\tf,x,\n3,N/A,None,\n,None,NA,\n,null,null,',
}
OBJECTS = [dict(text=text, label=label) for text, label in GOOD]
SPELLINGS |= {
    "blank.JSONL": "\ufeff" + "\r\n\r\n".join(map(json.dumps, OBJECTS)) + "\n\n",
    "joined.ndjson": "\n\ufeff".join(map(json.dumps, OBJECTS)),
    "lines.json": "\n".join(map(json.dumps, OBJECTS)),
    "array.json": json.dumps(OBJECTS),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_a_table_is_read_exactly(name, tmp_path):
    assert pairs(load_tables(write(tmp_path / name, SPELLINGS[name]))["train"]) == GOOD


def test_values_of_json_and_parquet_keep_their_type(tmp_path):
    rows = [dict(text="a", label=5), dict(text="b", label=7)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    write(tmp_path / "a.json", json.dumps(rows))
    assert load_tables(str(tmp_path / "a.parquet")) == dict(train=rows)
    assert load_tables(str(tmp_path / "a.json")) == dict(train=rows)


def test_a_quoted_text_keeps_its_lines_and_one_of_a_megabyte_its_end(tmp_path):
    long = "word " * 200_000
    path = write(tmp_path / "a.csv", f'text,label\n"a\n\nb",1\n"{long}end",2\nc,1\n')
    assert pairs(load_tables(path)["train"]) == [("a\n\nb", "1"), (f"{long}end", "2"), ("c", "1")]


# -- quotes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header, rows",
    [
        ("text,label", [["Nice room, good\nbad bath, cold", "5"], ["c", "1"]]),
        ("text,label", [["Nice room, 4 beds\nbad bath, 5 towels", "5"], ["c", "4"]]),
        ("text,label", [["Rooms, beds\n\nBath, towels\n\nFood, drinks", "good"], ["c", "bad"]]),
        ("label,text", [["5", "Nice\nroom, good\nand, well"], ["1", "c"]]),
        ("id,text,label", [["17", "Nice, good\nand, well, clean\nfoo,room", "5"], ["18", "c", "1"]]),
        ("text", [["Nice\nNice"], ["Nice"]]),
        ("text;label", [["Nice; good\nroom, bath; loud", "5"], ["c", "1"]]),
    ],
)
def test_reviews_of_several_lines_are_read_whole(header, rows, tmp_path):
    separator = ";" if ";" in header else ","
    quoted = [separator.join(f'"{cell}"' for cell in row) for row in rows]
    path = write(tmp_path / "a.csv", "\n".join([header, *quoted]))
    assert [list(row.values()) for row in load_tables(path)["train"]] == rows


@pytest.mark.parametrize("kinds", [("0", "1"), ("pos", "neg"), ("4.5", "3.0")])
@pytest.mark.parametrize("columns", ["text,label", "label,text", "id,text,label", "id,text"])
@pytest.mark.parametrize("column", [0, -2, -1])
def test_rows_between_two_stray_quotes_are_not_swallowed(kinds, columns, column, tmp_path):
    rows = [dict(id=str(i), text="so" * i + "me", label=kinds[i % 2]) for i in range(60)]
    rows = [[row[name] for name in columns.split(",")] for row in rows]
    assert (
        len(load_tables(write(tmp_path / "a.csv", "\n".join([columns, *map(",".join, rows)])))["train"]) == 60
    )
    for last in (11, 50):
        stray = [list(row) for row in rows]
        stray[9][column] = '"' + stray[9][column]
        stray[last][column] += '"'
        write(tmp_path / "a.csv", "\n".join([columns, *map(",".join, stray)]))
        with pytest.raises(UserError, match=r"a\.csv.* row 10\b"):
            load_tables(str(tmp_path / "a.csv"))


TABLE = "Review,Rating\ngood,1\n"
MISTAKES = [
    (".csv", b""),
    (".csv", "Review,Rating\n\n"),
    (".jsonl", "\n\n"),
    (".txt", " \r\n\u3000\n"),
    (".csv", TABLE + "very, very bad,1\n"),
    (".csv", TABLE + "bad\n"),
    (".csv", TABLE + '"bad,1\nworse,2\nworst,3\n'),
    (".csv", TABLE + '"so" bad,1\n'),
    (".csv", TABLE + '"they said \\"so\\"",1\n'),
    (".tsv", 'text\tlabel\n"Nice place\t5\nhe said "\t4\nc\t3\nd\t3\n'),
    (".tsv", 'text\tlabel\n"Nice place\tgood\nhe said "\tbad\nc\tso\n'),
    (".csv", "text,label,label\ngood,1,2\n"),
    (".csv", "text,label,label \ngood,1,2\n"),
    (".csv", "text|label\ngood|1\nso, so|2\n"),
    (".csv", "Reviews of 2024\n\ntext,label\ngood,1\n"),
    (".csv", TABLE.encode() + b"caf\xe9,1\n"),
    (".csv", TABLE.encode("utf-16")),
    (".csv", TABLE.encode("utf-16-le")),
    (".txt", "a\nb\nc\0d\n"),
    (".jsonl", '{"text": "a"}\n{"text": '),
    (".jsonl", '{"text": "a"\n"label": 1}'),
    (".jsonl", '{"text": "a"}\n["b"]'),
    (".json", "[1, 2]"),
    (".json", "5"),
    (".json", "[" * 100_000),
    (".parquet", "PAR1"),
    (".parquet", ""),
    (".xlsx", "PK"),
    (".csv.gz", "PK"),
    ("", "text\na\nb\n"),
]


@pytest.mark.parametrize("suffix, content", MISTAKES)
def test_a_file_with_a_mistake_is_refused_by_name(suffix, content, tmp_path):
    path = write(tmp_path / f"reviews{suffix}", content)
    with pytest.raises(UserError, match=f"reviews{suffix}"):
        load_tables(path)


@pytest.mark.skipif(not FIELD.exists(), reason="no ../shared/field here")
def test_tables_of_other_programs_are_read_or_refused():
    for name in "excel_sep decimal_comma pandas_index space_header trailing_comma".split():
        rows = load_tables(str(FIELD / f"x03_csv/{name}.csv"))["train"]
        assert len(rows) == 120
        assert {"text", "label"} <= rows[0].keys()
    for name in "backslash_quotes pipe stray_title two_stray_quotes".split():
        with pytest.raises(UserError, match=name):
            load_tables(str(FIELD / f"x03_csv/{name}.csv"))


# -- folders, and the hub ------------------------------------------------------------------------------------


def test_a_folder_has_its_own_splits_and_what_is_left_out_is_said(tmp_path, capsys):
    for name in ("Train.CSV", "valid.csv", "test.csv", "._train.csv"):
        write(tmp_path / name, f"text\n{name}\n")
    write(tmp_path / "README.md", "about these")
    first = {split: rows[0]["text"] for split, rows in load_tables(str(tmp_path)).items()}
    assert first == dict(train="Train.CSV", test="test.csv")
    assert "valid.csv" in capsys.readouterr().out
    (tmp_path / "test.csv").unlink()
    assert load_tables(str(tmp_path))["test"] == [dict(text="valid.csv")]
    (tmp_path / "valid.csv").unlink()
    assert load_tables(str(tmp_path)).keys() == {"train"}


@pytest.mark.parametrize("names", [["other.csv"], [], ["test.csv"], ["train.csv", "training.csv"]])
def test_a_folder_without_one_train_file_is_refused(names, tmp_path):
    for name in names:
        write(tmp_path / name, "text\na\n")
    with pytest.raises(UserError, match=tmp_path.name):
        load_tables(str(tmp_path))


@pytest.mark.parametrize(
    "dataset",
    ["x" * 300, *"grammer nothing.csv nowhere/nothing.xlsx ./nothing a/b/c tripadvisor owner/name".split()]
    + "~/nothing.csv loop.csv folder.csv/train.csv".split(),
)
def test_a_path_that_leads_nowhere_is_refused_at_once(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("the hub was asked"))
    (tmp_path / "tripadvisor").mkdir()  # also the name of a data set
    (tmp_path / "owner").mkdir()
    write(tmp_path / "owner/name", "PK")
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    (tmp_path / "folder.csv/train.csv").mkdir(parents=True)
    with pytest.raises(UserError, match=dataset):
        load_tables(dataset)


def test_folders_of_built_in_names_and_at_home_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tripadvisor").mkdir()
    write(tmp_path / "tripadvisor/train.txt", "a\n")
    assert load_tables("./tripadvisor") == load_tables("~/tripadvisor") == dict(train=[dict(text="a")])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path):
    path = write(tmp_path / "a.csv", "text\na\n")
    os.chmod(path, 0)
    with pytest.raises(UserError, match=r"a\.csv.*Permission"):
        load_tables(path)


def hub(monkeypatch, **splits):
    """Let `datasets` find these rows on the hub; returns the names that are asked for."""
    found, asked = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}, []
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: (asked.append(name), found)[1])
    return asked


def test_the_hubs_own_splits_are_read(monkeypatch):
    asked = hub(monkeypatch, train=ROWS, validation=ROWS[:4], test=ROWS[:3])
    assert load_tables("tripadvisor") == dict(train=ROWS, test=ROWS[:3])
    hub(monkeypatch, train=ROWS, validation=ROWS[:4])
    assert load_tables("owner/name-1.5") == dict(train=ROWS, test=ROWS[:4])
    assert asked == [("argilla/tripadvisor-hotel-reviews",)]
    hub(monkeypatch, all=ROWS)
    with pytest.raises(UserError, match="owner/name"):
        load_tables("owner/name")


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """The hub's libraries as outside of these tests, and a hub that is not there."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_without_a_network_the_hub_gives_up_at_once(no_network, caplog):
    start = time.monotonic()
    with pytest.raises(UserError, match="nobody/nothing.*grammar"):
        load_tables("nobody/nothing")
    assert time.monotonic() - start < 5  # 24 s with the retries of the hub's libraries
    assert "Retrying" not in caplog.text
    assert load_from_hub(lambda name: constants.HF_HUB_OFFLINE, "name")
    assert not constants.HF_HUB_OFFLINE


def test_without_a_network_a_data_set_is_loaded_from_the_cache(no_network, tmp_path):
    write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, ROWS)))
    datasets.load_dataset("json", data_files=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "made"))
    (made,) = (tmp_path / "made/json").glob("*/*/*/json-train.arrow")
    cached = tmp_path / "cache/owner___name/default/0.0.0/0123456789abcdef"
    shutil.copytree(made.parent, cached)
    (cached / "json-train.arrow").rename(cached / "name-train.arrow")
    info = (cached / "dataset_info.json").read_text()
    write(cached / "dataset_info.json", json.dumps(json.loads(info) | dict(dataset_name="name")))
    assert load_tables("owner/name") == dict(train=ROWS)
