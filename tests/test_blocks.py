"""blocks.py and the masked process of diffusion.py: who sees whom, the cache, masks, unmasking."""

import itertools

import pytest
import torch

from blocks import Layout, TokenTransformer, generate
from diffusion import Masked, unmask

V, WIDTHS = 7, [3, 2, 4, 3]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def random_model(widths=WIDTHS, vocabulary=V):
    """A denoiser whose every weight is random: what it must not see would show."""
    torch.manual_seed(0)
    model = TokenTransformer(vocabulary, Layout(widths), D=32, depth=2)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return random_model()


def random_ids(model, B=4, seed=1):
    """Questions (B, q), blocks (B, k), and the blocks with some tokens masked."""
    q, x0 = torch.randint(V, (B, model.layout.q + model.layout.k), generator=rng(seed)).split(
        [model.layout.q, model.layout.k], dim=1
    )
    hit = torch.rand(x0.shape, generator=rng(seed)) < 0.5
    return q, x0, x0.masked_fill(hit, model.mask_id)


def clean_part(model, q, x0):
    return torch.cat([q, x0], dim=1)[:, : model.layout.c]


def other(ids):
    return (ids + 1) % V


# -- who sees whom ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("i", [0, 1, 2])
def test_what_is_hidden_from_a_block_cannot_change_its_logits(model, i):
    q, x0, xt = random_ids(model)
    block = (model.layout.owner == i)[model.layout.q :]
    later_or_own = (model.layout.owner >= i)[: model.layout.c]
    with torch.no_grad():
        logits = model(xt, None, clean_part(model, q, x0))
        clean = clean_part(model, q, x0)
        hidden = model(
            torch.where(block, xt, other(xt)), None, torch.where(later_or_own, other(clean), clean)
        )
    torch.testing.assert_close(hidden[:, block], logits[:, block])


@pytest.mark.parametrize("i", [0, 1, 2])
def test_a_block_sees_its_own_tokens_and_every_clean_one_before(model, i):
    q, x0, xt = random_ids(model, B=1)
    block = (model.layout.owner == i)[model.layout.q :]
    clean = clean_part(model, q, x0)
    with torch.no_grad():
        logits = model(xt, None, clean)[:, block]
        for place in range(model.layout.c):
            changed = clean.clone()
            changed[:, place] = other(clean[:, place])
            moved = not torch.allclose(model(xt, None, changed)[:, block], logits, atol=1e-6)
            assert moved == bool(model.layout.owner[place] < i)
        for place in range(model.layout.k):
            changed = xt.clone()
            changed[:, place] = other(xt[:, place])
            moved = not torch.allclose(model(changed, None, clean)[:, block], logits, atol=1e-6)
            assert moved == bool(block[place])


def test_a_single_block_sees_all_of_itself():
    model = random_model([3, 9])
    assert model.layout.c == 3
    assert model.layout.see[3:].all()


# -- blocks of width 1 -----------------------------------------------------------------------------------


def test_blocks_of_width_1_are_an_autoregressive_likelihood():
    """All masked, the loss of a sequence is -log p of the chain rule: these p sum to 1 over all sequences."""
    V, k = 3, 4
    model = random_model([2, *[1] * k], V)
    every = torch.tensor(list(itertools.product(range(V), repeat=k)))  # (81, 4)
    question = torch.tensor([[2, 0]]).expand(len(every), -1)
    with torch.no_grad():
        clean = torch.cat([question, every], dim=1)[:, :-1]
        nats = Masked(V).loss(model, every, clean, torch.ones(len(every))).sum(1)
    assert nats.neg().exp().sum() == pytest.approx(1, abs=1e-5)


def test_blocks_of_width_1_are_written_greedily_token_by_token():
    model = random_model([2, 1, 1, 1, 1])
    question = torch.tensor([[2, 0], [1, 1]])
    *_, (_, written) = generate(model, question)
    for i in range(4):
        with torch.no_grad():
            logits = model(torch.full_like(written, V), None, clean_part(model, question, written))
        assert torch.equal(logits[:, i].argmax(-1), written[:, i])


# -- the cache -------------------------------------------------------------------------------------------


def without_cache(model, q, xt, **settings):
    """The same generation by whole training passes: the blocks not yet made stand in it as zeros, unseen."""
    start = 0
    for width in model.layout.widths:
        part = slice(start, start + width)

        def denoise(block, t, y, part=part, xt=xt):
            whole, clean = xt.clone(), xt.where(xt != model.mask_id, 0)
            whole[:, part] = block
            return model(whole, t, clean_part(model, q, clean))[:, part]

        for block in unmask(denoise, xt[:, part], model.mask_id, **settings):
            xt = torch.cat([xt[:, :start], block, xt[:, start + width :]], dim=1)
        start += width
    return xt


