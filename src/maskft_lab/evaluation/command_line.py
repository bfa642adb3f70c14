"""The options of ``maskft evaluate``: the parser, checks of the options, and checks of the data that they name."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from typing import Any

from maskft.data.arguments import DATA_FIELDS, DataArguments
from maskft_common.command_line import OneLineParser, add_options, read_options
from maskft_common.errors import UserError
from maskft_common.files import expand_user
from maskft_common.layout import holds_adapter

from .evaluation_arguments import (
    ALPACA_EVAL,
    HELDOUT,
    NO_ADAPTER,
    NOT_OF_HELDOUT_DATA,
    EvaluationArguments,
)

# Options that are about held-out rows alone, and about benchmarks alone, beside those that name data.
_OF_HELDOUT = ("eval_split_size", "max_length", "max_new_tokens", "no_generate", "dataset_text_field")
_OF_BENCHMARKS = ("apply_chat_template", "include_path")


def make_parser() -> argparse.ArgumentParser:
    """The parser of ``maskft evaluate``."""
    parser = OneLineParser(
        "maskft evaluate",
        # lm-eval has the option.
        hints={"--num_fewshot": "each task has its own number; a YAML task of yours sets another (--include_path)"},
        description="Measure held-out loss and accuracy, item by item.",
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="adapter folders, as with --adapter, or one model, as with --model_name_or_path",
    )
    add_options(parser, EvaluationArguments)
    # The options of training's data, without those that concern training alone.
    data = parser.add_argument_group(
        "held-out data",
        "Evaluated rows: eval_dataset_name if given; else, with eval_split_size, the held-out part of dataset_name; "
        "else all of dataset_name (of a hub data set: its split dataset_train_split).",
    )
    add_options(data, DataArguments, NOT_OF_HELDOUT_DATA)
    return parser


def read(args: argparse.Namespace) -> tuple[EvaluationArguments, DataArguments]:
    """The parsed options in their parts.

    Raises:
        UserError: For numbers out of range, and options that do not go together.
    """
    # Values out of range raise here.
    options = read_options(EvaluationArguments, args)
    data = read_options(DataArguments, args)
    _take_models(options, args.models)

    # Tasks
    if not options.output_dir:
        raise UserError("output_dir is missing; name a folder for the results with --output_dir")
    # Shells leave the ~ of --output_dir=~/results as it is.
    options.output_dir = str(expand_user(options.output_dir))
    options.adapter = _expanded(options.adapter)
    options.change = _expanded(options.change)
    if not options.task_names:
        raise UserError("tasks names no task; name some, such as --tasks gsm8k,heldout")
    _check_has_effect(options, data)
    if options.limit and options.task_names == [HELDOUT]:
        raise UserError(f"limit is {options.limit}, but it applies to benchmarks only; use --max_eval_samples")

    # Parts of a change
    if (options.scale or options.kl) and not options.change:
        raise UserError("--scale and --kl require --change (the trained model) and --model_name_or_path (the base)")
    # Prompts are those of held-out rows.
    if options.kl and HELDOUT not in options.task_names:
        raise UserError("kl is measured on held-out rows; add heldout to --tasks")
    if options.change and (options.adapter or not options.model_name_or_path):
        raise UserError("change needs --model_name_or_path, the model before training, and no --adapter")
    if options.scale and len(options.scale) != len(options.change):
        raise UserError(f"{len(options.scale)} scales for {len(options.change)} changes; give one for each")
    scales = options.scale or []
    # NaN is in no range, so it is refused too.
    if not all(0 <= scale <= 1 for scale in scales):
        raise UserError(f"scale is {options.scale}; the part of a change is 0 to 1")
    return options, data


def _check_has_effect(options: EvaluationArguments, data: DataArguments) -> None:
    """Raise for options that name or choose the items of a task that is not evaluated."""
    of_rows = _given(data, [name for name in DATA_FIELDS if name not in NOT_OF_HELDOUT_DATA])
    of_rows += _given(options, _OF_HELDOUT)
    if of_rows and HELDOUT not in options.task_names:
        raise UserError(
            f"{of_rows[0]} is about held-out rows, which are not measured; write --tasks {options.tasks},{HELDOUT}, or "
            f"remove {of_rows[0]}"
        )
    of_benchmarks = _given(options, _OF_BENCHMARKS)
    if of_benchmarks and set(options.task_names) <= {HELDOUT, ALPACA_EVAL}:
        raise UserError(
            f"{of_benchmarks[0]} is about benchmarks of lm-eval, of which none is measured (rows with messages and "
            f"{ALPACA_EVAL} always use the chat template); remove {of_benchmarks[0]}"
        )
    of_alpaca = _given(options, ["reference_outputs", "alpaca_annotator", "alpaca_max_new_tokens"])
    if of_alpaca and ALPACA_EVAL not in options.task_names:
        raise UserError(
            f"{of_alpaca[0]} is about {ALPACA_EVAL}, which is not evaluated; write --tasks "
            f"{options.tasks},{ALPACA_EVAL}, or remove {of_alpaca[0]}"
        )


def _given(arguments: Any, names: Iterable[str]) -> list[str]:
    """The names whose values are not their defaults."""
    defaults = type(arguments)()
    return [name for name in names if getattr(arguments, name) != getattr(defaults, name)]


def _expanded(names: Sequence[str] | None) -> list[str] | None:
    """Names of folders, ``~`` replaced: a shell leaves that of ``--adapter=~/mask`` as it is."""
    if names is None:
        return None
    # Not by Path, which makes the name of a hub model of ./owner/name.
    return [os.path.expanduser(name) for name in names]


def _take_models(options: EvaluationArguments, models: list[str]) -> None:
    """Sort the positional arguments into adapters and the one model."""
    if not models:
        return
    # A name that is not an adapter folder is a model: its folder, or its name on the hub.
    adapters = [model for model in models if model == NO_ADAPTER or holds_adapter(model)]
    others = [model for model in models if model not in adapters]
    if adapters and options.adapter:
        raise UserError(f"adapters are given as arguments and with --adapter ({adapters[0]!r}); give all in one way")
    if len(others) > 1 or (others and options.model_name_or_path):
        raise UserError(f"{others[-1]!r}: one model is evaluated at a time, or several adapters over one base")
    if adapters:
        options.adapter = adapters
    if others:
        options.model_name_or_path = others[0]


def check_inputs(args: argparse.Namespace) -> list[dict]:
    """Read tasks and data and check them as far as possible without a model; returns the held-out rows.

    Raises:
        UserError: For every mistake in them.
    """
    from .heldout import heldout_rows, num_wrong_completions

    options, data = read(args)
    load_all_tasks(options)  # raises for mistakes in their data
    if HELDOUT not in options.task_names:
        return []
    rows = heldout_rows(
        data,
        options.eval_split_size,
        tokenizer=None,
        text_field=options.dataset_text_field,
    )
    # Answers are generated where every row has one to compare with, as in `evaluate_rows`.
    has_answers = all(row.get("answer") is not None for row in rows)
    if has_answers and not (options.no_generate or options.kl):
        num_wrong_completions(rows)  # raises where no answer can be right
    return rows


def load_all_tasks(options: EvaluationArguments) -> dict:
    """The tasks of an evaluation by name; held-out rows, which depend on the tokenizer, come with the model."""
    from .alpaca import load_alpaca
    from .tasks import check_names, load_tasks

    # All of these are lm-eval's.
    benchmarks = [name for name in options.task_names if name not in (HELDOUT, ALPACA_EVAL)]
    check_names(benchmarks, options.include_path)

    # Before lm-eval's tasks, which may take a download: mistakes in a local file are reported at once.
    alpaca: dict = {}
    if ALPACA_EVAL in options.task_names:
        alpaca[ALPACA_EVAL] = load_alpaca(options)

    tasks = load_tasks(
        benchmarks,
        options.data_dir,
        options.limit,
        include_path=options.include_path,
        allow_unconfined=options.allow_unconfined_code,
    )
    return tasks | alpaca
