"""reason.py as a user runs it: chains as ids, training, sampling, scores, mistakes; and bench/reason.py."""

import csv
import dataclasses
import io
import math
import random
import re
import shlex
import shutil
import subprocess
import sys
import zlib
from contextlib import redirect_stdout
from itertools import pairwise

import pytest
import torch
from conftest import ROOT, SMALL_REASON
from test_tasks import GSM, write_jsonl

import puzzles
import reason
import training
from bench import gpt
from bench import reason as bench
from blocks import Layout, generate
from diffusion import Masked
from files import load_checkpoint
from tasks import END, TASKS, Size, Tokens, load_problems

CPU = torch.device("cpu")
FOUR = Size(side=4)
SUMS_OF_3 = Size(terms=3)
SUMS = ["--dataset", "sums", "--terms", 3, *SMALL_REASON, "--score_n", 20]
SUDOKU = "--dataset sudoku --side 4 --width 32 --depth 1 --batch_size 16 --train_n 40 --score_n 20".split()


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


@pytest.fixture(scope="module")
def varied_grids():
    """A model with random weights for grids of 4 x 4: Config, facts, model, problems."""
    with pytest.MonkeyPatch.context() as patch:
        few_test_puzzles(patch)
        problems = load_problems("sudoku", FOUR, n=40)
    cfg = reason.Config(dataset="sudoku", side=4, width=32, depth=1, steps=5, precision="fp32")
    facts = reason.chain_facts(problems, spaces=False, size=FOUR)
    model = reason.build(cfg, facts, CPU)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return cfg, facts, model.eval(), problems


def few_test_puzzles(monkeypatch, n=30):
    """They take a while to make."""
    monkeypatch.setitem(TASKS, "sudoku", dataclasses.replace(TASKS["sudoku"], test_n=n))


@pytest.fixture
def few(monkeypatch):
    few_test_puzzles(monkeypatch)


def questions_of(facts, problems, n):
    return reason.asked(facts, problems.question_test[:n])


def is_grid(ids):
    """Whether ids (16,) are a grid of 4 x 4 that keeps to the rules."""
    return puzzles.check_sudoku("." * 16, "".join(map(str, ids.tolist())))


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
    facts = reason.chain_facts(load_problems("mult", Size((3, 2)), n=500), spaces=False)
    assert facts["widths"] == [6, 4, 6, 6]
    assert set(facts["alphabet"]) == set("0123456789*+\x01")
    assert facts["example"] == "7 7 7 * 7 7"
    mixed = dataclasses.replace(load_problems("sums", n=50), question=["1 + 2", "1 + 2 + 3"] * 25)
    assert reason.chain_facts(mixed, spaces=False)["example"] is None
    assert facts["axes"] is None


def test_of_a_question_all_is_known_but_the_thoughts(varied):
    _, facts, model, problems = varied
    ids = reason.asked(facts, problems.question)
    q = facts["widths"][0]
    assert torch.equal(ids[:, :q], reason.encode(facts, problems.question, problems.thoughts)[:, :q])
    assert ids.shape[1] == sum(facts["widths"])
    assert (ids[:, q:] == model.mask_id).all()


def test_of_a_puzzle_all_is_known_but_the_cells_to_be_found(varied_grids):
    _, facts, model, problems = varied_grids
    ids = reason.asked(facts, problems.question)
    whole = reason.encode(facts, problems.question, problems.thoughts)
    holes = torch.tensor([[c == "." for c in puzzle] for puzzle in problems.question])
    assert torch.equal(ids == model.mask_id, holes)
    assert torch.equal(ids[~holes], whole[~holes])
    assert facts["widths"] == [0, 16]
    assert facts["axes"] == puzzles.cell_axes(4)
    assert "".join(reason.decode(facts, whole)[0][0].split()) == problems.thoughts[0][0]


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
    chosen = [("steps", 2), ("steps", 5), ("order", "margin"), ("order", "random"), ("temperature", 1.0)]
    for name, value in chosen:
        asked = dataclasses.replace(cfg, **{name: value})
        states, again = (list(reason.think(asked, model, q, seed)) for seed in (0, 1))
        last[name, value] = states[-1][1]
        assert len(states) == asked.steps * len(model.layout.widths)
        assert torch.equal(states[-1][1], again[-1][1]) == (name == "steps" or value == "margin")
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


