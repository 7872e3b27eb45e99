"""reason.py: chains as ids, thinking, tries, training, the script as a user runs it."""

import dataclasses
import json

import pytest
import torch

import reason
from blocks import generate
from common import run
from diffusion import Masked, Transformer
from tasks import sudoku
from tasks.load import load_problems
from tasks.problems import END, decode

CPU = torch.device("cpu")
SMALL = "--width 32 --depth 1 --batch_size 16 --train_n 300 --steps 2 --score_n 5 --precision fp32".split()
MULT = ["--digits", 2, 1, *SMALL]
SUDOKU = ["--dataset", "sudoku", *SMALL, "--train_n", 20]
GRID = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"


def write_problems(path):
    """40 problems of one equation or of two."""
    rows = []
    for i in range(60, 100):
        steps = f"He has <<{i}+5={i + 5}>>{i + 5}.\n" + f"<<{i}*1={i}>>So.\n" * (i % 2)
        rows.append(dict(question=f"Tom has {i} pens and buys 5. How many?", answer=f"{steps}#### {i + 5}"))
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def random_model(cfg, problems):
    """Config, facts, a model with random weights, problems."""
    facts = problems.facts
    _, model = reason.build(cfg, facts, CPU)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return cfg, facts, model.eval(), problems


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    """A model of chains of two or three thoughts."""
    path = str(write_problems(tmp_path_factory.mktemp("gsm") / "gsm.jsonl"))
    cfg = reason.Config(dataset=path, width=32, depth=1, steps=3, precision="fp32")
    return random_model(cfg, load_problems(path, 100, (3, 2)))


@pytest.fixture(scope="module")
def grids():
    cfg = reason.Config(dataset="sudoku", width=32, depth=1, steps=5, precision="fp32")
    return random_model(cfg, load_problems("sudoku", 20, (3, 2)))


def questions_of(problems, n):
    return [question for question, _ in problems.test[:n]]


# -- chains as ids ---------------------------------------------------------------------------------------


def test_chains_of_any_length_come_back_from_their_ids(chains):
    _, facts, _, problems = chains
    question, *thoughts = reason.columns(facts, problems.train)
    found = decode(facts, torch.cat(thoughts, dim=1))
    assert found == [thoughts for _, thoughts in problems.train]
    assert decode(facts | dict(widths=[0, question.shape[1]]), question) == [[q] for q, _ in problems.train]
    short = torch.tensor([len(chain) == 2 for chain in found])
    assert (thoughts[-1][short] == END).all() and 0 < short.sum() < len(short)


def test_of_a_problem_all_is_known_but_the_thoughts_or_the_open_cells(chains, grids):
    _, facts, model, problems = chains
    ids, q = reason.ask(facts, [question for question, _ in problems.train]), model.layout.q
    assert torch.equal(ids[:, :q], reason.columns(facts, problems.train)[0])
    assert ids.shape[1] == sum(facts["widths"]) and (ids[:, q:] == model.mask_id).all()
    _, facts, model, problems = grids
    ids = reason.ask(facts, questions_of(problems, 30))
    for row, puzzle in zip(ids.tolist(), questions_of(problems, 30), strict=True):
        assert row == [model.mask_id if c == "." else int(c) for c in puzzle]
    assert facts["axes"] == sudoku.AXES and model.layout.q == 0


# -- thinking --------------------------------------------------------------------------------------------


def test_many_questions_give_the_chains_of_each(chains):
    cfg, facts, model, problems = chains
    questions = questions_of(problems, 3)
    alone = [reason.answer(cfg, facts, model, [question])[0] for question in questions]
    assert reason.answer(cfg, facts, model, questions) == alone
    assert len(reason.answer(cfg, facts, model, questions[:1] * 2001)) == 2001
    assert reason.answer(cfg, facts, model, []) == []


def test_settings_of_sampling_reach_the_chain(chains):
    cfg, facts, model, problems = chains
    ids, last = reason.ask(facts, questions_of(problems, 3)), {}
    for name, value in [("steps", 2), ("steps", 5), ("order", "random"), ("temperature", 1.0)]:
        chosen = dataclasses.replace(cfg, **{name: value})
        first, *states = reason.think(chosen, model, ids)
        *_, again = reason.think(dataclasses.replace(chosen, seed=1), model, ids)
        assert torch.equal(first, ids[:, model.layout.q :])
        assert len(states) == chosen.steps * len(model.layout.widths)
        assert torch.equal(states[-1], again) == (name == "steps")  # the others are drawn
        last[name, value] = states[-1]
    assert not torch.equal(last["steps", 2], last["steps", 5])


