"""The short form of faults.py, a few faults of each kind, in a process of its own that does them in turn."""

import subprocess
import sys

import pytest
from conftest import ROOT

KINDS = "kill crash disk folders logs two signals finite dead_rank checkpoint lines texts images".split()


@pytest.fixture(scope="module")
def faults():
    command = [sys.executable, ROOT / "tests/faults.py", "--short"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_lost_or_misread_under_faults_of_this_kind_is_nothing(faults, kind):
    said = []
    for line in faults.stdout:
        said.append(line)
        if line.startswith(f"{kind}: "):
            break
    held, _, tried, *_ = said[-1].removeprefix(f"{kind}: ").split()
    assert held == tried, "".join(said)


def test_no_other_kind_fell(faults):
    printed = faults.communicate(timeout=60)[0]
    assert faults.returncode == 0, printed