def test_the_clues_of_a_puzzle_stay_while_it_comes_into_focus(varied_grids):
    cfg, facts, model, problems = varied_grids
    ids = questions_of(facts, problems, 20)
    given = ids != model.mask_id
    states = [xt for _, xt in reason.think(cfg, model, ids, 0)]
    assert len(states) == cfg.steps
    for xt in states:
        assert torch.equal(xt[given], ids[given])
    assert (states[-1] != model.mask_id).all()
    assert reason.chains_of(cfg, facts, model, ids, 0) == reason.decode(facts, states[-1])


# -- thinking again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("remask", [1.0, 0.5, 0.1, 0.01])
@pytest.mark.parametrize("problems_of", ["varied", "varied_grids"])
def test_what_is_least_sure_is_masked_again_and_never_what_is_given(
    problems_of, remask, request, monkeypatch
):
    cfg, facts, model, problems = request.getfixturevalue(problems_of)
    ids, q = questions_of(facts, problems, 4), facts["widths"][0]
    to_find = ids[:, q:] == model.mask_id
    x = reason.conclude(cfg, model, ids, 0)
    doubts = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(reason, "doubt", lambda *args: doubts + 2.0 * ~to_find)  # the given ones seem worst
    start = reason.remasked(dataclasses.replace(cfg, remask=remask), model, ids, x, 0)
    hidden = start[:, q:] == model.mask_id
    assert torch.equal(start[:, :q], ids[:, :q])
    assert torch.equal(start[:, q:][~hidden], x[~hidden])
    assert not (hidden & ~to_find).any()
    for row, find, doubt in zip(hidden, to_find, doubts, strict=True):
        assert row.sum() == math.ceil(remask * find.sum().item())
        assert doubt[row].min() > doubt[find & ~row].max() if (find & ~row).any() else True


def test_a_try_that_keeps_some_changes_only_the_rest_and_its_draws_repeat(varied_grids):
    cfg, facts, model, problems = varied_grids
    ids = questions_of(facts, problems, 20)
    x = reason.conclude(cfg, model, ids, 0)
    some, ends = dataclasses.replace(cfg, remask=0.3, temperature=1.0), []
    for seed in (1, 1, 2):
        start = reason.remasked(some, model, ids, x, seed)
        ends.append(reason.conclude(some, model, start, seed))
        assert torch.equal(ends[-1][start != model.mask_id], x[start != model.mask_id])
    assert (ends[0] != model.mask_id).all()
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])
    assert not torch.equal(ends[0], x)


@pytest.mark.parametrize("remask", [1.0, 0.5])
def test_what_is_right_is_kept_and_the_rest_tried_again(remask, varied_grids, monkeypatch):
    """Of 12 puzzles the first try solves four, and each later one the first of those that are left."""
    cfg, facts, model, problems = varied_grids
    questions, n = problems.question_test[:12], 12
    ids = reason.asked(facts, questions)
    truth = reason.encode(facts, questions, problems.thoughts_test[:12])
    place = {tuple(row): i for i, row in enumerate(ids.tolist())}
    wrong, calls = truth % 4 + 1, []

    def rows_of(ids):
        return [place[tuple(row)] for row in ids.tolist()]

    def remasked(cfg, model, ids, x, seed):
        """All but the first two cells are kept."""
        assert torch.equal(x, wrong[rows_of(ids)])
        start = wrong[rows_of(ids)].clone()
        start[:, :2] = model.mask_id
        place.update({tuple(row): i for row, i in zip(start.tolist(), rows_of(ids), strict=True)})
        return start

    def conclude(cfg, model, ids, seed):
        calls.append((cfg.temperature, len(ids), seed, (ids == model.mask_id).sum(1).max().item()))
        solved = torch.arange(n) % 3 == 0 if len(calls) == 1 else torch.arange(len(ids)) == 0
        return torch.where(solved[:, None], truth[rows_of(ids)], wrong[rows_of(ids)])

    monkeypatch.setattr(reason, "remasked", remasked)
    monkeypatch.setattr(reason, "conclude", conclude)
    cfg = dataclasses.replace(cfg, tries=4, seed=7, remask=remask)
    spent, chains, right = zip(*reason.tries(cfg, facts, model, ids, questions, problems.check), strict=True)
    temperature, many, seeds, masked = zip(*calls, strict=True)
    assert temperature == (0.0, *[cfg.try_temperature] * 3)
    assert many == (12, 8, 7, 6)
    assert len(set(seeds)) == 4
    assert all(most == 2 for most in masked[1:]) == (remask < 1)
    # A cell an evaluation, at most 5 evaluations; two more for the doubts where some cells are kept.
    each = 5 if remask == 1 else 2 + 2
    assert spent == pytest.approx([5 + each * rows / 12 for rows in (0, 8, 15, 21)])
    assert right[0] == [i % 3 == 0 for i in range(n)]
    assert list(map(sum, right)) == [4, 5, 6, 7]
    for passed, found in zip(right, chains, strict=True):
        assert found == reason.decode(facts, torch.where(torch.tensor(passed)[:, None], truth, wrong))


