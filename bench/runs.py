"""What the comparisons share: the command line, training for so many seconds, tables and figures."""

import math
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import tyro
from matplotlib.figure import Figure

from bench.timing import synchronize
from common.run import Run, UserError, log, open_checkpoint

FOREVER = 10**6  # steps of a run that its seconds end


def run_bench(Config, main, doc: str) -> None:
    """Read the command line and call main(cfg); Config.default(cfg), if any, are the defaults for it."""
    try:
        parse = partial(tyro.cli, Config, description=doc, use_underscores=True)
        cfg = parse()
        main(parse(default=Config.default(cfg)) if hasattr(Config, "default") else cfg)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


class TimedRun(Run):
    """A Run that ends after `limit` training seconds, or, with early_stop, where the score has risen.

    curve: (step, seconds, score(run.ema)) after every so many steps and after the last.
    """

    def __init__(self, *args, limit: float, score, every: int, early_stop: bool = False, **settings):
        settings["extra"] = dict(curve=[], limit=0.0) | settings.get("extra", {})
        super().__init__(*args, **settings)
        self.limit, self.score, self.every, self.early_stop = limit, score, every, early_stop
        self.most = self.max_steps
        if self.step:
            self.extra = saved_by(type(self.cfg), self.out / "last.pt")["extra"]
        self.curve = self.extra["curve"]

    def steps(self, n: int):
        if self.extra["limit"] >= self.limit:  # finished before
            return
        for step, batch in super().steps(n):
            if step > 1:  # as many as fit, so that the learning rates know where the end is
                fit = max(step, math.ceil((step - 1) * self.limit / self.seconds))
                self.max_steps = min(self.most, fit)
            yield step, batch
            if step % self.every == 0 or step == self.max_steps:
                self.curve.append((step, self.seconds, self.score(self.ema)))
                log(f"  {self.out}, step {step}, {self.seconds:.0f} s: {self.curve[-1][2]:.4f}")
                if self.early_stop and self.curve[-2:][0][2] < self.curve[-1][2] and step < self.max_steps:
                    self._log(self.cfg.lr)
                    self.max_steps = step
            if step == self.max_steps:
                self.extra["limit"] = self.limit

    def update(self, loss) -> None:
        super().update(loss)
        start = time.perf_counter()
        synchronize(self.device)
        self.seconds += time.perf_counter() - start


def timed(script, **settings):
    """Within it, the training of a script is a TimedRun with these settings."""
    return patch.object(script, "Run", partial(TimedRun, **settings))


def saved_by(Config, path) -> dict:
    """The checkpoint of a script at `path`; of a TimedRun saved["extra"]["curve"] is the curve."""
    with open_checkpoint(path, Config) as saved:
        return saved


def print_table(rows: list[dict]) -> None:
    """Print rows of cells by the names of their columns, as Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    log(f"\n| {' | '.join(names)} |\n{'|---' * len(names)}|")
    for row in rows:
        log(f"| {' | '.join(str(row.get(name, '')) for name in names)} |")


def draw(path: Path, curves: dict[str, list[tuple[float, float]]], **axes) -> None:
    """Draw curves of (x, y) points by their names. axes: labels and scales."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    for name, points in curves.items():
        ax.plot(*zip(*points, strict=True), "--" if "GPT" in name else "-", marker=".", label=name)
    ax.set(**axes)
    ax.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    log(f"wrote {path}")


def millions(model) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}"
