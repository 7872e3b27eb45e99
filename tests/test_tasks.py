"""tasks.py: problems and checks, files, characters as tokens, answers and their scores, the grammar."""

import itertools
import json
import operator
import random
import re

import datasets
import pytest
from conftest import ROOT

import metrics
from files import UserError
from tasks import (
    ANSWER,
    CLOSES,
    END,
    SUBJECTS,
    TASKS,
    Size,
    Task,
    Tokens,
    addition,
    grammar_rating,
    grammar_review,
    is_test_problem,
    load_problems,
    multiplication,
    read_problem,
    read_thoughts,
)

SHARED = ROOT.parent / "shared"


def numbers_in(text):
    """The numbers of a question or an answer, as Python reads them."""
    return [int(digits.replace(" ", "")[::-1]) for digits in re.findall(r"\d(?: \d)*", text)]


# -- tasks -----------------------------------------------------------------------------------------------


def test_problems_by_hand():
    assert multiplication(321, 45, (3, 2)) == ("1 2 3 * 5 4", ["5 0 6 1", "+ 0 4 8 2 1", "#### 5 4 4 4 1"])
    assert multiplication(2365, 4347, (4, 4))[1][1] == "+ 0 0 6 4 9 0 ( 5 5 1 1 1 1 )"
    assert addition([7, 8, 9], 1) == ("7 + 8 + 9", ["5 1", "#### 4 2"])
    assert addition([99, 15, 90], 2) == ("9 9 + 5 1 + 0 9", ["4 1 1", "#### 4 0 2"])


@pytest.mark.parametrize("n", [4, 5])
def test_multiplications_are_those_of_the_papers_files(n):
    path = SHARED / f"data/{n}by{n}_mult/valid.txt"
    if not path.exists():
        pytest.skip("the shared data is not here")
    for line in path.read_text().splitlines():
        question, thoughts = multiplication(*numbers_in(line.split("||")[0]), (n, n))
        assert f"{question}||{' '.join(thoughts)}" == line
        assert TASKS["mult"].check(question, thoughts)


@pytest.mark.parametrize(
    "task, digits", [("sums", (1, 1)), ("adds", (3, 1)), ("mult", (3, 2)), ("mult", (1, 4))]
)
def test_a_check_accepts_what_python_computes_and_nothing_near(task, digits):
    rng, check = random.Random(1), TASKS[task].check
    for _ in range(200):
        question, thoughts = TASKS[task].make(rng, Size(digits, terms=4))
        numbers, answer = numbers_in(question), thoughts[-1]
        assert [len(str(n)) for n in numbers] == (
            [digits[0], digits[1]] if task == "mult" else [digits[0]] * 4
        )
        true = numbers[0] * numbers[1] if task == "mult" else sum(numbers)
        assert numbers_in(answer) == [true]
        assert check(question, thoughts)
        assert check(question, [answer.replace(" ", "")])
        for wrong in (true + 1, true - 1, true + 10, true * 10):
            assert not check(question, [f"#### {str(wrong)[::-1]}"])


def test_the_thoughts_of_a_sum_are_its_running_totals():
    question, thoughts = TASKS["adds"].make(random.Random(0), Size((3, 1), terms=5))
    numbers = numbers_in(question)
    assert [numbers_in(t)[0] for t in thoughts] == [sum(numbers[:i]) for i in range(2, 6)]


@pytest.mark.parametrize("answer", ["", "+", "1 2 +", "1 2 -", "abc", "-5"])
def test_a_check_cannot_read_what_is_no_number(answer):
    for chain in ([f"#### {answer}"], ["#### 3", answer], [answer]):
        with pytest.raises(ValueError):
            TASKS["mult"].check("1 2 * 3 4", chain)
        assert not metrics.is_right(chain, "1 2 * 3 4", ["#### 8 0 4"], TASKS["mult"].check)


# -- countdown -------------------------------------------------------------------------------------------

PYTHON = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def step(a, sign, b, result):
    return " ".join([*f"{a}"[::-1], sign, *f"{b}"[::-1], "=", *f"{result}"[::-1]])


