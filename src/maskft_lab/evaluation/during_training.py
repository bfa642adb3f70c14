"""Generation metrics while a model trains, on items that neither trained it nor will report on it.

The items are held-out rows of the training data (``heldout``), or those items of a benchmark's own training split that
the training data does not contain. Test items never choose a checkpoint: the score they then report would be too high.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from random import Random

import numpy as np
import torch
from rich.console import Console

from maskft.data.splits import prompt_digest
from maskft_base.errors import UserError, did_you_mean

from .arguments import HELDOUT
from .benchmarks import BENCHMARKS
from .heldout import evaluate_rows
from .journal import Resources

TASKS = (HELDOUT,)
# What the Trainer and TRL measure at every evaluation.
LOSS_METRICS = ("loss", "mean_token_accuracy", "entropy", "num_tokens", "aux_loss")
_MAX_NEW_TOKENS = 256  # bound on an answer to a held-out row
_QUIET = Console(quiet=True)  # a bar of the evaluation inside the bar of the training would garble both


class TrainingEvaluation:
    """The items, chosen once, and how a model is measured on them.

    ``selected_on`` maps the ids of the held-out rows among them to hashes of their prompts.

    Args:
        names: Some of ``TASKS``.
        limit: Items of each task.
        data_dir: Folder with the benchmarks' files; None: the hub.
        train_rows: Rows that the model trains on.
        heldout_rows: Rows that it does not.
        console: Where the numbers are printed.

    Raises:
        UserError: If a task has no items that may be used, or the data is not what it should be.
    """

    def __init__(
        self,
        names: Sequence[str],
        limit: int,
        data_dir: str | None,
        train_rows: Iterable[Mapping],
        heldout_rows: Sequence[Mapping],
        *,
        console: Console | None = None,
    ):
        _check(names, limit)
        self.console = console
        self.rows, self.selected_on = None, {}
        if HELDOUT in names:
            # A part drawn at random: a report may then leave it out, and what remains is a fair sample as well.
            order = list(range(len(heldout_rows)))
            Random(0).shuffle(order)
            self.rows = [heldout_rows[index] for index in sorted(order[:limit])]
            self.selected_on = {str(row["id"]): prompt_digest(row) for row in self.rows}
            if any(row.get("answer") is None for row in self.rows):
                raise UserError("eval_tasks: heldout answers cannot be checked, the data has no `answer` column")

    @staticmethod
    def metric_names(tasks: Sequence[str]) -> list[str]:
        """The names of all metrics that an evaluation has, with the ``eval_`` that the Trainer puts before them."""
        measured = {name: BENCHMARKS[name].metrics.values() if name in BENCHMARKS else ("accuracy",) for name in tasks}
        ours = [f"{name}_{metric}" for name, metrics in measured.items() for metric in metrics]
        return [f"eval_{name}" for name in (*LOSS_METRICS, *ours)]

    def measure(self, model, tokenizer) -> dict[str, float]:
        """Return ``task_metric`` -> value."""
        with _kept_random_state():
            records = self._records(model, tokenizer)
        values = {}
        for name, record in records.items():
            metrics = {key: metric for key, metric in record["metrics"].items() if key != "nll"}
            values |= {f"{name}_{key}": metric["value"] for key, metric in metrics.items()}
            if self.console:
                shown = ", ".join(f"{key} {metric['value']:.4f}" for key, metric in metrics.items())
                self.console.print(f"  {name}: {shown} ({len(record['items'])} items)", highlight=False)
        return values

    def _records(self, model, tokenizer) -> dict[str, dict]:
        records = {}
        if self.rows:
            records[HELDOUT] = evaluate_rows(
                model, tokenizer, self.rows, Resources(console=_QUIET), max_new_tokens=_MAX_NEW_TOKENS
            )
        return records


def _check(names: Sequence[str], limit: int) -> None:
    for name in names:
        if name in BENCHMARKS and name not in TASKS:
            raise UserError(
                f"eval_tasks: {name} has test items only, and test items must not choose the checkpoint; "
                f"use {', '.join(TASKS)}, and measure {name} at the end with maskft evaluate"
            )
        if name not in TASKS:
            raise UserError(f"eval_tasks: no task {name!r}{did_you_mean(name, TASKS)}; there are {', '.join(TASKS)}")
    if limit < 1:
        raise UserError(f"eval_limit is {limit}; it must be at least 1")


@contextlib.contextmanager
def _kept_random_state() -> Iterator[None]:
    """Benchmarks set the seeds; the training after them continues with the state that it had."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
