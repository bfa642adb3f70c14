import argparse
import copy
import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskft_common.errors import UserError
from maskft_lab.cli import compare as command
from maskft_lab.results import FORMATS, families
from maskft_lab.results.compare import compare
from maskft_lab.results.comparison import Score, Settings
from maskft_lab.results.render import _cut_names, cross_domain_table, render, render_scores
from maskft_lab.results.schema import build_result, build_task, items_fingerprint, metric_from_items, write_result
from maskft_lab.results.scores import scores as scores_of
from maskft_lab.results.tables import Table, draw, latex_text
from maskft_lab.results.words import difference_text, p_text, score_text, sentence

RESAMPLES = 500


def make_task(prompt="2+2", version=1, num_fewshot=0, chat_template_hash=None, **columns):
    """Return a task record whose items have one field per column."""
    size = len(next(iter(columns.values())))
    items = [
        {"id": f"i{index:03}"} | {name: np.array(column, dtype=object)[index] for name, column in columns.items()}
        for index in range(size)
    ]
    questions = [{"id": item["id"], "prompt": prompt, "reference": "4"} for item in items]
    metrics = [name for name in columns if name != "num_tokens"]
    return build_task(
        items,
        {name: metric_from_items(items, name) for name in metrics},
        version=version,
        num_fewshot=num_fewshot,
        fingerprint=items_fingerprint(questions),
        chat_template_hash=chat_template_hash,
    )


def make(name, seed=None, method=None, setting=1, tasks=None, **columns):
    tasks = tasks or {"sums": make_task(**columns)}
    return build_result(name, {"name_or_path": "m", "seed": seed, "method": method}, {"batch_size": setting}, tasks)


def scores(num_right, num_items=100):
    return np.arange(num_items) < num_right


def only(comparison):
    assert len(comparison.differences) == 1
    return comparison.differences[0]


def fast(results, baseline=None, tasks=None, metrics=None, **settings):
    return compare(
        results, baseline, tasks=tasks, metrics=metrics, settings=Settings(**{"num_resamples": RESAMPLES} | settings)
    )


def test_accuracy_by_hand():
    # Right on the first 60 of 100 and on the first 50: 10 won, 0 lost, McNemar p = 2 / 2^10.
    comparison = compare([make("full", accuracy=scores(50)), make("mask", accuracy=scores(60))])
    row = only(comparison)
    assert (row.method, row.baseline, row.task, row.metric) == ("mask", "full", "sums", "accuracy")
    assert (row.value, row.baseline_value) == (0.6, 0.5)
    assert row.difference == pytest.approx(0.1)
    assert (row.won, row.lost, row.tied) == (10, 0, 90)
    assert (row.test, row.p_value) == ("McNemar", pytest.approx(2 / 1024))
    # Binomial(100, 0.1) / 100 has its 2.5 % and 97.5 % points at 0.05 and 0.16.
    assert row.ci_low == pytest.approx(0.05, abs=0.005)
    assert row.ci_high == pytest.approx(0.16, abs=0.005)
    assert row.verdict == "better"
    assert sentence(row) == "mask vs full, accuracy on sums: +10.0 points [4.9, 16.1], McNemar p 0.002: better."


def test_lower_nll_is_better_and_tokens_weigh():
    nll, num_tokens = np.linspace(1, 2, 50), np.arange(1, 51)
    results = [
        make("full", nll=nll, num_tokens=num_tokens),
        make("mask", nll=nll - 0.1 * (num_tokens > 10), num_tokens=num_tokens),
    ]
    row = only(fast(results))
    assert row.difference == pytest.approx(-0.1 * (1275 - 55) / 1275)
    assert (row.test, row.verdict, row.won, row.lost, row.tied) == ("bootstrap", "better", 40, 0, 10)
    assert only(fast(results, "mask")).verdict == "worse"
    assert "nats/token" in sentence(row)


def test_a_difference_within_the_noise_is_not_claimed():
    a, b = scores(50), scores(50)
    b[[0, 1, 60, 61, 62]] ^= True  # 3 won, 2 lost
    row = only(compare([make("full (best)", accuracy=a), make("mask", accuracy=b)]))
    # Few items differ, so the interval is Tango's.
    assert sentence(row) == (
        "mask vs full (best), accuracy on sums: +1.0 points [-4.4, 6.8], McNemar p 1: not distinguishable."
    )


def test_an_interval_without_zero_is_not_enough_when_the_exact_test_disagrees():
    # 5 won, 0 lost: nearly all resamples are above zero, but the exact p is 2 / 2^5 = 0.0625.
    row = only(compare([make("full", accuracy=scores(50)), make("mask", accuracy=scores(55))]))
    assert row.unadjusted_low > 0
    assert row.p_value == pytest.approx(0.0625)
    assert row.verdict == "not distinguishable"


def test_a_small_p_is_not_enough_when_the_interval_holds_zero(monkeypatch):
    monkeypatch.setattr("maskft_lab.results.differences.mcnemar_exact", lambda a, b: 0.0)
    row = only(fast([make("full", accuracy=scores(50)), make("mask", accuracy=scores(51))]))
    assert row.ci_low <= 0 < row.ci_high
    assert row.verdict == "not distinguishable"


