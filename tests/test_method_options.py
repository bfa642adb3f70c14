"""Options that a method does not use are shown by no record, card or report."""

import json
import os

import pytest
from accelerate.commands.launch import launch_command_parser
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from maskft.training.launch import launch_options
from maskft.training.options import make_parser, option_defaults, option_hints, parse_words
from maskft_common import method_options
from maskft_common.errors import UserError
from maskft_common.method_options import unused_options
from maskft_common.value_check import fits, in_words

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


def test_every_default_fits_the_annotation_of_its_option():
    """Else a recipe with the default written out, as a model card has it, would be refused."""
    hints = option_hints()
    defaults = {name: value for name, value in option_defaults().items() if value is not None}
    # Enums are text, and an empty text or list is the default of options that a recipe leaves out.
    values = {name: getattr(value, "value", value) for name, value in defaults.items() if value not in ("", [])}
    assert not [name for name, value in values.items() if not fits(value, hints[name])]
    assert [name for name, hint in hints.items() if "left out" in in_words(hint)] == ["parallelism_config"]


def test_a_recipe_is_read_once_by_our_reader(tmp_path, monkeypatch):
    """TRL's reader made a date of a revision, seconds of 12:30 and text of 1e-6; its `env` is taken as there."""
    monkeypatch.delenv("OF_THE_RECIPE", raising=False)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model_name_or_path: tiny\nmodel_revision: 2026-11-26\nrun_name: 12:30\nmax_steps: '8'\n"
        "optim_args: 1:30\nlr_scheduler_kwargs: {min_lr: 1e-6}\nenv: {OF_THE_RECIPE: 5}\nnum_processes: 2\n"
    )
    try:
        config, launch_words, other_words = parse_words(["--config", str(recipe), "--max_steps", "9"])
        assert os.environ["OF_THE_RECIPE"] == "5"
    finally:
        os.environ.pop("OF_THE_RECIPE", None)
    training = config.training
    assert (config.model.model_revision, training.run_name, training.optim_args) == ("2026-11-26", "12:30", "1:30")
    assert (training.lr_scheduler_kwargs, training.max_steps) == ({"min_lr": 1e-6}, 9)
    assert launch_words == ["--num_processes", "2"]
    assert other_words == ["--config", str(recipe), "--max_steps", "9"]


def test_what_one_run_is_given_is_not_the_next_ones(tmp_path):
    """Runs without a recipe share a parser; a recipe changes the defaults of its own."""
    words = ["--model_name_or_path", "tiny", "--dataset_name", "rows"]
    (tmp_path / "recipe.yaml").write_text("learning_rate: 0.5\nmask_target_modules: [q_proj]\n")
    before, *_ = parse_words(words)
    parse_words([*words, "--learning_rate", "0.25", "--mask_target_modules", "k_proj", "--seed", "3"])
    given, *_ = parse_words([*words, "--config", str(tmp_path / "recipe.yaml")])
    assert (given.training.learning_rate, given.mask.mask_target_modules) == (0.5, ["q_proj"])
    after, *_ = parse_words(words)
    assert after.training.to_dict() == before.training.to_dict() and after.mask == before.mask


def test_what_the_parser_takes_is_taken_in_a_recipe_too(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model_name_or_path: tiny\nmax_length: None\nlearning_rate: 'null'\nbf16: 0\npush_to_hub: 'no'\n"
        "eval_strategy: no\nsave_strategy: no\nlogging_strategy: no\neval_steps: -1\nsave_steps: -1\n"
        "lr_scheduler_kwargs: '{\"num_cycles\": 2}'\nweight_decay: 1\nenv: {OF_THE_RECIPE: ''}\n"
    )
    try:
        config, *_ = parse_words(["--config", str(recipe)])
        assert os.environ["OF_THE_RECIPE"] == ""
    finally:
        os.environ.pop("OF_THE_RECIPE", None)
    training = config.training
    assert (training.max_length, training.bf16, training.push_to_hub, training.weight_decay) == (None, False, False, 1)


@pytest.mark.slow
def test_no_value_of_any_option_ends_in_a_traceback(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    odd = [None, [], [[1]], {"a": None}, " ", -1, 2.5, False, float("inf"), [1, "x"], 2**62, "5", "x"]
    for name in sorted({*option_hints(), *launch_options()}):
        for value in odd:
            # JSON is YAML, but for infinity and NaN.
            text = json.dumps({"model_name_or_path": "tiny"} | {name: value})
            recipe.write_text(text.replace("Infinity", ".inf").replace("NaN", ".nan"))
            try:
                parse_words(["--config", str(recipe)])
            except UserError as error:
                assert "\n" not in str(error), (name, value)
