"""reason.py and what it needs of data.py and metrics.py: problems, codecs, chains, the command line, and every mistake that it should name."""
import csv
import dataclasses
import json
import subprocess
import sys

import pytest
import torch

import metrics
import reason
from conftest import ROOT, SMALL_REASON
from data import ANSWER, Tokens, is_test_problem, load_problems, make_problems, mult_problem, sum_problem
from training import UserError, load_checkpoint

CPU = torch.device("cpu")
SUMS = ["--dataset", "sums", "--terms", "3", *SMALL_REASON]
LATENTS = "--codec latents --process gaussian --predict v --k 2 --d 8 --vae_width 32 --vae_depth 1 --vae_steps 3".split()


# -- problems -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 5])
def test_multiplications_are_those_of_the_papers_files(n):
    path = ROOT.parent / f"shared/data/{n}by{n}_mult/valid.txt"
    if not path.exists():
        pytest.skip("the shared data is not here")
    for line in path.read_text().splitlines():
        a, b = (int("".join(reversed(factor.split()))) for factor in line.split("||")[0].split(" * "))
        question, thoughts = mult_problem(a, b, (n, n))
        assert f"{question}||{' '.join(thoughts)}" == line


def test_problems_by_hand():
    assert mult_problem(321, 45, (3, 2)) == ("1 2 3 * 5 4", ["5 0 6 1", "+ 0 4 8 2 1", "#### 5 4 4 4 1"])
    assert mult_problem(2365, 4347, (4, 4))[1][1] == "+ 0 0 6 4 9 0 ( 5 5 1 1 1 1 )"
    assert sum_problem([7, 8, 9], 1) == ("7 + 8 + 9", ["5 1", "#### 4 2"])
    assert sum_problem([99, 15, 90], 2) == ("9 9 + 5 1 + 0 9", ["4 1 1", "#### 4 0 2"])


@pytest.mark.parametrize("task, digits, count", [("sums", (1, 1), 1000), ("adds", (1, 1), 729), ("mult", (2, 1), 810), ("mult", (4, 4), 2500)])
def test_splits_are_disjoint_repeat_and_hold_no_question_twice(task, digits, count):
    problems = make_problems(task, digits, 3, 500)
    train, test = set(problems.question), set(problems.question_test)
    assert len(train) == len(problems.question) == 500 and len(test) == len(problems.question_test) and not train & test
    assert count <= 1000 and abs(len(test) - count / 10) < 40 or len(test) == 2000
    assert problems == make_problems(task, digits, 3, 500)
    assert set(make_problems(task, digits, 3, 800).question).isdisjoint(q for q in test if is_test_problem(q))


GSM = [
    dict(question=f"Tom has {i} pens and buys {j}. How many{' now' * (i % 2)}?", answer=f"He has {i}+{j}=<<{i}+{j}={i + j}>>{i + j}.\nThat is all.\n" + f"<<{i}*1={i}>>So.\n" * (i % 2) + f"#### {i + j:,}")
    for i in range(60, 70) for j in range(995, 999)
]  # fmt: skip


def write_gsm(path, rows=GSM):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_gsm8k_in_both_forms_and_from_a_folder_and_a_txt(tmp_path):
    path = write_gsm(tmp_path / "gsm.jsonl")
    equations, text = load_problems(str(path)), load_problems(str(path), form="text")
    assert equations.thoughts[0] == ["<<60+995=1055>>", "#### 1,055"] and {len(t) for t in equations.thoughts} == {2, 3}
    assert text.thoughts[0] == ["He has 60+995=1055.", "That is all.", "#### 1,055"] and {len(t) for t in text.thoughts} == {3, 4}
    assert len(equations.question) + len(equations.question_test) == 40 and not set(equations.question) & set(equations.question_test)
    write_gsm(tmp_path / "train.jsonl", GSM[:30]), write_gsm(tmp_path / "test.jsonl", GSM[25:])
    folder = load_problems(str(tmp_path))
    assert len(folder.question_test) == 15 and len(folder.question) == 25  # what both hold is only tested
    (tmp_path / "valid.txt").write_text("".join(f"Tom has {i} pens?||<<16-3-4={i}>> <<9*2=18>> #### {i}\n" for i in range(40)))
    assert load_problems(str(tmp_path / "valid.txt")).thoughts[0][:2] == ["<<16-3-4=0>>", "<<9*2=18>>"]


