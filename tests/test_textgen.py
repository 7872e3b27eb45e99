"""textgen.py as a user runs it: the stages, sampling, scoring, resuming at a tiny size, and every mistake that it should name."""
import csv
import dataclasses
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import textgen
from conftest import ROOT, SMALL_TEXT
from data import grammar_rating, load_texts
from training import UserError, load_checkpoint
from vae import TextVAE, small_backbones

CPU = torch.device("cpu")
GRAMMAR = ["--dataset", "grammar", *SMALL_TEXT, "--max_tokens", 64]  # whole reviews, though so small a vocabulary breaks their words


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a small grammar run, all stages, trained once for the tests of this file, and what it printed."""
    out = tmp_path_factory.mktemp("run") / "grammar"
    command = ["textgen.py", *GRAMMAR, "--out", out, "--vae_steps", 40, "--diffusion_steps", 40, "--sample_every", 20, "--score_n", 20]
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def write_reviews(path, n=60, header="Review,Rating", text=lambda i: f"the room was number {i}. the staff was kind. we slept well, and the price was fair."):
    path.write_text("\n".join([header, *(f'"{text(i)}",{i % 5 + 1}' for i in range(n))]) + "\n", encoding="utf-8")
    return path


def test_a_run_writes_and_prints_what_it_says(trained):
    out, printed = trained
    for stage in ("vae", "diffusion"):
        for name in ("config.json", "log.csv", "curve.png", "last.pt"):
            assert (out / stage / name).stat().st_size > 50, (stage, name)
    assert [int(r["step"]) for r in csv.DictReader(open(out / "vae/log.csv"))] == [40]
    samples = {p.name for p in (out / "diffusion/samples").iterdir()} | {p.name for p in (out / "vae/samples").iterdir()}
    tag = "dpm++_4_guidance2_seed0.txt"
    assert samples == {"reconstructions.txt", "000020.txt", f"samples_{tag}", f"planning_{tag}", f"interpolation_{tag}"}
    for part in ("matched codes", "shuffled codes", "BLEU", "30% substituted", "AuBLEU", "perplexity", "dist1", "entropy", "rep4", "selfBLEU", "nearest", "accepted", "rating"):
        assert part in printed, part
    rows = [re.split("  +", line)[1] for line in printed.splitlines() if "  perplexity " in line]
    assert rows == ["samples", "training", "held out", "GPT-2 top-p 0.7", "GPT-2 top-p 0.92", "GPT-2 top-p 1"]
    lines = (out / f"diffusion/samples/samples_{tag}").read_text().splitlines()
    assert [line[:3] for line in lines] == [f"[{r}]" for r in "12345" for _ in range(4)]
    assert printed.splitlines()[-1] == f"sample again: python textgen.py --sample_from {out / 'diffusion/last.pt'}"


def test_real_rows_of_the_score_are_right_by_the_grammar(trained):
    real = [line for line in trained[1].splitlines() if line.startswith(("  training", "  held out"))]
    assert len(real) == 2 and all(re.search(r"accepted 1  rating 1$", line) for line in real)


def test_finished_stages_are_loaded_and_unfinished_ones_refused(trained, cli, monkeypatch):
    out, _ = trained
    monkeypatch.setattr(textgen, "train_vae", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(textgen, "train_diffusion", lambda *_: pytest.fail("trained again"))
    flags = [*GRAMMAR, "--out", out, "--vae_steps", 40, "--diffusion_steps", 40, "--score_n", 0]
    status, printed = cli("textgen", *flags)
    assert status == 0 and printed.count("is finished: loaded") == 2
    status, printed = cli("textgen", *flags, "--k", 3)
    assert status == 2 and "--k 3, but" in printed and "trained with 4" in printed
    monkeypatch.undo()
    status, printed = cli("textgen", *flags, "--vae_steps", 80, "--diffusion_steps", 80, "--stage", "diffusion")
    assert status == 2 and "is at step 40" in printed and "--resume" in printed
    status, printed = cli("textgen", *flags, "--vae_steps", 80)
    assert status == 2 and "exists already: add --resume" in printed


def test_sampling_needs_only_the_checkpoint_and_flags_override(trained, cli, monkeypatch, tmp_path):
    out, _ = trained
    monkeypatch.setattr(textgen, "load_texts", lambda *_: pytest.fail("sampling must not load data"))
    alone = tmp_path / "alone.pt"
    alone.write_bytes((out / "diffusion/last.pt").read_bytes())
    texts = {}
    for flags in ("", "--seed 5", "--guidance 0 --sampler ddim --steps 3", "--top_p 0.9", ""):
        status, printed = cli("textgen", "--sample_from", alone, *flags.split())
        assert status == 0 and printed.count("\n[3] ") == 4, printed
        assert texts.setdefault(flags, printed) == printed  # the same seed, the same texts
    assert (tmp_path / "samples/samples_ddim_3_guidance0_seed0.txt").exists()


def test_samples_are_drawn_from_the_ema(trained):
    out, _ = trained
    state = load_checkpoint(out / "diffusion/last.pt", "textgen")
    bundle = textgen.load_bundle(textgen.Config(**state["config"]), out / "diffusion/last.pt", CPU)
    assert all(torch.equal(v, state["ema"][k]) for k, v in bundle.model.state_dict().items())
    assert any(not torch.equal(v, state["model"][k]) for k, v in state["ema"].items())
    frozen = load_checkpoint(out / "vae/last.pt", "textgen")["ema"]
    assert all(torch.equal(v, frozen[k]) for k, v in bundle.vae.state_dict().items())


def test_codes_are_standardised_and_written_back(trained):
    """The statistics in the checkpoint are those of the training codes, and standardising is undone before decoding."""
    out, _ = trained
    state = load_checkpoint(out / "diffusion/last.pt", "textgen")
    bundle = textgen.load_bundle(textgen.Config(**state["config"]), out / "diffusion/last.pt", CPU)
    train = textgen.cut(bundle.cfg, bundle.codec, load_texts("grammar"), "train")
    z = bundle.latents(train.ids)
    torch.testing.assert_close(z.mean(0), torch.zeros(4, 8), atol=1e-3, rtol=0)
    torch.testing.assert_close(z.std(0), torch.ones(4, 8), atol=1e-2, rtol=0)
    raw = textgen.encode_all(bundle.vae, train.ids[:3], CPU)
    assert bundle.write(z[:3]) == textgen.write_texts(bundle.codec, bundle.vae, raw, bundle.cfg, CPU)


def test_score_from_prints_the_rows_of_the_run(trained, cli):
    out, printed_by_training = trained
    status, printed = cli("textgen", "--score_from", out / "diffusion/last.pt")
    rows = [line for line in printed.splitlines() if "  perplexity " in line]
    assert "no perplexity under GPT-2: gpt2 is not on disk" in printed
    assert status == 0 and len(rows) == 6 and all(row in printed_by_training for row in rows)  # judge and baseline are loaded too
    status, printed = cli("textgen", "--score_from", out / "diffusion/last.pt", "--no-compare")
    assert status == 0 and "perplexity" not in printed and "GPT-2" not in printed, printed


def test_planning_comes_into_focus_and_interpolation_ends_at_its_texts(trained):
    out, _ = trained
    state = load_checkpoint(out / "diffusion/last.pt", "textgen")
    bundle = textgen.load_bundle(textgen.Config(**state["config"]), out / "diffusion/last.pt", CPU)
    test = textgen.cut(bundle.cfg, bundle.codec, load_texts("grammar"), "test")
    lines = bundle.planning(test.ids[:1], test.y[:1], test.c[:1])
    levels = [float(line.split()[1]) for line in lines[:-1]]
    assert levels == sorted(levels) and levels[0] < 0.05 and levels[-1] > 0.9
    assert lines[-1].split(maxsplit=2)[2] == bundle.write(bundle.latents(test.ids[:1]))[0]
    x0 = bundle.latents(test.ids[:1])
    error = [(bundle.guess(x0, test.y[:1], t, 0) - x0).square().mean() for t in (10, 300, 999)]
    assert error[0] < error[1] < error[2]
    way = bundle.interpolation(test.ids[:2])
    ends = bundle.write(bundle.latents(test.ids[:2]))
    assert way[0] == f"0.0  {ends[0]}" and way[-1] == f"1.0  {ends[1]}" and len(way) == 6


@pytest.mark.parametrize("stage", ["vae", "diffusion"])
def test_stage_interrupted_and_resumed_ends_with_the_same_bits(stage, tmp_path, cli):
    flags = [*GRAMMAR, "--score_n", 0, "--log_every", 5, "--sample_every", 4, "--vae_steps", 8, "--diffusion_steps", 8]
    assert cli("textgen", *flags, "--out", tmp_path / "a")[0] == 0
    if stage == "diffusion":
        assert cli("textgen", *flags, "--out", tmp_path / "b", "--stage", "vae")[0] == 0
    assert cli("textgen", *flags, "--out", tmp_path / "b", "--stage", stage, f"--{stage}_steps", 5)[0] == 0
    status, printed = cli("textgen", *flags, "--out", tmp_path / "b", "--resume")
    assert status == 0 and f"resumed {tmp_path / 'b' / stage / 'last.pt'} at step 5" in printed
    a, b = (load_checkpoint(tmp_path / run / "diffusion/last.pt", "textgen") for run in "ab")
    assert all(torch.equal(a[part][k], b[part][k]) for part in ("model", "ema") for k in a["model"])
    assert all(torch.equal(a["extra"]["vae"][k], v) for k, v in b["extra"]["vae"].items())


def test_alarm_rings_for_a_model_that_ignores_its_codes_and_only_then(capsys, cli, tmp_path, monkeypatch):
    torch.manual_seed(0)
    vae = TextVAE(*small_backbones(50, 32, 1, 20), 4, 8, 1, p_max=0.0, noise=0.0)
    target = torch.randint(2, 50, (8, 10))
    opt = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    for _ in range(60):
        vae(target, target).backward()
        opt.step()
        opt.zero_grad()
    ce = textgen.alarm(vae, target, target, CPU)
    assert ce["shuffled"] - ce["matched"] > 0.5 and ce["zero"] - ce["matched"] > 0.3
    torch.nn.init.zeros_(vae.prefix.weight)
    ce = textgen.alarm(vae, target, target, CPU)
    assert ce["matched"] == pytest.approx(ce["shuffled"], abs=1e-6) == pytest.approx(ce["zero"], abs=1e-6)
    for gap, rings in [(0.05, True), (3.0, False)]:
        monkeypatch.setattr(textgen, "alarm", lambda *_: dict(matched=1.0, shuffled=1.0 + gap, zero=2.0))
        flags = [*GRAMMAR, "--stage", "vae", "--out", tmp_path / str(gap), "--vae_steps", 1]
        monkeypatch.setattr(textgen, "ALARM_FROM", 1)
        assert ("the decoder ignores the codes" in cli("textgen", *flags)[1]) == rings


def test_perplexity_is_that_of_the_judges_own_distribution():
    """nats of a model that gives every token the same probability is log of the vocabulary, whatever the lengths."""
    torch.manual_seed(0)
    model = textgen.LabelGPT(textgen.small_gpt(40, 16, 1, 12), 0, 1)
    torch.nn.init.zeros_(model.decoder.transformer.wte.weight)
    target = torch.randint(0, 40, (70, 10))
    target[5:, 3:] = -100
    assert textgen.nats(model, torch.full((70,), -1), target, CPU) == pytest.approx(math.log(40), abs=1e-5)


def test_reviews_of_a_file_with_prefix_and_with_a_column_as_condition(tmp_path, cli):
    path = write_reviews(tmp_path / "r.csv", text=lambda i: ", ".join(f"word{i} and a lot more to say about {j}" for j in range(9)))
    for condition in (["prefix"], ["column", "--condition_column", "Rating_text"]):
        if condition[0] == "column":
            path = tmp_path / "r.jsonl"
            path.write_text("\n".join(json.dumps(dict(text=f"the answer is {i}", Rating_text=f"what is {i}?")) for i in range(60)))
        out = tmp_path / condition[0]
        flags = ["--dataset", path, *SMALL_TEXT, "--vae_steps", 3, "--diffusion_steps", 3, "--score_n", 6, "--out", out, "--condition", *condition]
        status, printed = cli("textgen", *flags)
        assert status == 0 and "AuBLEU" in printed, printed
        shown = (out / "diffusion/samples/samples_dpm++_4_guidance2_seed0.txt").read_text()
        assert shown.count("\ngiven  ") == 3 and shown.count("\nreal   ") == 4, shown  # four held-out conditions
        status, printed = cli("textgen", "--sample_from", out / "diffusion/last.pt", "--prompt", "what is 3? " * 99)
        assert status == 2 and "longer than the 56 tokens" in printed
        status, printed = cli("textgen", "--sample_from", out / "diffusion/last.pt")
        assert status == 2 and "--prompt" in printed
        status, printed = cli("textgen", "--sample_from", out / "diffusion/last.pt", "--prompt", "what is 3?")
        assert status == 0 and "given  what is 3?" in printed and printed.count("\nnew ") == 4


def test_context_that_is_padding_counts_for_nothing(tmp_path):
    """conditions() of a text is the same beside a longer one, but for what the mask hides."""
    cfg = textgen.Config(dataset="x", condition="prefix", **{k: int(v) for k, v in zip(["vae_width", "vae_depth", "k", "d"], [32, 1, 4, 8])})
    texts = load_texts("grammar")
    codec = textgen.train_codec(texts.x[:100], 400, 64)
    vae = TextVAE(*small_backbones(codec.vocab, 32, 1, 80), 4, 8, codec.eos).eval()
    _, context, mask = textgen.conditions(cfg, codec, vae, torch.zeros(2).long(), [texts.x[0], "breakfast"], CPU)
    assert mask.sum(1).tolist() == [(codec.encode([t])[0] >= 0).sum().item() for t in (texts.x[0], "breakfast")]
    _, model = textgen.build_denoiser(cfg, dict(names=[]), vae, CPU)
    torch.nn.init.normal_(model.head.weight), [torch.nn.init.normal_(b.ada.weight) for b in model.blocks]
    xt, t = torch.randn(2, 4, 8), torch.tensor([5, 5])
    out = model(xt, t, (None, context.float(), mask))
    torch.testing.assert_close(out, model(xt, t, (None, context.float().masked_fill(~mask[..., None], 9.0), mask)))
    assert (out - model(xt, t, (None, context.float() + 1, mask))).abs().max() > 1e-3


def save_pretrained(folder):
    """A small BERT and a small GPT-2 with tokenizers of their own, saved as the hub's are."""
    texts = load_texts("grammar").x[:200]
    for name, special in [("bert", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]), ("gpt2", ["<|endoftext|>"])]:
        tokenizer = Tokenizer(models.BPE(unk_token="[UNK]" if name == "bert" else None))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
        tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        names = dict(mask_token="[MASK]", pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]") if name == "bert" else dict(eos_token="<|endoftext|>")
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / name)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=330, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)).save_pretrained(folder / "bert")
    GPT2LMHeadModel(GPT2Config(vocab_size=330, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)).save_pretrained(folder / "gpt2")
    return ["--encoder", folder / "bert", "--decoder", folder / "gpt2"]


