"""Exercises that reasoning-gym generates: rows without a file and without a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from random import Random
from typing import Any

from ..errors import UserError, did_you_mean, first_line
from .formats import answer_type_of

PROCEDURAL_PREFIX = "reasoning-gym/"

Row = Mapping[str, Any]


def procedural_seed(seed: int, role: str) -> int:
    """Spread seeds far apart: reasoning-gym makes item i from ``seed + i``, so seeds 1 and 2 share nearly all items."""
    return Random(f"{role}-{seed}").randrange(2**31)


def procedural_rows(task: str, size: int, seed: int, options: dict, plain: bool) -> Iterator[Row]:
    """Yield ``size`` exercises of a task; ``plain`` writes arithmetic as ``12 * 34 =`` instead of a question."""
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError:
        raise UserError(
            f"{PROCEDURAL_PREFIX}{task} needs the package reasoning-gym; install it with: pip install reasoning-gym"
        ) from None
    if task not in DATASETS:
        raise UserError(f"reasoning-gym has no task {task!r}{did_you_mean(task, DATASETS)}")
    known = [field for field in DATASETS[task][1].__dataclass_fields__ if field not in ("size", "seed")]
    for option in options:
        if option not in known:
            raise UserError(
                f"procedural_options: {task} has no option {option!r}{did_you_mean(option, known)}; "
                f"it has {', '.join(known)}"
            )
    try:
        items = create_dataset(task, size=size, seed=seed, **options)
    except Exception as error:  # each task checks its options with asserts of its own
        raise UserError(f"procedural_options {options} do not suit {task}: {first_line(error)}") from None
    for item in items:
        question, answer = item["question"], item["answer"]
        if answer is None:
            raise UserError(f"reasoning-gym task {task!r} has no single right answer to train on; choose another task")
        reference = {"answer": answer, "answer_type": answer_type_of(answer)}
        # Elsewhere "expression" is the solution itself (countdown) or a part of the question (circuit_logic).
        expression = item["metadata"].get("expression")
        if plain and isinstance(expression, str) and expression in question:
            yield {"prompt": f"{expression} =", "completion": f" {answer}", **reference}
        else:
            yield {"question": question, **reference}
