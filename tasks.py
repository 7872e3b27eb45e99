"""Problems whose answers can be checked, made here or read from files; a grammar of reviews with a rating.

A problem is a question and its thoughts, of which the last is "#### answer"; or a puzzle, whose question is
its answer with "." for what is to be found. A task is a function that makes a problem and one that checks an
answer; a new task, or a new puzzle, is one more entry of TASKS.
"""

import hashlib
import itertools
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data import Split, Texts, hold_out_texts, text_of
from files import UserError
from puzzles import cell_axes, check_sudoku, clues_of, make_sudoku, read_sudoku, sudoku_symmetry
from tables import KINDS, lines_of, read_tables

OFFLINE = (
    f"without a network use --dataset mult, adds, sums, countdown or sudoku, or --dataset PATH ({KINDS})"
)
LONGEST_QUESTION, MOST_THOUGHTS = 1000, 16  # of a file: memory grows with the square of their length


# -- the tasks ---------------------------------------------------------------------------------------------
# Numbers are written with the least significant digit first, spaces between: so they are added, and so a
# chain of thoughts can be, from the left.


def spaced(n: int, width: int) -> str:
    """The digits of n, the least significant first, filled up with zeros to `width`."""
    return " ".join(reversed(f"{n:0{width}}"))


def number(text: str) -> int:
    """The number that `spaced` wrote, with or without the spaces. Raises ValueError for other characters."""
    digits = "".join(text.split())
    if not digits.isdecimal():
        raise ValueError(f"not a number: {text!r}")
    return int(digits[::-1])


def multiplication(a: int, b: int, digits: tuple[int, int]) -> tuple[str, list[str]]:
    """a x b of digits[0] and digits[1] digits: a product for each digit of b, and behind it the total so far.

    The form of implicit chain of thought (2311.01460), without totals at the first and the last product.
    Joined by spaces, the thoughts are what follows "||" in its files.
    """
    (na, nb), total, thoughts = digits, 0, []
    for i in range(nb):
        product = a * (b // 10**i % 10) * 10**i
        total += product
        thought = ("+ " if i else "") + spaced(product, na + 1 + i)
        thoughts.append(thought + (f" ( {spaced(total, na + 1 + i)} )" if 0 < i < nb - 1 else ""))
    return f"{spaced(a, na)} * {spaced(b, nb)}", [*thoughts, f"#### {spaced(total, na + nb)}"]


def addition(numbers: list[int], digits: int) -> tuple[str, list[str]]:
    """Numbers of so many digits to add: each thought is the total so far, from the second number on."""
    width = len(str(len(numbers) * (10**digits - 1)))
    totals = [spaced(sum(numbers[: i + 1]), width) for i in range(1, len(numbers))]
    return " + ".join(spaced(n, digits) for n in numbers), [*totals[:-1], f"#### {totals[-1]}"]


class Size(NamedTuple):
    """How large the problems of a task are: each task reads what it knows."""

    digits: tuple[int, int] = (3, 2)  # mult: of the two factors; adds: the first is that of each number
    terms: int = 4  # sums, adds: numbers to add; countdown: numbers to reach the target with
    side: int = 9  # sudoku: of the grid


USUAL = Size()


def draw(rng: random.Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1), 10**digits)


def make_sums(rng: random.Random, size: Size) -> tuple[str, list[str]]:
    return addition([rng.randrange(10) for _ in range(size.terms)], 1)


def make_adds(rng: random.Random, size: Size) -> tuple[str, list[str]]:
    return addition([draw(rng, size.digits[0]) for _ in range(size.terms)], size.digits[0])


def make_mult(rng: random.Random, size: Size) -> tuple[str, list[str]]:
    return multiplication(draw(rng, size.digits[0]), draw(rng, size.digits[1]), size.digits)


def answer_of(chain: list[str]) -> str | None:
    """What follows "####" in a chain's last thought, without spaces and the commas of thousands, or None."""
    found = re.fullmatch(r"####(.*)", chain[-1].strip(), re.S) if chain else None
    bare = "".join(found[1].split()) if found else ""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", bare) or None


def check_sum(question: str, chain: list[str]) -> bool:
    return number(answer_of(chain) or "") == sum(map(number, question.split("+")))


def check_product(question: str, chain: list[str]) -> bool:
    a, b = map(number, question.split("*"))
    return number(answer_of(chain) or "") == a * b


