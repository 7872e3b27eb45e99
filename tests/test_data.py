"""data.py: files of texts, labels and tokens; and what is said of bad input."""

import json
import os
import random
import time

import datasets
import pytest
import torch

from data import Split, cut_texts, load_texts, sentences, train_codec, windows
from files import UserError
from tasks import grammar_texts


def at_most_40(text):
    return len(text) <= 40


# -- texts -----------------------------------------------------------------------------------------------


def test_the_grammars_texts_repeat_and_its_splits_hardly_overlap():
    a, b = grammar_texts(), grammar_texts()
    assert a == b
    assert (len(a.train.x), len(a.test.x)) == (5400, 600)
    assert a.names == list("12345")
    assert sorted(set(a.train.y)) == [0, 1, 2, 3, 4]
    assert len(set(a.test.x) & set(a.train.x)) / len(set(a.test.x)) < 0.05  # the rest is not known by heart


ROWS = [dict(text=f"text {i}", label=i % 3, about=f"topic {i}") for i in range(30)]


def write(path, content):
    """A file of characters, or of bytes as they are; returns its name."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def read(texts):
    """Texts and the names of their labels, of both splits, in some order that is always the same."""
    pairs = zip(texts.train.x + texts.test.x, texts.train.y + texts.test.y, strict=True)
    return sorted((x, texts.names[y] if y >= 0 else None) for x, y in pairs)


@pytest.fixture
def files(tmp_path):
    """The folder of a.jsonl, a.json, a.csv, a.tsv, a.parquet and a.txt, all with the texts of ROWS."""
    write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, ROWS)))
    write(tmp_path / "a.json", json.dumps(ROWS, indent=1))
    for suffix, mark in ((".csv", ","), (".tsv", "\t")):
        lines = [
            mark.join(map(str, row.values())) for row in [dict(zip(ROWS[0], ROWS[0], strict=True)), *ROWS]
        ]
        write(tmp_path / f"a{suffix}", "\n".join(lines))
    write(tmp_path / "a.txt", "\n".join(row["text"] for row in ROWS))
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    return tmp_path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_texts_labels_and_conditions_of_a_file_stay_together(kind, files):
    texts = load_texts(str(files / f"a.{kind}"), condition_column="about")
    assert (len(texts.train.x), len(texts.test.x)) == (27, 3)
    assert texts.names == ["0", "1", "2"]
    triples = []
    for part in (texts.train, texts.test):
        triples += zip(part.x, part.y, part.c, strict=True)
    assert sorted(triples) == sorted((row["text"], row["label"], row["about"]) for row in ROWS)


def test_lines_of_a_txt_are_texts_without_labels(files):
    texts = load_texts(str(files / "a.txt"))
    assert sorted(texts.train.x + texts.test.x) == sorted(row["text"] for row in ROWS)
    assert texts.names == []
    assert set(texts.train.y) == {-1}


def test_the_checksum_changes_with_the_training_texts_and_with_their_conditions_not_with_the_path(files):
    path = str(files / "a.csv")
    same, other = load_texts(path), load_texts(path, condition_column="about")
    assert load_texts(path).checksum() == same.checksum() == load_texts(str(files / "a.json")).checksum()
    assert same.checksum() != other.checksum()


def test_a_file_that_changes_within_a_tick_of_the_clock_is_read_anew(tmp_path):
    path, stamp = tmp_path / "a.csv", (10**9, 10**9)
    for word in ("old", "new"):
        write(path, "text\n" + "\n".join([f"{word} {i}" for i in range(9)]))
        os.utime(path, stamp)
        assert load_texts(str(path)).train.x[0].startswith(word)


GOOD = [("a, b", "x"), ("c; d", "y"), ("e\tf", "x"), ("N/A", "None"), ("None", "NA"), ("null", "null")]
SPELLINGS = {
    "quoted.csv": 'text,label\n"a, b",x\nc; d,y\ne\tf,x\nN/A,None\nNone,NA\nnull,null\n',
    "semicolon.csv": 'text;label\na, b;x\n"c; d";y\ne\tf;x\nN/A;None\nNone;NA\nnull;null\n',
    "named.csv": 'text;label;"a,b,c,d"\na, b;x;\n"c; d";y;\ne\tf;x;\nN/A;None;\nNone;NA;\nnull;null;\n',
    "tab.tsv": 'text\tlabel\na, b\tx\nc; d\ty\n"e\tf"\tx\nN/A\tNone\nNone\tNA\nnull\tnull\n',
    "tab.csv": '"text"\t"label"\na, b\tx\nc; d\ty\n"e\tf"\tx\nN/A\tNone\nNone\tNA\nnull\tnull\n',
    "BOM.CSV": '\ufefftext,label\n"a, b",x\nc; d,y\ne\tf,x\nN/A,None\nNone,NA\nnull,null\n',
    "spaced.csv": 'text, label\n"a, b", x\nc; d, "y"\ne\tf,x \n N/A,None\nNone,NA\nnull,null\n',
    "crlf.csv": 'text,label\n"a, b",x\n\nc; d,y\ne\tf,x\n,\nN/A,None\nNone,NA\nnull,null\n\n'.replace(
        "\n", "\r\n"
    ),
    "mac.csv": 'text,label\r"a, b",x\rc; d,y\re\tf,x\rN/A,None\rNone,NA\rnull,null',
    "index.csv": ',text,label,\n0,"a, b",x,\n1,c; d,y,\n2,e\tf,x,\n3,N/A,None,\n,None,NA,\n,null,null,',
}
OBJECTS = [dict(text=text, label=label) for text, label in GOOD]
SPELLINGS |= {
    "blank.JSONL": "\ufeff" + "\r\n\r\n".join(map(json.dumps, OBJECTS)) + "\n\n",
    "lines.json": "\n".join(map(json.dumps, OBJECTS)),
    "array.json": json.dumps(OBJECTS),
    "wrapped.json": json.dumps(dict(version=1, data=OBJECTS), indent=1),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_a_table_is_read_exactly(name, tmp_path):
    assert read(load_texts(write(tmp_path / name, SPELLINGS[name]))) == sorted(GOOD)


def test_a_quoted_text_keeps_its_lines_and_one_of_a_megabyte_its_end(tmp_path):
    long = "word " * 200_000
    path = write(tmp_path / "a.csv", f'text,label\n"a\n\nb",1\n"{long}end",2\nc,1\n')
    assert read(load_texts(path)) == [("a\n\nb", "1"), ("c", "1"), (f"{long}end", "2")]


def test_only_line_ends_cut_a_txt(tmp_path):
    content = "\ufeffa\u2028b\x0cc\x85d\r\n\r\n  \ne\rf\n\n"
    assert read(load_texts(write(tmp_path / "a.TXT", content))) == [
        ("a\u2028b\x0cc\x85d", None),
        ("e", None),
        ("f", None),
    ]


@pytest.mark.parametrize(
    "values, names",
    [
        ([" 5", "5", "5 ", "5.0", "5.", 5, 5.0], ["5"]),
        ([4.5, "4.5", "-1.0", -1, 10, 9], ["9", "-1", "10", "4.5"]),
        (["None", "NA", "N/A", "null"], ["NA", "N/A", "None", "null"]),
        (["good", "Good", True, "False"], ["Good", "True", "good", "False"]),
        (["007", "7", "1e3", "five"], ["7", "007", "1e3", "five"]),
    ],
)
def test_labels_that_mean_the_same_are_one_class_and_no_others(values, names, tmp_path):
    objects = [dict(text=f"text {i}", label=value) for i, value in enumerate(values * 3)]
    texts = load_texts(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, objects))))
    assert texts.names == names
    assert f"labels from column label (classes {', '.join(names)})" in texts.note


def test_a_label_column_is_guessed_declined_or_missed_and_always_said(tmp_path):
    rows = "".join(f"{i},a text,{i % 2}\n" for i in range(9))
    named, unnamed = (
        write(tmp_path / name, f"Id,Text,{label}\n{rows}")
        for name, label in (("a.csv", "LABEL"), ("b.csv", "Score"))
    )
    assert load_texts(named).note == "a.csv: texts from column Text, labels from column LABEL (classes 0, 1)"
    for none in ("none", "None"):
        declined = load_texts(named, label_column=none)
        assert declined.names == []
        assert declined.note == "a.csv: texts from column Text, no labels"
    missed = load_texts(unnamed)
    assert missed.names == []
    assert "no label column found among Id, Text, Score: trained without labels; name one with" in missed.note
    assert load_texts(unnamed, label_column="Score").names == ["0", "1"]
    called_so = write(tmp_path / "c.csv", f"Id,Text,none\n{rows}")
    assert load_texts(called_so, label_column="none").names == ["0", "1"]


def test_a_folder_has_its_own_splits_and_what_is_left_out_is_said(tmp_path):
    for name in ("Train.CSV", "valid.csv", "test.csv"):
        write(tmp_path / name, f"text,label\n{name},1\nb,2\n")
    write(tmp_path / "README.md", "about these")
    write(tmp_path / ".hidden", "no part of it")
    texts = load_texts(str(tmp_path))
    assert (texts.train.x, texts.test.x) == (["Train.CSV", "b"], ["test.csv", "b"])
    assert texts.note.endswith("; left out: README.md, valid.csv")
    (tmp_path / "test.csv").unlink()
    assert load_texts(str(tmp_path)).test.x == ["valid.csv", "b"]


def hub(monkeypatch, train, test):
    """Let `datasets` find these rows of argilla's form on the hub; returns the names asked for."""
    splits = {
        name: datasets.Dataset.from_list(
            [dict(text=t, prediction=[dict(label=y, score=1.0)]) for t, y in part]
        )
        for name, part in dict(train=train, test=test).items()
    }
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: (asked.append(name), splits)[1])
    return asked