def replayed(question, chain):
    """Whether steps, all of the form a + b = c, lead to the target, as one plays it by hand."""
    *left, target = numbers_in(question)
    for thought in chain:
        a, b, result = (int(n[::-1]) for n in re.findall(r"\d+", "".join(thought.split())))
        for n in (a, b):
            if n not in left:
                return False
            left.remove(n)
        sign = re.search(r"[-+*/]", thought)[0]
        if (sign == "/" and b == 0) or PYTHON[sign](a, b) != result:
            return False
        left.append(result)
    return left == [target]


def all_ways(numbers):
    """Every chain of whole, non-negative steps that uses the numbers, and what it comes to."""
    if len(numbers) == 1:
        yield [], numbers[0]
    for i, j in itertools.permutations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        rest = [n for place, n in enumerate(numbers) if place not in (i, j)]
        for sign, of in PYTHON.items():
            result = of(a, b) if sign != "/" or b else -1
            if result >= 0 and result == int(result):
                for steps, end in all_ways([*rest, int(result)]):
                    yield [step(a, sign, b, int(result)), *steps], end


@pytest.mark.parametrize("terms", [2, 3, 4, 6])
def test_a_made_countdown_uses_its_numbers_and_passes_its_check(terms):
    rng, signs = random.Random(terms), set()
    for _ in range(200):
        question, chain = TASKS["countdown"].make(rng, Size(terms=terms))
        *numbers, target = numbers_in(question)
        assert len(numbers) == terms
        assert all(1 <= n <= 99 for n in numbers)
        assert 10 <= target <= 99
        assert len(chain) == terms - 1
        assert [thought.startswith("####") for thought in chain] == [False] * (terms - 2) + [True]
        assert replayed(question, chain)
        assert TASKS["countdown"].check(question, chain)
        assert TASKS["countdown"].check(question, ["".join(thought.split()) for thought in chain])
        assert {len(thought.removeprefix("#### ")) for thought in chain} == {21}
        signs |= set(re.findall(r"[-+*/]", " ".join(chain)))
    assert signs == set("+-*/")


def test_every_way_to_the_target_passes_and_no_other_way():
    rng, check, right = random.Random(0), TASKS["countdown"].check, 0
    for numbers in [[8, 2, 4], [1, 1, 10], *([rng.randrange(1, 13) for _ in range(3)] for _ in range(10))]:
        ways = [([*steps[:-1], "#### " + steps[-1]], end) for steps, end in all_ways(numbers)]
        target = rng.choice([end for _, end in ways])
        question = f"{' , '.join(str(n)[::-1] for n in numbers)} = {str(target)[::-1]}"
        for chain, end in ways:
            assert check(question, chain) == (end == target), (question, chain)
            right += end == target
    assert right > 12


