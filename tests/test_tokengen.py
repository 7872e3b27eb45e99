"""tokengen.py: text as ids, windows, gaps and prompts, the bound, a run, mistakes."""

import math
import re
from dataclasses import replace

import pytest
import torch

import tokengen
from blocks import bound
from common import run, texts
from common.run import UserError

ABC = "the cat sat on the mat. the dog sat on the log.\n" * 60
TINY = "--window 32 --block 8 --width 32 --depth 1 --batch_size 8 --score_n 6 --samples 2 --length 40".split()
CPU = torch.device("cpu")
NOTHING = torch.zeros(0, dtype=torch.long)


@pytest.fixture(scope="module")
def abc(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "abc.txt"
    path.write_text(ABC)
    return path


def small(**settings) -> tokengen.Config:
    settings = dict(window=32, block=8, width=32, depth=1, samples=2) | settings
    return tokengen.Config(**settings)


def parts(text=ABC, **settings):
    """Settings, facts and a model with random weights everywhere."""
    cfg = small(**settings)
    facts = tokengen.facts_of(cfg, text, "")
    _, model = tokengen.build(cfg, facts, CPU)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return cfg, facts, model.eval()


def load(cfg):
    return texts.load_text(cfg.dataset, cfg.data_dir, cfg.lines)


def read(path, content: bytes, **settings) -> str:
    path.write_bytes(content)
    return "".join(load(small(dataset=str(path), **settings)))


@pytest.mark.parametrize("vocab, mask", [(0, "░"), (300, "<mask>")])
def test_a_text_comes_back_from_its_ids_and_masks_are_shown(vocab, mask):
    _, facts, model = parts(vocab=vocab)
    for text in ("the cat sat", " on  the mat .\nthe log", *["<mask> <eos> log"][:vocab]):
        ids = tokengen.encode(facts, text)
        assert tokengen.decode(facts, ids) == text
    assert ids.max() < tokengen.vocabulary(facts) == model.mask_id
    ids[1] = model.mask_id
    assert mask in tokengen.decode(facts, ids)


def test_the_split_is_nanogpts_and_characters_of_both_parts_are_known(abc):
    text, text_test = load(small(dataset=str(abc)))
    assert (len(text), text + text_test) == (int(0.9 * len(ABC)), ABC)
    facts = tokengen.facts_of(small(), ABC, "z")
    assert len(tokengen.encode(facts, "z")) == 1
    with pytest.raises(UserError, match="é"):
        tokengen.encode(facts, "thé cat")


def test_every_character_of_a_file_is_read_but_byte_order_marks_and_carriage_returns(tmp_path):
    text = "one\u2028two\x0cthree\x85four\tfive \n\n  é 𝄞\n"
    assert read(tmp_path / "a.txt", text.encode("utf-8-sig")) == text
    assert read(tmp_path / "a.txt", text.replace("\n", "\r\n").encode()) == text
    assert read(tmp_path / "a.txt", f"a{text}\ufeffb".encode()) == f"a{text}b"


def test_a_file_with_a_builtin_name_is_ambiguous(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "manual").write_text(ABC)
    with pytest.raises(UserError, match="manual"):
        load(small(dataset="manual"))
    monkeypatch.chdir("/")
    assert "assert" in load(small(dataset="manual"))[0]
    monkeypatch.chdir(tmp_path)
    assert "".join(load(small(dataset="./manual"))) == ABC


def test_shakespeare_is_downloaded_once_and_checked(tmp_path, monkeypatch):
    source, cfg = tmp_path / "source.txt", small(data_dir=str(tmp_path / "data"))
    source.write_text("<html>please log in</html>")
    monkeypatch.setattr(texts, "SHAKESPEARE", source.as_uri())
    with pytest.raises(UserError, match="manual"):
        load(cfg)
    monkeypatch.setattr(texts, "SHA256", "")
    source.write_text(ABC)
    for _ in range(2):
        assert "".join(load(cfg)) == ABC
        source.unlink(missing_ok=True)
    with pytest.raises(UserError, match="manual"):
        load(replace(cfg, data_dir=str(tmp_path / "new")))


def test_held_out_windows_do_not_overlap():
    starts = tokengen.window_starts(small(), {}, torch.arange(100), stride=32)
    assert starts.tolist() == [0, 32, 64]
    assert tokengen.window_starts(small(), {}, torch.arange(34)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("vocab", [0, 300])
@pytest.mark.parametrize("blank", ["", "\n", " \n \t\n"])
def test_windows_of_lines_begin_where_a_line_does(vocab, blank, tmp_path):
    lines = [f"{i} the {'big ' * (i % 3)}cat sat on the mat" for i in range(20)]
    text = f" \n{blank}".join(["the first line has nothing before it", *lines, ""])
    text = read(tmp_path / "a.txt", text.encode(), lines=True)
    cfg, facts, _ = parts(text, window=16, lines=True, vocab=vocab)
    ids = tokengen.encode(facts, text)
    windows = [tokengen.decode(facts, ids[i : i + 16]) for i in tokengen.window_starts(cfg, facts, ids)]
    assert len(windows) >= 18  # the last ones may be too short
    for window, line in zip(windows, lines, strict=False):
        assert window.startswith(line[:8])


def test_lines_longer_than_a_window_are_counted_and_samples_end_with_their_window(tmp_path, capsys):
    cfg = small(lines=True, max_steps=1, score_n=0, length=100, out=str(tmp_path))
    text = ("cat\n" + "the cat sat on the mat " * 3 + "\n") * 50
    tokengen.train(cfg, text[:-300], text[-300:], CPU)
    assert "45 lines" in capsys.readouterr().out
    _, model, _ = tokengen.load(tmp_path / "last.pt", CPU)
    assert list(tokengen.write(cfg, model, NOTHING[None]))[-1].shape == (1, 32)


def test_a_sample_begins_with_its_prompt_and_goes_on_over_several_windows():
    cfg, facts, model = parts(length=75, steps=2)
    prompt = tokengen.encode(facts, "the cat").expand(2, -1)
    states = list(tokengen.write(cfg, model, prompt))
    for before, after in zip([prompt, *states], states, strict=False):
        assert after.shape[1] <= 75
        known = before != model.mask_id
        assert torch.equal(before[known], after[:, : before.shape[1]][known])
    assert states[-1].shape == (2, 75)
    assert (states[-1] != model.mask_id).all()


@pytest.mark.parametrize("window", [32, 33])
def test_a_later_window_begins_with_the_second_half_of_the_one_before(window):
    block = 8 if window == 32 else 11
    cfg, _, model = parts(window=window, block=block, length=48, steps=8, temperature=0.0)
    *_, both = tokengen.write(cfg, model, NOTHING[None])
    cfg = replace(cfg, length=window)
    *_, first = tokengen.write(cfg, model, NOTHING[None])
    *_, second = tokengen.write(cfg, model, first[:, -(window // 2) :])
    start = window - window // 2
    assert torch.equal(both[:, :window], first)
    assert torch.equal(both[:, start:], second[:, : 48 - start])


@pytest.mark.parametrize("block", [8, 32])
@pytest.mark.parametrize("vocab", [0, 300])
def test_gaps_are_filled_and_nothing_else(block, vocab):
    cfg, facts, model = parts(samples=3, prompt="the __t sat on _he", gap="_", block=block, vocab=vocab)
    ids = tokengen.encode_prompt(cfg, facts)
    gaps = ids == model.mask_id
    assert gaps.sum() == 3 and (vocab or gaps.nonzero()[:, 0].tolist() == [4, 5, 15])
    states = list(tokengen.write(cfg, model, ids.expand(3, -1)))
    assert all((state == model.mask_id).any() for state in states[:-1])  # it ends when the gaps are filled
    assert (states[-1] != model.mask_id).all()
    for state in states:
        assert torch.equal(state[:, ~gaps], ids[~gaps].expand(3, -1))


def test_a_line_separator_in_a_sample_stays_one_character(monkeypatch):
    cfg, facts, model = parts("a\u2028b\x0cc" * 99)
    ids = tokengen.encode(facts, "a\u2028b\x0cc")[None]
    monkeypatch.setattr(tokengen, "write", lambda *_: [ids])
    assert tokengen.write_samples(cfg, facts, model)[0] == "[1]\na\u2028b\x0cc\n"
    facts = tokengen.facts_of(small(vocab=300), "one\u2028\u2028\u2028two " * 99, "")
    assert len(tokengen.encode(facts, "\u2028\u2028")) == 1  # the BPE reads over it


@pytest.mark.parametrize("block, draws", [(8, 3), (1, 1)])
def test_bits_are_the_bound_over_characters(block, draws):
    text = ABC[:330]
    cfg, facts, model = parts(batch_size=4, block=block, vocab=300)
    ids = tokengen.encode(facts, text)
    generator = torch.Generator().manual_seed(0)
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    nats = torch.cat([bound(model, w[:, :0], w, draws, generator) for w in windows.split(4)])
    bits = tokengen.bits_of(cfg, facts, model, text, 100, draws=3)
    torch.testing.assert_close(bits, nats / 32 / (len(text) / len(ids)) / math.log(2))
    assert tokengen.bits_of(cfg, facts, model, text * 3, 2).shape == (2,)  # a score of two windows


def test_stratified_numbers_fill_every_part_equally():
    u = tokengen.stratified(4, 5, CPU)
    assert u.shape == (4, 5)
    assert (u.flatten().sort()[0] * 20).floor().tolist() == list(range(20))


@pytest.mark.slow
def test_training_lowers_the_bound_of_17_characters_from_log2_of_17(abc, cli, tmp_path, monkeypatch):
    flags = ["--dataset", abc, "--out", tmp_path / "run", "--max_steps", 120, "--lr", 2e-2]
    monkeypatch.setattr(run, "MUON_LR", 0.05)
    status, printed = cli("tokengen", *TINY, *flags, "--prompt", "the cat")
    assert status == 0, printed
    assert float(re.findall(r"([\d.]+) \+- ", printed)[-1]) < 2
    assert "[1]\nthe cat" in (tmp_path / "run/samples/samples.txt").read_text()


@pytest.fixture(scope="module")
def trained(abc, tmp_path_factory):
    """The folder of a run of 4 steps."""
    out = tmp_path_factory.mktemp("trained") / "run"
    cfg = small(dataset=str(abc), out=str(out), batch_size=8, max_steps=4, length=40, score_n=6)
    tokengen.train(cfg, *load(cfg), CPU)
    return out


def test_a_checkpoint_writes_without_the_text_and_scores_with_it(trained, abc, cli, tmp_path, monkeypatch):
    scores = []
    for _ in range(2):
        status, printed = cli("tokengen", "--load", trained / "last.pt", "--score_n", 6)
        assert status == 0, printed
        scores.append(re.findall(r"[\d.]+ \+- [\d.]+", printed))
    assert len(scores[0]) == 1 and scores[0] == scores[1]
    (tmp_path / "other.txt").write_text(ABC + "more")
    other = ["--dataset", tmp_path / "other.txt", "--score_n", 6]
    assert cli("tokengen", "--load", trained / "last.pt", *other)[0] == 2
    monkeypatch.setattr(tokengen, "load_text", None)
    status, printed = cli("tokengen", "--load", trained / "last.pt", "--prompt", "the c__ sat", "--gap", "_")
    assert status == 0, printed
    assert re.search(r"^the c[^░]{2} sat$", printed, re.M)


def test_a_loaded_model_is_the_averaged_one_and_writes(trained):
    process, model, facts = tokengen.load(trained / "last.pt", CPU)
    weights = torch.load(trained / "last.pt", weights_only=True)["ema"]
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)
    assert process.mask_id == model.mask_id == len(facts["alphabet"])
    cfg = tokengen.Config(length=20)
    *_, ids = tokengen.write(cfg, model, tokengen.encode(facts, "the ")[None])
    assert tokengen.decode(facts, ids[0]).startswith("the ")


def test_interrupted_and_resumed_ends_with_the_same_bits(abc, cli, tmp_path, monkeypatch):
    flags = [*TINY, "--dataset", abc, "--max_steps", 4, "--save_every", 2, "--score_n", 0]
    assert cli("tokengen", *flags, "--out", tmp_path / "whole")[0] == 0
    updates = iter([*[tokengen.Run.update] * 3, None])
    with monkeypatch.context() as patch, pytest.raises(TypeError):  # in the fourth step
        patch.setattr(tokengen.Run, "update", lambda *args: next(updates)(*args))
        cli("tokengen", *flags, "--out", tmp_path / "parts")
    assert cli("tokengen", *flags, "--out", tmp_path / "parts", "--resume")[0] == 0
    whole, resumed = (torch.load(tmp_path / x / "last.pt", weights_only=True) for x in ("whole", "parts"))
    for name in ("model", "ema"):
        assert all(torch.equal(whole[name][key], resumed[name][key]) for key in whole[name])


@pytest.mark.parametrize(
    "flags",
    [
        "--dataset {short}",
        "--dataset {nul}",
        "--dataset {empty}",
        "--dataset {empty} --vocab 300",
        "--dataset nowhere.txt",
        "--dataset .",
        "--dataset {prose} --lines",
        "--dataset {tail} --lines",
        "--block 5",
        "--width 40",
        "--prompt the.cat.the.cat.the.cat.the.cat.the.cat.",
        "--prompt Zoë",
        "--load {last} --prompt the.cat.the.cat.the.cat.the.cat.the.cat.",
        "--load {last} --prompt Zoë",
        "--load {last} --prompt cat --gap _",
        "--load {last} --gap _",
        "--load {last} --block 16",
    ],
)
def test_a_mistake_is_one_message_and_status_2_before_any_training(flags, trained, abc, cli, tmp_path):
    (tmp_path / "short.txt").write_text(ABC[:60])
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "nul.txt").write_text(f"\0{ABC}")
    (tmp_path / "prose.txt").write_text("the cat sat. " * 300 + "\n")
    (tmp_path / "tail.txt").write_text("the cat\n" * 300 + "the cat sat. " * 30)
    names = {path.stem: path for path in tmp_path.iterdir()}
    names["last"] = trained / "last.pt"
    words = flags.format(**names).split()
    start = [] if "--load" in words else [*TINY, "--out", tmp_path / "run"]
    data = [] if {"--load", "--dataset"} & set(words) else ["--dataset", abc]
    status, printed = cli("tokengen", *start, *data, *words)
    assert status == 2, printed
    assert "error: " in printed
    assert not (tmp_path / "run/last.pt").exists()
