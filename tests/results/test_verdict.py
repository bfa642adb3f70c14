"""The verdict on a mask: against its parent and the strongest control; and what the end of a study shows."""

import json
from dataclasses import replace

import numpy as np
import pytest

from maskft_common.errors import UserError
from maskft_lab.results.compare import compare
from maskft_lab.results.comparison import Comparison, Settings
from maskft_lab.results.render import render
from maskft_lab.results.schema import build_result, build_task, items_fingerprint, metric_from_items
from maskft_lab.results.verdict import reworded
from maskft_lab.results.words import numbers_text, sentence

NUM_ITEMS, PARENT = 400, "f" * 64


def test_numbers_of_seeds_are_zero_only_where_they_are():
    """Of 5,000 items one is 0.02 points: seeds that differ in sign are not shown as +5.0 and -0.0."""
    assert numbers_text([0.05, -0.0002], "fraction") == "+5.00, -0.02"
    assert numbers_text([0.05, -0.0, 1e-18], "fraction") == "+5.0, +0.0, +0.0"
    assert numbers_text([0.25, -0.025], "fraction") == "+25.0, -2.5"
    assert numbers_text([1.5, -0.00002], "nats/token") == "+1.50000, -0.00002"


def result(name, method, right, seed=0, *, tokens=2000, start="full-s{}-a", fingerprint=PARENT):
    """A result of a study's run whose model has the first ``right`` of 400 items right."""
    items = [{"id": f"{n:03}", "accuracy": int(n < right)} for n in range(NUM_ITEMS)]
    questions = [{"id": item["id"], "prompt": "", "reference": ""} for item in items]
    task = build_task(
        items,
        {"accuracy": metric_from_items(items, "accuracy")},
        version=1,
        num_fewshot=0,
        fingerprint=items_fingerprint(questions),
    )
    model = {"name_or_path": "m", "method": method, "seed": seed, "fingerprint": f"{fingerprint}{seed}"}
    model["adapter"] = "a" if method.endswith("mask") else None
    training = {"complete_num_train_tokens": tokens}
    built = build_result(name, model, {}, {"sums": task}, training)
    return built | {"study": {"start": start.format(seed), "run": f"{name}-s{seed}-a", "role": "best"}}


def family(mask, restart, parent=200, seed=0, **others):
    found = [
        result("full", "full", parent, seed, tokens=1000, start="none"),
        result("mask", "mask", mask, seed),
        result("restart", "full", restart, seed, fingerprint="b"),
        # No controls: trained for longer, from another start, not at all, or after a learned mask.
        result("twice as long", "full", 399, seed, tokens=4000, fingerprint="c"),
        result("elsewhere", "full", 398, seed, start="other", fingerprint="d"),
        result("random mask", "random_mask", 397, seed, tokens=1000),
        result("other mask", "mask", 396, seed),
    ]
    return found + [result(name, "full", right, seed, fingerprint=name) for name, right in others.items()]


def compared(results, baseline="full", **settings):
    return compare(results, baseline, settings=Settings(**{"num_resamples": 1000} | settings))


@pytest.mark.parametrize(
    ("mask", "restart", "conclusion"),
    [
        (260, 320, "the mask improves the model it starts from; restart improves it more"),
        (260, 230, "the mask improves the model it starts from, and more than restart does"),
        (260, 262, "the mask improves the model it starts from, not distinguishably from restart"),
        (202, 260, "no improvement of the model it starts from is shown; restart is ahead of the mask"),
        (202, 150, "no improvement of the model it starts from is shown; restart is behind the mask"),
        (202, 201, "no improvement is shown over the model it starts from, nor over restart"),
        (150, 100, "the mask makes the model it starts from worse; restart makes it worse still"),
        (150, 260, "the mask makes the model it starts from worse; restart is ahead of the mask"),
    ],
)
def test_a_verdict_is_against_the_parent_and_the_strongest_control(mask, restart, conclusion):
    first, second = compared(family(mask, restart)).verdicts
    assert (first.parent.method, first.parent.baseline, first.control.baseline) == ("mask", "full", "restart")
    assert first.text.startswith(f"{conclusion}. mask, accuracy on sums: ")
    assert "against restart (equal tokens)" in first.text
    assert second.parent.method == "other mask"