@pytest.mark.parametrize("made", ["chains", "grids"])
def test_the_model_accepts_what_comes_back_from_a_half_and_the_first_try_counts_if_it_accepts_none(
    made, request, monkeypatch
):
    """With a model that finds, try after try, what `found` says, and in place of a half what `again` says."""
    cfg, facts, model, problems = request.getfixturevalue(made)
    problems = dataclasses.replace(problems, check=lambda question, chain: chain[0] == wanted)
    wanted = GRID if made == "grids" else "<<1+1=2>>"
    other = wanted.translate(str.maketrans("12", "21"))
    asked = []

    def answer(cfg, facts, model, questions, ids=None):
        if ids is not None and questions:
            asked.append((ids == model.mask_id).sum() / (reason.ask(facts, questions) == model.mask_id).sum())
        return [[next(found if ids is None else again)] for _ in questions]

    monkeypatch.setattr(reason, "answer", answer)
    cfg = dataclasses.replace(cfg, tries=3, judge="self")
    for first, back, right in [
        ([other, wanted], [wanted, wanted], [False, True]),  # the second comes back
        ([other, wanted, other], [wanted, other, wanted], [False, False, False]),  # none: the first counts
        ([wanted], [wanted], [True]),  # one is enough
    ]:
        found, again = iter(first), iter(back)
        scores = [flags for flags, _ in reason.score(cfg, facts, model, problems, 1)]
        assert [flags[0] for flags in scores] == right + right[-1:] * (3 - len(right))
    assert len(asked) == 6 and all(0.3 < share < 0.7 for share in asked)


@pytest.mark.parametrize("steps", [1, 3, 64])
@pytest.mark.parametrize("made", ["chains", "grids"])
def test_evaluations_are_those_that_each_problem_takes_alone(made, steps, request, monkeypatch):
    cfg, facts, model, problems = request.getfixturevalue(made)
    cfg, denoise, calls = dataclasses.replace(cfg, steps=steps), model.denoise, []
    monkeypatch.setattr(model, "denoise", lambda *args: calls.append(1) or denoise(*args))
    for question in questions_of(problems, 3):
        reason.answer(cfg, facts, model, [question])
    count = len(calls)
    assert next(reason.score(cfg, facts, model, problems, 3))[1] == pytest.approx(count / 3)


def test_what_is_right_is_kept_and_the_rest_tried_again(grids, monkeypatch):
    """The first try solves four of twelve puzzles, and each later one the first of those that are left."""
    cfg, facts, model, problems = grids
    cfg = dataclasses.replace(cfg, tries=4, seed=7)
    truth, calls = {}, []
    for question in questions_of(problems, 12):
        truth[question] = next(filter(None, sudoku.solve(question)))

    def answer(cfg, facts, model, questions):
        calls.append((cfg.temperature, cfg.seed, len(questions)))
        solved = [i % 3 == 0 if len(calls) == 1 else i == 0 for i in range(len(questions))]
        return [[truth[q] if right else "1" * 81] for q, right in zip(questions, solved, strict=True)]

    monkeypatch.setattr(reason, "answer", answer)
    found = [(list(right), spent) for right, spent in reason.score(cfg, facts, model, problems, 12)]
    assert calls == [(0.0, 7, 12), (1.0, 8, 8), (1.0, 9, 7), (1.0, 10, 6)]
    assert found[0][0] == [i % 3 == 0 for i in range(12)]
    assert [sum(right) for right, _ in found] == [4, 5, 6, 7]
    assert [spent for _, spent in found] == pytest.approx([5, 5 + 40 / 12, 5 + 75 / 12, 5 + 105 / 12])


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
    status, printed = cli("reason", *MULT, "--passes", passes, "--max_steps", 30, "--out", tmp_path)
    assert status == 0, printed
    t = torch.cat([t for _, _, t in spy])
    assert t.shape == (30 * 16, 7)  # thoughts of 3 and of 4 tokens
    assert (t[:, :3] == t[:, :1]).all() and (t[:, 3:] == t[:, 3:4]).all()
    assert torch.corrcoef(t[:, [0, 3]].T)[0, 1].abs() < 0.15
    assert (t[:, 0] / (1 - t[:, 0])).median().item() == pytest.approx(3, rel=0.3)


def test_snapshots_stand_in_the_context_but_not_in_the_target(spy, tmp_path, cli):
    status, printed = cli("reason", *MULT, "--snapshot", 0.5, "--max_steps", 30, "--out", tmp_path)
    assert status == 0, printed
    problems = load_problems("mult", 300, (2, 1))
    true = set(map(tuple, torch.cat(reason.columns(problems.facts, problems.train), dim=1).tolist()))
    kept = []
    for x0, y, _ in spy:
        assert all(tuple(ids) in true for ids in torch.cat([y[:, :4], x0], dim=1).tolist())
        kept += (y[:, 4:] == x0[:, :3]).all(1).tolist()
    # Half of the chains; of these some have no mask, or a lucky guess, where the model is asked.
    assert 0.45 < sum(kept) / len(kept) < 0.75


