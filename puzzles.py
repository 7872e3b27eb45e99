"""Sudoku: grids, puzzles with one solution, their symmetries, and the rules by which an answer is checked.

A puzzle is a text, row after row, with "." at each cell that is to be found; its answer is the same text
without dots. A grid of side n has n rows, n columns and n boxes, and each of them holds the digits 1..n.
While a puzzle is solved, the cells that may still take a digit are the bits of one integer, so that a rule
is applied to all cells at once.
"""

import functools
import math
import random
import re

import torch
from torch import Tensor

from files import UserError

BOX = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # of each side: the rows and the columns of a box
CLUES = {4: (6, 7), 6: (13, 15), 9: (29, 33)}  # of puzzles that are not minimal


@functools.cache
def cell_axes(side: int) -> list[list[int]]:
    """The row, the column and the box of each cell."""
    h, w = BOX[side]
    places = [divmod(cell, side) for cell in range(side**2)]
    return [[row, column, row // h * h + column // w] for row, column in places]


@functools.cache
def units(side: int) -> list[int]:
    """The cells of each row, column and box, as bits."""
    found = [0] * 3 * side
    for cell, axes in enumerate(cell_axes(side)):
        for axis, i in enumerate(axes):
            found[axis * side + i] |= 1 << cell
    return found


@functools.cache
def peers(side: int) -> list[int]:
    """For each cell the cells that share a unit with it, as bits."""
    found = []
    for cell in range(side**2):
        seen = 0
        for unit in units(side):
            seen |= unit if unit >> cell & 1 else 0
        found.append(seen & ~(1 << cell))
    return found


# -- the search --------------------------------------------------------------------------------------------


def candidates_of(puzzle: str, side: int) -> list[int]:
    """For each digit 1..n the cells, as bits, at which the puzzle's own cell allows it."""
    candidates = [sum(1 << cell for cell, clue in enumerate(puzzle) if clue == ".")] * side
    for cell, clue in enumerate(puzzle):
        if clue != ".":
            candidates[int(clue) - 1] |= 1 << cell
    return candidates


def count(candidates: list[int]) -> tuple[int, int, int]:
    """The cells, as bits, with at least one, two and three candidates."""
    one = two = three = 0
    for cells in candidates:
        three |= two & cells
        two |= one & cells
        one |= cells
    return one, two, three


def narrow(candidates: list[int], side: int) -> bool:
    """Apply the two rules of singles, in place, as long as they say something; False for a contradiction.

    A cell with one candidate takes it from its peers; a digit with one cell in a unit is what the cell holds.
    """
    spread, everywhere = 0, (1 << side**2) - 1
    while True:
        one, two, _ = count(candidates)
        if one != everywhere:
            return False
        single = one & ~two & ~spread
        spread |= single
        if single:
            for digit, cells in enumerate(candidates):
                candidates[digit] &= ~seen_from(cells & single, side)
            continue
        hidden = hidden_single(candidates, two, side)
        if hidden is None:
            return True
        digit, cell = hidden
        if not cell:
            return False
        for other in range(side):
            candidates[other] &= ~cell if other != digit else -1


def seen_from(cells: int, side: int) -> int:
    """The peers of all these cells."""
    seen = 0
    while cells:
        lowest = cells & -cells
        seen |= peers(side)[lowest.bit_length() - 1]
        cells ^= lowest
    return seen


def hidden_single(candidates: list[int], open_cells: int, side: int) -> tuple[int, int] | None:
    """A digit and the one cell that it has left in some unit, 0 where it has none; None for no such digit."""
    for digit, cells in enumerate(candidates):
        for unit in units(side) if cells & open_cells else []:
            here = cells & unit
            if here & (here - 1) == 0 and (here & open_cells or not here):
                return digit, here
    return None


def search(candidates: list[int], side: int, rng: random.Random | None = None):
    """Yield every solution that the candidates leave, as candidates; with an rng in random order."""
    candidates = list(candidates)
    if not narrow(candidates, side):
        return
    _, two, three = count(candidates)
    if not two:
        yield candidates
        return
    choices = two & ~three or two  # cells with two candidates are the cheapest guesses
    cell = choices & -choices
    if rng:
        cell = 1 << rng.choice([i for i in range(side**2) if choices >> i & 1])
    digits = [digit for digit in range(side) if candidates[digit] & cell]
    if rng:
        rng.shuffle(digits)
    for digit in digits:
        guess = [cells if other == digit else cells & ~cell for other, cells in enumerate(candidates)]
        yield from search(guess, side, rng)


def solutions(puzzle: str, side: int, rng: random.Random | None = None):
    """Yield the solutions of a puzzle, as grids."""
    for candidates in search(candidates_of(puzzle, side), side, rng):
        grid = [""] * side**2
        for digit, cells in enumerate(candidates):
            for cell in range(side**2):
                if cells >> cell & 1:
                    grid[cell] = str(digit + 1)
        yield "".join(grid)


# -- the task ----------------------------------------------------------------------------------------------


def make_sudoku(rng: random.Random, side: int) -> tuple[str, str]:
    """A puzzle with one solution, and the solution.

    Half of the puzzles are minimal: no clue can be left out. The others keep more of them, see CLUES.
    """
    grid = next(solutions("." * side**2, side, rng))
    return take_away(rng, grid, side, clues=rng.choice([0, 0, *CLUES[side]])), grid


def take_away(rng: random.Random, grid: str, side: int, clues: int) -> str:
    """The grid without as many cells as can go, in random order, or with so many clues left."""
    cells, puzzle = list(range(side**2)), list(grid)
    rng.shuffle(cells)
    left = len(cells)
    for cell in cells:
        if left <= clues:
            break
        puzzle[cell] = "."
        candidates = candidates_of(puzzle, side)
        candidates[int(grid[cell]) - 1] &= ~(1 << cell)
        if next(search(candidates, side), None):  # with another digit here it can be solved too
            puzzle[cell] = grid[cell]
        else:
            left -= 1
    return "".join(puzzle)


def clues_of(puzzle: str) -> str:
    """How many clues a puzzle has: one of the two numbers in CLUES, or as few as can be."""
    clues = len(puzzle) - puzzle.count(".")
    return f"{clues} clues" if clues in CLUES[math.isqrt(len(puzzle))] else "minimal"


def check_sudoku(puzzle: str, grid: str) -> bool:
    """Whether the grid keeps the puzzle's clues and each row, column and box of it holds every digit."""
    side = math.isqrt(len(puzzle))
    if len(grid) != len(puzzle):
        return False
    kept = all(clue in (".", digit) for clue, digit in zip(puzzle, grid, strict=True))
    digits = {str(digit + 1) for digit in range(side)}
    return kept and all({grid[i] for i in range(side**2) if unit >> i & 1} == digits for unit in units(side))


def read_sudoku(text: str, side: int) -> tuple[str, str]:
    """A puzzle as people write it, in our form, and a remark, "" for none.

    Cells to be found may be ".", "0" or "_"; spaces, line ends and the lines of a frame do not count. Raises
    UserError for a wrong number of cells, for other characters, and where there is no solution.
    """
    puzzle = re.sub(r"[\s|+-]", "", text)
    puzzle = re.sub("[0_]", ".", puzzle)
    digits = "".join(str(digit + 1) for digit in range(side))
    if strange := set(puzzle) - set(digits) - {"."}:
        got = ", ".join(map(repr, sorted(strange)))
        raise UserError(f"the puzzle has {got}: give digits 1 to {side}, and . for each cell to be found")
    if len(puzzle) != side**2:
        wanted = f"{side} x {side} = {side**2} cells, row after row"
        raise UserError(f"the puzzle has {len(puzzle)} cells, but this model was trained for {wanted}")
    found = solutions(puzzle, side)
    if next(found, None) is None:
        raise UserError("the puzzle has no solution: look for a clue that is mistyped, or in the wrong cell")
    return puzzle, "" if next(found, None) is None else "the puzzle has more than one solution"


def sudoku_symmetry(B: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random symmetries: the cell (B, k) that comes to each place, and what each digit becomes (B, n + 1).

    Rows move within their band and bands move, columns and stacks likewise; grids with square boxes are
    reflected in half of the cases; digits change their names. Id 0, which is no digit, stays.
    """
    h, w = BOX[side]

    def shuffled(groups: int, size: int) -> Tensor:
        group = torch.rand(B, groups, 1, device=device).argsort(1)
        return (group * size + torch.rand(B, groups, size, device=device).argsort(2)).flatten(1)

    row, column = shuffled(side // h, h), shuffled(side // w, w)
    cells = row[:, :, None] * side + column[:, None]
    if h == w:
        flip = torch.rand(B, 1, 1, device=device) < 0.5
        cells = torch.where(flip, cells.transpose(1, 2), cells)
    digits = 1 + torch.rand(B, side, device=device).argsort(1)
    return cells.flatten(1), torch.cat([torch.zeros_like(digits[:, :1]), digits], dim=1)
