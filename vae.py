"""The text VAE: a BERT encoder turns a paragraph into k latents, a GPT-2 decoder turns them into a paragraph.

PLANNER, 2306.02531. Axes: B batch, L tokens, V vocabulary, k latents, d their width, D model width. Token
ids that stand for nothing (padding) are -100.
"""

import json

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

# -- encoders and decoders -------------------------------------------------------------------------------


# Other types can name a network of their own to fetch, also where only their shape is asked for.
ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert", "electra")
FETCHED = ("attn_implementation", "_attn_implementation", "quantization_config", "auto_map")


def pretrained_backbones(encoder: str, decoder: str) -> tuple[nn.Module, GPT2LMHeadModel]:
    """An encoder and a GPT-2 by hub name or local folder.

    Raises OSError where they cannot be had, ValueError for an encoder of another type than ENCODERS.
    """
    config = AutoConfig.from_pretrained(encoder)
    check_encoder(config.model_type)
    bert = AutoModel.from_pretrained(encoder, dtype=torch.float32, **without_pooler(config))
    return bert, GPT2LMHeadModel.from_pretrained(decoder, dtype=torch.float32)


def untrained_backbones(encoder: str, decoder: str) -> tuple[nn.Module, GPT2LMHeadModel]:
    """The same from their configurations in JSON, with random weights; nothing that they name is fetched."""
    shapes = [json.loads(text) for text in (encoder, decoder)]
    shapes = [{name: shape[name] for name in shape.keys() - set(FETCHED)} for shape in shapes]
    check_encoder(shapes[0].get("model_type"))
    config = AutoConfig.for_model(**shapes[0])
    gpt = GPT2LMHeadModel(GPT2Config(**shapes[1]))
    return AutoModel.from_config(config, **without_pooler(config)), gpt


def check_encoder(model_type: str) -> None:
    if model_type not in ENCODERS:
        raise ValueError(f"the encoder is of type {model_type!r}, not one of {', '.join(ENCODERS)}")


def without_pooler(config) -> dict:
    """What keeps a BERT and its like from having a pooler: it would be a weight that nothing trains."""
    has_one = config.model_type in ("bert", "roberta", "xlm-roberta")
    return dict(add_pooling_layer=False) if has_one else {}


def small_backbones(vocab: int, D: int, depth: int, length: int) -> tuple[BertModel, GPT2LMHeadModel]:
    """BERT and GPT-2 of one width D (divisible by 4), depth and vocabulary, for up to `length` tokens."""
    shape = dict(hidden_size=D, num_hidden_layers=depth, num_attention_heads=4, intermediate_size=4 * D)
    shape |= dict(vocab_size=vocab, max_position_embeddings=length, attn_implementation="eager")
    bert = BertConfig(**shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertModel(bert, add_pooling_layer=False), small_gpt(vocab, D, depth, length)


def small_gpt(vocab: int, D: int, depth: int, length: int) -> GPT2LMHeadModel:
    """GPT-2 with random weights and no dropout, for up to `length` positions. D divisible by 4."""
    shape = dict(vocab_size=vocab, n_embd=D, n_layer=depth, n_head=4, n_positions=length)
    # On a CPU these train half as fast again as fused attention and the tanh form of GELU.
    fast = dict(attn_implementation="eager", activation_function="gelu")
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(GPT2Config(**shape, **fast, **no_dropout, bos_token_id=1, eos_token_id=1))


# -- the VAE ---------------------------------------------------------------------------------------------


def substitute(ids: Tensor, p: Tensor, vocab: int) -> Tensor:
    """ids (B, L) in which each token but padding becomes, with its text's probability p (B,), a uniform one.

    PLANNER's "sub" noise for one p, "sub_u" for p drawn for each text.
    """
    hit = (torch.rand(ids.shape, device=ids.device) < p[:, None]) & (ids >= 0)
    return torch.where(hit, torch.randint(vocab, ids.shape, device=ids.device), ids)


def kl(mean: Tensor, var: Tensor) -> Tensor:
    """KL(N(mean, var) || N(0, I)) of latents (B, k, d), in nats a text. VAE, 1312.6114 app. B."""
    return 0.5 * (mean.square() + var - var.log() - 1).sum(dim=(1, 2)).mean()


class Reader(nn.Module):
    """A GPT-2 that reads vectors z (B, k, d), projected by `prefix`, before the text.

    The text begins and ends with the token eos.
    """

    def __init__(self, decoder, prefix: nn.Module, eos: int):
        super().__init__()
        self.decoder, self.prefix, self.eos = decoder, prefix, eos

    def decode(self, z: Tensor, target: Tensor) -> Tensor:
        """Logits (B, L, V) of target (B, L) under z (B, k, d); each depends on z and on targets before it."""
        ids = F.pad(target.clamp(min=0)[:, :-1], (1, 0), value=self.eos)  # eos x1 .. x(L-1)
        embeds = torch.cat([self.prefix(z), self.decoder.transformer.wte(ids)], dim=1)  # (B, k + L, D)
        return self.decoder(inputs_embeds=embeds, logits_to_keep=target.shape[1], use_cache=False).logits

    def cross_entropy(self, z: Tensor, target: Tensor) -> Tensor:
        """Mean nats a token of target (B, L) under z (B, k, d)."""
        logits = self.decode(z, target).float()
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)

    @torch.no_grad()
    def generate(self, z: Tensor, max_tokens: int, top_p: float = 0.0) -> Tensor:
        """Token ids (B, at most max_tokens) of texts for z (B, k, d); after the end token, eos.

        top_p: 0 takes the likeliest token, otherwise one is drawn from the nucleus of this probability.
        """
        start = self.decoder.transformer.wte.weight[self.eos].expand(len(z), 1, -1)
        embeds = torch.cat([self.prefix(z), start], dim=1)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=z.device)
        how = dict(do_sample=True, top_p=top_p, top_k=0) if top_p else dict(do_sample=False)
        how |= dict(max_new_tokens=max_tokens, eos_token_id=self.eos, pad_token_id=self.eos)
        return self.decoder.generate(inputs_embeds=embeds, attention_mask=mask, **how)


