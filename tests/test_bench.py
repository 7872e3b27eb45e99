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


def test_planners_way_is_the_same_work():
    """Equal weights and no noise: both roads to the loss end at the same number, and every side gets its gradient."""
    torch.manual_seed(0)
    vae = bench.TextVAE(*bench.small_backbones(50, 32, 1, 20), 4, 8, 1, variance="learned", beta=1e-3, p_max=0.0)
    ids = torch.randint(2, 50, (3, 10))
    torch.manual_seed(1)
    ours = vae(ids, ids)
    torch.manual_seed(1)
    theirs = bench.planner_loss(vae, ids, ids)
    torch.testing.assert_close(ours, theirs)
    theirs.backward()
    assert not [name for name, p in vae.named_parameters() if p.grad is None]


def test_sides_take_turns_after_a_warm_up(monkeypatch):
    calls = []
    took = bench.interleaved({"a": lambda r: calls.append(f"a{r}"), "b": lambda r: calls.append(f"b{r}")}, 2, CPU)
    assert calls == ["a0", "b0", "a1", "b1", "a2", "b2"] and [len(t) for t in took.values()] == [2, 2]


def test_problems_told_otherwise():
    problems = bench.Problems(["3 2 1 * 5 4"], [["5 1 6", "+ 0 2 9", "#### 5 3 5 5 0"]], [], [])
    first, joined, bare = (bench.told(problems, *changes) for changes in bench.TOLD.values())
    assert (first.question, first.thoughts) == (["1 2 3 * 4 5"], [["6 1 5", "+ 9 2 0", "#### 0 5 5 3 5"]])
    assert (joined.question, joined.thoughts) == (problems.question, [["5 1 6 + 0 2 9", "#### 5 3 5 5 0"]])
    assert bare.thoughts == [["#### 5 3 5 5 0"]]
