"""The autoregressive models beside ours: GPT-2s that read a class or a question, and a GPT of windows."""

import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from blocks import Layout, PositionEmbedding
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
        label = nn.Embedding(classes + 1, decoder.config.n_embd)  # row 0 is "no label"
        super().__init__(decoder, eos)
        self.label = label

    def condition(self, y: Tensor) -> Tensor:
        return self.label(y + 1)[:, None]


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
    """A GPT-NeoX of transformers that writes windows of ids, with rotary positions; id V begins them."""

    def __init__(self, V: int, D: int, depth: int, window: int):
        super().__init__()
        self.V, size = V, dict(vocab_size=V + 1, max_position_embeddings=window + 1)
        size |= dict(hidden_size=D, intermediate_size=4 * D, num_hidden_layers=depth, num_attention_heads=4)
        # As in GPT-2 and ours: all of a head is turned, and the MLP comes after the attention.
        like = dict(rotary_pct=1.0, use_parallel_residual=False, hidden_act="gelu", tie_word_embeddings=False)
        ends = dict(bos_token_id=V, eos_token_id=None, pad_token_id=None)
        like |= dict(attn_implementation="sdpa" if torch.cuda.is_available() else "eager")
        self.gpt = GPTNeoXForCausalLM(GPTNeoXConfig(**size, **like, **ends))

    def forward(self, x0: Tensor) -> Tensor:
        """Nats (B, W) of each token of windows x0 (B, W)."""
        begin = torch.full_like(x0[:, :1], self.V)
        logits = self.gpt(torch.cat([begin, x0[:, :-1]], dim=1)).logits.float()
        return nn.functional.cross_entropy(logits.movedim(-1, 1), x0, reduction="none")

    @torch.no_grad()
    def write(self, n: int, length: int, temperature: float, prompt=()) -> Tensor:
        """Ids (n, length) of texts that begin with the ids of a prompt, by transformers' cached sampling."""
        begin, new = torch.tensor([[self.V, *prompt]], device=self.gpt.device), length - len(prompt)
        begin = begin.expand(n, -1)
        how = dict(do_sample=temperature > 0, temperature=temperature or None, top_k=0, min_new_tokens=new)
        how |= dict(max_new_tokens=new, attention_mask=torch.ones_like(begin))
        return self.gpt.generate(begin, **how)[:, 1:]
