"""The paper's tables with one's own figures in them: Tables 1, 2, 4, 5, 6, 8 and 9, from result files only.

The paper's figures are in ``paper.yaml``; which result stands where, ``table_results.py`` tells.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

import yaml

from ..errors import UserError, did_you_mean
from .schema import Result
from .table_results import (
    Identity,
    broadest_study_first,
    identify,
    model_of,
    name_of,
    of_backbone,
    of_one_study,
    one_per_seed,
    study_of,
)
from .text_tables import Table, latex_table, latex_text, markdown_table, terminal_table

NO_RESULT = "–"


@dataclass(frozen=True)
class Figure:
    """One cell: the paper's figure and ours.

    Scores are in percent; ``spread`` is what the paper writes after ±, and ours the standard deviation over seeds.
    ``study`` is the study that ours is from, None where the results are of none.
    """

    row: str
    column: str
    paper: float
    paper_spread: float | None = None
    ours: float | None = None
    ours_spread: float | None = None
    paper_tokens: int | None = None
    ours_tokens: int | None = None
    study: str | None = None
    results: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper with our figures.

    Attributes:
        id: Its number.
        title: Its caption.
        place: The section or appendix it belongs to.
        ours: The base model of our figures; None without any.
        figures: The cells that hold figures.
        table: All cells as text.
        results: The results that the figures are of.
    """

    id: str
    title: str
    place: str
    ours: str | None
    figures: list[Figure]
    table: Table
    results: list[Result] = field(repr=False)

    @property
    def caption(self) -> str:
        """The line above the table."""
        ours = self.ours or "no results"
        return f"Table {self.id} ({self.place}): {self.title}. The paper's figure / ours ({ours})"


@cache
def paper() -> dict:
    """Return the content of ``paper.yaml``."""
    return yaml.safe_load(resources.files(__package__).joinpath("paper.yaml").read_text(encoding="utf-8"))


def paper_tables(
    results: Sequence[Result], ids: Sequence[str] | None = None, measures: Mapping[str, str] | None = None
) -> tuple[list[PaperTable], list[str]]:
    """Fill the paper's tables.

    Args:
        results: Results of this schema, none at all included.
        ids: Numbers of the tables. Default: all.
        measures: Benchmark -> the task, or ``task/metric``, that measures it in these results.

    Returns:
        The tables, and the names of the results that are in none of them.

    Raises:
        UserError: If a name is unknown, or two results claim one cell.
    """
    content = paper()
    for asked in ids or ():
        if asked not in content["tables"]:
            raise UserError(f"there is no table {asked!r} here; there are {', '.join(content['tables'])}")
    for benchmark in measures or {}:
        if benchmark not in content["benchmarks"]:
            known = content["benchmarks"]
            raise UserError(f"no benchmark {benchmark!r}{did_you_mean(benchmark, known)}; there are {', '.join(known)}")
    candidates = [(identity, result) for result in results if (identity := identify(result)) is not None]
    candidates = broadest_study_first(candidates)
    tables = []
    for number in ids or content["tables"]:
        fill = _epochs_table if "epochs" in content["tables"][number] else _scores_table
        tables.append(fill(number, content["tables"][number], candidates, measures or {}))
    used = {id(result) for table in tables for result in table.results}  # others may have the same name
    models = {model_of(result) for result in results if id(result) in used} - {None}
    left = (result for result in results if id(result) not in used and model_of(result) not in models)
    return tables, list(dict.fromkeys(map(name_of, left)))


