import os
import struct
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are about the CPU, where bits repeat
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the hub; without a network it would wait for it


@pytest.fixture
def cli(monkeypatch, capsys):
    """cli("imagen", "--lr", "1e-3") runs the script in this process: (exit status, what it printed)."""

    def call(script, *args):
        import importlib

        import training

        module = importlib.import_module(script)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, args)])
        try:
            training.run_script(module.Config, module.main, module.__doc__)
            status = 0
        except SystemExit as exit:
            status = exit.code or 0
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return call


def write_idx(path: Path, x: torch.Tensor) -> None:
    """Write a uint8 tensor in MNIST's idx format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = struct.pack(f">BBBB{x.dim()}I", 0, 0, 8, x.dim(), *x.shape)
    path.write_bytes(sizes + x.numpy().tobytes())


@pytest.fixture(scope="session")
def fake_fashionmnist(tmp_path_factory):
    """A --data_dir with 120 + 60 made-up images as FashionMNIST's own files: class y is a band at row 2y."""
    root = tmp_path_factory.mktemp("data")
    for split, n in [("train", 120), ("t10k", 60)]:
        y = torch.arange(n, dtype=torch.uint8) % 10
        x = torch.randint(0, 60, (n, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
        for i, label in enumerate(y.tolist()):
            x[i, 2 * label : 2 * label + 4] = 200
        write_idx(root / f"FashionMNIST/raw/{split}-images-idx3-ubyte", x)
        write_idx(root / f"FashionMNIST/raw/{split}-labels-idx1-ubyte", y)
    return root


# The flags of runs of a second or two: of imagen.py, textgen.py and reason.py.
TINY = "--channels 8 16 --blocks 1 1 --batch_size 16 --score_n 0".split()
SMALL_TEXT = (  # and of textgen.py
    "--size tiny --max_tokens 64 --k 4 --span 16 --d 8 --pool mean --vae_width 32 --vae_depth 1 --vocab 400 "
    "--vae_batch 16 --width 32 --depth 1 --diffusion_batch 16 --sampler dpm++ --steps 4"
).split()
SMALL_REASON = "--width 32 --depth 1 --batch_size 16 --steps 2 --votes 2 --train_n 300".split()
SMALL_TOKENS = "--window 32 --block 8 --width 32 --depth 1 --batch_size 8 --score_n 6 --draws 2".split()
