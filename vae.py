"""The text VAE: a BERT encoder turns a paragraph into k codes of width d, a GPT-2 decoder turns codes into a paragraph. PLANNER, 2306.02531.

Axes: B batch, L tokens, V vocabulary, k codes, d their width, D model width. Token ids that stand for nothing (padding) are -100.
"""
import json

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel


def backbone(name: str, config: str = "", part: str = "encoder"):
    """An encoder (last hidden states) or a decoder (GPT-2 with its head) by hub name or local folder; with name "" from a JSON config, random weights.

    Raises OSError where the name is neither on disk nor to be reached.
    """
    if name:
        return AutoModel.from_pretrained(name, **no_pooler(AutoConfig.from_pretrained(name))) if part == "encoder" else GPT2LMHeadModel.from_pretrained(name)
    settings = json.loads(config)
    if part == "decoder":
        return GPT2LMHeadModel(GPT2Config(**settings))
    made = AutoConfig.for_model(**settings)
    return AutoModel.from_config(made, **no_pooler(made))


def no_pooler(config) -> dict:
    return dict(add_pooling_layer=False) if config.model_type == "bert" else {}  # it would be a weight that nothing trains


def small_backbones(vocab: int, D: int, depth: int, length: int) -> tuple[nn.Module, nn.Module]:
    """BERT and GPT-2 of the same width D, depth and vocabulary, random weights, for sequences of up to `length` tokens. D divisible by 4."""
    bert = dict(vocab_size=vocab, hidden_size=D, num_hidden_layers=depth, num_attention_heads=4, intermediate_size=4 * D, attn_implementation="eager")
    none = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertModel(BertConfig(**bert, **none, max_position_embeddings=length), add_pooling_layer=False), small_gpt(vocab, D, depth, length)


def small_gpt(vocab: int, D: int, depth: int, length: int) -> GPT2LMHeadModel:
    """GPT-2 with random weights and no dropout, for up to `length` positions. D divisible by 4."""
    gpt = dict(vocab_size=vocab, n_embd=D, n_layer=depth, n_head=4, n_positions=length, bos_token_id=1, eos_token_id=1)
    fast = dict(attn_implementation="eager", activation_function="gelu")  # trains half as fast again on a CPU as fused attention and tanh's GELU do
    return GPT2LMHeadModel(GPT2Config(**gpt, **fast, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def corrupt(ids: Tensor, p: Tensor, vocab: int, mask_id: int | None = None) -> Tensor:
    """ids (B, L) in which each token but padding becomes, with its text's probability p (B,), a uniform one of the vocabulary, or mask_id.

    PLANNER's "sub" noise for one p, "sub_u" for p drawn per text.
    """
    hit = (torch.rand(ids.shape, device=ids.device) < p[:, None]) & (ids >= 0)
    new = torch.randint(vocab, ids.shape, device=ids.device) if mask_id is None else torch.full_like(ids, mask_id)
    return torch.where(hit, new, ids)


def kl(mean: Tensor, var: Tensor) -> Tensor:
    """KL(N(mean, var) || N(0, I)) of codes (B, k, d), summed over k and d, averaged over B, in nats. Kingma and Welling 1312.6114 app. B."""
    return 0.5 * (mean.square() + var - var.log() - 1).sum(dim=(1, 2)).mean()


class Reader(nn.Module):
    """A GPT-2 that reads vectors z (B, k, d), projected by `prefix`, before the text, which begins and ends with the token eos."""

    def __init__(self, decoder, prefix: nn.Module, eos: int):
        super().__init__()
        self.decoder, self.prefix, self.eos = decoder, prefix, eos

    def decode(self, z: Tensor, target: Tensor) -> Tensor:
        """Logits (B, L, V) of target (B, L) under codes z (B, k, d); those at i depend on z and on targets before i."""
        ids = F.pad(target.clamp(min=0)[:, :-1], (1, 0), value=self.eos)  # eos x1 .. x(L-1)
        embeds = torch.cat([self.prefix(z), self.decoder.transformer.wte(ids)], dim=1)  # (B, k + L, D)
        return self.decoder(inputs_embeds=embeds, logits_to_keep=target.shape[1], use_cache=False).logits

    def cross_entropy(self, z: Tensor, target: Tensor) -> Tensor:
        """Mean nats a token of target (B, L) under codes z (B, k, d)."""
        return F.cross_entropy(self.decode(z, target).float().flatten(0, 1), target.flatten(), ignore_index=-100)

    @torch.no_grad()
    def generate(self, z: Tensor, max_tokens: int, top_p: float = 0.0) -> Tensor:
        """Token ids (B, at most max_tokens) of texts for codes z (B, k, d): greedy, or drawn from the nucleus top_p; after the end token, eos."""
        embeds = torch.cat([self.prefix(z), self.decoder.transformer.wte.weight[self.eos].expand(len(z), 1, -1)], dim=1)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=z.device)
        how = dict(do_sample=True, top_p=top_p, top_k=0) if top_p else dict(do_sample=False)
        return self.decoder.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=max_tokens, eos_token_id=self.eos, pad_token_id=self.eos, **how)


