"""tasks/: made problems and their checks, files of problems, characters as tokens, the grammar."""

import itertools
import json
import operator
import random
import re

import datasets
import pytest
import torch
from conftest import SHARED

from common.run import UserError
from tasks import arithmetic, countdown
from tasks.arithmetic import multiplication
from tasks.grammar import CLOSES, SUBJECTS, rating_of, review
from tasks.load import load_problems, read_row, read_rows
from tasks.problems import END, MARK, decode, encode, final_answer, is_held_out


def numbers_in(text):
    """The numbers of a question or an answer, as Python reads them."""
    return [int(digits[::-1]) for digits in re.findall(r"\d+", text.replace(" ", ""))]


def load(dataset, n=300, digits=(3, 2), test=None):
    return load_problems(str(dataset), n, digits, test and str(test))


# -- multiplication --------------------------------------------------------------------------------------


def test_problems_by_hand():
    assert multiplication(321, 45, (3, 2)) == ("123*54", ["5061", "+04821", "####54441"])
    assert multiplication(2365, 4347, (4, 4))[1][1] == "+006490(551111)"


@pytest.mark.parametrize("n", [4, 5])
def test_multiplications_are_those_of_the_papers_files(n):
    path = SHARED / f"data/{n}by{n}_mult/valid.txt"
    if not path.exists():
        pytest.skip("the shared data is not here")
    for line in path.read_text().splitlines():
        question, thoughts = multiplication(*numbers_in(line.split("||")[0]), (n, n))
        assert f"{question}||{''.join(thoughts)}" == line.replace(" ", "")
        assert arithmetic.check(question, thoughts)


def test_a_check_accepts_the_product_and_nothing_near():
    rng = random.Random(1)
    for _ in range(200):
        a, b = rng.randrange(100, 1000), rng.randrange(1, 100)
        question, thoughts = multiplication(a, b, (3, 2))
        assert arithmetic.check(question, thoughts)
        assert arithmetic.check(question, [f"#### {' '.join(thoughts[-1][4:])}"])
        for wrong in (a * b + 1, a * b - 1, a * b + 10, a * b * 10):
            assert not arithmetic.check(question, [f"####{str(wrong)[::-1]}"])
    for answer in ("", "+", "12+", "abc", "-5", "\u0661"):
        assert not arithmetic.check("12*34", [f"####{answer}"])
    for chain in ([], [""], ["804"], ["####804", "+"]):
        assert not arithmetic.check("12*34", chain)


# -- countdown -------------------------------------------------------------------------------------------

PYTHON = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def step(a, sign, b, result):
    return f"{a}"[::-1] + sign + f"{b}"[::-1] + "=" + f"{result}"[::-1]


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


def padded(chain):
    """The chain with numbers of three digits, as they are learned."""
    return [re.sub(r"\d+", lambda number: number[0].ljust(3, "0"), thought) for thought in chain]


def test_a_made_countdown_uses_its_numbers_and_passes_its_check():
    rng, signs = random.Random(0), set()
    for _ in range(200):
        question, chain = countdown.make(rng)
        *numbers, target = numbers_in(question)
        assert len(numbers) == 3 and all(1 <= n <= 99 for n in numbers) and 10 <= target <= 99
        assert [thought.startswith("####") for thought in chain] == [False, True]
        assert countdown.check(question, chain)
        assert {len(thought.removeprefix("####")) for thought in chain} == {11}
        signs |= set(re.findall(r"[-+*/]", " ".join(chain)))
    assert signs == set("+-*/")


def test_every_way_to_the_target_larger_numbers_first_passes_and_no_other_way():
    rng, right = random.Random(0), 0
    for numbers in [[8, 2, 4], [1, 1, 10], *([rng.randrange(1, 13) for _ in range(3)] for _ in range(10))]:
        ways = [([*steps[:-1], "####" + steps[-1]], end) for steps, end in all_ways(numbers)]
        target = rng.choice([end for _, end in ways])
        question = f"{','.join(str(n)[::-1] for n in numbers)}={str(target)[::-1]}"
        for chain, end in ways:
            falls = all(
                int(a[::-1]) >= int(b[::-1]) for a, b in re.findall(r"(\d+)\D(\d+)=", " ".join(chain))
            )
            assert countdown.check(question, padded(chain)) == (end == target and falls), (question, chain)
            right += end == target and falls
    assert right > 12


