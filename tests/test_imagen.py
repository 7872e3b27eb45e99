"""imagen.py and common/pictures.py as a user runs them, at a tiny size, and the mistakes that they name."""

import os
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image

import imagen
from common.pictures import picture, save_files
from common.run import Run, UserError, open_checkpoint
from diffusion import sample


@pytest.fixture(scope="module", autouse=True)
def short_classifier():
    """What it has learned after 20 steps is enough here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imagen, "load_classifier", partial(imagen.load_classifier, steps=20))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of 60 steps on the digits."""
    out = tmp_path_factory.mktemp("run") / "digits"
    small = dict(channels=(8, 16), blocks=(1, 1), batch_size=16, score_n=40)
    imagen.main(imagen.Config(dataset="digits", out=str(out), **small, max_steps=60, sample_every=30))
    return out


def read(path):
    with open_checkpoint(path / "last.pt", imagen.Config) as saved:
        return saved


def test_a_run_writes_its_files(trained):
    for name in "samples/grid.png samples/film.gif samples/000030.png log.csv".split():
        assert (trained / name).stat().st_size > 60, name
    (classifier,) = trained.glob("classifier-*.pt")
    assert classifier.stat().st_size > 60
    grid = Image.open(trained / "samples/grid.png")
    assert grid.height >= 10 * 8 * 7 and grid.width > grid.height  # ten enlarged rows and their labels
    assert Image.open(trained / "samples/film.gif").n_frames == 11  # the noise, then ten evaluations


def test_samples_are_drawn_from_the_ema_by_the_settings_of_the_checkpoint(trained, cli, monkeypatch):
    saved = read(trained)
    assert any(not torch.equal(saved["model"][k], v) for k, v in saved["ema"].items())
    process, model, facts = imagen.load(trained / "last.pt")
    assert all(torch.equal(saved["ema"][k], v) for k, v in model.state_dict().items())
    assert facts["shape"] == [1, 8, 8] and facts["names"][3] == "3" and not model.training
    x = sample(process, model, (4, *facts["shape"]), torch.full((4,), 3), clip=1.0)
    assert x.shape == (4, 1, 8, 8) and x.abs().max() <= 1
    monkeypatch.setattr(imagen, "load_images", lambda *_: pytest.fail("sampling needs no data"))
    assert cli("imagen", "--load", trained / "last.pt")[0] == 0  # --channels 8 16 are not repeated
    samples = trained / "samples"
    plain = (samples / "dpm++_10_guidance0_seed0.png").read_bytes()
    assert (
        cli("imagen", "--load", trained / "last.pt", "--sampler", "ddim", "--steps", 3, "--seed", 5)[0] == 0
    )
    assert (samples / "ddim_3_guidance0_seed5.png").read_bytes() != plain
    assert cli("imagen", "--load", trained / "last.pt", "--guidance", 2)[0] == 0
    assert (samples / "dpm++_10_guidance2_seed0.png").read_bytes() != plain
    assert cli("imagen", "--load", trained / "last.pt")[0] == 0
    assert (samples / "dpm++_10_guidance0_seed0.png").read_bytes() == plain  # the same seed
    for device in ("cpu", torch.device("cpu")):
        assert imagen.load(trained / "last.pt", device)[2] == facts


def test_a_checkpoint_is_scored_as_after_its_training(trained, cli):
    status, printed = cli("imagen", "--load", trained / "last.pt", "--score_n", 40)
    assert status == 0
    figures = re.search(r"FD [\d.]+.*nearest.*", printed)[0]
    torch.rand(3)
    next(trained.glob("classifier-*.pt")).unlink()  # trained again, with the same bits
    assert figures in cli("imagen", "--load", trained / "last.pt", "--score_n", 40)[1]
    assert cli("imagen", "--load", trained / "last.pt", "--score_n", 40, "--dataset", "mnist")[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--denoiser transformer --width 32 --depth 1",
        "--predict eps --schedule linear",
        "--predict x0 --sampler ddpm --steps 50",
        "--predict flow --schedule flow --sampler ddim",
        "--sampler heun --steps 9 --guidance 1",
    ],
)
def test_variants_train(flags, tmp_path, cli):
    run = ["--dataset", "digits", "--out", tmp_path, *TINY, "--max_steps", 2, *flags.split()]
    status, printed = cli("imagen", *run)
    assert status == 0 and (tmp_path / "samples/grid.png").exists(), printed