class LabelGPT(Reader):
    """The autoregressive baseline: a GPT-2 that reads a class label y (B,), -1 for none, as one embedded vector."""

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
    """The autoregressive baseline: a GPT-2 that reads a question's ids (B, q), -1 for padding, and writes a chain; its end token is the last of its vocabulary."""

    def __init__(self, decoder):
        super().__init__(decoder, nn.Identity(), decoder.config.vocab_size - 1)

    def read(self, q: Tensor) -> Tensor:
        return self.decoder.transformer.wte(q.where(q >= 0, self.eos))

    def forward(self, q: Tensor, target: Tensor) -> Tensor:
        return self.cross_entropy(self.read(q), target)


class TextVAE(Reader):
    """Encoder, k codes (each made of `span` neighbouring states of the encoder and projected to width d), decoder that reads them as an embedded prefix.

    span 1 is PLANNER's: the first k states. A decoder from scratch then learns to copy k tokens and stops there, so let k span cover the text.
    pool: "mean" of the states of a span, or "concat", which keeps their order and is learned by heart, in place of learned, where texts are few.
    eos: the decoder's end token, which also begins a text. variance: "fixed" (codes are read with noise of standard deviation
    `noise`, no KL) or "learned" (PLANNER: a second projection, KL with weight beta). tanh bounds the mean to (-1, 1).
    p_max: each training text is corrupted at a rate drawn from U(0, p_max), by substitution, or by mask_id where it is given.
    """

    def __init__(self, encoder, decoder, k: int, d: int, eos: int, *, span=1, pool="mean", tanh=True, variance="fixed", noise=0.15, beta=0.0, p_max=0.3, mask_id=None):
        super().__init__(decoder, nn.Linear(d, decoder.config.n_embd), eos)
        self.encoder, self.k, self.d, self.span, self.pool = encoder, k, d, span, pool
        self.tanh, self.noise, self.beta, self.p_max, self.mask_id = tanh, noise, beta, p_max, mask_id
        D = encoder.config.hidden_size * (span if pool == "concat" else 1)
        self.fc_mean = nn.Linear(D, d)
        self.fc_log_var = nn.Linear(D, d) if variance == "learned" else None

    def states(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (B, L, D) of the encoder for ids (B, L), and the mask (B, L) of those that stand for a token."""
        mask = ids >= 0
        read = mask | (torch.arange(ids.shape[1], device=ids.device) < self.k * self.span)  # codes of a short text are read at padding: it must be visible
        return self.encoder(input_ids=ids.clamp(min=0), attention_mask=read.long()).last_hidden_state, mask

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (B, k, d) of the codes of ids (B, L)."""
        L = self.k * self.span
        h = self.states(F.pad(ids, (0, max(0, L - ids.shape[1])), value=-100))[0][:, :L].float()
        h = h.unflatten(1, (self.k, self.span))  # (B, k, span, D)
        h = h.flatten(2) if self.pool == "concat" else h.mean(2)
        mean = self.fc_mean(h).float()
        mean = mean.tanh() if self.tanh else mean
        var = torch.full_like(mean, self.noise**2) if self.fc_log_var is None else self.fc_log_var(h).float().clamp(-20, 5).exp()
        return mean, var

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        """Training loss: encode corrupted ids (B, L), draw the codes, cross-entropy of target (B, L); plus beta KL."""
        p = torch.rand(len(ids), device=ids.device) * self.p_max
        mean, var = self.encode(corrupt(ids, p, self.encoder.config.vocab_size, self.mask_id))
        loss = self.cross_entropy(mean + var.sqrt() * torch.randn_like(mean), target)
        return loss + self.beta * kl(mean, var) if self.beta else loss
