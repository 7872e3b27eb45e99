"""bench.py: every side trains and samples what it should, and the sides share what they claim to share."""
import pytest
import torch

import bench
from data import load_images

CPU = torch.device("cpu")
X = load_images("digits", "").x[:64]


@pytest.mark.parametrize("name", bench.SIDES)
def test_side_learns_and_samples(name):
    torch.manual_seed(0)
    trainer = bench.Trainer(bench.SIDES[name](8, CPU), X, 16, 0)
    loss = lambda: sum(trainer.side.loss(bench.metrics.scale(X)).item() for _ in range(5))
    first = loss()
    for _ in range(60):
        trainer.train_step()
    assert loss() < 0.8 * first
    x = trainer.side.sample(trainer.ema, (3, 1, 8, 8), torch.Generator().manual_seed(0), 5)
    assert x.shape == (3, 1, 8, 8) and x.isfinite().all() and x.abs().max() < 3
    assert torch.equal(x, trainer.side.sample(trainer.ema, (3, 1, 8, 8), torch.Generator().manual_seed(0), 5))


def test_sides_are_of_comparable_size():
    sizes = {name: sum(p.numel() for p in make(28, CPU).model.parameters()) for name, make in bench.SIDES.items()}
    assert max(sizes.values()) < 1.25 * min(sizes.values()), sizes