def test_classes_choose_what_is_drawn_and_nothing_is_deleted(trained, cli):
    load = ["--load", trained / "last.pt", "--seed", 9]
    folder = trained / "samples/dpm++_10_guidance0_seed9"
    assert cli("imagen", *load, "--samples", 3, "--classes", 3)[0] == 0
    first = {path: np.array(Image.open(path)) for path in folder.iterdir()}
    assert sorted(path.name for path in first) == [f"3_00{j}.png" for j in range(3)]
    assert {x.shape for x in first.values()} == {(8, 8)}  # grey, and not enlarged
    assert cli("imagen", *load, "--samples", 2, "--classes", 8)[0] == 0
    assert len(list(folder.iterdir())) == 5 and all(path.exists() for path in first)
    assert {path.name for path in folder.parent.glob("*seed9_*.png")} == {
        f"{folder.name}_{i}.png" for i in (3, 8)
    }
    assert cli("imagen", *load, "--samples", 12, "--classes", 3)[0] == 0
    for path, x in first.items():  # with more samples, the first ones stay the same
        assert np.abs(np.array(Image.open(path)).astype(int) - x).max() <= 1
    status, printed = cli("imagen", *load, "--classes", "cat")
    assert status == 2 and "cat" in printed


def test_files_of_samples_have_safe_and_different_names(tmp_path):
    names = ["T-shirt/top", "../../up", "a b", "A_B", "", "/etc/passwd", "猫", "x" * 300, "nul\0", "sample"]
    x = torch.zeros(10, 1, 3, 4, 6, dtype=torch.uint8)
    x[:, 0, 0] = torch.arange(10)[:, None, None]
    save_files(names, x, tmp_path / "in/there")
    files = list(tmp_path.rglob("*.png"))
    assert {path.parent for path in files} == {tmp_path / "in/there"}
    assert sorted(Image.open(path).getpixel((0, 0)) for path in files) == [(i, 0, 0) for i in range(10)]
    assert all(re.fullmatch(r"[\w-]+\.png", path.name) for path in files)


def test_labels_of_a_grid_are_written_in_their_script_and_never_cut():
    def margin(label):
        grid = np.array(picture([label], torch.full((1, 2, 1, 8, 8), 255, dtype=torch.uint8)).convert("L"))
        return grid[:, : -2 * 58]

    for one, other in [("собака", "ссссса"), ("γάτα", "γγγα"), ("قطة", "ققة")]:
        assert margin(one).shape != margin(other).shape or (margin(one) != margin(other)).any()
        assert (margin(one) < 128).any()
    assert margin("W" * 40).shape[1] > margin("i" * 40).shape[1]


def test_samples_are_drawn_in_parts_of_the_training_batch_and_seeded(trained):
    process, model, facts = imagen.load(trained / "last.pt")
    sizes = []

    def spy(xt, t, y):
        sizes.append(len(xt))
        return model(xt, t, y)

    cfg, y = imagen.Config(batch_size=16, steps=1), torch.arange(40) % 10
    x = imagen.draw(cfg, process, spy, facts["shape"], y)
    assert sizes == [16, 16, 8] and x.dtype == torch.uint8 and x.shape == (40, 1, 8, 8)
    assert torch.equal(x, imagen.draw(cfg, process, model, facts["shape"], y))


def folder_of_images(root, classes="ab", n=12):
    for i in range(n):
        folder = root / (classes[i % len(classes)] if classes else ".")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 20 * i).save(folder / f"{i}.png")