def test_shared_gsm8k_fits():
    folder = ROOT.parent / "shared/data/gsm8k"
    if not folder.exists():
        pytest.skip("the shared data is not here")
    problems = load_problems(str(folder))
    assert len(problems.question_test) == 660 and not set(problems.question) & set(problems.question_test)
    facts = reason.problem_facts(reason.Config(dataset=str(folder)), problems)
    assert facts["varies"] and len(facts["widths"]) == 1 + max(map(len, problems.thoughts + problems.thoughts_test))


# -- scores -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain, answer", [
    (["<<1+2=3>>", "#### 3"], "3"), (["#### 1,234"], "1234"), (["#### -5 "], "-5"), (["#### 8 3 0"], "830"), (["  #### 7"], "7"), (["#### 0.5"], "0.5"),
    ([], None), (["3"], None), (["####"], None), (["#### 3", "4"], None), (["### 3"], None), (["3 #### 3"], None), ([""], None),
])  # fmt: skip
def test_answers_are_read_or_missing(chain, answer):
    assert metrics.answer_of(chain) == answer


def test_majority_vote():
    assert metrics.majority(["3", "4", "4", None, None, None]) == "4"
    assert metrics.majority(["3", "4"]) == "3" and metrics.majority([None, None]) is None and metrics.majority([]) is None


def test_scores_of_chains_count_malformed_ones_as_wrong():
    truth = [["1 2", "3", "#### 4"]] * 5
    chains = [["12", "3", "#### 4"], ["1 2", "7", "#### 4"], ["1 2", "3"], [], ["#### 4"]]
    scores = metrics.score_chains(chains, truth)
    assert scores["answer"] == 0.6 and scores["chain"] == 0.2 and scores["unended"] == 0.4
    assert scores["thoughts"] == [0.6, 0.4, 0.4]


# -- codecs -------------------------------------------------------------------------------------------------------------


def test_tokens_come_back():
    bare, full = Tokens("#*0123456789" + ANSWER), Tokens(" #0123456789<=>+" + ANSWER)
    for codec, texts in [(bare, ["1 2 3 * 5", "#### 9", ""]), (full, ["<<1 + 2=3>>", "#### 3", "", "a".replace("a", "7  8")])]:
        ids = codec.encode(texts, 12)
        assert codec.decode(codec.vectors(ids)) == texts
        noisy = codec.vectors(ids) + 0.3 * torch.rand(len(texts), 12, codec.d, generator=torch.Generator().manual_seed(0))
        assert torch.equal(codec.snap(noisy), codec.vectors(ids))
    with pytest.raises(UserError, match="13 characters, but this model takes at most 12"):
        full.encode(["1" * 13], 12)
    with pytest.raises(UserError, match="has 'x'"):
        full.encode(["x"], 12)


def test_draw_draws_by_the_probabilities_and_keeps_what_is_known():
    torch.manual_seed(0)
    p = torch.tensor([0.0, 0.8, 0.2]).expand(4000, 1, 3)
    assert (Tokens("ab").draw(p, 1.0).mean((0, 1)) - p[0, 0]).abs().max() < 0.03
    assert (Tokens("ab").draw(p, 2.0).mean((0, 1)) - torch.tensor([0, 2 / 3, 1 / 3])).abs().max() < 0.03
    one = Tokens("ab").vectors(torch.tensor([[0, 1, 2]]))
    assert torch.equal(Tokens("ab").draw(one, 9.0), one)