# -- countdown ---------------------------------------------------------------------------------------------
# Each step takes two of the numbers that are left and puts the result in their place; the last result is the
# target. Numbers are in 1..99, the target in 10..99, and results that go on are below 1,000.

OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
COUNTDOWN_WIDTH = 3  # digits of a number in a step


def make_countdown(rng: random.Random, size: Size) -> tuple[str, list[str]]:
    """Numbers and a target, "1 4 , 5 2 , 7 0 = 0 6", and the steps of the first way to reach it.

    Random steps find the target; which of the ways is first is not random, so that it can be learned.
    """
    target = 0
    while not 10 <= target <= 99:
        numbers = [rng.randrange(1, 100) for _ in range(size.terms)]
        left = list(numbers)
        while len(left) > 1 and (steps := countdown_steps(left)):
            left = rng.choice(steps)[1]
        target = left[0] if len(left) == 1 else 0
    thoughts = []
    for a, sign, b, result in first_way(numbers, target):
        texts = [spaced(n, COUNTDOWN_WIDTH) for n in (a, b, result)]
        thoughts.append(f"{texts[0]} {sign} {texts[1]} = {texts[2]}")
    thoughts[-1] = f"#### {thoughts[-1]}"
    return f"{' , '.join(spaced(n, 2) for n in numbers)} = {spaced(target, 2)}", thoughts


def result_of(a: int, sign: str, b: int) -> int | None:
    """The result of a step; None where a division has a remainder, or is one by 0."""
    if sign == "/" and (b == 0 or a % b):
        return None
    return OPERATIONS[sign](a, b)


def countdown_steps(left: list[int]) -> list[tuple[tuple, list[int]]]:
    """Every step, (a, sign, b, result) with the larger number first, and the numbers that it leaves."""
    steps = []
    for i, j in itertools.combinations(range(len(left)), 2):
        a, b = max(left[i], left[j]), min(left[i], left[j])
        rest = left[:i] + left[i + 1 : j] + left[j + 1 :]
        for sign in OPERATIONS:
            result = result_of(a, sign, b)
            if result is not None and result < 10**COUNTDOWN_WIDTH:
                steps.append(((a, sign, b, result), [result, *rest]))
    return steps


def first_way(left: list[int], target: int) -> list[tuple] | None:
    """The first steps that reach the target, of those in the order of `countdown_steps`; None for none."""
    if len(left) == 1:
        return [] if left[0] == target else None
    for step, rest in countdown_steps(left):
        way = first_way(rest, target)
        if way is not None:
            return [step, *way]
    return None


def check_countdown(question: str, chain: list[str]) -> bool:
    """Whether the steps are true, use each number and each result once, and end at the target."""
    numbers, _, target = question.partition("=")
    left, result = Counter(map(number, numbers.split(","))), None
    if answer_of(chain) is None:
        return False
    for thought in chain:
        a, b, result = read_step(thought.strip().removeprefix("####"))
        left.subtract([a, b])
        if min(left.values()) < 0:
            return False
        left[result] += 1
    return result == number(target) and left.total() == 1


def read_step(text: str) -> tuple[int, int, int]:
    """The two numbers of a step "a + b = c" and its result. Raises ValueError where it is not a true one."""
    found = re.fullmatch(r"([\d\s]+)([-+*/])([\d\s]+)=([\d\s]+)", text)
    if not found:
        raise ValueError(f"not a step: {text!r}")
    a, b, result = (number(found[i]) for i in (1, 3, 4))
    if result_of(a, found[2], b) != result:
        raise ValueError(f"not true: {text!r}")
    return a, b, result


