"""A mask that is not better than no mask removes nothing."""

import numpy as np
import pytest
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskft.data.arguments import DataArguments
from maskft.data.splits import load_splits
from maskft.data.tokenizing import tokenize_dataset
from maskft.loss import nll_per_item
from maskft.masks.mask_set import MaskSet, read_config
from maskft.masks.verify import verify
from maskft.training.record import read_record
from maskft.training.verdict import HeldoutLosses, Verdict, paired_interval, read_heldout
from maskft_common.errors import UserError
from maskft_lab.cli.main import main
from maskft_lab.results.statistics import Bootstrap, as_block
from tiny_tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def fine_tuned(base, data, tmp_path_factory):
    """A model that nine weights of ten cannot be taken from without loss."""
    out = tmp_path_factory.mktemp("tuned") / "tuned"
    words = {"method": "full", "model_name_or_path": base, "dataset_name": data, "output_dir": out, "max_steps": 40}
    words |= {"learning_rate": 1e-2, "eval_split_size": 16, "per_device_train_batch_size": 4, "bf16": False}
    assert main(["train", *(str(word) for key, value in words.items() for word in (f"--{key}", value))]) == 0
    return out


def losses_of(base, data, adapter=None):
    """Ids and losses of the held-out rows, measured anew."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    rows = load_splits(DataArguments(dataset_name=str(data), eval_split_size=16), 0, tokenizer).heldout
    rows = tokenize_dataset(rows, tokenizer)
    pairs = nll_per_item(model, [{"input_ids": r["input_ids"], "labels": r["labels"]} for r in rows])
    return [str(row_id) for row_id in rows["id"]], [nll for nll, _ in pairs], [count for _, count in pairs]


def test_a_mask_that_hurts_removes_nothing(call, fine_tuned, data, tmp_path):
    status, err = call(model_name_or_path=fine_tuned, mask_sparsity=0.9, mask_init_scores="normal", learning_rate=1e-4)
    assert status == 0 and "the mask is worse than no mask: +" in err
    assert (
        "an adapter that removes nothing. The mask is in" in err
        and "--keep_worse true: nothing is trained again" in err
    )
    out = tmp_path / "out"
    verdict = read_record(out).verdict
    assert not verdict.is_better and not verdict.kept and verdict.num_rows == 16 and verdict.difference > 0
    masks = MaskSet.from_adapter(out)
    assert len(masks) == 21 and masks.num_removed == 0 and verify(out, str(fine_tuned))
    recipe = read_config(out).recipe
    assert recipe["mask_sparsity"] == 0.9 and "so this adapter removes nothing" in recipe["verdict"]
    assert losses_of(fine_tuned, data, out) == losses_of(fine_tuned, data)


def test_losses_row_by_row_are_those_of_what_is_saved_and_of_its_parent(call, fine_tuned, data, tmp_path):
    status, err = call(model_name_or_path=fine_tuned, mask_sparsity=0.9, learning_rate=1e-4, keep_worse=True)
    assert status == 0 and "no mask: +" in err and "anyway" in err
    out = tmp_path / "out"
    found, verdict = read_heldout(out), read_record(out).verdict
    for nll, adapter in ((found.nll, out), (found.parent_nll, None)):
        ids, expected, counts = losses_of(fine_tuned, data, adapter)
        assert (found.ids, found.num_tokens) == (ids, counts)
        assert nll == pytest.approx(expected, abs=1e-5)
    total = sum(found.num_tokens)
    difference = sum(t * (a - b) for t, a, b in zip(found.num_tokens, found.nll, found.parent_nll, strict=True)) / total
    assert verdict.kept and verdict.difference == pytest.approx(difference)
    assert verdict.ci_low < difference < verdict.ci_high and MaskSet.from_adapter(out).sparsity > 0.89


def test_a_mask_that_helps_is_kept(call, tmp_path):
    status, err = call(max_steps=30, eval_steps=15, save_steps=15, learning_rate=0.02, mask_sparsity=0.3)
    assert status == 0 and "the mask is better than no mask: -" in err and "The same rows chose the checkpoint" in err
    verdict = read_record(tmp_path / "out").verdict
    assert verdict.is_better and verdict.kept and verdict.ci_high < 0
    assert MaskSet.from_adapter(tmp_path / "out").sparsity == pytest.approx(0.3, abs=1e-3)


def test_a_worse_mask_is_saved_without_training_again(call, fine_tuned, tmp_path):
    """By the command that a run prints whose mask is not better than no mask."""
    options = {"model_name_or_path": fine_tuned, "mask_sparsity": 0.9, "learning_rate": 1e-4}
    assert call(**options)[0] == 0 and MaskSet.from_adapter(tmp_path / "out").num_removed == 0
    status, err = call(**options, resume_from_checkpoint=True, keep_worse=True)
    assert status == 0 and "already finished" in err and "anyway" in err, err
    assert MaskSet.from_adapter(tmp_path / "out").sparsity == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("method", ["full", "peft", "random_mask"])
def test_other_methods_are_kept_as_they_are(method, call, tmp_path):
    options = {"full": {}, "peft": {"peft_config": '{"peft_type": "LORA"}'}, "random_mask": {"mask_sparsity": 0.5}}
    assert call(method=method, **options[method])[0] == 0
    found, verdict = read_heldout(tmp_path / "out"), read_record(tmp_path / "out").verdict
    assert len(found.nll) == 16 and (found.parent_nll is None) == (method == "full")
    assert (verdict is None) == (method != "random_mask") and (verdict is None or verdict.kept)
    if method == "random_mask":
        assert MaskSet.from_adapter(tmp_path / "out").sparsity == pytest.approx(0.5)


def test_settings_of_the_learner_do_not_stay_in_an_adapter_that_removes_nothing(call, base, fine_tuned, data, tmp_path):
    """Else it could not be loaded: a threshold removes what it removes, a preset says its own sparsity."""
    learners = {
        "threshold": {"mask_selection": "threshold", "mask_threshold": 0.03, "mask_modules_to_save": "lm_head"},
        "preset": {"mask_preset": "paper"},
        "deletion": {"mask_preset": "deletion_tuning", "mask_init_scores": "wanda", "num_calibration_samples": 4},
        "gates": {"mask_selection": "hard_concrete", "mask_init_value": 0.01, "mask_price": 1.0},
        "values": {"mask_removed_value": "base", "mask_removed_value_model": base, "mask_sparsity_ramp": 0.5},
    }
    for name, options in learners.items():
        changes = {"learning_rate": 0.0, **options}
        assert call(name, model_name_or_path=fine_tuned, **changes)[0] == 0
        assert MaskSet.from_adapter(tmp_path / name).num_removed == 0 and verify(tmp_path / name, str(fine_tuned))
        assert losses_of(fine_tuned, data, tmp_path / name) == losses_of(fine_tuned, data)


# The interval


def test_the_interval_is_that_of_maskft_compare():
    """Two implementations, as training imports nothing of the lab: the same draws and the same width."""
    rng = np.random.default_rng(0)
    for count in (2, 5, 300):
        parent, tokens = rng.normal(2.0, 0.3, count), rng.integers(1, 9, count).tolist()
        nll = parent + rng.normal(-0.02, 0.05, count)
        ids = [str(n) for n in range(count)]
        losses = HeldoutLosses(ids=ids, num_tokens=tokens, nll=[*nll], parent_nll=[*parent])
        drawn = Bootstrap(as_block([nll - parent], tokens), 10_000, 0)
        assert paired_interval(losses) == pytest.approx((drawn.difference, *drawn.interval()), abs=1e-5)


def test_rows_that_depend_on_each_other_count_as_one():
    """As in `maskft compare`: questions on one passage are not as many independent ones."""
    rng = np.random.default_rng(0)
    labels = [f"passage {n // 10}" for n in range(200)]
    parent = rng.normal(2.0, 0.3, 200)
    nll = parent + np.repeat(rng.normal(-0.02, 0.05, 20), 10)
    same = {"ids": [str(n) for n in range(200)], "num_tokens": [1] * 200, "nll": [*nll], "parent_nll": [*parent]}
    alone = paired_interval(HeldoutLosses(**same))
    clustered = paired_interval(HeldoutLosses(**same, clusters=labels))
    assert clustered[0] == pytest.approx(alone[0]) and clustered[2] - clustered[1] > 2 * (alone[2] - alone[1])
    rows = Dataset.from_list(
        [{"id": str(n), "text": "a b", "cluster_id": label} for n, label in enumerate(("x", None))]
    )
    with pytest.raises(UserError, match="row 1 has no cluster_id, and others have one"):
        tokenize_dataset(rows, tiny_tokenizer())
    assert tokenize_dataset(rows.select([0]), tiny_tokenizer())["cluster_id"][:] == ["x"]


def test_no_bound_is_rounded_to_zero():
    """It said "[-0.0001, -0.0000]" beside "better", which is the whole interval below zero."""
    verdict = Verdict(difference=-7e-5, ci_low=-1e-4, ci_high=-2e-5, num_rows=9, is_better=True, kept=True)
    assert "-0.00007 nats/token, 95 % [-0.00010, -0.00002]" in str(verdict)
    usual = verdict.model_copy(update={"difference": -0.1368, "ci_low": -0.164, "ci_high": -0.1108})
    assert "-0.1368 nats/token, 95 % [-0.1640, -0.1108]" in str(usual)