@pytest.mark.parametrize(
    "chain",
    [
        "####5*2=01",  # one number is not used
        "5*2=01 01*2=02 ####02+3=32",  # one is used twice
        "5*2=01 ####01+4=41",  # one is not given
        "3-2=1 ####31*1=31",  # the last one is not given, though it comes out
        "5*2=01 01+3=31 ####31*31=961",  # a result is used twice
        "3*2=6 ####5+8=31",  # a result is not used
        "5*2=01 ####01-3=7",  # it comes to another number
        "5*2=01 01+3=31 ####31+0=31",  # the target is not the last result
        "5*2=01 ####01-3=31",  # a step is not true
        "5/0=0 ####0+3=31",  # it divides by zero
        "2-5=-3 ####3--3=6",  # a number is negative
        "5*2=01 01+3=31",  # no answer is marked
        "####5*2=01 01+3=31",  # an earlier thought is marked
        "5*####2=01 ####01+3=31",  # a mark is inside a step
        "5*2=01 01+3=31 ####31",  # the answer is only a number
        "####5*2+3=31",  # a step has three numbers
        "5*2=01+3=31 ####",  # a thought has two steps
        "01=5*2 ####31=01+3",  # it is turned round
        "5*2=01  ####01+3=31",  # a thought is empty
        "",
    ],
)
def test_a_chain_that_breaks_a_rule_is_wrong(chain):
    assert countdown.check("5,2,3=31", padded("5*2=01 ####01+3=31".split(" ")))
    assert not countdown.check("5,2,3=31", padded(chain.split(" "))) and not countdown.check("5,2,3=31", [])


@pytest.mark.parametrize(
    "question, chain",
    [
        ("3,1=5", "####5*1=5"),  # a step takes what it makes
        ("01,1=05", "####05/1=05"),
        ("5,5,01=01", "5-5=0 ####01-0=5"),
        ("5,7,7=02", "7-7=0 ####02+0=02"),
        ("5,8,3=31", "####5+8=31"),  # a number is left over
        ("7,2,4=21", "7/2=3 ####3*4=21"),  # a division has a remainder
    ],
)
def test_to_reach_the_target_is_not_enough(question, chain):
    assert not countdown.check(question, padded(chain.split()))


STRANGE = ["", "\0", "\ud800", "1+1", "=", "1+1==2", "1+12=", "100**200=100", "1.0+1=2", "1e0+1=2", "1+1!=2"]


@pytest.mark.parametrize("text", [*STRANGE, "\u00b9+1=2"], ids=ascii)
def test_what_is_no_step_is_wrong_and_nothing_worse(text):
    for chain in ([text], [f"####{text}"], [text, "####1+1=2"]):
        assert countdown.check("1,1=2", chain) is False


# -- splits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, digits, space", [("mult", (2, 1), 810), ("mult", (4, 4), 81e6), ("countdown", (3, 2), 99**3)]
)
def test_splits_are_disjoint_and_hold_no_question_twice(name, digits, space):
    problems = load(name, 100, digits)
    train, test = dict(problems.train), dict(problems.test)
    assert len(train) == len(problems.train) == 100
    assert len(test) == len(problems.test) and not train.keys() & test.keys()
    assert len(test) == 2000 or abs(len(test) - space / 10) < 30
    assert all(problems.check(*problem) for problem in problems.train + problems.test)
    more = dict(load(name, 200, digits).train)
    assert list(more)[:100] == list(train) and not more.keys() & test.keys()


def test_the_problems_are_those_that_the_measured_models_learned_and_were_asked():
    """aca34c9's, which made the figures of docs/results.md: the first of each split."""
    problems = load("mult", 50_000)
    assert (len(problems.train), len(problems.test)) == (50_000, 2000)
    assert [question for question, _ in problems.train[:3]] == ["469*95", "678*36", "141*34"]
    assert [question for question, _ in problems.test[:3]] == ["337*24", "546*78", "638*16"]
    assert problems.train[-1][0] == "475*25"
    problems = load("countdown", 20)
    assert [question for question, _ in problems.train[:3]] == ["05,89,45=49", "66,36,25=55", "73,81,79=24"]
    assert [question for question, _ in problems.test[:3]] == ["93,17,83=27", "50,46,24=72", "93,25,34=03"]


