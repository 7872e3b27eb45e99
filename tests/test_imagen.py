"""imagen.py as a user runs it: training, sampling, scoring at a tiny size, and mistakes that it names."""

import dataclasses
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image

import imagen
from training import load_checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of 60 steps on the digits, trained once for the tests of this file."""
    out = tmp_path_factory.mktemp("run") / "digits"
    length = ["--max_steps", 60, "--sample_every", 30, "--save_every", 30]
    command = ["imagen.py", "--dataset", "digits", "--out", out, *TINY, "--score_n", 40, *length]
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_a_run_writes_what_it_says(trained):
    out, printed = trained
    for name in "grid film 000030 000060".split():
        assert (out / f"samples/{name}.png").stat().st_size > 100, name
    for name in "config.json log.csv curve.png last.pt".split():
        assert (out / name).stat().st_size > 100, name
    assert json.loads((out / "config.json").read_text())["dataset"] == "digits"
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
        ("--image_size 0", ["image_size must be at least 1, got 0"]),
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
        (dict(config=state["config"] | dict(new_field=1)), "another version of this script: "),
        (dict(config=state["config"] | dict(channels=(8, 24))), "weights of another model"),
        (dict(ema=3), "weights of another model"),
    ]:
        torch.save(state | change, tmp_path / "bad.pt")
        status, printed = cli("imagen", "--sample_from", tmp_path / "bad.pt")
        assert status == 2 and words in printed, printed
    other_data = ["--dataset", "fashionmnist", "--data_dir", fake_fashionmnist]
    status, printed = cli("imagen", "--score_from", out / "last.pt", *other_data)
    assert status == 2 and "was trained on" in printed
    status, printed = cli("imagen", "--sample_from", out / "last.pt", "--predict", "eps")
    assert status == 2 and "--predict eps, but" in printed and "trained with v" in printed
    (tmp_path / "file").write_text("")
    status, printed = cli("imagen", "--dataset", "digits", "--out", tmp_path / "file" / "run", *TINY)
    assert status == 2 and "file" in printed and "Traceback" not in printed
