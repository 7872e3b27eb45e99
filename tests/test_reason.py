"""reason.py as a user runs it: chains as ids, training, sampling, scores, mistakes; and bench/reason.py."""

import csv
import dataclasses
import random
import re
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from conftest import ROOT, SMALL_REASON
from test_tasks import GSM, write_jsonl

import reason
from bench import reason as bench
from blocks import generate
from diffusion import Masked
from files import load_checkpoint
from tasks import END, Tokens, load_problems

CPU = torch.device("cpu")
SUMS = ["--dataset", "sums", "--terms", 3, *SMALL_REASON, "--score_n", 20]


@pytest.fixture(scope="module")
def varied(tmp_path_factory):
    """A model with random weights for chains of two or three thoughts: Config, facts, model, problems."""
    path = write_jsonl(tmp_path_factory.mktemp("gsm") / "gsm.jsonl")
    cfg, problems = reason.Config(dataset=str(path), width=32, depth=1, steps=3), load_problems(str(path))
    facts = reason.chain_facts(problems, spaces=True)
    model = reason.build(cfg, facts, CPU)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return cfg, facts, model.eval(), problems


def questions_of(facts, problems, n):
    ids = reason.encode(facts, problems.question_test[:n], problems.thoughts_test[:n])
    return ids[:, : facts["widths"][0]]


# -- chains as ids ---------------------------------------------------------------------------------------


def test_chains_of_any_length_come_back_from_their_ids(varied):
    _, facts, _, problems = varied
    ids = reason.encode(facts, problems.question, problems.thoughts)
    q, xt = ids[:, : facts["widths"][0]], ids[:, facts["widths"][0] :]
    assert reason.decode(facts, xt) == problems.thoughts
    assert Tokens(facts["alphabet"]).decode(q) == problems.question
    short = [len(chain) == 2 for chain in problems.thoughts]
    assert (xt[short, -facts["widths"][-1] :] == END).all()
    assert {2, 3} == set(map(len, problems.thoughts))


def test_what_stands_behind_the_answer_is_no_part_of_a_chain(varied):
    facts = varied[1]
    thoughts = [
        ["<<1+1=2>>", "#### 2", "#### 3"],
        ["#### 5", "<<1+1=2>>", "#### 3"],
        ["<<1*1=1>>", "3 #### 5", ""],
    ]
    ids = reason.encode(facts | dict(widths=[1, 11, 11, 11]), ["0"] * 3, thoughts)[:, 1:]
    chains = reason.decode(facts | dict(widths=[1, 11, 11, 11]), ids)
    assert chains == [["<<1+1=2>>", "#### 2"], ["#### 5"], ["<<1*1=1>>", "3 #### 5", ""]]


def test_facts_know_widths_alphabet_and_what_a_question_looks_like():
    facts = reason.chain_facts(load_problems("mult", (3, 2), n=500), spaces=False)
    assert facts["widths"] == [6, 4, 6, 6]
    assert set(facts["alphabet"]) == set("0123456789*+\x01")
    assert facts["example"] == "7 7 7 * 7 7"
    mixed = dataclasses.replace(load_problems("sums", n=50), question=["1 + 2", "1 + 2 + 3"] * 25)
    assert reason.chain_facts(mixed, spaces=False)["example"] is None


# -- thinking --------------------------------------------------------------------------------------------


def test_thinking_ends_when_every_chain_has_its_answer(varied, monkeypatch):
    cfg, facts, model, problems = varied
    answer, said = Tokens(facts["alphabet"]).ids("####")[0], []

    def generate(model, q, xt, **_):
        """Thoughts of one letter; the second of the first chain and all of the other are answers."""
        xt = torch.full((2, model.layout.k), model.mask_id)
        start = 0
        for i, width in enumerate(model.layout.widths):
            xt[:, start : start + width] = 2
            xt[1, start] = answer
            xt[0, start] = answer if i == 1 else 2
            start += width
            said.append(i)
            yield i, xt

    monkeypatch.setattr(reason, "generate", generate)
    chains = reason.chains_of(cfg, facts, model, questions_of(facts, problems, 2), 0)
    assert [len(chain) for chain in chains] == [2, 1]
    assert said == [0, 1]
    assert len(model.layout.widths) == 3


