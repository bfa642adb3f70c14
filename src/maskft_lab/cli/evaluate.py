"""``maskft evaluate``: held-out loss and benchmarks, for a model or for several adapters over one."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

from maskft_common.errors import UserError
from maskft_common.layout import JOURNAL

from ..evaluation.arguments import ALPACA_EVAL, AND, HELDOUT, NOT_OF_HELDOUT_DATA, EvaluationArguments
from .options import add_options, read_options

if TYPE_CHECKING:
    from maskft.data.arguments import DataArguments

    from ..evaluation.load import Loaded

_OF_MODELS = "model_name_or_path model_revision adapter change scale dtype device chat_template_path".split()


def parser() -> argparse.ArgumentParser:
    """The parser of the options of ``maskft evaluate``."""
    from maskft.data.arguments import DataArguments

    from .main import COMMANDS, OneLineParser

    parser = OneLineParser(prog="maskft evaluate", description=f"{COMMANDS['evaluate']}.", allow_abbrev=False)
    add_options(parser, EvaluationArguments)
    data = parser.add_argument_group(
        "held-out data",
        "What is evaluated: eval_dataset_name if given; else, with eval_split_size, the "
        "held-out part; else all of dataset_name.",
    )
    add_options(data, DataArguments, NOT_OF_HELDOUT_DATA)
    return parser


def read(args: argparse.Namespace) -> tuple[EvaluationArguments, DataArguments]:
    """The parsed options in their parts.

    Raises:
        UserError: For numbers out of range, and options that do not go together.
    """
    from maskft.data.arguments import DataArguments

    options, data = read_options(EvaluationArguments, args), read_options(DataArguments, args)
    if not options.output_dir:
        raise UserError("output_dir is missing; name a folder for the results with --output_dir")
    if not options.task_names:
        raise UserError("tasks names no task; name some, such as --tasks gsm8k,heldout")
    if options.limit and options.task_names == [HELDOUT]:
        raise UserError(f"limit is {options.limit} and of benchmarks, not of held-out rows; give --max_eval_samples")
    if (options.scale or options.kl) and not options.change:
        raise UserError("scale and kl are of what training has changed: name it with --change, and what it was before")
    if options.kl and HELDOUT not in options.task_names:
        raise UserError("kl is measured on held-out rows; add heldout to --tasks")
    if options.change and (options.adapter or not options.model_name_or_path):
        raise UserError("change needs --model_name_or_path, the model before training, and no --adapter")
    if options.scale and len(options.scale) != len(options.change):
        raise UserError(f"{len(options.scale)} scales for {len(options.change)} changes; give one for each")
    if not all(0 <= scale <= 1 for scale in options.scale or []):
        raise UserError(f"scale is {options.scale}; the part of a change is 0 to 1")
    return options, data


def check_inputs(args: argparse.Namespace) -> list[dict]:
    """Read tasks and data and check them as far as that can be done without a model; returns the held-out rows.

    Raises:
        UserError: For every mistake in them.
    """
    from ..evaluation.heldout import heldout_rows

    options, data = read(args)
    _load_tasks(options)
    if HELDOUT not in options.task_names:
        return []
    return heldout_rows(data, options.eval_split_size, None, options.dataset_text_field)


def main(argv: Sequence[str]) -> None:
    """Evaluate each model and write its ``result.json``; after a ``+`` follow options of another evaluation.

    Models that several name are loaded once.

    Raises:
        UserError: Also where memory runs out.
    """
    from maskft_common.quiet import silence

    from ..estimate.out_of_memory import explained

    silence()
    evaluations = [[*words] for is_and, words in groupby(argv, lambda word: word == AND) if not is_and] or [[]]
    parts = [read(parser().parse_args(words)) for words in evaluations]
    places = [os.path.realpath(options.output_dir) for options, _ in parts]
    if twice := next((place for place in places if places.count(place) > 1), None):
        raise UserError(f"output_dir {twice!r} stands in two of the evaluations joined by {AND}; give each its own")
    groups = [[*same] for _, same in groupby(parts, lambda part: [getattr(part[0], name) for name in _OF_MODELS])]
    prepared = [[_prepared(*part, is_alone=len(parts) == 1) for part in group] for group in groups]
    with explained(
        "answers so far are kept: run the same command with a smaller --batch_size, or anew with --dtype bfloat16"
    ):
        for group, measures in zip(groups, prepared, strict=True):
            for index, loaded in enumerate(_models([options for options, _ in group])):
                for measure in measures:
                    measure(index, loaded)
            del loaded  # before the next models come


def _prepared(options: EvaluationArguments, data: DataArguments, is_alone: bool) -> Callable[[int, Loaded], None]:
    """What is to be done with each of the models; mistakes are told before one is loaded."""
    from ..evaluation.heldout import heldout_rows, name_of_test_set
    from ..evaluation.run import check_same_evaluation, evaluate_loaded, finished_result, labelled_files, settings_of

    base = options.model_name_or_path or "base"
    folders = options.change or options.adapter or ["none"]
    sources = [base if folder == "none" else folder for folder in folders]
    targets = labelled_files(options.output_dir, sources, options.name or [])
    tasks, settings = _load_tasks(options), settings_of(options)
    if is_alone and len(targets) == 1 and targets[0][1].exists() and not options.overwrite:
        raise UserError(f"{targets[0][1]} exists; name another output_dir or pass --overwrite")
    test_set = name_of_test_set(data, options.eval_split_size)
    measured = {*tasks, *({HELDOUT} & set(options.task_names))}
    earlier = [
        None if options.overwrite else finished_result(target, name, settings, measured) for name, target in targets
    ]

    def measure(index: int, loaded: Loaded) -> None:
        (name, target), done = targets[index], earlier[index]
        # All of them now: run again without --overwrite after an interruption, what is left would count as done.
        for _, old in targets if options.overwrite and not index else ():
            old.unlink(missing_ok=True)
            old.with_name(JOURNAL).unlink(missing_ok=True)
        if loaded.facts.get("seed") is None and options.seed is not None:
            loaded = replace(loaded, facts=loaded.facts | {"seed": options.seed})  # another evaluation's may differ
        if HELDOUT in options.task_names:
            tasks[HELDOUT] = heldout_rows(data, options.eval_split_size, loaded.tokenizer, options.dataset_text_field)
        if done is not None:
            check_same_evaluation(done, target, loaded, tasks, options.limit)
            print(f"{name}: already done, {target}")
            return
        _print(name, evaluate_loaded(loaded, tasks, options, target, name, test_set))
        print(f"written to {target}")

    return measure


def _load_tasks(options: EvaluationArguments) -> dict:
    """What is asked, by task; held-out rows, which depend on the tokenizer, come with the model."""
    from ..evaluation.alpaca import load_alpaca
    from ..evaluation.tasks import check_names, load_tasks

    benchmarks = [name for name in options.task_names if name not in (HELDOUT, ALPACA_EVAL)]
    check_names(benchmarks, options.include_path)
    alpaca = {ALPACA_EVAL: load_alpaca(options)} if ALPACA_EVAL in options.task_names else {}
    how = {"include_path": options.include_path, "allow_unconfined": options.allow_unconfined_code}
    return load_tasks(benchmarks, options.data_dir, options.limit, **how) | alpaca


def _models(evaluations: Sequence[EvaluationArguments]):
    """The models of all evaluations one after another, each loaded when it is asked for."""
    from maskft_common.memory import keep_freed_memory

    from ..evaluation.load import load_changes, load_each

    options = evaluations[0]
    if options.change or all(each.no_generate and each.task_names == [HELDOUT] for each in evaluations):
        # A sixth faster on CPUs. Not where answers are generated: their caches grow, and holes would stay behind.
        keep_freed_memory()
    return load_changes(options) if options.change else load_each(options)


def _print(name: str, result: dict) -> None:
    from ..results.scores import scores
    from ..results.words import score_text, unit_text

    texts = {(score.task, score.metric): score_text(score) for score in scores([result])}
    for task, record in result["tasks"].items():
        for metric, entry in record["metrics"].items():
            value = "not finite" if entry["value"] is None else texts[task, metric]
            label = metric if task == HELDOUT else f"{task} {metric}"
            print(f"{name}: {label} {value} {unit_text(entry['unit'])}, {entry['num_items']} items")
        if record.get("note"):
            print(f"{name}: {task}: {record['note']}")
