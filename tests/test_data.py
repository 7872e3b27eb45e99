"""data.py: torchvision's files, digits, folders of images, texts, tokens; and what each says of bad input."""

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from data import Split, cut_texts, load_images, load_texts, sentences, train_codec, windows
from tasks import grammar_texts
from training import UserError


def picture(path, size=(8, 8), mode="L", colour=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def at_most_40(text):
    return len(text) <= 40


# -- images ----------------------------------------------------------------------------------------------


def test_fashionmnist_is_read_from_an_existing_folder(fake_fashionmnist):
    images = load_images("fashionmnist", str(fake_fashionmnist))
    assert images.x.shape == (120, 1, 28, 28)
    assert images.x_test.shape == (60, 1, 28, 28)
    assert images.x.dtype == torch.uint8
    assert images.y.dtype == torch.int64
    assert images.names[0] == "T-shirt/top"
    assert len(images.names) == 10
    assert (images.x[3, 0, 6:10] == 200).all()
    assert images.y[3] == 3


def test_image_size_scales_every_image(fake_fashionmnist):
    assert load_images("fashionmnist", str(fake_fashionmnist), image_size=16).x.shape == (120, 1, 16, 16)


def test_cifar10_is_colour_channels_first(monkeypatch):
    class Stub:  # what torchvision's CIFAR10 holds once its files are read
        classes = ["airplane", "automobile"]

        def __init__(self, root, train, download):
            self.targets = [0, 1, 1] if train else [1]
            self.data = np.zeros((len(self.targets), 32, 32, 3), dtype=np.uint8)
            self.data[:, 4, 5] = (10, 20, 30)

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Stub)
    images = load_images("cifar10", "")
    assert images.x.shape == (3, 3, 32, 32)
    assert images.x_test.shape == (1, 3, 32, 32)
    assert images.y.tolist() == [0, 1, 1]
    assert images.x[0, :, 4, 5].tolist() == [10, 20, 30]
    assert images.names == ["airplane", "automobile"]


def test_digits_need_no_file_and_keep_the_splits_apart():
    images = load_images("digits", "/nowhere")
    assert images.x.shape == (1437, 1, 8, 8)
    assert images.x_test.shape == (360, 1, 8, 8)
    assert (images.x.min(), images.x.max()) == (0, 255)
    assert set(images.y.tolist()) == set(range(10))
    seen = {x.numpy().tobytes() for x in images.x}
    assert sum(x.numpy().tobytes() in seen for x in images.x_test) == 0


def test_a_download_that_fails_names_the_way_out(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST.download", refuse)
    with pytest.raises(UserError, match="could not be downloaded .*--dataset digits.*--data_dir"):
        load_images("fashionmnist", str(tmp_path))


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match="'mnits'; choose fashionmnist, mnist, cifar10, digits, or"):
        load_images("mnits", "data")


def test_subfolders_are_classes(tmp_path):
    for i in range(10):
        picture(tmp_path / "dark" / f"{i}.png", colour=i)
        picture(tmp_path / "light" / "deep" / f"{i}.jpg", colour=200 + i)
    images = load_images(str(tmp_path), "")
    assert images.names == ["dark", "light"]
    assert images.x.shape == (16, 1, 8, 8)
    assert images.x_test.shape == (4, 1, 8, 8)
    for x, y in [(images.x, images.y), (images.x_test, images.y_test)]:
        assert torch.equal((x.flatten(1).float().mean(1) > 128).long(), y)


def test_a_grey_image_beside_one_in_colour_is_read_in_colour(tmp_path):
    picture(tmp_path / "a.png", mode="RGB", colour=(255, 0, 0))
    picture(tmp_path / "b.png", colour=7)
    images = load_images(str(tmp_path), "")
    assert images.x.shape == (2, 3, 8, 8)
    assert images.x[0, :, 0, 0].tolist() == [255, 0, 0]
    assert images.x[1, :, 0, 0].tolist() == [7, 7, 7]
    assert images.names == []
    assert (images.y == -1).all()
    assert len(images.x_test) == 0


def test_a_folder_without_an_image_is_refused(tmp_path):
    with pytest.raises(UserError, match="no image in"):
        load_images(str(tmp_path), "")


