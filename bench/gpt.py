"""The autoregressive models beside ours: GPT-2s that read a class or a question, and a GPT of windows."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from blocks import Layout
from vae import PrefixLM


class ConditionedGPT(PrefixLM):
    """A GPT-2 that reads vectors (B, k, D) of its own width, a subclass's `condition`, before the text."""

    def __init__(self, decoder, eos: int):
        super().__init__(decoder, 1, eos)
        self.prefix = nn.Identity()

    def forward(self, condition: Tensor, target: Tensor) -> Tensor:
        """Training loss: mean nats per token of target (B, L), -100 for padding."""
        return self.cross_entropy(self.condition(condition), target)

    @torch.no_grad()
    def write(self, condition: Tensor, max_tokens: int, top_p: float = 0.0) -> Tensor:
        """Ids (B, at most max_tokens): the likeliest, or drawn from the nucleus of probability top_p."""
        if not top_p:
            return self.generate(self.condition(condition), max_tokens)
        begin = torch.full((len(condition), 1), self.eos, device=condition.device)
        embeds = self.embed(self.condition(condition), begin)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=begin.device)
        how = dict(max_new_tokens=max_tokens, eos_token_id=self.eos, pad_token_id=self.eos)
        how |= dict(do_sample=True, top_p=top_p, top_k=0)
        return self.decoder.generate(inputs_embeds=embeds, attention_mask=mask, **how)


class LabelGPT(ConditionedGPT):
    """A GPT-2 that reads a class label y (B,), -1 for none, as one embedded vector."""

    def __init__(self, decoder, classes: int, eos: int):
        label = nn.Embedding(classes + 1, decoder.get_input_embeddings().embedding_dim)  # row 0 is "no label"
        super().__init__(decoder, eos)
        self.label = label

    def condition(self, y: Tensor) -> Tensor:
        return self.label(y + 1)[:, None]


class PositionEmbedding(nn.Embedding):
    """Embeddings of the positions in a layout, added up over its axes."""

    def __init__(self, layout: Layout, D: int):
        super().__init__(layout.positions, D)
        self.layout = layout

    def forward(self, position_ids: Tensor) -> Tensor:
        return super().forward(self.layout.axes[position_ids]).sum(-2)


class QuestionGPT(ConditionedGPT):
    """A GPT-2 that reads a question's ids (B, q), and writes a chain.

    Its end token is the last of its vocabulary. layout: where its positions stand on more axes than one.
    """

    def __init__(self, decoder, layout: Layout | None = None):
        super().__init__(decoder, decoder.config.vocab_size - 1)
        if layout is not None:
            decoder.transformer.wpe = PositionEmbedding(layout, decoder.config.n_embd)

    def condition(self, q: Tensor) -> Tensor:
        return self.decoder.get_input_embeddings()(q)


@torch.no_grad()
def mean_nats(model: LabelGPT, y: Tensor, target: Tensor) -> float:
    """Mean nats per token of targets (N, L) under labels y (N,)."""
    total = count = 0
    device = model.label.weight.device
    for labels, part in zip(y.split(64), target.split(64), strict=True):
        n = (part >= 0).sum().item()
        total += model(labels.to(device), part.to(device)).item() * n
        count += n
    return total / count


class WindowGPT(nn.Module):
    """A GPT-NeoX of transformers as a denoiser of windows in blocks of 1: so tokengen.py trains and runs it.

    It sees only the clean tokens before each, id V before the first; its positions are rotary, like ours.
    """

    def __init__(self, V: int, window: int, D: int, depth: int):
        super().__init__()
        self.mask_id, self.layout = V, Layout([0] + [1] * window)
        size = dict(vocab_size=V + 1, max_position_embeddings=window + 1, num_attention_heads=4)
        size |= dict(hidden_size=D, intermediate_size=4 * D, num_hidden_layers=depth)
        # As in GPT-2 and ours: all of a head is rotated, and the MLP comes after the attention.
        like = dict(rotary_pct=1.0, use_parallel_residual=False, hidden_act="gelu", tie_word_embeddings=False)
        like |= dict(attn_implementation="sdpa" if torch.cuda.is_available() else "eager")
        ends = dict(bos_token_id=V, eos_token_id=None, pad_token_id=None)
        self.gpt = GPTNeoXForCausalLM(GPTNeoXConfig(**size, **like, **ends))

    def matrices(self) -> list[Tensor]:
        """The matrices of the layers, for Muon."""
        return [p for p in self.gpt.gpt_neox.layers.parameters() if p.dim() == 2]

    def forward(self, xt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Logits (B, k, V + 1) given the clean tokens y (B, k - 1)."""
        return self.gpt(F.pad(y, (1, 0), value=self.mask_id)).logits

    def denoise(self, xt: Tensor, clean: Tensor, position_ids, attention_mask=None, kv_cache=None):
        """Logits (B, 1, V) of xt (B, 1) after the cached ids and clean ids (B, m), and the cache of both."""
        clean = clean if kv_cache else F.pad(clean, (1, 0), value=self.mask_id)
        out = self.gpt(clean, past_key_values=kv_cache, use_cache=True)
        return out.logits[:, -1:, : self.mask_id], out.past_key_values
