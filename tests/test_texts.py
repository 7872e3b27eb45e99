"""common/texts.py: which texts and labels are read of a table, how they are cut, and their tokens."""

import hashlib
import json

import pytest
import torch
from conftest import SHARED

from common import texts
from common.run import UserError
from common.tables import load_tables
from tasks import grammar

FIELD, TOKENIZERS = SHARED / "field", SHARED / "tokenizers"
REVIEWS = SHARED / "data/tripadvisor/tripadvisor_hotel_reviews.csv"
ROWS = [dict(text=f"text {i}", label=i % 3, about=f"topic {i}") for i in range(30)]


def table(*labels, **columns):
    """A training table with a text for each label."""
    return dict(train=[dict(text=f"text {i}", label=label) | columns for i, label in enumerate(labels)])


def read(data):
    """Texts and the names of their labels, of both splits, in some order that is always the same."""
    return sorted((x, data.names[y] if y >= 0 else None) for x, y, _ in data.train + data.test)


def checksum(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


# -- rows ----------------------------------------------------------------------------------------------------


def test_texts_labels_and_conditions_stay_together_and_a_tenth_is_held_out():
    data = texts.read_texts(dict(train=ROWS), "a.json", condition="about")
    assert (len(data.train), len(data.test)) == (27, 3)
    assert data.names == ["0", "1", "2"]
    assert sorted(data.train + data.test) == sorted(tuple(row.values()) for row in ROWS)


def test_without_labels_and_conditions_there_are_none():
    data = texts.read_texts(dict(train=[dict(text=f" {i}\n") for i in range(9)]), "a.txt")
    assert data.names == []
    assert sorted(data.train + data.test) == [(str(i), -1, "") for i in range(9)]


def test_a_test_split_is_kept_as_it_is():
    data = texts.read_texts(dict(train=ROWS[:20], test=ROWS[20:]), "folder")
    assert [x for x, _, _ in data.train + data.test] == [row["text"] for row in ROWS]


def test_the_grammars_texts_are_those_of_aca34c9_and_its_splits_hardly_overlap():
    data = texts.read_texts(dict(train=grammar.rows()), "grammar")
    assert (len(data.train), len(data.test), data.names) == (5400, 600, list("12345"))
    assert checksum(data.train + data.test) == "ddd5da997d5f"
    train, test = ({x for x, _, _ in rows} for rows in (data.train, data.test))
    assert len(test & train) / len(test) < 0.05  # the rest is not known by heart


@pytest.mark.skipif(not REVIEWS.exists(), reason="no ../shared/data here")
def test_the_reviews_of_tripadvisor_and_their_split_are_those_of_aca34c9():
    data = texts.read_texts(load_tables(str(REVIEWS)), "reviews")
    assert (len(data.train), len(data.test), data.names) == (1530, 170, list("12345"))
    assert checksum(data.train + data.test) == "cd276f67dda7"


def test_the_checksum_changes_with_the_texts_and_labels_and_if_asked_with_the_conditions():
    tables = dict(train=ROWS)
    a, b = (texts.read_texts(tables, "a", condition=condition) for condition in (None, "about"))
    c = texts.read_texts(tables, "b", label_column="none")
    assert a.checksum() == b.checksum() != c.checksum()
    assert a.checksum(conditions=True) != b.checksum(conditions=True)


# -- labels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, names",
    [
        ([" 5", "5", "5 ", 5, 5.0], ["5"]),
        (["5", "5.0", "5.", "5.00"], ["5", "5.", "5.0", "5.00"]),
        (["3.1", "3.10", "3.2", "3.20"], ["3.1", "3.2", "3.10", "3.20"]),
        ([4.5, "4.5", -1.0, -1, 10, 9], ["9", "-1", "10", "4.5"]),
        (["None", "NA", "N/A", "null"], ["NA", "N/A", "None", "null"]),
        (["good", "Good", True, "False"], ["Good", "True", "good", "False"]),
        (["007", "7", "1e3", "five"], ["7", "007", "1e3", "five"]),
        (["cafe\u0301", "caf\u00e9"], ["caf\u00e9"]),
        (list(range(12)), list(map(str, range(12)))),
        ([[dict(label="2", score=1.0)], [dict(label="1", score=0.5)]], ["1", "2"]),  # argilla's form
    ],
)
def test_a_label_is_what_is_written_or_the_value_of_a_number(values, names):
    assert texts.read_texts(table(*values * 3), "a.jsonl").names == names


