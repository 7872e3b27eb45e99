"""vae.py: shapes, causality, corruption, the KL, generation, gradients, and that it learns."""
import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from vae import LabelGPT, TextVAE, backbone, corrupt, kl, small_backbones, small_gpt

EOS = 1


def texts(n=6, L=10, vocab=50):
    """Random ids (n, L), of which text i has L - i tokens, and their targets, which end in EOS."""
    ids = torch.randint(2, vocab, (n, L), generator=torch.Generator().manual_seed(0))
    target = ids.clone()
    for i in range(n):
        ids[i, L - 1 - i :], target[i, L - i :] = -100, -100
        target[i, L - 1 - i] = EOS
    return ids, target


def small(**how):
    torch.manual_seed(0)
    return TextVAE(*small_backbones(50, 32, 2, 20), 4, 8, EOS, **how)


def test_future_tokens_cannot_change_a_logit_and_past_ones_and_codes_can():
    vae, (_, target) = small().eval(), texts()
    z = torch.randn(6, 4, 8)
    before = vae.decode(z, target)
    assert before.shape == (6, 10, 50)
    changed = target.clone()
    changed[:, 5] = (target[:, 5].clamp(min=2) + 7) % 48 + 2
    after = vae.decode(z, changed)
    assert torch.equal(before[:, :6], after[:, :6])  # the logit at 5 predicts token 5 and has not read it
    assert (before[0, 6:] - after[0, 6:]).abs().amax(-1).min() > 1e-4
    assert (before - vae.decode(z.roll(1, 0), target)).abs().amax((1, 2)).min() > 1e-4


def test_logits_equal_those_of_planners_second_pass_and_cache():
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
    by_hand = [-logp[b, i, target[b, i]] for b in range(3) for i in range(10) if target[b, i] >= 0]
    torch.testing.assert_close(vae.cross_entropy(z, target), torch.stack(by_hand).mean())


@pytest.mark.parametrize("span, pool", [(1, "mean"), (2, "mean"), (2, "concat")])
def test_a_code_is_made_of_its_span_of_states(span, pool):
    vae, ids = small(span=span, pool=pool).eval(), texts(1)[0]
    h = vae.states(ids)[0][0]
    made = torch.cat if pool == "concat" else lambda states: sum(states) / span
    by_hand = torch.stack([vae.fc_mean(made([h[i * span + j] for j in range(span)])).tanh() for i in range(4)])
    torch.testing.assert_close(vae.encode(ids)[0][0], by_hand)


@pytest.mark.parametrize("span", [1, 2])
def test_codes_of_a_text_do_not_depend_on_its_neighbours_or_padding(span):
    vae, (ids, _) = small(span=span).eval(), texts(9)  # the last text has one token, fewer than codes
    together = vae.encode(ids)[0]
    assert together.shape == (9, 4, 8)
    for i in range(9):
        torch.testing.assert_close(vae.encode(ids[i : i + 1, : max(1, 9 - i)])[0][0], together[i], atol=1e-5, rtol=1e-4)


def test_corruption_hits_tokens_at_the_rate_asked_for_and_never_padding():
    ids = torch.randint(0, 1000, (4, 5000))
    ids[:, 4000:] = -100
    noisy = corrupt(ids, torch.tensor([0.0, 0.3, 0.7, 1.0]), 1000)
    share = (noisy != ids)[:, :4000].float().mean(1)
    torch.testing.assert_close(share, torch.tensor([0.0, 0.3, 0.7, 1.0]), atol=0.03, rtol=0)
    assert torch.equal(noisy[:, 4000:], ids[:, 4000:])
    assert noisy[3, :4000].unique().numel() > 900  # uniform over the vocabulary
    assert (corrupt(ids, torch.ones(4), 1000, mask_id=7)[:, :4000] == 7).all()


@pytest.mark.parametrize("mask_id", [None, 0])
def test_training_reads_corrupted_text_and_predicts_the_clean_one(mask_id):
    vae, (ids, target) = small(p_max=1.0, mask_id=mask_id), texts()
    read = []
    vae.encoder.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True)
    vae(ids, target)
    hit = (read[0] != ids.clamp(min=0)) & (ids >= 0)
    assert 0.2 < hit.sum() / (ids >= 0).sum() < 0.8
    assert mask_id is None or (read[0][hit] == mask_id).all()
    vae.p_max = 0.0
    vae(ids, target)
    assert torch.equal(read[1], ids.clamp(min=0))


def test_decoder_trains_on_noisy_codes():
    (ids, target) = texts()
    for noise, same in [(0.0, True), (0.3, False)]:
        vae = small(p_max=0.0, noise=noise)
        assert torch.equal(vae(ids, target), vae(ids, target)) == same
        assert vae.encode(ids)[1].unique().tolist() == pytest.approx([noise**2])


