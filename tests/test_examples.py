"""Each script in examples/ runs as its first lines say, offline, and prints what it found."""

import re
from pathlib import Path

import pytest
import trl  # noqa: F401 - imported once, for all scripts

from forking import forked, run_script
from killing import forget

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def printed_by(tmp_path):
    """Runs a script, and returns what it prints."""

    def printed_by(script):
        def run():
            # The examples have a tiny.py, as the tests have.
            forget("tiny")
            run_script(EXAMPLES / script)

        out = tmp_path / "out.txt"
        assert forked(run, out) == 0, out.read_text()[-2000:]
        return out.read_text()

    return printed_by


def losses_before_and_after(printed):
    """The numbers of the line that a script ends with: ``loss 0.6814 ..., 0.6614 ...``."""
    return [float(number) for number in re.findall(r"loss (\d\.\d{4}) [^,\n]*, (\d\.\d{4})", printed)[-1]]


@pytest.mark.parametrize("script", ["dpo_with_a_mask.py", "mask_a_vision_language_model.py"])
def test_the_mask_learns(script, printed_by):
    before, after = losses_before_and_after(printed_by(script))
    assert after < before


def test_a_mask_after_fine_tuning(printed_by):
    before, after = losses_before_and_after(printed_by("mask_after_fine_tuning.py"))
    assert after < before + 0.01  # from the smallest weights a mask starts at no cost, and the best checkpoint is kept


def test_two_masks_over_one_base(printed_by):
    sums, words, _ = map(float, re.findall(r"loss on a sum (\d\.\d{4})", printed_by("two_masks_over_one_base.py")))
    assert sums < words  # the mask learned on sums is the better one on a sum


@pytest.mark.slow
def test_a_mask_is_rewarded(printed_by):
    before, after = map(
        float, re.findall(r"reward (\d\.\d{4}) [^,\n]*, (\d\.\d{4})", printed_by("grpo_with_a_mask.py"))[-1]
    )
    assert after > before


def test_each_is_run():
    tested = re.findall(r"\w+\.py", Path(__file__).read_text())
    # tiny.py is their model; serve_many.py, route_by_prompt.py and sample_from_base.py have tests of their own names.
    assert {path.name for path in EXAMPLES.glob("*.py")} <= set(tested)