def test_holm_is_over_the_main_metrics_of_all_tasks_and_methods():
    def tasks(right, passed, nll):
        """Two tasks whose main metrics have other names, one with a second metric."""
        loss = {"nll": np.full(100, nll), "num_tokens": np.ones(100, int)}
        return {"sums": make_task(accuracy=scores(right), **loss), "code": make_task(pass_at_1=scores(passed))}

    comparison = fast(
        [
            make("full", tasks=tasks(50, 50, 1.0)),
            make("mask", tasks=tasks(57, 50, 1.0)),  # 7 won: p 2 / 2^7 = 0.0156, and 1
            make("lora", tasks=tasks(60, 45, 1.0)),  # 10 won: 2 / 2^10; 5 lost: 0.0625
        ]
    )
    by_key = {(row.method, row.metric): row for row in comparison.differences}
    assert {key: (row.is_main, row.num_comparisons) for key, row in by_key.items()} == {
        ("mask", "accuracy"): (True, 4),
        ("lora", "accuracy"): (True, 4),
        ("mask", "pass_at_1"): (True, 4),
        ("lora", "pass_at_1"): (True, 4),
        ("mask", "nll"): (False, 2),
        ("lora", "nll"): (False, 2),
    }
    assert by_key["lora", "accuracy"].p_adjusted == pytest.approx(4 * 2 / 1024)
    assert by_key["mask", "accuracy"].p_adjusted == pytest.approx(3 * 2 / 128)
    assert by_key["lora", "pass_at_1"].p_adjusted == pytest.approx(2 * 2 / 32)
    assert by_key["mask", "pass_at_1"].p_adjusted == 1
    # 7 wins would do alone (0.0156), not as the second of four (0.047 does, at 0.05).
    verdicts = [by_key[key].verdict for key in [("lora", "accuracy"), ("mask", "accuracy"), ("lora", "pass_at_1")]]
    assert verdicts == ["better", "better", "not distinguishable"]
    assert by_key["mask", "nll"].p_adjusted == 1
    assert "(0.047 after Holm over 4 comparisons)" in sentence(by_key["mask", "accuracy"])


def test_holm_takes_back_what_one_comparison_would_claim():
    results = [make("full", accuracy=scores(50)), make("mask", accuracy=scores(56))]  # p 2 / 2^6 = 0.03
    results += [make(name, accuracy=scores(50)) for name in ("b", "c")]
    alone, *_ = fast(results[:2]).differences
    among, *_ = fast(results).differences
    assert (alone.verdict, among.verdict) == ("better", "not distinguishable")
    assert among.p_adjusted == pytest.approx(3 * 2 / 64)
    assert among.unadjusted_low == alone.unadjusted_low > 0


def test_seeds_of_one_name_are_one_method():
    rng = np.random.default_rng(0)
    base = rng.normal(2, 0.5, 200)
    tokens = np.ones(200, int)
    results = [make("full", nll=base, num_tokens=tokens)]
    shifts = {2: -0.3, 0: -0.1, 1: -0.2}
    results += [make("mask", seed, nll=base + shift, num_tokens=tokens) for seed, shift in shifts.items()]
    row = only(compare(results))
    assert (row.num_seeds, row.num_items) == (3, 200)
    assert row.difference == pytest.approx(-0.2)
    # The bound is the best seed drawn three times (once in 27), 0.1 above the mean, stretched by
    # sqrt(3 / 2) * 4.303 / 1.960 = 2.689; the t interval of the three would be -0.2 ± 0.248.
    assert row.ci_high == pytest.approx(-0.2 + 0.2689, abs=1e-4)
    assert row.verdict == "not distinguishable"
    assert "nll on sums, 3 seeds: " in sentence(row)
    assert only(fast(results, "mask")).difference == pytest.approx(0.2)


def test_seeds_over_several_base_models_are_noted():
    """A mean over models of two sizes is of no method; one model may have two names, so that it is no error."""
    bases = ["org/small", "org/large"]
    results = []
    for seed, base in enumerate(bases):
        results.append(make("full", seed, accuracy=scores(50)))
        results.append(make("mask", seed, accuracy=scores(60)) | {"training": {"base": base}})
    note = "the seeds of mask are over several base models ('org/small', 'org/large'): is it one model?"
    assert note in fast(results).notes
    results[3]["training"]["base"] = bases[0]
    assert note not in fast(results).notes


def test_equal_seeds_are_paired():
    base = np.linspace(1, 2, 50)
    tokens = np.ones(50, int)
    results = []
    for seed, shift in enumerate([0.0, 0.5, 1.0]):  # seeds differ much, but by the same amount in both methods
        results.append(make("mask", 2 - seed, nll=base + 1.0 - shift - 0.1, num_tokens=tokens))
        results.append(make("full", seed, nll=base + shift, num_tokens=tokens))
    row = only(fast(results, "full"))
    assert row.num_seeds == 3
    assert (row.ci_low, row.ci_high) == pytest.approx((-0.1, -0.1))
    assert row.verdict == "better"


def test_a_method_is_compared_at_the_seeds_that_the_baseline_has_too():
    """As after a run that failed: its other seeds, and other methods', lose nothing."""
    rng = np.random.default_rng(0)
    nll = {seed: rng.normal(2 + seed, 0.2, 50) for seed in range(3)}
    tokens = np.ones(50, dtype=int)
    full = [make("full", seed, "full", nll=nll[seed], num_tokens=tokens) for seed in nll]
    masks = [make("mask", seed, "mask", nll=nll[seed] - 0.1, num_tokens=tokens) for seed in (0, 2)]
    one = make("L1 mask", 1, "l1_mask", nll=nll[1] + 0.1, num_tokens=tokens)
    whole = [make("again", seed, "full", nll=nll[seed] - 0.2, num_tokens=tokens) for seed in nll]
    pretrained = make("pre-trained", 0, "pretrained", nll=np.full(50, 4.0), num_tokens=tokens)
    comparison = fast([*full, *masks, one, *whole, pretrained], "full")
    rows = {row.method: row for row in comparison.differences}
    found = {name: (row.num_seeds, round(row.difference, 6)) for name, row in rows.items()}
    expected = 4 - np.mean([nll[seed].mean() for seed in nll])
    assert found == {"mask": (2, -0.1), "L1 mask": (1, 0.1), "again": (3, -0.2), "pre-trained": (3, round(expected, 6))}
    assert [note for note in comparison.notes if "seed" in note] == [
        "mask is compared at seed 0, 2 only, which full has too",
        "L1 mask is compared at seed 1 only, which full has too",
    ]


