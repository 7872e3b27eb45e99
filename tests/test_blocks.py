"""blocks.py and the masked process of diffusion.py: who sees whom, the cache, masks, unmasking."""

import itertools
import math

import pytest
import torch

from blocks import Layout, TokenTransformer, bound, doubt, generate, hide
from diffusion import Masked, rotate, rotation, sureness, unmask
from puzzles import cell_axes

V, WIDTHS = 7, [3, 2, 4, 3]
AXES = [[i % 4, i // 4] for i in range(sum(WIDTHS))]  # three rows of four
ORDERS = ["confident", "margin", "random"]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def random_model(widths=WIDTHS, vocabulary=V, axes=None, depth=2, rotary=False):
    """A denoiser whose every weight is random: what it must not see would show."""
    torch.manual_seed(0)
    model = TokenTransformer(vocabulary, Layout(widths, axes), D=32, depth=depth, rotary=rotary)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.fixture(scope="module", params=["a line", "more axes", "rotary"])
def model(request):
    return random_model(axes=AXES if request.param == "more axes" else None, rotary=request.param == "rotary")


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


# -- more axes -------------------------------------------------------------------------------------------


def same(of):
    """Which cells (row) of a 4 x 4 grid agree with which (column) in of(cell)."""
    return torch.tensor([[of(i) == of(j) for j in range(16)] for i in range(16)])


ROW, COLUMN = same(lambda cell: cell // 4), same(lambda cell: cell % 4)
BOX = same(lambda cell: (cell // 8, cell % 4 // 2))


@pytest.mark.parametrize(
    "heads, seen",
    [
        ([0], ROW),
        ([1], COLUMN),
        ([2], BOX),
        ([0, 1, 2], ROW | COLUMN | BOX),
        ([3], torch.ones(16, 16, dtype=torch.bool)),
        ([], torch.eye(16, dtype=torch.bool)),
    ],
    ids=["first", "second", "third", "all three", "free", "none"],
)
def test_a_head_of_an_axis_sees_what_shares_it_and_the_free_head_all(heads, seen):
    """Of a single layer only these heads are read; then each cell is changed in turn."""
    model = random_model([0, 16], axes=cell_axes(4), depth=1)
    read = torch.zeros(4, 8)
    read[heads] = 1
    block = model.body.blocks[0]
    x = torch.randint(V, (1, 16), generator=rng(1))
    changed = torch.where(torch.eye(16, dtype=torch.bool), other(x), x)  # (16, 16)
    with torch.no_grad():
        block.out.weight *= read.flatten()
        block.qkv.weight *= 0.2  # so that nothing is seen too faintly
        moved = model(changed, None, changed[:, :0]) - model(x, None, x[:, :0])
    assert torch.equal(moved.abs().amax(-1) > 1e-6, seen)


def test_the_embedding_of_a_position_is_the_sum_over_its_axes():
    several, one = random_model(axes=AXES), random_model()
    q, x0, xt = random_ids(one)
    table = several.place.weight
    rows = [[i, 12 + column, 16 + row] for i, (column, row) in enumerate(AXES)]
    assert len(table) == 12 + 4 + 3
    several.share.fill_(True)  # so that places alone tell them apart
    weights = several.state_dict() | {"place.weight": torch.stack([table[row].sum(0) for row in rows])}
    one.load_state_dict(weights)
    with torch.no_grad():
        logits = [model(xt, None, clean_part(model, q, x0)) for model in (several, one)]
    torch.testing.assert_close(*logits)


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


@pytest.mark.parametrize("known", ["nothing", "some"])
def test_a_batch_makes_what_each_of_it_makes_alone(model, known):
    q, _, xt = random_ids(model, B=6)
    if known == "nothing":
        xt = torch.full_like(xt, model.mask_id)
    *_, (_, together) = generate(model, q, xt, steps=3)
    for i in range(len(q)):
        *_, (_, alone) = generate(model, q[i : i + 1], xt[i : i + 1], steps=3)
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


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("masked, steps", [(10, 1), (10, 3), (10, 10), (7, 4), (7, 64), (1, 8), (0, 8)])
def test_unmasking_makes_the_evaluations_that_it_is_asked_for(masked, steps, order):
    denoise, calls = counting(torch.randn(1, 10, V, generator=rng()))
    states = list(unmask(denoise, some_masked([masked] * 3), V, steps=steps, order=order))
    assert len(states) == len(calls) == min(steps, masked)


@pytest.mark.parametrize("order", ORDERS)
def test_each_row_takes_an_evaluation_for_each_of_its_masks_or_as_many_as_it_may(order):
    numbers = torch.tensor([0, 1, 4, 7, 10])
    denoise, calls = counting(torch.randn(1, 10, V, generator=rng()))
    left = [
        (state == V).sum(1)
        for state in unmask(denoise, some_masked(numbers.tolist()), V, order=order, steps=5)
    ]
    left = torch.stack([numbers, *left])  # (6, 5)
    assert len(calls) == 5
    whole_after = (left > 0).sum(0)
    assert torch.equal(whole_after, numbers.clamp(max=5))
    made = left[:-1] - left[1:]
    for row, after in zip(made.T, whole_after, strict=True):
        assert (row[after:] == 0).all()
        assert row[:after].max() - row[:after].min() <= 1 if after else True
        assert (row[:after] > 0).all()


@pytest.mark.parametrize("order", ORDERS)
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


@pytest.mark.parametrize("order, first", [("confident", 0), ("margin", 1)])
def test_the_surest_is_not_the_one_with_the_widest_margin(order, first):
    """The most probable token has a rival, the other one has none."""
    p = torch.tensor([[0.5, 0.49, *[0.002] * 5], [0.4, *[0.1] * 6]])
    state = next(unmask(counting(p.log()[None])[0], torch.full((3, 2), V), V, steps=2, order=order))
    assert (state[:, first] == 0).all()
    assert (state[:, 1 - first] == V).all()


def test_the_margin_of_a_token_is_its_lead_over_the_likeliest_other():
    p = torch.tensor([[[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]])
    x0 = torch.tensor([[0, 1, 1]])
    torch.testing.assert_close(sureness(p.log(), x0, "margin"), torch.tensor([[0.2, -0.2, -0.4]]))
    torch.testing.assert_close(sureness(p.log(), x0, "confident"), torch.tensor([[0.5, 0.3, 0.2]]))


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


# -- positions that turn -----------------------------------------------------------------------------------


def test_rotation_is_that_of_gpt_neox():
    from transformers import GPTNeoXConfig
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding, apply_rotary_pos_emb

    config = GPTNeoXConfig(hidden_size=32, num_attention_heads=4, rotary_pct=1.0)
    q, k = torch.randn(2, 2, 4, 9, 8, generator=rng())
    place = torch.arange(3, 12)
    cosines, sines = GPTNeoXRotaryEmbedding(config)(q, place[None])
    for ours, theirs in zip((q, k), apply_rotary_pos_emb(q, k, cosines, sines), strict=True):
        torch.testing.assert_close(rotate(ours, rotation(place, 8)), theirs)


def test_a_window_that_is_moved_as_a_whole_has_the_same_logits():
    model = random_model(rotary=True)
    q, x0, xt = random_ids(model)
    clean, see = clean_part(model, q, x0), model.layout_see
    with torch.no_grad():
        logits, moved = (model.read(xt, clean, model.layout_place + by, see)[0] for by in (0, 50))
        spread, _ = model.read(xt, clean, 2 * model.layout_place, see)
    torch.testing.assert_close(moved, logits, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(spread, logits, atol=1e-2)


# -- the bound ---------------------------------------------------------------------------------------------


def test_of_each_block_exactly_as_many_are_hidden_as_asked_for_and_any_of_them():
    layout = Layout([3, 2, 4, 1])
    x0, u = torch.zeros(4000, 7, dtype=torch.long), torch.rand(4000, 3, generator=rng())
    hidden = hide(layout, x0, u, rng(1))
    for i, n in enumerate(layout.widths):
        part = hidden[:, (layout.owner == i)[3:]]
        assert (part.sum(1) == 1 + (n * u[:, i]).floor()).all()
        torch.testing.assert_close(part.float().mean(0), torch.full((n,), (n + 1) / 2 / n), rtol=0, atol=0.03)


def test_the_bound_with_blocks_of_width_1_is_the_likelihood_of_writing_token_by_token():
    for rotary in (False, True):
        model = random_model([3, *[1] * 6], rotary=rotary)
        q, x0, _ = random_ids(model)
        likelihood = torch.zeros(4)
        for i in range(6):  # each alone, behind what it stands on
            place, owner = torch.arange(3 + i + 1), model.layout.owner[: 3 + i + 1]
            mask, before = torch.full((4, 1), V), torch.cat([q, x0[:, :i]], dim=1)
            with torch.no_grad():
                logits, _ = model.read(mask, before, place, owner[:, None] >= owner)
            likelihood -= logits[:, 0].log_softmax(-1).gather(1, x0[:, i : i + 1])[:, 0]
        torch.testing.assert_close(bound(model, q, x0, 1, rng()), likelihood)


def test_the_bound_is_the_mean_over_all_orders_of_writing_a_block():
    model = random_model([2, 3, 2])
    q, x0, _ = random_ids(model, B=1)
    process, clean, wanted = Masked(V), clean_part(model, q, x0), 0.0
    for own in ([0, 1, 2], [3, 4]):
        orders = list(itertools.permutations(own))
        for order, i in itertools.product(orders, range(len(own))):
            hidden = torch.zeros(1, 5, dtype=torch.bool)
            hidden[0, list(order[i:])] = True  # the i before it are known
            with torch.no_grad():
                wanted += process.errors(model, x0, hidden, clean)[0, order[i]] / len(orders)
    found = bound(model, q.expand(3000, -1), x0.expand(3000, -1), 6, rng())
    assert found.mean().item() == pytest.approx(wanted.item(), abs=4 * found.std().item() / 3000**0.5)
    single = bound(model, q.expand(3000, -1), x0.expand(3000, -1), 1, rng())
    assert single.mean().item() == pytest.approx(wanted.item(), abs=4 * single.std().item() / 3000**0.5)


def test_the_draws_of_a_bound_mask_every_number_of_tokens_alike(monkeypatch):
    model, counts = random_model([0, 4, 4]), []
    x0 = torch.randint(V, (5, 8), generator=rng())

    def errors(process, model, x0, hidden, clean):
        counts.append(hidden.view(5, 2, 4).sum(-1))
        return torch.zeros(x0.shape)

    monkeypatch.setattr(Masked, "errors", errors)
    bound(model, x0[:, :0], x0, 4, rng())
    assert (torch.stack(counts).sort(0)[0] == torch.tensor([1, 2, 3, 4])[:, None, None]).all()


def test_the_bound_of_a_model_that_knows_nothing_is_log_V_for_each_token():
    model = TokenTransformer(V, Layout([0, 4, 4]), D=32, depth=1)  # it starts with every token alike
    x0 = torch.randint(V, (5, 8), generator=rng())
    torch.testing.assert_close(bound(model, x0[:, :0], x0, 3, rng()), torch.full((5,), 8 * math.log(V)))


# -- doubts ----------------------------------------------------------------------------------------------


class Known:
    """A denoiser of two blocks behind a question that gives logits_of(xt), and keeps what it is given."""

    def __init__(self, logits_of):
        self.mask_id, self.layout, self.logits_of, self.given = V, Layout([2, 4, 6]), logits_of, []

    def __call__(self, xt, t, clean):
        self.given.append((xt, t, clean))
        return self.logits_of(xt)


def test_doubts_are_what_is_missing_to_1_of_each_token_where_it_is_masked():
    p = torch.rand(10, V, generator=rng()).softmax(-1)
    model = Known(lambda xt: torch.where((xt == V)[..., None], p.log(), -9 * p.log()))
    q, x = torch.randint(V, (5, 12), generator=rng(1)).split([2, 10], dim=1)
    torch.testing.assert_close(doubt(model, q, x), 1 - p[range(10), x])


def test_doubts_need_two_evaluations_in_which_each_token_is_masked_once():
    model = Known(lambda xt: torch.zeros(*xt.shape, V))
    q, x = torch.randint(V, (500, 12), generator=rng(1)).split([2, 10], dim=1)
    doubts = doubt(model, q, x, rng(3))
    (first, t, clean), (second, u, _) = model.given
    assert doubts.shape == x.shape
    assert torch.equal((first == V) ^ (second == V), torch.ones_like(x, dtype=torch.bool))
    assert torch.equal(torch.where(first == V, second, first), x)
    assert (first == V).float().mean(0).sub(0.5).abs().max() < 0.1  # any of them in any half
    assert (first == V).float().mean(1).unique().numel() > 5
    torch.testing.assert_close(t + u, torch.ones(500))
    assert torch.equal(clean, torch.cat([q, x[:, :4]], dim=1))


def test_a_spoilt_token_has_the_largest_doubt_and_the_draws_repeat():
    """Of a denoiser that knows: all tokens are the one that most of those it sees are."""

    def most(xt):
        count = torch.nn.functional.one_hot(xt, V + 1)[..., :V].sum(1)
        return count[:, None].expand(-1, xt.shape[1], -1).float()

    x = torch.full((200, 10), 3)
    spoilt = torch.randint(10, (200,), generator=rng(1))
    x[range(200), spoilt] = 5
    doubts, again = (doubt(Known(most), x[:, :2], x, rng(4)) for _ in range(2))
    assert torch.equal(doubts.argmax(1), spoilt)
    assert torch.equal(doubts, again)


def test_doubts_of_a_model_are_those_of_the_passes_that_train_it(model):
    q, x, _ = random_ids(model)
    doubts = doubt(model, q, x, rng(2))
    half = torch.rand(x.shape, generator=rng(2)) < 0.5
    with torch.no_grad():
        logits = [model(x.masked_fill(h, V), None, clean_part(model, q, x)) for h in (half, ~half)]
    p = torch.where(half[..., None], *logits).softmax(-1)
    torch.testing.assert_close(doubts, 1 - p.gather(-1, x[..., None])[..., 0])


# -- learning --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "widths, axes",
    [(WIDTHS, None), (WIDTHS, AXES), ([0, 16], cell_axes(4))],
    ids=["a line", "more axes", "a grid"],
)
def test_every_parameter_gets_a_gradient(widths, axes):
    model = random_model(widths, axes=axes)
    q, x0, _ = random_ids(model, B=16)
    Masked(V).loss(model, x0, clean_part(model, q, x0)).mean().backward()
    for name, p in model.named_parameters():
        # A grid alone has nothing clean before it.
        assert p.grad.abs().sum() > 0 or (name == "clean.weight" and not model.layout.c), name
    assert (model.place.weight.grad.abs().sum(1) > 0).all()


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
