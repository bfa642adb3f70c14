"""Options that a method does not use are shown by no record, card or report."""

import pytest
from accelerate.commands.launch import launch_command_parser
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from maskft.training.options import make_parser, option_defaults, parse_words
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


def test_no_is_a_value_where_an_option_has_it(tmp_path):
    """YAML reads a plain ``no`` as false: ``eval_strategy: no`` was refused, which only quotes mended."""
    with_no = set()
    for parser in (make_parser(), launch_command_parser()):
        with_no |= {action.dest for action in parser._actions if "no" in (action.choices or ())}
    # These two are text for argparse: transformers checks them.
    for name, strategy in (("eval_strategy", IntervalStrategy), ("save_strategy", SaveStrategy)):
        assert "no" in list(strategy) and option_defaults()[name] == "steps"
        with_no.add(name)
    assert with_no == method_options.TAKE_NO

    recipe = tmp_path / "recipe.yaml"
    run = "model_name_or_path: tiny\ndataset_name: rows\nbf16: no\n"
    recipe.write_text(run + "".join(f"{name}: no\n" for name in sorted(method_options.TAKE_NO)))
    config, launch_words, _ = parse_words(["--config", str(recipe)])
    training = config.training
    assert (training.eval_strategy, training.save_strategy, training.logging_strategy) == ("no", "no", "no")
    assert (training.bf16, training.load_best_model_at_end, training.eval_on_start) == (False, False, False)
    assert launch_words == ["--dynamo_backend", "no", "--mixed_precision", "no"]


def test_the_names_are_options_of_train():
    names = method_options.LEARNER_OPTIONS | method_options._TRAINING_OPTIONS | {method_options._RAMP}
    assert names <= option_defaults().keys()