def test_fixed_seeds_are_the_mean_of_these_models():
    """What is compared is one model per method whose score on an item is the mean over the seeds."""
    rng = np.random.default_rng(0)
    right = {name: rng.random((2, 400)) < rates for name, rates in {"full": 0.5, "mask": [[0.7], [0.58]]}.items()}
    results = [make(name, seed, accuracy=rows[seed].astype(float)) for name, rows in right.items() for seed in (0, 1)]
    comparison = fast(results, "full", fixed_seeds=True)
    row, diffs = only(comparison), right["mask"].astype(float) - right["full"]
    means = [make(name, accuracy=rows.mean(axis=0)) for name, rows in right.items()]
    one = only(fast(means, "full"))
    assert (row.difference, row.ci_low, row.ci_high) == (one.difference, one.ci_low, one.ci_high)
    assert (row.p_value, row.verdict, row.num_seeds) == (one.p_value, "better", 2)
    assert row.by_seed == pytest.approx(diffs.mean(axis=1))
    assert comparison.scores[0].stderr == pytest.approx(right["full"].mean(axis=0).std(ddof=1) / 20)
    text = render(comparison, "markdown")
    by_seed = ", ".join(f"{100 * each:+.1f}" for each in row.by_seed)
    assert f"accuracy on sums, these 2 seeds: +{100 * row.difference:.1f} points" in text
    assert f"better; by seed {by_seed}." in text
    assert "about these trained models and not about other seeds" in text
    drawn = only(fast(results, "full"))
    assert (drawn.verdict, drawn.by_seed) == ("not distinguishable", None)
    assert "difference, 95 % over items" in render(comparison, "terminal")
    assert "other seeds" not in render(fast(results, "full"), "markdown")


PAIRS = st.integers(2, 25).flatmap(
    lambda size: st.tuples(*(st.lists(st.integers(0, 1), min_size=size, max_size=size) for _ in range(2)))
)


@settings(max_examples=15, deadline=None)
@given(PAIRS, st.integers(0, 3))
def test_comparing_the_other_way_round_flips_the_signs(pair, seed):
    results = [make(name, accuracy=values) for name, values in zip("ab", pair, strict=True)]
    forward, backward = (only(fast(results, name, seed=seed)) for name in "ab")
    assert forward.difference == pytest.approx(-backward.difference)
    assert (forward.ci_low, forward.ci_high) == pytest.approx((-backward.ci_high, -backward.ci_low))
    assert forward.p_value == backward.p_value
    assert (forward.won, forward.lost, forward.tied) == (backward.lost, backward.won, backward.tied)
    opposite = {"better": "worse", "worse": "better", "not distinguishable": "not distinguishable"}
    assert forward.verdict == opposite[backward.verdict]


def test_a_model_that_differs_on_no_item_is_said_to_be_the_same():
    """As a mask that removes nothing is its parent."""
    results = [make("full", accuracy=scores(50)), make("mask", accuracy=scores(50)), make("lora", accuracy=scores(51))]
    said = "mask and full differ on no item: are they one model, such as a mask that removes nothing?"
    comparison = fast(results)
    assert comparison.notes == [said]
    assert f"Note: {said}\n" in render(comparison, "markdown")


def test_the_order_of_the_items_does_not_matter():
    columns = {"nll": np.linspace(1, 2, 100), "num_tokens": np.arange(1, 101)}
    a, b = make("a", accuracy=scores(50), **columns), make("b", accuracy=scores(60), **columns | {"nll": scores(30)})
    expected = fast([a, b]).differences
    a["tasks"]["sums"]["items"].reverse()
    assert fast([a, b]).differences == expected


def test_what_only_some_have_is_left_out_and_said():
    results = [
        make("full", tasks={"sums": make_task(accuracy=scores(5)), "odd": make_task(accuracy=scores(5))}),
        make("mask", tasks={"sums": make_task(accuracy=scores(6)), "new": make_task(accuracy=scores(5))}),
        make("lora", tasks={"sums": make_task(accuracy=scores(7)), "odd": make_task(accuracy=scores(5))}),
    ]
    comparison = fast(results)
    assert [(row.method, row.task) for row in comparison.differences] == [
        ("mask", "sums"),
        ("lora", "sums"),
        ("lora", "odd"),
    ]
    assert comparison.notes == [
        "accuracy on odd leaves out 'mask', without it",
        "accuracy on new is not compared, only 'mask' has it",
    ]
    assert "Note: accuracy on odd leaves out 'mask', without it." in render(comparison, "markdown")


def test_tasks_and_metrics_can_be_chosen():
    task = {"accuracy": scores(5), "brevity": np.linspace(0, 3, 100)}
    results = [make(name, tasks={"sums": make_task(**task), "odd": make_task(**task)}) for name in "ab"]
    comparison = fast(results, tasks=["odd"], metrics=["brevity"])
    assert (only(comparison).task, only(comparison).metric, only(comparison).unit) == ("odd", "brevity", "score")
    assert cross_domain_table(comparison.scores).columns == ("model", "odd brevity (score)")


def test_settings_that_differ_are_noted():
    comparison = fast([make("a", accuracy=scores(5)), make("b", 4, setting=2, accuracy=scores(6))])
    assert comparison.notes == ["the results differ in the setting batch_size: 1 for 'a', 2 for 'b' seed 4"]


SUMMARY = {"value": 0.4, "stderr": 0.02, "num_items": 100, "higher_is_better": True, "unit": "fraction"}


def test_a_metric_without_items_is_shown_and_not_compared():
    results = [make(name, accuracy=scores(5)) for name in "ab"]
    results[1]["tasks"]["sums"]["metrics"]["win_rate"] = SUMMARY
    comparison = fast(results)
    assert only(comparison).metric == "accuracy"
    table = cross_domain_table(comparison.scores)
    assert table.columns == ("model", "sums accuracy (%)", "sums win_rate (%)")
    assert [row[2] for row in table.rows] == ["–", "40.0 ± 2.0"]