def test_pretrained_encoder_and_decoder_from_local_folders(tmp_path, cli, monkeypatch):
    where = save_pretrained(tmp_path)
    flags = [*GRAMMAR, *where, "--size", "base", "--vae_steps", 3, "--diffusion_steps", 3, "--score_n", 8, "--out", tmp_path / "out"]
    status, printed = cli("textgen", *flags)
    assert status == 0 and "perplexity" in printed, printed
    state = load_checkpoint(tmp_path / "out/vae/last.pt", "textgen")
    assert state["config"]["decoder"] == str(tmp_path / "gpt2") and state["ema"]["encoder.embeddings.word_embeddings.weight"].shape == (330, 16)
    for folder in ("bert", "gpt2"):
        (tmp_path / folder).rename(tmp_path / f"{folder}-gone")
    status, printed = cli("textgen", "--sample_from", tmp_path / "out/diffusion/last.pt")
    assert status == 0 and "[5]" in printed, printed  # the checkpoint is all that sampling needs
    status, printed = cli("textgen", *flags[:-1], tmp_path / "new")
    assert status == 2 and "could not be had" in printed and "--size tiny needs no download" in printed


def test_two_processes_train_both_stages(tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", "textgen.py", *GRAMMAR, "--out", tmp_path, "--score_n", 8, "--vae_steps", 3, "--diffusion_steps", 3]
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sample again") == done.stdout.count("no GPT-2 is trained for comparison") == done.stdout.count("score: n=8") == 1 and load_checkpoint(tmp_path / "diffusion/last.pt", "textgen")["step"] == 3


@pytest.mark.parametrize("max_tokens", [16, 48, 56, 64])
def test_the_codes_cover_the_text(max_tokens, tmp_path):
    cfg, texts = textgen.Config(dataset="grammar", max_tokens=max_tokens, vae_depth=1), load_texts("grammar")
    assert cfg.k * cfg.span >= max_tokens
    vae = textgen.build_vae(cfg, textgen.vae_facts(cfg, texts, tmp_path), CPU)
    assert vae.encode(torch.full((2, max_tokens), 7))[0].shape == (2, cfg.k, cfg.d)  # also where the last codes read beyond the text


def test_texts_of_one_label_and_few_of_them(tmp_path, cli):
    """Nothing to classify, nothing to guide; and with one held-out text nothing to score, which is said, after a training that stays."""
    reviews = write_reviews(tmp_path / "reviews.csv", n=20)
    reviews.write_text(re.sub(r",[1-5]$", ",5", reviews.read_text(), flags=re.M))
    train = ["textgen", "--dataset", reviews, *SMALL_TEXT[:-4], "--batch_size", 2, "--steps", 2, "--vae_steps", 1, "--diffusion_steps", 1, "--no-compare", "--out", tmp_path / "out"]
    status, printed = cli(*train)
    assert status == 0 and "score: n=2" in printed and "  label" not in printed, printed
    status, printed = cli(*train, "--score_n", 1)
    assert status == 0 and "not scored: a score needs two" in printed and "sample again" in printed, printed
    status, printed = cli("textgen", "--score_from", tmp_path / "out/diffusion/last.pt", "--score_n", 1)
    assert status == 2 and "a score needs two held-out texts or more, got 2 and --score_n 1" in printed, printed


def test_tripadvisor_slice(cli, tmp_path):
    path = ROOT.parent / "shared/data/tripadvisor/tripadvisor_hotel_reviews.csv"
    if not path.exists():
        pytest.skip("no ../shared/data here")
    texts = load_texts(str(path))
    assert len(texts.x) == 1530 and len(texts.x_test) == 170 and texts.names == list("12345")
    codec = textgen.train_codec(texts.x, 4096, 56)
    pieces = textgen.cut(textgen.Config(dataset=str(path)), codec, texts, "test")
    whole = [(row == codec.eos).any().item() for row in pieces.target]
    assert sum(whole) / len(whole) > 0.95  # the rest are single sentences too long: no end is taught there


# -- mistakes -----------------------------------------------------------------------------------------------------------


def test_help_shows_every_field_with_its_own_comment(cli):
    status, printed = cli("textgen", "--help")
    assert status == 0
    printed = " ".join(re.sub(r"[│╭╰─╮╯]", " ", printed).split())
    source = (ROOT / "textgen.py").read_text()
    for field in dataclasses.fields(textgen.Config):
        comment = re.search(rf"^    {field.name}: .*?  # (.*)$", source, re.M)[1]
        assert f"--{field.name}" in printed.replace("{compare,no_compare}", "compare") and " ".join(comment.split()[:2]) in printed, field.name


@pytest.mark.parametrize(
    "flags, wanted",
    [
        ("--datasett grammar", "datasett"),
        ("--k x", "k"),
        ("--size huge", "tiny"),
        ("--p_max 1.5", "p_max must be in [0, 1], got 1.5"),
        ("--max_tokens 1021", "max_tokens must be in [4, 1020], got 1021"),
        ("--width 100", "divisible by 16"),
        ("--span 17", "k times span must not go a span beyond max_tokens, 56, got 4 times 17"),
        ("--condition column", "go together"),
        ("--label_drop 0", "--label_drop above 0, or --guidance 0"),
        ("--prompt hello", "--prompt is for --condition prefix or column, this is label"),
        ("--stage score", "no checkpoint at"),
        ("--dataset nothing", "no data set 'nothing'; choose grammar, tripadvisor"),
        ("--dataset nothing.csv", "no file nothing.csv"),
        ("--dataset nobody/nothing", "could not be had from the hub"),
        ("--encoder scratch --decoder gpt2", "both from scratch, or neither"),
        ("--encoder nobody/bert --decoder nobody/gpt2", "--size tiny needs no download"),
        ("--sample_from nowhere.pt", "no checkpoint at nowhere.pt"),
        ("--stage sample", "no checkpoint at"),
        ("--stage diffusion", "no checkpoint at"),
        ("--schedule linear --shift 0.05", "--schedule linear with --T 1000 and --shift 0.05: alpha_bar must go from 1 to at most 0.01"),
        ("--batch_size 100000", "fewer than a batch of 100000"),
        ("--condition prefix --max_tokens 100", "no text of the train split is cut in two"),
    ],
)
def test_mistake_is_one_message_and_status_2(flags, wanted, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = ["--dataset", "grammar"] * ("--dataset" not in flags) + SMALL_TEXT * ("--width" not in flags) + ["--vae_steps", "1", "--diffusion_steps", "1", "--score_n", "0"]
    status, printed = cli("textgen", *base, *flags.split())
    flat = " ".join(re.sub(r"[│╭╰─╮╯]", " ", printed).split())
    assert status == 2 and wanted in flat and "Traceback" not in printed, printed


@pytest.mark.parametrize(
    "content, flags, wanted",
    [
        (b"", "", "is empty"),
        (b"Review,Rating\ngood,1\n,2\n", "", "row 2: Review is"),
        (b"Review,Rating\ngood,1\nbad,\n", "", "row 2: Rating is missing"),
        (b"Review,Rating\ngood \xff\xfe,1\n", "", "UTF-8"),
        (b"a,b\ngood,1\n", "", "no column of text; it has a, b: name one with --text_column"),
        (b"a,b\ngood,1\n", "--text_column c", "no column c; it has a, b"),
        (b"Review,Rating\ngood,1\nbad,2\n", "", "fewer than a batch of 16"),
    ],
)
def test_file_with_a_mistake_is_named(content, flags, wanted, tmp_path, cli):
    path = tmp_path / "reviews.csv"
    path.write_bytes(content)
    status, printed = cli("textgen", "--dataset", path, *SMALL_TEXT, "--out", tmp_path / "out", *flags.split())
    assert status == 2 and wanted in printed and ("reviews.csv" in printed or "batch" in printed) and "Traceback" not in printed, printed


def test_checkpoints_that_do_not_fit_are_refused(trained, cli, tmp_path):
    out, _ = trained
    status, printed = cli("textgen", "--sample_from", out / "vae/last.pt")
    assert status == 2 and "is the checkpoint of a vae" in printed and "diffusion/last.pt" in printed
    (tmp_path / "cut.pt").write_bytes((out / "diffusion/last.pt").read_bytes()[:5000])
    status, printed = cli("textgen", "--sample_from", tmp_path / "cut.pt")
    assert status == 2 and "cut.pt is not a checkpoint that can be loaded" in printed
    status, printed = cli("textgen", "--sample_from", out / "diffusion/last.pt", "--k", 3)
    assert status == 2 and "--k 3" in printed and "trained with 4" in printed
    state = load_checkpoint(out / "diffusion/last.pt", "textgen")
    torch.save(state | dict(extra=state["extra"] | dict(vae={k: v[:1] for k, v in state["extra"]["vae"].items()})), tmp_path / "other.pt")
    status, printed = cli("textgen", "--sample_from", tmp_path / "other.pt")
    assert status == 2 and "weights of another model" in printed
    status, printed = cli("textgen", "--score_from", out / "diffusion/last.pt", "--dataset", write_reviews(tmp_path / "r.csv"))
    assert status == 2 and "is not the data that" in printed
    other = tmp_path / "other"  # a VAE of another width where the diffusion expects its own
    assert cli("textgen", *GRAMMAR, "--d", 6, "--vae_steps", 1, "--stage", "vae", "--out", other)[0] == 0
    status, printed = cli("textgen", *GRAMMAR, "--vae_steps", 1, "--diffusion_steps", 1, "--out", other)
    assert status == 2 and "--d 8, but" in printed and "trained with 6" in printed
    (other / "vae/last.pt").rename(tmp_path / "vae.pt")
    assert cli("textgen", *GRAMMAR, "--vae_steps", 1, "--stage", "vae", "--seed", 0, "--lr", 1e-2, "--out", other)[0] == 0
    (other / "diffusion").mkdir()
    (other / "diffusion/last.pt").write_bytes((out / "diffusion/last.pt").read_bytes())
    status, printed = cli("textgen", *GRAMMAR, "--vae_steps", 1, "--diffusion_steps", 60, "--resume", "--out", other)
    assert status == 2 and "--resume on other data: its vae is" in printed


def test_ratings_of_the_grammar_decide(trained):
    texts = load_texts("grammar")
    assert all(grammar_rating(t) == y + 1 for t, y in zip(texts.x, texts.y))
    with pytest.raises(UserError, match="no data set"):
        load_texts("grammer")
