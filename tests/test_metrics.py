"""metrics.py against torchmetrics, scipy and cases with a known answer."""

import numpy as np
import pytest
import sacrebleu
import scipy.linalg
import torch
from torchmetrics.image.kid import poly_mmd

import metrics
from data import load_images
from files import UserError

CPU = torch.device("cpu")


def normal(n, seed, mean=0.0, scale=1.0):
    return mean + scale * np.random.default_rng(seed).standard_normal((n, 8)) @ np.linspace(
        0.5, 2, 64
    ).reshape(8, 8)


def test_frechet_distance_equals_its_definition_and_is_zero_on_itself():
    f, g = normal(300, 0), normal(200, 1, mean=0.5, scale=1.5)
    s, r = np.cov(f, rowvar=False), np.cov(g, rowvar=False)
    want = ((f.mean(0) - g.mean(0)) ** 2).sum() + np.trace(s + r - 2 * scipy.linalg.sqrtm(s @ r).real)
    assert metrics.frechet_distance(f, g) == pytest.approx(want, rel=1e-4)
    assert metrics.frechet_distance(f, f) == pytest.approx(0, abs=1e-4 * np.trace(s))
    a, b = np.random.default_rng(0).standard_normal((2, 200_000, 2))
    assert metrics.frechet_distance(a, 3 + 2 * b) == pytest.approx(
        2 * 9 + 2 * 1, rel=0.02
    )  # |mean|^2 + d (1 - 2)^2