def test_argillas_form_and_the_hubs_own_test_split_are_read(monkeypatch):
    rows = [(f"review {i}", str(i % 5 + 1)) for i in range(20)]
    asked = hub(monkeypatch, rows, rows[:4])
    texts = load_texts("tripadvisor")
    assert asked == [("argilla/tripadvisor-hotel-reviews",)]
    assert texts.names == list("12345")
    assert texts.train.y[:6] == [0, 1, 2, 3, 4, 0]
    assert texts.test.x == [f"review {i}" for i in range(4)]


def test_a_class_that_only_the_test_split_has_is_refused(monkeypatch):
    hub(monkeypatch, [(f"review {i}", str(i % 5 + 1)) for i in range(20)], [("x", "6")])
    with pytest.raises(UserError, match="test row 1: prediction is '6', outside the classes 1, 2, 3, 4, 5"):
        load_texts("tripadvisor")


def test_numbers_as_labels_are_in_their_order(tmp_path):
    path = write(tmp_path / "a.csv", "\n".join(["text,label", *(f"text {i},{i % 12}" for i in range(60))]))
    assert load_texts(path).names == [str(i) for i in range(12)]


def test_more_than_a_hundred_labels_are_no_classes(tmp_path):
    path = write(tmp_path / "a.csv", "\n".join(["text,label", *(f"text {i},{i / 7}" for i in range(1, 110))]))
    with pytest.raises(UserError, match="109 values, too many for classes; .*--label_column, or none"):
        load_texts(path)


