"""bench/: every side trains and samples what it should, and the sides share what they claim to share."""

import pytest
import torch

from bench import images, timing
from data import load_images

CPU = torch.device("cpu")
X = load_images("digits", "").x[:64]


def mean_loss(trainer):
    return sum(trainer.side.loss(images.metrics.scale(X)).item() for _ in range(5)) / 5


@pytest.mark.parametrize("name", images.SCORED)
def test_a_side_learns_and_samples(name):
    torch.manual_seed(0)
    trainer = images.Trainer(images.SCORED[name](8, CPU), X, 16, 0)
    first = mean_loss(trainer)
    for _ in range(60):
        trainer.train_step()
    assert mean_loss(trainer) < 0.8 * first
    x, again = (
        trainer.side.sample(trainer.ema, (3, 1, 8, 8), torch.Generator().manual_seed(0), 5) for _ in "ab"
    )
    assert x.shape == (3, 1, 8, 8)
    assert x.abs().max() < 3
    assert torch.equal(x, again)


def test_the_sides_are_of_comparable_size():
    sides = {name: make(28, CPU) for name, make in images.TIMED.items()}
    sizes = [sum(p.numel() for p in side.model.parameters()) for side in sides.values()]
    assert max(sizes) < 1.25 * min(sizes)


def test_sides_take_turns_after_a_round_that_warms_up():
    calls = []
    sides = {"a": lambda r: calls.append(f"a{r}"), "b": lambda r: calls.append(f"b{r}")}
    took = timing.interleaved(sides, 2, CPU)
    assert calls == ["a0", "b0", "a1", "b1", "a2", "b2"]
    assert [len(seconds) for seconds in took.values()] == [2, 2]


def test_the_comparison_writes_its_table_and_figure(cli, tmp_path):
    size = "--dataset digits --rounds 1 --round_steps 1 --seconds 0.2 --score_n 40 --batch_size 8".split()
    status, printed = cli("bench.images", *size, "--out", tmp_path)
    assert status == 0, printed
    assert len((tmp_path / "quality.csv").read_text().splitlines()) == 1 + 3 * len(images.SCORED)
    assert (tmp_path / "quality.png").exists()