def test_the_strongest_of_several_controls_is_named_with_holm_over_those_of_all_masks():
    (first, _) = compared(family(260, 230, refit=300, annealed=280)).verdicts
    assert (first.control.baseline, first.control.num_comparisons) == ("refit", 2 * 3)
    assert first.control.verdict == "worse" and "refit improves it more" in first.text


def test_more_pairs_with_controls_than_resamples_allow_are_judged_with_those_there_are(monkeypatch):
    """4 masks with 3 controls each are 12 pairs, for 10 differences of the table."""
    for module in ("comparison", "verdict"):
        monkeypatch.setattr(f"maskft_lab.results.{module}.MAX_RESAMPLES", 900)
    masks = [result("third mask", "mask", 310), result("fourth mask", "mask", 305)]
    results = [*family(260, 230, refit=300, annealed=280), *masks]
    comparison = compared(results, num_resamples=900)
    assert comparison.num_resamples == 900
    first = comparison.verdicts[0]
    assert first.control.num_comparisons == 12


def test_the_parent_is_found_where_the_baseline_is_another():
    results = [result("pre-trained", "pretrained", 20, fingerprint="p", start="none"), *family(260, 320)]
    (first, _) = compared(results, "pre-trained").verdicts
    assert (first.parent.baseline, first.parent.difference) == ("full", pytest.approx(60 / NUM_ITEMS))
    assert first.parent.num_comparisons == 2, "both masks"
    (first, _) = compared(results, "mask").verdicts  # the baseline itself is the mask
    assert (first.parent.baseline, first.parent.method) == ("full", "mask")


@pytest.mark.parametrize("mask", [150, 209, 260])
def test_a_verdict_agrees_with_the_table_whichever_of_the_two_is_the_baseline(mask):
    """The table corrects for all its rows: 209 of 400 against 200 is no claim beside them."""
    said = []
    for baseline in ("full", "mask"):
        comparison = compared(family(mask, 230), baseline)
        parent = comparison.verdicts[0].parent
        assert (parent.method, parent.baseline, parent.value) == ("mask", "full", mask / NUM_ITEMS)
        other = "mask" if baseline == "full" else "full"
        (row,) = (row for row in comparison.differences if row.method == other)
        sign = 1 if baseline == "full" else -1
        assert parent.difference == sign * row.difference and parent.p_adjusted == row.p_adjusted
        assert sorted((parent.ci_low, parent.ci_high)) == sorted((sign * row.ci_low, sign * row.ci_high))
        assert (parent.won, parent.lost)[::sign] == (row.won, row.lost)
        said.append(parent.verdict)
    assert said[0] == said[1]


def test_no_model_is_called_the_parent_that_is_known_to_be_another():
    results = [result("lora", "lora", 150, start="none") | {}, result("mask", "mask", 260)]
    results[0]["model"]["adapter"] = "l"
    assert compared(results, "lora").verdicts == []
    assert compared([result("base", "pretrained", 20, fingerprint="p"), results[1]], "base").verdicts == []
    for each in results:
        each["model"] |= {"fingerprint": None, "adapter": "a" if each["name"] == "mask" else None}
    assert len(compared(results, "lora").verdicts) == 1, "nothing speaks against it"


def test_a_verdict_speaks_of_the_test_and_not_of_a_probe():
    results = family(260, 320)
    for each in results:
        each["tasks"] = {"before: sums": each["tasks"]["sums"], "code": result("x", "full", 100)["tasks"]["sums"]}
        rename(each["tasks"]["code"], "pass_at_1")
    assert " pass_at_1 on code" in compared(results).verdicts[0].text


