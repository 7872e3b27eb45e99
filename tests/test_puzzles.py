"""puzzles.py: the solver beside a plain search, what is made, the rules, what people write, symmetries."""

import itertools
import random
from collections import Counter

import pytest
import torch
from conftest import ROOT

from files import UserError
from puzzles import (
    CLUES,
    cell_axes,
    check_sudoku,
    clues_of,
    make_sudoku,
    read_sudoku,
    solutions,
    sudoku_symmetry,
    take_away,
)

SIDES = pytest.mark.parametrize("side", [4, 6, 9])
PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
GRID = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"


def meets(i, j, side):
    """Whether two different cells share a row, a column or a box, by the picture of a grid."""
    high, wide = {4: (2, 2), 6: (2, 3), 9: (3, 3)}[side]
    (r, c), (s, d) = divmod(i, side), divmod(j, side)
    return i != j and (r == s or c == d or (r // high == s // high and c // wide == d // wide))


MEETS = {
    side: [[j for j in range(side**2) if meets(i, j, side)] for i in range(side**2)] for side in (4, 6, 9)
}


def plain_search(puzzle, side):
    """Yield all solutions: at the cell with the fewest digits that it does not see, try each of them."""
    options = {}
    for cell in range(side**2):
        if puzzle[cell] == ".":
            seen = {puzzle[other] for other in MEETS[side][cell]}
            options[cell] = [digit for digit in "123456789"[:side] if digit not in seen]
    if not options:
        if not any(puzzle[i] == puzzle[j] for i in range(side**2) for j in MEETS[side][i]):
            yield puzzle
        return
    cell = min(options, key=lambda cell: len(options[cell]))
    for digit in options[cell]:
        yield from plain_search(puzzle[:cell] + digit + puzzle[cell + 1 :], side)


def is_unique(puzzle, side):
    return len(list(itertools.islice(plain_search(puzzle, side), 2))) == 1


def without(puzzle, cell):
    return puzzle[:cell] + "." + puzzle[cell + 1 :]


def changed(grid, cell, digit):
    return grid[:cell] + digit + grid[cell + 1 :]


def some_grids(side, n):
    return [next(solutions("." * side**2, side, random.Random(i))) for i in range(n)]


# -- the solver ------------------------------------------------------------------------------------------


def test_a_published_puzzle_has_its_published_solution():
    assert list(solutions(PUZZLE, 9)) == [GRID]
    assert list(plain_search(PUZZLE, 9)) == [GRID]


def test_there_are_288_grids_of_side_4():
    grids = list(solutions("." * 16, 4))
    assert len(grids) == len(set(grids)) == 288
    assert all(check_sudoku("." * 16, grid) for grid in grids)


def test_a_grid_of_side_6_whose_first_row_is_given_can_be_filled_in_39168_ways():
    rest = solutions("123456" + "456..." + "." * 24, 6)  # in a sixth of them 456 is below 123
    assert len(set(rest)) == 39168 // 6


@SIDES
def test_the_solutions_are_those_of_a_plain_search(side):
    """Of puzzles with one, with many, and of some with none."""
    rng, counts = random.Random(side), Counter()
    for grid in some_grids(side, 30):
        unknown = rng.uniform(0.4, 0.6) if side == 9 else rng.uniform(0.5, 0.8)
        puzzle = "".join("." if rng.random() < unknown else digit for digit in grid)
        if rng.random() < 0.3:
            puzzle = changed(puzzle, rng.randrange(side**2), str(rng.randint(1, side)))
        found = list(solutions(puzzle, side))
        assert len(found) == len(set(found))
        assert set(found) == set(plain_search(puzzle, side))
        counts[min(2, len(found))] += 1
    assert set(counts) == {0, 1, 2}


def test_a_random_solution_may_be_any():
    rng = random.Random(0)
    made = Counter(next(solutions("." * 16, 4, rng)) for _ in range(4000))
    assert len(made) == 288
    assert set(solutions("." * 16, 4, rng)) == set(made)


def test_puzzles_of_qqwing_have_its_solutions():
    path = ROOT.parent / "shared/data/sudoku/qqwing_minimal_1000.csv"
    if not path.exists():
        pytest.skip("the shared data is not here")
    for line in path.read_text().splitlines()[:50]:
        puzzle, grid = line.replace("0", ".").split(",")
        assert list(solutions(puzzle, 9)) == [grid]
        assert check_sudoku(puzzle, grid)


# -- what is made ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side, n", [(4, 60), (6, 20), (9, 6)])
def test_a_made_puzzle_has_one_solution_and_if_it_is_minimal_no_clue_can_go(side, n):
    rng, kinds = random.Random(side), Counter()
    for _ in range(n):
        puzzle, grid = make_sudoku(rng, side)
        assert check_sudoku(puzzle, grid)
        assert list(plain_search(puzzle, side)) == [grid]
        given = [cell for cell in range(side**2) if puzzle[cell] != "."]
        kinds[clues_of(puzzle)] += 1
        if clues_of(puzzle) == "minimal":
            assert len(given) < CLUES[side][0]
            assert not any(is_unique(without(puzzle, cell), side) for cell in given)
        else:
            assert clues_of(puzzle) in [f"{clues} clues" for clues in CLUES[side]]
            assert clues_of(puzzle) == f"{len(given)} clues"
    assert set(kinds) == {"minimal", *(f"{clues} clues" for clues in CLUES[side])}


def test_half_of_the_puzzles_are_minimal():
    rng = random.Random(0)
    minimal = [clues_of(make_sudoku(rng, 4)[0]) == "minimal" for _ in range(600)]
    assert sum(minimal) / len(minimal) == pytest.approx(0.5, abs=0.06)


@SIDES
def test_as_many_clues_are_left_as_are_asked_for(side):
    grid = some_grids(side, 1)[0]
    for clues in (CLUES[side][1], side**2 - 1, side**2):
        puzzle = take_away(random.Random(1), grid, side, clues)
        assert len(puzzle) - puzzle.count(".") == clues
        assert all(clue in (".", digit) for clue, digit in zip(puzzle, grid, strict=True))


@SIDES
def test_a_puzzle_is_a_function_of_the_generator(side):
    assert make_sudoku(random.Random(5), side) == make_sudoku(random.Random(5), side)
    assert make_sudoku(random.Random(5), side) != make_sudoku(random.Random(6), side)


@SIDES
def test_cells_meet_where_one_of_their_places_is_the_same(side):
    axes = cell_axes(side)
    for i, j in itertools.product(range(side**2), repeat=2):
        if i != j:
            assert any(a == b for a, b in zip(axes[i], axes[j], strict=True)) == meets(i, j, side)
    for axis in zip(*axes, strict=True):
        assert Counter(axis) == {place: side for place in range(side)}


# -- the check -------------------------------------------------------------------------------------------


def test_a_solution_passes_and_nothing_near_it():
    assert check_sudoku(PUZZLE, GRID)
    assert check_sudoku("." * 81, GRID)
    assert check_sudoku(GRID, GRID)
    for cell, character in itertools.product(range(81), "123456789.0x"):
        if character != GRID[cell]:
            assert not check_sudoku("." * 81, changed(GRID, cell, character))
            assert not check_sudoku(PUZZLE, changed(GRID, cell, character))
    for i, j in itertools.combinations(range(81), 2):
        swapped = changed(changed(GRID, i, GRID[j]), j, GRID[i])
        assert check_sudoku("." * 81, swapped) == (GRID[i] == GRID[j])


def test_a_grid_that_changes_a_clue_is_wrong():
    other = GRID.translate(str.maketrans("123456789", "234567891"))
    assert check_sudoku("." * 81, other)
    assert not check_sudoku(PUZZLE, other)
    for cell in range(81):
        assert check_sudoku(changed("." * 81, cell, GRID[cell]), GRID)
        assert not check_sudoku(changed("." * 81, cell, other[cell]), GRID)


@SIDES
def test_rows_columns_and_boxes_all_count(side):
    digits, high = "123456789"[:side], 3 if side == 9 else 2
    wide, cells = side // high, [divmod(cell, side) for cell in range(side**2)]

    def passes(shift):
        """A grid of digits 1, 2, 3, ... that begin anew behind the last one."""
        return check_sudoku("." * side**2, "".join(digits[shift(r, c) % side] for r, c in cells))

    assert passes(lambda r, c: c + r % high * wide + r // high)
    assert not passes(lambda r, c: c + r)  # only the boxes are wrong
    assert not passes(lambda r, c: c + r % high * wide)  # only the columns
    assert not passes(lambda r, c: r + c % wide * high)  # only the rows
    assert not passes(lambda r, c: c)


@pytest.mark.parametrize(
    "grid", ["", ".", GRID[:-1], GRID + "1", GRID[:36], GRID * 2, PUZZLE, " " + GRID[1:]]
)
def test_what_is_no_grid_is_wrong(grid):
    assert not check_sudoku(PUZZLE, grid)


def test_digits_of_other_scripts_are_wrong():
    for zero in "\u0660\uff10":
        assert not check_sudoku("." * 81, GRID.translate({ord(d): ord(zero) + int(d) for d in "123456789"}))


# -- what people write -----------------------------------------------------------------------------------


def framed(puzzle):
    """With bars and dashes, as it is printed."""
    rows = [" ".join(puzzle[i : i + 9]) for i in range(0, 81, 9)]
    rows = ["| " + " | ".join([row[:6], row[6:12], row[12:]]) + " |" for row in rows]
    line = "+-------+-------+-------+"
    return "\n".join([line, *rows[:3], line, *rows[3:6], line, *rows[6:], line])


@pytest.mark.parametrize(
    "text",
    [
        PUZZLE,
        PUZZLE.replace(".", "0"),
        PUZZLE.replace(".", "_"),
        PUZZLE[:40].replace(".", "0") + PUZZLE[40:],
        f"  {PUZZLE}\n",
        "\r\n".join(PUZZLE[i : i + 9] for i in range(0, 81, 9)),
        " ".join(PUZZLE),
        framed(PUZZLE),
        framed(PUZZLE).replace(".", "_"),
        framed(PUZZLE).replace("|", "\t"),
    ],
    ids=range(10),
)
def test_a_puzzle_is_read_as_people_write_it(text):
    assert read_sudoku(text, 9) == (PUZZLE, "")


@SIDES
def test_a_grid_or_a_puzzle_of_any_side_is_read(side):
    puzzle, grid = make_sudoku(random.Random(0), side)
    assert read_sudoku(puzzle.replace(".", "0"), side) == (puzzle, "")
    assert read_sudoku(grid, side) == (grid, "")


def test_it_is_said_that_a_puzzle_has_more_than_one_solution():
    for puzzle, side in [("." * 81, 9), ("." * 16, 4), (without(PUZZLE, 0), 9), ("12" + "." * 34, 6)]:
        read, remark = read_sudoku(puzzle, side)
        assert read == puzzle
        assert ("more than one solution" in remark) != is_unique(puzzle, side)


@pytest.mark.parametrize(
    "text, side, wanted",
    [
        ("", 9, "has 0 cells"),
        (PUZZLE[:-1], 9, "has 80 cells"),
        (PUZZLE + ".", 9, "has 82 cells"),
        ("." * 16, 9, "has 16 cells, but this model was trained for 9 x 9 = 81 cells"),
        ("." * 81, 4, "has 81 cells, but this model was trained for 4 x 4 = 16 cells"),
        (PUZZLE, 4, "has '5', '6', '7', '8', '9'"),
        ("5" + "." * 15, 4, "has '5': give digits 1 to 4"),
        ("7" + "." * 35, 6, "has '7': give digits 1 to 6"),
        (PUZZLE[:-1] + "x", 9, "has 'x'"),
        (PUZZLE[:-1] + "\u0663", 9, "has '\u0663'"),
        (PUZZLE[:-1] + "*,", 9, "has '[*]', ','"),
        ("55" + "." * 79, 9, "no solution"),
        ("5" + "." * 8 + "5" + "." * 71, 9, "no solution"),
        ("5" + "." * 9 + "5" + "." * 70, 9, "no solution"),
        (changed(PUZZLE, 2, "1"), 9, "no solution"),
        (changed(GRID, 80, "8"), 9, "no solution"),
        ("123....4........", 4, "no solution"),
    ],
)
def test_a_puzzle_that_cannot_be_solved_or_read_is_refused(text, side, wanted):
    with pytest.raises(UserError, match=wanted):
        read_sudoku(text, side)


# -- symmetries ------------------------------------------------------------------------------------------


def ids(text):
    return torch.tensor([int(character) for character in text.replace(".", "0")])


def moved(text, cells, digits):
    """The text under each of B symmetries."""
    return ["".join(map(str, row)).replace("0", ".") for row in digits.gather(1, ids(text)[cells]).tolist()]


@SIDES
def test_a_symmetry_makes_right_grids_and_moves_the_clues_with_them(side):
    torch.manual_seed(0)
    puzzle, grid = make_sudoku(random.Random(side), side)
    cells, digits = sudoku_symmetry(100, side, torch.device("cpu"))
    puzzles, grids = moved(puzzle, cells, digits), moved(grid, cells, digits)
    assert all(map(check_sudoku, puzzles, grids))
    assert len(set(grids)) > 50
    assert {new.count(".") for new in puzzles} == {puzzle.count(".")}
    assert (digits[:, 0] == 0).all()
    assert [list(solutions(new, side)) for new in puzzles[:10]] == [[new] for new in grids[:10]]


@pytest.mark.parametrize("side, rows, columns", [(4, 8, 8), (6, 48, 72)])
def test_every_order_of_rows_columns_and_digits_that_keeps_the_boxes_is_drawn(side, rows, columns):
    """2 bands of 2 rows are 2! x 2! x 2! orders, 3 bands of 2 rows 48, 2 stacks of 3 columns 72."""
    torch.manual_seed(0)
    cells, digits = sudoku_symmetry(6000, side, torch.device("cpu"))
    grids = cells.view(-1, side, side)
    upright = grids[(grids[:, 0] // side == grids[:, :1, 0] // side).all(1)]
    assert len(upright) / 6000 == (1 if side == 6 else pytest.approx(1 / 2, abs=0.05))
    assert len((upright[:, :, 0] // side).unique(dim=0)) == rows
    assert len((upright[:, 0] % side).unique(dim=0)) == columns
    assert len(digits.unique(dim=0)) == (24 if side == 4 else 720)
    if side == 4:
        assert len(cells.unique(dim=0)) == rows * columns * 2


def test_grids_of_side_4_are_of_two_kinds_that_no_symmetry_turns_into_each_other():
    torch.manual_seed(0)
    cells, digits = sudoku_symmetry(8000, 4, torch.device("cpu"))
    reached = [set(moved(grid, cells, digits)) for grid in list(solutions("." * 16, 4))[:12]]
    assert {len(kind) for kind in reached} == {96, 192}
    assert len(set(map(frozenset, reached))) == 2


def test_about_half_of_the_grids_of_side_9_are_reflected():
    cells, _ = sudoku_symmetry(1000, 9, torch.device("cpu"))
    first_row = cells[:, :9] // 9
    upright = (first_row == first_row[:, :1]).all(1)
    assert 0.4 < upright.float().mean() < 0.6
    reflected = cells[~upright, :9] % 9
    assert (reflected == reflected[:, :1]).all()