@pytest.fixture(scope="module")
def varied(tmp_path_factory):
    """A thinker, untrained but random, for chains of different lengths, and its problems."""
    path = write_gsm(tmp_path_factory.mktemp("gsm") / "gsm.jsonl")
    cfg = reason.Config(dataset=str(path), width=32, depth=1, steps=3)
    problems = load_problems(str(path))
    torch.manual_seed(0)
    thinker = reason.build(cfg, reason.problem_facts(cfg, problems), {}, CPU)
    for p in thinker.model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return thinker, problems


def test_the_question_is_never_noised_and_padding_never_counts(varied):
    thinker, problems = varied
    split = thinker.encode(problems.question, problems.thoughts)
    assert set(split.count.tolist()) == {2, 3}
    contexts = []

    def spy(xt, t, y, *guess):
        contexts.append(y.context[:, : thinker.layout.q])
        return thinker.model(xt, t, y, *guess)

    def loss(q, r):
        torch.manual_seed(3)
        return thinker.process.loss(spy, *thinker.layout.chain(thinker.codec, q, r, split.count))

    base = loss(split.q, split.r)
    assert torch.equal(contexts[0], thinker.codec.vectors(split.q))
    assert torch.equal(contexts[0][split.q >= 0].argmax(-1), split.q[split.q >= 0])
    q, r = split.q.clone(), split.r.clone()
    q[split.q < 0] = 5  # padding of the question, were it a letter, is hidden all the same ...
    known = reason.known
    reason.known = lambda _: split.q >= 0
    try:
        torch.testing.assert_close(loss(q, r), base)
    finally:
        reason.known = known
    r[~(thinker.layout.block < split.count[:, None])] = 5  # ... and so is a thought that a chain does not have
    torch.testing.assert_close(loss(split.q, r), base)
    r[:, 0] = 5
    assert abs(loss(split.q, r) - base) > 1e-3


def test_a_batch_thinks_what_each_question_thinks_alone(varied):
    thinker, problems = varied
    q = thinker.encode(problems.question[:4], problems.thoughts[:4]).q
    alone = torch.cat([thinker.think(q[i : i + 1], 0) for i in range(4)])
    assert torch.equal(thinker.think(q, 0), alone)


@pytest.mark.parametrize("passes", ["multi", "single"])
def test_training_and_sampling_ask_the_same_thing(varied, passes):
    """The logits for a thought still all masked, given the true ones before: in the one pass of training, and from the cache of sampling."""
    thinker, problems = varied
    torch.manual_seed(0)
    thinker = reason.build(dataclasses.replace(thinker.cfg, passes=passes, steps=1, precision="fp32"), thinker.facts, {}, CPU)
    for p in thinker.model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    long = [i for i, t in enumerate(problems.thoughts) if len(t) == 3][:3]
    split = thinker.encode([problems.question[i] for i in long], [problems.thoughts[i] for i in long])
    x0, y = thinker.layout.chain(thinker.codec, split.q, split.r, split.count)
    trained, asked, forward = thinker.model(torch.zeros_like(x0), None, y), [], thinker.model.forward
    thinker.model.forward = lambda *args: asked.append(forward(*args)) or asked[-1]
    given = list(thinker.layout.cut(x0))[:-1]
    for _ in thinker.steps(split.q, 0, given):
        pass
    torch.testing.assert_close(asked[0], thinker.layout.cut(trained)[-1], rtol=1e-4, atol=1e-4)


def test_thinking_ends_when_every_chain_has_its_answer(varied, monkeypatch):
    thinker, problems = varied
    q = thinker.encode(problems.question[:4], problems.thoughts[:4]).q
    said = iter([["<<1+1=2>>", "#### 3", "#### 4", "3 #### 5"], ["#### 2", "", "", " #### 5"], ["never", "asked", "for", "this"]])
    monkeypatch.setattr(thinker.codec, "decode", lambda x0: next(said))
    states = list(thinker.steps(q, 0))
    assert {i for i, _ in states} == {0, 1} and thinker.layout.n == 3 and states[-1][1].shape[1] == sum(thinker.layout.slots[:2])
    assert next(said)[0] == "never"