@pytest.mark.parametrize("steps", [1, 3, 64])
@pytest.mark.parametrize("problems_of", ["varied", "varied_grids"])
def test_evaluations_are_those_that_each_problem_takes_alone(problems_of, steps, request, monkeypatch):
    cfg, facts, model, problems = request.getfixturevalue(problems_of)
    cfg, read, calls = dataclasses.replace(cfg, steps=steps), model.read, []
    ids = questions_of(facts, problems, 4)
    ids[1, facts["widths"][0] :] = 1  # nothing is to be found
    ids[2, facts["widths"][0] + 3 :] = 1
    monkeypatch.setattr(model, "read", lambda *args: calls.append(1) or read(*args))
    for i in range(4):
        reason.conclude(cfg, model, ids[i : i + 1], 0)
    assert reason.evaluations(cfg, model, ids) == len(calls)


@pytest.mark.parametrize("remask", [1.0, 0.5])
@pytest.mark.parametrize("problems_of", ["varied", "varied_grids"])
def test_right_answers_never_fall_from_try_to_try(problems_of, remask, request):
    cfg, facts, model, problems = request.getfixturevalue(problems_of)
    cfg, questions = dataclasses.replace(cfg, tries=6, remask=remask), problems.question_test[:25]

    def check(question, chain):  # right now and then
        return zlib.crc32("".join(chain).encode()) % 4 == 0

    before, last, sums = [False] * len(questions), 0, []
    for spent, _, right in reason.tries(cfg, facts, model, reason.asked(facts, questions), questions, check):
        assert all(now >= then for now, then in zip(right, before, strict=True))
        assert spent > last or all(before)
        before, last = right, spent
        sums.append(sum(right))
    assert sums[-1] > sums[0]


@pytest.mark.parametrize("remask", [1.0, 0.5])
def test_where_all_is_right_nothing_is_spent_on_more_tries(remask, varied_grids):
    cfg, facts, model, problems = varied_grids
    cfg, ids = dataclasses.replace(cfg, tries=3, remask=remask), questions_of(facts, problems, 4)
    found = list(reason.tries(cfg, facts, model, ids, problems.question_test[:4], lambda *_: True))
    assert [(spent, right) for spent, _, right in found] == [(5, [True] * 4)] * 3


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
    problems = load_problems("sums", SUMS_OF_3, n=300)
    whole = reason.encode(reason.chain_facts(problems, spaces=False), problems.question, problems.thoughts)
    true = {tuple(ids) for ids in whole.tolist()}
    kept = []
    for x0, y, _ in spy:
        assert all(tuple(ids) in true for ids in torch.cat([y[:, :5], x0], dim=1).tolist())
        kept += (y[:, 5:] == x0[:, :2]).all(1).tolist()
    # Half of the chains; of these some have no mask, or a lucky guess, where the model is asked.
    assert 0.45 < sum(kept) / len(kept) < 0.75


def test_grids_are_turned_with_their_clues(varied_grids):
    cfg, facts, _, problems = varied_grids
    x0 = reason.encode(facts, problems.question, problems.thoughts)
    known = reason.asked(facts, problems.question) != len(facts["alphabet"]) + 1
    torch.manual_seed(0)
    grids, clues = reason.turned(cfg, problems, x0, known)
    assert all(map(is_grid, grids))
    assert torch.equal(clues.sum(1), known.sum(1))
    assert (grids != x0).any(1).all()
    for grid, clue in zip(grids.tolist(), clues.tolist(), strict=True):
        puzzle = "".join(str(digit) if known else "." for digit, known in zip(grid, clue, strict=True))
        assert list(puzzles.solutions(puzzle, 4)) == ["".join(map(str, grid))]


def test_a_puzzle_is_learned_from_full_grids_in_all_their_symmetries(spy, few, tmp_path, cli):
    flags = ["--max_steps", 20, "--score_n", 1, "--masks", 0.3, 0.6, "--out", tmp_path]
    status, printed = cli("reason", *SUDOKU, *flags)
    assert status == 0, printed
    x0, y, t = (torch.cat(part) for part in zip(*spy, strict=True))
    assert y.shape == (20 * 16, 0)
    assert all(map(is_grid, x0))
    assert len(x0.unique(dim=0)) > 150  # of 288 that there are
    assert (t == t[:, :1]).all()
    assert 0.3 <= t.min() < 0.32
    assert 0.58 < t.max() <= 0.6