def _scores_table(number: str, spec: dict, candidates: list, measures: Mapping[str, str]) -> PaperTable:
    benchmarks = paper()["benchmarks"]
    figures: list[Figure] = []
    rows: list[tuple[str, ...]] = []
    block, bases, best, used = None, set(), [], []
    for row in spec["rows"]:
        backbone = row.get("backbone", spec.get("backbone"))
        fitting = of_backbone(candidates, backbone)
        heading = row.get("block", row.get("backbone"))
        if heading != block:
            block = heading
            rows.append((block, *[""] * len(spec["columns"])))
        line = []
        for key, (value, *spread) in zip(spec["columns"], row["scores"], strict=True):
            chosen = [
                (identity, result, score)
                for identity, result in fitting
                if _fits(identity, row, benchmarks[key]["domain"])
                and (score := _score(result, key, measures)) is not None
            ]
            place = f"{row['label']}, {benchmarks[key]['label']} of Table {number}"
            chosen = one_per_seed(of_one_study(chosen), place)
            scores = [score for _, _, score in chosen]
            used += [result for _, result, _ in chosen]
            bases |= {identity.base for identity, _, _ in chosen}
            line.append(
                Figure(
                    row=row["label"] if block is None else f"{block}: {row['label']}",
                    column=key,
                    paper=value,
                    paper_spread=spread[0] if spread else None,
                    ours=statistics.fmean(scores) if scores else None,
                    ours_spread=statistics.stdev(scores) if len(scores) > 1 else None,
                    study=study_of(chosen[0][1]) if chosen else None,
                    results=[name_of(result) for _, result, _ in chosen],
                )
            )
        rows.append((row["label"], *map(_score_text, line)))
        if row["method"] == "full" and "checkpoint" not in row:
            best = line
        if row.get("delta"):
            rows.append(("  against Best FFT", *map(_delta_text, line, best)))
        figures += line
    columns = ("Method", *(benchmarks[key]["label"] for key in spec["columns"]))
    title, place, ours = spec["title"], spec["place"], _bases(bases, figures)
    return PaperTable(number, title, place, ours, figures, Table(columns, rows), used)


def _epochs_table(number: str, spec: dict, candidates: list, measures: Mapping[str, str]) -> PaperTable:
    """Fill a table of epochs and tokens: of the best checkpoint, and of the whole run."""
    columns = {"Best FFT": ("full", False), "Continued FFT": ("full", True)}
    columns |= {"Best MFT": ("mask", False), "Complete MFT": ("mask", True)}
    figures, rows, bases, used = [], [], set(), []
    for domain, cells in spec["epochs"].items():
        line = []
        for (label, (method, complete)), (epochs, tokens) in zip(columns.items(), cells, strict=True):
            asked = {"method": method, "mixed": spec["mixed"]}
            chosen = []
            for identity, result in of_backbone(candidates, spec["backbone"]):
                account = _account(identity, result, complete)
                if account and _fits(identity, asked | {"checkpoint": identity.checkpoint}, domain):
                    chosen.append((identity, result, account))
            place = f"{label}, {domain} of Table {number}"
            chosen = one_per_seed(of_one_study(chosen), place, same_value_is_fine=True)
            used += [result for _, result, _ in chosen]
            bases |= {identity.base for identity, _, _ in chosen}
            line.append(
                Figure(
                    row=domain,
                    column=label,
                    paper=epochs,
                    paper_tokens=tokens,
                    ours=statistics.fmean(account[0] for *_, account in chosen) if chosen else None,
                    ours_tokens=round(statistics.fmean(account[1] for *_, account in chosen)) if chosen else None,
                    study=study_of(chosen[0][1]) if chosen else None,
                    results=[name_of(result) for _, result, _ in chosen],
                )
            )
        rows.append((paper()["domains"][domain], *map(_epochs_text, line)))
        figures += line
    table = Table(("Domain", *columns), rows)
    return PaperTable(number, spec["title"], spec["place"], _bases(bases, figures), figures, table, used)


def _account(identity: Identity, result: Result, complete: bool) -> tuple[float, int] | None:
    """Return epochs and tokens until the best checkpoint or until the end of the run, if the result states them."""
    training = result.get("training") or {}
    if complete and identity.checkpoint == "best":
        keys = ("complete_num_epochs", "complete_num_train_tokens")
    elif complete == (identity.checkpoint == "last"):
        keys = ("num_epochs", "num_train_tokens")
    else:
        return None
    epochs, tokens = map(training.get, keys)
    return None if epochs is None or tokens is None else (epochs, tokens)


def _fits(identity: Identity, row: dict, domain: str) -> bool:
    """Whether a result belongs into a row, in a column of ``domain``."""
    if identity.method != row["method"]:
        return False
    if identity.method == "pretrained":
        return True
    if identity.checkpoint != row.get("checkpoint", "best") or identity.mixed != row["mixed"]:
        return False
    if identity.selection != row.get("selection", "topk"):
        return False
    if "domain" in row:  # a row for the models of one domain, on the benchmarks of all
        return identity.domain == row["domain"]
    return identity.domain in (domain, None)