def test_given_thoughts_stay_and_steps_end_in_the_chain(varied):
    thinker, problems = varied
    split = thinker.encode(problems.question[:4], problems.thoughts[:4])
    x0 = thinker.codec.vectors(split.r)
    given = list(thinker.layout.cut(x0))[:1]
    assert torch.equal(thinker.think(split.q, 0, given)[:, : thinker.layout.slots[0]], given[0])
    assert thinker.think(split.q[:1], 0).shape == (1, thinker.layout.k, thinker.codec.d)
    *_, (last, states) = thinker.steps(split.q, 0)
    assert last == thinker.layout.n - 1 and torch.equal(states, thinker.think(split.q, 0))
    assert thinker.chains(x0) == [[t for t in chain] for chain in problems.thoughts[:4]]


def test_baselines_chains_come_back_from_their_targets(varied):
    thinker, problems = varied
    sums = load_problems("sums", terms=3, n=50)
    for facts, thoughts in [(thinker.facts, problems.thoughts), (reason.problem_facts(reason.Config(dataset="sums", terms=3), sums), sums.thoughts)]:
        for stage in ("chain", "answer"):
            target = reason.gpt_targets(Tokens(facts["alphabet"]), facts, thoughts, stage)
            chains = reason.gpt_chains(Tokens(facts["alphabet"]), facts, target.tolist(), stage)
            assert chains == [chain if stage == "chain" else chain[-1:] for chain in thoughts]
    assert reason.gpt_chains(Tokens("1"), dict(alphabet="1", varies=True, widths=[1, 1]), [[2], [1, 1]], "chain") == [[], ["1 1"]]  # nothing, and no end


# -- learning -----------------------------------------------------------------------------------------------------------

LEARN = "--dataset sums --terms 3 --train_n 30 --width 64 --depth 2 --batch_size 30 --lr 3e-3 --warmup 20 --no-compare --stage diffusion --sample_every 400 --log_every 100".split()


@pytest.mark.parametrize("flags", [
    ["--max_steps", 600], ["--max_steps", 600, "--passes", "single"], ["--max_steps", 800, "--process", "gaussian", "--self_condition", 0.5],
    ["--max_steps", 1000, "--codec", "latents", "--process", "gaussian", "--predict", "x0", "--k", 2, "--d", 16, "--vae_width", 64, "--vae_depth", 1, "--vae_steps", 300],  # fmt: skip
], ids=["masked", "single-pass", "gaussian", "latents"])  # fmt: skip
def test_a_tiny_task_is_learned_by_heart(flags, tmp_path, cli):
    """Thirty sums of three digits, two thoughts each, the ones that training has: each codec, process and pass mode answers all of them."""
    status, printed = cli("reason", *LEARN, *flags, "--out", tmp_path)
    assert status == 0, printed
    cfg = reason.Config(**load_checkpoint(tmp_path / "diffusion/last.pt", "reason")["config"])
    thinker, _ = reason.load_thinker(cfg, tmp_path / "diffusion/last.pt", CPU)
    problems = load_problems("sums", terms=3, n=30)
    scores = thinker.score(thinker.encode(problems.question, problems.thoughts), 0)
    assert scores["answer"] == scores["chain"] == 1.0, scores