@pytest.mark.parametrize(
    "fault, chain",
    [
        ("one number is not used", ["#### 5 * 2 = 0 1"]),
        ("one number is used twice", ["5 * 2 = 0 1", "0 1 * 2 = 0 2", "#### 0 2 + 3 = 3 2"]),
        ("one number is not given", ["5 * 2 = 0 1", "#### 0 1 + 4 = 4 1"]),
        ("the last number is not given, though it comes out", ["3 - 2 = 1", "#### 3 1 * 1 = 3 1"]),
        ("a result is used twice", ["5 * 2 = 0 1", "0 1 + 3 = 3 1", "#### 3 1 * 3 1 = 9 6 1"]),
        ("a result is not used", ["3 * 2 = 6", "#### 5 + 8 = 3 1"]),
        ("it comes to another number", ["5 * 2 = 0 1", "#### 0 1 - 3 = 7"]),
        ("the target is not the last result", ["5 * 2 = 0 1", "0 1 + 3 = 3 1", "#### 3 1 + 0 = 3 1"]),
        ("a step is not true", ["5 * 2 = 0 1", "#### 0 1 - 3 = 3 1"]),
        ("it divides by zero", ["5 / 0 = 0", "#### 0 + 3 = 3 1"]),
        ("a number is negative", ["2 - 5 = -3", "#### 3 - -3 = 6"]),
        ("no answer is marked", ["5 * 2 = 0 1", "0 1 + 3 = 3 1"]),
        ("an earlier thought is marked", ["#### 5 * 2 = 0 1", "0 1 + 3 = 3 1"]),
        ("a mark is inside a step", ["5 * #### 2 = 0 1", "#### 0 1 + 3 = 3 1"]),
        ("the answer is only a number", ["5 * 2 = 0 1", "0 1 + 3 = 3 1", "#### 3 1"]),
        ("a step has three numbers", ["#### 5 * 2 + 3 = 3 1"]),
        ("a thought has two steps", ["5 * 2 = 0 1 + 3 = 3 1", "####"]),
        ("it is turned round", ["0 1 = 5 * 2", "#### 3 1 = 0 1 + 3"]),
        ("a thought is empty", ["5 * 2 = 0 1", "", "#### 0 1 + 3 = 3 1"]),
        ("there is nothing", []),
    ],
)
def test_a_countdown_is_wrong_where(fault, chain):
    right, check = ["5 * 2 = 0 1", "#### 0 1 + 3 = 3 1"], TASKS["countdown"].check
    assert metrics.is_right(right, "5 , 2 , 3 = 3 1", right, check)
    assert not metrics.is_right(chain, "5 , 2 , 3 = 3 1", right, check), fault


@pytest.mark.parametrize(
    "question, chain",
    [
        ("3 , 1 = 5", ["#### 5 * 1 = 5"]),
        ("0 1 , 1 = 0 5", ["#### 0 5 / 1 = 0 5"]),
        ("5 , 5 , 0 1 = 0 1", ["5 - 5 = 0", "#### 0 1 - 0 = 5"]),
        ("5 , 7 , 7 = 0 2", ["7 - 7 = 0", "#### 0 2 + 0 = 0 2"]),
        ("5 , 8 , 3 = 3 1", ["#### 5 + 8 = 3 1"]),
        ("7 , 2 , 4 = 2 1", ["7 / 2 = 3", "#### 3 * 4 = 2 1"]),
    ],
)
def test_to_reach_the_target_is_not_enough(question, chain):
    """A step takes what it makes, a number is left over, or a division has a remainder."""
    assert not metrics.is_right(chain, question, chain, TASKS["countdown"].check)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\0",
        "\ud800",
        "1+1",
        "=",
        "1 + 1 = = 2",
        "1 + 1 2 = ",
        "__import__('os')",
        "1 0 0 ** 2 0 0 = 1 0 0",
        "True + True = 2",
        "1.0 + 1 = 2",
        "'1' + '' = '1'",
        "1j + 1 = 2",
        "0x1 + 1 = 2",
        "1_ + 1 = 2",
        "1e0 + 1 = 2",
        "(1) + 1 = 2",
        "1 + 1 = 2 # so",
        "1 + 1 != 2",
        "1 + 1 = 2 and 3",
        "\u00b9 + 1 = 2",
        "9" * 5000 + " * 1 = " + "9" * 5000,
        "(" * 100_000 + "1 + 1 = 2",
        "-" * 100_000 + "1 + 1 = 2",
        "1 + " * 100_000 + "1 = 2",
        "1 " * 100_000,
        "[" * 1000 + "]" * 1000,
    ],
    ids=ascii,
)
def test_what_is_no_step_is_wrong_and_nothing_worse(text):
    for chain in ([text], [f"#### {text}"], [text, "#### 1 + 1 = 2"]):
        assert metrics.is_right(chain, "1 , 1 = 2", ["#### 1 + 1 = 2"], TASKS["countdown"].check) is False


