"""Times of sides that take turns, so that what else the machine does falls on all of them."""

import time

import numpy as np
import torch


def synchronize(device) -> None:
    """Wait for what the device has been given to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def interleaved(sides: dict, rounds: int, device) -> dict[str, list[float]]:
    """Seconds of every side(round) in each round, all sides in turn, after a round 0 that warms up."""
    took = {name: [] for name in sides}
    for r in range(rounds + 1):
        for name, side in sides.items():
            synchronize(device)
            start = time.perf_counter()
            side(r)
            synchronize(device)
            if r > 0:
                took[name].append(time.perf_counter() - start)
    return took


def spread(values) -> str:
    """Median and range."""
    return f"{np.median(values):.2f} ({min(values):.2f}..{max(values):.2f})"


def best_rate(work, n: int, rounds: int = 3) -> float:
    """How many of the n things that work() makes it makes a second, in its best round.

    What work() returns is on the CPU, so nothing is left to wait for.
    """
    took = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return n / min(took)
