"""The autoregressive GPT-2s that stand beside ours: one reads a class, the other a question or a puzzle."""

import torch
from torch import Tensor, nn

from blocks import Layout, Places
from vae import Reader


class LabelGPT(Reader):
    """A GPT-2 that reads a class label y (B,), -1 for none, as one embedded vector."""

    def __init__(self, decoder, classes: int, eos: int):
        super().__init__(decoder, nn.Identity(), eos)
        self.label = nn.Embedding(classes + 1, decoder.config.n_embd)  # row 0 is "no label"

    def read(self, y: Tensor) -> Tensor:
        """The prefix (B, 1, D) of labels y (B,)."""
        return self.label(y + 1)[:, None]

    def forward(self, y: Tensor, target: Tensor) -> Tensor:
        """Training loss: mean nats a token of target (B, L)."""
        return self.cross_entropy(self.read(y), target)


class QuestionGPT(Reader):
    """A GPT-2 that reads a question's ids (B, q), -1 for padding, and writes a chain.

    Its end token is the last of its vocabulary. layout: where its positions stand on more axes than one.
    """

    def __init__(self, decoder, layout: Layout | None = None):
        super().__init__(decoder, nn.Identity(), decoder.config.vocab_size - 1)
        if layout is not None:
            decoder.transformer.wpe = Places(layout, decoder.config.n_embd)

    def read(self, q: Tensor) -> Tensor:
        """The prefix (B, q, D) of questions q (B, q)."""
        return self.decoder.transformer.wte(q.where(q >= 0, self.eos))

    def forward(self, q: Tensor, target: Tensor) -> Tensor:
        """Training loss: mean nats a token of target (B, L)."""
        return self.cross_entropy(self.read(q), target)


@torch.no_grad()
def mean_nats(model: LabelGPT, y: Tensor, target: Tensor, device) -> float:
    """Mean nats a token of targets (N, L) under labels y (N,)."""
    total = count = 0
    for labels, part in zip(y.split(64), target.split(64), strict=True):
        n = (part >= 0).sum().item()
        total += model(labels.to(device), part.to(device)).item() * n
        count += n
    return total / count