def refuse(results, match, *args, **options):
    with pytest.raises(UserError, match=match) as caught:
        fast(results, *args, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"sums: different task version, 1 and 2 \('full' and 'mask'\)"),
        ({"num_fewshot": 8}, r"sums: different num_fewshot \(shots\), 0 and 8"),
        ({"chat_template_hash": "ab", "prompt": "3+3"}, r"sums: different chat_template_hash \(prompts\), None and ab"),
        ({"prompt": "3+3"}, "sums: different prompts or references of the same items"),
        ({"accuracy": scores(5, 99)}, "sums: different items, 100 and 99 of them, 'i099' in one only"),
    ],
)
def test_results_measured_differently_are_refused(change, message):
    mask = make("mask", **{"accuracy": scores(5)} | change)
    refuse([make("full", accuracy=scores(5)), mask], message)
    with pytest.raises(UserError, match=message):
        scores_of([make("full", accuracy=scores(5)), mask])


def test_a_template_that_no_prompt_went_through_makes_no_difference():
    """That of an instruct model, beside its base, on rows of plain text."""
    full = make("full", accuracy=scores(5))
    mask = make("mask", accuracy=scores(9), chat_template_hash="ab")
    assert only(fast([full, mask])).num_items == 100


def test_two_that_differ_are_refused_beside_a_first_that_does_not_say():
    """One of lm-eval's files may lack the shots."""
    silent = make("full", accuracy=scores(5), num_fewshot=None)
    few = make("mask", accuracy=scores(5), num_fewshot=0)
    many = make("other", accuracy=scores(5), num_fewshot=8)
    same = make("another", accuracy=scores(5), num_fewshot=0)
    message = r"not measured alike: sums: different num_fewshot \(shots\), 0 and 8 \('mask' and 'other'\): evaluate"
    refuse([silent, few, many, same], message)
    assert fast([silent, few, same]).differences


def test_all_that_differs_is_in_the_one_line():
    full = make("full", tasks={"sums": make_task(accuracy=scores(5)), "odd": make_task(accuracy=scores(5))})
    mask = copy.deepcopy(full) | {"name": "mask"}
    mask["tasks"]["sums"]["version"] = 2
    mask["tasks"]["odd"]["num_fewshot"] = 4
    refuse([full, mask], r"sums: different task version.*; odd: different num_fewshot")
    mask["tasks"]["odd"]["num_fewshot"] = 0
    assert fast([full, mask], tasks=["odd"]).differences


def test_other_limits_of_generation_are_refused_and_other_versions_said():
    full, mask = make("full", accuracy=scores(50)), make("mask", accuracy=scores(60))
    full["environment"]["packages"] |= {"lm_eval": "0.4.12", "unrelated": "1"}
    assert [note for note in fast([full, mask]).notes if "versions of lm_eval: 0.4.12 for 'full'" in note]
    assert "unrelated" not in " ".join(fast([full, mask]).notes)
    for result, tokens in ((full, 64), (mask, 256)):
        result["tasks"]["sums"]["generation_kwargs"] = {"max_gen_toks": tokens}
    refuse([full, mask], "sums: different generation_kwargs, .*64.* and .*256")


def test_other_units_are_refused():
    full, mask = make("full", accuracy=scores(50)), make("mask", accuracy=scores(60))
    mask["tasks"]["sums"]["metrics"]["accuracy"]["unit"] = "nats/token"
    refuse([full, mask], "sums: different unit of accuracy, fraction and nats/token")


def test_a_model_without_a_partly_right_answer_has_the_same_unit():
    none, some = make("none", f1=np.zeros(50)), make("some", f1=np.linspace(0, 0.8, 50))
    assert only(fast([none, some])).unit == "fraction"
    row = only(fast([make("none", points=np.ones(50)), make("some", points=np.linspace(0, 3, 50))]))
    assert (row.unit, row.verdict) == ("score", "better")


def test_other_tokens_are_refused():
    nll = np.linspace(1, 2, 10)
    results = [make("a", nll=nll, num_tokens=np.ones(10, int)), make("b", nll=nll, num_tokens=np.full(10, 2))]
    refuse(results, r"different num_tokens \(tokenizers\?\), 1 and 2 in item 'i000'")


def test_bad_requests():
    full, mask = make("full", accuracy=scores(50)), make("mask", accuracy=scores(60))
    refuse([], "no results were given")
    refuse([full], "only 'full' was given, nothing to compare it with")
    refuse([make("full", seed, accuracy=scores(50)) for seed in range(2)], "only 'full' was given")
    refuse([full, mask], "unknown baseline 'ful' .did you mean 'full'", "ful")
    refuse([full, mask], "unknown task 'sum' .did you mean 'sums'", tasks=["sum"])
    refuse([full, mask], "unknown metric 'acuracy' .did you mean 'accuracy'", metrics=["acuracy"])
    refuse([full, mask], "confidence 95 is outside", confidence=95)
    refuse([full, mask], "seed -1 is negative", seed=-1)
    refuse([full, mask], "num_resamples 99 is too few.*at least 100", num_resamples=99)
    many = [full] + [make(f"m{index}", accuracy=scores(50)) for index in range(10)]
    assert compare(many[:4], settings=Settings(confidence=0.999)).num_resamples in (12_000, 12_001), "the default grows"
    refuse(many, "num_resamples 500 is too few for 10 comparisons.*at least 80[01]")
    refuse([full, mask, mask], "2 results are named 'mask', and not with different seeds")
    named = [make("mask", 1, "mask", accuracy=scores(50)), make("mask", 2, "lora", accuracy=scores(50))]
    refuse([full, *named], "results named 'mask' are of different methods .'mask', 'lora'.")
    seeds = [make("mask", seed, accuracy=scores(50)) for seed in (0, 1)]
    seeds[1]["model"]["scale"] = 0.5
    refuse([full, *seeds], "results named 'mask' have different parts of a change .scale 1.0, 0.5.")
    seeds[0]["model"]["scale"] = 0.5
    refuse([*seeds, *(make("full", seed, accuracy=scores(50)) for seed in (2, 3))], "seeds 2, 3 and 'mask' 0, 1")
    refuse([make(name, accuracy=[1]) for name in "ab"], "1 item, too few")
    refuse([make("a", accuracy=scores(5)), make("b", brevity=np.ones(100))], "no method shares a task and metric")
    refuse([make("a", score=[1.5, None]), make("b", score=[1.5, 2.0])], "item 'i001' of 'a' has no value")
    with pytest.raises(UserError, match="no results were given"):
        scores_of([])