def test_a_small_task_is_learned(tmp_path, cli):
    """Of sums of three digits that it has never seen, where chance is 1 in 28."""
    network = ["--width", 64, "--depth", 2, "--batch_size", 64, "--lr", 3e-3, "--warmup", 20]
    length = ["--max_steps", 300, "--sample_every", 300, "--votes", 1, "--score_n", 200]
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
    length = "--max_steps 120 --votes 1 --score_n 1".split()
    status, printed = cli("reason", "--dataset", "sums", "--terms", 3, *network, *length, "--out", tmp_path)
    assert status == 0, printed
    cfg = reason.Config(**load_checkpoint(tmp_path / "last.pt", "reason")["config"])
    model, facts, _ = reason.load_model(cfg, tmp_path / "last.pt", CPU)
    problems = load_problems("sums", SUMS_OF_3, n=20)
    chains = reason.chains_of(cfg, facts, model, reason.asked(facts, problems.question), 0)
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
    more = load_problems("sums", SUMS_OF_3, n=301)
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


@pytest.mark.parametrize(
    "flags", [SUMS, [*SUMS, "--snapshot", 0.5], SUDOKU], ids=["chains", "snapshots", "puzzles"]
)
def test_interrupted_and_resumed_ends_with_the_same_bits(flags, few, tmp_path, cli):
    command = [*flags, "--save_every", 2, "--sample_every", 3, "--votes", 1, "--score_n", 5]
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
    odd_axes = [dict(axes=axes) for axes in (3, [3], [[0, 1]], [["x"]] * 10, [[0], [0, 1]] * 5)]
    for odd in (
        dict(alphabet=3),
        dict(widths=[3, "x"]),
        dict(widths=[10**12, 3]),
        dict(example=[]),
        *odd_axes,
    ):
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


@pytest.mark.parametrize("flags", [[], ["--passes", "multi", "--terms", 2]])
def test_countdown_is_trained_and_asked(flags, tmp_path, cli, monkeypatch):
    monkeypatch.setitem(TASKS, "countdown", dataclasses.replace(TASKS["countdown"], test_n=30))
    command = ["--dataset", "countdown", *SMALL_REASON, "--max_steps", 2, "--score_n", 3, *flags]
    status, printed = cli("reason", *command, "--out", tmp_path)
    assert status == 0, printed
    assert len(shares(printed)) == 9
    command = printed.splitlines()[-1]
    status, printed = cli("reason", *shlex.split(command)[5:])
    assert status == 0, printed


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
        (["--dataset", "sodoku"], "no data set 'sodoku'"),
        (["--dataset", "sudoku", "--side", 5], "side"),
        (["--masks", 0.8, 0.2], "masks must be two shares, the smaller first, got (0.8, 0.2)"),
        (["--masks", 0.5, 1.5], "masks must be two shares"),
        (["--tries", 0], "tries must be in [1"),
        (["--remask", 0], "remask must be in [0.01, 1"),
        (["--remask", 1.5], "remask must be in [0.01, 1"),
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


@pytest.mark.parametrize("dataset", ["mult", *reason.RECIPES])
def test_a_data_set_has_defaults_of_its_own_and_flags_override_them(dataset, monkeypatch):
    def config(*flags):
        monkeypatch.setattr(sys, "argv", ["reason.py", "--dataset", dataset, *flags])
        return training.read_config(reason.Config, "")

    own = dataclasses.replace(reason.Config(dataset=dataset), **reason.RECIPES.get(dataset, {}))
    assert config() == own
    given = dict(depth=3, terms=5, steps=5, passes="multi", max_steps=9)
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    assert config(*flags, "--masks", "0.1", "0.9") == dataclasses.replace(own, **given, masks=(0.1, 0.9))


# -- puzzles ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def solver(tmp_path_factory):
    """The folder of a run that learns puzzles of 4 x 4, and what it printed."""
    out = tmp_path_factory.mktemp("run") / "sudoku"
    network = dict(width=48, depth=2, batch_size=32, lr=4e-3, warmup=20, precision="fp32", seed=2)
    length = dict(train_n=200, max_steps=100, sample_every=100, score_n=60, out=str(out))
    cfg = reason.Config(dataset="sudoku", side=4, **reason.RECIPES["sudoku"] | network | length)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        few_test_puzzles(patch, 60)
        reason.main(cfg)
    return out, printed.getvalue()