# -- the script ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a small run, all stages, and what it printed."""
    out = tmp_path_factory.mktemp("run") / "sums"
    command = ["reason.py", *SUMS, "--out", out, "--max_steps", 20, "--sample_every", 10, "--score_n", 20]
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_a_run_writes_and_prints_what_it_says(trained):
    out, printed = trained
    for name in ("config.json", "log.csv", "eval.csv", "curve.png", "last.pt", "samples/focus.txt"):
        assert (out / "diffusion" / name).stat().st_size > 50, name
    assert (out / "curves.png").stat().st_size > 5000
    rows = list(csv.DictReader(open(out / "diffusion/eval.csv")))
    assert [int(r["step"]) for r in rows] == [10, 20] and 0 < float(rows[0]["seconds"]) <= float(rows[1]["seconds"])
    for part in ("diffusion, 1 steps", "diffusion, 64 steps", "vote of 2", "at temperature 0.5", "GPT-2, chain", "GPT-2, answer", "problems/s in batches of 1: ", ", 20: ", "unended", "n=20"):
        assert part in printed, part
    focus = (out / "diffusion/samples/focus.txt").read_text().splitlines()
    assert focus[0].startswith("question  ") and "_" in focus[1] and "_" not in focus[-1]


def test_finished_stages_are_loaded(trained, cli, monkeypatch):
    out, _ = trained
    monkeypatch.setattr(reason, "train", None)
    status, printed = cli("reason", *SUMS, "--out", out, "--max_steps", 20, "--score_n", 20)
    assert status == 0 and "is finished: loaded" in printed and "GPT-2, chain" in printed, printed
    for stage in ("all", "score", "diffusion"):
        status, printed = cli("reason", *SUMS, "--out", out, "--max_steps", 20, "--depth", 2, "--stage", stage)
        assert status == 2 and "--depth 2" in printed and "trained with 1" in printed, printed


def test_score_from_prints_the_rows_of_the_run_and_flags_override(trained, cli, tmp_path):
    out, first = trained
    status, printed = cli("reason", "--score_from", out / "diffusion/last.pt")
    bare = lambda text: [line.split("  problems/s")[0] for line in text.splitlines() if line.startswith("  ") and "answer" in line]
    assert status == 0 and bare(printed) == bare(first) and len(bare(first)) == 11
    (tmp_path / "moved.pt").write_bytes((out / "diffusion/last.pt").read_bytes())
    status, printed = cli("reason", "--score_from", tmp_path / "moved.pt", "--score_n", 5, "--votes", 1)
    assert status == 0 and (tmp_path / "chain/last.pt").exists() and "curves.png" not in printed, printed
    status, printed = cli("reason", "--score_from", out / "diffusion/last.pt", "--score_n", 5, "--seed", 1)  # the GPT-2s beside it are still those of its training
    assert status == 0 and "seed 1" in printed and "GPT-2, chain" in printed, printed
    status, printed = cli("reason", "--score_from", out / "diffusion/last.pt", "--score_n", 7, "--no-compare")
    assert status == 0 and "n=7" in printed and "GPT-2" not in printed


def test_sampling_needs_only_the_checkpoint(trained, cli, monkeypatch, tmp_path):
    out, _ = trained
    monkeypatch.setattr(reason, "load_problems", None)
    status, printed = cli("reason", "--sample_from", out / "diffusion/last.pt", "--prompt", "3 + 4 + 5", "--out", tmp_path)
    assert status == 0 and "question  3 + 4 + 5" in printed and "chain     " in printed
    for prompt in ("3 + 4", "3 + 44 + 5", "3 * 4 * 5", "x"):
        status, printed = cli("reason", "--sample_from", out / "diffusion/last.pt", "--prompt", prompt)
        assert status == 2 and "looks like '7 + 7 + 7'" in printed, printed


@pytest.mark.parametrize("flags", [[], LATENTS])
def test_interrupted_and_resumed_ends_with_the_same_bits(flags, tmp_path, cli):
    command = [*SUMS, *flags, "--save_every", 2, "--sample_every", 3, "--stage", "diffusion"]
    assert cli("reason", *command, "--max_steps", 6, "--out", tmp_path / "whole")[0] == 0
    assert cli("reason", *command, "--max_steps", 4, "--out", tmp_path / "half")[0] == 0
    assert cli("reason", *command, "--max_steps", 6, "--resume", "--out", tmp_path / "half")[0] == 0
    a, b = (load_checkpoint(tmp_path / f"{name}/diffusion/last.pt", "reason") for name in ("whole", "half"))
    assert a["step"] == b["step"] == 6 and all(torch.equal(a[part][k], b[part][k]) for part in ("model", "ema") for k in a["ema"])
    scores = [[(r["step"], r["answer"], r["chain"]) for r in csv.DictReader(open(tmp_path / f"{name}/diffusion/eval.csv"))] for name in ("whole", "half")]
    assert scores[0][0][0] == "3" and scores[0][-1] == scores[1][-1] and len(scores[0]) == 2