TABLE = "Review,Rating\ngood,1\n"
MISTAKES = [
    (".csv", b"", {}, "is empty"),
    (".csv", "Review,Rating\n\n", {}, "is empty"),
    (".jsonl", "\n\n", {}, "is empty"),
    (".txt", " \r\n\u3000\n", {}, "is empty"),
    (".csv", TABLE + "\n ,2\n", {}, r"row 2 \(line 4\): Review is '', but a text is wanted"),
    (".csv", TABLE + "bad,\n", {}, r"row 2 \(line 3\): Rating is missing"),
    (
        ".csv",
        TABLE + "very, very bad,1\n",
        {},
        r"row 2 \(line 3\) has 3 fields, the header 2: put texts with ','",
    ),
    (".csv", TABLE + "bad\n", {}, r"row 2 \(line 3\) has 1 fields, the header 2"),
    (".csv", TABLE + '"bad,1\nworse,2\nworst,3\n', {}, "the row from line 3 on"),
    (".csv", TABLE + '"so" bad,1\n', {}, "the row from line 3 on"),
    (".csv", "text,label,label\ngood,1,2\n", {}, "two columns of text, label, label have one name"),
    (".csv", TABLE.encode() + b"caf\xe9,1\n", {}, "byte 0xe9 in line 3: save it as UTF-8"),
    (".csv", TABLE.encode("utf-16"), {}, "byte 0xff in line 1: save it as UTF-8"),
    (".csv", TABLE.encode("utf-16-le"), {}, "NUL character in line 1: .*UTF-16"),
    (".txt", "a\nb\nc\0d\n", {}, "NUL character in line 3"),
    (".csv", "a,b\ngood,1\n", {}, "no column of text; it has a, b: name one with --text_column"),
    (".csv", "a review,2\nanother,1\n", {}, "it has a review, 2: .*first line must name the columns"),
    (".csv", "a,b\ngood,1\n", dict(text_column="c"), "no column c; it has a, b: name one with --text_column"),
    (
        ".csv",
        "text\ngood\n",
        dict(condition_column="c"),
        "no column c; it has text: name one with --condition",
    ),
    (
        ".csv",
        TABLE,
        dict(label_column="c"),
        "no column c; it has Review, Rating: name one with --label_column",
    ),
    (".txt", "a\nb\n", {}, "has 2 texts, .*: give at least two to train on and one to hold out"),
    (".txt", "a. " * 4000, {}, "has 1 texts, each in a line of a txt"),
    (".jsonl", '{"text": "a", "label": 1}\n{"text": "b"}', {}, "line 2: label is missing"),
    (".jsonl", '{"text": "a"}\n{"text": "b", "label": 1}', {}, "line 1: label is missing"),
    (".jsonl", '{"text": "a", "label": null}', {}, "line 1: label is missing"),
    (".jsonl", '\n{"text": "a"}\n{"text": 5}', {}, "line 3: text is 5, but a text"),
    (".jsonl", '{"text": "a"}\n{"text": ', {}, "line 2 is not JSON"),
    (".jsonl", '{"text": "a"}\n["b"]', {}, r"line 2 is \['b'\], but an object"),
    (".jsonl", r'{"text": "a\ud83d"}', {}, "line 1: text holds '.ud83d', no character"),
    (".json", '{"text": "a"}', {}, "an array of objects is wanted"),
    (".json", '{"a": [], "b": []}', {}, "an array of objects is wanted"),
    (".json", "[1, 2]", {}, "entry 1 is 1, but an object"),
    (".json", "[" * 100_000, {}, "cannot be read as json"),
    (".parquet", "PAR1", {}, "cannot be read as parquet"),
]
MISTAKES += [
    (".jsonl", f'{{"text": "a", "label": {label}}}', {}, f"line 1: label is {shown}, but a word or a number")
    for label, shown in (
        ("NaN", "nan"),
        ("-Infinity", "-inf"),
        ('{"a": 1}', "{'a': 1}"),
        ("[[1]]", r"\[\[1\]\]"),
    )
]