@pytest.mark.skipif(not FIELD.exists(), reason="no ../shared/field here")
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_versions_are_classes_of_their_own(suffix):
    path = str(FIELD / f"x01_version_labels/releases.{suffix}")
    assert texts.read_texts(load_tables(path), path).names == ["3.1", "3.2", "3.9", "3.10", "3.20"]


def test_a_label_column_is_guessed_declined_or_missed_and_always_said():
    rows = [dict(Id=i, Text="a text", LABEL=i % 2) for i in range(9)]
    data = texts.read_texts(dict(train=rows), "a.csv")
    assert data.names == ["0", "1"]
    assert "Text" in data.columns and "LABEL" in data.columns
    for none in ("none", "None"):
        assert texts.read_texts(dict(train=rows), "a.csv", label_column=none).names == []
    rows = [dict(Id=row["Id"], Text=row["Text"], Score=row["LABEL"]) for row in rows]
    data = texts.read_texts(dict(train=rows), "b.csv")
    assert data.names == []
    assert "Score" in data.columns  # it may have been meant
    assert texts.read_texts(dict(train=rows), "b.csv", label_column="Score").names == ["0", "1"]
    rows = [dict(text=row["Text"], none=row["Score"]) for row in rows]
    assert texts.read_texts(dict(train=rows), "c.csv", label_column="none").names == ["0", "1"]


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, columns",
    [
        ([dict(text="", label="1")], {}),
        ([dict(text=" \n", label="1")], {}),
        ([dict(text=5)], {}),
        ([dict(text="a\ud83d")], {}),
        ([dict(text="a\0")], {}),
        ([dict(text="a", label="1"), dict(text="b")], {}),
        ([dict(text="a"), dict(text="b", label="1")], {}),
        ([dict(text="a", label="")], {}),
        ([dict(a="good", b="1")], {}),
        ([dict(text="good")], dict(text_column="c")),
        ([dict(text="good")], dict(label_column="c")),
        ([dict(text="good")], dict(condition="c")),
        ([dict(text="good", about="")], dict(condition="about")),
    ]
    + [
        ([dict(text="a", label=label)], {})
        for label in (None, [], float("nan"), -float("inf"), dict(a=1), [[1]], [dict(label=1)] * 2)
    ],
)
def test_a_row_that_lacks_a_text_or_a_label_is_refused_with_the_file(rows, columns):
    good = {name: "x" for row in rows for name in row}
    with pytest.raises(UserError, match=r"reviews\.csv"):
        texts.read_texts(dict(train=rows + [good] * 9), "reviews.csv", **columns)


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[:2]])
def test_too_few_texts_are_refused(rows):
    with pytest.raises(UserError, match=r"reviews\.csv"):
        texts.read_texts(dict(train=rows), "reviews.csv")


def test_a_class_that_only_the_test_split_has_is_refused():
    with pytest.raises(UserError, match="folder"):
        texts.read_texts(dict(train=ROWS, test=[dict(text="a", label=3)]), "folder")


@pytest.mark.skipif(not FIELD.exists(), reason="no ../shared/field here")
def test_a_column_that_the_test_split_lacks_is_missing_there_and_no_cell_of_a_row():
    tables = load_tables(str(FIELD / "x06_kaggle/comp"))
    with pytest.raises(UserError, match="comp test has no column label"):
        texts.read_texts(tables, "comp")
    assert len(texts.read_texts(tables, "comp", label_column="none").test) == 30


