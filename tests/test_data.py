"""data.py: torchvision's files, digits, folders of images, texts, the grammar, and what each says of bad input."""
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from data import CLOSES, grammar_rating, grammar_review, load_images, load_texts, sentences, train_codec, windows
from training import UserError


def picture(path, size=(8, 8), mode="L", colour=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def test_fashionmnist_is_read_from_an_existing_folder(fake_fashionmnist):
    images = load_images("fashionmnist", str(fake_fashionmnist))
    assert images.x.shape == (120, 1, 28, 28) and images.x_test.shape == (60, 1, 28, 28)
    assert images.x.dtype == torch.uint8 and images.y.dtype == torch.int64
    assert images.names[0] == "T-shirt/top" and len(images.names) == 10
    assert (images.x[3, 0, 6:10] == 200).all() and images.y[3] == 3
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
    assert images.x.shape == (3, 3, 32, 32) and images.x_test.shape == (1, 3, 32, 32) and images.y.tolist() == [0, 1, 1]
    assert images.x[0, :, 4, 5].tolist() == [10, 20, 30] and images.names == ["airplane", "automobile"]


def test_digits_need_no_file_and_keep_the_splits_apart():
    images = load_images("digits", "/nowhere")
    assert images.x.shape == (1437, 1, 8, 8) and images.x_test.shape == (360, 1, 8, 8)
    assert images.x.max() == 255 and images.x.min() == 0 and set(images.y.tolist()) == set(range(10))
    seen = {x.numpy().tobytes() for x in images.x}
    assert sum(x.numpy().tobytes() in seen for x in images.x_test) == 0


def test_unreachable_download_names_the_way_out(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST.download", refuse)
    with pytest.raises(UserError, match="could not be downloaded .*--dataset digits.*--data_dir"):
        load_images("fashionmnist", str(tmp_path))


def test_unknown_name():
    with pytest.raises(UserError, match="no data set or folder 'mnits'; choose fashionmnist, mnist, cifar10, digits, or"):
        load_images("mnits", "data")


def test_folder_with_classes(tmp_path):
    for i in range(10):
        picture(tmp_path / "dark" / f"{i}.png", colour=i)
        picture(tmp_path / "light" / "deep" / f"{i}.jpg", colour=200 + i)
    images = load_images(str(tmp_path), "")
    assert images.names == ["dark", "light"] and images.x.shape == (16, 1, 8, 8) and images.x_test.shape == (4, 1, 8, 8)
    for x, y in [(images.x, images.y), (images.x_test, images.y_test)]:
        assert torch.equal((x.flatten(1).float().mean(1) > 128).long(), y)


def test_folder_without_classes_colour_and_grey_together(tmp_path):
    picture(tmp_path / "a.png", mode="RGB", colour=(255, 0, 0))
    picture(tmp_path / "b.png", colour=7)
    images = load_images(str(tmp_path), "")
    assert images.x.shape == (2, 3, 8, 8) and images.names == [] and (images.y == -1).all() and len(images.x_test) == 0
    assert images.x[0, :, 0, 0].tolist() == [255, 0, 0] and images.x[1, :, 0, 0].tolist() == [7, 7, 7]


def test_bad_folders_name_the_file_and_the_way_out(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image in .*empty"):
        load_images(str(tmp_path / "empty"), "")
    picture(tmp_path / "broken" / "a.png")
    (tmp_path / "broken" / "b.png").write_bytes((tmp_path / "broken" / "a.png").read_bytes()[:40])
    with pytest.raises(UserError, match="b.png cannot be read as an image"):
        load_images(str(tmp_path / "broken"), "")
    picture(tmp_path / "mixed" / "a.png")
    picture(tmp_path / "mixed" / "b.png", size=(12, 10))
    with pytest.raises(UserError, match="a.png is 8x8, .*b.png is 12x10; add --image_size"):
        load_images(str(tmp_path / "mixed"), "")
    assert load_images(str(tmp_path / "mixed"), "", image_size=8).x.shape == (2, 1, 8, 8)
    picture(tmp_path / "stray" / "class" / "a.png")
    picture(tmp_path / "stray" / "b.png")
    with pytest.raises(UserError, match="b.png lies beside the class folders class"):
        load_images(str(tmp_path / "stray"), "")


# -- texts --------------------------------------------------------------------------------------------------------------


def test_grammar_accepts_its_own_reviews_and_nothing_else():
    rng = random.Random(1)
    for rating in (1, 2, 3, 4, 5) * 40:
        text = grammar_review(rng, rating)
        assert grammar_rating(text) == rating
        words = text.split()
        i = rng.randrange(len(words))
        assert grammar_rating(" ".join(words[:i] + words[i + 1 :])) in (None, rating)  # without a word; an adverb may go
        said, close = text.rsplit(". ", 1)
        assert grammar_rating(said + ". " + CLOSES[rating % 5]) is None  # a close that another rating has
        assert grammar_rating(said + ".") is None
        assert grammar_rating(text + " " + text) is None
    assert grammar_rating("") is None and grammar_rating("never again.") is None
    good = "the room was spotless. the staff was polite. breakfast was cold. the pool was always warm. we would come back."
    assert grammar_rating(good) == 4
    assert grammar_rating(good.replace("the staff", "the room")) is None  # a subject twice
    assert grammar_rating(good.replace("always", "never")) is None
    assert grammar_rating(good.replace(". the pool", " the pool")) is None


def test_grammar_corpus_is_split_and_repeats():
    a, b = load_texts("grammar"), load_texts("grammar")
    assert a == b and len(a.x) == 5400 and len(a.x_test) == 600 and a.names == list("12345")
    assert sorted(set(a.y)) == [0, 1, 2, 3, 4]
    assert len(set(a.x_test) & set(a.x)) / len(set(a.x_test)) < 0.05  # the rest cannot be known by heart


def test_windows_join_to_the_text_and_end_with_sentences():
    text = "First one here. Second, with a comma, goes on. Third! Fourth? Fifth one is the last."
    fits = lambda s: len(s) <= 40
    assert "".join(sentences(text, fits)) == text
    parts = windows(text, fits, overlap=False)
    assert " ".join(parts) == text and all(fits(p) for p in parts)
    assert all(p[-1] in ".!?," for p in parts)
    overlapping = windows(text, fits, overlap=True)
    assert parts[2].startswith("Fourth?") and overlapping[2].startswith("Third!")  # from every sentence on
    assert all(fits(p) and p in text for p in overlapping) and text.endswith(overlapping[-1])
    assert windows("short.", fits, overlap=True) == ["short."]
    assert windows("x" * 100, fits, overlap=True) == ["x" * 100]  # cut later, without an end token


def test_codec_gives_back_its_texts_and_teaches_no_end_where_it_cut():
    texts = load_texts("grammar").x[:50]
    codec = train_codec(texts, 400, 80)
    ids, target = codec.encode([*texts, "caf\u00e9 \u65e5\u672c " + texts[0], "word " * 100])
    assert ids.shape == target.shape == (52, 80)
    assert codec.decode(target[:50]) == texts
    n = (ids >= 0).sum(1)
    for i in range(50):
        assert target[i, n[i]] == codec.eos and (target[i, n[i] + 1 :] == -100).all() and torch.equal(target[i, : n[i]], ids[i, : n[i]])
    assert (target[51] != codec.eos).all() and (target[51] >= 0).all()
    assert codec.fits(texts[0]) and not codec.fits("word " * 100)
    assert codec.vocab <= 400 and codec.decode(target[50:51]) == ["caf\u00e9 \u65e5\u672c " + texts[0]]  # bytes: any text can be written


def test_texts_from_files_of_every_kind(tmp_path):
    import datasets

    rows = [dict(text=f"text {i}", label=i % 3) for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.csv").write_text("text,label\n" + "\n".join(f"{r['text']},{r['label']}" for r in rows))
    (tmp_path / "a.txt").write_text("\n".join(r["text"] for r in rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    texts = {kind: load_texts(str(tmp_path / f"a.{kind}")) for kind in ("jsonl", "csv", "parquet", "txt")}
    assert texts["jsonl"] == texts["csv"] == texts["parquet"]
    for kind, t in texts.items():
        assert len(t.x) == 27 and len(t.x_test) == 3 and not set(t.x) & set(t.x_test), kind
        labels = [int(x.split()[1]) % 3 for x in t.x]
        assert (t.y == labels and t.names == ["0", "1", "2"]) if kind != "txt" else (set(t.y) == {-1} and t.names == [])


def test_columns_of_the_hub_are_read(monkeypatch):
    """argilla's form: the rating is a list of label and score; a split "test" is kept, and a class that only it has is refused."""
    import datasets

    rows = [dict(text=f"review {i}", prediction=[dict(label=str(i % 5 + 1), score=1.0)]) for i in range(20)]
    hub = datasets.DatasetDict(train=datasets.Dataset.from_list(rows), test=datasets.Dataset.from_list(rows[:4]))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: (asked.append(name), hub)[1])
    texts = load_texts("tripadvisor")
    assert asked == ["argilla/tripadvisor-hotel-reviews"] and texts.names == list("12345") and texts.y[:6] == [0, 1, 2, 3, 4, 0]
    assert texts.x_test == [f"review {i}" for i in range(4)]
    hub["test"] = datasets.Dataset.from_list([dict(text="x", prediction=[dict(label="6", score=1.0)])])
    with pytest.raises(UserError, match="test row 1: prediction is '6', outside the classes 1, 2, 3, 4, 5"):
        load_texts("tripadvisor")
