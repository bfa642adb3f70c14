"""Options of ``maskft train`` for one run of a study."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from maskft.training.arguments import TrainConfig
from maskft.training.launch import launch_options
from maskft.training.method_arguments import (
    MASK_METHODS,
    read_peft_config,
    removes_a_share,
)
from maskft.training.options import option_defaults, parse_words
from maskft_common.errors import UserError, did_you_mean
from maskft_common.method_options import KL_OPTIONS, LEARNER_OPTIONS

from .identity import plain, written_out
from .process import command_words
from .recipe import (
    CURRENT_RATE,
    PRETRAINED,
    REVISION,
    Method,
    Options,
    Recipe,
    as_text,
)
from .study_run import LAYERS, StudyRun

# Options that say which matrices are masked: a fixed mask takes them from the learned mask that it matches.
_PLACES = ("mask_layers_to_transform", "mask_layers_pattern", "mask_target_modules", "mask_exclude_modules")

# Options that the study itself sets. Those of models come from the keys of a method, such as `from`.
_OF_THE_STUDY = frozenset(
    {
        "method",
        "model_name_or_path",
        "output_dir",
        "resume_from_checkpoint",
        "match_adapter",
        "start_mask",
        "keep_mask",
        "before_model",
        "prepared_data_dir",
        "prepare_only",
        "keep_last",
        "seed",
    }
)


# Options that train over other weights than those that the model's name alone stands for.
_OF_OTHER_WEIGHTS = ("gguf_file", "load_in_4bit", "load_in_8bit")

# Options that differ in every run; their range is checked when the recipe is read.
SEEDS = ("seed", "mask_seed")


def run_options(
    recipe: Recipe,
    method: Method,
    axes: Mapping[tuple[str, str], Any],
    seed: int,
    match: StudyRun | None = None,
    chosen: Mapping[str, Any] = {},
) -> Options:
    """Options of a run: those of the study, the data, the method, the grid, the tuning. Later ones win.

    Args:
        recipe: The recipe.
        method: The method.
        axes: Grid values: (method, option) -> value.
        seed: Seed of the run.
        match: The run whose mask a fixed mask matches.
        chosen: Settings that tuning tries or has chosen.

    Raises:
        UserError: If an option is the study's to set, or contradicts the mask that is matched.
    """
    if method.method == PRETRAINED:  # nothing is trained
        return {}

    # The method's own options: of its line in the recipe, the grid, and tuning.
    of_grid = {}
    for (name, option), value in axes.items():
        if name == method.name:
            of_grid[option] = value
    # No key is in `chosen` and in one of the others: `Recipe` refuses a tuned option that the method
    # or the grid has too.
    own = as_text(method.options | of_grid | chosen)
    data_name = recipe.data_name(method)
    data = recipe.data[data_name].options
    _check_allowed(recipe, method, own | data)

    # Those of `train` for masks apply to masks alone, and those of the loss to methods that have one.
    is_mask = method.method in MASK_METHODS
    options = {}
    for key, value in recipe.train.items():
        is_for_others = key.startswith("mask_") and not is_mask
        if is_for_others or (key in KL_OPTIONS and not method.is_trained):
            continue
        options[key] = value

    # Those of the data, and the seeds.
    options |= data
    options["seed"] = seed
    if is_mask:
        options["mask_seed"] = seed

    options |= own
    if method.last:
        options["keep_last"] = True

    _check_steps(method, options)
    # null in a recipe takes an option of `train` back.
    given = {}
    for key, value in options.items():
        if value is not None:
            given[key] = plain(value)
    options = given

    if "peft_config" in options:
        # The content of a file is part of the run's name, not the file's name.
        options["peft_config"] = read_peft_config(options["peft_config"])

    num_candidates = options.get("num_candidates")
    draws_several = isinstance(num_candidates, int) and num_candidates > 1
    if draws_several and own.get("mask_seed") is None:
        # The candidates are mask_seed, mask_seed + 1, ...: with the plain seed, two runs would share nearly all.
        options["mask_seed"] = seed * num_candidates

    # One layer and a list of one layer are the same run.
    # A missing option counts as a list here, and stays missing.
    for key in LAYERS:
        layers = options.get(key, [])
        if not isinstance(layers, list):
            options[key] = [layers]

    if match is None:
        return options
    return _as_matched(options, own, method, match)


def _check_steps(method: Method, options: Options) -> None:
    """Check that no number of steps is 1.0: beside 0.5, half of a run, it looks like the whole, and is one step."""
    for name in ("eval_steps", "save_steps", "logging_steps", "warmup_steps"):
        value = options.get(name)
        # YAML keeps 1.0 apart from 1.
        if isinstance(value, float) and value == 1:
            raise UserError(
                f"method {method.name!r}: {name} is 1.0, which is one step and not the whole run; "
                "write 1, or the number of all steps"
            )


def _check_allowed(
    recipe: Recipe,
    method: Method,
    own: Options,
) -> None:
    """Raise for an option that the study decides.

    Args:
        recipe: The recipe, whose ``train`` is checked.
        method: The method.
        own: Options of the method, its grid, its tuning and its data.
    """
    # Evaluations, and the names of runs, know the recipe's model as it is stored and nothing else.
    both = recipe.train | own
    for key in _OF_OTHER_WEIGHTS:
        if both.get(key):
            raise UserError(
                f"method {method.name!r} sets {key}, and evaluations load the recipe's model as it is stored; as "
                "`model` name the GGUF file, or a checkpoint that is stored in four or eight bits"
            )

    # A mask_seed in `train` would have no effect: each run's own seed replaces it. A method may fix it on purpose.
    refused = recipe.train.keys() & (_OF_THE_STUDY | {"mask_seed"})
    # The revision is that of the study's model, one for all methods.
    refused |= own.keys() & (_OF_THE_STUDY | {REVISION})
    if refused:
        first = min(refused)  # by name, so that the message is the same each time
        raise UserError(
            f"method {method.name!r} sets {first}, which the study decides (by seeds, from, last or train); "
            "remove it from the method"
        )


def _as_matched(
    options: Options,
    own: Options,
    method: Method,
    match: StudyRun,
) -> Options:
    """Options of a fixed mask, which lies in the same matrices as the learned mask it matches."""
    # An error only for keys of the method itself, its grid and tuning: those of `train` are for all masks, and are
    # replaced below.
    of_match = written_out(match.method.method, match.options)  # a preset may say which matrices
    for key in _PLACES:
        if key in own and options.get(key) != of_match.get(key):
            raise UserError(
                f"method {method.name!r} has {key} {options.get(key)}, and the mask it matches, {match.title!r}, "
                f"has {of_match.get(key)}; leave it out"
            )

    matched = dict(options)
    for key in _PLACES:
        matched.pop(key, None)

    if not removes_a_share(matched):
        # It removes as many weights as its match; the learner that `train` gives all masks does not apply.
        for key in LEARNER_OPTIONS:
            if key not in own:
                matched.pop(key, None)

    for key in _PLACES:
        if key in of_match:
            matched[key] = of_match[key]
    return matched


def parsed_run(run: StudyRun) -> TrainConfig:
    """The configuration of a run, from its options and the defaults of ``maskft train``.

    Raises:
        UserError: For an option that ``maskft train`` does not know, or a wrong value.
    """
    options = {
        "method": run.method.method,
        "model_name_or_path": run.model,
        **run.options,
    }

    # Values that are known once the parent is trained; until then, place holders that parse.
    if options.get("learning_rate") == CURRENT_RATE:
        del options["learning_rate"]
    if run.takes_values_before:
        options["mask_removed_value_model"] = run.model

    # The parser would report unknown options too, but without the keys of a method among its suggestions.
    known = option_defaults().keys()
    of_launch = launch_options() - known
    for name in options:
        if name in of_launch:
            raise UserError(
                f"{name} is an option of accelerate launch; write launch: {{num_processes: 2}}, or launch: "
                "{accelerate_config: FILE} for its other options"
            )
        if name not in known:
            # It may also be a misspelt key of a method, such as `tune`.
            keys_of_methods = [field.alias or key for key, field in Method.model_fields.items()]
            hint = did_you_mean(name, [*keys_of_methods, *known])
            raise UserError(f"unknown key {name!r}{hint}; options are in maskft train --help")

    words = command_words(options)
    config, *_ = parse_words(words)
    return config


def options_but_seeds(run: StudyRun) -> str:
    """Method and options of a run, for runs that differ in their seeds alone; parsing them takes a while."""
    options = dict(run.options)
    for key in SEEDS:
        options.pop(key, None)
    return repr((run.method.name, options))


def tokens_of(
    recipe: Recipe,
    run: StudyRun,
    config: TrainConfig | None = None,
) -> int | None:
    """Tokens that a run trains on, without padding; None where the recipe does not say.

    Args:
        recipe: The recipe.
        run: The run.
        config: Its configuration, where it is parsed already.
    """
    if not run.method.is_trained:
        return 0

    data_name = recipe.data_name(run.method)
    data = recipe.data[data_name]
    if data.tokens_per_row is None:
        return None
    if config is None:
        config = parsed_run(run)
    num_rows = _num_rows(recipe, config, data.num_rows)
    if num_rows is None:
        return None
    max_length = config.training.max_length or math.inf  # longer rows are cut
    tokens_per_row = min(data.tokens_per_row, max_length)
    return round(num_rows * tokens_per_row)


def num_steps_of(
    recipe: Recipe,
    run: StudyRun,
    config: TrainConfig,
) -> int | None:
    """Optimizer steps of a run, at most; None where the recipe does not say."""
    training = config.training
    if training.max_steps > 0:
        return training.max_steps
    data = recipe.data[recipe.data_name(run.method)]
    num_rows = _num_rows(recipe, config, data.num_rows)
    if num_rows is None:
        return None
    # The last step of an epoch has what is left of the rows.
    num_epochs = math.ceil(training.num_train_epochs)
    return math.ceil(num_rows / _batch_size(recipe, config)) + num_epochs


def _batch_size(recipe: Recipe, config: TrainConfig) -> int:
    """Rows of an optimizer step, over all processes."""
    training = config.training
    num_processes = recipe.launch.num_processes or 1
    per_process = training.per_device_train_batch_size * training.gradient_accumulation_steps
    # global_batch_size counts all processes.
    return training.global_batch_size or per_process * num_processes


def _num_rows(
    recipe: Recipe,
    config: TrainConfig,
    num_rows: int | None,
) -> float | None:
    """Rows of all epochs or steps, from the number of rows in the data; None if the recipe says neither."""
    # max_steps decides the length where it is given.
    training = config.training
    if training.max_steps > 0:
        return training.max_steps * _batch_size(recipe, config)

    limit = config.data.max_train_samples
    if num_rows is None:
        num_rows = limit
    elif limit is not None:
        num_rows = min(num_rows, limit)

    if num_rows is None:
        return None
    return num_rows * training.num_train_epochs