def test_cross_domain_table_by_hand():
    results = [
        make("full", tasks={"sums": make_task(accuracy=scores(50)), "odd": make_task(accuracy=scores(25))}),
        make("mask", 0, tasks={"sums": make_task(accuracy=scores(60))}),
        make("mask", 1, tasks={"sums": make_task(accuracy=scores(64))}),
        make("none", tasks={"sums": make_task(accuracy=[None] * 100)}),
    ]
    table = cross_domain_table(scores_of(results))
    assert table.columns == ("model", "sums accuracy (%)", "odd accuracy (%)")
    assert table.rows == [
        ("full", "50.0 ± 5.0", "25.0 ± 4.4"),  # sqrt(0.25 / 99) and sqrt(0.1875 / 99)
        ("mask (2 seeds)", "62.0 ± 2.0", "–"),  # sd 2.83 points / sqrt(2)
        ("none", "no value", "–"),
    ]


def test_a_score_at_an_edge_has_an_interval_and_no_error():
    results = [make("none", accuracy=scores(0, 300)), make("all", accuracy=scores(300, 300))]
    results += [make("few", accuracy=scores(9, 300)), make("ten", accuracy=scores(10, 300))]
    results += [make("seeds", seed, accuracy=scores(0, 300)) for seed in range(3)]
    results += [make("alike", seed, accuracy=scores(150, 300)) for seed in range(3)]
    cells = dict(cross_domain_table(scores_of(results)).rows)
    assert cells == {
        "none": "0.0 [0.0, 1.3]",
        "all": "100.0 [98.7, 100.0]",
        "few": "3.0 [1.6, 5.6]",
        "ten": "3.3 ± 1.0",
        "seeds (3 seeds)": "0.0 [0.0, 1.3]",
        "alike (3 seeds)": "50.0 [44.4, 55.6]",
    }
    assert "brackets beside a score are its 95 % interval" in render(fast(results), "markdown")


def test_clusters_widen_the_error_and_are_drawn_together():
    right = np.repeat(np.arange(60) % 3 > 0, 5)
    better = right | np.repeat(np.arange(60) % 12 == 0, 5)
    labels = [f"passage {index}" for index in np.repeat(np.arange(60), 5)]
    loose = [make(name, accuracy=values) for name, values in (("full", right), ("mask", better))]
    tied = copy.deepcopy(loose)
    for result in tied:
        for item, label in zip(result["tasks"]["sums"]["items"], labels, strict=True):
            item["cluster_id"] = label
    row, clustered = only(fast(loose)), only(fast(tied))
    assert (row.test, clustered.test, clustered.num_clusters) == ("McNemar", "bootstrap", 60)
    assert (row.verdict, clustered.verdict) == ("better", "not distinguishable")  # 25 items, but 5 passages
    assert clustered.ci_high - clustered.ci_low > 1.8 * (row.ci_high - row.ci_low)
    assert "sums, 60 clusters: " in sentence(clustered)
    items = tied[0]["tasks"]["sums"]["items"]
    assert (
        metric_from_items(items, "accuracy")["stderr"]
        > 2 * metric_from_items(loose[0]["tasks"]["sums"]["items"], "accuracy")["stderr"]
    )
    items[3]["cluster_id"] = "elsewhere"
    refuse(tied, "different cluster_id, elsewhere and passage 0 in item 'i003'")
    for result in tied:
        for item in result["tasks"]["sums"]["items"]:
            item["cluster_id"] = "one"
    refuse(tied, "all 300 items are of one cluster, 'one'")
    with pytest.raises(UserError, match="item 'x' has cluster_id None: give every item a text"):
        metric_from_items([{"id": "y", "a": 1, "cluster_id": "p"}, {"id": "x", "a": 1}], "a")


@pytest.fixture
def comparison():
    results = [make("full|best", accuracy=scores(50)), make("[red] mask_1 & 5%", accuracy=scores(60))]
    return fast(results)


