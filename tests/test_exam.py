"""The exam: right answers pass, each usual mistake is explained, anything else gets a hint.

Nothing that is stored gives an answer away."""

import functools
import math

import numpy
import pytest
import torch
from repository import NBS, cells, read

from qlora_nb import exam
from qlora_nb.core import UserError
from qlora_nb.nf4 import quantize_nf4

EXAM = NBS / "41_exam.ipynb"
NUMBERS = range(1, 21)
each_question = pytest.mark.parametrize("number", NUMBERS)

# Worked out by hand or with other code than the key's, so that a wrong key is seen.
RIGHT = {
    1: 2 * 16 * 28 * (2 * (3072 + 3072) + 2 * (3072 + 1024) + 3 * (3072 + 8192)) / 1e6,
    2: 16,
    3: 2_818_572_288 * (4 + 8 / 64 + 32 / (64 * 256)) / 8e9,
    4: 3_212_749_824,
    5: 64,
    6: 16 * math.sqrt(64),
    7: 17,
    8: lambda text: tokenizer()(text.removeprefix("<|begin_of_text|>"))["input_ids"],
    9: 4,
    10: [3, 1],
    11: 3 / 4,
    12: [0, 1, 2, 3, 0, 1, 2],
    13: (24 + 114) / 200,
    14: 960 / 3000,
    15: 2e-4 * 60 / 95,
    16: "Diverging",
    17: 1.132,
    18: lambda weight, A, B, scaling: quantize_nf4(weight).dequantize() + scaling * (B @ A),
    19: 1.11,
    20: math.exp(2 / 0.7) / sum(math.exp(x / 0.7) for x in (2, 1, 0.5)),
}


@functools.cache
def tokenizer():
    from qlora_nb.core import EMBEDDED_MODEL
    from qlora_nb.loading import load_tokenizer

    return load_tokenizer(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def sat():
    "The exam's cells, run from top to bottom with no answer: what each question gives, and what was printed."
    given, said, names = {}, [], {}

    def check_answer(number, answer, *values):
        given[number] = values
        said.append(exam.mark_answer(exam.EXAM_KEYS[number](*values), answer))

    for _, source in cells(EXAM, "code"):
        if "eval: false" not in source and "nbdev_export" not in source:
            exec(source, names)  # noqa: S102
            names["check_answer"] = check_answer
    return given, said


@pytest.fixture(scope="module")
def key_of(sat):
    "Makes a question's key, once, of what the exam gives."
    return functools.cache(lambda number: exam.EXAM_KEYS[number](*sat[0][number]))


def test_unanswered_it_runs(sat):
    given, said = sat
    assert [*given] == [*NUMBERS] == sorted(exam.EXAM_KEYS)
    assert said == [(None, "not answered yet")] * 20


@each_question
def test_the_right_answer_passes(key_of, number):
    mark, said = exam.mark_answer(key_of(number), RIGHT[number])
    assert mark is True and said.startswith("right: "), said


@each_question
def test_usual_mistakes_are_explained(key_of, number):
    key = key_of(number)
    assert len(key.mistakes) >= 2
    for wrong, why in key.mistakes:
        answer = (lambda *given, wrong=wrong: wrong) if key.call else wrong
        assert exam.mark_answer(key, answer) == (False, f"not right: {why}")


@each_question
def test_an_answer_has_one_mark(key_of, number):
    "No mistake is within the tolerance of the right answer, or of another mistake."
    key = key_of(number)
    values = [key.right, *(wrong for wrong, _ in key.mistakes)]
    for i, one in enumerate(values):
        assert not any(exam.is_same_answer(one, other, key.tolerance) for other in values[i + 1 :]), one


@each_question
@pytest.mark.parametrize("answer", [-12345.678, "no idea", [99], torch.zeros(3), {}, True])
def test_any_other_answer_gets_a_hint(key_of, number, answer):
    key = key_of(number)
    for given in (answer, lambda *values: answer):
        if given is answer or key.call:
            assert exam.mark_answer(key, given) == (False, f"not right. Hint: {key.hint}")


@pytest.mark.parametrize("number", [n for n in NUMBERS if not callable(RIGHT[n]) and n != 16])
def test_arrays_count_as_what_they_hold(key_of, number):
    "Whoever computes with torch or NumPy gets their numbers, and must not be told that these are wrong."
    key, answer = key_of(number), RIGHT[number]
    for array in (numpy.array(answer), torch.tensor(answer, dtype=torch.float64 if key.tolerance else None)):
        assert exam.mark_answer(key, array)[0] is True
        assert exam.mark_answer(key, array + 1000)[0] is False


def test_a_list_of_arrays_gets_a_hint(key_of):
    assert exam.mark_answer(key_of(12), [numpy.ones(2)] * 7) == (False, f"not right. Hint: {key_of(12).hint}")


def test_a_function_that_fails_is_told_so(key_of):
    mark, said = exam.mark_answer(key_of(18), lambda weight, A, B, scaling: A @ B @ weight)
    assert mark is False and "RuntimeError" in said and "scaling * B @ A" in said


def test_a_key_follows_what_is_given():
    assert exam.EXAM_KEYS[13]([1.0, 3.0], [30, 10]).right == 1.5
    assert exam.EXAM_KEYS[10]([(5, 5), (9, 1)], 8).right == {1}
    assert exam.EXAM_KEYS[5](8, 16, 32).right == 64


def test_score(capsys):
    exam.EXAM_MARKS.clear()
    exam.check_answer(13, 0.69, [2.4, 0.6], [10, 190])
    exam.check_answer(5, 16, 16, 16, 64)
    exam.check_answer(20, ..., [2.0], 0.7)
    exam.show_score()
    right, wrong, unanswered, score = capsys.readouterr().out.splitlines()
    assert right.startswith("13: right: ") and wrong.startswith("5: not right: left alone")
    assert (unanswered, score) == ("20: not answered yet", "1 of 20 right, 1 wrong, 18 not answered yet")
    with pytest.raises(UserError, match="no question 21"):
        exam.check_answer(21, 1)


def test_nothing_stored_gives_an_answer_away():
    printed = ["".join(output["text"]) for cell in read(EXAM)["cells"] for output in cell.get("outputs", [])]
    assert printed == [f"{n}: not answered yet\n" for n in NUMBERS] + ["0 of 20 right, 0 wrong, 20 not answered yet\n"]