def test_a_countdown_that_is_changed_anywhere_passes_only_if_it_is_still_right():
    rng, check, passed = random.Random(0), TASKS["countdown"].check, 0
    for _ in range(3000):
        question, true = TASKS["countdown"].make(rng, Size(terms=3))
        chain = list(true)
        for _ in range(rng.randrange(1, 3)):
            place = rng.randrange(len(chain))
            text, i = chain[place], rng.randrange(len(chain[place]))
            changed = rng.choice("0123456789 +-*/=#,.(_x\0")
            chain[place] = text[:i] + changed * rng.randrange(3) + text[i + rng.randrange(2) :]
        if rng.random() < 0.1:
            chain.reverse()
        if metrics.is_right(chain, question, true, check):
            passed += 1
            assert replayed(question, chain), (question, chain)
    assert 0 < passed < 1500


# -- splits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, size, space",
    [
        ("sums", Size(terms=3), 1000),
        ("adds", Size((1, 1), terms=3), 729),
        ("mult", Size((2, 1)), 810),
        ("mult", Size((4, 4)), 81e6),
        ("countdown", Size(terms=3), 99**3),
        ("sudoku", Size(side=4), 1e5),
    ],
)
def test_splits_are_disjoint_and_hold_no_question_twice(name, size, space):
    problems, task = load_problems(name, size, 300), TASKS[name]
    assert (problems.task, problems.check, problems.is_puzzle) == (task, task.check, name == "sudoku")
    train, test = set(problems.question), set(problems.question_test)
    assert len(train) == len(problems.question) == len(problems.thoughts) == 300
    assert len(test) == len(problems.question_test) == len(problems.thoughts_test)
    assert not train & test
    assert len(test) == task.test_n or abs(len(test) - space / task.held_out) < 30
    assert all(map(problems.check, problems.question, problems.thoughts))
    assert all(map(problems.check, problems.question_test, problems.thoughts_test))


def test_problems_repeat_and_more_of_them_never_hold_a_test_question():
    problems = load_problems("mult", Size(), 300)
    assert problems == load_problems("mult", Size(), 300)
    assert problems.checksum() != load_problems("mult", Size(), 301).checksum()
    assert not set(load_problems("mult", Size(), 2000).question) & set(problems.question_test)
    assert all(map(is_test_problem, problems.question_test))


def test_a_tenth_of_all_questions_is_held_out_or_as_many_as_the_task_says():
    questions = [f"{i} + {j}" for i, j in itertools.product(range(200), range(100))]
    assert metrics.share(map(is_test_problem, questions)) == pytest.approx(1 / 10, abs=0.005)
    assert metrics.share(is_test_problem(q, 3) for q in questions) == pytest.approx(1 / 3, abs=0.01)


def test_a_task_with_few_problems_gives_all_of_them():
    problems = load_problems("sums", Size(terms=2), 50_000)
    assert len(problems.question) + len(problems.question_test) == 100


def test_published_multiplications_serve_as_test_problems_and_leave_the_training_set(tmp_path):
    usual = load_problems("mult", Size((4, 4)), 200)
    known, path = usual.question[3], tmp_path / "valid.txt"
    pairs = [(known, usual.thoughts[3]), multiplication(5678, 1234, (4, 4))]
    path.write_text("".join(f"{question}||{' '.join(thoughts)}\n" for question, thoughts in pairs))
    problems = load_problems("mult", Size((4, 4)), 200, test=str(path))
    assert list(zip(problems.question_test, problems.thoughts_test, strict=True)) == pairs
    assert problems.question == [question for question in usual.question if question != known]
    assert problems.note == "left out: 1 training questions that the test split has too"
    assert problems.check(*pairs[1])
    # They are a data set of their own, too.
    more = tmp_path / "train.txt"
    more.write_text("1 2 * 3 4||3 6 0 + 0 4 8 #### 3 0 9\n" + path.read_text())
    assert load_problems(str(more), test=str(path)).thoughts == [["3 6 0", "+ 0 4 8", "#### 3 0 9"]]
    with pytest.raises(UserError, match="--test is a file of questions and chains: sudoku has none"):
        load_problems("sudoku", Size(side=4), 20, test=str(path))


