"""The evidence of a report: runs, results, the comparison with its verdicts, training histories and arrays."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from maskft_common import layout
from maskft_common.errors import UserError, did_you_mean
from maskft_common.files import read_json, read_text

from ..analysis.records import digest_folder, read_record
from ..analysis.runs import BEST, MASK, PUBLISHED_SUMMARY, TrainedRun, fields_of, plain_name, read_study
from ..evaluation.evaluation_arguments import HELDOUT
from ..results.compare import compare_measured
from ..results.comparison import Comparison, Settings
from ..results.schema import Result, run_identity

# Beside the summary, one file for each probe: the rates, checkpoints and scales of every method.
CURVES = "curve*.json"

# Largest number of answers (results x items x metrics) of a further comparison. More take minutes, where a page takes
# seconds.
MAX_COMPARED = 1_000_000

# Analysis of one mask -> its setting with the digest of that mask's weights, or of several models with the mask last.
_MASK_OF = {
    "bound": "adapter",
    "curvature": "mask",
    "landscape": "models",
}


class NotComputed(Exception):
    """A figure cannot be drawn, because its data is missing; the text is the reason."""


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
        """The folder for a command line; of an absolute path only the last part, so that a page shows no others."""
        place = str(self.folder)
        if self.folder.is_absolute():
            place = self.folder.name
        return shlex.quote(place)

    @property
    def methods(self) -> dict[str, tuple[str, bool]]:
        """Name of a run -> its method, and whether others start from it (or it is full fine-tuning of the base).

        Also by the names of its models in tables: a recipe may give the end of a training any name (``last``).
        """
        # Runs that other runs start from, then their names. Runs are joined by their hashes: studies that share a
        # folder share runs, and each may name them differently.
        starts = {run_identity(run.start) for run in self.runs if run.start is not None}
        parents = set()
        for run in self.runs:
            # Also where nothing starts from it: a study may compare a full fine-tuning with LoRA alone.
            is_first = run.start is None and run.method in ("full", "pretrained")
            if is_first or run_identity(run.id) in starts:
                parents.add(run.name)

        # By name, because seeds of one method are alike in this.
        methods = {}
        names = {}  # hash of a run -> its name
        for run in self.runs:
            is_start = run.name in parents
            methods[run.name] = (run.method, is_start)
            names[run_identity(run.id)] = run.name
        for result in self.results:
            run_id, _ = _run_and_role(result)
            run_name = names.get(run_identity(run_id))
            if run_name is not None:
                methods.setdefault(result["name"], methods[run_name])
        return methods

    @property
    def masks(self) -> list[str]:
        """Names of the learned masks that are compared."""
        if self.comparison is None:
            return []
        masks = []
        for name in self.comparison.methods:
            # A name in a comparison may end in the role of the model, "(best)" or "(continued)".
            method, _ = self.methods.get(plain_name(name), ("", False))
            if method == MASK:
                masks.append(name)
        return masks

    @cached_property
    def against_mask(self) -> Comparison:
        """Every other model against the first learned mask of a verdict.

        The same as ``maskft compare RESULTS --baseline MASK``: a table of differences from the pre-trained model does
        not tell how two trained models differ.

        Raises:
            NotComputed: If there is no verdict on a mask, the table of the verdict has these differences already, the
                answers of a model are not here, there are too many of them, or they cannot be compared.
        """
        comparison = self.comparison
        if comparison is None or not comparison.verdicts:
            raise NotComputed("there is no verdict on a mask")

        # A verdict is on a learned mask, whose difference from its parent has its name.
        mask = comparison.verdicts[0].parent.method
        if mask == comparison.baseline:
            raise NotComputed("the mask is the study's baseline, so the table of the verdict has these differences")

        # Published studies may leave out the answers of some models.
        compared = {comparison.baseline, *comparison.methods}
        results = [result for result in self.results if result["name"] in compared]
        with_answers = {result["name"] for result in results}
        if with_answers != compared:
            raise NotComputed(f"the answers of {min(compared - with_answers)!r} are not here")

        # In the order of their files, as `maskft compare` reads them: the last digit of a simultaneous interval, whose
        # level is drawn at random, depends on the order of the family.
        results.sort(key=_run_and_role)

        # A page takes seconds; a comparison of many answers would take minutes.
        num_values = 0
        for result in results:
            for task in result["tasks"].values():
                num_items = len(task["items"])
                num_values += num_items * len(task["metrics"])
        if num_values > MAX_COMPARED:
            raise NotComputed(
                f"{num_values:,} values take minutes to compare; maskft compare --baseline {mask!r} does it"
            )

        # Those of the study's comparison, so that both tables of a page have the same confidence.
        settings = Settings(
            num_resamples=comparison.num_resamples,
            seed=comparison.seed,
            confidence=comparison.confidence,
            fixed_seeds=comparison.fixed_seeds,
        )
        try:
            return compare_measured(results, mask, settings=settings)
        except UserError as error:
            # Methods with other seeds than the mask's: with the study's baseline each of them could be paired.
            raise NotComputed(f"not comparable with {mask!r}: {error}") from None

    @property
    def recipe(self) -> str | None:
        """The study's recipe, where its folder has a copy.

        Raises:
            UserError: If the copy is no text.
        """
        # A folder of runs may be shared by studies, each with its own copy. A published folder has one.
        candidates = [self.folder / layout.STUDY_RECIPE.format(self.name)]
        if not (self.folder / layout.RUNS).is_dir():
            candidates += sorted(self.folder.glob("recipe*.yaml"))
        for file in candidates:
            if not file.is_file():
                continue
            try:
                return read_text(file)
            except UnicodeDecodeError:
                raise UserError(f"{file} is not UTF-8 text: replace it by the study's recipe, or remove it") from None
        return None

    def record(self, what: str) -> dict[str, Any]:
        """Return the record of the analysis of this name.

        Raises:
            NotComputed: If it was not computed.
            UserError: If its file is not as ``maskft analyze`` writes it.
        """
        file = self.folder / layout.ANALYSIS / f"{what}.json"
        if file.is_file():
            record = read_record(file)
            self._check_mask(record, what)
            return record
        # Two reasons, because the remedies differ: an analysis needs the models.
        is_published = not any(run.models for run in self.runs)
        if is_published:
            raise NotComputed("published results hold no models, so it is computed where the study ran")
        raise NotComputed(f"there is no {layout.ANALYSIS}/{what}.json")

    def _check_mask(self, record: Mapping[str, Any], what: str) -> None:
        """Check that an analysis is of a mask of these runs: a study that is changed and run again has others."""
        settings = record.get("settings", {})
        analysed = settings.get(_MASK_OF.get(what))  # the digest of a mask's weights
        if isinstance(analysed, list):
            analysed = analysed[-1]
        folders = [run.models[BEST] for run in self.runs if run.method == MASK and BEST in run.models]
        # Published results have no models to compare with, and an analysis of all masks names their runs.
        if analysed is None or not folders:
            return
        if analysed not in [digest_folder(folder) for folder in folders]:
            raise NotComputed(f"{layout.ANALYSIS}/{what}.json is of a mask that is not among this study's runs")


def test_name(evidence: Evidence, task: str) -> str:
    """The name of a task in a picture: for the user's own rows, the file of the test set, as in tables.

    The task of a study's test is called ``heldout``, which readers would take for the rows that chose the settings.
    """
    for result in evidence.results:
        record = result["tasks"].get(task)
        if record is not None and record.get("data_file"):
            return record["data_file"]

    if task == HELDOUT:
        return "test"
    return task


def gather(
    folder: str | Path,
    *,
    base: str | None = None,
    study_name: str | None = None,
) -> Evidence:
    """Read a study's folder, or a folder of published results.

    Args:
        folder: Where they are.
        base: The base model whose runs are meant, where there are several.
        study_name: The study that is meant, where several share the folder.

    Raises:
        UserError: If there is nothing to report, or the results cannot be compared.
    """
    folder = Path(folder)
    curves = sorted(folder.glob(CURVES))
    has_runs = (folder / layout.RUNS).is_dir()
    has_summary = (folder / PUBLISHED_SUMMARY).is_file()
    if curves and not has_runs and not has_summary:
        # Of this study only the paths were published.
        with fields_of(curves[0]):
            base = read_json(curves[0])["model"]
        name = folder.resolve().name
        return Evidence(folder, name, base, runs=[], results=[])

    runs = read_study(folder, base, study_name)
    # `read_study` has chosen one base model, or has raised.
    base = runs[0].base
    name, summary = _summary(folder, study_name, base)
    with fields_of(folder):
        results = _named_results(runs, summary)
        runs = _named_runs(runs, summary)
        evidence = Evidence(folder, name, base, runs, results)

        # The comparison is read and not computed again, so that the page says what the study said.
        # The study says why it has no comparison.
        if "not_compared" in summary:
            raise UserError(f"{folder}: the study's results cannot be compared: {summary['not_compared']}")
        compared_names = {result["name"] for result in results}
        if "comparison" in summary:
            evidence.comparison = Comparison.from_dict(summary["comparison"])
        elif len(compared_names) > 1:
            evidence.notes = ["the study has written no comparison yet: finish it with maskft study"]

        evidence.notes += summary.get("notes_on_rows", [])
        for tuned in summary.get("tuning", []):
            if tuned.get("winner"):
                evidence.notes.append(_tuned_text(tuned))
        return evidence


def _named_runs(
    runs: Sequence[TrainedRun],
    summary: Mapping[str, Any],
) -> list[TrainedRun]:
    """The runs under the study's own names; the record of a run has the name of the study that made it."""
    labels = {}  # hash of a run -> name of its best model in tables
    for row in summary.get("runs", []):
        if row["role"] == BEST:
            labels[run_identity(row["run"])] = row["name"]

    named = []
    for run in runs:
        name = run.name
        label = labels.get(run_identity(run.id))
        if label is not None:
            name = plain_name(label)
            # The study's own result says what of the label is the name: a method may be called "mask (best)".
            result = run.results.get(BEST)
            if result is not None and result["name"] == label:
                name = result["study"].get("name", name)
        named.append(replace(run, name=name))
    return named


