"""A training step must not wait for the device: on the meta device, whatever reads a tensor raises."""

from contextlib import nullcontext

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import imagen
import reason
import textgen
import tokengen
from common.images import load_images
from common.run import Run
from tasks.load import load_problems

META = torch.device("meta")


class Done(Exception):
    pass


class Copies(TorchDispatchMode):
    """Raise for a copy from the host to the device that the host waits for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func is not torch.ops.aten.multinomial.default, "on CUDA it reads its weights"
        to, source = kwargs.get("device"), args[0] if args else None
        if func is torch.ops.aten.copy_.default:
            to, source = args[0].device, args[1]
        if to == META and isinstance(source, torch.Tensor) and source.device.type == "cpu" and source.dim():
            asynchronous = kwargs.get("non_blocking") or args[2:] == (True,)
            assert asynchronous, f"{func} copies {tuple(source.shape)} and waits"
        return func(*args, **kwargs)


@pytest.fixture
def ten_steps(monkeypatch):
    """Ends a training after ten steps, in which no tensor may be read."""
    steps, update = Run.steps, Run.update

    def watched(run, n):
        with Copies():
            yield from steps(run, n)

    def counted(run, loss):
        update(run, loss)
        if run.step == 10:
            raise Done

    monkeypatch.setattr(Run, "steps", watched)
    monkeypatch.setattr(Run, "update", counted)
    for script in (imagen, reason, textgen, tokengen):
        monkeypatch.setattr(script, "autocast", lambda *_: nullcontext())


SLOW = pytest.mark.slow


@pytest.mark.parametrize("denoiser", [pytest.param("unet", marks=SLOW), "transformer"])
def test_images(denoiser, ten_steps, tmp_path):
    cfg = imagen.Config(dataset="digits", denoiser=denoiser, depth=1, out=str(tmp_path), max_steps=20)
    with pytest.raises(Done):
        imagen.train(cfg, load_images("digits", ""), META)


SUDOKU = dict(dataset="sudoku", masks=(0.2, 0.8))


@pytest.mark.parametrize("settings", [{}, dict(snapshot=0.5), pytest.param(SUDOKU, marks=SLOW)])
def test_reasoning(settings, ten_steps, tmp_path):
    cfg = dict(dataset="mult", train_n=100, depth=1, out=str(tmp_path), max_steps=20)
    cfg = reason.Config(**cfg | settings)
    with pytest.raises(Done):
        reason.train(cfg, load_problems(cfg.dataset, 100, (3, 2)), META)


def test_tokens(ten_steps, tmp_path):
    text = "to be or not to be that is the question\n" * 50
    with pytest.raises(Done):
        tokengen.train(tokengen.Config(depth=1, out=str(tmp_path), max_steps=20), text, text, META)


@pytest.fixture
def texts(monkeypatch, tmp_path):
    """The settings of textgen.py at a small size, and few texts."""
    rows = textgen.grammar.rows(300)
    monkeypatch.setattr(textgen.grammar, "rows", lambda: rows)
    sizes = dict(vocab=300, vae_width=32, vae_depth=1, depth=1, k=6, span=8, max_tokens=48, latent_width=8)
    return textgen.Config(dataset="grammar", vae_steps=20, diffusion_steps=20, out=str(tmp_path), **sizes)


def test_texts(texts, ten_steps, monkeypatch):
    # transformers reads masks here, twice in a step of the VAE, unless it is compiled.
    monkeypatch.setattr(transformers.masking_utils, "_ignore_bidirectional_mask_sdpa", lambda *_: False)
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda *_: None)
    monkeypatch.setattr(textgen, "pick_device", lambda: META)
    with pytest.raises(Done):
        textgen.train(texts)


def test_latents(texts, ten_steps, monkeypatch):
    def on_meta(writer, init=textgen.Writer.__post_init__):
        init(writer)
        writer.device = META
        writer.process.to(META), writer.model.to(META)

    monkeypatch.setattr(textgen.Writer, "__post_init__", on_meta)
    monkeypatch.setattr(textgen, "train_vae", lambda cfg, facts, vae, *_: vae)
    with pytest.raises(Done):
        textgen.train(texts)