def test_a_broken_image_is_named(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.raises(UserError, match="b.png cannot be read as an image"):
        load_images(str(tmp_path), "")


def test_images_of_mixed_sizes_are_named_and_image_size_mends_them(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", size=(12, 10))
    with pytest.raises(UserError, match="a.png is 8x8, .*b.png is 12x10; add --image_size"):
        load_images(str(tmp_path), "")
    assert load_images(str(tmp_path), "", image_size=8).x.shape == (2, 1, 8, 8)


def test_an_image_beside_class_folders_is_named(tmp_path):
    picture(tmp_path / "class" / "a.png")
    picture(tmp_path / "b.png")
    with pytest.raises(UserError, match="b.png lies beside the class folders class"):
        load_images(str(tmp_path), "")


# -- texts -----------------------------------------------------------------------------------------------


def test_the_grammars_texts_repeat_and_its_splits_hardly_overlap():
    a, b = grammar_texts(), grammar_texts()
    assert a == b
    assert (len(a.train.x), len(a.test.x)) == (5400, 600)
    assert a.names == list("12345")
    assert sorted(set(a.train.y)) == [0, 1, 2, 3, 4]
    assert len(set(a.test.x) & set(a.train.x)) / len(set(a.test.x)) < 0.05  # the rest is not known by heart


ROWS = [dict(text=f"text {i}", label=i % 3, about=f"topic {i}") for i in range(30)]


@pytest.fixture
def files(tmp_path):
    """The folder of a.jsonl, a.csv, a.parquet and a.txt, all with the texts of ROWS."""
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    lines = [",".join(map(str, row.values())) for row in ROWS]
    (tmp_path / "a.csv").write_text("\n".join(["text,label,about", *lines]))
    (tmp_path / "a.txt").write_text("\n".join(row["text"] for row in ROWS))
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    return tmp_path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_texts_labels_and_conditions_of_a_file_stay_together(kind, files):
    texts = load_texts(str(files / f"a.{kind}"), condition_column="about")
    assert (len(texts.train.x), len(texts.test.x)) == (27, 3)
    assert texts.names == ["0", "1", "2"]
    read = []
    for part in (texts.train, texts.test):
        read += zip(part.x, part.y, part.c, strict=True)
    assert sorted(read) == sorted((row["text"], row["label"], row["about"]) for row in ROWS)


def test_lines_of_a_txt_are_texts_without_labels(files):
    texts = load_texts(str(files / "a.txt"))
    assert sorted(texts.train.x + texts.test.x) == sorted(row["text"] for row in ROWS)
    assert texts.names == []
    assert set(texts.train.y) == {-1}


def test_the_checksum_changes_with_the_training_texts_and_with_their_conditions(files):
    path = str(files / "a.csv")
    same, other = load_texts(path), load_texts(path, condition_column="about")
    assert load_texts(path).checksum() == same.checksum()
    assert same.checksum() != other.checksum()


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
    path = tmp_path / "a.csv"
    path.write_text("\n".join(["text,label", *(f"text {i},{i % 12}" for i in range(60))]))
    assert load_texts(str(path)).names == [str(i) for i in range(12)]


def test_more_than_a_hundred_labels_are_no_classes(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("\n".join(["text,label", *(f"text {i},{i}" for i in range(101))]))
    with pytest.raises(UserError, match="101 values, too many for classes; .*--label_column"):
        load_texts(str(path))


MISTAKES = [
    (b"", {}, "is empty"),
    (b"Review,Rating\ngood,1\n,2\n", {}, "row 2: Review is None"),
    (b"Review,Rating\ngood,1\nbad,\n", {}, "row 2: Rating is missing"),
    (b"Review,Rating\ngood \xff\xfe,1\n", {}, "UTF-8"),
    (b"a,b\ngood,1\n", {}, "no column of text; it has a, b: name one with --text_column"),
    (b"a,b\ngood,1\n", dict(text_column="c"), "no column c; it has a, b: name one with --text_column"),
    (b"text\ngood\n", dict(condition_column="c"), "no column c; it has text: name one with --condition"),
]


@pytest.mark.parametrize("content, columns, wanted", MISTAKES)
def test_a_file_with_a_mistake_is_named_with_it(content, columns, wanted, tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=wanted) as error:
        load_texts(str(path), **columns)
    assert "reviews.csv" in str(error.value)


@pytest.mark.parametrize(
    "dataset, wanted",
    [
        ("grammer", "no data set 'grammer'; choose grammar, tripadvisor"),
        ("nothing.csv", "no file nothing.csv; without a network use --dataset grammar"),
        ("nobody/nothing", "nobody/nothing could not be had from the hub"),
    ],
)
def test_an_unknown_data_set_is_answered_with_what_there_is(dataset, wanted):
    with pytest.raises(UserError, match=wanted):
        load_texts(dataset)


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


@pytest.mark.parametrize("text", ["short.", "x" * 100])
def test_a_text_that_fits_and_a_sentence_too_long_stay_whole(text):
    assert windows(text, at_most_40, overlap=True) == [text]


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
