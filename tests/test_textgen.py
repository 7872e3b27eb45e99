"""textgen.py as a user runs it, at a tiny size: recipes, both stages, samples, scores, going on, mistakes."""

import contextlib
import csv
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL_TEXT
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import data
import textgen
from data import load_texts
from files import load_checkpoint
from training import read_config, run_script
from vae import TextVAE, small_backbones

CPU = torch.device("cpu")
GRAMMAR = ["--dataset", "grammar", *SMALL_TEXT]


@pytest.fixture(scope="module", autouse=True)
def few_reviews():
    """The grammar has 360 training and 40 test texts in this file."""
    texts = textgen.grammar_texts()
    few = data.Texts(texts.train.take(range(360)), texts.test.take(range(40)), texts.names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textgen, "grammar_texts", lambda: few)
        yield


def run(*flags):
    """Run textgen.py with these flags; what it printed."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["textgen.py", *map(str, flags)])
        run_script(textgen.Config, textgen.main, textgen.__doc__)
    return printed.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a small grammar run, trained once for the tests of this file, and what it printed."""
    out = tmp_path_factory.mktemp("run") / "grammar"
    size = "--vae_steps 40 --diffusion_steps 40 --sample_every 20 --score_n 20".split()
    return out, run(*GRAMMAR, *size, "--out", out)


@pytest.fixture(scope="module")
def writer(trained):
    return load_writer(trained[0] / "diffusion/last.pt")


def load_writer(path):
    return textgen.load_writer(textgen.Config(**load_checkpoint(path, "textgen")["config"]), path, CPU)


def pieces(writer, name):
    return textgen.split_pieces(writer.cfg, writer.codec, textgen.grammar_texts(), name)


def write_reviews(path, text="the room was number {i}. the staff was kind. we slept well, for a fair price."):
    lines = [f'"{text.format(i=i)}",{i % 5 + 1}' for i in range(60)]
    path.write_text("\n".join(["Review,Rating", *lines]), encoding="utf-8")
    return path


def config(monkeypatch, *flags):
    """What textgen.py makes of these flags."""
    monkeypatch.setattr(sys, "argv", ["textgen.py", *flags])
    return read_config(textgen.Config, "")