def test_the_seconds_of_the_vae_are_the_diffusions_too(tmp_path, cli):
    command = [*SUMS, *LATENTS, "--stage", "diffusion", "--max_steps", 3, "--out", tmp_path]
    assert cli("reason", *command)[0] == 0
    (tmp_path / "diffusion/last.pt").unlink()
    torch.save(load_checkpoint(tmp_path / "vae/last.pt", "reason") | dict(seconds=1000.0), tmp_path / "vae/last.pt")
    assert cli("reason", *command)[0] == 0
    assert 1000 < load_checkpoint(tmp_path / "diffusion/last.pt", "reason")["seconds"] < 1100


def test_a_training_ends_after_its_seconds_and_goes_on_when_given_more(tmp_path, cli):
    command = [*SUMS, "--stage", "diffusion", "--max_steps", 100_000, "--log_every", 5, "--out", tmp_path]
    assert cli("reason", *command, "--seconds", 0.5)[0] == 0
    first = load_checkpoint(tmp_path / "diffusion/last.pt", "reason")
    assert 0.5 <= first["seconds"] < 5 and first["step"] < 1000 and first["step"] % 5 == 0
    assert "is finished" in cli("reason", *command, "--seconds", 0.5)[1]
    assert cli("reason", *command, "--seconds", first["seconds"] + 0.5, "--resume")[0] == 0
    status, printed = cli("reason", *command[:-1], tmp_path / "latents", *LATENTS, "--seconds", 0.1)  # its VAE leaves it nothing but the first steps
    assert status == 0 and load_checkpoint(tmp_path / "latents/diffusion/last.pt", "reason")["step"] >= 5, printed
    assert load_checkpoint(tmp_path / "diffusion/last.pt", "reason")["step"] > first["step"]


def test_snapshots_stand_in_the_context_but_not_in_the_target(monkeypatch, tmp_path, cli):
    seen = []
    chain = reason.Layout.chain

    def spy(self, codec, q, r, count, snapshots=None):
        x0, y = chain(self, codec, q, r, count, snapshots)
        if snapshots is not None:
            seen.append(((x0 == codec.vectors(r)).all(), (y.context[:, self.q :] != x0[:, : self.c]).any((1, 2)).float().mean()))
        return x0, y

    monkeypatch.setattr(reason.Layout, "chain", spy)
    assert cli("reason", *SUMS, "--snapshot", 1, "--max_steps", 20, "--stage", "diffusion", "--out", tmp_path)[0] == 0
    assert len(seen) == 20 and all(same for same, _ in seen) and sum(share for _, share in seen) / 20 > 0.55


@pytest.mark.parametrize("predict", ["token", "x0", "v"])
def test_snapshots_of_any_prediction(predict, tmp_path, cli):
    """The guess of x0 may be anything, 0 everywhere at first."""
    status, printed = cli("reason", *SUMS, "--process", "gaussian", "--predict", predict, "--snapshot", 1, "--max_steps", 3, "--stage", "diffusion", "--out", tmp_path)
    assert status == 0, printed


def test_the_experiment_on_self_correction(tmp_path, cli):
    status, printed = cli("reason", *SUMS, "--stage", "correct", "--max_steps", 3, "--score_n", 20, "--out", tmp_path)
    assert status == 0, printed
    for name in ("snapshot 0   ", "snapshot 0.5 "):
        assert sum(line.startswith(name) for line in printed.splitlines()) == 2  # nothing spoilt, thought 1 spoilt
    assert (tmp_path / "correct.png").stat().st_size > 5000 and "second round" in printed


