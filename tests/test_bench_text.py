"""bench/text.py and bench/gpt.py: the GPT-2s learn what they are given, and both roads do the same work."""

import math
import re

import numpy as np
import pytest
import torch
from conftest import SMALL_TEXT
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import data
import textgen
from bench import text
from bench.gpt import LabelGPT, QuestionGPT, mean_nats
from files import UserError, load_checkpoint
from vae import TextVAE, small_backbones, small_gpt

CPU = torch.device("cpu")


def learn(model, *batch, steps=150):
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        model(*batch).backward()
        opt.step()
        opt.zero_grad()
    return model.eval()


def test_the_baseline_learns_a_text_for_each_label_and_one_for_none():
    torch.manual_seed(0)
    y, target = torch.tensor([-1, 0, 1]), torch.randint(2, 50, (3, 10))
    target[:, -1] = 1
    model = learn(LabelGPT(small_gpt(50, 32, 2, 12), 2, 1), y, target)
    assert torch.equal(model.generate(model.read(y), 10), target)


def test_a_gpt_learns_the_chain_of_each_question():
    torch.manual_seed(0)
    q, target = torch.tensor([[3, 4, -1], [5, 6, 7]]), torch.randint(2, 19, (2, 6))
    target[:, -1] = 19  # the last token of its vocabulary ends a chain
    model = learn(QuestionGPT(small_gpt(20, 32, 2, 12)), q, target)
    assert torch.equal(model.generate(model.read(q), 6), target)


def test_mean_nats_of_even_odds_are_the_logarithm_of_the_vocabulary():
    torch.manual_seed(0)
    model = LabelGPT(small_gpt(40, 16, 1, 12), 0, 1)
    torch.nn.init.zeros_(model.decoder.transformer.wte.weight)
    target = torch.randint(0, 40, (70, 10))
    target[5:, 3:] = -100
    nats = mean_nats(model, torch.full((70,), -1), target, CPU)
    assert nats == pytest.approx(math.log(40), abs=1e-5)


def test_mean_nats_count_every_token_alike():
    torch.manual_seed(0)
    model, y = LabelGPT(small_gpt(40, 16, 1, 12), 0, 1), torch.full((70,), -1)
    target = torch.randint(0, 40, (70, 10))
    target[5:, 3:] = -100  # batches of 64 and 6 have other numbers of tokens
    whole = model(y, target).item()
    assert mean_nats(model, y, target, CPU) == pytest.approx(whole, abs=1e-5)


def test_planners_way_is_the_same_loss_of_the_same_parameters():
    torch.manual_seed(0)
    vae = TextVAE(*small_backbones(50, 32, 1, 20), 4, 8, 1, variance="learned", beta=1e-3, p_max=0.0)
    ids = torch.randint(2, 50, (3, 10))
    torch.manual_seed(1)
    ours = vae(ids, ids)
    torch.manual_seed(1)
    theirs = text.planner_loss(vae, ids, ids)
    torch.testing.assert_close(ours, theirs)
    theirs.backward()
    assert [name for name, p in vae.named_parameters() if p.grad is None] == []


@pytest.fixture
def gpt2(tmp_path):
    """The folder of a small GPT-2, its tokenizer and its model."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator(["a small text"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2)).eval()
    fast.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    return tmp_path, fast, model


def test_perplexity_under_a_pretrained_gpt2_equals_that_of_transformers_own_loss(gpt2):
    folder, tokenizer, model = gpt2
    texts, total, n = ["a small text", "another text that is longer", ""], 0.0, 0
    for ids in (tokenizer(t, return_tensors="pt").input_ids for t in texts[:2]):  # "" has no token to predict
        total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        n += ids.shape[1] - 1
    assert text.load_gpt2(CPU, str(folder))(texts) == pytest.approx(np.exp(total / n), rel=1e-4)


def test_a_gpt2_that_cannot_be_had_is_a_user_error():
    with pytest.raises(UserError, match="is not on disk and could not be downloaded"):
        text.load_gpt2(CPU, "gpt2-not-here")


def labels_learned(path):
    """Whether a training step has changed what the GPT-2 knows of a class."""
    state = load_checkpoint(path, "textgen")
    return not torch.equal(state["model"]["label.weight"][1:], state["ema"]["label.weight"][1:])


def test_the_table_has_a_row_for_each_kind_of_text_and_loads_what_is_trained(cli, tmp_path, monkeypatch):
    texts = textgen.grammar_texts()
    few = data.Texts(texts.train.take(range(120)), texts.test.take(range(20)), texts.names)
    monkeypatch.setattr(textgen, "grammar_texts", lambda: few)
    size = "--vae_steps 4 --diffusion_steps 4 --score_n 8".split()
    assert cli("textgen", "--dataset", "grammar", *SMALL_TEXT, *size, "--out", tmp_path)[0] == 0
    status, printed = cli("bench.text", "--checkpoint", tmp_path / "diffusion/last.pt")
    assert status == 0, printed
    assert "no perplexity under GPT-2: gpt2 is not on disk" in printed
    rows = re.findall(r"^\| (?!\|)([\w -.]+?) \|.* (\S+) \|$", printed, re.M)
    kinds = ["samples", "training", "held out", "GPT-2 top-p 0.7", "GPT-2 top-p 0.92", "GPT-2 top-p 1"]
    assert [name for name, _ in rows] == kinds
    assert min(float(perplexity) for _, perplexity in rows) > 1
    assert labels_learned(tmp_path / "diffusion/baseline/last.pt")
    assert not labels_learned(tmp_path / "diffusion/judge/last.pt")
    monkeypatch.setattr(text, "Run", lambda *_: pytest.fail("trained again"))
    status, again = cli("bench.text", "--checkpoint", tmp_path / "diffusion/last.pt")
    assert again.splitlines()[-8:] == printed.splitlines()[-8:]