def test_terminal(comparison, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # what is a page stays one
    text = render(comparison, "terminal")
    assert "50.0" in text
    assert "+10.0 [" in text
    assert text.count("[red] mask_1 & 5% ") == 2  # a table and a sentence: no markup
    assert "[red] mask_1 & 5% vs full|best, accuracy on sums: +10.0 points" in text


def test_rows_of_a_page_are_told_apart_by_the_values_of_a_grid():
    """Two rows were called "mask after [sparsit…", and the value that tells them apart was cut off."""
    names = [f"mask after full fine-tuning [sparsity={share}]" for share in (0.05, 0.2)]
    results = [make("full", is_right=scores(50)), *(make(name, is_right=scores(60)) for name in names)]
    text = render(fast(results), "terminal")
    assert "=0.05] " in text and "=0.2] " in text and text.count("…") == 2
    assert max(map(len, text.splitlines())) <= 80


def test_names_are_cut_where_they_stay_different():
    cut = _cut_names({"short", "one long name", "another name, one", "another name, two"}, 10)
    assert cut == {
        "short": "short",
        "one long name": "one long …",
        "another name, one": "anoth… one",
        "another name, two": "anoth… two",
    }


def test_a_table_wider_than_the_terminal_continues_below(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    table = Table(("model", "first", "second"), [("heading of any length", "", ""), ("a", "1.0 ± 0.1", "2")])
    assert draw(table, "terminal").splitlines() == [
        "model      first",
        "────────────────",
        "heading of any length",
        "a      1.0 ± 0.1",
        "",
        "model  second",
        "─────────────",
        "heading of any length",
        "a           2",
    ]


def test_markdown(comparison):
    lines = render(comparison, "markdown").splitlines()
    assert lines[0] == "| model | sums accuracy (%) |"
    assert lines[1] == "| --- | ---: |"
    assert lines[2] == "| full\\|best | 50.0 ± 5.0 |"
    assert any(line.startswith("- [red] mask_1 & 5% vs full|best, accuracy on sums") for line in lines)


HOSTILE = "a\\|b `x` <img src=x> [y](http://z) \\input{/etc/passwd} \\write18{id} % $ \x1b]0;mine\x07\n\\end{tabular}"


@pytest.mark.parametrize("output_format", ["terminal", "markdown", "latex"])
def test_texts_of_a_result_file_stay_texts(output_format):
    text = draw(Table(("model", "score"), [(HOSTILE, "1"), ("other", "2")]), output_format)
    lines = text.splitlines()
    assert all(line.isprintable() for line in lines)
    if output_format == "latex":
        assert [line for line in lines if line.endswith(r" & 1 \\")] and text.count(r"\end{tabular}") == 1
        assert not re.search(r"\\(input|write18)", text) and not re.search(r"(?<!\\)[$%](?!.*booktabs)", text)
        return
    assert r"\x1b]0;mine\x07\n" in text.replace("\\\\", "\\")
    if output_format == "markdown":
        assert len(lines) == 4 and all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 3 for line in lines)
        assert r"\<img" in text and r"]\(http" in text and r"\`x\`" in text


@pytest.mark.parametrize("form", FORMATS)
def test_names_with_control_characters_are_refused(form):
    for name in ("a\x1b[2J", "a\nb", "a\u202eb", " "):
        with pytest.raises(UserError, match="is empty or contains non-printable characters"):
            make(name, accuracy=scores(5, 10))
        with pytest.raises(UserError, match="is empty or contains non-printable characters"):
            make("mask", tasks={name: make_task(accuracy=scores(5, 10))})
    result = make("mask", accuracy=scores(5, 10))
    result["tasks"]["sums"]["metrics"]["accuracy"]["unit"] = "\x1b[2J\nunit"
    text = render_scores(scores_of([result]), form)
    assert "\x1b" not in text and "\nunit" not in text


def test_json_has_fractions_and_no_percent(comparison):
    record = json.loads(render(comparison, "json"))
    assert (record["schema_version"], record["kind"], record["baseline"]) == (2, "comparison", "full|best")
    assert record["differences"][0]["difference"] == pytest.approx(0.1)
    assert record["differences"][0]["verdict"] == "better"
    assert record["scores"][0] == {
        "model": "full|best",
        "task": "sums",
        "metric": "accuracy",
        "unit": "fraction",
        "value": 0.5,
        "stderr": pytest.approx((0.25 / 99) ** 0.5),
        "num_seeds": 1,
        "low": pytest.approx(0.4038, abs=1e-4),
        "high": pytest.approx(0.5962, abs=1e-4),
        "is_at_edge": False,
        "test_set": None,
    }
    assert "%" not in json.dumps(record).replace("5%", "")


def test_zero_has_no_minus():
    """A gain of -0.0 was printed as -0.0000."""
    results = [make("a", gain=np.tile([-1e-20, 0.0], 20)), make("b", gain=np.tile([-1.5, 0.3], 20))]
    comparison = fast(results)
    for form in ("terminal", "markdown"):
        text = render(comparison, form)
        assert "-0.0000" not in text and " 0.0000 " in text


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"value": 2.34567, "stderr": 0.03}, "2.3457 ± 0.0300"),
        ({"value": 2.34567, "stderr": 0.00002}, "2.34567 ± 0.00002"),
        # A value below its error is not distinguished from zero, with any number of decimals.
        ({"value": -2e-7, "stderr": 0.03}, "0.0000 ± 0.0300"),
        ({"value": 2.34567, "stderr": 0.0}, "2.3457 ± 0.0000"),
        ({"value": 2.34567, "stderr": 1e-18}, "2.3457 ± 0.0000"),
        ({"value": -0.00002, "stderr": None}, "-0.00002"),
        ({"value": 0.4687, "stderr": 0.0002, "unit": "fraction"}, "46.87 ± 0.02"),
        ({"value": 0.0, "stderr": 0.0, "unit": "fraction", "low": 0.0, "high": 0.0003}, "0.00 [0.00, 0.03]"),
        ({"value": 1.0, "stderr": 0.0, "unit": "fraction", "low": 0.9996, "high": 1.0}, "100.00 [99.96, 100.00]"),
        ({"value": 0.0, "stderr": 0.0, "unit": "fraction", "low": 0.0, "high": 0.019}, "0.0 [0.0, 1.9]"),
    ],
)
def test_only_zero_is_written_as_zero(values, text):
    """A standard error below 0.00005 was printed as 0.0000, and the interval of 10,000 right answers as 100 to 100."""
    defaults = {"model": "a", "task": "sums", "metric": "m", "unit": "nats", "num_seeds": 1, "is_at_edge": True}
    assert score_text(Score(**defaults | values)) == text


def test_rounding_never_contradicts_the_verdict():
    # 1 of 5000 items: a bound or difference that is not zero is not shown as zero.
    values = np.linspace(1, 2, 50)
    tokens = np.ones(50, int)
    row = only(fast([make("a", nll=values, num_tokens=tokens), make("b", nll=values - 2e-6, num_tokens=tokens)]))
    assert row.verdict == "better"
    assert "-0.000002 nats/token [-0.000002, -0.000002]" in sentence(row)