@pytest.mark.parametrize("suffix, content, columns, wanted", MISTAKES)
def test_a_file_with_a_mistake_is_named_with_it(suffix, content, columns, wanted, tmp_path):
    path = write(tmp_path / f"reviews{suffix}", content)
    with pytest.raises(UserError, match=wanted) as error:
        load_texts(path, **columns)
    assert f"reviews{suffix}" in str(error.value)


@pytest.mark.parametrize(
    "dataset, wanted",
    [
        ("grammer", "no data set 'grammer'; choose grammar, tripadvisor, .*owner/name"),
        ("nothing.csv", "no file nothing.csv; without a network use --dataset grammar"),
        ("nowhere/nothing.xlsx", "no file nowhere/nothing.xlsx"),
        ("./nothing", "no data set './nothing'"),
        ("a/b/c", "no data set 'a/b/c'"),
        ("x" * 300, "no data set 'xxx"),
        ("table.xlsx", "table.xlsx cannot be read: unpack it, or save it as csv"),
        ("reviews.csv.gz", "reviews.csv.gz cannot be read: unpack it"),
        ("owner/name", "owner/name cannot be read"),
        ("folder", "folder has no split train, only other.csv; wanted is a csv"),
        ("empty", "empty has no split train, only other files"),
    ],
)
def test_what_is_no_table_is_answered_at_once_with_what_there_is(dataset, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("the hub was asked"))
    for folder in ("owner", "folder", "empty"):
        (tmp_path / folder).mkdir()
    for name in ("table.xlsx", "reviews.csv.gz", "owner/name", "folder/other.csv"):
        write(tmp_path / name, "PK")
    with pytest.raises(UserError, match=wanted):
        load_texts(dataset)