def rename(task, metric):
    task["metrics"] = {metric: task["metrics"]["accuracy"]}
    task["items"] = [item | {metric: item["accuracy"]} for item in task["items"]]


def test_accuracies_of_zero_leave_their_place_to_the_loss():
    results = [result("full", "full", 0), result("mask", "mask", 0)]
    for each in results:
        for item in (task := each["tasks"]["sums"])["items"]:
            item |= {"nll": 2.0 - 0.5 * (each["name"] == "mask") + int(item["id"]) / 1000, "num_tokens": 1}
        task["metrics"]["nll"] = metric_from_items(task["items"], "nll")
    page = render(compared(results), "terminal")
    assert "nll on sums" in page and page.splitlines()[-1].startswith("1 more difference: ")


def with_losses(results, **losses):
    """Results with a loss per item, lower by so much for models of these names."""
    for each in results:
        task = each["tasks"]["sums"]
        for item in task["items"]:
            item |= {"nll": 2.0 + int(item["id"]) / 1000 - losses.get(each["name"], 0.0), "num_tokens": 1}
        task["metrics"]["nll"] = metric_from_items(task["items"], "nll")
    return results


@pytest.mark.parametrize(
    ("right", "others", "reason"),
    [
        (0, 4, "by nll: accuracy is 0.0 % of both"),  # six of seven models have nothing right
        (NUM_ITEMS, 10, "by nll: accuracy is 100.0 % of both"),
        (200, 202, "by nll: accuracy is the same on all 400 items"),
    ],
)
def test_the_loss_decides_where_accuracy_cannot(right, others, reason):
    """The headline said "no improvement" above a table that said "better"."""
    results = [result("full", "full", right), result("mask", "mask", right)]
    results += [result("random mask", "random_mask", others), result("restart", "full", others, fingerprint="b")]
    (verdict,) = compared(with_losses(results, mask=0.5, restart=0.2)).verdicts
    said = f"the mask improves the model it starts from, and more than restart does ({reason}). mask, nll on sums: "
    assert verdict.text.startswith(said)
    assert (verdict.parent.metric, verdict.control.metric) == ("nll", "nll")
    page = render(compared(results), "terminal")
    assert "nll on sums" in page and "-0.5000 [-0.5000, -0.5000]" in page
    # What accuracy can tell it tells, and without a loss nothing else can.
    results = [result("full", "full", right), result("mask", "mask", right + 20 if right < 380 else right - 40)]
    assert compared(with_losses(results, mask=0.5)).verdicts[0].parent.metric == "accuracy"
    assert compared([result("full", "full", 0), result("mask", "mask", 0)]).verdicts[0].parent.metric == "accuracy"


@pytest.mark.parametrize("right", [0, 200])
def test_a_control_that_is_ahead_in_accuracy_is_not_hidden_by_the_loss(right):
    """It was "the mask improves the model it starts from, and more than restart does", which has 300 of 400 right."""
    results = [result("full", "full", right), result("mask", "mask", right)]
    results += [result("restart", "full", 300, fingerprint="b")]
    (verdict,) = compared(with_losses(results, mask=0.5, restart=0.2)).verdicts
    said, _, numbers = verdict.text.partition(". mask, nll on sums: ")
    assert said.startswith("the mask improves the model it starts from (by nll: accuracy is ")
    assert said.endswith("); restart is ahead of the mask in accuracy")
    behind = f"{(right - 300) / 4:.1f}"
    assert numbers.startswith("-0.5000 nats/token [-0.5000, -0.5000] against full, better; accuracy " + behind)
    assert numbers.endswith("against restart (equal tokens), worse.")
    assert reworded(verdict) == verdict.text