def test_weights_that_are_not_finite_end_a_run_with_snapshots_in_a_message(tmp_path, cli):
    flags = ["--snapshot", 0.9, "--lr", 1e9, "--max_steps", 9, "--out", tmp_path]
    status, printed = cli("reason", *MULT, *flags)
    assert status == 2 and "finite" in printed and "Traceback" not in printed


def test_a_puzzle_is_learned_from_full_grids_in_their_symmetries(spy, tmp_path, cli):
    flags = ["--max_steps", 10, "--score_n", 1, "--masks", 0.3, 0.6, "--out", tmp_path]
    status, printed = cli("reason", *SUDOKU, *flags)
    assert status == 0, printed
    x0, y, t = (torch.cat(part) for part in zip(*spy, strict=True))
    assert y.shape == (10 * 16, 0)
    assert all(sudoku.check("." * 81, ["".join(map(str, row))]) for row in x0.tolist())
    assert len(x0.unique(dim=0)) == 160
    assert (t == t[:, :1]).all() and 0.3 <= t.min() < 0.32 and 0.58 < t.max() <= 0.6


@pytest.mark.slow
@pytest.mark.parametrize("passes", ["multi", "single"])
def test_chains_are_learned_by_heart(passes, tmp_path, cli, monkeypatch):
    network = "--train_n 20 --width 64 --depth 1 --batch_size 20 --max_steps 120 --score_n 1".split()
    network += ["--lr", 1e-2]
    monkeypatch.setattr(run, "MUON_LR", 0.05)
    status, printed = cli("reason", "--digits", 2, 1, "--passes", passes, *network, "--out", tmp_path)
    assert status == 0, printed
    _, model, facts = reason.load(tmp_path / "last.pt", CPU)
    problems = load_problems("mult", 20, (2, 1))
    found = reason.answer(reason.Config(), facts, model, [question for question, _ in problems.train])
    assert sum(a == b for a, (_, b) in zip(found, problems.train, strict=True)) >= 18


@pytest.mark.parametrize("flags", [MULT, [*MULT, "--snapshot", 0.5], SUDOKU])
def test_interrupted_and_resumed_ends_with_the_same_bits(flags, tmp_path, cli):
    command = [*flags, "--max_steps", 6, "--save_every", 2, "--sample_every", 3]
    assert cli("reason", *command, "--out", tmp_path / "whole")[0] == 0
    update = reason.Run.update

    def killed(run, loss):
        if run.step == 4:
            raise KeyboardInterrupt
        update(run, loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reason.Run, "update", killed)
        assert cli("reason", *command, "--out", tmp_path / "half")[0] != 0
    assert cli("reason", *command, "--resume", "--out", tmp_path / "half")[0] == 0
    whole, half = (torch.load(tmp_path / run / "last.pt", weights_only=True) for run in ("whole", "half"))
    for part in ("model", "ema"):
        assert all(torch.equal(whole[part][name], half[part][name]) for name in whole[part])


def test_every_loop_is_trained_and_a_checkpoint_samples_with_another_number(tmp_path, cli, monkeypatch):
    shapes, forward = [], Transformer.forward

    def spied(self, h, *args, **kwargs):
        outputs, kv_cache = forward(self, h, *args, **kwargs)
        shapes.append((self.training, len(outputs) if outputs.dim() == 4 else 1, len(kv_cache)))
        return outputs, kv_cache

    monkeypatch.setattr(Transformer, "forward", spied)
    command = [*MULT, "--loops", 3, "--max_steps", 3, "--snapshot", 0.5, "--out", tmp_path]
    status, printed = cli("reason", *command)
    assert status == 0, printed
    assert set(shapes) == {(True, 3, 3), (False, 1, 3)}
    for loops in (3, 6):
        shapes.clear()
        assert cli("reason", "--load", tmp_path / "last.pt", "--score_n", 5, "--loops", loops)[0] == 0
        assert set(shapes) == {(False, 1, loops)}
    assert cli("reason", *command, "--loops", 2)[0] == 2  # not in training


# -- the script ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoints of small runs: of multiplications, of puzzles, of a file's problems."""
    out = tmp_path_factory.mktemp("runs")
    small = dict(width=32, depth=1, batch_size=16, max_steps=3, steps=2, score_n=0, precision="fp32")
    file = dict(dataset=str(write_problems(out / "gsm.jsonl")))
    runs = dict(mult=dict(train_n=300, digits=(2, 1)), sudoku=dict(train_n=20), file=file)
    for name, more in runs.items():
        reason.main(reason.Config(**dict(dataset=name) | small | more, out=str(out / name)))
    return out


