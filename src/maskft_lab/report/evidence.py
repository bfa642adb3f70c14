"""What a report is made from: runs, results, the comparison with its verdicts, training histories and arrays."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from maskft_base import files
from maskft_base.errors import UserError, did_you_mean
from maskft_base.files import parse_json, read_json

from ..analysis.ablations import analyse_ablations
from ..analysis.curves import analyse_cost, analyse_curves
from ..analysis.runs import BEST, LAST, TrainedRun, read_study, select_base
from ..results.compare import compare
from ..results.comparison import Comparison, Difference, Settings
from ..results.reading import read_results
from ..results.schema import Result

PUBLISHED_SUMMARY = "summary.json"
# Analyses that read files only are made anew for each report; the others need models and are read as they were written.
_OF_FILES: dict[str, Callable[..., None]] = {
    "curves": analyse_curves,
    "cost": analyse_cost,
    "ablations": analyse_ablations,
}
_OF_MODELS = {  # with a key that each must have
    "masks": "agreement",
    "landscape": "surfaces",
    "curvature": "mask_all",
    "bound": "masked_matrices",
}
MASK = "mask"


@dataclass(frozen=True)
class Trained:
    """The training of one run: held-out losses and scores against its own steps."""

    name: str
    method: str
    seed: int | None
    is_start: bool
    summary: dict[str, Any]


@dataclass
class Evidence:
    """All that is known of a study.

    Attributes:
        folder: The study's.
        name: Its name.
        base: The pre-trained model.
        runs: Finished runs; empty where the results are of no study.
        results: Role and run -> result; of results of no study, a number and their name.
        comparison: Every model against the baseline; None where there is one model only.
        notes: What the reader must know besides.
        methods: Name of a model -> its method, and whether others start from it (or from nothing).
        accounts: Rows of the study's summary: run, role, steps, epochs, tokens.
        trained: What was trained, in the order of the summary.
        arrays: Analysis -> what ``maskft analyze`` writes.
        reasons: Analysis -> why it is not there.
    """

    folder: Path
    name: str
    base: str
    runs: list[TrainedRun]
    results: dict[tuple[str, str], Result]
    comparison: Comparison | None = None
    notes: list[str] = field(default_factory=list)
    methods: dict[str, tuple[str | None, bool]] = field(default_factory=dict)
    accounts: list[dict] = field(default_factory=list)
    trained: list[Trained] = field(default_factory=list)
    arrays: dict[str, dict] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def masks(self) -> list[str]:
        """Names of the learned masks that are compared."""
        methods = self.comparison.methods if self.comparison else []
        return [name for name in methods if self.methods.get(name, ("", False))[0] == MASK]

    @property
    def differences(self) -> list[Difference]:
        """Every difference that is judged: of metrics, then of averages over tasks."""
        return [*self.comparison.differences, *self.comparison.averages] if self.comparison else []

    def results_of(self, name: str) -> list[Result]:
        """Results of one model, by seed."""
        found = [result for result in self.results.values() if result["name"] == name]
        return sorted(found, key=lambda result: result["model"]["seed"] or 0)


def gather(
    folder: str | Path,
    *,
    base: str | None = None,
    study_name: str | None = None,
    baseline: str | None = None,
    analysis: str | Path | None = None,
) -> Evidence:
    """Read a study's folder, or a folder of published results.

    Args:
        folder: Where they are.
        base: The base model whose runs are meant, where there are several.
        study_name: The study that is meant, where several share the folder.
        baseline: Compare with this model instead of the study's baseline.
        analysis: Folder of the files of ``maskft analyze``. Default: ``analysis`` in the folder.

    Raises:
        UserError: If there is nothing to report, results do not fit each other, or an array holds NaN.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} is not a folder; name the output_dir of a study, or a folder of results")
    if not _is_study(folder):
        evidence = _of_results(folder, base)
        evidence.comparison = _compared(list(evidence.results.values()), baseline)
        evidence.reasons = dict.fromkeys((*_OF_FILES, *_OF_MODELS), "these results are of no study")
        return evidence
    runs = select_base(read_study(folder), base)
    name, summary = _summary(folder, study_name, runs[0].base)
    runs += _runs_without_result(folder, summary.get("runs", []), runs)
    results = {(run.id, role): result for run in runs for role, result in run.results.items()}
    evidence = Evidence(folder, name, runs[0].base, runs, results, accounts=summary.get("runs", []))
    _name_as_in_summary(evidence)
    evidence.accounts = [*evidence.accounts, *_accounts_of(evidence)]
    _set_methods(evidence)
    if baseline is None and "not_compared" in summary:
        raise UserError(f"{folder}: the study's results cannot be compared: {summary['not_compared']}")
    if baseline is None and "comparison" in summary:
        evidence.comparison = Comparison.from_dict(summary["comparison"])
    else:
        starts = {run.start for run in runs if run.method == MASK}
        started_from = [result for (run, _), result in results.items() if run in starts]
        is_fixed = summary.get("comparison", {}).get("fixed_seeds", False)
        evidence.comparison = _compared(list(evidence.results.values()), baseline, started_from, is_fixed)
        if baseline is None and evidence.comparison:
            evidence.notes = ["the study has written no comparison yet; this one is of the results that there are"]
    evidence.notes += [_tuned_text(tuned) for tuned in summary.get("tuning", []) if tuned.get("winner")]
    _set_arrays(evidence, Path(analysis) if analysis else folder / files.ANALYSIS)
    return evidence