@pytest.mark.parametrize("known", [0.0, 0.4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_generation_with_the_cache_equals_generation_without(model, steps, temperature, known):
    q, x0, _ = random_ids(model, B=16)
    xt = x0.where(torch.rand(x0.shape, generator=rng(3)) < known, model.mask_id)
    *_, (_, cached) = generate(model, q, xt, steps=steps, temperature=temperature, generator=rng(5))
    expected = without_cache(model, q, xt, steps=steps, temperature=temperature, generator=rng(5))
    assert torch.equal(cached, expected)


def test_what_is_finished_is_read_once(model, monkeypatch):
    read, shapes = model.read, []

    def spy(xt, clean, *rest):
        shapes.append((xt.shape[1], clean.shape[1]))
        return read(xt, clean, *rest)

    monkeypatch.setattr(model, "read", spy)
    list(generate(model, random_ids(model)[0], steps=2))
    assert shapes == [(2, 3), (2, 0), (4, 2), (4, 0), (3, 4), (3, 0)]


def test_a_block_that_is_known_costs_no_evaluation_and_is_read_with_the_next(model, monkeypatch):
    q, x0, _ = random_ids(model)
    xt = torch.cat([x0[:, :6], torch.full((len(q), 3), model.mask_id)], dim=1)
    read, shapes = model.read, []
    monkeypatch.setattr(model, "read", lambda *args: shapes.append(args[1].shape[1]) or read(*args))
    *_, (_, done) = generate(model, q, xt, steps=1)
    assert shapes == [9]
    assert torch.equal(done[:, :6], x0[:, :6])


def test_generation_reports_the_block_and_keeps_what_was_known(model):
    q, x0, xt = random_ids(model)
    seen = list(generate(model, q, xt, steps=3))
    assert [i for i, _ in seen] == sorted(i for i, _ in seen)
    for _, state in seen:
        assert torch.equal(state[xt != model.mask_id], x0[xt != model.mask_id])
    assert (seen[-1][1] != model.mask_id).all()


def test_a_batch_makes_what_each_of_it_makes_alone(model):
    q, _, xt = random_ids(model, B=6)
    *_, (_, together) = generate(model, q, torch.full_like(xt, model.mask_id), steps=3)
    for i in range(len(q)):
        *_, (_, alone) = generate(model, q[i : i + 1], steps=3)
        assert torch.equal(together[i : i + 1], alone)


def test_a_sequence_needs_no_question():
    model = random_model([0, 3, 3])
    *_, (_, xt) = generate(model, torch.empty(2, 0, dtype=torch.long), steps=2)
    assert xt.shape == (2, 6)


# -- the masked process ----------------------------------------------------------------------------------


def test_masks_have_their_rate_for_each_sequence_and_each_position():
    x0, t = torch.randint(V, (20_000, 3), generator=rng()), torch.tensor([0.1, 0.5, 0.9])
    torch.manual_seed(0)
    at_positions = (Masked(V).q_sample(x0, t.expand(len(x0), 3)) == V).float().mean(0)
    torch.testing.assert_close(at_positions, t, atol=0.02, rtol=0)
    of_sequences = Masked(V).q_sample(x0, torch.full((len(x0),), 0.3))
    assert (of_sequences == V).float().mean() == pytest.approx(0.3, abs=0.01)
    assert torch.equal(of_sequences[of_sequences != V], x0[of_sequences != V])


def test_the_loss_is_the_cross_entropy_of_masked_tokens_and_nothing_else():
    x0 = torch.tensor([[0, 1, 2, 2]]).expand(5000, -1)
    p = torch.tensor([0.5, 0.3, 0.2])
    torch.manual_seed(0)
    loss = Masked(3).loss(lambda xt, t, y: p.log().expand(*xt.shape, 3), x0, t=torch.full((5000,), 0.4))
    expected = -p.log()[x0]
    hit = loss != 0
    torch.testing.assert_close(loss[hit], expected[hit])
    assert hit.float().mean() == pytest.approx(0.4, abs=0.02)


def test_the_loss_over_t_is_the_likelihood_of_independent_tokens():
    """MDLM eq. 10, with the best denoiser there is."""
    p = torch.tensor([0.5, 0.3, 0.2])
    x0 = torch.multinomial(p.expand(20_000, 3), 4, replacement=True, generator=rng())
    torch.manual_seed(0)
    t = torch.rand(len(x0), 1) * 0.9 + 0.1
    loss = Masked(3).loss(lambda xt, t, y: p.log().expand(*xt.shape, 3), x0, t=t.expand(-1, 4))
    assert (loss / t).sum(1).mean() == pytest.approx(-4 * (p * p.log()).sum().item(), rel=0.02)


# -- unmasking -------------------------------------------------------------------------------------------


def counting(logits):
    """A denoiser that gives the same logits every time and counts its evaluations."""
    calls = []

    def denoise(xt, t, y):
        calls.append(t.clone())
        return logits.expand(len(xt), -1, -1)

    return denoise, calls


def some_masked(numbers, k=10, seed=0):
    """Ids (len(numbers), k) with so many masks in each row."""
    x0 = torch.randint(V, (len(numbers), k), generator=rng(seed))
    rank = torch.rand(x0.shape, generator=rng(seed)).argsort(1).argsort(1)
    return x0.masked_fill(rank < torch.tensor(numbers)[:, None], V)


@pytest.mark.parametrize("order", ["confident", "random"])
@pytest.mark.parametrize("masked, steps", [(10, 1), (10, 3), (10, 10), (7, 4), (7, 64), (1, 8), (0, 8)])
def test_unmasking_makes_the_evaluations_that_it_is_asked_for(masked, steps, order):
    denoise, calls = counting(torch.randn(1, 10, V, generator=rng()))
    states = list(unmask(denoise, some_masked([masked] * 3), V, steps=steps, order=order))
    assert len(states) == len(calls) == min(steps, masked)


@pytest.mark.parametrize("order", ["confident", "random"])
def test_rows_with_different_numbers_of_masks_end_together(order):
    xt = some_masked([0, 1, 4, 10])
    denoise, calls = counting(torch.randn(1, 10, V, generator=rng()))
    before = (xt == V).sum(1)
    for state in unmask(denoise, xt, V, steps=5, order=order):
        left = (state == V).sum(1)
        assert (left <= before).all()
        assert left.sum() < before.sum()
        before = left
    assert before.sum() == 0
    assert len(calls) == 5


@pytest.mark.parametrize("order", ["confident", "random"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_known_is_never_changed(order, temperature):
    xt = some_masked([3, 6, 9])
    for state in unmask(
        counting(torch.randn(1, 10, V, generator=rng()))[0],
        xt,
        V,
        steps=4,
        order=order,
        temperature=temperature,
    ):
        assert torch.equal(state[xt != V], xt[xt != V])


def test_the_denoiser_is_told_the_share_of_masks():
    denoise, calls = counting(torch.zeros(1, 10, V))
    list(unmask(denoise, some_masked([10, 10]), V, steps=2))
    torch.testing.assert_close(torch.stack(calls), torch.tensor([[1.0, 1.0], [0.5, 0.5]]))


def test_the_surest_tokens_come_first_and_are_the_likeliest():
    logits = torch.zeros(1, 4, V)
    logits[0, range(4), [3, 1, 4, 2]] = torch.tensor([2.0, 4.0, 1.0, 3.0])
    states = list(unmask(counting(logits)[0], torch.full((1, 4), V), V, steps=4))
    assert [state[0].tolist() for state in states] == [[V, 1, V, V], [V, 1, V, 2], [3, 1, V, 2], [3, 1, 4, 2]]


def test_in_random_order_every_token_is_first_alike():
    logits = torch.zeros(1, 4, V)
    logits[0, 0] = torch.arange(V) * 9.0  # the surest by far
    first = next(
        unmask(counting(logits)[0], torch.full((8000, 4), V), V, steps=4, order="random", generator=rng())
    )
    torch.testing.assert_close((first != V).float().mean(0), torch.full((4,), 0.25), atol=0.02, rtol=0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_from_their_distribution_at_a_temperature(temperature):
    logits = torch.randn(1, 1, V, generator=rng(2))
    xt = torch.full((40_000, 1), V)
    (drawn,) = unmask(counting(logits)[0], xt, V, steps=1, temperature=temperature, generator=rng())
    share = torch.bincount(drawn[:, 0], minlength=V) / len(drawn)
    torch.testing.assert_close(share, (logits / temperature).softmax(-1)[0, 0], atol=0.012, rtol=0)


# -- learning --------------------------------------------------------------------------------------------


def test_every_parameter_gets_a_gradient():
    model = random_model()
    q, x0, _ = random_ids(model, B=16)
    Masked(V).loss(model, x0, clean_part(model, q, x0)).mean().backward()
    for name, p in model.named_parameters():
        assert p.grad.abs().sum() > 0, name


def test_a_denoiser_starts_with_every_token_alike():
    model = TokenTransformer(V, Layout(WIDTHS), D=32, depth=2)
    q, x0, xt = random_ids(model)
    assert model(xt, None, clean_part(model, q, x0)).abs().max() == 0


@pytest.mark.parametrize("widths", [WIDTHS, [3, 9], [3, *[1] * 9]], ids=["blocks", "one block", "width 1"])
def test_a_batch_is_learned_by_heart_and_written_again(widths):
    torch.manual_seed(0)
    model = TokenTransformer(V, Layout(widths), D=32, depth=2)
    q, x0, _ = random_ids(model, B=4)
    opt = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = Masked(V).loss(model, x0, clean_part(model, q, x0), torch.rand(x0.shape) ** 0.5).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    *_, (_, xt) = generate(model, q, steps=3)
    assert torch.equal(xt, x0)