def _named_results(
    runs: Sequence[TrainedRun],
    summary: Mapping[str, Any],
) -> list[Result]:
    """The results of all runs under the study's own names: studies that share a folder share runs."""
    names = {}  # hash of the run, and role -> name
    # A study that has not finished has no summary: its results then keep their own names.
    for row in summary.get("runs", []):
        run_and_role = (run_identity(row["run"]), row["role"])
        names[run_and_role] = row["name"]

    results = []
    for run in runs:
        for result in run.results.values():
            run_id, role = _run_and_role(result)
            name = names.get((run_identity(run_id), role), result["name"])
            renamed = {**result, "name": name}  # a copy: the run keeps its own
            # mypy does not see that this is still a Result.
            results.append(cast(Result, renamed))
    return results


def _run_and_role(result: Result) -> tuple[str, str]:
    """The run of a result, and its role: the run's best model, or its last."""
    # Always there: results outside of studies belong to no run, and are not read.
    study = result["study"]
    return study["run"], study["role"]


def _summary(
    folder: Path,
    study_name: str | None,
    base: str,
) -> tuple[str, dict]:
    """Name of the study, and its summary of one base model; empty where it has none yet."""
    # A study's folder has a summary for each study that shares it, a published folder has one.
    pattern = layout.SUMMARY.format("*")
    files = sorted(folder.glob(pattern))
    if not files:
        files = list(folder.glob(PUBLISHED_SUMMARY))
    summaries = {}  # name of a study -> base model -> its summary
    for file in files:
        record = read_json(file)
        with fields_of(file):
            summaries[record["study"]] = dict(record["models"])

    if not summaries:
        # The study has not finished yet.
        return study_name or folder.resolve().name, {}

    known = ", ".join(summaries)
    if study_name is None and len(summaries) > 1:
        raise UserError(f"several studies share {str(folder)!r} ({known}): name one with --study_name")
    name = study_name or next(iter(summaries))
    if name not in summaries:
        hint = did_you_mean(name, summaries)
        raise UserError(f"no study in {str(folder)!r} is called {name!r}{hint}; there are {known}")

    models = summaries[name]
    # A study compares within each base model.
    if base in models:
        return name, models[base]
    # The same model may have another name here, such as its folder on another machine.
    if len(models) == 1:
        (summary,) = models.values()
        return name, summary
    return name, {}


def _tuned_text(tuned: Mapping) -> str:
    winner = tuned["winner"]
    settings = ", ".join(f"{name}={value}" for name, value in winner.items())
    # A summary without the number is that of a grid, which tries every setting.
    number = tuned.get("num_settings", len(tuned["trials"]))
    return f"{tuned['method']} was tuned: {settings} is the best of {number} on held-out rows"
