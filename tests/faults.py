"""Faults, and what holds: every case is tried, and one table says what held.

    python tests/faults.py                all kinds at full length: an hour on one core
    python tests/faults.py --short        a minute or two, as in CI
    python tests/faults.py kill disk      these kinds alone

A fault holds where nothing is lost and nothing misread: a run goes on and ends bit by bit as one that nothing
disturbed, or there is one clear message and exit status 2. Exit status 1 where anything did not hold; its
folders are kept.
"""

import argparse
import shutil
import time
import traceback
from collections import Counter

from fault_inputs import checkpoint, images, lines, texts
from fault_runs import crash, dead_rank, disk, finite, folders, kill, logs, signals, two
from fault_tools import WORK, prepare

KINDS = [kill, crash, disk, folders, logs, two, signals, finite, dead_rank, checkpoint, lines, texts, images]
KINDS = {kind.__name__: kind for kind in KINDS}


def cases(kind, short: bool):
    """The cases of a kind; where the kind itself breaks off, that is one too."""
    try:
        yield from kind(short)
    except Exception:
        yield kind.__name__, "broke off", traceback.format_exc(), None


def main() -> int:
    """Try the kinds that the command line names; print the cases that did not hold, then the table."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("kinds", nargs="*", choices=[[], *KINDS], metavar="KIND", help=", ".join(KINDS))
    flags.add_argument("--short", action="store_true", help="a few cases of each kind")
    given = flags.parse_args()
    prepare()
    tried, held = Counter(), Counter()
    (WORK / "kept").mkdir()
    for kind in given.kinds or KINDS:
        begin, before = time.time(), (tried.total(), held.total())
        for fault, case, wrong, folder in cases(KINDS[kind], given.short):
            tried[fault] += 1
            held[fault] += not wrong
            if wrong:
                print(f"NOT HELD {fault} ({case}): {wrong}", flush=True)
            if wrong and folder and folder.exists():
                kept = WORK / "kept" / str(tried.total() - held.total())
                print(f"    kept as {shutil.move(folder, kept)}", flush=True)
        count = f"{held.total() - before[1]} of {tried.total() - before[0]} held"
        print(f"{kind}: {count}, {time.time() - begin:.0f} s", flush=True)
    print(f"\n| {'fault':44} | tried |  held |\n|{'-' * 46}|------:|------:|")
    for fault in tried:
        print(f"| {fault:44} | {tried[fault]:5} | {held[fault]:5} |")
    print(f"| {'all':44} | {tried.total():5} | {held.total():5} |")
    if held.total() < tried.total():
        return 1
    shutil.rmtree(WORK)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