@pytest.mark.parametrize(
    ("p_value", "level", "text"),
    [
        (0.0496, 0.05, "0.0496"),
        (0.0504, 0.05, "0.0504"),
        (0.04999, 1 - 0.95, "0.04999"),
        (1 - 0.95, 1 - 0.95, "0.05"),  # which allows a claim: at most 0.05
        (0.0514, 0.05, "0.051"),
        (0.0166, 0.05 / 3, "0.0166"),  # of three looks; 0.017 would be above the level
        (0.0168, 0.05 / 3, "0.017"),
        (0.0004, 0.05, "< 0.001"),
        (0.0004, 0.0005, "0.0004"),
        (1.0, 0.05, "1"),
        (0.0, 0.0005, "< 0.000001"),  # 1,200 items won and none lost
    ],
)
def test_a_printed_p_is_on_its_side_of_the_level(p_value, level, text):
    assert p_text(p_value, level) == text


def test_answers_that_are_all_alike_are_said_to_be():
    """An interval of 1.9 points around 200 equal answers is right about other items, and reads like a doubt."""
    results = [make("full", accuracy=scores(50, 200)), make("mask", accuracy=scores(50, 200))]
    row = only(fast(results))
    assert difference_text(row) == "+0.0, all 200 alike" and row.ci_high > 0.018
    assert "accuracy on sums: +0.0 points, all 200 alike, McNemar p 1: not distinguishable." in sentence(row)


def test_means_that_tie_are_no_equal_answers():
    """Seeds that win and lose the same items tie on average; they differ on all of them."""
    right = scores(50)
    results = [make("full", seed, accuracy=right if seed else ~right) for seed in (0, 1)]
    results += [make("mask", seed, accuracy=~right if seed else right) for seed in (0, 1)]
    comparison = fast(results)
    row = only(comparison)
    assert (row.tied, row.num_identical) == (100, 0)
    assert not any("differ on no item" in note for note in comparison.notes)
    assert "alike" not in sentence(row)
    same = fast([each for name in "ab" for each in (make(name, 0, accuracy=right), make(name, 1, accuracy=~right))])
    assert (
        only(same).num_identical == 100 and "a and b" not in same.notes[0] and "b and a differ on no" in same.notes[0]
    )


def test_seeds_that_cancel_out_are_a_difference_of_zero():
    """Rounding leaves some 1e-18 of them, which was printed as +0.00000000."""
    base = np.full(60, 0.5)
    shifts = (0.1, 0.2, -0.3)
    assert sum(shifts) != 0
    wave = np.where(np.arange(60) % 2, 0.01, -0.01)
    results = [make("full", seed, share=base) for seed in range(3)]
    results += [make("mask", seed, share=base + shift + wave) for seed, shift in enumerate(shifts)]
    row = only(fast(results))
    assert row.difference == 0
    assert re.fullmatch(r"\+0\.0 \[-\d+\.\d, \d+\.\d\]", difference_text(row))


def test_an_interval_of_everything_is_none():
    """Two seeds that disagree: -100 to 100 points is all that a difference can be."""
    results = [make("full", seed, accuracy=scores(50)) for seed in (0, 1)]
    results += [make("mask", 0, accuracy=scores(100)), make("mask", 1, accuracy=scores(5))]
    row = only(fast(results))
    assert (row.ci_low, row.ci_high) == (-1, 1)
    assert difference_text(row) == "+2.5 (no interval)"


def test_percent_beside_fractions_is_refused():
    """The unit of a score without one is guessed from its values, and 0 to 100 is not 0 to 1."""
    right = scores(50)
    refuse([make("a", rate=right * 1.0), make("b", rate=right * 100.0)], "rate goes up to 1 in one and up to 100")
    ratings = np.arange(100) % 10
    assert only(fast([make("a", rate=ratings), make("b", rate=ratings % 2)])).unit == "score"


def test_looks_are_paid_for():
    """Seeds that are added until a verdict appears would tell a twentieth of equal methods apart at each look."""
    results = [make("full", accuracy=scores(50)), make("mask", accuracy=scores(57))]
    once, often = fast(results), fast(results, looks=5)
    assert only(once).p_value == only(often).p_value < 0.05
    assert (only(once).verdict, only(often).verdict) == ("better", "not distinguishable")
    assert often.confidence == pytest.approx(0.99) and only(often).ci_low <= 0 < only(once).ci_low
    assert "judged as one of 5 looks: each at 99 % (Bonferroni)" in often.notes[0]
    refuse(results, "looks 0 is outside", looks=0)
    refuse(
        results,
        "confidence 0.999 with 20 looks judges each at 0.99995, above 0.9999",
        confidence=0.999,
        looks=20,
    )


def test_too_many_resamples_are_refused_before_memory_is_taken():
    with pytest.raises(UserError, match="num_resamples 1,000,000,000,000 is too many: give at most 2,000,000"):
        Settings(num_resamples=10**12)
    with pytest.raises(UserError, match=r"300 comparisons at confidence 0\.9999 need 12,000,00\d bootstrap samples"):
        Settings(confidence=0.9999).with_resamples(300)


def test_latex(comparison):
    text = render(comparison, "latex")
    assert text.count(r"\begin{tabular}") == text.count(r"\bottomrule") == 2
    assert r"full\textbar{}best & 50.0 $\pm$ 5.0 \\" in text
    assert r"{}[red] mask\_1 \& 5\% & 60.0" in text  # after a \\ a bracket would be its argument
    said = [line for line in text.splitlines() if "accuracy on sums: " in line]
    assert len(said) == 1 and said[0].startswith("% ")


def test_numbers_below_zero_have_a_minus_in_latex():
    """A hyphen in the place of a minus is shorter than the plus of the row above."""
    assert latex_text("-1.5 [-2.0, 0.3]") == "$-$1.5 [$-$2.0, 0.3]"
    assert latex_text("run-2 of 2026-11-27, --2") == "run-2 of 2026-11-27, --2"


