"""Tuning a method of a study: the settings that are tried, and the one with the lowest held-out loss in its budget.

The rows are those held out from the training data, never those that a study reports on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

from maskft.data.arguments import DATA_FIELDS, KL_DATA, TEMPLATE
from maskft_common.errors import UserError

from .recipe import Method, Options, TimesParent
from .study_run import Look, StudyRun, Trial, Tuned, settings_text

# Options of the training rows alone, but for sets of which a part is held out.
_OF_TRAINING_ROWS = frozenset({"dataset_name", "dataset_train_split", "max_train_samples"})
# Options that decide which rows are held out, or how they become tokens. A new field of DataArguments is among them
# until somebody says otherwise.
_OF_HELDOUT_ROWS = frozenset(DATA_FIELDS).difference(_OF_TRAINING_ROWS) | {
    "max_length",
    "completion_only_loss",
    "dataset_text_field",
    TEMPLATE,
}


def tune(
    method: Method,
    own: Options,
    parent: Options,
    run_of: Callable[[Options], StudyRun],
    look: Look,
) -> Tuned:
    """Try every combination of the values; the lowest held-out loss wins, among runs within their ``kl_budget``.

    Args:
        method: The method, with its ``tune``.
        own: Its options of ``maskft train``, with defaults.
        parent: The options of the run that it starts from, with defaults.
        run_of: Makes the run that tries settings.
        look: Held-out loss of a run; None while it is not finished.

    Returns:
        All trials, in the order of the lists (the last option varies fastest), and the winner; the first of equal ones.

    Raises:
        UserError: If no held-out loss is measured, the tuned option has no effect or changes the held-out rows, the
            parent lacks a value to multiply, or two settings mean the same.
    """
    has_no_losses = own.get("eval_strategy") == "no"
    # An empty `tune` is one trial, which needs no losses to win.
    if method.tune and has_no_losses:
        raise UserError(f"method {method.name!r}: tune needs held-out losses, but eval_strategy is no; remove it")
    _check_same_rows(method, own)

    # With max_steps all numbers of epochs would be one training, under several names.
    max_steps = _number(own.get("max_steps"))
    is_length_fixed = max_steps is not None and max_steps > 0
    if "num_train_epochs" in method.tune and is_length_fixed:
        raise UserError(f"method {method.name!r}: max_steps decides the length, and tune is of num_train_epochs")

    trials = []
    settings_of: dict[str, Options] = {}  # id of a run -> the settings that it tries
    for settings in _combinations(method, parent):
        run = run_of(settings)
        # One of them may be a default that is written out. One folder would have two trainings at once, and the table
        # would count two settings.
        other = settings_of.setdefault(run.id, settings)
        if other is not settings:
            raise UserError(
                f"method {method.name!r}: tune has {settings_text(other)} and {settings_text(settings)}, which mean "
                "the same; drop one"
            )
        measured = look(run)
        trials.append(Trial(settings, run, measured))

    # A single unfinished trial could still be the best.
    is_settled = all(trial.heldout is not None for trial in trials)
    if is_settled:
        winner = min(trials, key=_rank)  # of equal ones the first
    else:
        winner = trials[0]  # a guess, with which the runs below can be listed
    return Tuned(trials, winner, is_settled)


def _check_same_rows(method: Method, own: Options) -> None:
    """Raise for a tuned option with which two trials would be measured on other rows, or on other tokens of them.

    Args:
        method: The method, with its ``tune``.
        own: Its options of ``maskft train``, with defaults.
    """
    for option in method.tune:
        is_of_heldout = option in _OF_HELDOUT_ROWS
        # Without data of its own, a part of the training data is held out.
        if option in ("dataset_name", "dataset_train_split") and not own.get("eval_dataset_name"):
            is_of_heldout = True
        if is_of_heldout:
            raise UserError(
                f"method {method.name!r}: tune has {option}, which changes the held-out rows or their tokens, and "
                f"losses on different ones do not compare; give one value, or write grid {method.name}.{option}"
            )
        # The KL that a budget limits is measured on these rows.
        if option == KL_DATA and own.get("kl_budget") is not None:
            raise UserError(
                f"method {method.name!r}: tune has {KL_DATA}, and a kl_budget on different rows is a different limit; "
                f"give one value, or write grid {method.name}.{option}"
            )


def _rank(trial: Trial) -> tuple[bool, float, float]:
    """Sort key, the best first: as among the checkpoints of a run, the budget comes before the loss."""
    found = trial.heldout
    has_diverged = math.isinf(found.loss)
    return has_diverged, found.over_budget, found.loss


def _combinations(method: Method, parent: Options) -> list[Options]:
    """Every combination of the values to try."""
    # The values of each option; multiples are computed here, because the grid may vary the parent's value.
    lists: dict[str, list] = {}
    for option, values in method.tune.items():
        if isinstance(values, TimesParent):
            # From here on both kinds are lists of values.
            values = _multiples(method, option, values, parent)
        lists[option] = values

    # Without options to tune, the product is one empty combination: the method as it is.
    combinations = []
    for values in itertools.product(*lists.values()):
        settings = dict(zip(lists, values, strict=True))
        combinations.append(settings)
    return combinations


def _multiples(
    method: Method,
    option: str,
    values: TimesParent,
    parent: Options,
) -> list[float]:
    """The values of ``times_parent`` as multiples of the parent's value.

    Args:
        method: The method, for errors.
        option: The option.
        values: The factors.
        parent: The options of the run that it starts from, with defaults.
    """
    base = _number(parent.get(option))
    if not base:  # multiples of 0 are all 0
        raise UserError(
            f"method {method.name!r}: tune.{option} is given as times_parent, and {method.start!r} has none; "
            "give the values"
        )

    multiples = []
    for factor in values.times_parent:
        # Six digits, so that 3 * 0.1 is 0.3, in labels and in the run's name.
        six_digits = f"{factor * base:.6g}"
        # Through text, as round() counts digits after the point and not significant ones.
        multiples.append(float(six_digits))
    return multiples


def _number(value: Any) -> float | None:
    """A value of a recipe if it is a number: the options have not been parsed yet."""
    return value if isinstance(value, int | float) else None
