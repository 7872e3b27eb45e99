"""A sequence in blocks (a thought, a puzzle, a line of text): each is made by diffusion, given those before.

In training all blocks are noised at once and learned in one pass: the sequence is [question, clean blocks,
noised blocks], and a mask lets each noised block see itself and what is clean before it. Blocks of width 1
are autoregression, a single block is plain masked diffusion. What is clean stands first, so that in
generation the keys and values of all that is finished are a prefix, which is computed once.

Sources: block diffusion 2503.09573, Diffusion of Thought 2402.07754, masked diffusion (MDLM) 2406.07524.
Axes: B batch, q question, k all blocks together, c clean positions in training, L = c + k, P positions in
the cache, D model width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion import Body, Masked, StepEmbedding, rotation, sureness, uniform, unmask


class Layout:
    """Where a question and its blocks stand. widths: positions of the question (or 0), then of each block.

    axes: for each of the q + k positions more numbers that say where it stands (a cell's row, column, box).
    """

    def __init__(self, widths: list[int], axes: list[list[int]] | None = None):
        self.q, self.widths = widths[0], list(widths[1:])
        block = torch.repeat_interleave(torch.arange(len(self.widths)), torch.tensor(self.widths))
        self.owner = torch.cat([torch.full((self.q,), -1), block])  # (q + k,): -1 -1 0 0 0 1 1 ...
        self.k = len(block)
        # In training c positions are clean: the question and all blocks but the last, which no other reads.
        self.c = self.q + self.k - self.widths[-1]
        self.place = torch.cat([torch.arange(self.c), self.q + torch.arange(self.k)])  # (L,)
        more = torch.tensor(axes or [[]] * (self.q + self.k), dtype=torch.long)
        axes = torch.cat([torch.arange(self.q + self.k)[:, None], more], dim=1)
        if axes.min() < 0:
            raise ValueError(f"axes must be numbers from 0 on, got {axes.min()}")
        sizes = axes.amax(0) + 1
        self.places = int(sizes.sum())  # on all axes, one after the other
        self.axes = axes + sizes.cumsum(0) - sizes  # (q + k, A)
        self.share = (axes[:, None] == axes)[..., 1:].movedim(-1, 0)  # (A - 1, q + k, q + k)
        self.see = block_causal(self.owner[self.place], noised=torch.arange(self.c + self.k) >= self.c)


def block_causal(owner: Tensor, noised: Tensor) -> Tensor:
    """Who (row) sees whom (column), bool (L, L), given the block of each position and whether it is noised.

    A clean position sees the clean ones up to its own block; a noised one its own noised block and the clean
    blocks before. Block diffusion section 3.
    """
    row, column = owner[:, None], owner[None]
    own = noised[:, None] & noised & (column == row)
    before = ~noised & ((column < row) | ~noised[:, None] & (column == row))
    return own | before


class Places(nn.Embedding):
    """Embeddings of the positions in a layout, added up over its axes."""

    def __init__(self, layout: Layout, D: int):
        super().__init__(layout.places, D)
        self.register_buffer("axes", layout.axes, persistent=False)

    def forward(self, place: Tensor) -> Tensor:
        return super().forward(self.axes[place]).sum(-2)


class TokenTransformer(nn.Module):
    """Denoiser of tokens: logits (B, k, V) of all blocks xt (B, k), masked where they hold mask_id = V.

    y: the clean ids (B, c) before them, the question and the blocks but the last. t is not looked at: the
    masks say as much (MDLM section 3.5). V: tokens without the mask. D: width, divisible by 4 * heads.
    rotary: positions turn queries and keys, in place of embeddings of their own.
    """

    def __init__(self, V: int, layout: Layout, D: int, depth: int, heads=4, rotary=False):
        super().__init__()
        self.mask_id, self.layout = V, layout
        self.token, self.clean = nn.Embedding(V + 1, D), nn.Embedding(V, D)
        self.place = None if rotary else Places(layout, D)
        self.level, self.body = StepEmbedding(D), Body(D, depth, heads, V)
        # A head for each axis sees only what shares it; the others, of which there is one at least, see all.
        free = torch.ones(heads - len(layout.share), *layout.share.shape[1:], dtype=torch.bool)
        self.register_buffer("share", torch.cat([layout.share, free]), persistent=False)
        for name in ("owner", "place", "see"):
            self.register_buffer(f"layout_{name}", getattr(layout, name), persistent=False)

    def forward(self, xt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.read(xt, y, self.layout_place, self.layout_see)[0]

    def read(self, xt: Tensor, clean: Tensor, place: Tensor, see: Tensor | None, cache=None):
        """Logits of xt (B, n), which stands behind clean ids (B, m), and the cache with those behind it.

        place: (m + n,), where [clean, xt] stand in [question, blocks]. see: (m + n, P + m + n), None for all.
        """
        n = xt.shape[1]
        h = torch.cat([self.clean(clean), self.token(xt)], dim=1)  # (B, m + n, D)
        turn = None if self.place else rotation(place, h.shape[-1] // self.body.blocks[0].heads)
        h = h + self.place(place) if self.place else h
        if len(self.layout.share):  # what is in the cache stands before the rest
            column = torch.cat([torch.arange(cache[0][0].shape[2] if cache else 0, device=h.device), place])
            share = self.share[:, place][..., column]
            see = share if see is None else see & share
        clean_step = torch.zeros(1, 1, dtype=torch.long, device=h.device)
        emb = F.silu(self.level(clean_step))  # (1, 1, D)
        out, seen = self.body(h, emb, n, see, cache, turn)
        return out, [(keys[:, :, :-n], values[:, :, :-n]) for keys, values in seen]


@torch.no_grad()
def generate(
    model, question: Tensor, xt=None, *, steps=8, order="confident", temperature=0.0, generator=None
):
    """Yield (i, xt (B, k)) after every step in which something of block i became known; block after block.

    question: ids (B, q). xt: what is known of the blocks, mask_id elsewhere, and stays as it is (the first
    thoughts of a chain, the clues of a puzzle); None: nothing. steps: evaluations for each block. The other
    settings are those of `unmask`. What is finished is read once, with the next block's first evaluation.
    """
    if xt is None:
        xt = question.new_full((len(question), model.layout.k), model.mask_id)
    cache, read, start = None, 0, 0
    new = question  # finished, but not in the cache yet

    def denoise(part: Tensor, t: Tensor, y=None) -> Tensor:
        nonlocal cache, new, read
        end = read + new.shape[1] + part.shape[1]
        place, owner = torch.arange(read, end, device=part.device), model.layout_owner[:end]
        # Blocks come in order, and each sees those up to itself; the last one alone sees all.
        see = owner[read:, None] >= owner if new.shape[1] else None
        logits, cache = model.read(part, new, place, see, cache)
        new, read = new[:, :0], read + new.shape[1]
        return logits

    for i, width in enumerate(model.layout.widths):
        before, block, after = xt.split([start, width, xt.shape[1] - start - width], dim=1)
        how = dict(steps=steps, order=order, temperature=temperature, generator=generator)
        for known in unmask(denoise, block, model.mask_id, **how):
            xt = torch.cat([before, known, after], dim=1)
            yield i, xt
        new, start = torch.cat([new, xt[:, start : start + width]], dim=1), start + width


def hide(layout: Layout, x0: Tensor, u: Tensor, generator=None) -> Tensor:
    """Which tokens of x0 (B, k) to mask, bool (B, k): of each block of n exactly 1 + floor(n u).

    u: (B, number of blocks), in [0, 1). Which ones of a block is random.
    """
    owner = layout.owner[layout.q :].to(x0.device)
    n = torch.tensor(layout.widths, device=x0.device)
    rank = (owner + uniform(x0, generator)).argsort(1).argsort(1) - (n.cumsum(0) - n)[owner]  # in its block
    return rank < (1 + (n * u).long())[:, owner]


@torch.no_grad()
def bound(model, question: Tensor, x0: Tensor, draws: int, generator=None) -> Tensor:
    """Nats (B,) of sequences x0 (B, k), at most, given questions (B, q).

    Of each block of n tokens k are masked, k uniform in 1..n, and their nats count n / k times: the mean over
    all orders in which the block can be written. k is stratified over the draws. Blocks of width 1 have one
    order, and it is the likelihood itself. Masked diffusion as any-order autoregression, 2310.16218 eq. 4.
    """
    process, layout = Masked(model.mask_id), model.layout
    clean = torch.cat([question, x0], dim=1)[:, : layout.c]
    n, owner = (x.to(x0.device) for x in (torch.tensor(layout.widths), layout.owner[layout.q :]))
    first, total = uniform(x0[:, : len(n)], generator), torch.zeros(len(x0), device=x0.device)
    for i in range(draws):
        u = (first + i / draws) % 1
        hidden = hide(layout, x0, u, generator)
        weight = n / (1 + (n * u).long())  # (B, number of blocks)
        total += (process.errors(model, x0, hidden, clean) * weight[:, owner]).sum(1)
    return total / draws


@torch.no_grad()
def doubt(model, question: Tensor, x: Tensor, generator=None) -> Tensor:
    """How unsure (B, k) the model is of tokens x (B, k): 1 - p of each, given half of its block's others.

    Two evaluations, since each half of the tokens is masked once; blocks stand on those before as they are.
    """
    half = uniform(x, generator) < 0.5
    clean = torch.cat([question, x], dim=1)[:, : model.layout.c]
    doubts = torch.empty(x.shape, device=x.device)
    for hidden in (half, ~half):
        logits = model(x.masked_fill(hidden, model.mask_id), hidden.float().mean(1), clean).float()
        doubts = torch.where(hidden, 1 - sureness(logits, x, "confident"), doubts)
    return doubts