def test_many_questions_give_the_chains_of_each(varied):
    cfg, facts, model, problems = varied
    q = questions_of(facts, problems, 3)
    alone = [reason.chains_of(cfg, facts, model, q[i : i + 1], 0)[0] for i in range(3)]
    assert reason.chains_of(cfg, facts, model, q, 0) == alone
    assert len(reason.chains_of(cfg, facts, model, q[:1].expand(2001, -1), 0)) == 2001


def test_settings_of_sampling_reach_the_chain(varied):
    cfg, facts, model, problems = varied
    q, last = questions_of(facts, problems, 3), {}
    for name, value in [("steps", 2), ("steps", 5), ("order", "random"), ("temperature", 1.0)]:
        asked = dataclasses.replace(cfg, **{name: value})
        states, again = (list(reason.think(asked, model, q, seed)) for seed in (0, 1))
        last[name, value] = states[-1][1]
        assert len(states) == asked.steps * len(model.layout.widths)
        assert torch.equal(states[-1][1], again[-1][1]) == (name == "steps")
    assert not torch.equal(last["steps", 2], last["steps", 5])
    assert not torch.equal(last["order", "random"], last["temperature", 1.0])


def test_a_chain_comes_into_focus_token_by_token(varied):
    cfg, facts, model, problems = varied
    first, *states, last = reason.focus(cfg, facts, model, problems.question_test[0])
    assert first == f"question  {problems.question_test[0]}"
    left = [state.count("_") for state in states if state.startswith("thought 1")]
    assert all(a > b for a, b in pairwise(left))
    assert left[-1] == 0
    assert last.startswith("chain     ")


# -- training --------------------------------------------------------------------------------------------


@pytest.fixture
def spy(monkeypatch):
    """What each step of training hands to the loss: x0, the clean ids, t."""
    seen = []

    class Spy(Masked):
        def loss(self, model, x0, y, t):
            seen.append((x0, y, t))
            return super().loss(model, x0, y, t)

    monkeypatch.setattr(reason, "Masked", Spy)
    return seen


@pytest.mark.parametrize("passes", ["multi", "single"])
def test_each_thought_has_a_step_of_its_own_and_masks_three_times_the_odds(passes, spy, tmp_path, cli):
    flags = ["--passes", passes, "--max_steps", 40, "--votes", 1, "--out", tmp_path]
    status, printed = cli("reason", *SUMS, *flags)
    assert status == 0, printed
    t = torch.cat([t for _, _, t in spy])
    assert t.shape == (40 * 16, 5)  # thoughts of 2 and of 3 tokens
    assert (t[:, :2] == t[:, :1]).all()
    assert (t[:, 2:] == t[:, 2:3]).all()
    assert torch.corrcoef(t[:, [0, 2]].T)[0, 1].abs() < 0.15
    odds = t[:, 0] / (1 - t[:, 0])
    assert odds.median().item() == pytest.approx(3, rel=0.3)


def test_snapshots_stand_in_the_context_but_not_in_the_target(spy, tmp_path, cli):
    status, printed = cli(
        "reason", *SUMS, "--snapshot", 0.5, "--max_steps", 40, "--votes", 1, "--out", tmp_path
    )
    assert status == 0, printed
    problems = load_problems("sums", terms=3, n=300)
    whole = reason.encode(reason.chain_facts(problems, spaces=False), problems.question, problems.thoughts)
    true = {tuple(ids) for ids in whole.tolist()}
    kept = []
    for x0, y, _ in spy:
        assert all(tuple(ids) in true for ids in torch.cat([y[:, :5], x0], dim=1).tolist())
        kept += (y[:, 5:] == x0[:, :2]).all(1).tolist()
    # Half of the chains; of these some have no mask, or a lucky guess, where the model is asked.
    assert 0.45 < sum(kept) / len(kept) < 0.75


