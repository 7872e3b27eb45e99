"""common/scores.py against scipy and cases with a known answer."""

import pytest
import sacrebleu
import scipy.linalg
import torch

from common.images import load_images
from common.run import UserError
from common.scores import (
    agreement,
    bleu,
    dist2,
    frechet_distance,
    load_classifier,
    nearest_distance,
    score_images,
    text_classifier,
)

CPU = torch.device("cpu")


def normal(n, seed, mean=0.0, scale=1.0):
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mean + scale * x @ torch.linspace(0.5, 2, 64, dtype=torch.float64).reshape(8, 8)


def test_frechet_distance_equals_its_definition_and_is_zero_on_itself():
    f, g = normal(300, 0), normal(200, 1, mean=0.5, scale=1.5)
    s, r = f.T.cov(), g.T.cov()
    root = torch.as_tensor(scipy.linalg.sqrtm((s @ r).numpy()).real)
    want = (f.mean(0) - g.mean(0)).square().sum() + (s + r - 2 * root).trace()
    assert frechet_distance(f, g) == pytest.approx(want.item(), rel=1e-4)
    assert frechet_distance(f, f) == pytest.approx(0, abs=1e-4 * s.trace().item())
    a, b = torch.randn(2, 200_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert frechet_distance(a, 3 + 2 * b) == pytest.approx(2 * 9 + 2 * 1, rel=0.02)  # |mean|^2 + d (1 - 2)^2


def test_nearest_distance_tells_copies_from_new_samples():
    train = normal(200, 0)
    assert 0.8 < nearest_distance(normal(200, 2), train) / nearest_distance(normal(200, 1), train) < 1.2
    assert nearest_distance(train[:50] + 1e-6, train) < 1e-4
    assert (nearest_distance(normal(200, 2), train) / nearest_distance(train, train)).isinf()


def figures(line):
    words = line.replace("(", " ").replace(")", " ").replace(",", " ").split()
    return [float(word) for word in words if word[0].isdigit()]  # FD, of training images, label, nearest


@pytest.mark.slow
def test_the_classifier_is_seeded_kept_and_ranks_real_above_noise(tmp_path):
    images = load_images("digits", "")
    before = torch.random.get_rng_state()
    net = load_classifier(images, tmp_path / "a", CPU, steps=200)
    assert torch.equal(before, torch.random.get_rng_state())
    again, other = (load_classifier(images, tmp_path / name, CPU, steps=200) for name in "ab")
    for copy in (again, other):
        assert all(map(torch.equal, net.state_dict().values(), copy.state_dict().values()))
    x, y, train, test = images.x[:300], images.y[:300], *map(net.features, (images.x, images.x_test))
    noise = 40 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    noisy = figures(
        score_images(net.features((x + noise).clamp(0, 255).to(torch.uint8)), train, test, y, net)
    )
    assert noisy[0] > 5 * noisy[1] and noisy[3] > 0.5
    copies = figures(score_images(net.features(x), train, test, y, net))
    assert copies[3] == 0 and copies[2] > 0.9
    (file,) = (tmp_path / "a").iterdir()
    file.write_bytes(b"PK")
    with pytest.raises(UserError, match=file.name):
        load_classifier(images, tmp_path / "a", CPU)
    images.x = 255 - images.x  # other data have their own
    load_classifier(images, tmp_path / "a", CPU, steps=2)


def test_data_without_classes_are_refused(tmp_path):
    images = load_images("digits", "")
    images.names = []
    with pytest.raises(UserError):
        load_classifier(images, tmp_path, CPU)


def test_bleu_is_sacrebleus_and_counts_characters_where_no_spaces_are():
    texts, references = (
        ["the room was dirty and loud", "a b c d e"],
        ["the room was clean and loud", "a b c d f"],
    )
    assert bleu(texts, references) == sacrebleu.corpus_bleu(texts, [references]).score
    for text in ("部屋はとても清潔でした", "ห้องพักสะอาดมาก", "房间非常干净而且很安静"):
        assert bleu([text], [text]) == pytest.approx(100)
        assert 0 < bleu([text[:-2]], [text]) < 100


def test_variety_and_agreement():
    assert dist2(["a b a b", "a b"]) == 2 / 4
    assert dist2(["", "a"]) == 0
    assert agreement([1, 2, 3], [1, 0, 3]) == pytest.approx(2 / 3)
    classify = text_classifier(["good room", "good pool", "bad room", "bad pool"] * 5, [1, 1, 0, 0] * 5)
    assert classify(["good staff", "bad staff"]).tolist() == [1, 0]
