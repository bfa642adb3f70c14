"""Minimum detectable effects: the power promised is the power simulated."""

import argparse
import json

import numpy as np
import pytest
from scipy import stats

from maskft_base.errors import UserError
from maskft_lab.cli import compare as command
from maskft_lab.results.differences import Sample
from maskft_lab.results.planning import (
    Spread,
    detectable_effect,
    detectable_share,
    mcnemar_power,
    plan_from_pilot,
    plan_from_rates,
    spread_of,
)
from maskft_lab.results.schema import build_result, build_task, items_fingerprint, metric_from_items, write_result
from maskft_lab.results.statistics import mcnemar_exact


def test_by_hand():
    # (1.960 + 0.842) * sqrt(0.1 / 300)
    z = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    assert detectable_effect(Spread(0.1), 300) == pytest.approx(z * np.sqrt(0.1 / 300))
    assert detectable_effect(Spread(0.1), 1200) == pytest.approx(detectable_effect(Spread(0.1), 300) / 2)
    t = stats.t.ppf(0.975, 2) + stats.t.ppf(0.8, 2)
    expected = np.sqrt(t**2 * (0.01 + 0.3 / 100) / 3 + z**2 * 0.2 / 100)
    assert detectable_effect(Spread(0.2, 0.3, 0.01), 100, 3) == pytest.approx(expected)


def test_mcnemar_power_is_that_of_the_test():
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(200, [0.1, 0.04, 0.86], size=1500)
    p_values = [mcnemar_exact([1] * won + [0] * lost, [0] * won + [1] * lost) for won, lost, _ in drawn.tolist()]
    assert np.mean(np.array(p_values) <= 0.05) == pytest.approx(mcnemar_power(200, 0.14, 0.06), abs=0.035)
    assert mcnemar_power(200, 0.14, 0.0) <= 0.05


def test_the_smallest_share_has_the_power_and_is_none_for_too_few_items():
    for num_items, discordance, alpha in [(300, 0.1, 0.05), (1319, 0.2, 0.05 / 6)]:
        effect = detectable_share(num_items, discordance, alpha)
        assert mcnemar_power(num_items, discordance, effect, alpha) == pytest.approx(0.8, abs=1e-3)
        assert effect == pytest.approx(detectable_effect(Spread(discordance), num_items, alpha=alpha), rel=0.08)
    assert detectable_share(20, 0.1) is None  # two items that differ prove nothing


def sample(values, clusters=None):
    diffs = np.atleast_2d(values)
    return Sample("sums", diffs, np.zeros_like(diffs), None, clusters)


def test_a_pilot_gives_its_variances():
    rng = np.random.default_rng(0)
    one = spread_of(sample(rng.normal(size=2000)))
    assert one.item == pytest.approx(1, rel=0.1) and one[1:] == (0, 0)
    tied = spread_of(sample(np.repeat(rng.normal(size=400), 5), [str(index // 5) for index in range(2000)]))
    assert tied.item == pytest.approx(5, rel=0.2)  # five copies say as much as one
    parts = [0.3 * rng.normal(size=(40, 1)), rng.normal(size=(1, 400)), 2 * rng.normal(size=(40, 400))]
    spread = spread_of(sample(sum(parts)))
    assert spread == pytest.approx((1, 4, 0.09), rel=0.35)


def test_an_effect_planned_is_seen_as_often_as_promised():
    """Three seeds: the t-test over seeds and items of the plan's model, simulated."""
    rng, spread = np.random.default_rng(0), Spread(0.0, 1.0, 0.04)
    effect = detectable_effect(spread, 100, 3)
    means = effect + 0.2 * rng.normal(size=(4000, 3)) + rng.normal(size=(4000, 3)) / 10
    assert np.mean(stats.ttest_1samp(means, 0, axis=1).pvalue <= 0.05) == pytest.approx(0.8, abs=0.06)


def test_bad_plans_are_refused():
    def refuse(message, **changes):
        options = {"num_items": [300], "num_seeds": [1], "num_comparisons": 1, "base_rate": 0.4, "discordance": None}
        with pytest.raises(UserError, match=message) as caught:
            plan_from_rates(**options | {"seed_sd": 0.0} | changes)
        assert "\n" not in str(caught.value)

    refuse("needs --base_rate or --discordance", base_rate=None)
    refuse(r"base_rate 45 is outside \(0, 1\)", base_rate=45)
    refuse("items 1, seeds 1, comparisons 1: give at least 2", num_items=[1])
    refuse("power 1.2", power=1.2)
    with pytest.raises(UserError, match="never differ"):
        plan_from_pilot([("nll on sums", "nats/token", sample(np.zeros(20)))], None, [1], 1)
    with pytest.raises(UserError, match="a pilot of one seed says nothing about 3 seeds"):
        plan_from_pilot([("nll on sums", "nats/token", sample(np.arange(20.0)))], None, [1, 3], 1)


def run(*argv):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(word) for word in argv]))


def test_the_command_plans_from_rates(capsys):
    rates = ["--plan", "--num_items", "300,1200", "--discordance", 0.1, "--num_comparisons", 6]
    run(*rates, "--format", "json")
    record = json.loads(capsys.readouterr().out)
    assert record["kind"] == "plan" and [row["num_items"] for row in record["rows"]] == [300, 1200]
    assert record["rows"][0]["effect"] == pytest.approx(detectable_share(300, 0.1, 0.05 / 6))
    run(*rates, "--format", "markdown")
    out = capsys.readouterr().out
    effect = f"{100 * detectable_share(300, 0.1, 0.05 / 6):.1f}"
    assert f"| accuracy | 300 | 1 | 6 | {effect} points |" in out and "- Assumed: 10 % of the items" in out
    with pytest.raises(UserError, match="no results to compare"):
        run()
    with pytest.raises(UserError, match="needs --num_items"):
        run("--plan", "--base_rate", 0.4)
    with pytest.raises(UserError, match="--num_items many: give whole numbers"):
        run("--plan", "--base_rate", 0.4, "--num_items", "many")


def test_the_command_plans_from_a_pilot(tmp_path, capsys):
    for name, right in (("full", np.arange(200) < 100), ("mask", np.arange(200) % 20 < 11)):
        items = [{"id": f"{index:03}", "accuracy": int(each)} for index, each in enumerate(right)]
        fingerprint = items_fingerprint({"id": item["id"], "prompt": "", "reference": ""} for item in items)
        metrics = {"accuracy": metric_from_items(items, "accuracy")}
        task = build_task(items, metrics, version=1, num_fewshot=0, fingerprint=fingerprint)
        write_result(tmp_path / name / "result.json", build_result(name, {"name_or_path": "m"}, {}, {"sums": task}))
    run(tmp_path / "full", tmp_path / "mask", "--plan", "--format", "json")
    record = json.loads(capsys.readouterr().out)
    assert [row["num_items"] for row in record["rows"]] == [200, 400, 800]
    assert record["rows"][0]["effect"] == pytest.approx(2.8 * np.sqrt(0.5 / 200), rel=0.03)  # half of the items differ
    with pytest.raises(UserError, match="a pilot needs results of two models"):
        run(tmp_path / "full", "--plan")