def test_a_control_of_fewer_seeds_is_said_to_be():
    """Its other runs failed: what a pair of models shows was said of three seeds."""
    results = []
    for seed in (0, 1, 2):
        results += [result("full", "full", 200, seed, tokens=1000, start="none"), result("mask", "mask", 300, seed)]
    results += [result("restart", "full", 270, 0, fingerprint="b")]
    results += [result("pre-trained", "pretrained", 20, fingerprint="p", start="none")]
    comparison = compared(results, "pre-trained")
    (verdict,) = comparison.verdicts
    assert (verdict.parent.num_seeds, verdict.control.num_seeds) == (3, 1)
    assert verdict.text.startswith("the mask improves the model it starts from, and more than restart (1 seed) does. ")
    assert reworded(verdict) == verdict.text
    assert "accuracy on sums (%), 400 items, 1 to 3 seeds" in render(comparison, "terminal")


def test_a_metric_without_items_decides_nothing():
    """As in a file from which someone removed the losses of the items."""
    results = with_losses([result("full", "full", 0), result("mask", "mask", 0), result("lora", "lora", 4)], mask=0.5)
    for item in results[1]["tasks"]["sums"]["items"]:
        del item["nll"]
    comparison = compared(results)
    assert comparison.verdicts[0].parent.metric == "accuracy"
    assert "nll on sums leaves out 'mask', without it" in comparison.notes


def test_a_page_shows_the_loss_that_is_better():
    """It was "1 more difference (1 better or worse): --format markdown"."""
    page = render(
        compared(with_losses([result("full", "full", 200), result("mask", "mask", 202)], mask=0.5)), "terminal"
    )
    assert "accuracy on sums" in page and "-0.5000 [-0.5000, -0.5000]" in page
    assert "more difference" not in page


def test_a_control_without_the_loss_keeps_the_verdict_on_accuracy():
    """Without it the verdict would say that no control is known."""
    results = [result("full", "full", 0), result("mask", "mask", 0)]
    results += [result("restart", "full", 0, fingerprint="b"), result("longer", "full", 4, fingerprint="c")]
    with_losses(results, mask=0.5)
    task = next(each for each in results if each["name"] == "restart")["tasks"]["sums"]
    del task["metrics"]["nll"]
    for item in task["items"]:
        del item["nll"]
    (verdict,) = compared(results).verdicts
    assert verdict.parent.metric == "accuracy" and verdict.control.baseline == "longer"
    assert compared([each for each in results if each["name"] != "restart"]).verdicts[0].parent.metric == "nll"


def test_a_published_verdict_is_reworded_and_keeps_numbers_doubts_and_reasons():
    results = [*family(300, 320), *family(190, 320, seed=1)]
    silent = with_losses([result("full", "full", 0), result("mask", "mask", 0)], mask=0.5)
    for verdict in [*compared(results, fixed_seeds=True).verdicts, *compared(silent).verdicts]:
        assert reworded(verdict) == verdict.text
        conclusion = verdict.text.partition(". ")[0].split("; the mask")[-1].partition(" (by ")[0]
        earlier = replace(verdict, text=verdict.text.replace(conclusion, "earlier words"))
        assert reworded(earlier) == verdict.text


def test_texts_of_a_strangers_comparison_are_printable():
    """Of a summary that was prepared: they go to a terminal and into a page."""
    record = json.loads(render(compared(family(260, 320)), "json"))
    record["verdicts"][0]["text"] = "better\x1b[2J\u202e<b>"
    record["notes"] = ["\x07"]
    comparison = Comparison.from_dict(record)
    assert comparison.verdicts[0].text == r"better\x1b[2J\u202e<b>" and comparison.notes == [r"\x07"]


def test_without_a_control_that_is_said():
    (verdict,) = compared([each for each in family(260, 0) if each["name"] in ("full", "mask", "elsewhere")]).verdicts
    assert verdict.control is None
    assert verdict.text.startswith("the mask improves the model it starts from; no control with equal tokens is")