def test_only_what_looks_like_a_name_of_the_hub_is_asked_there():
    with pytest.raises(UserError, match="nobody/nothing could not be loaded from the hub"):
        load_texts("nobody/nothing")


def test_no_local_file_is_read_by_datasets(files, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("it counts its loads at a server"))
    for path in files.iterdir():
        assert len(load_texts(str(path)).train.x) == 27


# -- tokens ----------------------------------------------------------------------------------------------

TEXT = "First one here. Second, with a comma, goes on. Third! Fourth? Fifth one is the last."


def test_sentences_join_to_the_text():
    assert "".join(sentences(TEXT, at_most_40)) == TEXT


def test_pieces_fit_and_join_to_the_text():
    parts = windows(TEXT, at_most_40, overlap=False)
    assert " ".join(parts) == TEXT
    assert max(map(len, parts)) <= 40
    assert {part[-1] for part in parts} <= set(".!?,")


def test_overlapping_pieces_begin_at_every_sentence():
    parts = windows(TEXT, at_most_40, overlap=True)
    assert max(map(len, parts)) <= 40
    assert parts[2].startswith("Third!")
    assert [part for part in parts if part not in TEXT] == []
    assert TEXT.endswith(parts[-1])


def test_a_text_that_fits_stays_whole():
    assert windows("short.", at_most_40, overlap=True) == ["short."]


@pytest.mark.parametrize(
    "text, cuts",
    [  # the last characters of pieces of at most 40
        ("早餐很好。" * 20, {"。"}),
        ("「早餐很好！」" * 20, {"」"}),
        ("早餐非常好吃，" * 20, {"，"}),
        ("نام خوب است؟ " * 12, {"؟"}),
        ("होटल अच्छा था। " * 12, {"।"}),
        ("الفطور جيد، " * 12, {"،"}),
        ("breakfast pool " * 12, {"t", "l"}),
        ("ACGT" * 50, None),
        ("e\u0301\u0323" * 100, {"\u0323"}),
        ("👩\u200d👩\u200d👧\u200d👦" * 30, {"👦"}),
        ("x" + "👍🏽" * 51, {"🏽"}),
        ("https://example.org/" + "a1%20" * 60 + "z", None),
        ("a" + " " * 100 + "b", None),
        ("A sentence. " + "x" * 95 + ", with a comma. The end", None),
    ],
)
@pytest.mark.parametrize("overlap", [False, True])
def test_what_no_mark_of_ascii_cuts_is_cut_where_its_script_allows_and_nothing_is_lost(text, cuts, overlap):
    parts = windows(text.strip(), at_most_40, overlap)
    assert all(parts)
    assert max(map(len, parts)) <= 40
    assert cuts is None or {part[-1] for part in parts} <= cuts
    bare = "".join(text.split())
    if not overlap:
        assert "".join("".join(parts).split()) == bare
        assert len(parts) <= len(bare) / 20 + 3
    covered = 0
    for part in parts:  # each begins at the latest where all before it have ended
        part = "".join(part.split())
        covered = max(covered, bare.index(part, 0 if overlap else covered) + len(part))
    assert covered == len(bare) or overlap and bare.endswith(part)


def test_words_without_marks_are_no_starts_of_pieces():
    text = ("breakfast pool " * 12).strip()
    assert windows(text, at_most_40, overlap=True) == windows(text, at_most_40, overlap=False)


def test_english_is_cut_as_ever():
    text = "One, two. Three... four! 5.5 is it?\nSix\nseven; " + "eight nine ten, " * 3 + "end."
    assert windows(text, at_most_40, overlap=True) == [
        "One, two. Three... four! 5.5 is it?",
        "Three... four! 5.5 is it?\nSix\nseven;",
        "four! 5.5 is it?\nSix\nseven;",
        "5.5 is it?\nSix\nseven; eight nine ten,",
        "Six\nseven; eight nine ten,",
        "eight nine ten, eight nine ten,",
        "eight nine ten, eight nine ten, end.",
    ]


def test_a_very_long_line_is_cut_in_few_measurements():
    measured = []

    def fits(text):
        measured.append(len(text))
        return len(text) <= 200

    for text in ("ACGT" * 10_000, "word " * 8_000, "早餐很好。" * 8_000):
        measured.clear()
        parts = windows(text.strip(), fits, overlap=False)
        assert "".join("".join(parts).split()) == "".join(text.split())
        assert sum(measured) < 50 * len(text)