def _is_study(folder: Path) -> bool:
    if (folder / files.RUNS).is_dir() or (folder / PUBLISHED_SUMMARY).is_file():
        return True
    return any('"study":' in files.read_text(file)[:5000] for file in sorted(folder.glob("*.json*"))[:1])


def _of_results(folder: Path, base: str | None) -> Evidence:
    """Results of no study: each by its name and seed."""
    results = read_results([folder])
    bases = dict.fromkeys(b for result in results if (b := result.get("training", {}).get("base")))
    if base is not None and base not in bases:
        raise UserError(f"no base model is called {base!r}{did_you_mean(base, bases)}; there are {', '.join(bases)}")
    if base is None and len(bases) > 1:
        raise UserError(
            f"results of different base models cannot be compared ({', '.join(bases)}): name one with --base"
        )
    base = base or next(iter(bases), None)
    chosen = [result for result in results if base in (None, result.get("training", {}).get("base", base))]
    evidence = Evidence(folder, folder.resolve().name, base or chosen[0]["model"]["name_or_path"], [], {})
    for index, result in enumerate(chosen):
        method = result["model"]["method"] or ("pretrained" if result["name"] in ("base", "pre-trained") else None)
        evidence.results[result["name"], str(index)] = result
        evidence.methods[result["name"]] = (method, "restart" not in result["name"])
    return evidence


def _summary(folder: Path, study_name: str | None, base: str) -> tuple[str, dict]:
    """Name of the study, and its summary of one base model; empty where it has none yet."""
    found = [folder / PUBLISHED_SUMMARY] if (folder / PUBLISHED_SUMMARY).is_file() else []
    found = sorted(folder.glob(files.SUMMARY.format("*"))) or found
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
    return name, models[base] if base in models else next(iter(models.values())) if len(models) == 1 else {}


def _runs_without_result(folder: Path, rows: list[dict], runs: list[TrainedRun]) -> list[TrainedRun]:
    """Runs of a published folder of which the training and the row in the summary are there, and no result file.

    A row does not name the run that it started from. It is the one of its seed after which so many tokens had been
    spent as this run begins with; where that is not exactly one, the run is left out.
    """
    published, known = folder / files.TRAINING, {run.id for run in runs}
    summaries: dict[str, dict] = read_json(published) if published.is_file() else {}
    found = []
    for row in rows:
        if row["run"] in known or row["run"] not in summaries or row["role"] != BEST:
            continue
        before = row["total_tokens"] - row["tokens"]
        starts = {r["run"] for r in rows if (r["seed"], r["role"], r["total_tokens"]) == (row["seed"], BEST, before)}
        starts = {run for run in starts - {row["run"]} if summaries.get(run, {}).get("num_steps")}
        starts = {run for run in starts if not any(run == r["run"] and r["tokens"] == 0 for r in rows)}
        if before and len(starts) != 1:
            continue
        name, summary = row["name"].removesuffix(f" ({BEST})"), summaries[row["run"]]
        start = next(iter(starts)) if before else None
        found.append(TrainedRun(row["run"], name, summary["method"], row["seed"], runs[0].base, start, summary=summary))
    return found


def _accounts_of(evidence: Evidence) -> list[dict]:
    """Rows, as in the summary, of results that are not in it: those of a study that is not finished."""
    known = {(row["run"], row["role"]) for row in evidence.accounts}
    keys = ("run", "role", "best_step", "num_steps", "epochs", "tokens", "total_epochs", "total_tokens")
    return [
        {"name": result["name"], "seed": result["model"]["seed"]}
        | {key: result["study"][key] for key in keys}
        | {
            "metrics": {
                f"{t}/{m}": v["value"] for t, task in result["tasks"].items() for m, v in task["metrics"].items()
            }
        }
        for key, result in evidence.results.items()
        if key not in known
    ]


