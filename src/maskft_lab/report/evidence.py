"""The evidence of a report: runs, results, the comparison with its verdicts, training histories and arrays."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from maskft_common import layout
from maskft_common.errors import UserError, did_you_mean
from maskft_common.files import read_json, read_text

from ..analysis.records import read_record
from ..analysis.runs import MASK, PUBLISHED_SUMMARY, TrainedRun, plain_name, read_study
from ..evaluation.evaluation_arguments import HELDOUT
from ..results.compare import compare
from ..results.comparison import Comparison, Settings
from ..results.schema import Result

CURVES = "curve*.json"  # beside the summary, one for each probe: every method's rates, checkpoints and scales


# Beyond so many values (items x seeds x differences) another comparison takes minutes, and a page seconds.
MAX_COMPARED = 1_000_000


class NotComputed(Exception):
    """Why a figure cannot be drawn: its data is not there."""


@dataclass
class Evidence:
    """The files of a study, read.

    Attributes:
        folder: The study's.
        name: Its name.
        base: The pre-trained model.
        runs: Finished runs.
        results: All of them.
        comparison: Every model against the baseline; None where there is one model only.
        notes: Remarks for the reader.
    """

    folder: Path
    name: str
    base: str
    runs: list[TrainedRun]
    results: list[Result]
    comparison: Comparison | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def place(self) -> str:
        """The folder for a command line; without the folders above it where it was named from the root."""
        return shlex.quote(self.folder.name if self.folder.is_absolute() else str(self.folder))

    @property
    def methods(self) -> dict[str, tuple[str, bool]]:
        """Name of a run -> its method, and whether others start from it (or it is full fine-tuning of the base)."""
        starts = {run.start for run in self.runs}
        firsts = ("full", "pretrained")
        parents = {run.name for run in self.runs if run.id in starts or (run.start is None and run.method in firsts)}
        return {run.name: (run.method, run.name in parents) for run in self.runs}

    @property
    def masks(self) -> list[str]:
        """Names of the learned masks that are compared."""
        methods = self.comparison.methods if self.comparison else []
        return [name for name in methods if self.methods.get(plain_name(name), ("", False))[0] == MASK]

    @cached_property
    def against_mask(self) -> Comparison | None:
        """Every other model against the first learned mask of a verdict: None where its answers are not here.

        The same as ``maskft compare RESULTS --baseline MASK``: a table of differences from the pre-trained model does
        not say how two trained models differ.
        """
        comparison = self.comparison
        if comparison is None or not comparison.verdicts:
            return None
        mask = comparison.verdicts[0].parent.method
        compared = {comparison.baseline, *comparison.methods}
        results = [result for result in self.results if result["name"] in compared]
        # In the order of their files, as `maskft compare` reads them: the last digit of a simultaneous interval, whose
        # level is drawn at random, depends on the order of the family.
        results.sort(key=lambda result: (result["study"]["run"], result["study"]["role"]))
        if {result["name"] for result in results} != compared or mask == comparison.baseline:
            return None
        num_values = sum(
            len(task["items"]) * len(task["metrics"]) for each in results for task in each["tasks"].values()
        )
        if num_values > MAX_COMPARED:
            return None
        settings = Settings(comparison.num_resamples, comparison.seed, comparison.confidence, comparison.fixed_seeds)
        return compare(results, mask, settings=settings)

    @property
    def recipe(self) -> str | None:
        """The study's recipe, where its folder has a copy."""
        files = [self.folder / layout.STUDY_RECIPE.format(self.name), *sorted(self.folder.glob("recipe*.yaml"))]
        found = next((file for file in files if file.is_file()), None)
        return read_text(found) if found else None

    def record(self, what: str) -> dict[str, Any]:
        """Return the record of the analysis of this name.

        Raises:
            NotComputed: If it was not computed.
            UserError: If its file is not as ``maskft analyze`` writes it.
        """
        file = self.folder / layout.ANALYSIS / f"{what}.json"
        if not file.is_file():
            is_published = not any(run.models for run in self.runs)
            where = "published results hold no models, so it is made where the study ran"
            raise NotComputed(where if is_published else f"there is no {layout.ANALYSIS}/{what}.json")
        return read_record(file)


def test_name(evidence: Evidence, task: str) -> str:
    """The name of a task in a picture: rows of one's own by the file of the test set, as tables call it.

    A study calls its test ``heldout``, which would be read as the rows that chose the settings.
    """
    records = [result["tasks"][task] for result in evidence.results if task in result["tasks"]]
    files = [record["data_file"] for record in records if record.get("data_file")]
    if files:
        return files[0]
    return "test" if task == HELDOUT else task


def gather(folder: str | Path, *, base: str | None = None, study_name: str | None = None) -> Evidence:
    """Read a study's folder, or a folder of published results.

    Args:
        folder: Where they are.
        base: The base model whose runs are meant, where there are several.
        study_name: The study that is meant, where several share the folder.

    Raises:
        UserError: If there is nothing to report, or results do not fit each other.
    """
    folder = Path(folder)
    curves = sorted(folder.glob(CURVES))
    if curves and not (folder / layout.RUNS).is_dir() and not (folder / PUBLISHED_SUMMARY).is_file():
        return Evidence(folder, folder.resolve().name, read_json(curves[0])["model"], [], [])  # its paths alone
    runs = read_study(folder, base, study_name)
    name, summary = _summary(folder, study_name, runs[0].base)
    names = {(row["run"], row["role"]): row["name"] for row in summary.get("runs", [])}  # studies share runs
    results = [
        cast(Result, {**result, "name": names.get((result["study"]["run"], result["study"]["role"]), result["name"])})
        for run in runs
        for result in run.results.values()
    ]
    evidence = Evidence(folder, name, runs[0].base, runs, results)
    if "not_compared" in summary:
        raise UserError(f"{folder}: the study's results cannot be compared: {summary['not_compared']}")
    if "comparison" in summary:
        evidence.comparison = Comparison.from_dict(summary["comparison"])
    elif len({result["name"] for result in results}) > 1:
        evidence.notes = ["the study has written no comparison yet: finish it with maskft study"]
    evidence.notes += [_tuned_text(tuned) for tuned in summary.get("tuning", []) if tuned.get("winner")]
    return evidence


def _summary(folder: Path, study_name: str | None, base: str) -> tuple[str, dict]:
    """Name of the study, and its summary of one base model; empty where it has none yet."""
    found = sorted(folder.glob(layout.SUMMARY.format("*"))) or list(folder.glob(PUBLISHED_SUMMARY))
    summaries = {record["study"]: record["models"] for record in map(read_json, found)}
    if not summaries:
        return study_name or folder.resolve().name, {}
    if study_name is None and len(summaries) > 1:
        raise UserError(f"several studies share {str(folder)!r} ({', '.join(summaries)}): name one with --study_name")
    name = study_name or next(iter(summaries))
    if name not in summaries:
        hint = did_you_mean(name, summaries)
        raise UserError(f"no study in {str(folder)!r} is called {name!r}{hint}; there are {', '.join(summaries)}")
    models = summaries[name]
    if base in models:
        return name, models[base]
    # A summary of one model under another name for it, such as its folder on another machine.
    return name, next(iter(models.values())) if len(models) == 1 else {}


def _tuned_text(tuned: Mapping) -> str:
    settings = ", ".join(f"{name}={value}" for name, value in tuned["winner"].items())
    number = tuned.get("num_settings", len(tuned["trials"]))  # a summary without it is of a grid
    return f"{tuned['method']} was tuned: {settings} is the best of {number} on held-out rows"
