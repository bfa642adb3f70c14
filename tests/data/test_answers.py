"""Checking answers: every rule of extract_number by hand, and what must not be taken for a number."""

import doctest
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskft.data import answers
from maskft.data.answers import check_answer, extract_number, parse_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", "42"), ("The answer is 7, then 9.", "9"), ("1,234", "1234"), ("1,234,567.50 in all", "1234567.50"),
        ("one of 1, 2 or 3", "3"), ("1,23", "23"), ("$5", "5"), ("-$5", "-5"), ("$-5", "-5"), ("5%", "5"),
        ("5 %.", "5"), ("x = -3", "-3"), ("x = \N{MINUS SIGN}3", "-3"), ("10-3", "3"), ("(4)-3", "3"),
        ("10 - 3", "3"), ("3.50", "3.5"), ("it is 3.", "3"), (".5", "0.5"), ("3/4", "0.75"),
        ("-1/8 of it", "-0.125"), ("1/0", "0"), ("on 10/11/2020", "2020"), ("2.5e-3", "0.0025"),
        ("1e999999999", "999999999"), ("3 eggs", "3"), ("2 + 2 = 4\n#### 4", "4"), ("#### 1,000 dollars", "1000"),
        ("####\n12", "12"), ("#### 5\n\nQuestion: how many are 6?\n#### 6", "5"), ("7 then #### 5 + 3 = 8\n9", "8"),
    ],
)  # fmt: skip
def test_extract_number(text, number):
    assert extract_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none", "-", "$", "7\n#### seven", "½"])
def test_no_number(text):
    assert extract_number(text) is None


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**12), max_value=10**12))
def test_formatted_numbers_are_read_back(number):
    for text in (f"{number:f}", f"{number:,f}", f"so ${number:,f}.", f"1 + 2 is not\n#### {number:f}\nbut 3"):
        assert extract_number(text) == number, text


@given(st.text())
def test_any_text_is_safe(text):
    assert extract_number(text) is None or extract_number(text).is_finite()


def test_long_digits_are_exact_and_quick():
    for digits in ("7" * 50_000, "-" + "7" * 50_000):
        assert extract_number(digits) == parse_number(digits) is not None
        assert extract_number(digits) != parse_number(digits[:-1] + "8")


def test_parse_number_takes_the_whole_text():
    assert parse_number(" 1,234 ") == 1234
    assert parse_number("12 apples") is None
    assert parse_number("1 2") is None
    assert parse_number("0x1f") is None


@pytest.mark.parametrize(
    ("output", "reference", "answer_type", "right"),
    [
        (" 1,200.0", "1200", "number", True),
        ("I think it is 12", "1200", "number", False),
        ("no idea", "1200", "number", False),
        ("no idea", "none", "number", False),
        (" yes\n", "yes", "exact", True),
        ("a  b", "a b", "exact", True),
        ("Yes", "yes", "exact", False),
        ("ab", "a b", "exact", False),
        ("<think>\n\n</think>\n\nyes", "yes", "exact", True),
        ("yes or no?\n</think>\n\nyes", "yes", "exact", True),  # opened at the end of the prompt
        ("\n<think>\nyes\n</think>\n\nno", "yes", "exact", False),
        ("<think>\nyes, because", "yes", "exact", False),
        ("yes\n\nuser: why? <think>\n</think>", "yes", "exact", False),
        ("<think>\n7 + 5 is 12\n</think>\n\nnone", "12", "number", False),
        ("<think>7</think> #### 12", "12", "number", True),
        ("caf\u00e9", "cafe\u0301", "exact", True),
        ("\ufb01t", "fit", "exact", False),
    ],
)
def test_check_answer(output, reference, answer_type, right):
    assert check_answer(output, reference, answer_type) is right


def test_unknown_answer_type():
    with pytest.raises(ValueError, match="answer_type is 'fuzzy'"):
        check_answer("1", "1", "fuzzy")


def test_examples_in_the_docstrings():
    assert doctest.testmod(answers).failed == 0