def test_a_checkpoint_answers_without_its_problems(trained, cli, monkeypatch):
    monkeypatch.setattr(reason, "load_problems", None)
    prompts = dict(mult="2 1*3", sudoku=PUZZLE, file="Tom has 99 pens and buys 5. How many?")
    for name, prompt in prompts.items():
        for flags in ([], ["--tries", 2, "--judge", "self"]):
            status, printed = cli("reason", "--load", trained / name / "last.pt", "--prompt", prompt, *flags)
            assert status == 0, printed


@pytest.mark.parametrize(
    "name, prompts",
    [
        ("mult", ["", " ", "123*4", "12-3", "x", "\udcff*1", "12*\u00b2"]),
        ("file", ["", "\t", "Zo\u00eb?", "\udcff", "Tom" * 100]),
        ("sudoku", ["", "\udcff" * 81, "11" + "." * 79, PUZZLE[1:]]),
    ],
)
def test_a_prompt_must_be_of_the_characters_and_the_length_of_the_data(name, prompts, trained, cli):
    for prompt in prompts:
        assert cli("reason", "--load", trained / name / "last.pt", "--prompt", prompt)[0] == 2, prompt


def test_a_full_grid_is_its_own_answer(trained, cli):
    grid = next(filter(None, sudoku.solve(PUZZLE)))
    status, printed = cli("reason", "--load", trained / "sudoku/last.pt", "--prompt", grid)
    assert status == 0 and printed.count(" ".join(grid[:9])) == 4


@pytest.mark.parametrize("made, dataset", [("sudoku", "mult"), ("mult", "countdown"), ("file", "sudoku")])
def test_a_checkpoint_of_other_problems_is_refused(made, dataset, trained, cli):
    for flags in (["--prompt", PUZZLE], ["--score_n", 5]):
        status, printed = cli("reason", "--load", trained / made / "last.pt", "--dataset", dataset, *flags)
        assert status == 2 and "last.pt" in printed


def test_a_score_is_by_kinds_and_only_rules_can_tell_a_try_that_is_right(trained, cli):
    status, printed = cli("reason", "--load", trained / "sudoku/last.pt", "--score_n", 20, "--tries", 3)
    assert status == 0 and all(printed.count(kind) == 4 for kind in ("29 clues", "33 clues", "minimal"))
    status, printed = cli("reason", "--load", trained / "mult/last.pt", "--score_n", 7)
    assert status == 0 and printed.count("of 7") == 3  # 1, 4 and 8 steps
    command = ["--load", trained / "file/last.pt", "--score_n", 2, "--tries", 2]
    status, printed = cli("reason", *command)
    assert status == 2 and "--judge self" in printed
    assert cli("reason", *command, "--prompt", "1 + 1")[0] == 2
    assert cli("reason", *command, "--judge", "self")[0] == 0


def test_puzzles_of_a_file_are_scored_by_their_own_kinds(trained, tmp_path, cli):
    (tmp_path / "hard.csv").write_text(f"question,answer,rating\n{PUZZLE},{GRID},0\n")
    command = ["--load", trained / "sudoku/last.pt", "--test", tmp_path / "hard.csv", "--score_n", 9]
    status, printed = cli("reason", *command)
    assert status == 0, printed
    assert printed.count("30 clues 0.000 of 1") == 3
    (tmp_path / "hard.csv").write_text("question,answer\n")
    assert cli("reason", *command)[0] == 2


def test_a_finished_run_is_loaded_and_other_settings_or_data_are_refused(trained, cli):
    command = [*SMALL, "--max_steps", 3, "--digits", 2, 1, "--out", trained / "mult"]
    status, printed = cli("reason", *command)
    assert status == 0 and "3 of 3" in printed
    for flags in (["--depth", 2], ["--passes", "single"], ["--shift", 1.0], ["--digits", 1, 2]):
        assert cli("reason", *command, *flags)[0] == 2


def test_a_checkpoint_is_used_from_python(trained):
    _, model, facts = reason.load(trained / "mult/last.pt", "cpu")
    (chain,) = reason.answer(reason.Config(), facts, model, ["21*3"])
    ids = reason.ask(facts, ["21*3"])
    *_, (_, xt) = generate(model, ids[:, : model.layout.q])
    assert decode(facts, xt) == [chain]
    with pytest.raises(ValueError):
        list(generate(model, ids))


WRONG = """--prompt 1*1, --steps 0, --digits 0 2, --width 40, --snapshot 0.5 --passes single, --tries 0,
--temperature -1, --dataset sodoku, --dataset no.txt, --masks 0.8 0.2, --load no.pt"""


@pytest.mark.parametrize("flags", WRONG.split(","))
def test_a_mistake_is_one_message_and_status_2(flags, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, printed = cli("reason", *flags.split())
    assert status == 2 and "Traceback" not in printed