def table(printed):
    """The table of a score of puzzles: for each order (evaluations, share that is solved) of its rows."""
    head, _, *rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    numbers, found = [int(re.search(r"n=(\d+)", name)[1]) for name in head[2:]], {}
    for name, spent, *shares in rows:
        solved = sum(float(share) * n for share, n in zip(shares, numbers, strict=True)) / sum(numbers)
        found.setdefault(name, []).append((float(spent), solved))
    return found


def test_a_puzzle_is_learned_and_solved_best_with_the_surest_cell_first(solver):
    rows = table(solver[1])
    (last,) = csv.DictReader(open(solver[0] / "eval.csv"))
    assert float(last["answer"]) > 0.8
    at_once, one_by_one = (
        [rows[order][i][1] for order in ("confident", "margin", "random")] for i in (0, -1)
    )
    assert min(one_by_one[:2]) > 0.8
    assert max(at_once) < min(one_by_one[:2])
    assert one_by_one[2] < min(one_by_one[:2])


def test_a_run_of_puzzles_writes_what_it_says(solver):
    out, printed = solver
    for name in ("config.json", "log.csv", "curve.png", "last.pt", "samples/focus.txt", "samples/focus.png"):
        assert (out / name).stat().st_size > 50, name
    question, *grids = (out / "samples/focus.txt").read_text().splitlines()
    assert puzzles.clues_of(question.split()[1]) in printed
    cells = [line.split() for line in grids]
    clues, *_, answer = ("".join("".join(row[i : i + 4]) for row in cells) for i in (0, 4, 8, 12))
    assert clues.replace("_", ".") == question.split()[1]
    assert "_" not in answer


@pytest.fixture
def ask(solver, tmp_path, cli):
    """ask(prompt, ...) answers a puzzle from the checkpoint: (exit status, what it printed)."""

    def call(prompt, *flags):
        given = ["--sample_from", solver[0] / "last.pt", "--prompt", prompt]
        return cli("reason", *given, *flags, "--out", tmp_path)

    return call


def grids_of(printed):
    """The first and the last of the four grids that were printed."""
    rows = [line.split() for line in printed.splitlines() if re.match(r"([\d_]\s+){15}", line)]
    assert len(rows) == 4
    return "".join("".join(row[:4]) for row in rows), "".join("".join(row[12:]) for row in rows)


@pytest.mark.parametrize(
    "prompt", ["1 2 3 0\n3 0 1 2\n2 1 0 3\n0 3 2 1", "12|3.\n34|12\n--+--\n21|4_\n4.|21"]
)
def test_a_puzzle_is_answered_however_it_is_written(prompt, ask, tmp_path):
    status, printed = ask(prompt)
    assert status == 0, printed
    clues, answer = grids_of(printed)
    assert clues == re.sub("[0.]", "_", re.sub(r"[\s|+-]", "", prompt))
    assert answer == "1234341221434321"
    assert "more than one solution" not in printed
    assert (tmp_path / "samples/focus.png").stat().st_size > 5000


def test_a_puzzle_with_more_than_one_solution_is_said_to_have_it(ask):
    status, printed = ask("1" + "." * 15)
    assert status == 0, printed
    assert "more than one solution" in printed
    clues, answer = grids_of(printed)
    assert clues == "1" + "_" * 15
    assert answer[0] == "1"


def test_a_full_grid_is_its_own_answer(ask):
    status, printed = ask("1234341221434321")
    assert status == 0, printed
    assert grids_of(printed) == ("1234341221434321",) * 2


@pytest.mark.parametrize(
    "prompt, wanted",
    [
        ("12.4", "has 4 cells, but this model was trained for 4 x 4 = 16 cells"),
        ("." * 81, "has 81 cells"),
        ("1" + "." * 14 + "5", "the puzzle has '5': give digits 1 to 4"),
        ("solve" + "." * 11, "the puzzle has 'e', 'l', 'o', 's', 'v'"),
        ("1" + "." * 14 + "\u0663", "the puzzle has"),
        ("11" + "." * 14, "has no solution"),
    ],
)
def test_what_is_no_puzzle_is_one_message_and_status_2(prompt, wanted, ask):
    status, printed = ask(prompt)
    assert status == 2
    assert "Traceback" not in printed
    assert wanted in printed


def test_a_checkpoint_of_one_side_is_not_asked_for_another(ask):
    status, printed = ask("." * 81, "--side", 9)
    assert status == 2
    assert "--side 9" in printed