def test_a_small_task_is_learned(tmp_path, cli):
    """Of sums of three digits that it has never seen, where chance is 1 in 28."""
    network = ["--width", 64, "--depth", 2, "--batch_size", 64, "--lr", 3e-3, "--warmup", 50]
    length = ["--max_steps", 450, "--sample_every", 450, "--votes", 1, "--score_n", 200]
    status, printed = cli("reason", "--dataset", "sums", "--terms", 3, *network, *length, "--out", tmp_path)
    assert status == 0, printed
    (row,) = csv.DictReader(open(tmp_path / "eval.csv"))
    assert float(row["answer"]) > 0.6
    rows = re.findall(r"^  (\d+) evaluations +answer ([\d.]+)", printed, re.M)
    assert [int(steps) for steps, _ in rows] == [1, 2, 4, 8, 16, 32, 64]
    assert all(float(answer) > 0.6 for _, answer in rows)
    # While it trains the EMA is scored too, on the same problems: 8 evaluations are the default.
    assert float(row["answer"]) == pytest.approx(float(rows[3][1]), abs=5e-4)


def test_a_chain_made_at_once_is_learned_by_heart(tmp_path, cli):
    network = (
        "--passes single --train_n 20 --width 64 --depth 2 --batch_size 20 --lr 3e-3 --warmup 20".split()
    )
    length = "--max_steps 300 --votes 1 --score_n 1".split()
    status, printed = cli("reason", "--dataset", "sums", "--terms", 3, *network, *length, "--out", tmp_path)
    assert status == 0, printed
    cfg = reason.Config(**load_checkpoint(tmp_path / "last.pt", "reason")["config"])
    model, facts, _ = reason.load_model(cfg, tmp_path / "last.pt", CPU)
    problems = load_problems("sums", terms=3, n=20)
    q = reason.encode(facts, problems.question, problems.thoughts)[:, : facts["widths"][0]]
    chains = reason.chains_of(cfg, facts, model, q, 0)
    assert sum(a == b for a, b in zip(chains, problems.thoughts, strict=True)) >= 18


# -- the script ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a small run, and what it printed."""
    out = tmp_path_factory.mktemp("run") / "sums"
    command = ["reason.py", *SUMS, "--out", out, "--max_steps", 20, "--sample_every", 10]
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def shares(printed):
    """The rows of a score without the rates, which no two runs share."""
    return [line.split("  problems/s")[0] for line in printed.splitlines() if re.match("  .*answer", line)]


def test_a_run_writes_what_it_says(trained):
    out, printed = trained
    for name in ("config.json", "log.csv", "eval.csv", "curve.png", "last.pt", "samples/focus.txt"):
        assert (out / name).stat().st_size > 50, name
    rows = list(csv.DictReader(open(out / "eval.csv")))
    assert [int(row["step"]) for row in rows] == [10, 20]
    assert 0 < float(rows[0]["seconds"]) <= float(rows[1]["seconds"])
    assert len(shares(printed)) == 9  # 1 to 64 evaluations, at a temperature, by vote
    assert printed.count("problems/s in batches of 1: ") == 4


def test_the_last_line_is_a_command_that_answers_a_question(trained):
    out, printed = trained
    command = printed.splitlines()[-1].removeprefix("answer a question: ")
    command = command.replace("python", f"OMP_NUM_THREADS=1 {sys.executable}", 1)
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "chain     " in done.stdout


def test_sampling_needs_only_the_checkpoint(trained, cli, monkeypatch, tmp_path):
    monkeypatch.setattr(reason, "load_problems", None)
    prompt = ["--prompt", "3 + 4 + 5", "--out", tmp_path]
    status, printed = cli("reason", "--sample_from", trained[0] / "last.pt", *prompt)
    assert status == 0, printed
    assert (tmp_path / "samples/focus.txt").read_text().startswith("question  3 + 4 + 5\n")


@pytest.mark.parametrize("prompt", ["3 + 4", "3 + 44 + 5", "3 * 4 * 5", "3+4+5", "x"])
def test_a_prompt_must_look_like_the_training_questions(prompt, trained, cli):
    status, printed = cli("reason", "--sample_from", trained[0] / "last.pt", "--prompt", prompt)
    assert status == 2
    assert "must look like '7 + 7 + 7', least significant digit first" in printed