@pytest.fixture(scope="module")
def codec():
    return train_codec(grammar_texts().train.x[:50], 400, 80)


def test_the_codec_gives_back_its_texts_and_any_other(codec):
    texts = [*grammar_texts().train.x[:50], "caf\u00e9 \u65e5\u672c"]
    ids, target = codec.encode(texts)
    assert codec.decode(target) == texts
    assert codec.vocab <= 400
    for row, end in zip(ids, (ids >= 0).sum(1), strict=True):
        assert (row[end:] == -100).all()


def test_a_target_is_the_ids_and_an_end_but_where_the_text_was_cut(codec):
    text = grammar_texts().train.x[0]
    ids, target = codec.encode([text, "word " * 100])
    n = (ids[0] >= 0).sum()
    assert torch.equal(target[0, :n], ids[0, :n])
    assert target[0, n] == codec.eos
    assert torch.equal(target[1], ids[1])
    assert codec.eos not in target[1]
    assert codec.fits(text)
    assert not codec.fits("word " * 100)


def test_a_piece_comes_with_its_label_and_its_condition(codec):
    long = " ".join(grammar_texts().train.x[:3])
    pieces = cut_texts(Split(["a short one.", long], [3, 4], ["why?", "how?"]), codec)
    assert pieces.x[0] == "a short one."
    assert " ".join(pieces.x[1:]) == long
    assert pieces.y.tolist() == [3] + [4] * (len(pieces.x) - 1)
    assert pieces.c == ["why?"] + ["how?"] * (len(pieces.x) - 1)
    assert codec.decode(pieces.target) == pieces.x


def test_a_prefix_is_the_piece_before(codec):
    long = " ".join(grammar_texts().train.x[:3])
    whole = cut_texts(Split([long], [4], [""]), codec)
    pieces = cut_texts(Split(["a short one.", long], [3, 4], ["", ""]), codec, prefix=True)
    assert pieces.x == whole.x[1:]
    assert pieces.c == whole.x[:-1]
    with pytest.raises(UserError, match="--condition prefix needs texts of more than --max_tokens 80"):
        cut_texts(Split(["a short one."], [0], [""]), codec, prefix=True)


def test_pieces_of_any_script_fit_the_codec_and_join_to_the_text(codec):
    for text in ("早餐很好也很干净" * 40, "😀\u00e9" * 90, "ACGT" * 100):
        pieces = cut_texts(Split([text], [0], [""]), codec)
        assert "".join(pieces.x) == text
        assert all(map(codec.fits, pieces.x))
        assert codec.decode(pieces.target) == pieces.x


def test_a_word_without_an_end_does_not_stop_the_codec():
    text = "".join(random.Random(0).choices("早餐很好也干净客房服务员态度差吵闹安静舒适海滩游泳池", k=60_000))
    start = time.process_time()
    assert train_codec([text], 2000, 56).vocab == 2000
    assert time.process_time() - start < 4  # 9 s where it is learned whole


@pytest.mark.parametrize("text", ["it was <eos> and nice", "a <mask> all day", "<|endoftext|> [SEP] <unk>"])
def test_what_looks_like_a_control_token_is_text(text):
    codec = train_codec(["it was a nice day, and all of it", text], 400, 64)
    assert codec.decode(codec.encode([text])[1]) == [text]


def test_labels_that_look_alike_are_one_class(tmp_path):
    labels = ["1.5", "1.50", "2", "2.", "2.00", "cafe\u0301", "caf\u00e9", "10", "10.0"]
    rows = "".join(f"text {i},{label}\n" for i, label in enumerate(labels))
    assert load_texts(write(tmp_path / "a.csv", "text,label\n" + rows)).names == [
        "2",
        "10",
        "1.5",
        "caf\u00e9",
    ]


def test_a_stray_quote_in_a_tsv_does_not_swallow_the_next_row(tmp_path):
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"Nice place\t5\nhe said "\t4\nc\t3\nd\t3\n')
    with pytest.raises(UserError, match="row 1 .line 2. has tabs and lines inside double quotes"):
        load_texts(path)
