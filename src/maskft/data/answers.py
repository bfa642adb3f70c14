"""Checking generated answers against a reference. Standard library only."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

# GSM8K: the final answer follows it.
ANSWER_MARK = "####"

# A comma between a digit and exactly three digits.
_THOUSANDS_COMMA = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
# A fraction, or a decimal with an optional exponent. A minus after a digit, letter or ")" subtracts. The exponent has
# at most three digits: arithmetic on "1e999999999" would never end, and the text comes from a model.
_NUMBER = re.compile(
    r"(?P<minus>(?<![\w)])-)?"
    r"(?:(?<![0-9./])(?P<over>[0-9]+)/(?P<under>0*[1-9][0-9]*)(?![0-9/]|\.[0-9])"
    r"|(?P<decimal>(?:[0-9]+(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?))"
)

# Around what a reasoning model writes before its answer. Qwen 3's chat template writes an empty thought there, which a
# trained model repeats.
_THOUGHT_START = "<think>"
_THOUGHT_END = "</think>"


def extract_number(text: str) -> Decimal | None:
    r"""Return the number that ``text`` gives as its answer, or None when there is none.

    It is the last number of the line that follows the first ``####`` (a model that goes on to invent further questions
    has answered this one first), or without the mark the last number of ``text``. Thousands separators, currency
    signs, per cent signs and a final full stop are ignored; ``3/4`` is a fraction.

    >>> extract_number("She pays 3 * $400 = $1,200.")
    Decimal('1200')
    >>> extract_number("so 7 - 9 = -2\n#### -2")
    Decimal('-2')
    """
    _, mark, after = text.partition(ANSWER_MARK)
    if mark:
        # Stripped first: the answer may be on the line below the mark.
        first_line, *_ = after.strip().split("\n", 1)
        text = first_line
    matches = list(_NUMBER.finditer(_plain(text)))
    if not matches:
        return None
    return _value(matches[-1])


def parse_number(text: str) -> Decimal | None:
    """Return ``text`` as a number when it is one and nothing else, otherwise None.

    >>> parse_number("1,234.50"), parse_number("12 apples")
    (Decimal('1234.50'), None)
    """
    match = _NUMBER.fullmatch(_plain(text).strip())
    if match is None:
        return None
    return _value(match)


def check_answer(
    output: str,
    reference: str,
    answer_type: str,
) -> bool:
    """Whether the generated ``output`` gives the ``reference`` answer.

    Args:
        output: Generated text.
        reference: The right answer.
        answer_type: ``number``: both are compared as numbers, see ``extract_number``. ``exact``: the texts are equal
            apart from white space and from how Unicode composes their characters. A thought before the answer,
            ``<think> ... </think>``, is no part of it.

    Raises:
        ValueError: If ``answer_type`` is something else.
    """
    output = _without_thought(output)
    reference = _without_thought(reference)
    if answer_type == "number":
        # Decimals: 3.50 equals 3.5. An output without a number is wrong, even if the reference has none either.
        number = extract_number(output)
        if number is None:
            return False
        return number == extract_number(reference)
    if answer_type == "exact":
        return _words(output) == _words(reference)
    raise ValueError(f"answer_type is {answer_type!r}; it must be 'number' or 'exact'")


def _without_thought(text: str) -> str:
    """The text after the thought at its beginning, if it has one that is closed."""
    thought, end, answer = text.partition(_THOUGHT_END)
    # Some templates open the thought at the end of the prompt. One that opens later is of a turn after the answer.
    thought = thought.lstrip().removeprefix(_THOUGHT_START)
    return answer if end and _THOUGHT_START not in thought else text


def _words(text: str) -> list[str]:
    """The words of a text, in Unicode's composed form: tokenizers such as Qwen's know no other."""
    return unicodedata.normalize("NFC", text).split()


def _plain(text: str) -> str:
    """Text without currency signs and thousands separators, with ASCII minus signs."""
    # Models write the typographic minus sign as well.
    text = text.replace("\N{MINUS SIGN}", "-")
    text = re.sub("[$€£]", "", text)
    return _THOUSANDS_COMMA.sub("", text)


def _value(match: re.Match) -> Decimal:
    # The pattern has two forms; in a fraction it allows no denominator of 0.
    if match["decimal"]:
        value = Decimal(match["decimal"])
    else:
        value = Decimal(match["over"]) / Decimal(match["under"])
    if match["minus"]:
        # Exact; unary minus rounds to 28 digits.
        return value.copy_negate()
    return value
