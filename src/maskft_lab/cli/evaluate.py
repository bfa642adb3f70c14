"""``maskft evaluate``: held-out loss and benchmarks, for a model or for several adapters over one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

from maskft_common.errors import UserError
from maskft_common.layout import JOURNAL

from ..evaluation.evaluation_arguments import AND, HELDOUT, EvaluationArguments
from . import early

if TYPE_CHECKING:
    from maskft.data.arguments import DataArguments

    from ..evaluation.load_models import Loaded

# Options that decide which model is loaded, and how.
_OF_MODELS = "model_name_or_path model_revision adapter change scale dtype device chat_template_path".split()

Evaluation = tuple[EvaluationArguments, "DataArguments"]


def main(argv: Sequence[str]) -> None:
    """Evaluate each model and write its ``result.json``; after a ``+`` follow the options of another evaluation.

    A model that several evaluations name is loaded once.

    Raises:
        UserError: Also if memory runs out.
    """
    if early.asks_for_help(argv):
        print(early.help_text("evaluate"))
        return
    _check_early(argv)

    # From here on torch is imported.
    from maskft_common.quiet import silence

    from ..estimate.out_of_memory import explained
    from ..evaluation.command_line import make_parser, read

    silence()
    evaluations = [read(make_parser().parse_args(words)) for words in _split(argv)]
    _check_output_dirs(evaluations)
    groups = [list(group) for _, group in groupby(evaluations, _models_key)]

    # All tasks and data are read before the first model is loaded.
    is_alone = len(evaluations) == 1
    measures_of = [[_prepared(*evaluation, is_alone) for evaluation in group] for group in groups]

    advice = "answers so far are kept: run the same command with a smaller --batch_size, or anew with --dtype bfloat16"
    with explained(advice):
        for group, measures in zip(groups, measures_of, strict=True):
            for index, loaded in enumerate(_models([options for options, _ in group])):
                for measure in measures:
                    measure(index, loaded)
            del loaded  # frees its memory before the next model is loaded


def _check_early(argv: Sequence[str]) -> None:
    for words in _split(argv):
        options = early.options_of(words)
        for model in options.get("model_name_or_path", []):
            early.check_model(model)
        early.check_adapters(options.get("adapter", []))


def _split(argv: Sequence[str]) -> list[list[str]]:
    """The words of each evaluation."""
    return [list(words) for is_and, words in groupby(argv, lambda word: word == AND) if not is_and] or [[]]


def _check_output_dirs(evaluations: Sequence[Evaluation]) -> None:
    places = [os.path.realpath(options.output_dir) for options, _ in evaluations]
    for place in places:
        if places.count(place) > 1:
            raise UserError(f"output_dir {place!r} is in two of the evaluations joined by {AND}; give each its own")


def _models_key(evaluation: Evaluation) -> list:
    options, _ = evaluation
    return [getattr(options, name) for name in _OF_MODELS]


def _prepared(options: EvaluationArguments, data: DataArguments, is_alone: bool) -> Callable[[int, Loaded], None]:
    """Read tasks and data; returns the function that measures each of the models.

    Args:
        options: Options of the evaluation.
        data: The held-out rows.
        is_alone: Whether the command has no other evaluation.
    """
    from ..evaluation.command_line import load_all_tasks
    from ..evaluation.evaluate import (
        check_same_evaluation,
        evaluate_loaded,
        finished_result,
        labelled_files,
        settings_of,
    )
    from ..evaluation.heldout import heldout_rows, name_of_test_set

    base = options.model_name_or_path or "base"
    folders = options.change or options.adapter or [early.NONE]
    sources = [base if folder == early.NONE else folder for folder in folders]
    targets = labelled_files(options.output_dir, sources, options.name or [])

    if is_alone and len(targets) == 1 and not options.overwrite:
        _, target = targets[0]
        if target.exists():
            raise UserError(f"{target} exists; name another output_dir or pass --overwrite")

    tasks = load_all_tasks(options)
    settings = settings_of(options)
    measures_rows = HELDOUT in options.task_names
    test_set = name_of_test_set(data, options.eval_split_size)
    measured = {*tasks, HELDOUT} if measures_rows else set(tasks)
    finished = [
        None if options.overwrite else finished_result(target, name, settings, measured) for name, target in targets
    ]

    def measure(index: int, loaded: Loaded) -> None:
        name, target = targets[index]
        if options.overwrite and index == 0:
            # All at once: after an interruption, a command without --overwrite would take old results for done.
            for _, old in targets:
                old.unlink(missing_ok=True)
                old.with_name(JOURNAL).unlink(missing_ok=True)

        if loaded.facts.get("seed") is None and options.seed is not None:
            # A copy: another evaluation of the same loaded model may have another seed.
            loaded = replace(loaded, facts=loaded.facts | {"seed": options.seed})
        if measures_rows:
            tasks[HELDOUT] = heldout_rows(data, options.eval_split_size, loaded.tokenizer, options.dataset_text_field)

        done = finished[index]
        if done is not None:
            check_same_evaluation(done, target, loaded, tasks, options.limit)
            print(f"{name}: already done, {target}")
            return
        result = evaluate_loaded(loaded, tasks, options, target, name, test_set)
        _print(name, result)
        print(f"written to {target}")

    return measure


def _models(evaluations: Sequence[EvaluationArguments]) -> Iterator[Loaded]:
    """The models of evaluations that name the same, each loaded when it is asked for."""
    from maskft_common.memory import keep_freed_memory

    from ..evaluation.load_models import load_changes, load_each

    options = evaluations[0]
    generates_nothing = all(each.no_generate and each.task_names == [HELDOUT] for each in evaluations)
    if options.change or generates_nothing:
        # A sixth faster on CPUs. Not while answers are generated: their growing caches would leave holes in memory.
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