class TextVAE(Reader):
    """An encoder, k latents of width d in (-1, 1), and a decoder that reads them as an embedded prefix.

    Each latent is made of `span` neighbouring states of the encoder. span 1 is PLANNER's, the first k
    states: a decoder from scratch then learns to copy k tokens and stops there, so let k span cover the text.
    pool: "mean" of the states of a span, or "concat", which keeps their order, but is learned by heart where
    texts are few. variance: "fixed" (latents are read with noise of standard deviation `noise`, no KL) or
    "learned" (PLANNER's: a second projection, and a KL of weight beta). eos: the decoder's end token. p_max:
    each training text is corrupted at a rate drawn from U(0, p_max).
    """

    def __init__(
        self,
        encoder,
        decoder,
        k,
        d,
        eos,
        span=1,
        pool="mean",
        variance="fixed",
        noise=0.15,
        beta=0.0,
        p_max=0.3,
    ):
        super().__init__(decoder, nn.Linear(d, decoder.config.n_embd), eos)
        self.encoder, self.k, self.d, self.span, self.pool = encoder, k, d, span, pool
        self.noise, self.beta, self.p_max = noise, beta, p_max
        D = encoder.config.hidden_size * (span if pool == "concat" else 1)
        self.fc_mean = nn.Linear(D, d)
        self.fc_log_var = nn.Linear(D, d) if variance == "learned" else None

    def states(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's states (B, L, D) for ids (B, L), and the mask (B, L) of those that are of tokens."""
        mask = ids >= 0
        # Latents of a short text are read at padding, which must therefore be visible.
        seen = mask | (torch.arange(ids.shape[1], device=ids.device) < self.k * self.span)
        h = self.encoder(input_ids=ids.clamp(min=0), attention_mask=seen.long()).last_hidden_state
        return h, mask

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (B, k, d) of the latents of ids (B, L)."""
        L = self.k * self.span
        h, _ = self.states(F.pad(ids, (0, max(0, L - ids.shape[1])), value=-100))
        h = h[:, :L].float().unflatten(1, (self.k, self.span))  # (B, k, span, D)
        h = h.flatten(2) if self.pool == "concat" else h.mean(2)
        mean = self.fc_mean(h).float().tanh()
        if self.fc_log_var is None:
            return mean, torch.full_like(mean, self.noise**2)
        return mean, self.fc_log_var(h).float().clamp(-20, 5).exp()

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        """Training loss of texts (B, L): encode them corrupted, draw latents, write them; plus beta KL."""
        p = torch.rand(len(ids), device=ids.device) * self.p_max
        mean, var = self.encode(substitute(ids, p, self.encoder.config.vocab_size))
        loss = self.cross_entropy(mean + var.sqrt() * torch.randn_like(mean), target)
        return loss + self.beta * kl(mean, var) if self.beta else loss