def test_a_task_of_ones_own_is_one_entry(monkeypatch):
    def make(rng, size):
        word = "".join(rng.choice("ab") for _ in range(size.terms))
        return word, [f"#### {word[::-1]}"]

    def check(question, chain):
        return chain == [f"#### {question[::-1]}"]

    monkeypatch.setitem(TASKS, "turn", Task(make, check, held_out=2, test_n=15))
    problems = load_problems("turn", Size(terms=6), n=20)
    assert (len(problems.question), len(problems.question_test)) == (20, 15)
    assert problems.check(problems.question_test[0], problems.thoughts_test[0])
    assert not problems.is_puzzle


def test_of_a_file_only_the_answer_counts_and_it_is_no_puzzle(tmp_path):
    problems = load_problems(str(write_jsonl(tmp_path / "gsm.jsonl")))
    assert (problems.task, problems.check, problems.is_puzzle) == (None, None, False)


@pytest.mark.parametrize("side", [4, 6, 9])
def test_a_puzzle_has_a_place_for_each_cell_and_symmetries(side):
    size, task = Size(side=side), TASKS["sudoku"]
    question, (grid,) = task.make(random.Random(0), size)
    assert len(question) == len(grid) == len(task.axes(size)) == side**2
    cells, tokens = task.symmetry(5, size, "cpu")
    assert (cells.shape, tokens.shape) == ((5, side**2), (5, side + 1))
    assert metrics.is_right([grid], question, [grid], task.check)
    for chain in ([question], [grid[::-1]], [""], [], None, ["\ud800" * side**2]):
        assert not metrics.is_right(chain, question, [grid], task.check)


# -- files -----------------------------------------------------------------------------------------------


def row(i, j):
    """A problem as GSM8K has it, with one equation or two."""
    steps = f"He has {i}+{j}=<<{i}+{j}={i + j}>>{i + j}.\nThat is all.\n" + f"<<{i}*1={i}>>So.\n" * (i % 2)
    return dict(question=f"Tom has {i} pens and buys {j}. How many?", answer=f"{steps}#### {i + j:,}")


GSM = [row(i, 995 + i % 4) for i in range(60, 100)]


def write_jsonl(path, rows=GSM):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def test_thoughts_are_equations_or_lines(tmp_path):
    path = str(write_jsonl(tmp_path / "gsm.jsonl"))
    equations, text = load_problems(path), load_problems(path, form="text")
    assert ["<<60+995=1055>>", "#### 1,055"] in equations.thoughts + equations.thoughts_test
    assert ["He has 60+995=1055.", "That is all.", "#### 1,055"] in text.thoughts + text.thoughts_test
    assert {len(t) for t in equations.thoughts} == {2, 3}
    assert {len(t) for t in text.thoughts} == {3, 4}


def test_of_a_single_file_a_tenth_is_held_out_and_of_training_problems_n_are_kept(tmp_path):
    problems = load_problems(str(write_jsonl(tmp_path / "gsm.jsonl")))
    assert len(problems.question) + len(problems.question_test) == 40
    assert not set(problems.question) & set(problems.question_test)
    assert load_problems(str(tmp_path / "gsm.jsonl"), n=5).question == problems.question[:5]