def test_more_than_a_hundred_labels_are_no_classes():
    assert len(texts.read_texts(table(*range(100)), "reviews.csv").names) == 100
    with pytest.raises(UserError, match=r"reviews\.csv"):
        texts.read_texts(table(*range(101)), "reviews.csv")


# -- pieces --------------------------------------------------------------------------------------------------

TEXT = "First one here. Second, with a comma, goes on. Third! Fourth? Fifth one is the last."


def at_most_40(text):
    return len(text) <= 40


def test_pieces_fit_and_join_to_the_text():
    assert "".join(texts.sentences(TEXT, at_most_40)) == TEXT
    parts = texts.cut(TEXT, at_most_40)
    assert " ".join(parts) == TEXT
    assert max(map(len, parts)) <= 40
    assert {part[-1] for part in parts} <= set(".!?,")
    assert texts.cut("short.", at_most_40, overlap=True) == ["short."]


def test_overlapping_pieces_begin_at_every_sentence():
    text = "One, two. Three... four! 5.5 is it?\nSix\nseven; " + "eight nine ten, " * 3 + "end."
    assert texts.cut(text, at_most_40, overlap=True) == [
        "One, two. Three... four! 5.5 is it?",
        "Three... four! 5.5 is it?\nSix\nseven;",
        "four! 5.5 is it?\nSix\nseven;",
        "5.5 is it?\nSix\nseven; eight nine ten,",
        "Six\nseven; eight nine ten,",
        "eight nine ten, eight nine ten,",
        "eight nine ten, eight nine ten, end.",
    ]
    words = ("breakfast pool " * 12).strip()  # but not at every word
    assert texts.cut(words, at_most_40, overlap=True) == texts.cut(words, at_most_40)


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
def test_a_text_is_cut_where_its_script_allows_and_nothing_is_lost(text, cuts, overlap):
    parts = texts.cut(text.strip(), at_most_40, overlap)
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


@pytest.mark.parametrize("text", ["ACGT" * 10_000, "word " * 8_000, "早餐很好。" * 8_000])
def test_a_very_long_line_is_cut_in_few_measurements(text):
    measured = []

    def fits(text):
        measured.append(len(text))
        return len(text) <= 200

    parts = texts.cut(text.strip(), fits)
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert sum(measured) < 50 * len(text)


def test_a_piece_comes_with_its_label_and_its_condition_or_the_piece_before():
    rows = [("a short one.", 3, "why?"), (TEXT, 4, "how?")]
    parts = texts.cut(TEXT, at_most_40)
    assert texts.cut_rows(rows, at_most_40) == [rows[0], *((part, 4, "how?") for part in parts)]
    pairs = zip(parts[1:], parts[:-1], strict=True)
    assert texts.cut_rows(rows, at_most_40, prefix=True) == [(part, 4, before) for part, before in pairs]


# -- tokens --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reviews():
    return [row["text"] for row in grammar.rows(50)]


@pytest.fixture(scope="module")
def tokenizer(reviews):
    return texts.from_json(*texts.train_tokenizer(reviews, 400))


def test_texts_come_back_from_their_tokens(tokenizer, reviews):
    given = [*reviews, "caf\u00e9 \u65e5\u672c 👍🏽"]
    target = texts.encode(tokenizer, given, 80, end=True)
    assert texts.decode(tokenizer, target) == given
    assert len(tokenizer) <= 400
    for row, end in zip(target, (target >= 0).sum(1), strict=True):
        assert (row[end:] == -100).all()
    assert texts.encode(tokenizer, [], 80).shape == (0, 80)


def test_a_target_is_the_ids_and_an_end_except_where_the_text_was_cut(tokenizer, reviews):
    given = [reviews[0], "word " * 100]
    ids, target = texts.encode(tokenizer, given, 80), texts.encode(tokenizer, given, 80, end=True)
    n = (ids[0] >= 0).sum()
    assert torch.equal(target[0, :n], ids[0, :n])
    assert target[0, n] == tokenizer.eos_token_id == 1
    assert torch.equal(target[1], ids[1])
    assert 1 not in target[1]
    fits = texts.fits(tokenizer, tokenizer, 80)
    assert [fits(text) for text in given] == [True, False]
    assert fits(given[0]) == texts.fits(tokenizer, tokenizer, n + 1)(given[0])
    assert not texts.fits(tokenizer, tokenizer, n)(given[0])  # there is no place for the end