# -- sizes and recipes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cuda, encoder", [(False, "scratch"), (True, "bert-base-uncased")])
def test_the_size_follows_the_machine(cuda, encoder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert config(monkeypatch, "--dataset", "x.csv").encoder == encoder


def test_a_recipe_overrides_the_defaults_and_flags_override_both(monkeypatch):
    grammar = config(monkeypatch, "--dataset", "grammar", "--size", "tiny", "--shift", "2")
    assert dataclasses.asdict(grammar).items() >= (textgen.RECIPES["grammar"] | dict(shift=2.0)).items()
    assert grammar.vae_width == textgen.Config().vae_width


def test_a_recipe_of_a_data_set_holds_on_any_machine_unless_another_size_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert config(monkeypatch, "--dataset", "grammar").encoder == "scratch"
    assert config(monkeypatch, "--dataset", "grammar", "--size", "base").k == textgen.RECIPES["base"]["k"]


@pytest.mark.parametrize("name", textgen.RECIPES)
def test_every_recipe_is_a_valid_configuration(name):
    assert (
        dataclasses.asdict(textgen.Config(**textgen.RECIPES[name])).items() >= textgen.RECIPES[name].items()
    )


def test_the_first_line_says_which_size_and_why(trained, cli, tmp_path):
    assert trained[1].splitlines()[0].startswith("size tiny: as a flag")
    _, printed = cli("textgen", "--dataset", "nothing.csv", "--out", tmp_path)
    assert printed.splitlines()[0] == "size tiny: there is no CUDA here"


# -- a run -----------------------------------------------------------------------------------------------


def test_a_run_leaves_its_files(trained):
    out, _ = trained
    tag = "dpm++_4_guidance2_seed0.txt"
    for stage in ("vae", "diffusion"):
        for name in ("config.json", "log.csv", "curve.png", "last.pt"):
            assert (out / stage / name).stat().st_size > 50
    written = {path.name for path in out.glob("*/samples/*")}
    shown = {f"samples_{tag}", f"planning_{tag}", f"interpolation_{tag}"}
    assert written == {"reconstructions.txt", "000020.txt"} | shown


def test_samples_are_shown_for_every_class(trained):
    lines = (trained[0] / "diffusion/samples/samples_dpm++_4_guidance2_seed0.txt").read_text().splitlines()
    assert [line[:4] for line in lines] == [f"[{1 + i // 4}] " for i in range(20)]


def test_the_last_line_is_the_command_that_samples_again(trained):
    out, printed = trained
    command = f"python textgen.py --sample_from {out / 'diffusion/last.pt'}"
    assert printed.splitlines()[-1] == f"sample again: {command}"


def test_real_texts_are_right_by_the_grammar_in_the_score(trained):
    real = [line for line in trained[1].splitlines() if line.startswith(("  training", "  held out"))]
    assert len(real) == 2
    for line in real:
        assert re.search(r"accepted 1 +rating 1$", line)


def test_samples_are_drawn_from_the_averaged_weights(trained, writer):
    state = load_checkpoint(trained[0] / "diffusion/last.pt", "textgen")
    frozen = load_checkpoint(trained[0] / "vae/last.pt", "textgen")["ema"]
    assert all(torch.equal(value, state["ema"][name]) for name, value in writer.model.state_dict().items())
    assert all(torch.equal(value, frozen[name]) for name, value in writer.vae.state_dict().items())
    assert any(not torch.equal(value, state["model"][name]) for name, value in state["ema"].items())


def test_training_latents_are_standardised_and_written_back(writer):
    ids = pieces(writer, "train").ids
    z = writer.latents(ids)
    torch.testing.assert_close(z.mean(0), torch.zeros(4, 8), atol=1e-3, rtol=0)
    torch.testing.assert_close(z.std(0), torch.ones(4, 8), atol=1e-2, rtol=0)
    raw = writer.vae.generate(textgen.encode_all(writer.vae, ids[:3], CPU), 64)
    assert writer.write(z[:3]) == writer.codec.decode(raw)


def test_a_guess_is_of_latents_with_as_much_noise_as_the_process_has_there(writer, monkeypatch):
    test, seen = pieces(writer, "train"), []
    monkeypatch.setattr(writer.process, "guess", lambda model, xt, t, y: (seen.append(xt), xt)[1])
    for t in (10, 300, 999):
        writer.guess(writer.latents(test.ids), test.y, t)
    assert [xt.std().item() for xt in seen] == pytest.approx([1, 1, 1], abs=0.03)  # variance-preserving


def test_a_seed_decides_the_noise(writer, monkeypatch):
    monkeypatch.setattr(textgen.Writer, "write", lambda self, x0: x0)
    a, b, c = (
        dataclasses.replace(writer, cfg=dataclasses.replace(writer.cfg, seed=seed)) for seed in (0, 0, 1)
    )
    x, again, other = (w.sample(torch.tensor([0, 1]), ["", ""]) for w in (a, b, c))
    assert torch.equal(x, again)
    assert (x - other).abs().mean() > 0.1


def test_planning_comes_into_focus_and_ends_at_the_latents_themselves(writer):
    text = pieces(writer, "test").first(1)
    lines = writer.planning(text)
    levels = [float(line.split()[1]) for line in lines[:-1]]
    assert levels == sorted(levels)
    assert levels[0] < 0.05
    assert levels[-1] > 0.9
    assert lines[-1].endswith(writer.write(writer.latents(text.ids))[0])


def test_an_interpolation_begins_and_ends_at_its_texts(writer):
    ids = pieces(writer, "test").ids[:2]
    lines, ends = writer.interpolation(ids), writer.write(writer.latents(ids))
    assert [lines[0], lines[-1]] == [f"0.0  {ends[0]}", f"1.0  {ends[1]}"]


# -- samples and scores of a checkpoint --------------------------------------------------------------------


def test_sampling_needs_nothing_but_the_checkpoint_and_a_seed_repeats_it(trained, cli, monkeypatch, tmp_path):
    monkeypatch.setattr(textgen, "load_texts", lambda *_: pytest.fail("sampling must not load data"))
    alone = tmp_path / "alone.pt"
    alone.write_bytes((trained[0] / "diffusion/last.pt").read_bytes())
    again, first, other = (
        cli("textgen", "--sample_from", alone, "--top_p", 1, "--seed", seed)[1] for seed in (0, 0, 5)
    )
    assert first.count("\n[3] ") == 4
    assert again == first
    assert other.replace("seed5", "seed0") != first


@pytest.mark.parametrize(
    "flags", ["--guidance 0", "--sampler ddim --steps 3", "--sampler heun", "--top_p 0.5"]
)
def test_flags_override_the_settings_of_a_checkpoint(flags, trained, cli, tmp_path):
    status, printed = cli(
        "textgen", "--sample_from", trained[0] / "diffusion/last.pt", "--out", tmp_path, *flags.split()
    )
    assert status == 0, printed
    assert len(list((tmp_path / "samples").iterdir())) == 1


def test_a_score_of_a_checkpoint_repeats_that_of_the_run(trained, cli, tmp_path):
    out, printed_by_training = trained
    status, printed = cli("textgen", "--score_from", out / "diffusion/last.pt", "--out", tmp_path)
    rows = re.findall(r"^  (?:VAE:|held-out|AuBLEU|samples  |training|held out) .*$", printed, re.M)
    assert status == 0
    assert len(rows) == 6
    assert [row for row in rows if row not in printed_by_training] == []


# -- the VAE's alarm ---------------------------------------------------------------------------------------


def test_held_out_nats_tell_used_latents_from_ignored_ones():
    torch.manual_seed(0)
    vae = TextVAE(*small_backbones(50, 32, 1, 20), 4, 8, 1, p_max=0.0, noise=0.0)
    ids = torch.randint(2, 50, (8, 10))
    texts = textgen.Pieces([""] * 8, torch.zeros(8), [""] * 8, ids, ids)
    opt = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    for _ in range(60):
        vae(ids, ids).backward()
        opt.step()
        opt.zero_grad()
    nats = textgen.held_out_nats(vae, texts, CPU)
    assert nats["shuffled"] > nats["matched"] + 0.5
    torch.nn.init.zeros_(vae.prefix.weight)
    nats = textgen.held_out_nats(vae, texts, CPU)
    assert nats["matched"] == pytest.approx(nats["shuffled"], abs=1e-6)
    assert nats["matched"] == pytest.approx(nats["zero"], abs=1e-6)


@pytest.mark.parametrize("gap, rings", [(0.05, True), (3.0, False)])
def test_the_alarm_rings_where_shuffled_latents_do_as_well(gap, rings, cli, tmp_path, monkeypatch):
    nats = dict(matched=1.0, shuffled=1.0 + gap, zero=2.0)
    monkeypatch.setattr(textgen, "held_out_nats", lambda *_: nats)
    monkeypatch.setattr(textgen, "ALARM_FROM", 1)
    size = "--vae_steps 1 --diffusion_steps 1 --score_n 0".split()
    _, printed = cli("textgen", *GRAMMAR, *size, "--out", tmp_path)
    assert ("the decoder ignores the latents" in printed) == rings


# -- going on ----------------------------------------------------------------------------------------------


def test_finished_stages_are_loaded(trained, cli, monkeypatch):
    for stage in ("train_vae", "train_diffusion"):
        monkeypatch.setattr(textgen, stage, lambda *_: pytest.fail("trained again"))
    flags = [*GRAMMAR, "--out", trained[0], "--vae_steps", 40, "--diffusion_steps", 40, "--score_n", 0]
    status, printed = cli("textgen", *flags)
    assert status == 0
    assert printed.count("is finished: loaded") == 2


def same_weights(a, b):
    a, b = (load_checkpoint(out / "diffusion/last.pt", "textgen") for out in (a, b))
    pairs = [(a["model"], b["model"]), (a["ema"], b["ema"]), (a["extra"]["vae"], b["extra"]["vae"])]
    return all(all(map(torch.equal, x.values(), y.values())) for x, y in pairs)


@pytest.mark.parametrize("stage", ["vae", "diffusion"])
def test_a_stage_interrupted_and_resumed_ends_with_the_same_bits(stage, tmp_path, cli, monkeypatch):
    size = "--score_n 0 --log_every 5 --sample_every 4 --vae_steps 8 --diffusion_steps 8".split()
    flags = [*GRAMMAR, *size]
    assert cli("textgen", *flags, "--out", tmp_path / "a")[0] == 0
    part = config(monkeypatch, *flags, "--out", str(tmp_path / "b"), f"--{stage}_steps", "5")
    texts = textgen.grammar_texts()
    textgen.train_vae(part, texts, tmp_path / "b/vae", CPU)
    if stage == "diffusion":
        textgen.train_diffusion(part, texts, tmp_path / "b/diffusion", CPU)
    status, printed = cli("textgen", *flags, "--out", tmp_path / "b", "--resume")
    assert status == 0, printed
    assert f"resumed {tmp_path / 'b' / stage / 'last.pt'} at step 5" in printed
    assert same_weights(tmp_path / "a", tmp_path / "b")


def test_one_vae_serves_several_diffusions(trained, cli, tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/last.pt").write_bytes((trained[0] / "vae/last.pt").read_bytes())
    flags = [*GRAMMAR, "--vae_steps", 40, "--diffusion_steps", 2, "--score_n", 0, "--out", tmp_path]
    status, printed = cli("textgen", *flags, "--condition", "none", "--shift", 2, "--width", 16)
    assert status == 0, printed
    assert f"resumed {tmp_path / 'vae/last.pt'} at step 40" in printed  # only what goes with it is made


def test_two_processes_train_both_stages(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    size = "--score_n 8 --vae_steps 3 --diffusion_steps 3".split()
    texts = ["--dataset", write_reviews(tmp_path / "r.csv"), *SMALL_TEXT]
    command = [*launcher, "textgen.py", *texts, *size, "--out", tmp_path]
    env = os.environ | dict(OMP_NUM_THREADS="1")
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sample again") == 1
    assert done.stdout.count("score: n=6") == 1
    assert load_checkpoint(tmp_path / "diffusion/last.pt", "textgen")["step"] == 3


# -- nothing lost, nobody asked ------------------------------------------------------------------------------


def test_what_follows_the_last_checkpoint_of_a_stage_is_made_after_a_kill(trained, cli, tmp_path):
    out = tmp_path / "killed"
    shutil.copytree(trained[0], out)
    (out / "vae/curve.png").unlink()  # the last thing that is written
    wanted = (out / "vae/samples/reconstructions.txt").read_text()
    (out / "vae/samples/reconstructions.txt").unlink()
    (out / "diffusion/samples/.score.txt.123.tmp").write_text("half of it")
    flags = [*GRAMMAR, "--vae_steps", 40, "--diffusion_steps", 40, "--score_n", 0, "--out", out]
    status, printed = cli("textgen", *flags)
    assert status == 0, printed
    assert (out / "vae/curve.png").exists() and "diffusion/last.pt is finished" in printed
    assert (out / "vae/samples/reconstructions.txt").read_text() == wanted
    assert not list(out.rglob("*.tmp"))


def test_too_few_texts_for_the_diffusion_are_noticed_before_the_vae_is_trained(cli, tmp_path):
    flags = [*GRAMMAR, "--diffusion_batch", 400, "--out", tmp_path]
    status, printed = cli("textgen", *flags)
    assert status == 2 and "are fewer than a batch of 400" in printed
    assert not (tmp_path / "vae/last.pt").exists()


def test_a_signal_in_the_last_step_of_a_stage_ends_the_run(cli, tmp_path, monkeypatch):
    update = textgen.Run.update

    def last(run, loss):
        update(run, loss)
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(textgen.Run, "update", last)
    flags = [*GRAMMAR, "--vae_steps", 3, "--diffusion_steps", 3, "--score_n", 0, "--out", tmp_path]
    status, printed = cli("textgen", *flags)
    assert status == 143 and "stopped by SIGTERM at step 3, saved" in printed
    assert load_checkpoint(tmp_path / "vae/last.pt", "textgen")["step"] == 3
    assert not (tmp_path / "diffusion").exists()


def test_a_writer_is_loaded_in_one_call(trained, writer):
    loaded = textgen.load(trained[0] / "diffusion/last.pt", device="cpu")
    assert loaded.sample(torch.tensor([4]), [""]) == writer.sample(torch.tensor([4]), [""])


BERT = dict(model_type="bert", hidden_size=32, num_attention_heads=2, num_hidden_layers=1)


@pytest.mark.parametrize(
    "facts, said",
    [
        ({}, "the shapes of owner/bert and owner/gpt are missing"),
        (
            dict(backbones=[json.dumps(dict(model_type="timm_wrapper")), "{}"]),
            "'timm_wrapper', not one of bert",
        ),
        (
            dict(backbones=[json.dumps(BERT | dict(attn_implementation="owner/kernel")), "{}"]),
            "Error(s) in loading state_dict",
        ),
        (dict(backbones=3), "is not as textgen.py writes it"),
        (dict(names=3), "is not as textgen.py writes it"),
        (dict(codec=dict(encoder="x", decoder="x", eos=1, max_tokens=64)), "does not fit"),
    ],
)
def test_a_checkpoint_cannot_have_a_network_fetched(facts, said, trained, cli, tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", None)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", None)
    state = load_checkpoint(trained[0] / "diffusion/last.pt", "textgen")
    state["config"] |= dict(encoder="owner/bert", decoder="owner/gpt")
    state["facts"] |= facts
    torch.save(state, tmp_path / "last.pt")
    status, printed = cli("textgen", "--sample_from", tmp_path / "last.pt")
    assert status == 2 and said in printed, printed


def test_names_of_classes_cannot_steer_the_terminal(trained, cli, tmp_path):
    state = load_checkpoint(trained[0] / "diffusion/last.pt", "textgen")
    state["facts"]["names"][0] = "\x1b]0;owned\x07"
    torch.save(state, tmp_path / "last.pt")
    status, printed = cli("textgen", "--sample_from", tmp_path / "last.pt", "--steps", 1)
    assert status == 0 and "\x1b" not in printed and "[\\x1b]0;owned\\x07]" in printed


# -- conditions, pretrained parts, few texts ---------------------------------------------------------------


@pytest.fixture(scope="module")
def conditioned(tmp_path_factory):
    """Runs on texts under their prefix and under the column "question", by the name of the condition."""
    root = tmp_path_factory.mktemp("conditioned")
    long = ", ".join(["word{i} and a lot more to say about it"] * 9)
    prefix = write_reviews(root / "r.csv", long)
    rows = [dict(text=f"the answer is {i}", question=f"what is {i}?") for i in range(60)]
    (root / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    size = "--vae_steps 3 --diffusion_steps 3 --score_n 6".split()
    runs = {}
    for condition, path in dict(prefix=prefix, question=root / "r.jsonl").items():
        flags = ["--dataset", path, *SMALL_TEXT, *size, "--condition", condition, "--out", root / condition]
        run(*flags)
        runs[condition] = root / condition / "diffusion"
    return runs


@pytest.mark.parametrize("condition", ["prefix", "question"])
def test_texts_under_held_out_conditions_stand_beside_the_real_ones(condition, conditioned):
    shown = (conditioned[condition] / "samples/samples_dpm++_4_guidance2_seed0.txt").read_text().splitlines()
    given, new, real = (
        sum(line.startswith(word) for line in shown) for word in ("given  ", "new  ", "real  ")
    )
    assert (given, new, real) == (4, 4, 4)


@pytest.mark.parametrize(
    "flags, status, wanted",
    [
        (["--prompt", "what is 3?"], 0, "given  what is 3?"),
        (["--prompt", "what is 3? " * 99], 2, "--prompt must have fewer than 64 tokens"),
        ([], 2, "give a --prompt"),
    ],
)
def test_a_prompt_is_gone_on_from(flags, status, wanted, conditioned, cli):
    got, printed = cli("textgen", "--sample_from", conditioned["question"] / "last.pt", *flags)
    assert got == status
    assert wanted in printed


def test_padding_of_a_condition_counts_for_nothing(conditioned):
    writer = load_writer(conditioned["question"] / "last.pt")
    y, texts = torch.full((2,), -1), ["what is a longer question?", "what?"]
    context, mask = writer.condition(y, texts)
    assert mask.sum(1).tolist() == (writer.codec.encode(texts)[0] >= 0).sum(1).tolist()
    for net in (writer.model.body.head, writer.model.body.ada, *(b.ada for b in writer.model.body.blocks)):
        torch.nn.init.normal_(net.weight)
    xt, t, context = torch.randn(2, 4, 8), torch.tensor([5, 5]), context.float()
    out = writer.model(xt, t, (context, mask))
    hidden = context.masked_fill(~mask[..., None], 9.0)
    torch.testing.assert_close(out, writer.model(xt, t, (hidden, mask)))
    assert (out - writer.model(xt, t, (context + 1, mask))).abs().max() > 1e-3


def save_pretrained(folder):
    """A small BERT and a small GPT-2 with tokenizers of their own, saved as the hub's are."""
    special = dict(bert=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], gpt2=["<|endoftext|>"])
    names = dict(bert=dict(unk_token="[UNK]", pad_token="[PAD]"), gpt2=dict(eos_token="<|endoftext|>"))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    for name, tokens in special.items():
        tokenizer = Tokenizer(models.BPE(unk_token=names[name].get("unk_token")))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=tokens, initial_alphabet=alphabet)
        tokenizer.train_from_iterator(textgen.grammar_texts().train.x[:200], trainer)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names[name]).save_pretrained(folder / name)
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertModel(BertConfig(vocab_size=330, **shape)).save_pretrained(folder / "bert")
    gpt = GPT2Config(vocab_size=330, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(gpt).save_pretrained(folder / "gpt2")
    return ["--encoder", folder / "bert", "--decoder", folder / "gpt2"]


def test_pretrained_parts_are_trained_on_and_the_checkpoint_is_all_that_sampling_needs(tmp_path, cli):
    parts = save_pretrained(tmp_path)
    size = "--vae_steps 3 --diffusion_steps 3 --score_n 8".split()
    flags = [*GRAMMAR, *parts, *size, "--out"]
    assert cli("textgen", *flags, tmp_path / "out")[0] == 0
    weights = load_checkpoint(tmp_path / "out/vae/last.pt", "textgen")["ema"]
    assert weights["encoder.embeddings.word_embeddings.weight"].shape == (330, 16)
    for folder in ("bert", "gpt2"):
        (tmp_path / folder).rename(tmp_path / f"{folder}-gone")
    status, printed = cli("textgen", "--sample_from", tmp_path / "out/diffusion/last.pt")
    assert status == 0, printed
    status, printed = cli("textgen", *flags, tmp_path / "new")
    assert status == 2
    assert "could not be loaded" in printed


def test_texts_of_one_class_have_no_label_score(tmp_path, cli):
    path = write_reviews(tmp_path / "r.csv")
    path.write_text(re.sub(r",[1-5]$", ",5", path.read_text(), flags=re.M))
    size = "--vae_steps 1 --diffusion_steps 1 --out".split()
    status, printed = cli("textgen", "--dataset", path, *SMALL_TEXT, *size, tmp_path / "out")
    assert status == 0, printed
    assert "score: n=6" in printed
    assert "  label" not in printed


def test_a_run_that_cannot_be_scored_says_so_and_stays(tmp_path, cli):
    flags = [*GRAMMAR, "--vae_steps", 1, "--diffusion_steps", 1, "--score_n", 1, "--out", tmp_path]
    status, printed = cli("textgen", *flags)
    assert status == 0
    assert "not scored: a score needs two held-out texts" in printed
    assert cli("textgen", "--score_from", tmp_path / "diffusion/last.pt")[0] == 2


def test_pieces_of_tripadvisor_mostly_end_with_a_sentence():
    path = ROOT.parent / "shared/data/tripadvisor/tripadvisor_hotel_reviews.csv"
    if not path.exists():
        pytest.skip("no ../shared/data here")
    texts, cfg = load_texts(str(path)), textgen.Config(dataset=str(path))
    assert (len(texts.train.x), len(texts.test.x)) == (1530, 170)
    assert texts.names == list("12345")
    codec = textgen.pick_codec(cfg, texts, Path("no checkpoint"))
    ended = (textgen.split_pieces(cfg, codec, texts, "test").target == codec.eos).any(1)
    assert ended.float().mean() > 0.95  # the rest are single sentences too long: no end is taught there


# -- mistakes ----------------------------------------------------------------------------------------------


def flat(printed):
    return " ".join(re.sub(r"[│╭╰─╮╯]", " ", printed).split())


def test_help_shows_every_field_with_its_own_comment(cli):
    status, printed = cli("textgen", "--help")
    assert status == 0
    source = (ROOT / "textgen.py").read_text()
    for field in dataclasses.fields(textgen.Config):
        behind = re.search(rf"^    {field.name}: .*?  # (.*)$", source, re.M)
        above = re.search(rf"    # (.*)\n(?:    # .*\n)*    {field.name}: ", source)
        comment = (behind or above)[1]
        assert re.search(rf"--{field.name}\b", printed)
        assert " ".join(comment.split()[:2]) in flat(printed)


@pytest.mark.parametrize(
    "flags, wanted",
    [
        ("--datasett grammar", "datasett"),
        ("--size huge", "tiny"),
        ("--p_max 1.5", "p_max must be in [0, 1], got 1.5"),
        ("--max_tokens 1021", "max_tokens must be in [4, 1020], got 1021"),
        ("--width 100", "divisible by 16"),
        ("--span 15", "k spans must just cover max_tokens 64, or span be 1; got 4 spans of 15"),
        ("--span 22", "got 4 spans of 22"),
        ("--label_drop 0", "--label_drop above 0 in training; or choose --guidance 0"),
        ("--prompt hello", "--prompt is for --condition prefix or a column, this is label"),
        ("--condition weather", "the grammar has no column weather"),
        ("--dataset nothing", "no data set 'nothing'; choose grammar, tripadvisor"),
        ("--encoder scratch --decoder gpt2", "both from scratch, or neither"),
        ("--encoder nobody/bert --decoder nobody/gpt2", "--size tiny needs no download"),
        ("--sample_from nowhere.pt", "no checkpoint at nowhere.pt"),
        ("--vae_batch 100000", "fewer than a batch of 100000"),
        ("--condition prefix --max_tokens 200 --span 50", "no text is cut in two"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(flags, wanted, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = "--vae_steps 1 --diffusion_steps 1 --score_n 0".split()
    status, printed = cli("textgen", *GRAMMAR, *size, *flags.split())
    assert status == 2
    assert wanted in flat(printed)
    assert "Traceback" not in printed


def test_a_checkpoint_of_the_vae_is_refused_for_sampling(trained, cli):
    status, printed = cli("textgen", "--sample_from", trained[0] / "vae/last.pt")
    assert status == 2
    assert "is the checkpoint of a vae; give that of the diffusion" in printed


def test_settings_of_the_model_cannot_change_after_training(trained, cli):
    status, printed = cli("textgen", "--sample_from", trained[0] / "diffusion/last.pt", "--d", 3)
    assert status == 2
    assert "--d 3" in printed
    status, printed = cli("textgen", *GRAMMAR, "--out", trained[0], "--d", 3)
    assert status == 2
    assert "trained with 8" in printed


def test_a_checkpoint_with_weights_of_another_vae_is_refused(trained, cli, tmp_path):
    state = load_checkpoint(trained[0] / "diffusion/last.pt", "textgen")
    state["extra"]["vae"] = {name: value[:1] for name, value in state["extra"]["vae"].items()}
    torch.save(state, tmp_path / "other.pt")
    status, printed = cli("textgen", "--sample_from", tmp_path / "other.pt")
    assert status == 2
    assert "does not fit this version of the script, or these settings" in printed


def test_a_score_on_other_data_is_refused(trained, cli, tmp_path):
    path = write_reviews(tmp_path / "r.csv")
    status, printed = cli("textgen", "--score_from", trained[0] / "diffusion/last.pt", "--dataset", path)
    assert status == 2
    assert "is not the data of" in printed


def test_a_diffusion_does_not_go_on_over_another_vae(trained, cli, tmp_path):
    flags = [*GRAMMAR, "--vae_steps", 1, "--diffusion_steps", 60, "--resume", "--out", tmp_path]
    (tmp_path / "diffusion").mkdir()
    (tmp_path / "diffusion/last.pt").write_bytes((trained[0] / "diffusion/last.pt").read_bytes())
    status, printed = cli("textgen", *flags)
    assert status == 2
    assert "its vae is" in printed


def test_the_log_has_a_row_for_its_last_step(trained):
    with open(trained[0] / "vae/log.csv", encoding="utf-8") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [40]


def reviews_table(planner, cli, tmp_path):
    """The rows that bench.tokens prints beside a diffusion, as {name: {measure: number}}."""
    run = "--run.vocab 4096 --run.window 48 --run.block 16 --run.width 32 --run.depth 1 --run.batch_size 8"
    flags = ["--share", 0.01, "--out", tmp_path / "bench", *run.split(), "--run.log_every", 1]
    status, said = cli("bench.tokens", "--planner", planner, *flags, "--run.score_n", 4)
    assert status == 0, said
    assert "blocks of 16" in said
    head, *rows = [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("| ")]
    return {row[0]: dict(zip(head, map(float, row[1:]), strict=True)) for row in rows}  # head[0] was empty


def test_reviews_by_tokens_and_of_a_gpt_stand_beside_these(trained, cli, tmp_path):
    table = reviews_table(trained[0] / "diffusion/last.pt", cli, tmp_path)
    ours = [f"tokens, {steps} steps a block" for steps in (1, 2, 4, 8, 16)]
    assert list(table) == ["samples", "training", "held out", *ours, "GPT"]
    assert table["training"]["accepted"] == table["held out"]["accepted"] == 1
    assert table["GPT"]["accepted"] < 0.5


def test_where_there_is_no_grammar_a_judge_says_how_surprising_they_are(cli, tmp_path):
    out, few = tmp_path / "run", "--vae_steps 3 --diffusion_steps 3 --score_n 6".split()
    run("--dataset", write_reviews(tmp_path / "r.csv"), *SMALL_TEXT, *few, "--out", out)
    table = reviews_table(out / "diffusion/last.pt", cli, tmp_path)
    assert (out / "diffusion/judge/last.pt").exists()
    for name, row in table.items():
        assert "accepted" not in row
        assert 1 < row["perplexity"] < 10_000, name
