"""``maskft evaluate``: held-out loss and benchmarks, for a model or for several adapters over one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

from maskft_common.errors import UserError
from maskft_common.layout import JOURNAL

from ..evaluation.evaluation_arguments import AND, HELDOUT, NO_ADAPTER, EvaluationArguments
from . import early

# For annotations only: importing these modules takes seconds.
if TYPE_CHECKING:
    from maskft.data.arguments import DataArguments

    from ..evaluation.load_models import Loaded
    from ..results.schema import Result

# Options that decide which model is loaded, and how.
_OF_MODELS = (
    "model_name_or_path",
    "model_revision",
    "adapter",
    "change",
    "scale",
    "dtype",
    "device",
    "chat_template_path",
)

Evaluation = tuple[EvaluationArguments, "DataArguments"]
# Measures a model, given its position among the models of the evaluation.
Measure = Callable[[int, "Loaded"], None]


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
    from ..evaluation.load_models import check_models

    silence()
    evaluations: list[Evaluation] = []
    for words in _split(argv):
        args = make_parser().parse_args(words)
        evaluations.append(read(args))
    _check_output_dirs(evaluations)

    # All models are checked and all benchmarks are read before the first model is loaded: a mistake in the last
    # evaluation is reported now, not after the hours of the first. Held-out rows come later, with the tokenizer on
    # which they depend.
    is_alone = len(evaluations) == 1
    groups: list[tuple[list[EvaluationArguments], list[Measure]]] = []
    # groupby joins neighbours alone: the evaluations keep their order.
    for _, group in groupby(evaluations, _models_key):
        options_of_group = []
        measures = []
        for options, data in group:
            options_of_group.append(options)
            measures.append(_prepared(options, data, is_alone))
            check_models(options)
        groups.append((options_of_group, measures))

    advice = "answers so far are kept: run the same command with a smaller --batch_size, or anew with --dtype bfloat16"
    with explained(advice):
        for options_of_group, measures in groups:
            for index, loaded in enumerate(_models(options_of_group)):
                for measure in measures:
                    measure(index, loaded)
            # The name still refers to the last model, which would stay in memory while the next one is loaded.
            del loaded


def _check_early(argv: Sequence[str]) -> None:
    """Check the names of models, adapters and data files, which needs no torch."""
    for words in _split(argv):
        options = early.options_of(words)
        for model in options.get("model_name_or_path", []):
            early.check_model(model)
        early.check_adapters(options.get("adapter", []))
        early.check_data(early.single_values(options))


def _split(argv: Sequence[str]) -> list[list[str]]:
    """The words of each evaluation, which ``+`` separates."""
    evaluations: list[list[str]] = []
    for is_and, words in groupby(argv, lambda word: word == AND):
        if not is_and:
            evaluations.append(list(words))
    # Without any word one evaluation, whose options are then reported as missing.
    return evaluations or [[]]


def _check_output_dirs(evaluations: Sequence[Evaluation]) -> None:
    # Real paths: two names may lead to one folder.
    places = [os.path.realpath(options.output_dir) for options, _ in evaluations]
    for place in places:
        if places.count(place) > 1:
            raise UserError(f"output_dir {place!r} is in two of the evaluations joined by {AND}; give each its own")


def _models_key(evaluation: Evaluation) -> list:
    options, _ = evaluation
    return [getattr(options, name) for name in _OF_MODELS]


def _prepared(options: EvaluationArguments, data: DataArguments, is_alone: bool) -> Measure:
    """Read the benchmarks; returns the function that reads the held-out rows and measures one model.

    Args:
        options: Options of the evaluation.
        data: The held-out rows.
        is_alone: Whether the command has no other evaluation.
    """
    from ..evaluation.alpaca import remove_verdicts
    from ..evaluation.command_line import load_all_tasks
    from ..evaluation.evaluate import (
        check_same_evaluation,
        evaluate_loaded,
        finished_result,
        labelled_files,
        settings_of,
    )
    from ..evaluation.heldout import heldout_rows, name_of_test_set

    # Where the results are written
    base = options.model_name_or_path or "base"
    folders = options.change or options.adapter or [NO_ADAPTER]
    sources = [base if folder == NO_ADAPTER else folder for folder in folders]
    targets = labelled_files(options.output_dir, sources, options.name or [])

    # A command that measures one thing was given by mistake if that is measured already. One of several may have been
    # interrupted: it is repeated as it was, and finished results are left as they are.
    if is_alone and len(targets) == 1 and not options.overwrite:
        _, target = targets[0]
        if target.exists():
            raise UserError(f"{target} exists; name another output_dir or pass --overwrite")

    tasks = load_all_tasks(options)
    task_names = set(tasks)
    measures_rows = HELDOUT in options.task_names
    if measures_rows:
        task_names.add(HELDOUT)
        # The rows are read after the model, which takes minutes to load.
        if not data.dataset_name and not data.eval_dataset_name:
            raise UserError("dataset_name is missing; name the data to measure on, or other --tasks than heldout")
    test_set = name_of_test_set(data, options.eval_split_size)

    settings = settings_of(options)
    finished: list[Result | None] = []
    for name, target in targets:
        if options.overwrite:
            finished.append(None)
        else:
            finished.append(finished_result(target, name, settings, task_names))

    def measure(index: int, loaded: Loaded) -> None:
        name, target = targets[index]
        if options.overwrite and index == 0:
            # All at once: after an interruption, a command without --overwrite would take old results for done.
            for _, old in targets:
                old.unlink(missing_ok=True)
                old.with_name(JOURNAL).unlink(missing_ok=True)
                remove_verdicts(old.parent)

        if loaded.facts.get("seed") is None and options.seed is not None:
            # A copy: another evaluation of the same loaded model may have another seed.
            facts = loaded.facts | {"seed": options.seed}
            loaded = replace(loaded, facts=facts)

        if measures_rows:
            # Only now: how rows are built depends on the tokenizer.
            tasks[HELDOUT] = heldout_rows(
                data,
                options.eval_split_size,
                loaded.tokenizer,
                options.dataset_text_field,
            )

        done = finished[index]
        # Compared now that the model is loaded: only its facts show whether the result is of the same model.
        if done is not None:
            check_same_evaluation(done, target, loaded, tasks, options.limit)
            print(f"{name}: already done, {target}")
            return

        # Writes the result file; answers that an interrupted run has kept are not generated again.
        result = evaluate_loaded(loaded, tasks, options, target, name, test_set)
        _print(name, result)
        print(f"written to {target}")

    return measure


def _models(evaluations: Sequence[EvaluationArguments]) -> Iterator[Loaded]:
    """The models of evaluations that name the same, each loaded when it is asked for."""
    from maskft_common.memory import keep_freed_memory

    from ..evaluation.load_models import load_changes, load_each

    generates_nothing = all(each.no_generate and each.task_names == [HELDOUT] for each in evaluations)
    options = evaluations[0]
    if options.change or generates_nothing:
        # A sixth faster on CPUs. Not while answers are generated: their growing caches would leave holes in memory.
        keep_freed_memory()
    if options.change:
        return load_changes(options)
    return load_each(options)


def _print(name: str, result: dict) -> None:
    from ..results.scores import scores
    from ..results.words import score_text, unit_text

    texts = {}
    for score in scores([result]):
        texts[score.task, score.metric] = score_text(score)

    for task, record in result["tasks"].items():
        for metric, entry in record["metrics"].items():
            # There is no score of a metric that is not finite.
            value = "not finite"
            if entry["value"] is not None:
                value = texts[task, metric]
            label = metric if task == HELDOUT else f"{task} {metric}"
            unit = unit_text(entry["unit"])
            print(f"{name}: {label} {value} {unit}, {entry['num_items']} items")
        if record.get("note"):
            print(f"{name}: {task}: {record['note']}")