def test_kernel_distance_equals_torchmetrics_and_is_unbiased():
    f, g = normal(120, 0), normal(100, 1, mean=0.5)
    f = f[:100]  # theirs wants equal numbers
    assert metrics.kernel_distance(f, g) == pytest.approx(
        poly_mmd(torch.as_tensor(f), torch.as_tensor(g)).item(), rel=1e-6
    )
    same = [metrics.kernel_distance(normal(50, 2 * i), normal(50, 2 * i + 1)) for i in range(300)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(300)


def test_precision_and_recall_see_missing_modes_and_stray_samples():
    left, right = normal(200, 0), normal(200, 1, mean=100.0)
    both = np.concatenate([left, right])
    precision, recall = metrics.precision_recall(normal(200, 2), both)  # one mode is missing
    assert precision == pytest.approx(1, abs=0.1)
    assert recall == pytest.approx(0.5, abs=0.05)
    stray = np.concatenate([normal(200, 3), normal(200, 4, mean=-1000.0)])
    assert metrics.precision_recall(stray, left)[0] == pytest.approx(0.5, abs=0.05)


def test_nearest_ratio_tells_copies_from_new_samples():
    train, test = normal(200, 0), normal(200, 1)
    assert 0.8 < metrics.nearest_ratio(normal(200, 2), train, test)[0] < 1.2
    ratio, nearest = metrics.nearest_ratio(train[:50] + 1e-6, train, test)
    assert ratio < 1e-3
    assert (nearest == np.arange(50)).all()


def same_weights(a, b):
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def test_classifier_is_seeded_cached_and_scores_rank_real_above_noise(tmp_path):
    images = load_images("digits", "")
    before = torch.random.get_rng_state()
    net, accuracy = metrics.load_classifier(images, tmp_path, CPU, steps=300)
    assert accuracy > 0.9
    assert torch.equal(before, torch.random.get_rng_state())
    again, cached_accuracy = metrics.load_classifier(images, tmp_path, CPU, steps=300)
    assert cached_accuracy == accuracy
    assert len(list(tmp_path.iterdir())) == 1
    assert same_weights(net, again)
    next(tmp_path.iterdir()).write_bytes(b"PK")
    with pytest.raises(UserError, match="is damaged .*; delete it"):
        metrics.load_classifier(images, tmp_path, CPU, steps=300)
    (tmp_path / "other").mkdir()
    other, _ = metrics.load_classifier(images, tmp_path / "other", CPU, steps=300)
    assert same_weights(net, other)
    g = torch.Generator().manual_seed(0)
    noisy = (
        (images.x[:300].float() + 40 * torch.randn(300, 1, 8, 8, generator=g)).clamp(0, 255).to(torch.uint8)
    )
    rows = metrics.score_images(noisy, images, net, CPU)
    assert rows["samples"]["FD"] > 5 * rows["real"]["FD"]
    assert rows["samples"]["precision"] < rows["real"]["precision"]
    copies = metrics.score_images(images.x[:300], images, net, CPU)
    assert copies["samples"]["nearest"] == pytest.approx(0, abs=1e-4)


def test_unlabelled_data_is_refused_with_a_reason(tmp_path):
    images = load_images("digits", "")
    images.names = []
    with pytest.raises(UserError, match="at least two classes .* got 0 classes"):
        metrics.load_classifier(images, tmp_path, CPU)


def test_inception_fid_without_weights_says_so(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", unreachable)
    x = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    with pytest.raises(UserError, match="no route to host"):
        metrics.inception_fid(x, x)


def test_inception_fid_with_a_small_network_in_place_of_inception(monkeypatch):
    """The wiring: grey becomes RGB, real and generated are told apart, equal sets are at 0."""

    class Small(torch.nn.Module):
        def __init__(self, *_, **__):
            super().__init__()

        def forward(self, x):
            assert x.shape[1:] == (3, 28, 28) and x.dtype == torch.uint8
            return x.flatten(1)[:, :2048].double() / 255

    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", Small)
    x = torch.randint(0, 256, (150, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert metrics.inception_fid(x, x) == pytest.approx(0, abs=1e-3)
    assert metrics.inception_fid(x // 2, x) > 0.05


# -- texts -----------------------------------------------------------------------------------------------


def test_bleu_is_100_for_copies_and_the_brevity_penalty_for_a_text_that_only_ends_early():
    texts = ["the room was clean and the staff was kind", "we would come back to this place any day"]
    assert metrics.bleu(texts, texts) == pytest.approx(100)
    assert metrics.bleu(["nothing of this kind", "is like that at all"], texts) < 5
    short = [texts[0], "we would come back to this place"]  # 16 of 18 words
    assert metrics.bleu(short, texts) == pytest.approx(100 * np.exp(1 - 18 / 16), abs=0.1)


LINES = ["今天的早餐非常好吃", "房间很干净也很安静", "ร้านอาหารนี้อร่อยมาก", "บริการไม่ดีเลยครับ"]


def test_bleu_of_scripts_without_spaces_is_that_of_their_characters():
    for texts in (LINES[:2], LINES[2:]):
        assert metrics.unit(texts) == "characters"
        assert metrics.bleu(texts, texts) == pytest.approx(100)
        assert 0 < metrics.bleu([texts[0], texts[1][:-3]], texts) < 100
        spaced, end = [" ".join(text) for text in texts], " ".join(texts[1][:-3])
        by_hand = sacrebleu.corpus_bleu([spaced[0], end], [spaced], tokenize="none").score
        assert metrics.bleu([texts[0], texts[1][:-3]], texts) == pytest.approx(by_hand)
    english = ["the ramen (拉面) was good and the staff was kind", "we would come back to this place any day"]
    assert metrics.unit(english) == "words"
    assert metrics.bleu(english[::-1], english) == sacrebleu.corpus_bleu(english[::-1], [english]).score


def test_bleu_is_none_where_no_text_has_four_words():
    titles = ["grand hotel", "old inn", "\U0001f600\U0001f44d"]
    assert np.isnan(metrics.bleu(titles, titles))
    assert metrics.bleu(titles, [*titles[:2], "a house by the sea"]) == 0
    assert np.isnan(metrics.aubleu([(0.0, np.nan), (1.0, np.nan)]))


def test_aubleu_is_the_area_in_whatever_order_the_points_come():
    assert metrics.aubleu([(0.0, 0.0), (1.0, 80.0)]) == pytest.approx(40)
    points = [(1.0, 80.0), (0.0, 0.0), (0.5, 10.0)]
    assert metrics.aubleu(points) == pytest.approx(0.5 * 5 + 0.5 * 45)


TRAIN = ["the room was clean", "the pool was cold", "we loved it"]


def test_scores_of_texts_equal_those_by_hand():
    got = metrics.score_texts(["a b a b a b", "c d e f g h"], TRAIN)
    assert got["dist1"] == pytest.approx(8 / 12)
    assert got["dist2"] == pytest.approx(7 / 10)
    assert got["words"] == 6
    p = np.array([3, 3, 1, 1, 1, 1, 1, 1]) / 12
    assert got["entropy"] == pytest.approx(-(p * np.log(p)).sum())
    assert got["rep4"] == pytest.approx((1 / 3 + 0) / 2)  # abab baba abab: one of three was said before
    assert got["nearest"] == pytest.approx(0)
    assert got["selfBLEU"] < 10


def test_scores_of_one_training_text_said_again_and_again():
    got = metrics.score_texts([TRAIN[0]] * 3, TRAIN)
    assert got["nearest"] == pytest.approx(1)
    assert got["selfBLEU"] == pytest.approx(100)
    assert got["dist1"] == pytest.approx(4 / 12)


def test_texts_that_say_nothing_have_a_score():
    got = metrics.score_texts(["", ""], TRAIN)
    assert np.isnan(got["rep4"])
    assert got["words"] == 0
    assert np.isnan(metrics.score_texts(["a single text"], TRAIN)["selfBLEU"])


def test_texts_of_every_script_and_of_no_words_are_scored():
    chinese = metrics.score_texts(["很好很好很"], LINES[:2])
    assert chinese["characters"] == 5
    assert chinese["dist1"] == pytest.approx(2 / 5)
    assert chinese["dist2"] == pytest.approx(2 / 4)
    assert chinese["rep4"] == 0
    assert 0 < chinese["nearest"] < 1
    for texts in (LINES, ["\U0001f600\U0001f44d", "\U0001f44d\u2764"], ["T T A G", "C"]):
        assert metrics.score_texts(texts, texts)["nearest"] == pytest.approx(1)


def test_the_text_classifier_reads_scripts_without_spaces_and_emoji():
    for good, bad in (("早餐很好吃", "早餐很难吃"), ("\U0001f600", "\U0001f621")):
        read, accuracy = metrics.text_classifier([good, bad] * 10, [1, 0] * 10, [bad * 2], [0])
        assert list(read([good * 2, bad])) == [1, 0]
        assert accuracy == 1


def test_the_text_classifier_states_its_accuracy_on_held_out_texts():
    x, y = ["good room", "good staff", "bad room", "bad staff"] * 10, [1, 1, 0, 0] * 10
    x_test = ["good pool", "bad pool", "good pool", "bad pool"]
    read, accuracy = metrics.text_classifier(x, y, x_test, [1, 0, 0, 1])
    assert list(read(["good food", "bad food"])) == [1, 0]
    assert accuracy == 0.5


def test_agreement_is_the_share_of_equal_places():
    assert metrics.agreement([1, None, 3, 4], [1, 2, 3, 5]) == 0.5