def test_a_score_goes_through_the_orders_and_by_tries_never_falls(solver, cli, tmp_path, few, monkeypatch):
    """The tries begin with puzzles that were filled at once, which is often wrong."""
    think, asked = reason.think, []

    def spy(cfg, *rest):
        asked.append((cfg.order, cfg.steps))
        return think(cfg, *rest)

    monkeypatch.setattr(reason, "think", spy)
    flags = "--steps 1 --tries 4 --remask 0.5 --score_n 30".split()
    status, printed = cli("reason", "--score_from", solver[0] / "last.pt", *flags, "--out", tmp_path)
    assert status == 0, printed
    rows = table(printed)
    most = max(question.count(".") for question in load_problems("sudoku", FOUR, 200).question_test)
    for order in ("confident", "margin", "random"):
        spent, right = zip(*rows[order], strict=True)
        assert (order, 1) in asked
        assert spent[0] == 1
        assert list(spent) == sorted(spent)
        assert spent[-1] < most  # a problem ends with its last cell
    spent, right = zip(*(rows[f"confident, {i} tries"][0] for i in (1, 2, 4)), strict=True)
    assert (spent[0], right[0]) == rows["confident"][0]
    assert list(spent) == sorted(set(spent))
    assert list(right) == sorted(right)
    assert right[-1] > right[0]


# -- bench/reason.py -------------------------------------------------------------------------------------

SMALL = "--run.width 32 --run.depth 1 --run.batch_size 16 --run.sample_every 5 --run.log_every 5".split()
SMALL_BENCH = "--dataset sums --run.terms 3 --run.train_n 300 --run.score_n 10 --run.max_steps 5".split()
SMALL_BENCH += SMALL
SUDOKU_BENCH = "--dataset sudoku --run.side 4 --run.train_n 40 --run.score_n 20".split() + SMALL


def test_all_are_trained_for_their_seconds_compared_and_then_loaded(tmp_path, cli, monkeypatch):
    command = [*SMALL_BENCH, "--seconds", 0.2, "--out", tmp_path]
    status, printed = cli("bench.reason", *command)
    assert status == 0, printed
    rows = [line.split(" | ") for line in printed.splitlines() if re.match(r"\| (ours|GPT-2), ", line)]
    assert [(row[0], row[4]) for row in rows] == [
        ("| ours, multi-pass", "1"),
        ("| ours, multi-pass", "8"),
        ("| ours, single-pass", "1"),
        ("| ours, single-pass", "8"),
        ("| GPT-2, chain", "a token at a time"),
        ("| GPT-2, answer", "a token at a time"),
    ]
    assert {len(row) for row in rows} == {6}
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


def curve(line):
    """The points of a curve as the experiments print it: right answers (evaluations)."""
    points = re.findall(r"([\d.]+) \((\d+)\)", line)
    return [float(right) for right, _ in points], [int(spent) for _, spent in points]


def test_a_spoilt_thought_is_followed_by_the_models_own(tmp_path, cli):
    status, printed = cli("bench.reason", *SMALL_BENCH, "--correct", "--out", tmp_path)
    assert status == 0, printed
    lines = (tmp_path / "samples/correct.txt").read_text().splitlines()[2:]
    assert [" ".join(re.split(r"\s\d\.\d+ \(", line)[0].split()) for line in lines] == [
        "snapshot 0 nothing spoilt",
        "snapshot 0 thought 1 spoilt",
        "snapshot 0.5 nothing spoilt",
        "snapshot 0.5 thought 1 spoilt",
    ]
    # Thoughts of 2 and 3 tokens, each with an evaluation of its own; two for the doubts of each round.
    spent = [curve(line)[1] for line in lines]
    assert spent == [[5, 12, 19, 26, 33], [3, 10, 17, 24, 31]] * 2
    assert (tmp_path / "correct.png").stat().st_size > 5000


def test_of_a_chain_all_is_known_up_to_the_spoilt_digit_and_nothing_behind(tmp_path, cli, monkeypatch):
    states = []

    def think_on(cfg, facts, model, problems, ids):
        true = reason.encode(facts, problems.question_test, problems.thoughts_test)
        states.append(((ids != true) & (ids != model.mask_id), ids == model.mask_id))
        return [(1, 0.0)]

    monkeypatch.setattr(bench, "think_on", think_on)
    assert cli("bench.reason", *SMALL_BENCH, "--correct", "--out", tmp_path)[0] == 0
    (nothing, all_masked), (one_digit, later_masked) = states[:2]
    assert all_masked.tolist() == [[False] * 5 + [True] * 5] * 10
    assert later_masked.tolist() == [[False] * 7 + [True] * 3] * 10
    assert not nothing.any()
    assert one_digit.sum(1).tolist() == [1] * 10