@pytest.mark.parametrize("text", ["早餐很好也很干净" * 40, "😀\u00e9" * 90, "ACGT" * 100])
def test_pieces_of_any_script_fit_the_tokenizer_and_join_to_the_text(text, tokenizer):
    fits = texts.fits(tokenizer, tokenizer, 80)
    pieces = texts.cut(text, fits)
    assert "".join(pieces) == text
    assert all(map(fits, pieces))
    assert texts.decode(tokenizer, texts.encode(tokenizer, pieces, 80, end=True)) == pieces


@pytest.mark.parametrize("text", ["it was <eos> and nice", "a <mask> all day", "<|endoftext|> [SEP] <unk>"])
def test_what_looks_like_a_control_token_is_text(text):
    tokenizer = texts.from_json(*texts.train_tokenizer(["it was a nice day, and all of it", text], 400))
    ids = texts.encode(tokenizer, [text], 64, end=True)
    assert texts.decode(tokenizer, ids) == [text]
    assert texts.fits(tokenizer, tokenizer, (ids >= 0).sum() + 1)(text)
    assert not texts.fits(tokenizer, tokenizer, (ids >= 0).sum() - 1)(text)


def test_a_tokenizer_comes_back_from_its_json(tokenizer, reviews):
    saved = json.loads(json.dumps(texts.train_tokenizer(reviews, 400)))
    texts.from_json.cache_clear()
    again = texts.from_json(*saved)
    assert torch.equal(texts.encode(again, reviews, 80), texts.encode(tokenizer, reviews, 80))


def test_a_tokenizer_that_is_nowhere_is_refused(tmp_path):
    with pytest.raises(UserError, match=tmp_path.name):
        texts.pretrained_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="nobody/nothing"):
        texts.pretrained_tokenizer("nobody/nothing")


@pytest.mark.skipif(not TOKENIZERS.exists(), reason="no ../shared/tokenizers here")
def test_berts_and_gpt2s_tokens_and_pieces_are_those_of_aca34c9():
    bert, gpt2 = (
        texts.from_json(*texts.pretrained_tokenizer(str(TOKENIZERS / name)))
        for name in ("bert-base-uncased", "gpt2")
    )
    given = ["The room wasn't <|endoftext|> bad.", "[SEP] caf\u00e9 👍"]
    assert texts.encode(bert, given, 8).tolist() == [
        [101, 1996, 2282, 2347, 1005, 1056, 1026, 1064],
        [101, 1031, 19802, 1033, 7668, 100, 102, -100],
    ]
    assert texts.encode(gpt2, given, 8, end=True).tolist() == [
        [464, 2119, 2492, 470, 1279, 91, 437, 1659],
        [58, 5188, 47, 60, 40304, 50169, 235, 50256],
    ]
    with pytest.raises(UserError):
        texts.fits(bert, bert, 256)  # BERT has no end token
    if REVIEWS.exists():
        data, fits = texts.read_texts(load_tables(str(REVIEWS)), "reviews"), texts.fits(bert, gpt2, 256)
        pieces = texts.cut_rows(data.train[:200], fits, overlap=True) + texts.cut_rows(data.test, fits)
        assert checksum(pieces) == "d74771f28149"
        target = texts.encode(gpt2, [x for x, _, _ in pieces], 256, end=True)
        assert (target == gpt2.eos_token_id).any(1).float().mean() > 0.95  # single sentences can be too long
        assert (
            checksum((texts.encode(bert, [x for x, _, _ in pieces], 256).tolist(), target.tolist()))
            == "b777c62b249d"
        )
        assert checksum(texts.decode(gpt2, target)) == "c377dc455366"