# -- the table of tasks ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """make(rng, size) gives a question and its thoughts; check(question, thoughts) is True if they are right.

    check may raise ValueError for an answer that it cannot read: that is a wrong one. A puzzle has four more.
    axes(size): where each cell stands, a number for each axis. symmetry(B, size, device): for each of B
    grids the cell that comes to each place, and what each token becomes; training sees all of them.
    read(text, size): a puzzle as a user writes it, and a remark. kind(puzzle): under which it is scored.
    held_out: one in so many questions is a test question; test_n: at most so many of them.
    """

    make: Callable
    check: Callable
    axes: Callable | None = None
    symmetry: Callable | None = None
    read: Callable | None = None
    kind: Callable | None = None
    held_out: int = 10
    test_n: int = 2000


def make_sudoku_problem(rng: random.Random, size: Size) -> tuple[str, list[str]]:
    puzzle, grid = make_sudoku(rng, size.side)
    return puzzle, [grid]


TASKS = {
    "sums": Task(make_sums, check_sum),
    "adds": Task(make_adds, check_sum),
    "mult": Task(make_mult, check_product),
    "countdown": Task(make_countdown, check_countdown),
    "sudoku": Task(
        make=make_sudoku_problem,
        check=lambda puzzle, chain: check_sudoku(puzzle, "".join(chain[-1].split())),
        axes=lambda size: cell_axes(size.side),
        symmetry=lambda B, size, device: sudoku_symmetry(B, size.side, device),
        read=lambda text, size: read_sudoku(text, size.side),
        kind=clues_of,
        held_out=3,  # they take a while to make
        test_n=750,
    ),
}


# -- problems ----------------------------------------------------------------------------------------------


@dataclass
class Problems:
    """Questions and thoughts of the training and the test split; a question is only in one of them.

    task: None where the right answer is the one in the file. note: what was left out.
    """

    question: list[str]
    thoughts: list[list[str]]
    question_test: list[str]
    thoughts_test: list[list[str]]
    task: Task | None = None
    note: str = ""

    @property
    def is_puzzle(self) -> bool:
        return self.task is not None and self.task.axes is not None

    @property
    def check(self) -> Callable | None:
        """That of the task; None where the right answer is the one in the file."""
        return self.task and self.task.check

    def checksum(self) -> str:
        texts = [*self.question, *map(" ".join, self.thoughts)]
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def is_test_problem(question: str, held_out: int = 10) -> bool:
    """Whether a question is of the test split: one in so many, by its checksum, whatever the training set."""
    return zlib.crc32(question.encode()) % held_out == 0


def make_problems(task: Task, size: Size, n: int) -> dict[str, list[tuple]]:
    """The splits: n different training and the test problems of a task, or as many as there are."""
    rng, seen, train, test, in_vain = random.Random(0), set(), [], [], 0
    # A task with few problems ends when four draws for each that is known have brought no other.
    while (len(train) < n or len(test) < task.test_n) and in_vain < 4 * len(seen) + 100:
        question, thoughts = task.make(rng, size)
        in_vain = in_vain + 1 if question in seen else 0
        split, most = (test, task.test_n) if is_test_problem(question, task.held_out) else (train, n)
        if not in_vain and len(split) < most:
            split.append((question, thoughts))
        seen.add(question)
    return dict(train=train, test=test)


def load_problems(dataset: str, size=USUAL, n=50_000, form="equations", test=None) -> Problems:
    """The problems of `dataset`: a task (of this size), gsm8k (hub), or the path of a file or folder.

    A table has the columns question and answer, a txt lines question||thoughts #### answer.

    form: the thoughts of an answer are its "equations" in <<>>, or the lines of its "text". n: at most so
    many training problems. test: the path of a file of test problems. Without it the split "test" serves, or
    a tenth is held out; a training question that the test split has too is left out. Raises UserError for a
    data set that is not to be had, a row that is not a problem, or an empty split.
    """
    task, left_out = TASKS.get(dataset), ""
    if test and task and task.axes:
        raise UserError(f"--test is a file of questions and chains: {dataset} has none")
    if task:
        splits = make_problems(task, size, n)
    else:
        splits, left_out = read_splits(dataset, form, hold_out=not test)
    if test:
        splits["test"] = read_problems(read_tables(test, OFFLINE)[0]["train"], form)
    train, tested = splits["train"], {question for question, _ in splits["test"]}
    new = [p for p in train if p[0] not in tested]
    problems = both_splits(new[:n], splits["test"], Path(dataset).name or dataset, task)
    known = f"left out: {len(train) - len(new)} training questions that the test split has too"
    more = f"left out: {len(new) - n} training problems beyond --train_n {n}"
    notes = [left_out, known if len(new) < len(train) else "", more if n < len(new) else ""]
    problems.note = "; ".join(filter(None, notes))
    return problems


def read_splits(dataset: str, form: str, hold_out: bool) -> tuple[dict[str, list[tuple]], str]:
    """The splits "train" and "test" of a file, a folder or a hub name, and what was left out of it.

    hold_out: whether a tenth becomes the split "test" where there is none.
    """
    tables, left_out = read_tables(dataset, OFFLINE)
    splits = {name: read_problems(table, form) for name, table in tables.items()}
    if hold_out and "test" not in splits:
        train, held_out = [], []
        for problem in splits["train"]:
            (held_out if is_test_problem(problem[0]) else train).append(problem)
        splits = dict(train=train, test=held_out)
    alone = all(len(thoughts) == 1 for part in splits.values() for _, thoughts in part)
    if alone and form == "equations":
        got = f"{Path(dataset).name} has no <<equation>> in any answer"
        raise UserError(f"{got}: add --form text to take lines for thoughts")
    return splits, left_out


def both_splits(train: list[tuple], test: list[tuple], where: str, task: Task | None = None) -> Problems:
    """The problems of two lists of (question, thoughts). Raises UserError where one is empty."""
    if not train or not test:
        got = f"{len(train)} training and {len(test)} test problems"
        raise UserError(f"{where} has {got}: both must be at least 1; give more rows, or larger numbers")
    return Problems(*map(list, zip(*train, strict=True)), *map(list, zip(*test, strict=True)), task)


def read_problems(table: list[tuple[str, dict]], form: str) -> list[tuple[str, list[str]]]:
    return [read_problem(row, form, place) for place, row in table]


def read_problem(row: dict, form: str, where: str) -> tuple[str, list[str]]:
    """The question and the thoughts of a row. Raises UserError where it is not a problem."""
    if row.keys() == {"text"}:  # a line of a txt
        text = text_of(row["text"], where)
        # A question may have bars of its own, and so may an equation: the last ones before the first count.
        question, bars, _ = re.split("<<|####", text)[0].rpartition("||")
        if not bars:
            raise UserError(f"{where} has no || between question and thoughts; mend the line or take it out")
        row = dict(question=question, answer=text[len(question) + 2 :])
    if not {"question", "answer"} <= row.keys():
        has = ", ".join(row)[:300]
        raise UserError(f"{where} has the columns {has}; a problem's are called question and answer: rename")
    question, answer = (text_of(row[column], f"{where}: {column}") for column in ("question", "answer"))
    thoughts = read_thoughts(answer, form, where)
    if len(question) > LONGEST_QUESTION or len(thoughts) > MOST_THOUGHTS:
        got = f"{len(question)} characters in the question and {len(thoughts)} thoughts"
        most = f"{LONGEST_QUESTION} and {MOST_THOUGHTS} are the most (see the top of tasks.py)"
        raise UserError(f"{where}: {got}; {most}")
    return question, thoughts


def read_thoughts(answer: str, form: str, where: str) -> list[str]:
    """The <<equations>> of an answer, or its lines as text; then "#### " and what is in that line.

    A chain of bare numbers, "5 5 1 + 0 6 4 9", is that of a multiplication: a thought for each product.

    It ends before "The answer is", which MetaMath says behind it. Raises UserError for none, for two, and
    where a sentence or a line follows: what of it is the answer?
    """
    chain, _, last = answer.partition("####")
    line = re.split("the answer is", last, flags=re.I)[0].strip().removesuffix(".")
    if not line or "#" in last:
        raise UserError(f"{where}: no '#### number' at the end of the answer {answer[-60:]!r}; mend the row")
    if re.search(r"[.:;!?]\s|[\r\n]", line):
        raise UserError(f"{where}: {line[:60]!r} is more than an answer; leave just that behind ####")
    thoughts = re.findall(r"<<.*?>>", chain)
    # As in the files of implicit chain of thought.
    if form == "equations" and re.fullmatch(r"\d( \d)+( [\d+()])* ?", chain):
        thoughts = re.split(r" (?=\+)", chain.strip())
    elif form == "text":
        thoughts = [re.sub(r"<<.*?>>", "", line).strip() for line in lines_of(chain)]
    return [*filter(None, thoughts), f"#### {line}"]


# -- characters as tokens ----------------------------------------------------------------------------------

END = 0  # fills a text up to its width
ANSWER = "\x01"  # the one character that "####" becomes


class Tokens:
    """Texts to ids, one for each character, and back; spaces count only where the alphabet has one."""

    def __init__(self, alphabet: str):
        self.alphabet, self.V = alphabet, len(alphabet) + 1
        self.bare = " " not in alphabet  # generated problems: spaces say nothing

    def plain(self, text: str) -> str:
        """The text as its characters are counted."""
        text = text.replace("####", ANSWER)
        return text.replace(" ", "") if self.bare else text

    def ids(self, text: str) -> list[int]:
        return [self.alphabet.index(c) + 1 for c in self.plain(text)]

    def encode(self, texts: list[str], width: int) -> Tensor:
        """Ids (N, width), filled up with END. Raises UserError for a text that does not fit."""
        ids = torch.full((len(texts), width), END)
        for row, text in zip(ids, texts, strict=True):
            plain = self.plain(text)
            if len(plain) > width:
                got = f"{text[:60]!r} has {len(plain)} characters"
                raise UserError(f"{got}, but this model takes at most {width}: shorten it")
            if strange := set(plain) - set(self.alphabet):
                got = f"{text[:60]!r} has {', '.join(map(repr, sorted(strange)))}"
                raise UserError(
                    f"{got}, which this model has never seen: write it with {self.alphabet[:40]!r}"
                )
            row[: len(plain)] = torch.tensor(self.ids(text))
        return ids

    def text(self, ids: list[int]) -> str:
        """The text of ids up to END; what is no character (a mask) is left out."""
        ids = ids[: ids.index(END)] if END in ids else ids
        characters = [self.alphabet[i - 1].replace(ANSWER, "####") for i in ids if i < self.V]
        return (" " if self.bare else "").join(characters)

    def decode(self, ids: Tensor) -> list[str]:
        return [self.text(row) for row in ids.tolist()]


# -- the grammar -------------------------------------------------------------------------------------------
# A review has four sentences on four different subjects, good or bad, and a close. Its rating is 1 + the
# number of good ones, and the close says it too.

# fmt: off
SUBJECTS = {  # what is said of each, good and bad
    "the room": (["spotless", "large and quiet", "bright", "very comfortable"],
                 ["dirty", "tiny and loud", "dark", "falling apart"]),
    "the staff": (["friendly", "helpful at all hours", "polite", "very kind"],
                  ["rude", "never at the desk", "careless", "very slow"]),
    "breakfast": (["fresh", "generous", "delicious", "worth getting up for"],
                  ["stale", "cold", "poor", "not worth the money"]),
    "the location": (["perfect", "close to everything", "quiet and green", "ideal for the beach"],
                     ["far from everything", "noisy", "hard to find", "unsafe at night"]),
    "the pool": (["clean", "warm", "heated and huge", "a joy for the children"],
                 ["closed", "freezing", "crowded", "full of leaves"]),
    "the price": (["fair", "a bargain", "low for the season", "very good"],
                  ["far too high", "a rip off", "higher than promised", "absurd"]),
}
CLOSES = ["never again.", "we would not come back.", "it was just about all right.", "we would come back.",
          "we cannot wait to return!"]
# fmt: on
ADVERBS = ["", "really ", "always ", "simply "]


def grammar_review(rng: random.Random, rating: int) -> str:
    """A review of the grammar with a rating in 1..5."""
    good = rng.sample([True] * (rating - 1) + [False] * (5 - rating), 4)
    said = []
    for subject, is_good in zip(rng.sample(list(SUBJECTS), 4), good, strict=True):
        words = SUBJECTS[subject][0 if is_good else 1]
        said.append(f"{subject} was {rng.choice(ADVERBS)}{rng.choice(words)}.")
    return " ".join([*said, CLOSES[rating - 1]])


def grammar_texts() -> Texts:
    """6,000 reviews of the grammar, which are always the same, with their ratings as classes."""
    rng = random.Random(0)
    y = [rng.randrange(5) for _ in range(6000)]
    x = [grammar_review(rng, label + 1) for label in y]
    return hold_out_texts(Split(x, y, [""] * len(x)), ["1", "2", "3", "4", "5"])


def grammar_rating(text: str) -> int | None:
    """The rating 1..5 of a review, or None where the grammar does not accept it."""
    *said, close = re.findall(r"[^.!]+[.!]", text) or [""]
    if "".join([*said, close]) != text or close.strip() not in CLOSES:
        return None
    verdicts = [_is_good(*sentence.strip()[:-1].partition(" was ")[::2]) for sentence in said]
    subjects = Counter(sentence.strip().partition(" was ")[0] for sentence in said)
    if None in verdicts or not len(verdicts) == len(subjects) == 4:
        return None
    rating = 1 + sum(verdicts)
    return rating if CLOSES[rating - 1] == close.strip() else None


def _is_good(subject: str, words: str) -> bool | None:
    """Whether these words are good ones of the subject; None where they are no words of it."""
    good, bad = SUBJECTS.get(subject, ([], []))
    for adverb in ADVERBS:
        if words.startswith(adverb) and words[len(adverb) :] in good + bad:
            return words[len(adverb) :] in good
    return None
