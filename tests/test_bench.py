"""bench/: measures with known answers, fair sides, and every command at a tiny size."""

import importlib
import itertools
import sys

import pytest
import torch
from torch.nn import functional as F

from bench import assets, images, reason, runs, text, timing
from bench.gpt import LabelGPT, WindowGPT, mean_nats
from blocks import Layout, bound, generate
from common.images import load_images
from common.run import run_script
from common.scores import scale
from tasks import arithmetic
from tasks.problems import Problems
from tokengen import Config as TokenConfig
from vae import TextVAE, small_backbones, small_gpt

CPU = torch.device("cpu")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- measures of images ----------------------------------------------------------------------------------


def normal(n: int, seed: int, mean: float = 0.0) -> torch.Tensor:
    return mean + torch.randn(n, 8, generator=rng(seed), dtype=torch.float64) * torch.linspace(0.5, 2, 8)


@pytest.mark.slow
def test_kernel_distance_is_that_of_torchmetrics_and_unbiased():
    from torchmetrics.image.kid import poly_mmd

    f, g = normal(100, 0), normal(100, 1, mean=0.5)
    assert images.kernel_distance(f, g) == pytest.approx(poly_mmd(f, g).item(), rel=1e-6)
    same = [images.kernel_distance(normal(50, 2 * i), normal(50, 2 * i + 1)) for i in range(300)]
    assert abs(sum(same)) < 4 * torch.tensor(same).std() * 300**0.5


def test_precision_and_recall_see_missing_modes_and_stray_samples():
    left, right = normal(200, 0), normal(200, 1, mean=100.0)
    assert images.covered(normal(200, 2), torch.cat([left, right])) == pytest.approx(1, abs=0.1)
    assert images.covered(torch.cat([left, right]), normal(200, 2)) == pytest.approx(0.5, abs=0.06)
    stray = torch.cat([normal(200, 3), normal(200, 4, mean=-1000.0)])
    assert images.covered(stray, left) == pytest.approx(0.5, abs=0.05)


# -- sides and runs --------------------------------------------------------------------------------------


def mean_loss(trainer) -> float:
    return sum(trainer.side.loss(scale(trainer.x)).item() for _ in range(5)) / 5


@pytest.mark.slow
@pytest.mark.parametrize("name", images.SCORED)
def test_a_side_learns_and_samples(name):
    torch.manual_seed(0)
    trainer = images.Trainer(images.SCORED[name](8, CPU), load_images("digits", "").x[:64], 16)
    first = mean_loss(trainer)
    for _ in range(60):
        trainer.train_step()
    assert mean_loss(trainer) < 0.8 * first
    x, again = (trainer.side.sample(trainer.ema, (3, 1, 8, 8), rng(), 5) for _ in "ab")
    assert x.shape == (3, 1, 8, 8) and x.abs().max() < 3
    assert torch.equal(x, again)


def test_sides_take_turns_after_a_round_that_warms_up():
    calls = []
    sides = {"a": lambda r: calls.append(f"a{r}"), "b": lambda r: calls.append(f"b{r}")}
    took = timing.interleaved(sides, 2, CPU)
    assert calls == ["a0", "b0", "a1", "b1", "a2", "b2"]
    assert [len(seconds) for seconds in took.values()] == [2, 2]


@pytest.fixture
def train(monkeypatch, tmp_path):
    """train(limit, scores) trains a line for so many seconds, of which each step takes one: its TimedRun."""

    def call(limit: float, scores=(0.0,), early_stop=False):
        clock, scores, rates = itertools.count(), iter(scores), []
        monkeypatch.setattr("common.run.WARMUP", 5)
        monkeypatch.setattr("common.run.time.perf_counter", lambda: next(clock) / 2)  # four reads a step
        model = torch.nn.Linear(3, 1)
        cfg = TokenConfig(out=str(tmp_path), resume=True, max_steps=runs.FOREVER)
        ends = dict(limit=limit, score=lambda _: next(scores, 0.0), every=4, early_stop=early_stop)
        with runs.TimedRun(cfg, model, {}, CPU, cooldown=0.2, muon=[model.weight], **ends) as run:
            for _ in run.steps(100):
                run.update(run.model(torch.ones(3)).square().mean())
                rates.append(run.opts[1].param_groups[0]["lr"])
        return run, rates

    return call


