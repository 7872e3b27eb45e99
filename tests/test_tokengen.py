"""tokengen.py: text as ids, gaps and prompts, windows in a row, a run, mistakes; and bench/tokens.py."""

import dataclasses
import math
import re

import pytest
import torch
from conftest import ROOT, SMALL_TOKENS
from PIL import Image

import tokengen
from bench.tokens import WindowGPT, gpt_bits
from blocks import bound
from files import UserError

ABC = "the cat sat on the mat. the dog sat on the log.\n" * 60
TINY_TEXT = [*SMALL_TOKENS, "--log_every", 2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def abc(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "abc.txt"
    path.write_text(ABC)
    return path


def small(**settings) -> tokengen.Config:
    settings = dict(dataset="x", window=32, block=8, width=32, depth=1, score_n=6) | settings
    return tokengen.Config(**settings)


def parts(text=ABC, **settings):
    """Settings, facts and a model with random weights: what it must not see would show."""
    cfg = small(**settings)
    facts = tokengen.facts_of(cfg, text)
    model = tokengen.build(cfg, facts, CPU)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return cfg, facts, model.eval()


# -- text as ids -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [0, 300])
def test_a_text_comes_back_from_its_ids_and_masks_are_shown(vocab):
    cfg, facts, model = parts(vocab=vocab)
    ids = tokengen.encode(facts, "the cat sat")
    assert tokengen.decode(facts, ids.tolist()) == "the cat sat"
    assert ids.max() < tokengen.vocabulary(facts) == model.mask_id
    assert (len(ids) < 8) == bool(vocab)
    ids[-1] = model.mask_id
    assert tokengen.decode(facts, ids.tolist()).endswith("░")


def test_characters_of_the_held_out_text_are_known_and_others_are_named():
    facts = tokengen.facts_of(small(), ABC + "z")
    assert len(tokengen.encode(facts, "z")) == 1
    with pytest.raises(UserError, match="'!', 'é' is not among the characters"):
        tokengen.encode(facts, "thé cat!")


def test_the_split_is_nanogpts():
    ids, ids_test, characters = tokengen.splits(small(), tokengen.facts_of(small(), ABC), ABC)
    assert (len(ids), len(ids) + len(ids_test)) == (int(0.9 * len(ABC)), len(ABC))
    assert characters == 1
    cfg = small(vocab=300)
    *_, characters = tokengen.splits(cfg, tokengen.facts_of(cfg, ABC), ABC)
    assert characters > 1.5


def test_held_out_windows_do_not_overlap_and_are_spread():
    windows = tokengen.held_out_windows(small(), {}, torch.arange(1000), 5)
    assert windows[:, 0].tolist() == [0, 224, 480, 704, 960]
    assert torch.equal(windows, windows[:, :1] + torch.arange(32))


@pytest.mark.parametrize("vocab", [0, 300])
def test_windows_of_lines_begin_where_a_line_does(vocab):
    cfg = small(window=16, lines=True, vocab=vocab)
    lines = [f"{i} the {'big ' * (i % 3)}cat sat on the mat" for i in range(20)]
    text = "\n".join(["in the middle of a line", *lines])
    facts = tokengen.facts_of(cfg, text)
    ids = tokengen.encode(facts, text)
    windows = tokengen.held_out_windows(cfg, facts, ids, 100)
    begun = [tokengen.decode(facts, row.tolist()) for row in windows]
    assert len(begun) >= 18  # the last ones may be too short
    for text, line in zip(begun, lines, strict=False):
        assert text.startswith(line[:8])
    assert len(tokengen.begins_of(dataclasses.replace(cfg, lines=False), facts, ids)) == len(ids) - 15


@pytest.mark.parametrize("text", ["the cat sat. " * 300 + "\n", "the cat\n" * 300 + "the cat sat. " * 30])
def test_lines_need_lines_in_both_parts(text):
    cfg = small(lines=True)
    with pytest.raises(UserError, match="at least 2 are wanted: give more text, or leave out --lines"):
        tokengen.splits(cfg, tokengen.facts_of(cfg, text), text)


def test_lines_longer_than_a_window_are_counted(tmp_path, capsys):
    cfg = small(lines=True, max_steps=1, out=str(tmp_path))
    text = ("cat\n" + "the cat sat on the mat " * 3 + "\n") * 50
    tokengen.train(cfg, tokengen.facts_of(cfg, text), text, CPU)
    assert "45 lines have more than 32 tokens" in capsys.readouterr().out


def test_samples_of_lines_end_with_their_window():
    cfg, facts, model = parts(lines=True, n=2, length=100)
    assert tokengen.samples(cfg, model, tokengen.encode(facts, "the"))[0].shape == (2, 32)


# -- writing -----------------------------------------------------------------------------------------------


def test_a_sample_begins_with_its_prompt_and_goes_on_over_several_windows():
    cfg, facts, model = parts(n=2, length=75, steps=2)
    prompt = tokengen.encode(facts, "the cat")
    samples, _ = tokengen.samples(cfg, model, prompt)
    states = list(tokengen.write(cfg, model, prompt.expand(2, -1), 75))
    for ids in states:
        assert torch.equal(ids[:, :7], prompt.expand(2, -1))
        assert ids.shape[1] <= 75
    assert states[-1].shape == (2, 75)
    assert (states[-1] != model.mask_id).all()
    for before, after in zip(states, states[1:], strict=False):  # what is known stays
        shared = before.shape[1]
        known = before != model.mask_id
        assert torch.equal(before[known], after[:, :shared][known])
    assert torch.equal(samples, states[-1])


def test_a_later_window_stands_on_the_second_half_of_the_one_before():
    cfg, _, model = parts(n=1, length=48, steps=8, temperature=0.0, order="confident")
    first = tokengen.samples(dataclasses.replace(cfg, length=32), model, torch.zeros(0, dtype=torch.long))[0]
    both = tokengen.samples(cfg, model, torch.zeros(0, dtype=torch.long))[0]
    assert torch.equal(both[:, :32], first)
    again = tokengen.samples(dataclasses.replace(cfg, length=32), model, first[0, 16:])[0]
    assert torch.equal(both[:, 16:], again)


@pytest.mark.parametrize("block", [8, 32])
def test_gaps_are_filled_and_nothing_else(block):
    cfg, facts, model = parts(n=3, sample_from="x", prompt="the __t sat on _he", gap="_", block=block)
    ids = tokengen.encode_prompt(cfg, facts)
    assert (ids == model.mask_id).nonzero()[:, 0].tolist() == [4, 5, 15]
    written, _ = tokengen.samples(cfg, model, ids)
    states = list(tokengen.write(cfg, model, ids.expand(3, -1), len(ids)))
    for row in written:
        assert re.fullmatch(r"the [^░]{2}t sat on [^░]he", tokengen.decode(facts, row.tolist()))
    assert all((state == model.mask_id).any() for state in states[:-1])  # it ends when the gaps are filled


def test_a_gap_in_one_window_is_filled_by_what_stands_behind_it():
    cfg, _, model = parts(block=32)
    ids = torch.arange(20) % 5
    logits = []
    for last in (1, 2):
        ids[-1] = last
        xt = torch.cat([ids, torch.full((12,), model.mask_id)])[None]
        xt[:, 3] = model.mask_id
        logits.append(model(xt, None, xt[:, :0])[0, 3])
    assert not torch.allclose(*logits)


# -- the bound and the loss --------------------------------------------------------------------------------


def test_bits_are_the_bound_over_characters_with_its_standard_error():
    cfg, facts, model = parts(batch_size=4)
    windows = tokengen.encode(facts, ABC[:320]).view(-1, 32)
    bits, error = tokengen.mean_bits(cfg, model, windows, 2.0, 3)
    generator = torch.Generator().manual_seed(0)
    each = torch.cat([bound(model, w[:, :0], w, 3, generator) for w in windows.split(4)]) / 64 / math.log(2)
    assert (bits, error) == pytest.approx((each.mean().item(), each.std().item() / math.sqrt(10)), rel=1e-2)


def test_uniform_numbers_fill_every_part_alike():
    u = tokengen.stratified(4, 5, CPU)
    assert (u.flatten().sort()[0] * 20).floor().tolist() == list(range(20))
    assert u.shape == (4, 5)


@pytest.mark.parametrize("block", [1, 8])
def test_a_text_of_one_sentence_is_learned_and_written(block, abc, cli, tmp_path):
    flags = [*TINY_TEXT, "--width", 64, "--depth", 2, "--block", block, "--dataset", abc, "--warmup", 20]
    flags += ["--max_steps", 150, "--sample_every", 150, "--length", 90, "--out", tmp_path / "run"]
    status, said = cli("tokengen", *flags)
    assert status == 0, said
    bits = float(re.search(rf"block {block}: ([\d.]+)", said)[1])
    assert bits < 0.9  # at first log2 of 17 characters, 4.1
    text = (tmp_path / "run/samples/samples.txt").read_text()
    assert sum(word in text for word in ("cat", "sat", "dog", "the", "on", "mat", "log")) >= 4


# -- a run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(abc, tmp_path_factory):
    """A run of 4 steps: its folder and flags."""
    import os
    import subprocess
    import sys

    out = tmp_path_factory.mktemp("trained") / "run"
    flags = [*TINY_TEXT, "--dataset", abc, "--out", out, "--max_steps", 4, "--sample_every", 2]
    words = [sys.executable, ROOT / "tokengen.py", *flags, "--length", 40]
    done = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1")
    )
    assert done.returncode == 0, done.stderr
    return out, flags, done.stdout


def test_a_run_writes_what_it_says(trained):
    out, _, said = trained
    assert "block 8: " in said
    assert "at batch 64" in said
    assert [line.split(",")[0] for line in (out / "eval.csv").read_text().splitlines()] == ["step", "2", "4"]
    assert len((out / "samples/samples.txt").read_text().replace("\n", "")) > 90
    with Image.open(out / "samples/focus.gif") as film:
        assert film.n_frames > 5
    assert "░" in (out / "samples/focus.txt").read_text()


def test_samples_and_scores_need_only_the_checkpoint_and_the_text(trained, cli, monkeypatch):
    out, flags, said = trained
    status, again = cli("tokengen", "--score_from", out / "last.pt")
    assert status == 0, again
    line = next(line for line in said.splitlines() if "block 8" in line)
    assert line in again
    monkeypatch.setattr(tokengen, "load_text", None)
    status, text = cli("tokengen", "--sample_from", out / "last.pt", "--prompt", "the c__ sat", "--gap", "_")
    assert status == 0, text
    assert "behind its block of 8 a gap sees nothing: train with --block 32" in text
    assert re.search(r"^the c[^░]{2} sat$", text, re.M)


def test_interrupted_and_resumed_ends_with_the_same_bits(abc, cli, tmp_path):
    flags = [*TINY_TEXT, "--dataset", abc, "--cooldown", 0, "--length", 10, "--n", 1]
    for folder, steps in (("whole", [4]), ("parts", [2, 4])):
        for i, n in enumerate(steps):
            resume = ["--resume"] if i else []
            status, said = cli("tokengen", *flags, "--max_steps", n, "--out", tmp_path / folder, *resume)
            assert status == 0, said
    whole, resumed = (
        torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts")
    )
    for name in ("model", "ema"):
        assert all(torch.equal(whole[name][key], resumed[name][key]) for key in whole[name])


def test_a_score_on_another_text_is_refused(trained, cli, tmp_path):
    (tmp_path / "other.txt").write_text(ABC + "more")
    status, said = cli(
        "tokengen", "--score_from", trained[0] / "last.pt", "--dataset", tmp_path / "other.txt"
    )
    assert status == 2
    assert "is not the text that" in said


def test_shakespeare_is_downloaded_once_and_offline_says_what_needs_no_download(tmp_path, monkeypatch):
    source = tmp_path / "source.txt"
    source.write_text("First Citizen:\n" + ABC)
    monkeypatch.setattr(tokengen, "SHAKESPEARE", source.as_uri())
    for _ in range(2):
        assert tokengen.load_text("shakespeare", str(tmp_path / "data")) == "First Citizen:\n" + ABC
        source.write_text("<html>please log in</html>")
    with pytest.raises(UserError, match="what came is not Shakespeare"):
        tokengen.load_text("shakespeare", str(tmp_path / "new"))
    source.unlink()
    with pytest.raises(UserError, match="could not be loaded .*--dataset manual, or --dataset PATH"):
        tokengen.load_text("shakespeare", str(tmp_path / "elsewhere"))


def test_the_manual_is_in_every_installation():
    text = tokengen.load_text("manual", "")
    assert len(text) > 300_000
    assert "assert" in text


@pytest.mark.parametrize(
    "flags, wanted",
    [
        ("--dataset {short}", "two windows are 64: give more text, or a smaller --window"),
        ("--dataset nowhere.txt", "no text 'nowhere.txt'; choose shakespeare or manual"),
        ("--dataset {latin}", "is not a text in UTF-8"),
        ("--block 5", "block must divide the window of 32, got 5"),
        ("--masks 0.8 0.2", "masks must be two shares, the smaller first"),
        ("--prompt x", "--prompt is for samples of a checkpoint"),
        ("--vocab 100", "vocab must be in"),
        (
            "--sample_from {last} --prompt {long}",
            "the prompt has 40 tokens, but this model sees 32: give at most 31",
        ),
        (
            "--sample_from {last} --prompt cat --length 3",
            "the prompt has 3 tokens, and so would have the sample",
        ),
        ("--sample_from {last} --prompt Zoë", "'Z', 'ë' is not among the characters of the training text"),
        ("--sample_from {last} --prompt cat --gap _", "there is no gap in the prompt 'cat'"),
        ("--sample_from {last} --gap __", "gap must be a single character"),
        ("--sample_from {last} --block 16", "--block 16, but"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(flags, wanted, trained, abc, cli, tmp_path):
    (tmp_path / "short.txt").write_text("the cat sat on the mat")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 500)
    names = dict(short=tmp_path / "short.txt", latin=tmp_path / "latin.txt", last=trained[0] / "last.pt")
    words = flags.format(**names, long="the.cat." * 5).split()
    start = [] if "--sample_from" in words else [*TINY_TEXT, "--out", tmp_path / "run"]
    data = [] if {"--sample_from", "--dataset"} & set(words) else ["--dataset", abc]
    status, said = cli("tokengen", *start, *data, *words)
    assert status == 2, said
    assert wanted in " ".join(said.split())
    assert "Traceback" not in said


# -- beside others -----------------------------------------------------------------------------------------


def test_the_gpt_beside_it_sees_only_what_is_before_and_its_bits_are_those_of_the_chain_rule():
    cfg = small(window=6, block=6)
    model = WindowGPT(3, cfg, CPU).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x0 = torch.cartesian_prod(*[torch.arange(3)] * 6)  # every window
    with torch.no_grad():
        nats = model(x0)
    # id 3, which begins a text, has a share of its own that no window takes.
    assert 0.05 < nats.sum(1).neg().exp().sum() < 1
    changed = x0.clone()
    changed[:, 3:] = (x0[:, 3:] + 1) % 3
    torch.testing.assert_close(model(changed)[:, :3], nats[:, :3])
    bits, _ = gpt_bits(cfg, model, x0, 2.0)
    assert bits == pytest.approx(nats.mean().item() / 2 / math.log(2), rel=1e-2)
    written = model.write(2, 6, 1.0)
    assert written.shape == (2, 6)
    surest = model.write(3, 6, 0.0, [2])
    assert surest[:, 0].tolist() == [2, 2, 2]
    assert len(surest.unique(dim=0)) == 1


def test_all_are_trained_for_their_seconds_compared_and_then_loaded(abc, cli, tmp_path):
    run = "--run.window 32 --run.width 32 --run.depth 1 --run.batch_size 4 --run.log_every 1 --run.score_n 4"
    flags = ["--dataset", abc, "--seconds", 0.3, "--blocks", 1, 8, "--out", tmp_path, *run.split()]
    status, said = cli("bench.tokens", *flags)
    assert status == 0, said
    for name in ("GPT", "blocks of 1", "blocks of 8"):
        assert f"| {name} |" in said
    assert (tmp_path / "curves.png").exists()
    table = [line.split("|")[1:5] for line in said.splitlines() if line.startswith("| ")]
    abc.with_name("other.txt").write_text(ABC + "!")
    status, said = cli("bench.tokens", *flags, "--dataset", abc.with_name("other.txt"))
    assert status == 2
    assert "was trained on other data than" in said
    status, again = cli("bench.tokens", *flags)
    assert [line.split("|")[1:5] for line in again.splitlines() if line.startswith("| ")] == table