def _score(result: Result, benchmark: str, measures: Mapping[str, str]) -> float | None:
    """Return what a result measured on a benchmark, in percent, or None; refuse what is no fraction."""
    spec = paper()["benchmarks"][benchmark]
    task, _, metric = measures.get(benchmark, "").partition("/")
    for name in [task] if task else spec["tasks"]:
        metrics = result["tasks"].get(name, {}).get("metrics", {})
        for known in [metric] if metric else spec["metrics"]:
            if known in metrics and metrics[known]["value"] is not None:
                if metrics[known]["unit"] != "fraction":
                    raise UserError(
                        f"{name}/{known} of {result['name']!r} has the unit {metrics[known]['unit']}, and scores stand "
                        f"in percent; measure {benchmark} by a fraction, such as {name}/accuracy"
                    )
                return 100.0 * metrics[known]["value"]
    return None


def _score_text(figure: Figure) -> str:
    theirs = f"{figure.paper:.1f}" + (f" ± {figure.paper_spread:.2f}" if figure.paper_spread is not None else "")
    if figure.ours is None:
        return f"{theirs} / {NO_RESULT}"
    return f"{theirs} / {figure.ours:.1f}" + (f" ± {figure.ours_spread:.2f}" if figure.ours_spread is not None else "")


def _delta_text(figure: Figure, best: Figure) -> str:
    theirs = f"{figure.paper - best.paper:+.1f}"
    # Of two studies, they may be of two models.
    is_known = None not in (figure.ours, best.ours) and figure.study == best.study
    return f"{theirs} / " + (f"{figure.ours - best.ours:+.1f}" if is_known else NO_RESULT)


def _epochs_text(figure: Figure) -> str:
    theirs = f"{figure.paper:.1f} epochs ({_tokens_text(figure.paper_tokens)})"
    if figure.ours is None:
        return f"{theirs} / {NO_RESULT}"
    return f"{theirs} / {figure.ours:.1f} ({_tokens_text(figure.ours_tokens)})"


def _tokens_text(tokens: int) -> str:
    mantissa, _, exponent = f"{tokens:.2e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def _bases(bases: set, figures: Sequence[Figure]) -> str | None:
    if all(figure.ours is None for figure in figures):
        return None
    return ", ".join(sorted(base or "a base model that is not stated" for base in bases))


def render_tables(tables: Sequence[PaperTable], left_over: Sequence[str], output_format: str) -> str:
    """Return tables as text in one of `FORMATS`."""
    return FORMATS[output_format](tables, left_over)


def _left_over_text(left_over: Sequence[str]) -> list[str]:
    return [f"In none of these tables: {', '.join(left_over)}."] if left_over else []


def _to_terminal(tables: Sequence[PaperTable], left_over: Sequence[str]) -> str:
    parts = [f"{table.caption}\n{terminal_table(table.table)}" for table in tables]
    return "\n".join([*parts, *_left_over_text(left_over)]).rstrip() + "\n"


def _to_markdown(tables: Sequence[PaperTable], left_over: Sequence[str]) -> str:
    parts = [f"**{table.caption}**\n\n{markdown_table(table.table)}\n" for table in tables]
    return "\n".join([*parts, *_left_over_text(left_over)]).rstrip() + "\n"


def _to_latex(tables: Sequence[PaperTable], left_over: Sequence[str]) -> str:
    parts = [f"% {latex_text(table.caption)}\n{latex_table(table.table)}\n" for table in tables]
    return "\n".join([*parts, *(f"% {line}" for line in _left_over_text(left_over))]).rstrip() + "\n"


def _to_json(tables: Sequence[PaperTable], left_over: Sequence[str]) -> str:
    record = {
        "tables": [
            {"table": t.id, "title": t.title, "place": t.place, "ours": t.ours, "figures": [vars(f) for f in t.figures]}
            for t in tables
        ],
        "in_none": list(left_over),
    }
    return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


FORMATS = {"terminal": _to_terminal, "markdown": _to_markdown, "latex": _to_latex, "json": _to_json}