def test_what_is_trained_from_the_same_pretrained_model_is_a_control():
    """Such runs start from no other run."""
    results = [result("base", "pretrained", 20, tokens=0), result("mask", "mask", 300)]
    results += [
        result("lora", "lora", 360, fingerprint="l"),
        result("longer", "full", 390, fingerprint="d", tokens=4000),
    ]
    results = [each | {"study": each["study"] | {"start": None, "model": "m"}} for each in results]
    (verdict,) = compared(results, "base").verdicts
    assert verdict.text.startswith("the mask improves the model it starts from; lora improves it more. ")
    results[2]["study"]["model"] = "hub/m"  # a local copy is named by its folder
    assert compared(results, "base").verdicts[0].control.baseline == "lora"
    results[1]["study"]["model"] = "another/m"
    assert compared(results, "base").verdicts[0].control is None
    results[1]["study"]["model"] = "m"
    results[2]["study"]["model"] = "another"
    assert compared(results, "base").verdicts[0].control is None
    for each in results:  # evaluated outside of a study: where it starts is not known
        del each["study"]
    assert compared(results, "base").verdicts[0].control is None


def test_a_control_whose_start_was_renamed_is_still_one():
    """The method in ``from`` got another name after the mask was trained: the run, and its hash, are the same."""
    results = [each for each in family(260, 320) if each["name"] in ("full", "mask", "restart", "elsewhere")]
    starts = ("none", "full-s0-0123456789", "tuned_full-s0-0123456789", "full-s0-9876543210")
    for each, start in zip(results, starts, strict=True):
        each["study"]["start"] = start
    (verdict,) = compared(results).verdicts
    assert verdict.control.baseline == "restart" and verdict.control.num_comparisons == 1
    # The hash is of the base model as well, whatever its folder is called.
    results[2]["study"]["model"] = "a copy"
    assert compared(results).verdicts[0].control.baseline == "restart"


def test_seeds_that_contradict_a_verdict_are_said_first():
    results = [*family(300, 320), *family(190, 320, seed=1)]
    first = compared(results, fixed_seeds=True).verdicts[0]
    assert first.parent.verdict == "better"
    assert first.text.startswith("seeds differ in sign against full (+25.0, -2.5); the mask improves")


def test_items_that_cancel_each_other_have_no_sign():
    """Shares of three samples leave some 1e-18 there, and the verdict began with "seeds differ in sign"."""
    shares = [1 / 3, 2 / 3, 1.0, 0.0, 2 / 3, 1 / 3, 1 / 3] * 8
    # The same shares on other items: a difference of -2e-18 on this processor.
    shuffled = np.random.default_rng(4).permutation(shares).tolist()
    results = []
    for seed in (0, 1):
        full = result("full", "full", 0, seed, tokens=1000, start="none")
        mask = result("mask", "mask", 0, seed)
        of_mask = shuffled if seed == 0 else [0.5 + share / 2 for share in shares]
        for each, values in ((full, shares), (mask, of_mask)):
            task = each["tasks"]["sums"]
            del task["items"][len(shares) :]
            for item, value in zip(task["items"], values, strict=True):
                item["accuracy"] = value
            task["metrics"]["accuracy"] = metric_from_items(task["items"], "accuracy")
        results += [full, mask]
    comparison = compared(results, fixed_seeds=True)
    (row,) = comparison.differences
    assert row.verdict == "better"
    assert row.by_seed == pytest.approx([0, (1 - sum(shares) / len(shares)) / 2])
    assert comparison.verdicts[0].text.startswith("the mask improves the model")


def test_a_comparison_is_read_as_it_was_written():
    comparison = compared(family(260, 320))
    record = json.loads(render(comparison, "json"))
    assert Comparison.from_dict(record) == comparison
    with pytest.raises(UserError, match="schema version 1, this maskft reads 2: run maskft study again"):
        Comparison.from_dict(record | {"schema_version": 1})
    with pytest.raises(ValueError, match="baseline"):
        Comparison.from_dict({"schema_version": 2, "differences": [], "scores": []})
    row = record["differences"][0]
    # What a reader of the JSON takes is the interval on the page.
    assert f"[{100 * row['ci_low']:.1f}, {100 * row['ci_high']:.1f}]" in render(comparison, "markdown").split("\n- ")[0]
    assert row["ci_low"] < row["unadjusted_low"] < row["unadjusted_high"] < row["ci_high"]