def test_a_run_ends_with_its_seconds_cools_down_before_and_goes_on_for_more(train):
    run, rates = train(40.0)
    assert run.seconds == pytest.approx(40, rel=0.03)
    assert run.curve[-1][:2] == (run.step, run.seconds)
    assert rates[run.step * 7 // 10] == max(rates) and rates[-1] < 0.15 * max(rates)
    again, rates = train(40.0)
    assert not rates and again.curve == run.curve
    more, rates = train(50.0)
    assert len(rates) == pytest.approx(run.step / 4, rel=0.2)
    assert more.curve[: len(run.curve)] == run.curve


def test_a_run_stops_early_where_the_score_rises(train):
    run, _ = train(40.0, [3.0, 2.0, 2.5], early_stop=True)
    assert [score for _, _, score in run.curve] == [3.0, 2.0, 2.5]
    assert not train(40.0, early_stop=True)[1]


# -- GPTs ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_gpt_learns_a_text_for_each_label_and_one_for_none():
    torch.manual_seed(0)
    y, target = torch.tensor([-1, 0, 1]), torch.randint(2, 50, (3, 10))
    target[:, -1] = 1
    model = LabelGPT(small_gpt(50, 32, 2, 12), 2, 1)
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        model(y, target).backward()
        opt.step()
        opt.zero_grad()
    assert torch.equal(model.eval().write(y, 10), target)


def test_mean_nats_count_every_token_alike():
    torch.manual_seed(0)
    model, y = LabelGPT(small_gpt(40, 16, 1, 12), 0, 1), torch.full((70,), -1)
    target = torch.randint(0, 40, (70, 10))
    target[5:, 3:] = -100  # batches of 64 and 6 have other numbers of tokens
    assert mean_nats(model, y, target) == pytest.approx(model(y, target).item(), abs=1e-5)


def test_a_gpt_of_windows_is_a_denoiser_whose_bound_is_its_likelihood_and_whose_cache_changes_nothing():
    torch.manual_seed(0)
    model, x0 = WindowGPT(11, 6, 32, 2).eval(), torch.randint(11, (4, 6), generator=rng())
    begin = torch.full((4, 1), 11)
    logits = model.gpt(torch.cat([begin, x0], dim=1)).logits[:, :-1]
    nats = F.cross_entropy(logits.movedim(-1, 1), x0, reduction="none").sum(1)
    torch.testing.assert_close(bound(model, x0[:, :0], x0, 1), nats)
    xt = torch.cat([x0[:, :2], torch.full((4, 4), 11)], dim=1)
    *_, (_, written) = generate(model, x0[:, :0], xt, steps=1)
    for i in range(2, 6):
        logits = model.gpt(torch.cat([begin, written[:, :i]], dim=1)).logits[:, -1, :11]
        assert torch.equal(written[:, i], logits.argmax(-1))


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
    assert all(p.grad is not None for p in vae.parameters())


@pytest.mark.parametrize("fixed", [True, False])
def test_a_writer_reads_back_the_chains_it_learns(fixed):
    problems = arithmetic.problems(30, (3, 2))
    if not fixed:
        train = [(question, chain[i % 2 :]) for i, (question, chain) in enumerate(problems.train)]
        problems = Problems(train, problems.test, problems.check)
    writer = reason.Writer(reason.reason.Config(width=16, depth=1), problems.facts, problems)
    assert writer.fixed == fixed
    rows = writer.target.masked_fill(writer.target < 0, writer.V).tolist()
    assert [writer.decode(row) for row in rows] == [chain for _, chain in problems.train]
    assert writer.questions.shape == (30, problems.facts["widths"][0])


# -- measures of texts -----------------------------------------------------------------------------------


def test_measures_of_texts_equal_those_by_hand():
    assert text.distinct(["a b a b a b", "c d e f g h"], 1) == pytest.approx(8 / 12)
    assert text.distinct(["a b a b a b", "c d e f g h"], 2) == pytest.approx(7 / 10)
    assert text.distinct(["很好很好很"], 2) == pytest.approx(2 / 4)  # of characters
    train = ["the room was clean", "the pool was cold", "we loved it"]
    assert text.self_bleu([train[0]] * 3) == pytest.approx(100)
    assert text.self_bleu(train) < 20
    assert text.nearest_cosine([train[0]] * 2, train) == pytest.approx(1)
    assert text.nearest_cosine(["a b c"], train) == 0
    assert text.area([(0.0, 0.0), (0.5, 10.0), (1.0, 80.0)]) == pytest.approx(0.5 * 5 + 0.5 * 45)


# -- thinking again --------------------------------------------------------------------------------------


class Known:
    """A denoiser of two blocks after a question that gives logits_of(xt), and keeps what it is given."""

    def __init__(self, logits_of):
        self.mask_id, self.layout, self.logits_of, self.given = 7, Layout([2, 4, 6]), logits_of, []

    def __call__(self, xt, t, clean):
        self.given.append((xt, t, clean))
        return self.logits_of(xt)


def test_doubt_is_what_is_missing_to_1_of_each_token_where_it_is_masked():
    p = torch.rand(10, 7, generator=rng()).softmax(-1)
    model = Known(lambda xt: torch.where((xt == 7)[..., None], p.log(), -9 * p.log()))
    q, x = torch.randint(7, (5, 12), generator=rng(1)).split([2, 10], dim=1)
    torch.testing.assert_close(reason.doubt(model, q, x, rng()), 1 - p[range(10), x])
    (first, t, clean), (second, u, _) = model.given
    assert torch.equal((first == 7) ^ (second == 7), torch.ones_like(x, dtype=torch.bool))
    assert torch.equal(torch.where(first == 7, second, first), x)
    torch.testing.assert_close(t + u, torch.ones(5))
    assert torch.equal(clean, torch.cat([q, x[:, :4]], dim=1))


def test_remasking_takes_the_least_certain_tokens_and_no_clue():
    p = torch.full((10,), 0.9)
    p[[2, 5, 6]] = torch.tensor([0.1, 0.2, 0.3])
    rows = torch.stack([p, *[(1 - p) / 6] * 6], dim=-1)
    q, clues = torch.zeros(1, 2, dtype=torch.long), torch.full((1, 10), 7)
    clues[0, [0, 2]] = 0  # the least certain one is a clue
    model, cfg = Known(lambda xt: rows.log()[None]), reason.reason.Config(precision="fp32")
    start = reason.remasked(cfg, model, torch.cat([q, clues], dim=1), torch.zeros_like(clues), 0.25)
    assert (start[0, 2:] == 7).nonzero()[:, 0].tolist() == [5, 6]  # a quarter of eight


# -- commands --------------------------------------------------------------------------------------------

REASON = "--seconds 0.3 --every 5 --score_n 8 --run.train_n 60 --run.width 16 --run.depth 1"
TOKENS = "--score_n 4 --every 9 --run.width 16 --run.depth 1 --run.window 48 --run.block 4"
TEXT = "--vae_steps 2 --diffusion_steps 2 --vae_width 16 --vae_depth 1 --width 16 --depth 1 --steps 2"


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """call("bench.text", "--score_n 4 --load OUT/last.pt") runs a command: what it printed; OUT: tmp_path."""

    def run(name: str, flags: str) -> str:
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [name, *flags.replace("OUT", str(tmp_path)).split()])
        (runs.run_bench if "bench" in name else run_script)(module.Config, module.main, module.__doc__)
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_images_beside_peers_and_the_measures_of_a_run(call, tmp_path):
    flags = "--dataset digits --rounds 1 --round_steps 1 --seconds 0.2 --score_n 20 --batch_size 8 --out OUT"
    printed = call("bench.images", flags)
    assert all(printed.count(name) >= 3 for name in images.SCORED) and (tmp_path / "quality.png").exists()
    call("imagen", "--dataset digits --max_steps 2 --channels 8 16 --blocks 1 1 --score_n 0 --out OUT/run")
    printed = call("bench.images", "--dataset digits --score_n 30 --load OUT/run/last.pt --out OUT")
    assert "| real |" in printed and (tmp_path / "nearest.png").exists()
    call("imagen", "--distill OUT/run/last.pt --max_steps 2 --pairs 20 --score_n 0 --out OUT/student")
    flags = "--dataset digits --score_n 20 --load OUT/run/last.pt --student OUT/student/last.pt --out OUT"
    printed = call("bench.images", flags)
    assert printed.count("| teacher |") == 5 and "nearest of its 20 training samples" in printed
    assert (tmp_path / "evaluations.png").exists()
    with pytest.raises(SystemExit, match="2"):
        call("bench.images", flags.replace("student/last", "run/last"))


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["mult", "sudoku"])
def test_reasoning_beside_gpt2_and_the_measures_of_a_run(call, tmp_path, dataset):
    flags = f"--dataset {dataset} {REASON} --run.loops 2 --tries 2 --evaluations 2 --out OUT"
    printed = call("bench.reason", flags)
    assert "| ours, multi-pass |" in printed and "| GPT-2, chain |" in printed
    assert "step 5, " not in call("bench.reason", flags)  # what is finished is loaded
    printed = call("bench.reason", f"{flags} --load OUT/multi/last.pt")
    assert "fresh tries" in printed and "masked again" in printed
    assert (tmp_path / "tries.png").exists() == (dataset == "sudoku")
    if dataset == "sudoku":
        run = f"{flags} --load OUT/multi/last.pt"
        printed = call("bench.reason", f"{run} --loops 2 3 --beside OUT/multi/last.pt")
        assert printed.count("| multi, 3 loops |") == 14 and (tmp_path / "loops.png").exists()
        assert len(assets.looping(tmp_path / "multi/last.pt", assets.HARD, steps=2)) == 2 * 2 + 1


@pytest.mark.slow
def test_the_study_of_self_correction(call):
    assert call("bench.reason", f"--correct {REASON} --run.max_steps 2 --out OUT").count("| thought 1 |") == 2


@pytest.mark.slow
def test_texts_and_tokens_beside_gpts_and_reviews_by_tokens(call, tmp_path):
    printed = call("bench.tokens", f"--dataset manual --seconds 0.3 --blocks 4 {TOKENS} --out OUT")
    assert "| GPT |" in printed and "| blocks of 4 |" in printed and (tmp_path / "curves.png").exists()
    call("textgen", f"--dataset grammar {TEXT} --score_n 0 --out OUT")
    printed = call("bench.text", "--score_n 4 --load OUT/diffusion/last.pt")
    assert "AuBLEU" in printed and "| GPT-2 top-p 0.92 |" in printed
    printed = call("bench.tokens", f"{TOKENS} --planner OUT/diffusion/last.pt --out OUT/tokens")
    assert "| held out |" in printed and "| tokens, 4 steps a block |" in printed and "| GPT |" in printed
