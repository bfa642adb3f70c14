"""The smallest difference that a planned comparison would show."""

import argparse

import numpy as np
import pytest
from scipy import stats

from maskft_base.errors import UserError
from maskft_lab.cli import compare as command
from maskft_lab.results.planning import plan_text, smallest_difference
from maskft_lab.results.statistics import mcnemar_exact


def test_by_hand():
    # (1.960 + 0.842) * sqrt(0.1 / 300)
    z = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    assert smallest_difference(300, 0.1) == pytest.approx(z * np.sqrt(0.1 / 300))
    assert smallest_difference(1200, 0.1) == pytest.approx(smallest_difference(300, 0.1) / 2)


def test_the_exact_test_sees_it_about_as_often_as_promised():
    effect, rng = smallest_difference(1300, 0.2), np.random.default_rng(0)
    drawn = rng.multinomial(1300, [0.1 + effect / 2, 0.1 - effect / 2, 0.8], size=800)
    p_values = [mcnemar_exact([1] * won + [0] * lost, [0] * won + [1] * lost) for won, lost, _ in drawn.tolist()]
    assert np.mean(np.array(p_values) <= 0.05) == pytest.approx(0.8, abs=0.05)


def run(*argv):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(word) for word in argv]))


def test_the_command_plans(capsys):
    run("--plan", "--num_items", "20,300,1200", "--discordance", 0.1, "--num_comparisons", 6)
    out = capsys.readouterr().out
    assert "     300 items, 6 comparisons: " + f"{100 * smallest_difference(300, 0.1, 0.05 / 6):.1f} points" in out
    assert "20 items, 6 comparisons: none: too few items differ" in out
    for words, message in (
        ([], "no results to compare"),
        (["--plan", "--discordance", 0.1], "--plan needs --num_items"),
        (["--plan", "--num_items", "many", "--discordance", 0.1], "--num_items many: give whole numbers"),
        (["--plan", "--num_items", "1", "--discordance", 0.1], "items 1, comparisons 1, confidence 0.95: give at"),
    ):
        with pytest.raises(UserError, match=message):
            run(*words)
    with pytest.raises(UserError, match="discordance 45 is outside"):
        plan_text([300], 45, 1, 0.95)