def test_a_folder_has_its_own_splits_and_what_both_hold_is_only_tested(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", GSM[:30])
    write_jsonl(tmp_path / "test.jsonl", GSM[25:])
    problems = load_problems(str(tmp_path))
    assert (len(problems.question), len(problems.question_test)) == (25, 15)


def test_lines_of_text_are_read_as_their_owner_means_them(tmp_path):
    """A mark at the start of the file, empty lines, bars in the question, a line separator of Unicode."""
    lines = [f"Tom has {i} pens\u2028(a||b)?||<<16-3-4=9>> <<9*2=18>> #### 1 8" for i in range(40)]
    (tmp_path / "p.TXT").write_text("\ufeff" + "\n\n".join(lines) + "\n\n", encoding="utf-8")
    problems = load_problems(str(tmp_path / "p.TXT"))
    assert len(problems.question) + len(problems.question_test) == 40
    assert set(map(tuple, problems.thoughts)) == {("<<16-3-4=9>>", "<<9*2=18>>", "#### 1 8")}
    questions = problems.question + problems.question_test
    assert {question[:7] for question in questions} == {"Tom has"}
    assert {question[-7:] for question in questions} == {"(a||b)?"}


def csv_field(text):
    return '"' + text.replace('"', '""') + '"'


def test_problems_of_a_table_are_the_same_in_every_form(tmp_path):
    lines = ["answer,question,id", *(f"{csv_field(p['answer'])},{csv_field(p['question'])},7" for p in GSM)]
    (tmp_path / "a.csv").write_text("\ufeff" + "\r\n".join(lines) + "\r\n\r\n", encoding="utf-8", newline="")
    (tmp_path / "a.json").write_text(json.dumps(dict(data=GSM)), encoding="utf-8")
    (tmp_path / "a.JSONL").write_text("\ufeff" + "\n\n".join(map(json.dumps, GSM)), encoding="utf-8")
    datasets.Dataset.from_list(GSM).to_parquet(tmp_path / "a.parquet")
    wanted = load_problems(str(write_jsonl(tmp_path / "gsm.jsonl")))
    for name in ("a.csv", "a.json", "a.JSONL", "a.parquet"):
        assert load_problems(str(tmp_path / name)) == wanted, name


def test_the_folder_of_implicit_chain_of_thought_is_read_and_valid_left_out(tmp_path):
    for name, n in (("train", 30), ("valid", 3), ("test", 4)):
        lines = [f"{name} {i}||<<{i}+1={i + 1}>> #### {i + 1}" for i in range(n)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    problems = load_problems(str(tmp_path))
    assert (len(problems.question), len(problems.question_test)) == (30, 4)
    assert (problems.question[1], problems.thoughts[1]) == ("train 1", ["<<1+1=2>>", "#### 2"])
    assert problems.question_test[0] == "test 0"
    assert problems.note == "left out: valid.txt"


def test_what_is_left_out_of_the_training_problems_is_said(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", GSM[:30])
    write_jsonl(tmp_path / "test.jsonl", GSM[25:])
    note = load_problems(str(tmp_path), n=20).note
    assert "left out: 5 training questions that the test split has too" in note
    assert "left out: 5 training problems beyond --train_n 20" in note
    assert load_problems(str(tmp_path / "train.jsonl")).note == ""


@pytest.mark.parametrize(
    "tail, answer",
    [
        ("#### 1,234", "1,234"),
        ("#### 3/4", "3/4"),
        ("####-5", "-5"),
        ("#### $ 18", "$ 18"),
        ("#### 10:30 ", "10:30"),
        ("#### 5 0 3 2", "5 0 3 2"),
        ("#### 12 apples", "12 apples"),
        ("#### 43.", "43"),
        ("####\n 82", "82"),
        ("#### 42 The answer is: 42", "42"),
        ("#### 42\nThe answer is: 42", "42"),
        ("#### 42. the answer is 42.", "42"),
        ("#### x = 5\u2028", "x = 5"),
    ],
)
@pytest.mark.parametrize("form", ["equations", "text"])
def test_an_answer_is_what_its_line_says_without_metamaths_tail(tail, answer, form):
    thoughts = ["<<40+2=42>>"] if form == "equations" else ["So."]
    assert read_thoughts(f"So<<40+2=42>>.\n{tail}", form, "") == [*thoughts, f"#### {answer}"]


def test_only_line_ends_part_thoughts():
    assert read_thoughts("a\u2028b\x0cc\x85d\r\ne\n#### 3", "text", "") == [
        "a\u2028b\x0cc\x85d",
        "e",
        "#### 3",
    ]


@pytest.mark.parametrize(
    "rows, wanted",
    [
        ([*GSM[:3], dict(question="How?", answer="I do not know.")], "line 4: no '#### number'"),
        ([dict(question="How?", answer="So. ####")], "line 1: no '#### number'"),
        ([dict(question="How?", answer="#### Step 1\nSo.\n#### 3")], "line 1: no '#### number'"),
        ([dict(question="How?", answer="#### 42. So he has 42.")], "line 1: '42. So he has 42' is more"),
        ([dict(question="How?", answer="#### 42\nThat is all.")], "is more than an answer"),
        ([dict(question="How?", answer="#### x = 2\ny = 3")], "is more than an answer"),
        ([dict(question="How?", answer="##### 5")], "line 1: no '#### number'"),
        ([dict(question="How?", answer="#### 42 Final answer: 42")], "line 1: '42 Final answer: 42' is more"),
        ([*GSM[:3], dict(question="", answer="#### 3")], "line 4: question is ''"),
        (
            [dict(query="x", response="#### 3")],
            "line 1 has the columns query, response; a problem's are called",
        ),
        ([dict(text="3 + 4 #### 7")], "line 1 has no || between question and thoughts"),
        ([dict(question="How?", answer=3)], "line 1: answer is 3"),
        ([*GSM, dict(question="x" * 1001, answer="#### 3")], "line 41: 1001 characters in the question"),
        (
            [*GSM, dict(question="How?", answer="<<1>>" * 16 + "#### 3")],
            "line 41: 4 characters in the question and 17",
        ),
        (GSM[:1], "both must be at least 1"),
        (
            [dict(question=f"{i}?", answer=f"So.\n#### {i}") for i in range(30)],
            "no <<equation>> in any answer",
        ),
    ],
)
def test_a_row_that_is_no_problem_is_named(rows, wanted, tmp_path):
    path = write_jsonl(tmp_path / "gsm.jsonl", rows)
    with pytest.raises(UserError, match=re.escape(wanted)) as error:
        load_problems(str(path))
    assert "gsm.jsonl" in str(error.value)


@pytest.mark.parametrize(
    "dataset, wanted",
    [
        ("sodoku", "no data set 'sodoku'; without a network use --dataset mult"),
        ("no.txt", "no file no.txt; without a network use --dataset mult"),
        ("no.jsonl", "no file no.jsonl"),
        (".", "has no split train"),
        ("gsm8k", "could not be loaded from the hub"),
    ],
)
def test_what_is_not_there_is_named(dataset, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(wanted)):
        load_problems(dataset)


# -- tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "alphabet, texts",
    [
        ("*0123456789" + ANSWER, ["1 2 3 * 5", "#### 9", ""]),
        (" 012345678=<>" + ANSWER, ["<<1 =  3>>", "#### 3", ""]),
    ],
)
def test_texts_come_back_from_their_ids(alphabet, texts):
    tokens = Tokens(alphabet)
    ids = tokens.encode(texts, 12)
    assert ids.shape == (3, 12)
    assert ids.min() >= 0
    assert ids.max() < tokens.V
    assert tokens.decode(ids) == texts


def test_a_text_ends_where_END_is_and_a_mask_is_no_character():
    tokens = Tokens("abc")
    assert tokens.text([1, tokens.V, 2, END, 3]) == "a b"


@pytest.mark.parametrize(
    "text, wanted", [("1" * 13, "13 characters, but this model takes at most 12"), ("x", "has 'x'")]
)
def test_a_text_that_does_not_fit_is_refused(text, wanted):
    with pytest.raises(UserError, match=wanted):
        Tokens(" 1").encode([text], 12)


# -- answers: the part of metrics.py that reads chains ----------------------------------------------------


@pytest.mark.parametrize(
    "chain, answer",
    [
        (["<<1+2=3>>", "#### 3"], "3"),
        (["#### 1,234"], "1234"),
        (["#### 1,234,567"], "1234567"),
        (["#### 1,5"], "1,5"),
        (["#### 1, 2, 3"], "1,2,3"),
        (["#### -5 "], "-5"),
        (["#### 8 3 0"], "830"),
        (["  #### 0.5"], "0.5"),
        ([], None),
        ([""], None),
        (["3"], None),
        (["####"], None),
        (["### 3"], None),
        (["3 #### 3"], None),
        (["#### 3", "4"], None),
    ],
)
def test_answers_are_read_or_missing(chain, answer):
    assert metrics.answer_of(chain) == answer


@pytest.mark.parametrize(
    "answers, elected",
    [("3 4 4 - - -", 1), ("3 4", 0), ("- 3 4", 1), ("3 4 5 5 4", 1), ("- -", None), ("", None)],
)
def test_the_first_chain_with_the_most_frequent_answer_is_elected(answers, elected):
    chains = [[f"way {i}", f"#### {answer.strip('-')}"] for i, answer in enumerate(answers.split())]
    assert metrics.majority(chains) == (None if elected is None else chains[elected])


def test_answers_are_the_same_with_other_spaces_and_no_chain_is_never_right():
    chains = [["#### 1"], ["a", "#### 1 2"], ["b", "#### 12"], [], ["12"]]
    assert metrics.majority(chains) == ["a", "#### 1 2"]
    for chain, check in itertools.product([None, []], [None, *(task.check for task in TASKS.values())]):
        assert not metrics.is_right(chain, "1 + 2", ["#### 3"], check)


def test_a_share_is_of_any_iterable_and_of_nothing_it_is_0():
    assert metrics.share([]) == 0
    assert metrics.share(iter([True, False, False, True])) == 0.5


def test_scores_count_what_is_missing_or_malformed_as_wrong():
    truth = [["1 2", "3", "#### 4"]] * 5
    chains = [["12", "3", "#### 4"], ["1 2", "7", "#### 4"], ["1 2", "3"], [], ["#### 4"]]
    scores = metrics.score_chains(chains, ["?"] * 5, truth)
    assert scores == dict(answer=0.6, chain=0.2, unended=0.4, thoughts=[0.6, 0.4, 0.4])


def test_an_answer_is_right_by_the_check_of_its_task_where_it_has_one():
    questions, truth = ["1 * 2", "1 * 2", "1 * 2", "1 * 2"], [["#### 2"]] * 4
    chains = [["#### 2"], ["#### 2 0"], ["#### *"], ["2"]]  # 20 is 02, the least significant digit first
    check = TASKS["mult"].check
    assert metrics.score_chains(chains, questions, truth, check)["answer"] == 0.5
    assert metrics.score_chains(chains, questions, truth)["answer"] == 0.25


# -- the grammar -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rating", [1, 2, 3, 4, 5])
def test_reviews_are_accepted_with_their_rating(rating):
    rng = random.Random(rating)
    for _ in range(200):
        review = grammar_review(rng, rating)
        assert grammar_rating(review) == rating
        good = [word for words, _ in SUBJECTS.values() for word in words]
        said = review.split(". ")[:4]
        assert sum(any(sentence.endswith(word) for word in good) for sentence in said) == rating - 1


def test_what_the_grammar_does_not_write_is_not_accepted():
    rng = random.Random(0)
    for _ in range(100):
        review = grammar_review(rng, 3)
        first, second, third, fourth, close = re.findall(r"[^.!]+[.!]", review)
        assert (
            grammar_rating(first + second + third + fourth + " " + CLOSES[1]) is None
        )  # the close of another
        assert grammar_rating(first + second + third + close) is None
        assert grammar_rating(first + second + third + " " + first + close) is None  # a subject twice
        assert grammar_rating(review.replace(" was ", " was not ", 1)) is None
        assert grammar_rating(review.replace(" was ", " is ", 1)) is None
        assert grammar_rating(review + " so.") is None
        assert grammar_rating(review[:-1]) is None
    assert grammar_rating("") is None


@pytest.mark.parametrize(
    "line, question",
    [
        ("What is the norm?||<<||v||=5>> #### 5", "What is the norm?"),
        ("Say (use || once)||<<1+1=2>> #### 2", "Say (use || once)"),
        ("1 2 * 3||6 3 #### 6 3", "1 2 * 3"),
    ],
)
def test_bars_in_a_question_or_an_equation_are_its_own(line, question):
    read, thoughts = read_problem(dict(text=line), "equations", "line 1")
    assert read == question and thoughts[-1] == f"####{line.partition('####')[2]}"
