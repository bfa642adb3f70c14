"""Each script in examples/ runs as its first lines say, offline, and prints what it found."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def losses_of(script):
    done = subprocess.run([sys.executable, str(EXAMPLES / script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [float(number) for number in re.findall(r"\d\.\d{4}", done.stdout)], done.stdout


@pytest.mark.parametrize("script", ["dpo_with_a_mask.py", "mask_a_vision_language_model.py"])
def test_the_mask_learns(script):
    (first, last), printed = losses_of(script)
    assert last < first, printed


def test_a_mask_after_fine_tuning():
    losses, printed = losses_of("mask_after_fine_tuning.py")
    assert "held-out loss" in printed and len(losses) >= 2


def test_two_masks_over_one_base():
    (sums, words, _), printed = losses_of("two_masks_over_one_base.py")
    assert sums < words, printed  # the mask learned on sums is the better one on a sum


def test_there_are_four():
    assert len([path for path in EXAMPLES.glob("*.py") if path.name != "tiny.py"]) == 4