def test_one_digit_is_spoilt():
    import random

    rng = random.Random(0)
    for _ in range(50):
        bad = reason.spoil("+ 0 4 8 ( 1 )", "0148", rng)
        differ = [i for i, (a, b) in enumerate(zip("+ 0 4 8 ( 1 )", bad)) if a != b]
        assert len(differ) == 1 and bad[differ[0]] in "0148"


def test_latents_and_gsm8k_run(tmp_path, cli):
    path = write_gsm(tmp_path / "gsm.jsonl")
    for flags in ([], ["--passes", "single"], ["--process", "gaussian", "--form", "text"], LATENTS, [*LATENTS, "--passes", "single"]):
        status, printed = cli("reason", "--dataset", path, *SMALL_REASON, *flags, "--max_steps", 2, "--score_n", 5, "--log_every", 2, "--out", tmp_path / f"out{len(flags)}")
        assert status == 0 and "GPT-2, answer" in printed, printed
    status, printed = cli("reason", "--dataset", path, *SMALL_REASON, "--stage", "correct", "--max_steps", 2, "--score_n", 5, "--out", tmp_path / "correct")
    assert status == 0 and "thought 1 spoilt" in printed, printed
    status, printed = cli("reason", "--sample_from", tmp_path / "out0/diffusion/last.pt", "--prompt", "Tom has 3 pens and buys 995. How many?")
    assert status == 0 and "chain     " in printed, printed
    status, printed = cli("reason", "--sample_from", tmp_path / "out0/diffusion/last.pt", "--prompt", "Zoë?")
    assert status == 2 and "'ë'" in printed and "has never seen" in printed, printed


def test_what_the_vae_writes_of_codes_of_noise_can_be_read_again():
    facts = dict(alphabet="0123", widths=[3, 3, 3], varies=False)
    cfg = reason.Config(codec="latents", process="gaussian", predict="v", k=2, d=4, vae_width=16, vae_depth=1, width=32, depth=1, steps=2)
    vae = reason.build_vae(cfg, facts, CPU)
    for p in vae.parameters():
        torch.nn.init.normal_(p, std=0.5)
    for passes in ("multi", "single"):
        thinker = reason.build(dataclasses.replace(cfg, passes=passes), facts, dict(vae=vae.state_dict(), mean=torch.zeros(2, 4), std=torch.ones(2, 4)), CPU)
        assert thinker.think(thinker.encode(["0 1"] * 40, [[]] * 40).q, 0).shape == (40, 4, 4)
        assert any(len(text) > 2 for text in thinker.codec.decode(torch.randn(40, 2, 4)))


def test_a_checkpoint_is_sampled_with_the_settings_of_its_own_process(tmp_path, cli):
    assert cli("reason", *SUMS, "--process", "gaussian", "--T", 2000, "--max_steps", 2, "--stage", "diffusion", "--out", tmp_path)[0] == 0
    status, printed = cli("reason", "--sample_from", tmp_path / "diffusion/last.pt", "--prompt", "1 + 2 + 3", "--sampler", "dpm++", "--steps", 1500)
    assert status == 0 and "chain     " in printed, printed


def test_two_processes(tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "reason.py", *SUMS, "--out", tmp_path, "--max_steps", 4, "--sample_every", 2, "--log_every", 1, "--score_n", 5]
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and load_checkpoint(tmp_path / "diffusion/last.pt", "reason")["step"] == 4, done.stderr
    assert done.stdout.count("score: ") == done.stdout.count("GPT-2, answer") == done.stdout.count("is finished") + 1 == 1, done.stdout


