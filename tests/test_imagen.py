"""imagen.py as a user runs it: training, sampling, scoring at a tiny size, and mistakes that it names."""

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image

import imagen
import metrics
from data import Images
from diffusion import sample
from files import UserError, load_checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of 60 steps on the digits, trained once for the tests of this file."""
    out, printed = tmp_path_factory.mktemp("run") / "digits", io.StringIO()
    small = dict(channels=(8, 16), blocks=(1, 1), batch_size=16, score_n=40)
    length = dict(max_steps=60, sample_every=30, save_every=30)
    with contextlib.redirect_stdout(printed):
        imagen.main(imagen.Config(dataset="digits", out=str(out), **small, **length))
    return out, printed.getvalue()


def test_a_run_writes_what_it_says(trained):
    out, printed = trained
    for name in "grid film 000030".split():
        assert (out / f"samples/{name}.png").stat().st_size > 100, name
    for name in "config.json log.csv curve.png last.pt".split():
        assert (out / name).stat().st_size > 60, name
    assert json.loads((out / "config.json").read_text())["dataset"] == "digits"
    first = (
        "digits: 1437 training and 360 test images of 1 x 8 x 8, 10 classes (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)"
    )
    assert printed.splitlines()[0] == first
    assert printed.splitlines()[-1].endswith(f"python imagen.py --sample_from {out / 'last.pt'}")
    grid = Image.open(out / "samples/grid.png")
    assert grid.height == 10 * (8 * 7 + 2)  # ten rows
    assert grid.width > 10 * (8 * 7 + 2)  # of ten, and the labels


def test_progress_bar_on_a_terminal(tmp_path):
    """Under a pseudo-terminal the progress is a bar with loss, rate and time left."""
    leader, follower = pty.openpty()
    fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    command = [
        "imagen.py",
        "--dataset",
        "digits",
        "--out",
        tmp_path,
        *TINY,
        "--max_steps",
        "20",
        "--log_every",
        "5",
    ]
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=follower
    )
    os.close(follower)
    seen = b""
    while chunk := read(leader):
        seen += chunk
    assert process.wait() == 0
    assert b"20/20" in seen
    assert b"loss 0." in seen


def read(fd):
    try:
        return os.read(fd, 4096)
    except OSError:  # Linux: the other end was closed
        return b""


def test_samples_are_drawn_from_the_ema(trained, monkeypatch):
    out, _ = trained
    seen = []
    monkeypatch.setattr(imagen, "grid", lambda cfg, process, model, *_: seen.append(model.state_dict()))
    monkeypatch.setattr(imagen, "film", lambda *_: None)
    state = load_checkpoint(out / "last.pt", "imagen")
    imagen.main(imagen.Config(**state["config"] | dict(sample_from=str(out / "last.pt"))))
    assert all(torch.equal(seen[0][k], v) for k, v in state["ema"].items())
    assert any(not torch.equal(state["model"][k], v) for k, v in state["ema"].items())


def test_sampling_takes_its_configuration_from_the_file_and_flags_override(trained, cli, monkeypatch):
    out, _ = trained
    monkeypatch.setattr(imagen, "load_images", lambda *_: pytest.fail("sampling must not load data"))
    assert cli("imagen", "--sample_from", out / "last.pt")[0] == 0  # --channels 8 16 are not repeated
    plain = (out / "samples/grid_dpm++_10_guidance0_seed0.png").read_bytes()
    assert (
        cli("imagen", "--sample_from", out / "last.pt", "--sampler", "ddim", "--steps", 3, "--seed", 5)[0]
        == 0
    )
    assert (out / "samples/grid_ddim_3_guidance0_seed5.png").read_bytes() != plain
    assert cli("imagen", "--sample_from", out / "last.pt")[0] == 0
    assert (
        out / "samples/grid_dpm++_10_guidance0_seed0.png"
    ).read_bytes() == plain  # the same seed, the same pictures
    assert (out / "samples/film_ddim_3_guidance0_seed5.png").exists()
    assert load_checkpoint(out / "last.pt", "imagen")["step"] == 60  # and the run is as it was


def test_guidance_changes_samples(trained, cli):
    out, _ = trained
    for g in (0, 2):
        assert (
            cli("imagen", "--sample_from", out / "last.pt", "--guidance", g, "--out", out.parent / f"g{g}")[0]
            == 0
        )
    a, b = (next((out.parent / f"g{g}" / "samples").glob("grid*")).read_bytes() for g in (0, 2))
    assert a != b


def test_score_from_prints_the_table_and_shows_nearest_images(trained, cli, monkeypatch):
    out, printed_by_training = trained
    monkeypatch.setattr("metrics.inception_fid", lambda samples, real: 12.25)
    status, printed = cli("imagen", "--score_from", out / "last.pt")
    assert status == 0
    assert "12.25 (n=40 against 360)" in printed
    assert (out / "samples/nearest_dpm++_10_guidance0_seed0.png").exists()
    rows = [line for line in printed.splitlines() if line.startswith("  samples")]
    assert rows and rows[0] in printed_by_training  # the same weights, seed and n: the same figures


@pytest.mark.parametrize(
    "flags",
    [
        "--denoiser transformer --width 32 --depth 1",
        "--predict eps --schedule linear --weight plain",
        "--predict x0 --sampler ddpm --T 50 --steps 50",
        "--predict flow --schedule flow --weight plain --sampler ddim",
        "--sampler heun --steps 9",
    ],
)
def test_variants_train(flags, tmp_path, cli):
    status, printed = cli(
        "imagen", "--dataset", "digits", "--out", tmp_path, *TINY, "--max_steps", 2, *flags.split()
    )
    assert status == 0 and (tmp_path / "samples/grid.png").exists(), printed


def test_classes_and_n_choose_what_is_drawn_and_each_sample_is_a_file(trained, cli, tmp_path):
    out, _ = trained
    run = ["--sample_from", out / "last.pt", "--out", tmp_path, "--classes", 7, 3]
    assert cli("imagen", *run, "--n", 3)[0] == 0
    folder = tmp_path / "samples/dpm++_10_guidance0_seed0"
    files = sorted(folder.iterdir())
    assert [path.name for path in files] == [f"{i}_00{j}.png" for i in (3, 7) for j in range(3)]
    before = [np.array(Image.open(path)) for path in files]
    assert {x.shape for x in before} == {(8, 8)}  # grey, and not enlarged
    assert any((before[0] != x).any() for x in before[1:])
    assert Image.open(tmp_path / "samples/grid_dpm++_10_guidance0_seed0.png").height == 2 * (8 * 7 + 2)
    assert cli("imagen", *run, "--n", 12)[0] == 0
    assert len(list(folder.iterdir())) == 24
    for path, x in zip(files, before, strict=True):  # of the same noise as before
        assert np.abs(np.array(Image.open(path)).astype(int) - x).max() <= 1
    status, printed = cli("imagen", *run, "cat")
    assert status == 2 and "--classes cat is not among the classes; they are 0, 1, 2" in printed


def test_files_of_samples_have_safe_and_different_names(tmp_path):
    names = ["T-shirt/top", "../../up", "a b", "A_B", "", "/etc/passwd", "猫", "x" * 300, "nul\0", "sample"]
    x = torch.zeros(11, 3, 4, 6, dtype=torch.uint8)
    x[:, 0] = torch.arange(11)[:, None, None]
    imagen.save_each(x, [*range(10), -1], names, tmp_path / "in" / "there")
    files = list(tmp_path.rglob("*.png"))
    assert {path.parent for path in files} == {tmp_path / "in" / "there"}
    assert sorted(Image.open(path).getpixel((0, 0)) for path in files) == [(i, 0, 0) for i in range(11)]
    assert all(re.fullmatch(r"[\w-]+\.png", path.name) for path in files)
    imagen.save_each(x[:1], [0], ["T-shirt/top"], tmp_path)
    assert (tmp_path / "T-shirt_top_000.png").exists()


def test_load_gives_process_model_and_facts_to_sample_from(trained):
    out, _ = trained
    process, model, facts = imagen.load(out / "last.pt")
    assert facts["shape"] == [1, 8, 8] and facts["names"][3] == "3"
    assert not model.training
    ema = load_checkpoint(out / "last.pt", "imagen")["ema"]
    assert all(torch.equal(ema[name], w) for name, w in model.state_dict().items())
    x = sample(process, model, (4, *facts["shape"]), torch.full((4,), 3), clip=1.0)
    assert x.shape == (4, 1, 8, 8) and x.abs().max() <= 1
    with pytest.raises(UserError, match="no checkpoint at"):
        imagen.load(out / "gone.pt")


def test_samples_are_drawn_in_parts_of_the_training_batch(trained, monkeypatch):
    _, model, facts = imagen.load(trained[0] / "last.pt")
    sizes = []
    monkeypatch.setattr(
        imagen, "sample", lambda _, model, shape, *rest, **how: sizes.append(shape) or torch.zeros(shape)
    )
    cfg = imagen.Config(batch_size=16)
    assert len(imagen.draw(cfg, None, model, facts["shape"], torch.zeros(40), torch.device("cpu"))) == 40
    assert [shape[0] for shape in sizes] == [16, 16, 8]


def test_labels_of_a_grid_are_written_in_their_script_and_never_cut(tmp_path):
    rows = [torch.full((2, 1, 8, 8), 255, dtype=torch.uint8)]

    def margin(label):
        imagen.save_grid(rows, [label], tmp_path / "grid.png")
        picture = np.array(Image.open(tmp_path / "grid.png").convert("L"))
        return picture[:, : picture.shape[1] - 2 * 58]

    for one, other in [("собака", "ссссса"), ("γάτα", "γγγα"), ("قطة", "ققة")]:
        assert margin(one).shape != margin(other).shape or (margin(one) != margin(other)).any()
        assert (margin(one) < 128).any()
    assert margin("W" * 40).shape[1] > margin("i" * 40).shape[1]
    assert margin("W" * 40)[:, -3:].min() == 255
    for odd in ("two\nlines", "\x1b[31m", "\udcff", ""):
        assert margin(odd).shape[0] == 58


def test_a_picture_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    imagen.save_grid([torch.zeros(2, 1, 8, 8, dtype=torch.uint8)], [""], path)
    before = path.read_bytes()

    def torn(self, file, format):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", torn)
    with pytest.raises(UserError, match="no space left"):
        imagen.save_grid([torch.ones(2, 1, 8, 8, dtype=torch.uint8)], [""], path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_goes_on_with_data_that_have_moved(tmp_path, cli):
    for i in range(10):
        (tmp_path / "pics" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 20 * i).save(tmp_path / "pics" / "ab"[i % 2] / f"{i}.png")
    (tmp_path / "pics" / "notes.txt").write_text("mine")
    run = ["--out", tmp_path / "out", *TINY]
    status, printed = cli("imagen", "--dataset", tmp_path / "pics", *run, "--max_steps", 2)
    assert status == 0, printed
    assert "8 training and 2 test images of 1 x 8 x 8, 2 classes (a, b); left out: 1 .txt" in printed
    (tmp_path / "pics").rename(tmp_path / "moved")
    run += ["--resume", "--max_steps", 3]
    status, printed = cli("imagen", "--dataset", f"{tmp_path}/./moved/", *run)
    assert status == 0 and "at step 2" in printed, printed
    (tmp_path / "moved" / "a" / "0.png").unlink()
    status, printed = cli("imagen", "--dataset", tmp_path / "moved", *run)
    assert status == 2 and "other data" in printed, printed


def test_transparent_images_are_trained_on_with_the_background(tmp_path, cli):
    (tmp_path / "in").mkdir()
    for i in range(4):
        Image.new("RGBA", (8, 8), (20 * i, 0, 0, 128)).save(tmp_path / "in" / f"{i}.png")
    run = ["--dataset", tmp_path / "in", "--out", tmp_path / "out", *TINY, "--max_steps", 1]
    status, printed = cli("imagen", *run)
    assert status == 2 and "is transparent: choose what is behind it, say --background white" in printed
    status, printed = cli("imagen", *run, "--background", "white")
    assert status == 0 and "4 training and 0 test images of 3 x 8 x 8, no classes" in printed, printed
    status, printed = cli("imagen", *run, "--resume", "--background", "black")
    assert status == 2 and "--background black, but" in printed


def test_folder_of_images_without_classes(tmp_path, cli):
    for i in range(12):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.new("RGB", (9, 12), (20 * i, 100, 0)).save(tmp_path / "in" / f"{i}.png")
    run = ["--dataset", tmp_path / "in", "--out", tmp_path / "out", *TINY, "--score_n", 2, "--max_steps", 2]
    status, printed = cli("imagen", *run)
    assert status == 2
    assert "images are 9x12" in printed
    assert "--image_size 8" in printed
    status, printed = cli("imagen", *run, "--image_size", 8)
    assert status == 0
    assert "not scored: " in printed


@pytest.mark.parametrize("train, test, classes", [(9, 40, 2), (40, 9, 2), (40, 40, 1)])
def test_too_few_images_are_not_scored(train, test, classes, tmp_path):
    x, y = torch.zeros(40, 1, 8, 8, dtype=torch.uint8), torch.zeros(40, dtype=torch.long)
    images = Images(x[:train], y[:train], x[:test], y[:test], ["a", "b"][:classes])
    with pytest.raises(UserError, match=f"got {classes} classes, {train} training and {test} test images"):
        metrics.load_classifier(images, str(tmp_path), torch.device("cpu"))


def test_import_is_light():
    """Slow libraries load only where they are used, so that --help and importing stay quick."""
    heavy = "torchvision matplotlib sklearn scipy torchmetrics diffusers transformers datasets"
    code = f"import sys, imagen; print([m for m in {heavy.split()} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- mistakes --------------------------------------------------------------------------------------------


def test_help_shows_every_field_with_its_own_comment(cli):
    status, printed = cli("imagen", "--help")
    source = (ROOT / "imagen.py").read_text()
    words = set(re.sub(r"[│╭╰─╮╯]", " ", printed).split())
    for field in dataclasses.fields(imagen.Config):
        comment = re.search(rf"^    {field.name}: .*  # (.*)$", source, re.M)[1]
        assert f"--{field.name}" in printed
        assert {comment.split()[0], comment.split()[-1]} <= words, field.name


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--laerning_rate 1", ["--laerning"]),
        ("--lr fast", ["--lr", "fast"]),
        ("--max_steps 1.5", ["--max_steps", "1.5"]),
        ("--max_steps 0", ["max_steps must be in [1", "got 0"]),
        ("--sampler euler", ["euler", "ddim"]),
        ("--denoiser mlp", ["mlp", "unet"]),
        ("--ema_decay 1.5", ["ema_decay must be in [0, 1], got 1.5"]),
        ("--batch_size 0", ["batch_size must be in [1", "got 0"]),
        ("--steps 2000", ["steps must be in [1, 1000], got 2000"]),
        ("--guidance -1", ["guidance", "got -1"]),
        ("--guidance 1 --label_drop 0", ["--label_drop above 0"]),
        ("--channels 12 24 --blocks 1 1", ["channels", "multiples of 8", "(12, 24)"]),
        ("--channels 8 16 --blocks 1", ["channels", "blocks"]),
        ("--width 100", ["width a multiple of 16, got", "100"]),
        ("--dataset mnits", ["'mnits'", "fashionmnist", "digits"]),
        ("--sample_from nowhere.pt", ["no checkpoint at nowhere.pt"]),
        ("--score_from nowhere.pt", ["no checkpoint at nowhere.pt"]),
        ("--dataset digits --channels 8 8 8 8 8 --blocks 1 1 1 1 1", ["images are 8x8", "divisible by 16"]),
        (
            "--dataset digits --denoiser transformer --patch 3",
            ["images are 8x8", "divisible by 3", "--image_size 6"],
        ),
        ("--dataset digits --device cuda", ["--device cuda is not available here"]),
        (
            "--dataset digits --schedule linear --T 1 --steps 1",
            ["error: --schedule linear, --T 1", "to noise"],
        ),
        ("--dataset digits --schedule flow --predict eps", ["eps says nothing of x0"]),
        ("--image_size 0", ["image_size must be in [1, 4096], got 0"]),
        (
            "--dataset digits --channels 8 8 8 8 --blocks 1 1 1 1",
            ["level of 1x1 with 8 channels", "16 or more"],
        ),
        ("--background whit", ["background must be a colour such as white", "whit"]),
        (
            "--dataset digits --classes 3 three",
            ["--classes three is not among", "they are 0, 1, 2, 3, 4, 5, 6"],
        ),
        ("--n 0", ["n must be in [1", "got 0"]),
        (f"--T {10**30}", ["T must be in [1, 100000]"]),
        (f"--batch_size {10**30}", ["batch_size must be in [1, 100000]"]),
        (f"--max_steps {10**30}", ["max_steps must be in [1, "]),
        (f"--image_size {10**30}", ["image_size must be in [1, 4096]"]),
        (f"--width {16 * 10**30}", ["width must be in [16, 16384]"]),
        (f"--depth {10**30}", ["depth must be in [1, 1024]"]),
        (f"--channels {8 * 10**30} --blocks 1", ["channels must be", "got (8000"]),
        (f"--channels 8 --blocks {10**30}", ["blocks from 1 to 1000"]),
        ("--lr inf", ["lr must be in [1e-09, 1], got inf"]),
        ("--guidance nan", ["guidance must be in [0, 1000], got nan"]),
    ],
)
def test_mistakes_exit_2_with_one_message(flags, words, cli, tmp_path):
    status, printed = cli("imagen", "--out", tmp_path, *flags.split())
    flat = " ".join(printed.replace("│", " ").split())
    assert status == 2 and all(word in flat for word in words), printed
    assert "Traceback" not in printed and not any(tmp_path.iterdir())


def test_a_run_is_never_overwritten_and_resume_is_checked(trained, cli):
    out, _ = trained
    before = (out / "last.pt").read_bytes()
    again = ["--dataset", "digits", "--out", out, *TINY, "--max_steps", 70]
    status, printed = cli("imagen", *again)
    assert status == 2 and "exists already: add --resume" in printed
    status, printed = cli("imagen", *again, "--resume", "--predict", "eps")
    assert status == 2 and "--predict eps, but" in printed and "with v" in printed
    assert (out / "last.pt").read_bytes() == before


def test_checkpoint_of_another_script_version_or_data(trained, cli, tmp_path, fake_fashionmnist):
    out, _ = trained
    state = load_checkpoint(out / "last.pt", "imagen")
    for change, words in [
        (dict(kind="textgen"), "not a checkpoint of imagen.py"),
        (dict(config=state["config"] | dict(new_field=1)), "does not fit this version of the script"),
        (dict(config=state["config"] | dict(channels=(8, 24))), "does not fit this version of the script"),
        (dict(ema=3), "is not as imagen.py writes it"),
        (dict(facts=state["facts"] | dict(names="cats")), "is not as imagen.py writes it"),
        (dict(facts=state["facts"] | dict(shape=[1, 8])), "does not fit this version of the script"),
        (dict(facts=state["facts"] | dict(shape=[1, 8, 10**12])), "but this unet needs"),
        (dict(facts=state["facts"] | dict(shape=[2, 8, 8])), "images are 8x8 with 2 channels, but"),
    ]:
        torch.save(state | change, tmp_path / "bad.pt")
        status, printed = cli("imagen", "--sample_from", tmp_path / "bad.pt")
        assert status == 2 and words in printed, printed
    other_data = ["--dataset", "fashionmnist", "--data_dir", fake_fashionmnist]
    status, printed = cli("imagen", "--score_from", out / "last.pt", *other_data)
    assert status == 2 and "other data than fashionmnist: shape, images, names, checksum differ" in printed
    status, printed = cli("imagen", "--sample_from", out / "last.pt", "--predict", "eps")
    assert status == 2 and "--predict eps, but" in printed and "trained with v" in printed
    (tmp_path / "file").write_text("")
    status, printed = cli("imagen", "--dataset", "digits", "--out", tmp_path / "file" / "run", *TINY)
    assert status == 2 and "file" in printed and "Traceback" not in printed


def test_a_training_whose_score_cannot_be_written_is_done_all_the_same(tmp_path, cli, monkeypatch):
    (tmp_path / "file").write_text("where a folder is wanted, as in a working directory that is read-only")
    monkeypatch.setattr(imagen, "CACHE", tmp_path / "file")
    monkeypatch.setattr("metrics.train_classifier", lambda *data: None)
    flags = ["--dataset", "digits", *TINY, "--score_n", 20, "--max_steps", 2, "--out", tmp_path / "out"]
    status, printed = cli("imagen", *flags)
    assert status == 0 and "not scored: " in printed and "sample again: " in printed, printed