def test_rounds_of_remasking_know_the_question_alone_and_go_on_from_each_other(varied, monkeypatch):
    cfg, facts, model, problems = varied
    n, given = len(problems.question_test), []
    ids = reason.encode(facts, problems.question_test, problems.thoughts_test)
    true = ids[:, facts["widths"][0] :]
    wrong = true.masked_fill(true == Tokens(facts["alphabet"]).ids("####")[0], 5)  # no answer in any of them

    def conclude(cfg, model, ids, seed):
        at = torch.arange(n)[:, None] < len(given)  # each round mends one more
        return torch.where(at, true, wrong)

    def remasked(cfg, model, ids, x, seed):
        given.append((ids, x, seed))
        return ids

    monkeypatch.setattr(reason, "conclude", conclude)
    monkeypatch.setattr(reason, "remasked", remasked)
    spent, right = zip(*bench.think_on(cfg, facts, model, problems, ids), strict=True)
    each = cfg.steps * len(model.layout.widths)
    assert spent == pytest.approx([(2 + each) * i for i in range(1 + bench.ROUNDS)])
    assert right == pytest.approx([min(i, n) / n for i in range(1 + bench.ROUNDS)])
    asked = reason.asked(facts, problems.question_test)
    assert all(torch.equal(ids, asked) for ids, _, _ in given)
    assert len({seed for _, _, seed in given}) == len(given)
    for i in range(bench.ROUNDS):
        assert torch.equal(given[i][1], torch.where(torch.arange(n)[:, None] < i, true, wrong))


def test_one_digit_is_spoilt():
    thought, rng = "+ 0 4 8 ( 1 )", random.Random(0)
    for _ in range(50):
        differ = [(a, b) for a, b in zip(thought, bench.spoil(thought, "0148", rng), strict=True) if a != b]
        assert len(differ) == 1
        assert set(differ[0]) <= set("0148")


@pytest.mark.parametrize("ends", [False, True])
def test_what_gpt_2_writes_is_read_as_it_was_written(ends):
    problems = load_problems("sums", SUMS_OF_3, n=50)
    facts = reason.chain_facts(problems, spaces=False)
    writing = bench.Writing(Tokens(facts["alphabet"]), None if ends else facts["widths"][1:])
    target = writing.encode(problems.thoughts)
    assert [writing.decode(row) for row in target.tolist()] == problems.thoughts
    assert writing.decode([writing.tokens.V]) == []
    assert (target == END).any() == ends


def test_puzzles_are_compared_by_their_clues_and_by_tries(tmp_path, cli, few):
    command = [*SUDOKU_BENCH, "--seconds", 0.2, "--run.tries", 2, "--out", tmp_path]
    status, printed = cli("bench.reason", *command)
    assert status == 0, printed
    head, _, *rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    assert [name.split(",")[0] for name in head[5:]] == ["6 clues", "7 clues", "minimal"]
    assert [(row[0], row[4]) for row in rows] == [
        ("ours, multi-pass", "8"),
        ("ours, multi-pass", "81"),
        ("ours, multi-pass", "2 tries"),
        ("GPT-2, chain", "a token at a time"),
        ("GPT-2, chain", "2 tries"),
    ]
    assert {len(row) for row in rows} == {8}
    # A new try takes away nothing that was right.
    for once, twice in (rows[1:3], rows[3:5]):
        assert all(float(a) <= float(b) for a, b in zip(once[5:], twice[5:], strict=True))


def test_puzzles_are_solved_by_evaluations_by_orders_and_by_remasking(tmp_path, cli, few):
    command = [*SUDOKU_BENCH, "--correct", "--seconds", 0.2, "--run.tries", 3, "--out", tmp_path]
    status, printed = cli("bench.reason", *command)
    assert status == 0, printed
    lines = (tmp_path / "samples/correct.txt").read_text().splitlines()
    n = int(re.search(r"n=(\d+)", lines[0])[1])
    assert 3 < n < 20
    assert len(lines) == 7
    for line in lines[1:4]:
        assert curve(line)[1][:4] == [1, 2, 4, 8]
    ends = []
    for line in lines[4:]:
        right, spent = curve(line)
        assert len(right) == 3
        assert right == sorted(right)
        assert spent == sorted(set(spent))
        ends.append(spent[-1])
    assert ends[0] > ends[1] > ends[2]  # the more of a grid is kept, the less is spent on a new try
    assert (tmp_path / "correct.png").stat().st_size > 5000


