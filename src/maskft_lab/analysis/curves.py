"""Runs against steps and what they cost (Figs 1, 4 and 9): series and sums from training histories and results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from maskft_base.errors import UserError

from ..results.statistics import weighted_mean
from .runs import BEST, LAST, TrainedRun, parent_of

QUANTITIES = ("peak_memory_bytes", "tokens", "total_tokens", "time_s", "total_time_s")
_NOT_METRICS = ("runtime", "samples_per_second", "steps_per_second", "num_tokens", "mean_token_accuracy", "entropy")


def spent_until(run: TrainedRun, step: float | None) -> dict[str, float]:
    """Steps, tokens and seconds of a run up to a step; 0 where nothing was trained.

    Tokens are as counted there, else by the share of the steps, as seconds are; measuring on held-out rows is in these.
    """
    num_steps = run.summary.get("num_steps")
    if not num_steps or not step:
        return {"steps": 0.0, "tokens": 0.0, "time_s": 0.0}
    counted = {row["step"]: row["eval_num_tokens"] for row in run.history if row.get("eval_num_tokens")}
    share = step / num_steps
    tokens = counted.get(step, run.summary["num_train_tokens"] * share)
    return {"steps": step, "tokens": tokens, "time_s": run.summary["train_time_s"] * share}


def spent_before(run: TrainedRun, runs: Sequence[TrainedRun]) -> dict[str, float]:
    """What was spent from the pre-trained model to where a run starts: by its parents, up to their best checkpoints."""
    parent = parent_of(run, runs)
    if parent is None:
        return spent_until(run, 0)
    own, before = spent_until(parent, parent.summary.get("best_step")), spent_before(parent, runs)
    return {name: own[name] + before[name] for name in own}


def series_of(run: TrainedRun, runs: Sequence[TrainedRun]) -> dict:
    """One run as lines.

    Returns:
        ``run``, ``name``, ``method``, ``seed``, ``start``; ``steps`` and ``tokens`` at which something was measured,
        counted from the pre-trained model; ``metrics``: name -> values, None where that one was not measured
        (``eval_loss`` in nats per token, scores in [0, 1]); ``train``: steps and training losses.
    """
    before = spent_before(run, runs)
    # The candidates that a best of several random masks was chosen from were measured at no step.
    measured = [row for row in run.history if "step" in row and any(_is_metric(key) for key in row)]
    logged = [row for row in run.history if "loss" in row]
    names = dict.fromkeys(key for row in measured for key in row if _is_metric(key))
    return {
        **{key: getattr(run, key) for key in ("name", "method", "seed", "start")},
        "run": run.id,
        "steps": [before["steps"] + row["step"] for row in measured],
        "tokens": [before["tokens"] + spent_until(run, row["step"])["tokens"] for row in measured],
        "metrics": {name: [row.get(name) for row in measured] for name in names},
        "train": {"steps": [before["steps"] + row["step"] for row in logged], "loss": [row["loss"] for row in logged]},
    }


def curves_of(runs: Sequence[TrainedRun]) -> dict[str, Any]:
    """``series``, one of each run, for Fig. 1.

    Raises:
        UserError: If no run was measured while it was trained.
    """
    series = [series_of(run, runs) for run in runs]
    if not any(each["metrics"] for each in series):
        raise UserError("no run has a training history with measurements: curves need training.json beside the results")
    return {"series": series}


def costs_of(run: TrainedRun, role: str, runs: Sequence[TrainedRun]) -> dict[str, float]:
    """Costs of a run up to its best checkpoint (role ``best``) or its end (``last``).

    Returns:
        ``peak_memory_bytes`` of one process; ``tokens`` and ``time_s`` of this run; ``total_tokens`` and
        ``total_time_s`` from the pre-trained model on.
    """
    own = spent_until(run, run.summary["num_steps" if role == LAST else "best_step"])
    before = spent_before(run, runs)
    return {
        "peak_memory_bytes": run.summary["peak_memory_bytes"],
        **{name: own[name] for name in ("tokens", "time_s")},
        **{f"total_{name}": before[name] + own[name] for name in ("tokens", "time_s")},
    }


def cost_of(runs: Sequence[TrainedRun]) -> dict[str, Any]:
    """``rows`` for Figs 4 and 9: of each method and role, every cost's mean and standard error over seeds.

    Times are comparable only between runs of one machine.

    Raises:
        UserError: If no run tells what it cost.
    """
    groups: dict[tuple[str, str], list[dict[str, float]]] = {}
    for run in runs:
        for role in (BEST, LAST) if run.summary.get("num_steps") else ():
            groups.setdefault((run.name, role), []).append(costs_of(run, role, runs))
    if not groups:
        raise UserError("no run tells memory, tokens and time: cost needs training.json of runs that trained")
    rows = []
    for (name, role), costs in groups.items():
        row: dict = {"name": name, "role": role, "num_seeds": len(costs)}
        for quantity in QUANTITIES:
            mean, stderr = weighted_mean([cost[quantity] for cost in costs])
            row[quantity] = {"mean": mean, "stderr": stderr if len(costs) > 1 else None}
        rows.append(row)
    return {"rows": rows}


def _is_metric(key: str) -> bool:
    return key.startswith("eval_") and not key.endswith(_NOT_METRICS)