@pytest.mark.parametrize("num_more", [0, 3, 20])
def test_the_end_of_a_study_is_one_table_of_25_lines_with_masks_first(num_more, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    more = {f"another control with a long name, {n}": 210 + n for n in range(num_more)}
    results = [each for seed in (0, 1, 2) for each in family(260 + 9 * seed, 320, seed=seed, **more)]
    comparison = compare(results, "full", settings=Settings(2400))
    lines = render(comparison, "terminal").splitlines()
    assert len(lines) <= 25 and max(map(len, lines)) <= 80
    assert [line.split("  ")[1].strip() for line in lines[3:6]] == ["mask", "other mask", "restart"]
    assert lines[2] == "accuracy on sums (%), 400 items, 3 seeds"
    assert " ".join(lines).count("Verdict: ") == 1 and lines[-1].endswith("--format markdown, or a study's table.")
    assert ("more differences" in lines[-1]) is (num_more == 20)
    assert all(sentence(row) in render(comparison, "markdown") for row in comparison.differences)


def test_one_trained_result_does_not_stand_beside_several_seeds():
    """Its own seed would count as no noise: of equal methods 10 % would be told apart with 3 seeds, 24 % with 6."""
    masks = [result("mask", "mask", 250 + seed, seed) for seed in (1, 2, 3)]
    alone = result("lora", "lora", 200, 7, fingerprint="l")
    for results in ([alone, *masks], [*masks, alone]):
        with pytest.raises(UserError, match=r"'lora' seed 7 is one result beside 3 seeds of 'mask'.*--fixed_seeds"):
            compared(results, results[0]["name"])
        assert compared(results, results[0]["name"], fixed_seeds=True).differences[0].num_seeds == 3
    own = result("lora", "lora", 200, 2, fingerprint="l")
    comparison = compared([own, *masks], "lora")
    assert comparison.differences[0].num_seeds == 1 and "at seed 2 only" in comparison.notes[0]
    assert compared([own, *masks], "lora", fixed_seeds=True).differences[0].num_seeds == 3
    # A pre-trained model has no seed, and the parent of all masks is what they are meant to improve.
    for single in (
        result("pre-trained", "pretrained", 200, 0, fingerprint="p"),
        result("full", "full", 200, 9) | {"model": masks[0]["model"] | {"method": "full", "adapter": None, "seed": 9}},
    ):
        of_one = [each | {"model": each["model"] | {"fingerprint": masks[0]["model"]["fingerprint"]}} for each in masks]
        assert compared([single, *of_one], single["name"]).differences[0].num_seeds == 3


def test_two_seeds_make_no_claim_and_no_interval_is_impossible():
    results = [
        result(name, "full", right, seed, fingerprint=name)
        for seed, (a, b) in enumerate([(390, 10), (200, 150)])
        for name, right in (("a", a), ("b", b))
    ]
    comparison = compared(results, "a")
    (row,) = comparison.differences
    assert row.ci_low == row.unadjusted_low == -1.0 and row.ci_high <= 1.0
    assert "not distinguishable; two seeds: no claim over seeds" in sentence(row)
    assert "Two seeds: 'not distinguishable' supports no claim over seeds." in render(comparison, "terminal")


def test_a_test_set_is_called_by_its_file():
    """And not "heldout", beside held-out rows that choose checkpoints."""
    results = family(260, 320)
    for each in results:
        each["tasks"]["heldout"] = each["tasks"].pop("sums") | {"data_file": "products_test.jsonl"}
    comparison = compared(results)
    assert {row.task for row in comparison.differences} == {"heldout"}
    for form in ("terminal", "markdown"):
        text = render(comparison, form)
        assert "accuracy on products_test.jsonl" in text and "heldout" not in text
