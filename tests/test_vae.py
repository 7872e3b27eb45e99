"""vae.py: what the decoder may see, what a latent is made of, noise, the KL, gradients; and it learns."""

import json

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from vae import TextVAE, kl, pretrained_backbones, small_backbones, substitute, untrained_backbones

EOS = 1


def texts(n=6, L=10, vocab=50):
    """Random ids (n, L), of which text i has L - i tokens, and their targets, which end in EOS."""
    ids = torch.randint(2, vocab, (n, L), generator=torch.Generator().manual_seed(0))
    target = ids.clone()
    for i in range(n):
        ids[i, L - 1 - i :] = -100
        target[i, L - i :] = -100
        target[i, L - 1 - i] = EOS
    return ids, target


def small(**how):
    torch.manual_seed(0)
    return TextVAE(*small_backbones(50, 32, 2, 20), 4, 8, EOS, **how)


def without_gradient(model):
    return [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_a_logit_depends_on_the_latents_and_on_earlier_tokens_only():
    vae, (_, target) = small().eval(), texts()
    z = torch.randn(6, 4, 8)
    before = vae.decode(z, target)
    changed = target.clone()
    changed[:, 5] = (target[:, 5].clamp(min=2) + 7) % 48 + 2
    after = vae.decode(z, changed)
    assert torch.equal(before[:, :6], after[:, :6])  # the logit at 5 predicts token 5 and has not read it
    assert (before[0, 6:] - after[0, 6:]).abs().amax(-1).min() > 1e-4
    assert (before - vae.decode(z.roll(1, 0), target)).abs().amax((1, 2)).min() > 1e-4


def test_logits_equal_those_of_planners_second_pass_over_a_cache():
    vae, (_, target) = small().eval(), texts(2)
    z = torch.randn(2, 4, 8)
    with torch.no_grad():
        past = vae.decoder.transformer(inputs_embeds=vae.prefix(z), use_cache=True).past_key_values
        ids = torch.cat([torch.full((2, 1), EOS), target.clamp(min=0)[:, :-1]], dim=1)
        theirs = vae.decoder(input_ids=ids, past_key_values=past).logits
        torch.testing.assert_close(vae.decode(z, target), theirs, atol=1e-5, rtol=1e-5)


def test_cross_entropy_is_the_mean_over_tokens_that_count():
    vae, (_, target) = small().eval(), texts(3)
    z = torch.randn(3, 4, 8)
    logp = vae.decode(z, target).log_softmax(-1)
    by_hand = [-logp[b, i, target[b, i]] for b, i in (target >= 0).nonzero().tolist()]
    torch.testing.assert_close(vae.cross_entropy(z, target), torch.stack(by_hand).mean())


@pytest.mark.parametrize("span, pool", [(1, "mean"), (2, "mean"), (2, "concat")])
def test_a_latent_is_the_mean_of_its_span_of_states_or_all_in_order(span, pool):
    vae, ids = small(span=span, pool=pool).eval(), texts(1)[0]
    spans = vae.states(ids)[0][0, : 4 * span].view(4, span, 32)
    by_hand = vae.fc_mean(
        spans.mean(1) if pool == "mean" else torch.cat([*spans.transpose(0, 1)], dim=1)
    ).tanh()
    torch.testing.assert_close(vae.encode(ids)[0][0], by_hand)


@pytest.mark.parametrize("span", [1, 2])
def test_latents_of_a_text_do_not_depend_on_its_neighbours_or_padding(span):
    vae, (ids, _) = small(span=span).eval(), texts(9)  # the last text has one token, fewer than latents
    together = vae.encode(ids)[0]
    for i in range(9):
        alone = vae.encode(ids[i : i + 1, : max(1, 9 - i)])[0][0]
        torch.testing.assert_close(alone, together[i], atol=1e-5, rtol=1e-4)
    for i in range(9):  # but on every token, also beyond their spans
        changed = ids[:1].clone()
        changed[0, i] = (ids[0, i] + 7) % 48 + 2
        assert (together[0] - vae.encode(changed)[0][0]).abs().max() > 1e-4


def test_substitution_hits_tokens_at_each_texts_rate_and_never_padding():
    ids, rates = torch.randint(0, 1000, (4, 5000)), torch.tensor([0.0, 0.3, 0.7, 1.0])
    ids[:, 4000:] = -100
    noisy = substitute(ids, rates, 1000)
    torch.testing.assert_close((noisy != ids)[:, :4000].float().mean(1), rates, atol=0.03, rtol=0)
    assert torch.equal(noisy[:, 4000:], ids[:, 4000:])
    assert noisy[3, :4000].unique().numel() > 900  # uniform over the vocabulary


def test_training_reads_corrupted_text_at_rates_up_to_p_max():
    vae, (ids, target), read = small(p_max=1.0), texts(), []
    vae.encoder.register_forward_pre_hook(lambda _, __, how: read.append(how["input_ids"]), with_kwargs=True)
    vae(ids, target)
    vae.p_max = 0.0
    vae(ids, target)
    hit = (read[0] != ids.clamp(min=0)) & (ids >= 0)
    assert 0.2 < hit.sum() / (ids >= 0).sum() < 0.8
    assert torch.equal(read[1], ids.clamp(min=0))


@pytest.mark.parametrize("noise, same", [(0.0, True), (0.3, False)])
def test_the_decoder_trains_on_noisy_latents(noise, same):
    vae, (ids, target) = small(p_max=0.0, noise=noise), texts()
    assert torch.equal(vae(ids, target), vae(ids, target)) == same
    assert vae.encode(ids)[1].unique().tolist() == pytest.approx([noise**2])


def test_planners_variance_is_learned_and_its_kl_counts():
    vae, (ids, target) = small(variance="learned", beta=0.5, p_max=0.0), texts()
    mean, var = vae.encode(ids)
    torch.manual_seed(0)
    with_kl = vae(ids, target)
    torch.manual_seed(0)
    vae.beta = 0.0
    torch.testing.assert_close(with_kl, vae(ids, target) + 0.5 * kl(mean, var))
    by_torch = kl_divergence(Normal(mean, var.sqrt()), Normal(0.0, 1.0)).sum((1, 2)).mean()
    torch.testing.assert_close(kl(mean, var), by_torch)
    assert var.std() > 0  # one for each number


@pytest.mark.parametrize("how", [{}, dict(variance="learned", beta=0.1)])
def test_every_parameter_gets_a_gradient(how):
    vae, (ids, target) = small(**how), texts()
    vae(ids, target).backward()
    assert without_gradient(vae) == []


@pytest.fixture(scope="module")
def learned():
    """A VAE that has seen six texts 100 times, and the texts."""
    vae, (ids, target) = small(p_max=0.1, noise=0.05), texts()
    opt = torch.optim.AdamW(vae.parameters(), lr=5e-3)
    for _ in range(100):
        vae(ids, target).backward()
        opt.step()
        opt.zero_grad()
    return vae.eval(), ids, target


def test_it_writes_the_texts_that_it_saw_and_stops_at_their_end(learned):
    vae, ids, target = learned
    out = vae.generate(vae.encode(ids)[0], 10)
    assert torch.equal(out, torch.where(target < 0, EOS, target))  # after the end token, only end tokens


def test_texts_written_in_a_batch_equal_those_written_one_by_one(learned):
    vae, ids, _ = learned
    z = vae.encode(ids)[0] + 0.3 * torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(0))
    together = vae.generate(z, 10)
    assert len(together.unique(dim=0)) > 3
    for i in range(6):
        alone = vae.generate(z[i : i + 1], 10)[0]
        padded = torch.nn.functional.pad(alone, (0, together.shape[1] - len(alone)), value=EOS)
        assert torch.equal(together[i], padded)