def test_a_score_from_the_checkpoint_is_that_of_the_run_and_flags_override(trained, cli):
    out, first = trained
    status, printed = cli("reason", "--score_from", out / "last.pt")
    assert status == 0, printed
    assert shares(printed) == shares(first)
    status, printed = cli("reason", "--score_from", out / "last.pt", "--score_n", 7, "--votes", 1)
    assert status == 0, printed
    assert "n=7" in printed
    assert len(shares(printed)) == 7


def test_a_score_on_other_problems_is_refused(trained, cli, monkeypatch):
    more = load_problems("sums", terms=3, n=301)
    monkeypatch.setattr(reason, "load_problems", lambda *args: more)
    status, printed = cli("reason", "--score_from", trained[0] / "last.pt")
    assert status == 2
    assert "is not the data" in printed


def test_a_finished_run_is_loaded_and_other_settings_are_refused(trained, cli, monkeypatch):
    out, first = trained
    monkeypatch.setattr(reason, "train", None)
    status, printed = cli("reason", *SUMS, "--out", out, "--max_steps", 20)
    assert status == 0, printed
    assert shares(printed) == shares(first)
    for flag, value in [("--depth", 2), ("--terms", 4), ("--passes", "single"), ("--shift", 1.0)]:
        status, printed = cli("reason", *SUMS, "--out", out, "--max_steps", 20, flag, value)
        assert status == 2
        assert f"{flag} {value}" in printed


@pytest.mark.parametrize("flags", [[], ["--snapshot", 0.5]])
def test_interrupted_and_resumed_ends_with_the_same_bits(flags, tmp_path, cli):
    command = [*SUMS, *flags, "--save_every", 2, "--sample_every", 3, "--votes", 1, "--score_n", 5]
    assert cli("reason", *command, "--max_steps", 6, "--out", tmp_path / "whole")[0] == 0
    assert cli("reason", *command, "--max_steps", 4, "--out", tmp_path / "half")[0] == 0
    assert cli("reason", *command, "--max_steps", 6, "--resume", "--out", tmp_path / "half")[0] == 0
    whole, half = (load_checkpoint(tmp_path / f"{name}/last.pt", "reason") for name in ("whole", "half"))
    assert whole["step"] == half["step"] == 6
    for part in ("model", "ema"):
        assert all(torch.equal(whole[part][name], half[part][name]) for name in whole[part])
    evals = [list(csv.DictReader(open(tmp_path / f"{name}/eval.csv"))) for name in ("whole", "half")]
    assert [row["step"] for row in evals[0]] == ["3", "6"]
    assert [row["step"] for row in evals[1]] == ["3", "4", "6"]
    assert evals[0][-1]["answer"] == evals[1][-1]["answer"]


def test_what_follows_the_last_checkpoint_is_made_after_a_kill(trained, cli, tmp_path):
    out = tmp_path / "killed"
    shutil.copytree(trained[0], out)
    (out / "curve.png").unlink()
    rows = (out / "eval.csv").read_text().splitlines()
    (out / "eval.csv").write_text("\n".join([*rows[:2], rows[2][:4]]))  # the last row is torn
    command = [*SUMS, "--max_steps", 20, "--sample_every", 10, "--score_n", 5, "--votes", 1, "--out", out]
    status, printed = cli("reason", *command)
    assert status == 0, printed
    assert (out / "curve.png").exists()
    made = (out / "eval.csv").read_text().splitlines()
    assert made[:2] == rows[:2]
    assert [made[2].split(",")[i] for i in (0, 2, 3)] == [rows[2].split(",")[i] for i in (0, 2, 3)]


def test_a_checkpoint_is_loaded_in_one_call(trained):
    process, model, facts = reason.load(trained[0] / "last.pt", device="cpu")
    q = reason.encode(facts, ["1 + 2 + 3"], [[]])[:, : facts["widths"][0]]
    *_, (_, xt) = generate(model, q, steps=2)
    assert xt.shape == (1, sum(facts["widths"][1:])) and (xt != process.mask_id).all()