def _name_as_in_summary(evidence: Evidence) -> None:
    """Give results the names of the summary, and check that both hold the same numbers."""
    rows = {(row["run"], row["role"]): row for row in evidence.accounts}
    for key, result in evidence.results.items():
        if key not in rows:
            continue
        row, tasks = rows[key], cast(dict[str, Any], result["tasks"])
        evidence.results[key] = result | {"name": row["name"]}
        for place, value in row["metrics"].items():
            task, _, metric = place.rpartition("/")
            own = tasks.get(task, {}).get("metrics", {}).get(metric, {}).get("value")
            both_none = own is None and value is None
            if not both_none and (own is None or value is None or not math.isclose(own, value, rel_tol=1e-9)):
                raise UserError(
                    f"{place} of {row['name']!r} seed {row['seed']} is {value} in the summary and {own} in its result: "
                    "finish the study again with maskft study, which reads all results anew"
                )


def _set_methods(evidence: Evidence) -> None:
    """Tell the method of every model that is compared or was trained, and which are starts of others."""
    published = evidence.folder / files.TRAINING
    summaries: dict[str, dict] = read_json(published) if published.is_file() else {}
    known = {run.id: run for run in evidence.runs}
    starts = {run.start for run in evidence.runs} | {run.id for run in evidence.runs if run.start is None}
    for row in evidence.accounts:
        run, summary = known.get(row["run"]), summaries.get(row["run"], {})
        method = run.method if run else summary.get("method") or ("pretrained" if not row.get("num_steps") else None)
        is_start = row["run"] in starts
        evidence.methods.setdefault(row["name"], (method, is_start))
        history = (run.summary if run else None) or summary
        if row["role"] == BEST and any("eval_loss" in each and "step" in each for each in history.get("history", [])):
            name = row["name"].removesuffix(f" ({BEST})")
            evidence.trained.append(Trained(name, method, row["seed"], is_start, history))


def _compared(
    results: list[Result], baseline: str | None, started_from: Sequence[Result] = (), fixed_seeds: bool = False
) -> Comparison | None:
    """Compare with the baseline.

    By default that is the best of the first full fine-tuning, one that masks were started from (``started_from``)
    before others, else the first result.
    """
    names = list(dict.fromkeys(result["name"] for result in results))
    if len(names) < 2 and baseline is None:
        return None
    full = [r for r in (*started_from, *results) if r["model"]["method"] == "full" and not _is_last(r)]
    return compare(results, baseline or (full or results)[0]["name"], settings=Settings(fixed_seeds=fixed_seeds))


def _is_last(result: Result) -> bool:
    """Whether a result is of the end of a training that had a better checkpoint."""
    roles = (result.get("study", {}).get("role"), result.get("training", {}).get("checkpoint"))
    return LAST in roles or "continued" in result["name"]


def _tuned_text(tuned: Mapping) -> str:
    settings = ", ".join(f"{name}={value}" for name, value in tuned["winner"].items())
    number = tuned.get("num_settings", len(tuned["trials"]))  # a summary without it is of a grid
    return f"{tuned['method']} was tuned: {settings} is the best of {number} on held-out rows"


def _set_arrays(evidence: Evidence, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        for name, analyse in _OF_FILES.items():
            file = Path(temporary) / f"{name}.json"
            try:
                analyse(file, evidence.runs)
            except UserError as error:
                evidence.reasons[name] = str(error)
            else:
                evidence.arrays[name] = read_array(file)
    for name, key in _OF_MODELS.items():
        file = folder / f"{name}.json"
        if not file.is_file():
            evidence.reasons[name] = f"there is no {folder.name}/{name}.json"
            continue
        record = read_array(file)
        if key not in record:
            raise UserError(f"{file} is no file of maskft analyze: it has no {key!r}; compute it again")
        evidence.arrays[name] = record


def read_array(file: Path) -> dict:
    """What an analysis wrote.

    Raises:
        UserError: If it is no JSON or holds NaN or infinity.
    """

    def refuse(constant: str):
        raise UserError(f"{file} holds {constant}: remove it and compute it again with maskft analyze")

    try:
        record = parse_json(file.read_text(encoding="utf-8"), parse_constant=refuse)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}): remove it and compute it again with maskft analyze") from error
    if not isinstance(record, dict):
        raise UserError(f"{file} is no file of maskft analyze: remove it and compute it again")
    return record


def seeds_of(evidence: Evidence) -> Sequence[int]:
    """Training seeds of the results."""
    return sorted({r["model"]["seed"] for r in evidence.results.values() if r["model"]["seed"] is not None})