def test_a_run_continues_with_data_that_have_moved_but_not_with_others(tmp_path, cli):
    folder_of_images(tmp_path / "pics")
    run = ["--out", tmp_path / "out", *TINY]
    assert cli("imagen", "--dataset", tmp_path / "pics", *run, "--max_steps", 2)[0] == 0
    (tmp_path / "pics").rename(tmp_path / "moved")
    run += ["--resume", "--max_steps", 3]
    assert cli("imagen", "--dataset", tmp_path / "moved", *run)[0] == 0
    (tmp_path / "moved/a/0.png").unlink()
    assert cli("imagen", "--dataset", tmp_path / "moved", *run)[0] == 2


def test_images_without_classes_train_and_are_drawn(tmp_path, cli):
    folder_of_images(tmp_path / "pics", classes="")
    run = ["--dataset", tmp_path / "pics", "--out", tmp_path / "out", *TINY, "--max_steps", 2, "--score_n", 5]
    status, printed = cli("imagen", *run)
    assert status == 0 and "no score" in printed
    assert cli("imagen", "--load", tmp_path / "out/last.pt", "--samples", 2)[0] == 0
    assert len(list((tmp_path / "out/samples/dpm++_10_guidance0_seed0").iterdir())) == 20
    for flags in (["--classes", "a"], ["--score_n", 5]):
        assert cli("imagen", "--load", tmp_path / "out/last.pt", *flags)[0] == 2


def test_fashionmnist_is_read_from_its_own_files(fake_fashionmnist, tmp_path, cli):
    run = ["--data_dir", fake_fashionmnist, "--out", tmp_path, *TINY, "--max_steps", 2]
    status, printed = cli("imagen", *run)
    assert status == 0 and "120 training and 60 test images" in printed


@pytest.mark.parametrize(
    "flags",
    [
        "--batch_size 0", "--max_steps -1", "--steps 2000", "--guidance -1", "--seed -1", "--channels 9 9",
        "--channels 0 16", "--channels -8 16", "--score_n 1",
        "--channels 8 --blocks 1 1", "--width 20", "--image_size 9", "--schedule flow --predict eps",
        "--schedule flow --steps 1000", "--dataset nowhere", "--dataset mnist --data_dir nowhere",
        "--load nowhere.pt", "--load {run} --channels 16 16", "--load {run} --resume", "--out {out}",
        "--guidance 1 --label_drop 0", "--label_drop 10", "--classes cat", "--lr x", "--no_such_flag",
    ],
)  # fmt: skip
def test_mistakes_exit_with_status_2(flags, cli, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.mnist.MNIST.mirrors", [])  # no network
    base = [] if "--load" in flags else ["--dataset", "digits", *TINY, "--max_steps", "100"]
    status, printed = cli("imagen", *base, *flags.format(run=trained / "last.pt", out=trained).split())
    assert status == 2 and "Traceback" not in printed


def test_a_checkpoint_of_another_script_is_refused(trained, cli):
    for script in ("textgen", "reason", "tokengen"):
        status, printed = cli(script, "--load", trained / "last.pt")
        assert status == 2 and "last.pt" in printed


@pytest.mark.slow
def test_an_import_runs_nothing_and_loads_no_other_script():
    code = "import sys, imagen; print(sorted(m for m in sys.modules if m.split('.')[0] in sys.argv[1:]))"
    others = "textgen reason tokengen vae blocks tasks transformers datasets sklearn sacrebleu".split()
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code, *others], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_run_leaves_the_notebook_as_it_was(trained):
    import warnings

    import matplotlib

    before = matplotlib.get_backend(auto_select=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # bright pictures, for one, are no reason to warn
        imagen.main(imagen.Config(**read(trained)["config"]))  # a finished run: samples
    assert matplotlib.get_backend(auto_select=False) == before


def test_load_raises_one_error_for_what_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="gone.pt"):
        imagen.load(tmp_path / "gone.pt")


# -- one step --------------------------------------------------------------------------------------------