def test_facts_of_another_type_are_refused(trained, cli, tmp_path):
    for odd in (dict(alphabet=3), dict(widths=[3, "x"]), dict(widths=[10**12, 3]), dict(example=[])):
        state = load_checkpoint(trained[0] / "last.pt", "reason")
        state["facts"] |= odd
        torch.save(state, tmp_path / "last.pt")
        status, printed = cli("reason", "--sample_from", tmp_path / "last.pt", "--prompt", "1 + 2 + 3")
        assert status == 2, (odd, printed)
        assert "last.pt" in printed or "out of memory" in printed


def test_problems_of_a_file_are_learned_and_asked(tmp_path, cli):
    data = ["--dataset", write_jsonl(tmp_path / "gsm.jsonl", GSM), *SMALL_REASON, "--score_n", 3]
    for i, flags in enumerate([[], ["--passes", "single"], ["--form", "text", "--snapshot", 0.5]]):
        status, printed = cli("reason", *data, *flags, "--max_steps", 2, "--out", tmp_path / f"out{i}")
        assert status == 0, printed
        assert len(shares(printed)) == 9
    given = ["--sample_from", tmp_path / "out0/last.pt", "--prompt"]
    assert cli("reason", *given, "Tom has 33 pens and buys 995. How many?")[0] == 0
    status, printed = cli("reason", *given, "Zoë?")
    assert status == 2
    assert "must look like 'Tom has 77 pens and buys 777. How many?'" in printed


def test_the_folder_is_named_after_the_data_set(tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "My Sums.jsonl", GSM)
    status, printed = cli(
        "reason", "--dataset", "My Sums.jsonl", *SMALL_REASON, "--max_steps", 2, "--score_n", 2
    )
    assert status == 0, printed
    assert (tmp_path / "out/my sums/last.pt").exists()
    assert "--sample_from 'out/my sums/last.pt'" in printed


