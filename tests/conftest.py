import importlib
import os
import struct
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"  # larger inputs; a test that wants them skips where they are absent
sys.path.insert(0, str(ROOT))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bits repeat on a CPU
os.environ["HF_HUB_OFFLINE"] = "1"

# Flags of runs that take seconds.
TINY = "--channels 8 16 --blocks 1 1 --batch_size 16 --score_n 0".split()  # imagen.py


@pytest.fixture
def cli(monkeypatch, capsys):
    """cli("imagen", "--lr", "1e-3") runs the script in this process: (exit status, what it printed)."""

    def call(script, *args):
        from common.run import run_script

        module = importlib.import_module(script)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, args)])
        try:
            run_script(module.Config, module.main, module.__doc__)
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