def test_kl_equals_its_closed_form():
    mean, var = torch.randn(5, 4, 8), torch.rand(5, 4, 8) + 0.1
    wanted = torch.distributions.kl_divergence(torch.distributions.Normal(mean, var.sqrt()), torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(kl(mean, var), wanted.sum((1, 2)).mean())
    assert kl(torch.zeros(2, 3, 4), torch.ones(2, 3, 4)) == 0


def test_planners_variance_is_learned_and_its_kl_counts():
    ids, target = texts()
    vae = small(variance="learned", beta=0.5, p_max=0.0)
    mean, var = vae.encode(ids)
    assert mean.abs().max() < 1 and var.std() > 0  # tanh; one variance for each number
    torch.manual_seed(0)
    with_kl = vae(ids, target)
    torch.manual_seed(0)
    vae.beta = 0.0
    torch.testing.assert_close(with_kl, vae(ids, target) + 0.5 * kl(mean, var))
    assert small(tanh=False).encode(100 * ids.clamp(max=0) + ids)[0].shape == (6, 4, 8)


@pytest.mark.parametrize("how", [{}, dict(variance="learned", beta=0.1)])
def test_every_parameter_gets_a_gradient_and_is_stepped_once(how):
    vae, (ids, target) = small(**how), texts()
    opt = torch.optim.AdamW(vae.parameters(), lr=1e-2, weight_decay=0.0)
    owned = [id(p) for group in opt.param_groups for p in group["params"]]
    assert len(owned) == len(set(owned)) == len({id(p) for p in vae.parameters()})
    before = {name: p.clone() for name, p in vae.named_parameters()}
    vae(ids, target).backward()
    assert not [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()]
    opt.step()
    assert {opt.state[p]["step"].item() for p in vae.parameters()} == {1.0}
    assert all((before[name] - p).abs().max() <= 1.01e-2 for name, p in vae.named_parameters())  # Adam's first step is lr: once


@pytest.fixture(scope="module")
def learned():
    """A VAE that has seen six texts 300 times, and the texts."""
    vae, (ids, target) = small(p_max=0.1, noise=0.05), texts()
    opt = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    for _ in range(300):
        vae(ids, target).backward()
        opt.step()
        opt.zero_grad()
    return vae.eval(), ids, target


def test_vae_writes_the_texts_that_it_saw_and_stops_at_their_end(learned):
    vae, ids, target = learned
    out = vae.generate(vae.encode(ids)[0], 10)
    assert torch.equal(out, torch.where(target < 0, EOS, target))  # after the end token, only end tokens


def test_batched_generation_equals_one_by_one(learned):
    vae, ids, _ = learned
    z = vae.encode(ids)[0] + 0.3 * torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(0))
    together = vae.generate(z, 10)
    assert len(together.unique(dim=0)) > 3
    for i in range(6):
        alone = vae.generate(z[i : i + 1], 10)[0]
        assert torch.equal(together[i, : len(alone)], alone) and (together[i, len(alone) :] == EOS).all()


def test_top_p_draws(learned):
    vae, ids, _ = learned
    vae = small().eval()  # an untrained one has no favourite
    draw = lambda seed: (torch.manual_seed(seed), vae.generate(torch.zeros(4, 4, 8), 10, top_p=0.95))[1]
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1)) and len(draw(0).unique(dim=0)) == 4


def test_baseline_learns_a_text_for_each_label_and_one_for_none():
    torch.manual_seed(0)
    _, target = texts(3)
    model, y = LabelGPT(small_gpt(50, 32, 2, 12), 2, EOS), torch.tensor([-1, 0, 1])
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        model(y, target).backward()
        opt.step()
        opt.zero_grad()
    out = model.eval().generate(model.read(y), 10)
    assert torch.equal(out, torch.where(target < 0, EOS, target))


def test_backbones_come_from_a_folder_or_a_configuration(tmp_path):
    shape = dict(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    bert, gpt = BertModel(BertConfig(**shape)), GPT2LMHeadModel(GPT2Config(vocab_size=70, n_embd=16, n_layer=1, n_head=2))
    bert.save_pretrained(tmp_path / "bert")
    gpt.save_pretrained(tmp_path / "gpt")
    ours, theirs = backbone(str(tmp_path / "bert")), backbone(str(tmp_path / "gpt"), part="decoder")
    assert torch.equal(ours.embeddings.word_embeddings.weight, bert.embeddings.word_embeddings.weight) and ours.pooler is None
    assert torch.equal(theirs.transformer.wte.weight, gpt.transformer.wte.weight)
    for loaded, part in [(ours, "encoder"), (theirs, "decoder")]:  # the same shape without the weights
        fresh = backbone("", loaded.config.to_json_string(use_diff=False), part)
        assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in loaded.state_dict().items()}
    with pytest.raises(OSError):
        backbone(str(tmp_path / "nothing"))
    torch.manual_seed(0)
    vae = TextVAE(ours, theirs, 4, 8, EOS)  # different vocabularies
    ids, target = texts()
    vae(ids, target).backward()
    assert not [name for name, p in vae.named_parameters() if p.grad is None]


