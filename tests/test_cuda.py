"""bench/cuda.py on a CPU at its tiny sizes."""

import pytest
import torch

from bench import cuda
from common.run import UserError


def session(tmp_path, monkeypatch, sections: str) -> list[list[str]]:
    """The cells of each row that sections leave in results.md; the score is without its classifier."""
    monkeypatch.setattr(cuda.imagen, "load_classifier", classifier)
    cuda.main(cuda.Config(minutes=0.01, sections=sections, dataset="digits", out=str(tmp_path)))
    return rows(tmp_path)


def rows(tmp_path) -> list[list[str]]:
    table = (tmp_path / "results.md").read_text().split("---|---|---|---")[-1]
    return [line.split(" | ") for line in table.strip().splitlines()]


def classifier(images, folder, device):
    from common.scores import Classifier

    return Classifier(images.x.shape[1], len(images.names)).eval()


@pytest.mark.slow
def test_every_section_leaves_its_rows_in_order(tmp_path, monkeypatch):
    left = session(tmp_path, monkeypatch, "abcdef")
    assert [row[0] for row in left] == list("a" + 10 * "b" + "c" + 6 * "d" + 3 * "e" + 3 * "f")
    assert {row[1] for row in left} == {"cpu, TINY sizes"}
    assert not [row for row in left if "FAILED" in row[3]]
    images, grammar, *_, manual = (row[3] for row in left if row[0] in "cef")
    assert "FD" in images and "accepted" in grammar and "bits per character" in manual
    assert left[5][3].count("images/s (MFU") == 4
    first = (tmp_path / "results.md").read_text()
    session(tmp_path, monkeypatch, "a")
    assert (tmp_path / "results.md").read_text().startswith(first)


@pytest.mark.slow
def test_what_fails_has_its_error_as_its_row_and_the_others_go_on(tmp_path, monkeypatch):
    def broken(*_):
        raise UserError("no | compiler\n here")

    monkeypatch.setattr(cuda.reason, "main", broken)
    monkeypatch.setitem(cuda.SIDES, "diffusers", broken)
    left = session(tmp_path, monkeypatch, "bf")
    failed = [i for i, row in enumerate(left) if "FAILED" in row[3]]
    assert [left[i][2] for i in failed] == ["diffusers, batch 4, eager", "diffusers, batch 8, eager"] + [
        "reason.py",
        "reason.py on Sudoku",
    ]
    assert left[failed[0]][3] == "FAILED UserError: no / compiler here"
    assert left[4][3].count("images/s") == 3 and "bits per character" in left[-1][3]


def test_what_is_killed_leaves_the_rows_before(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cuda.imagen, "main", killed)
    with pytest.raises(KeyboardInterrupt):
        session(tmp_path, monkeypatch, "acd")
    assert [row[0] for row in rows(tmp_path)] == ["a"]


@pytest.mark.parametrize("inputs", [True, False])
def test_flop_are_those_of_two_or_three_products(inputs):
    layer, x = torch.nn.Linear(7, 5), torch.randn(3, 7, requires_grad=inputs)
    assert cuda.flops(lambda: layer(x).sum()) == (3 if inputs else 2) * 2 * 3 * 7 * 5