def test_a_tenth_of_all_questions_is_held_out():
    questions = [f"{i} + {j}" for i, j in itertools.product(range(200), range(100))]
    assert sum(map(is_held_out, questions)) / len(questions) == pytest.approx(1 / 10, abs=0.005)
    problems = load("mult", 50_000, (1, 1))  # of few problems all are given
    assert len(problems.train) + len(problems.test) == 81


def test_published_multiplications_are_test_problems_and_leave_the_training_set(tmp_path):
    usual, path = load("mult", 200, (4, 4)), tmp_path / "valid.txt"
    pairs = [usual.train[3], multiplication(5678, 1234, (4, 4))]
    lines = [f"{' '.join(question)}||{' '.join(''.join(thoughts))}\n" for question, thoughts in pairs]
    path.write_text("".join(lines).replace("# # # #", "####"))
    problems = load("mult", 200, (4, 4), path)
    assert problems.test == pairs
    assert problems.train == usual.train[:3] + usual.train[4:]
    # They are a data set of their own, too.
    more = tmp_path / "train.txt"
    more.write_text("1 2 * 3 4||3 6 0 + 0 4 8 ( 3 0 9 ) #### 3 0 9\n" + path.read_text())
    assert load(more, test=path).train == [("1 2 * 3 4", ["3 6 0", "+ 0 4 8 ( 3 0 9 )", "#### 3 0 9"])]


@pytest.mark.parametrize("dataset", ["mult", "countdown", "sudoku"])
def test_a_test_file_of_other_problems_is_refused(dataset, tmp_path):
    (tmp_path / "other.txt").write_text("Tom has 3 pens?||<<1+2=3>> #### 3\n")
    with pytest.raises(UserError, match="other.txt"):
        load(dataset, 20, test=tmp_path / "other.txt")


# -- files -----------------------------------------------------------------------------------------------


def row(i, j):
    """A problem as GSM8K has it, with one equation or two."""
    steps = f"He has {i}+{j}=<<{i}+{j}={i + j}>>{i + j}.\nThat is all.\n" + f"<<{i}*1={i}>>So.\n" * (i % 2)
    return dict(question=f"Tom has {i} pens and buys {j}. How many?", answer=f"{steps}#### {i + j:,}")


GSM = [row(i, 995 + i % 4) for i in range(60, 100)]


def write_jsonl(path, rows=GSM):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def test_of_a_single_file_a_tenth_is_held_out_and_its_equations_are_thoughts(tmp_path):
    problems = load(write_jsonl(tmp_path / "gsm.jsonl"))
    assert len(problems.train) + len(problems.test) == 40
    assert all(is_held_out(question) for question, _ in problems.test)
    assert not any(is_held_out(question) for question, _ in problems.train)
    assert load(tmp_path / "gsm.jsonl", n=5).train == problems.train[:5]
    thoughts = [thoughts for _, thoughts in problems.train + problems.test]
    assert ["<<60+995=1055>>", "#### 1,055"] in thoughts
    assert {len(t) for t in thoughts} == {2, 3}


