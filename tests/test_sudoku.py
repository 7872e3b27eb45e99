"""tasks/sudoku.py: the search beside a plain one, the rules, the puzzles, what people write, symmetries."""

import itertools
import random
from collections import Counter

import pytest
import torch
from conftest import SHARED

from common.run import UserError
from tasks.sudoku import AXES, check, kinds, own_kinds, problems, read, read_file, solve, symmetry

PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
# It has no solution, and Norvig's solver searched for 24 minutes.
LONG = ".....5.8....6.1.43..........1.5........1.6...3.......553.....61........4........."
GRID = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"


def meets(i, j):
    """Whether two different cells share a row, a column or a box, by the picture of a grid."""
    (r, c), (s, d) = divmod(i, 9), divmod(j, 9)
    return i != j and (r == s or c == d or (r // 3 == s // 3 and c // 3 == d // 3))


MEETS = [[j for j in range(81) if meets(i, j)] for i in range(81)]


def plain_search(puzzle):
    """Yield all solutions: at the cell with the fewest digits that it does not see, try each of them."""
    options = {}
    for cell in range(81):
        if puzzle[cell] == ".":
            seen = {puzzle[other] for other in MEETS[cell]}
            options[cell] = [digit for digit in "123456789" if digit not in seen]
    if not options:
        if not any(puzzle[i] == puzzle[j] for i in range(81) for j in MEETS[i]):
            yield puzzle
        return
    cell = min(options, key=lambda cell: len(options[cell]))
    for digit in options[cell]:
        yield from plain_search(changed(puzzle, cell, digit))


def changed(grid, cell, digit):
    return grid[:cell] + digit + grid[cell + 1 :]


def solutions(puzzle, rng=None):
    return list(filter(None, solve(puzzle, rng)))


# -- the search ------------------------------------------------------------------------------------------


def test_the_solutions_are_those_of_a_plain_search():
    """Of a published puzzle, and of puzzles with one, with many, and of some with none."""
    assert solutions(PUZZLE) == list(plain_search(PUZZLE)) == [GRID]
    rng, counts = random.Random(9), Counter()
    for i in range(10):
        grid = next(filter(None, solve("." * 81, random.Random(i))))
        unknown = rng.uniform(0.4, 0.54)
        puzzle = "".join("." if rng.random() < unknown else digit for digit in grid)
        if rng.random() < 0.4:
            puzzle = changed(puzzle, rng.randrange(81), str(rng.randint(1, 9)))
        found = solutions(puzzle)
        assert len(found) == len(set(found))
        assert set(found) == set(plain_search(puzzle)) == set(solutions(puzzle, rng))
        counts[min(2, len(found))] += 1
    assert set(counts) == {0, 1, 2}


def test_puzzles_of_qqwing_have_its_solutions():
    path = SHARED / "data/sudoku/qqwing_minimal_1000.csv"
    if not path.exists():
        pytest.skip("the shared data is not here")
    for line in path.read_text().splitlines()[:50]:
        puzzle, grid = line.replace("0", ".").split(",")
        assert solutions(puzzle) == [grid]
        assert check(puzzle, [grid])


def test_cells_meet_where_one_of_their_axes_is_the_same():
    for i, j in itertools.product(range(81), repeat=2):
        if i != j:
            assert any(a == b for a, b in zip(AXES[i], AXES[j], strict=True)) == meets(i, j)
    for axis in zip(*AXES, strict=True):
        assert Counter(axis) == {place: 9 for place in range(9)}


# -- the problems ----------------------------------------------------------------------------------------


def test_puzzles_have_one_solution_and_grids_are_right_different_and_the_same_each_time():
    made = problems(40)
    puzzles = [puzzle for puzzle, _ in made.test]
    assert len(set(puzzles)) == 750
    assert Counter(sum(map(own_kinds, puzzles), [])) == {"minimal": 379, "33 clues": 195, "29 clues": 176}
    for puzzle in puzzles[::25]:
        (grid,) = solutions(puzzle)
        assert check(puzzle, [grid]) and grid not in dict(made.train)
        if own_kinds(puzzle) == ["minimal"]:
            cells = [cell for cell in range(81) if puzzle[cell] != "."]
            assert all(len(solutions(changed(puzzle, cell, "."))) > 1 for cell in cells[::8])
        else:
            assert own_kinds(puzzle) == [f"{81 - puzzle.count('.')} clues"]
    assert len(dict(made.train)) == 40
    assert all(check("." * 81, thoughts) and thoughts == [grid] for grid, thoughts in made.train)
    assert made.train[:20] == problems(20).train
    assert made.facts["widths"] == [0, 81] and made.facts["alphabet"] == "123456789"


@pytest.mark.parametrize(
    "text",
    [
        f"{PUZZLE}\n{PUZZLE.replace('.', '0')}\r\n",
        f"\ufeff{PUZZLE},{GRID}\n\n{PUZZLE.replace('.', '0')},{GRID}",
        f"quizzes,solutions\n{PUZZLE},{GRID}\n{PUZZLE},{GRID}\n",
        f'source,question,answer,rating\nx,"{PUZZLE}",{GRID},7\npuzzles0,{PUZZLE},{GRID},0\n',
        f"{PUZZLE};{GRID};3\n{PUZZLE}\t{GRID}\n",
    ],
)
def test_puzzles_are_read_from_lines_and_from_fields(text, tmp_path):
    (tmp_path / "puzzles").write_text(text)
    assert read_file(tmp_path / "puzzles") == [(PUZZLE, [])] * 2


@pytest.mark.parametrize(
    "text",
    [
        f"{PUZZLE}\n{PUZZLE[:-1]}\n",  # a cell is missing, or one too many
        f"{PUZZLE[:-1]}\n{PUZZLE}\n",
        f"{PUZZLE}5\n",
        f"{PUZZLE}\nquestion,answer\n",
        f"{PUZZLE},{changed(GRID, 3, '9')}\n",  # not its solution
        f"{GRID},{PUZZLE}\n",
        f"{PUZZLE.replace('.', '-')},{GRID}\n",  # its solution is not the puzzle
        f"{PUZZLE[1:]},{GRID}\n",
        f"{GRID}\n",
        f"{PUZZLE},{GRID},{PUZZLE}\n",
    ],
)
def test_a_line_that_is_no_puzzle_is_refused(text, tmp_path):
    (tmp_path / "puzzles").write_text(text)
    with pytest.raises(UserError, match="line [12]"):
        read_file(tmp_path / "puzzles")


def test_kinds_are_clues_and_the_wrong_guesses_of_a_search():
    assert kinds(PUZZLE) == ["all", "30 clues", "no wrong guesses"]
    for puzzle, _ in problems(1).test[::50]:
        guesses = list(solve(puzzle)).index(solutions(puzzle)[0])
        low, _, high = kinds(puzzle)[2].removesuffix(" wrong guesses").partition(" to ")
        assert guesses == 0 if low == "no" else int(low) <= guesses <= int(high)
    with pytest.raises(UserError, match="no solution"):
        kinds("55" + "." * 79)
    assert kinds(LONG)[1:] == ["17 clues", "1000 or more wrong guesses"]


# -- the check -------------------------------------------------------------------------------------------


def test_a_solution_passes_and_nothing_near_it():
    assert check(PUZZLE, [GRID]) and check("." * 81, [GRID]) and check(GRID, [GRID])
    other = GRID.translate(str.maketrans("123456789", "234567891"))  # it changes the clues
    assert check("." * 81, [other]) and not check(PUZZLE, [other])
    for cell in range(81):
        assert check(changed("." * 81, cell, GRID[cell]), [GRID])
        assert not check(changed("." * 81, cell, other[cell]), [GRID])
        for character in set("123456789.0x") - {GRID[cell]}:
            assert not check("." * 81, [changed(GRID, cell, character)])


@pytest.mark.parametrize(
    "right, shift",
    [
        (True, lambda r, c: c + r % 3 * 3 + r // 3),
        (False, lambda r, c: c + r),  # only the boxes are wrong
        (False, lambda r, c: c + r % 3 * 3),  # only the columns
        (False, lambda r, c: r + c % 3 * 3),  # only the rows
    ],
)
def test_rows_columns_and_boxes_all_count(right, shift):
    """Of grids of the digits 1, 2, 3, ... that begin anew behind the last one."""
    grid = "".join("123456789"[shift(*divmod(cell, 9)) % 9] for cell in range(81))
    assert check("." * 81, [grid]) == right


NO_GRIDS = ["", ".", GRID[:-1], GRID + "1", GRID[:36], GRID * 2, PUZZLE, " " + GRID[1:], "\ud800" * 81]


@pytest.mark.parametrize("grid", NO_GRIDS)
def test_what_is_no_grid_is_wrong(grid):
    assert not check(PUZZLE, [grid]) and not check(PUZZLE, [])
    for zero in "\u0660\uff10":  # digits of other scripts
        assert not check("." * 81, [GRID.translate({ord(d): ord(zero) + int(d) for d in "123456789"})])


# -- what people write -----------------------------------------------------------------------------------


def framed(puzzle, line="+-------+-------+-------+"):
    """With bars and dashes, as it is printed."""
    rows = [" ".join(puzzle[i : i + 9]) for i in range(0, 81, 9)]
    rows = ["| " + " | ".join([row[:6], row[6:12], row[12:]]) + " |" for row in rows]
    return "\n".join([line, *rows[:3], line, *rows[3:6], line, *rows[6:], line])


LINES = "\n".join(PUZZLE[i : i + 9] for i in range(0, 81, 9))


@pytest.mark.parametrize(
    "text",
    [
        *(PUZZLE.replace(".", blank) for blank in ".0_-*xX?"),
        *(framed(PUZZLE).replace(".", blank) for blank in ".0_*x?"),
        *(framed(PUZZLE).replace("|", "\t"), framed(PUZZLE).replace("\n", " ")),
        framed(PUZZLE, "------+-------+------").replace(".", "-"),
        *(PUZZLE[:40].replace(".", "0") + PUZZLE[40:], f"  {PUZZLE}\n"),
        *(LINES.replace("\n", "\r\n"), LINES.replace(".", "-")),
        *(" ".join(PUZZLE), " ".join(PUZZLE).replace(".", "-1")),
        *(str([[int(c) for c in row.replace(".", "0")] for row in LINES.split()]),),
        *(str([[int(c.replace(".", "-1")) for c in row] for row in LINES.split()]),),
    ],
    ids=range(25),
)
def test_a_puzzle_is_read_as_people_write_it(text):
    assert read(text) == PUZZLE


def test_a_full_grid_an_empty_one_and_one_that_is_searched_for_too_long_are_read():
    assert read(GRID) == GRID
    assert read("." * 81) == read("-" * 81) == "." * 81
    assert read(LONG) == LONG


@pytest.mark.parametrize(
    "text",
    [
        *("", " \n", "\udcff" * 81, "." * 16, "-" * 80, " ".join(PUZZLE.replace(".", "-1"))),
        *(PUZZLE[:-1], PUZZLE + ".", PUZZLE[:-1] + "a", PUZZLE[:-1] + "\u0663"),
        *("55" + "." * 79, "5" + "." * 8 + "5" + "." * 71, "5" + "." * 9 + "5" + "." * 70),
        *(changed(PUZZLE, 2, "1"), changed(GRID, 80, "8")),
    ],
    ids=ascii,
)
def test_what_is_no_puzzle_or_has_no_solution_is_refused(text):
    with pytest.raises(UserError):
        read(text)


# -- symmetries ------------------------------------------------------------------------------------------


def test_a_symmetry_makes_right_grids():
    torch.manual_seed(0)
    x0 = torch.tensor([[int(c) for c in GRID]] * 200)
    grids = ["".join(map(str, row)) for row in symmetry(x0).tolist()]
    assert all(check("." * 81, [grid]) for grid in grids)
    assert len(set(grids)) == 200


def test_rows_columns_and_digits_move_and_half_of_the_grids_are_reflected():
    """Each cell of these grids is a number of its own, so that it is seen where it goes."""
    torch.manual_seed(0)
    labelled = torch.arange(1, 82).expand(2000, -1) % 9 + 1  # the column of each cell
    moved = symmetry(labelled).view(-1, 9, 9)
    upright = (moved == moved[:, :1]).all(2).all(1)  # all rows alike: still columns
    assert 0.45 < upright.float().mean() < 0.55
    assert (moved[~upright] == moved[~upright][:, :, :1]).all()
    orders = moved[upright][:, 0]  # of the nine digits: bands, columns in them, and names
    assert len(orders.unique(dim=0)) > 900
    assert (orders.sort(1).values == torch.arange(1, 10)).all()