def test_gpt_2_writes_again_what_is_not_right_and_keeps_what_is():
    problems, drawn = load_problems("sums", SUMS_OF_3, n=50), []
    truth, wrong = problems.thoughts_test[:6], ["#### x"]

    class Writer:
        def chains(self, ids, top_p=0.0):
            """Greedy, two of six are right; drawn, the first."""
            drawn.append((ids[:, 0].tolist(), top_p))
            if not top_p:
                return [truth[i] if i in (1, 4) else wrong for i in range(6)]
            return [truth[at] if i == 0 else wrong for i, at in enumerate(ids[:, 0].tolist())]

    chains = bench.write_again(Writer(), problems, 3, torch.arange(6)[:, None])
    assert drawn == [([0, 1, 2, 3, 4, 5], 0.0), ([0, 2, 3, 5], 1.0), ([2, 3, 5], 1.0)]
    assert chains == [truth[0], truth[1], truth[2], wrong, truth[4], wrong]


def test_gpt_2_learns_puzzles_in_all_their_symmetries_and_clues_agree_with_the_answer(
    varied_grids, tmp_path, monkeypatch
):
    cfg, facts, _, problems = varied_grids
    seen, forward = [], gpt.QuestionGPT.forward

    def spy(self, q, target):
        seen.append((q, target))
        return forward(self, q, target)

    monkeypatch.setattr(gpt.QuestionGPT, "forward", spy)
    small = dict(out=str(tmp_path), batch_size=20, log_every=6, sample_every=1000)
    bench.train_gpt(dataclasses.replace(cfg, **small), facts, problems, CPU, 0.01)
    assert len(seen) == 6
    q, target = (torch.cat(part) for part in zip(*seen, strict=True))
    grid, end = target.split([16, 1], dim=1)
    V = len(facts["alphabet"]) + 1
    assert (end == V).all()
    assert all(map(is_grid, grid))
    assert len(grid.unique(dim=0)) > 60
    assert torch.equal(q, grid.where(q != V, V))
    # Each puzzle is seen three times, with as many clues as it has, elsewhere each time.
    wanted = sorted(3 * [16 - puzzle.count(".") for puzzle in problems.question])
    assert sorted((q != V).sum(1).tolist()) == wanted
    assert len((q != V).unique(dim=0)) > 60


def test_places_are_the_sum_over_their_axes_and_a_cell_of_the_answer_is_where_its_clue_is(varied_grids):
    cfg, facts, _, problems = varied_grids
    writer, q, target = bench.new_writer(cfg, facts, problems)
    places, axes = writer.model.decoder.transformer.wpe, puzzles.cell_axes(4)
    assert isinstance(places, gpt.Places)
    layout = Layout([0, 33], axes + axes + axes[:1])
    with torch.no_grad():
        embedded = places(torch.arange(33))
        rows = [[i, 33 + row, 37 + column, 41 + box] for i, (row, column, box) in enumerate(axes * 2)]
        torch.testing.assert_close(embedded[:32], torch.stack([places.weight[row].sum(0) for row in rows]))
        own = places.weight[:32]
        torch.testing.assert_close(embedded[:16] - own[:16], embedded[16:32] - own[16:])
    assert layout.places == len(places.weight)
    # It reads and writes to the end of the last place.
    assert q.shape[1] + target.shape[1] == 33
    (chain,) = writer.chains(reason.asked(facts, problems.question[:1]))
    assert len(chain) <= 1
    loss = writer.model(q[:4], target[:4])
    loss.backward()
    assert (places.weight.grad.abs().sum(1) > 0).all()


def test_each_token_that_gpt_2_writes_depends_on_the_puzzle_and_on_what_is_written(varied_grids):
    cfg, facts, _, problems = varied_grids
    writer, q, target = bench.new_writer(cfg, facts, problems)
    with torch.no_grad():
        for p in writer.model.parameters():
            torch.nn.init.normal_(p, std=0.2)
        logits = writer.model.eval().decode(writer.model.read(q[:1]), target[:1])
        changed = q[:1].clone()
        changed[0, 3] = changed[0, 3] % 4 + 1
        assert (writer.model.decode(writer.model.read(changed), target[:1]) != logits).any(-1).all()
        written = target[:1].clone()
        written[0, 7] = written[0, 7] % 4 + 1
        moved = (writer.model.decode(writer.model.read(q[:1]), written) - logits).abs().amax(-1)[0] > 1e-5
    assert moved.tolist() == [i > 7 for i in range(17)]