def test_a_folder_has_its_own_splits_and_what_both_hold_is_only_tested(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", GSM[:30])
    write_jsonl(tmp_path / "test.jsonl", GSM[25:])
    problems = load(tmp_path)
    assert (len(problems.train), len(problems.test)) == (25, 15)


def test_lines_of_text_are_read_as_their_owner_means_them(tmp_path):
    """A mark at the start of the file, empty lines, bars in the question, a line separator of Unicode."""
    lines = [f"Tom has {i} pens\u2028(a||b)?||<<16-3-4=9>> <<9*2=18>> #### 1 8" for i in range(40)]
    (tmp_path / "p.TXT").write_text("\ufeff" + "\n\n".join(lines) + "\n\n", encoding="utf-8")
    problems = load(tmp_path / "p.TXT")
    found = problems.train + problems.test
    assert len(found) == 40
    assert {tuple(thoughts) for _, thoughts in found} == {("<<16-3-4=9>>", "<<9*2=18>>", "#### 1 8")}
    assert {question[:7] + question[-7:] for question, _ in found} == {"Tom has(a||b)?"}


def csv_field(text):
    return '"' + text.replace('"', '""') + '"'


def test_problems_of_a_table_are_the_same_in_every_form(tmp_path):
    lines = ["answer,question,id", *(f"{csv_field(p['answer'])},{csv_field(p['question'])},7" for p in GSM)]
    (tmp_path / "a.csv").write_text("\ufeff" + "\r\n".join(lines) + "\r\n\r\n", encoding="utf-8", newline="")
    (tmp_path / "a.json").write_text(json.dumps(GSM), encoding="utf-8")
    (tmp_path / "a.JSONL").write_text("\ufeff" + "\n\n".join(map(json.dumps, GSM)), encoding="utf-8")
    datasets.Dataset.from_list(GSM).to_parquet(tmp_path / "a.parquet")
    wanted = load(write_jsonl(tmp_path / "gsm.jsonl"))
    for name in ("a.csv", "a.json", "a.JSONL", "a.parquet"):
        problems = load(tmp_path / name)
        assert (problems.train, problems.test) == (wanted.train, wanted.test), name


def test_the_final_answer_of_the_file_decides(tmp_path):
    problems = load(write_jsonl(tmp_path / "gsm.jsonl"))
    question, thoughts = problems.test[0]
    assert problems.check(question, thoughts) and problems.check(question, [thoughts[-1].replace(",", "")])
    assert not any(problems.check(question, chain) for chain in ([], [""], ["#### 5"], [*thoughts, "so"]))


TAILS = ["#### 1,234", "#### 3/4", "####-5", "#### $ 18", "#### 10:30 ", "#### 5 0 3 2", "#### 12 apples"]


@pytest.mark.parametrize("tail", [*TAILS, "#### 43.", "####\n 82", "#### x = 5\u2028"])
def test_an_answer_is_what_its_line_says(tail):
    row, answer = dict(question="How?", answer=f"So<<40+2=42>>.\n{tail}"), tail[4:].strip().rstrip(".")
    assert read_row(row, "") == ("How?", "So<<40+2=42>>.", answer)
    assert read_rows([row], "") == [("How?", ["<<40+2=42>>", f"#### {answer}"])]


@pytest.mark.parametrize(
    "question, answer",
    [
        ("What is the norm?", "<<||v||=5>> #### 5"),
        ("Say (use || once)", "#### 2"),
        ("1 2 * 3", "6 3 #### 6 3"),
    ],
)
def test_bars_in_a_question_or_an_equation_are_its_own(question, answer):
    assert read_row(dict(text=f"{question}||{answer}"), "")[0] == question


def test_thoughts_that_are_dropped_are_counted(tmp_path, capsys):
    rows = [dict(question=f"{i}?", answer="1 + 1 is <<1+1=2>>\n#### 2") for i in range(40)]
    rows += [dict(question=f"How {i}?", answer="He has two.\n#### 2") for i in range(7)]
    rows += [dict(question=f"Why {i}?", answer="#### 2") for i in range(3)]  # answers alone, as is meant
    assert len(load(write_jsonl(tmp_path / "gsm.jsonl", rows)).train) > 30
    assert "7 of 50" in capsys.readouterr().out
    with pytest.raises(UserError, match="none.jsonl"):
        load(write_jsonl(tmp_path / "none.jsonl", rows[40:]))
    alone = [row(i, 1) | dict(answer=f"#### {i}") for i in range(40)]
    assert load(write_jsonl(tmp_path / "alone.jsonl", alone))


def test_gsm8k_is_read():
    if not (SHARED / "data/gsm8k").exists():
        pytest.skip("the shared data is not here")
    problems = load(SHARED / "data/gsm8k", 50_000)
    assert (len(problems.train), len(problems.test)) == (7473, 660)
    assert problems.train[0][1] == ["<<48/2=24>>", "<<48+24=72>>", "#### 72"]
    problems = load(SHARED / "data/gsm8k/valid_equations.txt")
    assert problems.train[0][1] == ["<<4-2=2>>", "<<2/.5=4>>", "<<12/4=3>>", "<<100*3=300>>", "#### 300"]


def how(answer):
    return dict(question="How?", answer=answer)


@pytest.mark.parametrize(
    "rows",
    [
        [*GSM[:3], how("I do not know.")],
        *(
            [how(f"#### {answer}")]
            for answer in ("", "42. So he has 42.", "42\nThat is all.", "x = 2\ny = 3")
        ),
        *([how(answer)] for answer in ("#### Step 1\nSo.\n#### 3", "##### 5", "#### 42 Final answer: 42", 3)),
        *([how("#### 42 The answer is: 42")], [how("#### 42\nThe answer is: 42")]),  # as MetaMath has it
        *([*GSM[:3], dict(question=question, answer="#### 3")] for question in ("", "\ud800?")),
        *([dict(query="x", response="#### 3")], [dict(text="3 + 4 #### 7")]),
        GSM[:1],
    ],
)
def test_a_row_that_is_no_problem_is_refused(rows, tmp_path):
    with pytest.raises(UserError, match="gsm.jsonl"):
        load(write_jsonl(tmp_path / "gsm.jsonl", rows))


# -- tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [["123*5", "####9", ""], ["<<1 =  3.>>", "#### 3", ""]])
def test_texts_come_back_from_their_ids(texts):
    facts = dict(alphabet=MARK + " *.0123456789<=>", axes=None, widths=[0, 12])
    ids = encode(facts, texts, 12)
    assert ids.shape == (3, 12) and ids.min() == END and ids.max() <= 17
    assert decode(facts, ids) == [[text] for text in texts]
    for text in ("1" * 13, "x"):
        with pytest.raises(UserError):
            encode(facts, [text], 12)


def test_chains_end_at_the_answer_texts_at_END_and_a_mask_is_shown():
    facts = dict(alphabet=MARK + "abc", axes=None, widths=[1, 3, 3, 3])
    ids = torch.tensor([[2, 5, 3, 1, 4, END, 2, 2, 2], [2, END, 3, END, END, END, 1, 2, 5]])
    assert decode(facts, ids) == [["a_b", "####c"], ["a", "", "####a_"]]


def test_facts_know_widths_and_characters():
    facts = load("mult", 500).facts
    assert facts["widths"] == [6, 4, 6, 6]
    assert facts["alphabet"] == "".join(sorted("0123456789*+\x01"))
    assert load("mult", 501).facts["checksum"] != facts["checksum"]


# -- final answers ---------------------------------------------------------------------------------------


READ = {"3": "3", "1,234": "1234", "1,234,567": "1234567", "1,5": "1,5", "1, 2, 3": "1,2,3", "-5 ": "-5"}


def test_answers_are_read_or_missing():
    for text, answer in (READ | {"8 3 0": "830", "0.5": "0.5"}).items():
        assert final_answer(["<<1+2=3>>", f" #### {text}"]) == final_answer([f"####{text}"]) == answer
    for chain in ([], [""], ["3"], ["####"], ["### 3"], ["3 #### 3"], ["#### 3", "4"]):
        assert final_answer(chain) is None


# -- the grammar -----------------------------------------------------------------------------------------


def test_reviews_are_accepted_with_their_rating():
    good = tuple(word + "." for words, _ in SUBJECTS.values() for word in words)
    for i, rating in itertools.product(range(100), range(1, 6)):
        text = review(random.Random(i), rating)
        assert rating_of(text) == rating
        assert sum((said + ".").endswith(good) for said in text.split(". ")[:4]) == rating - 1


def test_what_the_grammar_does_not_write_is_not_accepted():
    rng = random.Random(0)
    for _ in range(100):
        text = review(rng, 3)
        first, second, third, fourth, close = re.findall(r"[^.!]+[.!]", text)
        assert rating_of(first + second + third + fourth + " " + CLOSES[1]) is None  # the close of another
        assert rating_of(first + second + third + close) is None
        assert rating_of(first + second + third + " " + first + close) is None  # a subject twice
        for wrong in (text.replace(" was ", " was not ", 1), text.replace(" was ", " is ", 1), text + " so."):
            assert rating_of(wrong) is None
        assert rating_of(text[:-1]) is None
    assert rating_of("") is None