def test_two_processes_train_and_one_prints(tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "reason.py"]
    flags = ["--out", tmp_path, "--max_steps", 4, "--sample_every", 2, "--snapshot", 0.5, "--score_n", 5]
    done = subprocess.run(
        [sys.executable, *map(str, [*launch, *SUMS, *flags])], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(tmp_path / "last.pt", "reason")["step"] == 4
    assert len(shares(done.stdout)) == 9


@pytest.mark.parametrize(
    "flags, wanted",
    [
        (["--prompt", "1 + 1"], "add --sample_from"),
        (["--lr", "fast"], "lr"),
        (["--stepz", 3], "stepz"),
        (["--steps", 0], "steps must be in [1"),
        (["--digits", 0, 2], "digits must be two numbers in 1..8, got (0, 2)"),
        (["--digits", 3], "digits"),
        (["--terms", 1], "terms must be in [2"),
        (["--width", 40], "width must be divisible by 16"),
        (["--snapshot", 0.5, "--passes", "single"], "needs --passes multi"),
        (["--temperature", -1], "temperature must be in [0"),
        (["--dataset", "sudoku"], "no data set 'sudoku'"),
        (["--dataset", "no.txt"], "no file no.txt"),
        (
            ["--dataset", "sums", "--terms", 2, "--batch_size", 500],
            "86 training problems, fewer than a batch of 500",
        ),
        (["--sample_from", "no.pt"], "no checkpoint at no.pt"),
        (["--sample_from", "a.pt", "--score_from", "b.pt"], "no checkpoint at a.pt"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(flags, wanted, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, printed = cli("reason", *flags)
    assert status == 2
    assert "Traceback" not in printed
    assert wanted in " ".join(printed.replace("│", " ").split())


def test_help_shows_every_field_with_its_own_comment(cli):
    status, printed = cli("reason", "--help")
    text = "".join(printed.replace("│", " ").split())
    source = (ROOT / "reason.py").read_text().splitlines()
    assert status == 0
    for field in dataclasses.fields(reason.Config):
        comment = next(line for line in source if line.startswith(f"    {field.name}: ")).split("  # ")[1]
        assert f"--{field.name}" in text, field.name
        assert "".join(comment.split())[:40] in text, field.name


# -- bench/reason.py -------------------------------------------------------------------------------------

SMALL_BENCH = (
    "--run.dataset sums --run.terms 3 --run.width 32 --run.depth 1 --run.batch_size 16 --run.train_n 300"
)
SMALL_BENCH = (
    f"{SMALL_BENCH} --run.score_n 10 --run.sample_every 5 --run.log_every 5 --run.max_steps 5".split()
)


def test_all_are_trained_for_their_seconds_compared_and_then_loaded(tmp_path, cli, monkeypatch):
    command = [*SMALL_BENCH, "--seconds", 0.2, "--out", tmp_path]
    status, printed = cli("bench.reason", *command)
    assert status == 0, printed
    rows = [line.split(" | ") for line in printed.splitlines() if re.match(r"\| (ours|GPT-2), ", line)]
    assert [row[0] for row in rows] == [
        "| ours, multi-pass",
        "| ours, single-pass",
        "| GPT-2, chain",
        "| GPT-2, answer",
    ]
    assert {len(row) for row in rows} == {7}
    assert (tmp_path / "curves.png").stat().st_size > 5000
    for name in ("multi", "single", "chain", "answer"):
        assert 0.2 <= load_checkpoint(tmp_path / name / "last.pt", "reason")["seconds"] < 5
    monkeypatch.setattr(bench, "Run", None)
    monkeypatch.setattr(reason, "Run", None)
    status, again = cli("bench.reason", *command)
    assert status == 0, again
    assert [line for line in again.splitlines() if line.startswith("| ")] == [
        line for line in printed.splitlines() if line.startswith("| ")
    ]
    status, printed = cli("bench.reason", *command, "--run.width", 64)
    assert status == 2
    assert "trained with 32" in printed


def test_a_spoilt_thought_is_followed_by_the_models_own(tmp_path, cli):
    status, printed = cli("bench.reason", *SMALL_BENCH, "--correct", "--out", tmp_path)
    assert status == 0, printed
    lines = (tmp_path / "samples/correct.txt").read_text().splitlines()
    assert [" ".join(line.split()[:-2]) for line in lines[1:]] == [
        "snapshot 0 nothing spoilt",
        "snapshot 0 thought 1 spoilt",
        "snapshot 0.5 nothing spoilt",
        "snapshot 0.5 thought 1 spoilt",
    ]


def test_of_a_chain_all_is_known_up_to_the_spoilt_digit_and_nothing_behind(tmp_path, cli, monkeypatch):
    states = []

    def right_after(cfg, facts, model, problems, xt):
        true = reason.encode(facts, problems.question_test, problems.thoughts_test)
        states.append(((xt != true) & (xt != model.mask_id), xt == model.mask_id))
        return 0.0, 0.0

    monkeypatch.setattr(bench, "right_after", right_after)
    assert cli("bench.reason", *SMALL_BENCH, "--correct", "--out", tmp_path)[0] == 0
    (nothing, all_masked), (one_digit, later_masked) = states[:2]
    assert all_masked.tolist() == [[False] * 5 + [True] * 5] * 10
    assert later_masked.tolist() == [[False] * 7 + [True] * 3] * 10
    assert not nothing.any()
    assert one_digit.sum(1).tolist() == [1] * 10


def test_one_digit_is_spoilt():
    thought, rng = "+ 0 4 8 ( 1 )", random.Random(0)
    for _ in range(50):
        differ = [(a, b) for a, b in zip(thought, bench.spoil(thought, "0148", rng), strict=True) if a != b]
        assert len(differ) == 1
        assert set(differ[0]) <= set("0148")


@pytest.mark.parametrize("ends", [False, True])
def test_what_gpt_2_writes_is_read_as_it_was_written(ends):
    problems = load_problems("sums", terms=3, n=50)
    facts = reason.chain_facts(problems, spaces=False)
    writing = bench.Writing(Tokens(facts["alphabet"]), None if ends else facts["widths"][1:])
    target = writing.encode(problems.thoughts)
    assert [writing.decode(row) for row in target.tolist()] == problems.thoughts
    assert writing.decode([writing.tokens.V]) == []
    assert (target == END).any() == ends
