"""textgen.py as a user runs it, at a tiny size: stages, samples, scores, resuming, conditions, mistakes."""

import contextlib
import io
import json
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

import textgen
from common import texts
from common.run import UserError, run_script
from vae import TextVAE, small_backbones

SMALL = (
    "--max_tokens 64 --k 4 --span 16 --latent_width 8 --pool mean --vae_width 32 --vae_depth 1 --vocab 400 "
    "--vae_batch 16 --width 32 --depth 1 --diffusion_batch 16 --sampler dpm++ --steps 4"
).split()
GRAMMAR = ["--dataset", "grammar", *SMALL]


@pytest.fixture(scope="module", autouse=True)
def few_reviews():
    """The grammar has 360 training and 40 test texts in this file."""
    few = textgen.grammar.rows(400)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textgen.grammar, "rows", lambda: few)
        yield


def run(*flags):
    """Run textgen.py with these flags; what it printed."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["textgen.py", *map(str, flags)])
        run_script(textgen.Config, textgen.main, textgen.__doc__)
    return printed.getvalue()


def steps(vae, diffusion, **more):
    """The flags of a run of so many steps, without a score."""
    settings = dict(vae_steps=vae, diffusion_steps=diffusion, score_n=0) | more
    return [part for name, value in settings.items() for part in (f"--{name}", value)]


def checkpoint(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a small grammar run, trained once for the tests of this file, and what it printed."""
    out = tmp_path_factory.mktemp("run") / "grammar"
    return out, run(*GRAMMAR, *steps(40, 40, score_n=20, sample_every=20), "--out", out)


@pytest.fixture(scope="module")
def writer(trained):
    return textgen.load(trained[0] / "diffusion/last.pt", "cpu")


