"""blocks.py and the masked process of diffusion.py: attention, the KV cache, the bound, unmasking."""

import itertools
import math

import pytest
import torch

from blocks import Layout, TokenTransformer, bound, draw_masks, generate
from diffusion import Masked, Transformer, apply_rope, modulate, rope_table, unmask

V, WIDTHS = 7, [3, 2, 4, 3]
AXES = [[i % 4, i // 4] for i in range(sum(WIDTHS))]  # three rows of four
CELLS = [[cell // 4, cell % 4, cell // 8 * 2 + cell % 4 // 2] for cell in range(16)]  # row, column, box
ORDERS = ["confident", "random"]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def random_model(widths=WIDTHS, vocabulary=V, axes=None, depth=2, rope=False, loops=1):
    """A denoiser with random weights everywhere: whatever it attends to changes its logits."""
    torch.manual_seed(0)
    model = TokenTransformer(vocabulary, Layout(widths, axes), D=32, depth=depth, rope=rope, loops=loops)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.fixture(scope="module", params=["a line", "more axes", "rope", "loops"])
def model(request):
    axes, loops = AXES if request.param == "more axes" else None, 3 if request.param == "loops" else 1
    return random_model(axes=axes, rope=request.param == "rope", loops=loops)


def random_ids(model, B=4, seed=1):
    """Questions (B, q), blocks (B, k), and the blocks with about half of their tokens masked."""
    q, k = model.layout.q, model.layout.k
    question, x0 = torch.randint(V, (B, q + k), generator=rng(seed)).split([q, k], dim=1)
    masked = torch.rand(x0.shape, generator=rng(seed)) < 0.5
    return question, x0, x0.masked_fill(masked, model.mask_id)


def clean_part(model, question, x0):
    return torch.cat([question, x0], dim=1)[:, : model.layout.c]


def each_changed(ids):
    """The ids (1, n) n times, each time with another of them changed, (n, 1, n)."""
    return torch.where(torch.eye(ids.shape[1], dtype=torch.bool), (ids + 1) % V, ids)[:, None]


# -- attention masks -------------------------------------------------------------------------------------


def test_the_attention_mask_of_two_blocks():
    """One question token, then blocks of 2 and 1: three clean positions and three noised ones."""
    rows = ["100000", "111000", "111000", "100110", "100110", "111001"]
    wanted = torch.tensor([[cell == "1" for cell in row] for row in rows])
    assert torch.equal(Layout([1, 2, 1]).attention_mask, wanted)


@pytest.mark.parametrize("i", [0, 1, 2])
def test_a_block_attends_to_its_own_tokens_and_to_every_clean_one_before_and_to_nothing_else(model, i):
    question, x0, xt = random_ids(model, B=1)
    block = (model.layout.block_ids == i)[model.layout.q :]
    clean = clean_part(model, question, x0)
    with torch.no_grad():
        logits = model(xt, None, clean)[:, block]

        def moved(xt, clean):
            return not torch.allclose(model(xt, None, clean)[:, block], logits, atol=1e-6)

        for position, changed in enumerate(each_changed(clean)):
            assert moved(xt, changed) == bool(model.layout.block_ids[position] < i)
        for position, changed in enumerate(each_changed(xt)):
            assert moved(changed, clean) == bool(block[position])


# -- loops -----------------------------------------------------------------------------------------------


def test_each_loop_applies_the_blocks_to_its_state_and_the_embedded_input():
    """Against the loops written out; in training there are logits of each, otherwise of the last."""
    torch.manual_seed(0)
    transformer = Transformer(16, 2, 5, loops=3)
    for p in transformer.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, emb, wanted = torch.randn(2, 6, 16), torch.randn(2, 1, 16), []
    h = torch.zeros_like(x)
    for _ in range(3):
        h = h + x
        for block in transformer.blocks:
            h, _ = block(h, emb, None, None, 6)
        shift, scale = transformer.ada(emb).chunk(2, dim=-1)
        wanted.append(transformer.head(modulate(h, scale, shift))[:, -4:])
    logits, kv_cache = transformer(x, emb, 4)
    torch.testing.assert_close(logits, torch.stack(wanted))
    assert len(kv_cache) == 6
    torch.testing.assert_close(transformer.eval()(x, emb, 4)[0], wanted[-1])
    transformer.loops = 1
    for mode in (True, False):
        torch.testing.assert_close(transformer.train(mode)(x, emb, 4)[0], wanted[0])


def test_the_loss_of_loops_is_their_weighted_mean():
    x0, masked = torch.randint(V, (4, 6), generator=rng()), torch.rand(4, 6, generator=rng()) < 0.5
    logits = torch.randn(3, 4, 6, V, generator=rng())
    loops = [Masked(V).cross_entropies(lambda *_, i=i: logits[i], x0, masked) for i in range(3)]
    found = Masked(V).cross_entropies(lambda *_: logits, x0, masked)
    torch.testing.assert_close(found, (loops[0] + 2 * loops[1] + 3 * loops[2]) / 6)


# -- more axes -------------------------------------------------------------------------------------------


def same(axis):
    """Which cells (row) of a 4 x 4 grid agree with which (column) on an axis."""
    return torch.tensor([[a[axis] == b[axis] for b in CELLS] for a in CELLS])


ROW, COLUMN, BOX = same(0), same(1), same(2)


@pytest.mark.parametrize(
    "heads, wanted",
    [
        *(([0], ROW), ([1], COLUMN), ([2], BOX), ([0, 1, 2], ROW | COLUMN | BOX)),
        *(([3], torch.ones(16, 16).bool()), ([], torch.eye(16).bool())),
    ],
    ids=["row", "column", "box", "all three", "free", "none"],
)
def test_a_head_of_an_axis_attends_within_its_unit_and_the_free_head_to_all(heads, wanted):
    """Of a single layer only these heads are used; then each cell is changed in turn."""
    model = random_model([0, 16], axes=CELLS, depth=1)
    used = torch.zeros(4, 8)
    used[heads] = 1
    block = model.transformer.blocks[0]
    x = torch.randint(V, (1, 16), generator=rng(1))
    changed = each_changed(x)[:, 0]
    with torch.no_grad():
        block.out.weight *= used.flatten()
        block.qkv.weight *= 0.2  # so that no attention weight is too small to notice
        moved = model(changed, None, changed[:, :0]) - model(x, None, x[:, :0])
    assert torch.equal(moved.abs().amax(-1) > 1e-6, wanted)


def test_the_embedding_of_a_position_is_the_sum_over_its_axes():
    several, one = random_model(axes=AXES), random_model()
    question, x0, xt = random_ids(one)
    table = several.position.weight
    rows = [[i, 12 + column, 16 + row] for i, (column, row) in enumerate(AXES)]
    assert len(table) == 12 + 4 + 3
    several.head_mask.fill_(True)  # so that the embeddings alone tell positions apart
    weights = several.state_dict() | {"position.weight": torch.stack([table[row].sum(0) for row in rows])}
    one.load_state_dict(weights)
    with torch.no_grad():
        logits = [model(xt, None, clean_part(model, question, x0)) for model in (several, one)]
    torch.testing.assert_close(*logits)


# -- rotary positions ------------------------------------------------------------------------------------


def test_rope_is_that_of_transformers():
    from transformers import GPTNeoXConfig
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding, apply_rotary_pos_emb

    config = GPTNeoXConfig(hidden_size=32, num_attention_heads=4, rotary_pct=1.0)
    q, k = torch.randn(2, 2, 4, 9, 8, generator=rng())
    position_ids = torch.arange(3, 12)
    cosines, sines = GPTNeoXRotaryEmbedding(config)(q, position_ids[None])
    for ours, theirs in zip((q, k), apply_rotary_pos_emb(q, k, cosines, sines), strict=True):
        torch.testing.assert_close(apply_rope(ours, rope_table(position_ids, 8)), theirs)


def test_with_rope_a_window_that_is_moved_as_a_whole_has_the_same_logits():
    model = random_model(rope=True)
    question, x0, xt = random_ids(model)
    clean, ids, mask = clean_part(model, question, x0), model.layout.position_ids, model.layout.attention_mask
    with torch.no_grad():
        logits, moved, spread = (model.denoise(xt, clean, x, mask)[0] for x in (ids, ids + 50, 2 * ids))
    torch.testing.assert_close(moved, logits, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(spread, logits, atol=1e-2)


# -- the cache -------------------------------------------------------------------------------------------


def without_cache(model, question, xt, **settings):
    """The same generation by whole training passes; blocks not yet made are zeros, which none attends to."""
    start = 0
    for width in model.layout.widths:
        part = slice(start, start + width)

        def denoise(block, t, y, part=part, xt=xt):
            whole, clean = xt.clone(), xt.where(xt != model.mask_id, 0)
            whole[:, part] = block
            return model(whole, t, clean_part(model, question, clean))[:, part]

        for block in unmask(denoise, xt[:, part], model.mask_id, **settings):
            xt = torch.cat([xt[:, :start], block, xt[:, start + width :]], dim=1)
        start += width
    return xt


@pytest.mark.parametrize("known", [0.0, 0.4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_generation_with_the_cache_equals_generation_without(model, steps, temperature, known):
    question, x0, _ = random_ids(model, B=16)
    xt = x0.where(torch.rand(x0.shape, generator=rng(3)) < known, model.mask_id)
    settings = dict(steps=steps, temperature=temperature)
    blocks, states = zip(*generate(model, question, xt, **settings, generator=rng(5)), strict=True)
    assert torch.equal(states[-1], without_cache(model, question, xt, **settings, generator=rng(5)))
    assert list(blocks) == sorted(blocks)
    assert all(torch.equal(state[xt != V], x0[xt != V]) for state in states) and (states[-1] != V).all()


def test_a_finished_block_is_computed_once_and_a_known_one_never(model, monkeypatch):
    (question, x0, _), denoise, shapes = random_ids(model), model.denoise, []

    def spy(xt, clean, *args):
        shapes.append((xt.shape[1], clean.shape[1]))  # masked positions, clean positions
        return denoise(xt, clean, *args)

    monkeypatch.setattr(model, "denoise", spy)
    list(generate(model, question, steps=2))
    assert shapes == [(2, 3), (2, 0), (4, 2), (4, 0), (3, 4), (3, 0)]
    shapes.clear()
    x0[:, 6:] = V
    list(generate(model, question, x0, steps=1))
    assert shapes == [(3, 9)]


def test_a_batch_makes_what_each_of_it_makes_alone(model):
    question, _, xt = random_ids(model, B=6)
    *_, (_, together) = generate(model, question, xt, steps=3)
    for i in range(len(question)):
        *_, (_, alone) = generate(model, question[i : i + 1], xt[i : i + 1], steps=3)
        assert torch.equal(together[i : i + 1], alone)


@pytest.mark.parametrize("q, k", [(3, 8), (3, 10), (2, 9), (4, 9)])
def test_ids_of_another_length_are_refused(model, q, k):
    ids = torch.zeros(2, q + k, dtype=torch.long)
    with pytest.raises(ValueError):
        next(generate(model, ids[:, :q], ids[:, q:]))


# -- the bound -------------------------------------------------------------------------------------------


def test_of_each_block_exactly_as_many_tokens_are_masked_as_asked_for_and_any_of_them():
    layout = Layout([3, 2, 4, 1])
    x0, u = torch.zeros(4000, 7, dtype=torch.long), torch.rand(4000, 3, generator=rng())
    masked = draw_masks(layout, x0, u, rng(1))
    for i, n in enumerate(layout.widths):
        part = masked[:, (layout.block_ids == i)[3:]]
        assert (part.sum(1) == 1 + (n * u[:, i]).floor()).all()
        torch.testing.assert_close(part.float().mean(0), torch.full((n,), (n + 1) / 2 / n), rtol=0, atol=0.03)


@pytest.mark.parametrize("rope", [False, True])
def test_the_bound_with_blocks_of_width_1_is_the_likelihood_of_writing_token_by_token(rope):
    model = random_model([3, *[1] * 6], rope=rope)
    question, x0, _ = random_ids(model)
    likelihood = torch.zeros(4)
    for i in range(6):
        position_ids, block_ids = torch.arange(3 + i + 1), model.layout.block_ids[: 3 + i + 1]
        xt, before = torch.full((4, 1), V), torch.cat([question, x0[:, :i]], dim=1)
        with torch.no_grad():
            logits, _ = model.denoise(xt, before, position_ids, block_ids[:, None] >= block_ids)
        likelihood -= logits[:, 0].log_softmax(-1).gather(1, x0[:, i : i + 1])[:, 0]
    torch.testing.assert_close(bound(model, question, x0, 1, rng()), likelihood)


@pytest.mark.parametrize("draws", [1, 6])
def test_the_bound_is_the_mean_over_all_orders_of_writing_a_block(draws):
    model = random_model([2, 3, 2])
    question, x0, _ = random_ids(model, B=1)
    process, clean, wanted = Masked(V), clean_part(model, question, x0), 0.0
    for block in ([0, 1, 2], [3, 4]):
        orders = list(itertools.permutations(block))
        for order, i in itertools.product(orders, range(len(block))):
            masked = torch.zeros(1, 5, dtype=torch.bool)
            masked[0, list(order[i:])] = True  # the i before it are known
            with torch.no_grad():
                wanted += process.cross_entropies(model, x0, masked, clean)[0, order[i]].item() / len(orders)
    found = bound(model, question.expand(1500, -1), x0.expand(1500, -1), draws, rng())
    assert found.mean().item() == pytest.approx(wanted, abs=4 * found.std().item() / 1500**0.5)


def test_the_draws_of_a_bound_mask_every_number_of_tokens_equally_often(monkeypatch):
    model, counts = random_model([0, 4, 4]), []
    x0 = torch.randint(V, (5, 8), generator=rng())

    def cross_entropies(process, model, x0, masked, clean):
        counts.append(masked.view(5, 2, 4).sum(-1))
        return torch.zeros(x0.shape)

    monkeypatch.setattr(Masked, "cross_entropies", cross_entropies)
    bound(model, x0[:, :0], x0, 4, rng())
    assert (torch.stack(counts).sort(0)[0] == torch.tensor([1, 2, 3, 4])[:, None, None]).all()


def test_an_untrained_model_gives_every_token_the_same_probability():
    model = TokenTransformer(V, Layout(WIDTHS), D=32, depth=1)
    question, x0, _ = random_ids(model)
    torch.testing.assert_close(bound(model, question, x0, 3, rng()), torch.full((4,), 9 * math.log(V)))


# -- the masked process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["positions", "sequences"])
def test_masks_have_their_rate_and_the_loss_is_the_cross_entropy_of_what_they_hide(of):
    rates, p = torch.tensor([0.1, 0.5, 0.9, 0.4]), torch.tensor([0.5, 0.3, 0.2])
    x0, seen = torch.tensor([0, 1, 2, 2]).expand(8000, 4), []
    t = rates.expand(8000, 4) if of == "positions" else rates.repeat(2000)[:, None]
    torch.manual_seed(0)
    loss = Masked(3).loss(lambda xt, t, y: seen.append(xt) or p.log().expand(*xt.shape, 3), x0, None, t)
    masked = seen[0] == 3
    assert torch.equal(seen[0][~masked], x0[~masked])
    torch.testing.assert_close(loss, -p.log()[x0] * masked)
    share = masked.float().mean(0) if of == "positions" else masked.float().view(2000, 4, 4).mean((0, 2))
    torch.testing.assert_close(share, rates, atol=0.02, rtol=0)


def test_the_loss_over_t_is_the_likelihood_of_independent_tokens():
    """MDLM eq. 10, with the best denoiser there is."""
    p = torch.tensor([0.5, 0.3, 0.2])
    x0 = torch.multinomial(p.expand(20_000, 3), 4, replacement=True, generator=rng())
    torch.manual_seed(0)
    t = torch.rand(len(x0), 1) * 0.9 + 0.1
    loss = Masked(3).loss(lambda xt, t, y: p.log().expand(*xt.shape, 3), x0, None, t)
    assert (loss / t).sum(1).mean() == pytest.approx(-4 * (p * p.log()).sum().item(), rel=0.02)


# -- unmasking -------------------------------------------------------------------------------------------


def counting(logits):
    """A denoiser that gives the same logits every time, and the list of the t that it was called with."""
    calls = []

    def denoise(xt, t, y):
        calls.append(t.clone())
        return logits.expand(len(xt), -1, -1)

    return denoise, calls


def some_masked(numbers, k=10):
    """Ids (len(numbers), k) with so many masks in each row."""
    x0 = torch.randint(V, (len(numbers), k), generator=rng())
    rank = torch.rand(x0.shape, generator=rng()).argsort(1).argsort(1)
    return x0.masked_fill(rank < torch.tensor(numbers)[:, None], V)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 5, 64])
def test_each_row_becomes_known_in_even_shares_and_what_is_known_stays(steps, temperature, order):
    """It takes as many evaluations as asked for, and one for each of its masks at most."""
    settings = dict(steps=steps, order=order, temperature=temperature)
    numbers = torch.tensor([0, 1, 4, 7, 10])
    (denoise, calls), xt = counting(torch.randn(1, 10, V, generator=rng())), some_masked(numbers.tolist())
    states = list(unmask(denoise, xt, V, **settings))
    assert len(states) == len(calls) == min(steps, 10)
    assert all(torch.equal(state[xt != V], xt[xt != V]) for state in states)
    left = torch.stack([numbers, *((state == V).sum(1) for state in states)])  # (evaluations + 1, 5)
    torch.testing.assert_close(torch.stack(calls), left[:-1] / 10)
    done_after = (left > 0).sum(0)
    assert torch.equal(done_after, numbers.clamp(max=steps))
    for made, n in zip((left[:-1] - left[1:]).T.tolist(), done_after.tolist(), strict=True):
        assert not any(made[n:]) and all(made[:n])
        assert not n or max(made[:n]) - min(made[:n]) <= 1
    assert not list(unmask(denoise, some_masked([0, 0]), V, **settings))


def test_the_most_confident_tokens_come_first_and_are_the_likeliest():
    logits = torch.zeros(1, 4, V)
    logits[0, range(4), [3, 1, 4, 2]] = torch.tensor([2.0, 4.0, 1.0, 3.0])
    states = list(unmask(counting(logits)[0], torch.full((1, 4), V), V, steps=4))
    assert [state[0].tolist() for state in states] == [[V, 1, V, V], [V, 1, V, 2], [3, 1, V, 2], [3, 1, 4, 2]]


def test_in_random_order_every_token_is_first_equally_often():
    logits = torch.zeros(1, 4, V)
    logits[0, 0] = torch.arange(V) * 9.0  # by far the most confident
    xt = torch.full((8000, 4), V)
    first = next(unmask(counting(logits)[0], xt, V, steps=4, order="random", generator=rng()))
    torch.testing.assert_close((first != V).float().mean(0), torch.full((4,), 0.25), atol=0.02, rtol=0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_from_their_distribution_at_a_temperature(temperature):
    logits = torch.randn(1, 1, V, generator=rng(2))
    xt = torch.full((40_000, 1), V)
    (drawn,) = unmask(counting(logits)[0], xt, V, steps=1, temperature=temperature, generator=rng())
    share = torch.bincount(drawn[:, 0], minlength=V) / len(drawn)
    torch.testing.assert_close(share, (logits / temperature).softmax(-1)[0, 0], atol=0.012, rtol=0)


# -- learning --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths, axes", [(WIDTHS, None), (WIDTHS, AXES), ([0, 16], CELLS)])
def test_every_parameter_gets_a_gradient(widths, axes):
    model = random_model(widths, axes=axes)
    question, x0, _ = random_ids(model, B=16)
    t = torch.rand(len(x0), 1)
    Masked(V).loss(model, x0, clean_part(model, question, x0), t).mean().backward()
    for name, p in model.named_parameters():
        # A grid alone has nothing clean before it.
        assert p.grad.abs().sum() > 0 or (name == "clean.weight" and not model.layout.c), name
    assert (model.position.weight.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("widths", [WIDTHS, [3, 9], [3, *[1] * 9]], ids=["blocks", "one block", "width 1"])
def test_a_batch_is_learned_by_heart_and_written_again(widths):
    torch.manual_seed(0)
    model = TokenTransformer(V, Layout(widths), D=32, depth=2)
    question, x0, _ = random_ids(model, B=4)
    opt = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        t = torch.rand(x0.shape) ** 0.5
        Masked(V).loss(model, x0, clean_part(model, question, x0), t).mean().backward()
        opt.step()
        opt.zero_grad()
    *_, (_, xt) = generate(model, question, steps=3)
    assert torch.equal(xt, x0)
