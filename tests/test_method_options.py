"""Options that a method does not use are shown by no record, card or report."""

import pytest

from maskft.training.options import option_defaults
from maskft_common import method_options
from maskft_common.method_options import unused_options

_ALL = ("learning_rate", "mask_init_scores", "mask_sparsity", "mask_seed", "num_calibration_samples", "max_length")


@pytest.mark.parametrize(
    ("method", "is_trained", "is_matched", "used"),
    [
        ("mask", True, False, "learning_rate mask_init_scores mask_sparsity mask_seed max_length"),
        ("random_mask", False, False, "mask_sparsity mask_seed max_length"),
        ("random_mask", False, True, "mask_seed max_length"),
        ("l1_mask", False, False, "mask_sparsity max_length"),
        ("wanda_mask", False, False, "mask_sparsity num_calibration_samples max_length"),
    ],
)
def test_what_a_method_uses(method, is_trained, is_matched, used):
    unused = unused_options(method, {}, is_trained=is_trained, is_matched=is_matched)
    assert [name for name in _ALL if name not in unused] == [name for name in _ALL if name in used.split()]


def test_rows_are_an_option_of_masks_that_start_on_them():
    for start, is_used in (("wanda", True), ("normal", False)):
        unused = unused_options("mask", {"mask_init_scores": start}, is_trained=True, is_matched=False)
        assert ("num_calibration_samples" not in unused) == is_used


def test_the_names_are_options_of_train():
    names = method_options.LEARNER_OPTIONS | method_options._TRAINING_OPTIONS | {method_options._RAMP}
    assert names <= option_defaults().keys()