def write_reviews(path, text="the room was number {i}. the staff was kind. we slept well, for a fair price."):
    lines = [f'"{text.format(i=i)}",{i % 5 + 1}' for i in range(60)]
    path.write_text("\n".join(["Review,Rating", *lines]), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", textgen.Config.RECIPES)
def test_a_recipe_is_a_valid_configuration_and_takes_the_place_of_defaults(name):
    recipe = textgen.Config.RECIPES[name]
    cfg = textgen.Config(**recipe)
    assert cfg.span == 1 or cfg.max_tokens <= cfg.k * cfg.span
    assert asdict(cfg) == asdict(textgen.Config()) | recipe


def test_a_run_leaves_its_files_and_samples_of_every_class(trained):
    out, printed = trained
    for stage in ("vae", "diffusion"):
        for name in ("log.csv", "last.pt"):
            assert (out / stage / name).stat().st_size > 30
    assert {path.name for path in out.glob("*/samples/*")} == {"000020.txt", "000040.txt", "samples.txt"}
    lines = (out / "diffusion/samples/samples.txt").read_text().splitlines()
    assert [line[:4] for line in lines] == [f"[{1 + i // 4}] " for i in range(20)]
    real = [line for line in printed.splitlines() if line.startswith(("  training", "  held out"))]
    assert len(real) == 2  # real texts are right by the grammar
    assert all(line.endswith("accepted 1.000  rating 1.000") for line in real)


def test_samples_are_drawn_from_the_averaged_weights(trained, writer):
    saved = checkpoint(trained[0] / "diffusion/last.pt")
    frozen = checkpoint(trained[0] / "vae/last.pt")["ema"]
    assert all(torch.equal(value, saved["ema"][name]) for name, value in writer.model.state_dict().items())
    assert all(torch.equal(value, frozen[name]) for name, value in writer.vae.state_dict().items())
    assert any(not torch.equal(value, saved["model"][name]) for name, value in saved["ema"].items())


def test_training_latents_are_standardised_and_written_back(writer):
    how = writer.cfg, writer.encoder, writer.decoder
    ids, _ = textgen.tensors(*how, textgen.pieces(*how, textgen.load_texts(writer.cfg))[0])
    z = textgen.encode_all(writer.vae, ids)
    x0 = (z - writer.mean) / writer.std
    torch.testing.assert_close(x0.mean(0), torch.zeros(4, 8), atol=1e-3, rtol=0)
    torch.testing.assert_close(x0.std(0), torch.ones(4, 8), atol=1e-2, rtol=0)
    assert writer.write(x0[:3]) == texts.decode(writer.decoder, writer.vae.generate(z[:3], 64))


def test_a_writer_samples_by_labels_guidance_and_its_seed(writer, monkeypatch):
    monkeypatch.setattr(writer, "write", lambda x0: x0)
    x, again = writer.sample([0, 4]), writer.sample([0, 4])
    other_label = writer.sample([0, 0])
    assert torch.equal(x, again)
    assert torch.equal(x[0], other_label[0]) and not torch.equal(x[1], other_label[1])
    for change in (dict(seed=1), dict(guidance=0.0)):
        monkeypatch.setattr(writer, "cfg", replace(writer.cfg, **change))
        assert not torch.equal(x, writer.sample([0, 4]))


def test_sampling_needs_the_checkpoint_alone_and_a_seed_repeats_it(trained, cli, monkeypatch, tmp_path):
    monkeypatch.setattr(textgen, "load_texts", lambda *_: pytest.fail("sampling must not load data"))
    alone = tmp_path / "alone.pt"
    alone.write_bytes((trained[0] / "diffusion/last.pt").read_bytes())
    again, first = (cli("textgen", "--load", alone)[1] for _ in range(2))
    assert first.count("\n[3] ") == 4
    assert again == first
    status, printed = cli(
        "textgen", "--load", alone, *"--sampler heun --steps 3 --guidance 0 --samples 1".split()
    )
    assert status == 0 and printed.count("\n[3] ") == 1
    assert len(list((tmp_path / "samples").iterdir())) == 2


def test_a_score_of_a_checkpoint_repeats_that_of_the_run(trained, cli):
    status, printed = cli("textgen", "--load", trained[0] / "diffusion/last.pt", "--score_n", 20)
    score = printed[printed.index("score of n=20") :]
    assert status == 0
    assert score.count("dist-2") == 3
    assert score in trained[1]


def test_held_out_nats_tell_used_latents_from_ignored_ones():
    torch.manual_seed(0)
    vae = TextVAE(*small_backbones(50, 32, 1, 20), 4, 8, 1, p_max=0.0, noise=0.0)
    ids = torch.randint(2, 50, (20, 10))
    ids[16:, 7:] = -100  # the last four, a batch of their own, count for less
    opt = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    for _ in range(60):
        vae(ids, ids).backward()
        opt.step()
        opt.zero_grad()

    def nats():
        printed = textgen.held_out_nats(vae, ids, ids).replace(",", "").split()
        return float(printed[4]), float(printed[-1])

    own, others = nats()
    assert others > own + 0.5
    whole = vae.cross_entropy(textgen.encode_all(vae, ids), ids).item()
    assert own == pytest.approx(whole, abs=6e-4)
    torch.nn.init.zeros_(vae.prefix.weight)
    own, others = nats()
    assert own == others


def same_weights(a, b):
    a, b = (checkpoint(out / "diffusion/last.pt") for out in (a, b))
    pairs = [(a["model"], b["model"]), (a["ema"], b["ema"]), (a["extra"]["vae"], b["extra"]["vae"])]
    return all(all(map(torch.equal, x.values(), y.values())) for x, y in pairs)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    run(*GRAMMAR, *steps(8, 8, sample_every=4), "--out", out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vae", "diffusion"])
def test_a_stage_interrupted_and_resumed_ends_with_the_same_bits(stage, uninterrupted, tmp_path, cli):
    part = dict(vae=(5, 1), diffusion=(8, 5))[stage]
    assert cli("textgen", *GRAMMAR, *steps(*part, sample_every=4), "--out", tmp_path)[0] == 0
    if stage == "vae":  # a kill in the VAE leaves no diffusion
        (tmp_path / "diffusion/last.pt").unlink()
    flags = [*GRAMMAR, *steps(8, 8, sample_every=4), "--out", tmp_path]
    assert cli("textgen", *flags)[0] == 2  # without --resume
    assert cli("textgen", *flags, "--resume")[0] == 0
    assert same_weights(uninterrupted, tmp_path)


@pytest.mark.slow
def test_finished_stages_are_loaded_and_their_settings_and_folders_kept(trained, cli, monkeypatch):
    monkeypatch.setattr(textgen.Run, "update", lambda *_: pytest.fail("trained again"))
    flags = [*GRAMMAR, *steps(40, 40), "--out", trained[0]]
    assert cli("textgen", *flags)[0] == 0
    status, printed = cli("textgen", *flags, "--latent_width", 3)
    assert status == 2 and "vae/last.pt" in printed
    with FileLock(trained[0] / "diffusion/.lock"):
        status, printed = cli("textgen", *flags)
    assert status == 2 and str(trained[0] / "diffusion") in printed


@pytest.mark.slow
def test_one_vae_serves_several_diffusions_and_a_diffusion_one_vae(trained, cli, tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/last.pt").write_bytes((trained[0] / "vae/last.pt").read_bytes())
    flags = [*GRAMMAR, "--condition", "none", "--shift", 2, "--width", 16, "--out", tmp_path]
    status, printed = cli("textgen", *flags, *steps(40, 2))
    assert status == 0, printed
    path = tmp_path / "diffusion/last.pt"
    saved = checkpoint(path)["extra"]["vae"]
    assert all(map(torch.equal, saved.values(), checkpoint(trained[0] / "vae/last.pt")["ema"].values()))
    (tmp_path / "vae/last.pt").unlink()
    status, printed = cli("textgen", *flags, *steps(1, 60), "--resume")
    assert status == 2 and str(path) in printed


@pytest.fixture(scope="module")
def conditioned(tmp_path_factory):
    """Runs on texts under the piece before and under the column "question", by the name of the condition."""
    root = tmp_path_factory.mktemp("conditioned")
    paths = dict(
        prefix=write_reviews(root / "r.csv", ", ".join(["word{i} and a lot more to say about it"] * 9))
    )
    paths["question"] = root / "r.jsonl"
    rows = [dict(text=f"the answer is {i}", question=f"what is {i}?") for i in range(60)]
    paths["question"].write_text("\n".join(map(json.dumps, rows)))
    for condition, path in paths.items():
        flags = [*SMALL, *steps(3, 3, score_n=6), "--condition", condition, "--out", root / condition]
        run("--dataset", path, *flags)
    return root


@pytest.mark.parametrize("condition", ["prefix", "question"])
def test_samples_are_drawn_under_held_out_conditions(condition, conditioned):
    path = conditioned / condition / "diffusion"
    writer = textgen.load(path / "last.pt")
    both = writer.encoder, writer.decoder
    _, test = textgen.pieces(writer.cfg, *both, textgen.load_texts(writer.cfg))
    lines = (path / "samples/samples.txt").read_text().splitlines()
    assert len(lines) == 12
    for i, line in enumerate(lines):
        assert line.startswith(f"[{test[i // 4][2]}]")


def test_a_prefix_is_the_piece_before(conditioned):
    writer = textgen.load(conditioned / "prefix/diffusion/last.pt")
    cfg, data = writer.cfg, textgen.load_texts(writer.cfg)
    train, test = textgen.pieces(cfg, writer.encoder, writer.decoder, data)
    whole = [text.split() for text, _, _ in data.train + data.test]
    for text, _, before in train + test:
        both = f"{before} {text}".split()
        assert any(words[i : i + len(both)] == both for words in whole for i in range(len(words)))
    with pytest.raises(UserError):  # no text has two pieces
        textgen.pieces(replace(cfg, max_tokens=1000), writer.encoder, writer.decoder, data)


def test_a_prompt_is_the_condition(conditioned, cli):
    path = conditioned / "question/diffusion/last.pt"
    status, printed = cli("textgen", "--load", path, "--prompt", "what is 3?")
    assert status == 0
    assert printed.count("[what is 3?] ") == 4
    assert len(textgen.load(path).sample(["what is 3?"])) == 1
    for flags in ([], ["--prompt", ""]):
        assert cli("textgen", "--load", path, *flags)[0] == 2


def test_padding_of_a_condition_counts_for_nothing(conditioned):
    writer = textgen.load(conditioned / "question/diffusion/last.pt")
    given = ["what is a longer question?", "what?"]
    context, mask = writer.condition(given)
    assert mask.sum(1).tolist() == (texts.encode(writer.encoder, given, 64) >= 0).sum(1).tolist()
    for name, weight in writer.model.named_parameters():
        if name.endswith(("head.weight", "ada.weight")):  # zero at first: nothing would come through
            torch.nn.init.normal_(weight)
    xt, t, context = torch.randn(2, 4, 8), torch.tensor([5, 5]), context.float()
    out = writer.model(xt, t, (context, mask))
    torch.testing.assert_close(out, writer.model(xt, t, (context.masked_fill(~mask[..., None], 9.0), mask)))
    assert (out - writer.model(xt, t, (context + 1, mask))).abs().max() > 1e-3


SHAPE = dict(vocab_size=330, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
SHAPES = {name: SHAPE | dict(model_type=name) for name in ("bert", "roberta", "llama", "opt")}
SHAPES["gpt2"] = dict(model_type="gpt2", vocab_size=330, n_embd=16, n_layer=1, n_head=2)
SHAPES["distilbert"] = dict(
    model_type="distilbert", vocab_size=330, dim=16, hidden_dim=32, n_layers=1, n_heads=2
)
SHAPES["opt"] |= dict(ffn_dim=32, word_embed_proj_dim=8)


def save_pretrained(folder, name, **shape):
    """A small model with random weights and a tokenizer of its own, saved as the hub's are; its folder."""
    encoder = "bert" in name
    auto = AutoModel if encoder else AutoModelForCausalLM
    auto.from_config(AutoConfig.for_model(**SHAPES[name] | shape)).save_pretrained(folder / name)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] if encoder else ["</s>"]
    names = dict(unk_token="[UNK]", pad_token="[PAD]") if encoder else dict(eos_token="</s>")
    tokenizer = Tokenizer(models.BPE(unk_token=names.get("unk_token")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([row["text"] for row in textgen.grammar.rows()[:200]], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / name)
    return folder / name


@pytest.mark.slow
@pytest.mark.parametrize("encoder, decoder", [("bert", "gpt2"), ("roberta", "llama"), ("distilbert", "opt")])
def test_any_pretrained_parts_train_and_their_folders_are_needed_no_more(encoder, decoder, tmp_path, cli):
    parts = [save_pretrained(tmp_path, name) for name in (encoder, decoder)]
    flags = [*GRAMMAR, *steps(2, 2), "--encoder", parts[0], "--decoder", parts[1], "--out"]
    status, printed = cli("textgen", *flags, tmp_path / "out")
    assert status == 0, printed
    for part in parts:
        part.rename(f"{part}-gone")
    assert cli("textgen", "--load", tmp_path / "out/diffusion/last.pt")[0] == 0
    status, printed = cli("textgen", *flags, tmp_path / "new")
    assert status == 2 and parts[0].name in printed


@pytest.mark.slow
def test_pretrained_parts_resume_to_the_same_bits_without_their_folders(tmp_path, cli):
    parts = save_pretrained(tmp_path, "bert"), save_pretrained(tmp_path, "gpt2")
    flags = [*GRAMMAR, "--encoder", parts[0], "--decoder", parts[1], "--out"]
    assert cli("textgen", *flags, tmp_path / "a", *steps(4, 1))[0] == 0
    assert cli("textgen", *flags, tmp_path / "b", *steps(2, 1))[0] == 0
    (tmp_path / "b/diffusion/last.pt").unlink()
    for part in parts:  # another version of transformers might write them otherwise
        part.rename(f"{part}-gone")
    assert cli("textgen", *flags, tmp_path / "b", *steps(4, 1), "--resume")[0] == 0
    assert same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    "encoder, decoder, shape", [("bert", "gpt2", dict(n_positions=60)), ("bert", "bert", {})]
)
def test_a_decoder_that_is_too_short_or_has_no_end_token_is_refused(encoder, decoder, shape, tmp_path, cli):
    parts = save_pretrained(tmp_path, encoder), save_pretrained(tmp_path, decoder, **shape)
    flags = [*GRAMMAR, *steps(1, 1), "--encoder", parts[0], "--decoder", parts[1], "--out", tmp_path / "out"]
    assert cli("textgen", *flags)[0] == 2
    assert not (tmp_path / "out/vae/last.pt").exists()


def test_one_pretrained_part_alone_is_refused(tmp_path, cli):
    for flag in ("--encoder", "--decoder"):
        status, printed = cli("textgen", *GRAMMAR, flag, "gpt2", "--out", tmp_path)
        assert status == 2 and "both pretrained" in printed


def test_without_a_network_pretrained_parts_are_refused_at_once(tmp_path, cli, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    status, printed = cli("textgen", "--dataset", "grammar", "--size", "base", "--out", tmp_path)
    assert status == 2
    assert "bert-base-uncased" in printed and "--size small" in printed
    assert time.monotonic() - start < 20  # the libraries themselves try for 40 seconds


@pytest.mark.parametrize(
    "flags",
    [
        "",  # a folder called like the grammar is ambiguous
        "--steps 1001",
        "--width 100",
        "--span 15",
        "--prompt hello",
        "--condition weather",
        "--text_column weather",
        "--dataset nothing.csv",
        "--encoder scratch --decoder gpt2",
        "--encoder nobody/bert --decoder nobody/gpt2",
        "--load nowhere.pt",
        "--condition prefix --max_tokens 200 --span 50",
    ],
)
def test_a_mistake_is_refused_before_training(flags, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if not flags:
        (tmp_path / "grammar").mkdir()
    status, printed = cli("textgen", *GRAMMAR, *steps(1, 1), *flags.split())
    assert status == 2, printed
    assert not list(tmp_path.rglob("last.pt"))


@pytest.mark.parametrize(
    "flags", ["--prompt hello", "--latent_width 3", "--condition none", "--dataset r.csv"]
)
def test_a_checkpoint_refuses_what_it_was_not_trained_for(flags, trained, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_reviews(tmp_path / "r.csv")
    path = trained[0] / "diffusion/last.pt"
    status, printed = cli("textgen", "--load", path, *flags.split(), "--score_n", 20)
    assert status == 2
    assert flags.split()[0] in printed or "r.csv" in printed


@pytest.mark.parametrize("break_it", ["weights", "names"])
def test_a_checkpoint_with_other_contents_is_refused(break_it, trained, tmp_path):
    saved = checkpoint(trained[0] / "diffusion/last.pt")
    if break_it == "weights":
        saved["extra"]["vae"] = {name: value[:1] for name, value in saved["extra"]["vae"].items()}
    else:
        saved["facts"]["names"] = 3
    torch.save(saved, tmp_path / "other.pt")
    for path in (tmp_path / "other.pt", trained[0] / "vae/last.pt"):
        with pytest.raises(UserError, match=path.name):
            textgen.load(path)