def test_a_student_draws_in_one_evaluation_and_resumes_to_the_same_bits(trained, cli, tmp_path, monkeypatch):
    flags = ["--distill", trained / "last.pt", "--pairs", 50, "--score_n", 0, "--out"]
    assert cli("imagen", *flags, tmp_path / "a", "--max_steps", 4)[0] == 0
    with monkeypatch.context() as patch:  # a signal in the second step
        patch.setattr(Run, "due", lambda run, every: run.step == 2 and run._on_signal(2, None))
        assert cli("imagen", *flags, tmp_path / "b", "--max_steps", 4)[0] == 130
    resume = [*flags, tmp_path / "b", "--max_steps", 4, "--resume"]
    for other in (["--guidance", 1], ["--classes", 3], ["--pairs", 40]):  # another teacher
        assert cli("imagen", *resume, *other)[0] == 2
    with monkeypatch.context() as patch:  # refused before the pairs are drawn
        patch.setattr(imagen, "batches", lambda *_: iter(pytest.fail, None))
        assert cli("imagen", *resume[:-1])[0] == 2
    assert cli("imagen", *resume)[0] == 0
    whole, resumed = (read(tmp_path / name)["ema"] for name in "ab")
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())
    assert any(not torch.equal(weight, read(trained)["ema"][name]) for name, weight in whole.items())
    status, printed = cli("imagen", "--load", tmp_path / "a/last.pt", "--score_n", 40)
    assert status == 0 and "1 steps, guidance 0" in printed and "nearest" in printed
    assert (tmp_path / "a/samples/dpm++_1_guidance0_seed0.png").exists()


def test_pairs_are_what_sample_makes_of_the_same_noise(trained):
    cfg = imagen.Config(**read(trained)["config"] | dict(distill=str(trained / "last.pt"), pairs=40))
    model, facts, y, pairs = imagen.ask_teacher(cfg, read(trained)["facts"], torch.device("cpu"))
    weight = next(model.parameters()).sum().item()
    with torch.no_grad():
        next(model.parameters()).zero_()  # a student that learns, or resumes, does not change its pairs
    (t, *_), noise, x0 = zip(*pairs, strict=True)
    noise, x0 = torch.cat(noise), torch.cat(x0)
    process, model, _ = imagen.load(trained / "last.pt")
    shape, seed = (cfg.batch_size, *facts["shape"]), 10**9 - cfg.seed
    generator = torch.Generator().manual_seed(seed)
    first = sample(process, model, shape, y[: cfg.batch_size], generator=generator, clip=1.0)
    torch.testing.assert_close(x0[: cfg.batch_size], first)
    unit = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(noise[: cfg.batch_size], unit)
    # A score must not draw what was learned.
    drawn = next(imagen.batches(cfg, process, model, facts["shape"], y))[1]
    assert not torch.isclose(drawn, noise[: cfg.batch_size]).any(1).all()
    assert facts["teacher"] == ("dpm++", 10, 0.0, 40, (), weight) and weight
    assert len(noise) == len(x0) == len(y) == 40
    assert t > 900 and y[:12].tolist() == [*range(10), 0, 1]


@pytest.mark.parametrize("flags", ["--sampler ddpm", "--dataset mnist", "--pairs 100000000", "--load x.pt"])
def test_a_student_without_a_teacher_is_refused(flags, trained, cli, tmp_path, fake_fashionmnist):
    flags = [*flags.split(), "--data_dir", fake_fashionmnist, "--out", tmp_path]
    status, printed = cli("imagen", "--distill", trained / "last.pt", *flags)
    assert status == 2 and len(printed.splitlines()) < 4


def test_a_student_teaches_nobody(trained, cli, tmp_path):
    out = tmp_path / "student"
    assert (
        cli("imagen", "--distill", trained / "last.pt", "--max_steps", 1, "--pairs", 20, "--out", out)[0] == 0
    )
    status, printed = cli("imagen", "--distill", out / "last.pt", "--out", tmp_path / "other")
    assert status == 2 and "no student" in printed
    for flags in (("--guidance", 1), ("--steps", 10), ("--sampler", "ddim")):  # it knows one step only
        assert cli("imagen", "--load", out / "last.pt", *flags)[0] == 2