CLAIMS = re.compile(r"better|worse|not distinguishable")
NO_INTERVAL = re.compile(r" alike|\(no interval\)")  # in its place
INTERVAL = re.compile(r"[+-][\d.]+(?: points| nats/token)? ([\[(])(-?[\d.]+), (-?[\d.]+)([\])])")


def holds_zero(line):
    """Whether the one interval of a line that is not labelled holds zero; a round bracket is no part of it."""
    ((left, low, high, right),) = INTERVAL.findall(re.sub(r", unadjusted \[[^\]]*\]", "", line))
    low, high = float(low), float(high)
    return low <= 0 <= high and not (low == 0 and left == "(") and not (high == 0 and right == ")")


def random_family(rng):
    """Results of a baseline and three methods, some of them truly different, of one to three seeds."""
    num_items, num_seeds = int(rng.integers(8, 120)), int(rng.choice([1, 1, 3]))
    ease, losses = rng.random(num_items), rng.normal(3, 1, num_items)
    tokens, results = rng.integers(1, 9, num_items), []
    for name, shift in zip(("full", "mask", "random", "L1"), (0, *rng.choice([0, 0.05, 0.1, -0.15], 3)), strict=True):
        for seed in range(num_seeds):
            right = ease + 0.05 * rng.normal(size=num_items) < 0.5 + shift
            nll = losses - shift + 0.3 * rng.normal(size=num_items)
            results.append(make(name, seed, accuracy=right.astype(int), nll=nll, num_tokens=tokens))
    return results


def test_no_printed_interval_disagrees_with_its_verdict(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(families, "NUM_DRAWS", 2000)
    rng, seen, contradicted = np.random.default_rng(0), set(), 0
    for _ in range(20):
        comparison = fast(random_family(rng))
        assert {row.num_comparisons for row in comparison.differences} == {3}
        texts = {form: render(comparison, form) for form in ("terminal", "markdown")}
        for form, text in texts.items():
            lines = [line for line in text.splitlines() if CLAIMS.search(line)]
            if form == "terminal":  # rows of its table
                lines = [line for line in lines if line.startswith("  ")]
                lines = [line for line in lines if INTERVAL.search(line) or NO_INTERVAL.search(line)]
            # A row of a table and a sentence each; a page has the loss where something is claimed of it.
            assert len(lines) in ((3, 6) if form == "terminal" else (12,))
            for line in lines:
                (claim,) = CLAIMS.findall(line)
                if NO_INTERVAL.search(line):
                    assert claim == "not distinguishable"
                    continue
                assert holds_zero(line) == (claim == "not distinguishable"), line
                seen.add((form, claim))
        for row in comparison.differences:
            contradicted += not row.unadjusted_low <= 0 <= row.unadjusted_high and row.verdict == "not distinguishable"
            seen.add(("cut", row.is_cut_at_zero))
    assert contradicted > 5  # which is why the unadjusted interval does not stand beside the verdict
    assert {("markdown", claim) for claim in ("better", "worse", "not distinguishable")} | {("cut", True)} <= seen


def test_the_unadjusted_interval_is_labelled(comparison):
    of_one, of_several = only(comparison), fast(random_family(np.random.default_rng(3))).differences[0]
    assert " unadjusted [" not in sentence(of_one) and " unadjusted [" in sentence(of_several)
    earlier = dataclasses.replace(of_several, unadjusted_low=None, unadjusted_high=None)
    assert difference_text(earlier).endswith("] unadjusted") and sentence(earlier).count(" unadjusted") == 1


def arguments(*argv):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([str(word) for word in argv])


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / "full", tmp_path / "mask"]
    for path, count in zip(paths, (50, 60), strict=True):
        write_result(path / "result.json", make(path.name, accuracy=scores(count)))
    return paths


def test_command_prints(files, capsys):
    command.run(arguments(files[0], files[1] / "result.json", "--baseline", "mask", "--format", "markdown"))
    assert "full vs mask, accuracy on sums: -10.0 points" in capsys.readouterr().out


def test_command_writes(files, tmp_path, capsys):
    output = tmp_path / "new" / "table.json"
    options = ["--format", "json", "--num_resamples", 300, "--seed", 7, "--confidence", 0.9]
    command.run(arguments(*files, *options, "--tasks", "sums", "--metrics", "accuracy", "--output", output))
    assert capsys.readouterr().out == f"wrote {output}\n"
    record = json.loads(output.read_text())
    assert (record["num_resamples"], record["seed"], record["confidence"]) == (300, 7, 0.9)


def test_command_refuses_bad_input(files, tmp_path):
    with pytest.raises(UserError, match="no such result file"):
        command.run(arguments(files[0], tmp_path / "nowhere"))
    with pytest.raises(UserError, match="unknown task 'sum'"):
        command.run(arguments(*files, "--tasks", "sums,sum"))
    with pytest.raises(UserError, match="only 'full' was given"):
        command.run(arguments(files[0], "--baseline", "full"))


@pytest.mark.parametrize("form", FORMATS)
def test_command_shows_one_model_alone(form, files, capsys):
    command.run(arguments(files[0], "--format", form))
    out = capsys.readouterr().out
    assert "full" in out and (json.loads(out)["scores"][0]["value"] == 0.5 if form == "json" else "50.0" in out)


def test_the_options_are_known_without_imports():
    code = (
        "import argparse, sys; from maskft_lab.cli import compare; compare.add_arguments(argparse.ArgumentParser());"
        "print([m for m in ('torch', 'scipy', 'numpy', 'rich') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_comparing_does_not_import_torch(files):
    code = (
        "import sys; from maskft_lab.results import compare, schema;"
        "compare.compare([schema.read_result(path) for path in sys.argv[1:]]); print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code, *map(str, files)], capture_output=True, text=True)
    assert run.stdout == "False\n", run.stderr