@pytest.mark.parametrize("flags, wanted", [
    (["--prompt", "1 + 1"], "add --sample_from"), (["--lr", "fast"], "lr"), (["--stepz", 3], "stepz"), (["--codec", "words"], "words"), (["--steps", 0], "steps must be in [1, 1000], got 0"),
    (["--digits", 0, 2], "digits must be two numbers in 1..8, got (0, 2)"), (["--digits", 3], "digits"), (["--terms", 1], "terms must be in [2"),
    (["--codec", "latents"], "has no tokens to mask"), (["--codec", "latents", "--process", "gaussian"], "add --process gaussian --predict v"),
    (["--weight", "min-snr"], "--weight min-snr is not one of --process masked"), (["--sampler", "ddim"], "--sampler ddim is not one of --process masked"),
    (["--snapshot", 0.5, "--passes", "single"], "needs --passes multi"), (["--dataset", "sudoku"], "no data set 'sudoku'"), (["--dataset", "gsm8k"], "could not be had from the hub"),
    (["--dataset", "no.txt"], "no file no.txt"), (["--dataset", "sums", "--terms", 2, "--batch_size", 500], "86 training problems, fewer than a batch of 500"),
    (["--dataset", "no.jsonl"], "no file no.jsonl; without a network use --dataset sums"), (["--dataset", "."], "has no train.jsonl"), (["--temperature", -1], "temperature must be in [0"),
    (["--stage", "correct", "--passes", "single"], "needs --passes multi"), (["--stage", "correct", "--dataset", "sums", "--terms", 2], "needs test problems with a thought"), (["--sample_from", "no.pt"], "no checkpoint at no.pt"), (["--max_thoughts", 2], "3 thoughts, more than"),
])  # fmt: skip
def test_mistake_is_one_message_and_status_2(flags, wanted, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, printed = cli("reason", *flags)
    assert status == 2 and "Traceback" not in printed, printed
    assert wanted in " ".join(printed.replace("│", " ").split()), printed


@pytest.mark.parametrize("rows, wanted", [
    (GSM[:3] + [dict(question="How?", answer="I do not know.")], "row 4: no '#### number'"), (GSM[:3] + [dict(question="", answer="#### 3")], "row 4: question is ''"),
    ([dict(prompt="x", answer="#### 3")], "question is None"), (GSM + [dict(question="x" * 1001, answer="#### 3")], "has 1001 characters"),
    (GSM[:1], "both must be at least 1"), ([dict(question=f"{i}?", answer=f"It is so.\n#### {i}") for i in range(20)], "no <<equation>> in any answer: add --form text"),
])  # fmt: skip
def test_file_with_a_mistake_is_named(rows, wanted, tmp_path, cli):
    status, printed = cli("reason", "--dataset", write_gsm(tmp_path / "gsm.jsonl", rows), *SMALL_REASON, "--out", tmp_path / "out")
    assert status == 2 and wanted in printed and "gsm" in printed, printed


def test_checkpoints_that_do_not_fit_are_refused(trained, cli, tmp_path):
    out, _ = trained
    for flags, wanted in [(["--codec", "latents", "--process", "gaussian", "--predict", "v"], "--codec latents, but"), (["--width", 64], "--width 64, but"), (["--terms", 4], "--terms 4, but")]:
        status, printed = cli("reason", "--score_from", out / "diffusion/last.pt", *flags)
        assert status == 2 and wanted in printed, printed
    status, printed = cli("reason", "--score_from", out / "chain/last.pt")
    assert status == 2 and "checkpoint of a chain" in printed
    status, printed = cli("reason", *SUMS, "--out", out, "--max_steps", 30, "--terms", 4)
    assert status == 2 and "--terms 4" in printed


def test_help_shows_every_field_with_its_own_comment(cli):
    status, printed = cli("reason", "--help")
    text = "".join(printed.replace("│", " ").split())
    assert status == 0
    for field in dataclasses.fields(reason.Config):
        assert f"--{field.name}" in text, field.name
        comment = next(line for line in (ROOT / "reason.py").read_text().splitlines() if line.startswith(f"    {field.name}: ")).split("  # ")[1]
        assert "".join(comment.split())[:40] in text, field.name