SMALL = dict(vocab_size=60, hidden_size=16, intermediate_size=32, max_position_embeddings=32)
SMALL |= dict(num_hidden_layers=1, num_attention_heads=2)
BERT, ROBERTA, LLAMA = (SMALL | dict(model_type=name) for name in ("bert", "roberta", "llama"))
DISTILBERT = dict(model_type="distilbert", dim=16, hidden_dim=32, n_layers=1, n_heads=2, vocab_size=60)
GPT2 = dict(model_type="gpt2", n_embd=16, n_layer=1, n_head=2, n_positions=32, vocab_size=60)
OPT = SMALL | dict(model_type="opt", ffn_dim=32, word_embed_proj_dim=8)  # its embeddings are narrower


@pytest.mark.parametrize("encoder, decoder", [(BERT, GPT2), (ROBERTA, LLAMA), (DISTILBERT, OPT)])
def test_any_pretrained_parts_train_and_come_back_from_their_configurations(encoder, decoder, tmp_path):
    auto = dict(encoder=AutoModel, decoder=AutoModelForCausalLM)
    for side, shape in dict(encoder=encoder, decoder=decoder).items():
        model = auto[side].from_config(AutoConfig.for_model(**shape)).to(torch.bfloat16)
        if side == "decoder":  # as some folders have it: it would repeat nothing, though trained to
            model.generation_config.repetition_penalty = 9.0
        model.save_pretrained(tmp_path / side)
    parts = pretrained_backbones(str(tmp_path / "encoder"), str(tmp_path / "decoder"))
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}
    heads = [lm.get_output_embeddings().weight.bfloat16() for lm in (parts[1], model)]
    assert torch.equal(*heads)
    vae, (ids, target) = TextVAE(*parts, 4, 8, EOS), texts()
    vae(ids, target).backward()
    assert without_gradient(vae) == []  # no pooler, whose state no optimizer would have
    fresh = untrained_backbones(*(part.config.to_json_string(use_diff=False) for part in parts))
    again = TextVAE(*fresh, 4, 8, EOS).eval()
    again.load_state_dict(vae.state_dict())
    assert torch.equal(again.encode(ids)[0], z := vae.encode(ids)[0])  # dropout is off in both
    assert torch.equal(again.decode(z, target), vae.decode(z, target))
    assert torch.equal(again.generate(z, 10), vae.generate(z, 10))


def test_a_configuration_loads_no_code():
    forged = dict(_attn_implementation="owner/kernel", auto_map=dict(AutoModel="owner/code--m.M"))
    encoder, _ = untrained_backbones(json.dumps(BERT | forged), json.dumps(GPT2))
    assert encoder.config._attn_implementation in ("sdpa", "eager")
