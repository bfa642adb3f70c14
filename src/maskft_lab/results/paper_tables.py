"""The paper's tables with one's own figures in them: Tables 1, 2, 4, 5, 6, 8 and 9, from result files only.

The paper's figures are in ``paper.yaml``. A result stands where its method, checkpoint, domain and base model belong,
which it states in ``model.method`` and its block ``training``; what it does not state is read from the words of its
name: ``full (last)``, ``random_mask [math]``, ``mixed mask``. A cell is of one study and of one result per seed.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, NamedTuple, cast

import yaml

from maskft_base.errors import UserError, did_you_mean, printable

from .schema import Result
from .text import Table, draw, latex_text, markdown_text, to_json, wrap

NO_RESULT = "–"

# A word of a name -> the method it stands for; of several, the first.
METHOD_WORDS = {
    "random": "random_mask",
    "l1": "l1_mask",
    "lora": "lora",
    "mask": "mask",
    "mft": "mask",
    "full": "full",
    "fft": "full",
    "base": "pretrained",
    "pretrained": "pretrained",
}
DOMAIN_WORDS = {"math": "math", "coding": "coding", "code": "coding", "instruction": "instruction", "if": "instruction"}
LAST_WORDS = {"last", "continued", "complete", "end"}
MIXED_WORDS = {"mixed", "mix", "multi"}
GLOBAL_WORDS = {"global", "threshold"}
CONTROL_WORDS = {"warm", "restart", "annealed", "anneal", "partial", "wanda", "control"}
BACKBONES = {"llama27b": "LLaMA2-7B", "llama318b": "LLaMA3.1-8B"}  # in a base model's name -> the paper's name

Value = tuple[float, ...]  # what a result puts into a cell: a score in percent, or epochs and tokens


class Identity(NamedTuple):
    """Which row of the paper a result belongs to; None where the result does not say."""

    method: str | None
    checkpoint: str
    domain: str | None
    mixed: bool
    selection: str
    base: str | None


class Candidate(NamedTuple):
    """A result that may stand in a table, and its value in the cell that is being filled."""

    identity: Identity
    result: Result
    value: Value = ()


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
    paper_tokens: float | None = None
    ours_tokens: int | None = None
    study: str | None = None
    results: list[str] = field(default_factory=list[str])


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
def paper() -> dict[str, Any]:
    """Return the content of ``paper.yaml``."""
    text = resources.files(__package__).joinpath("paper.yaml").read_text(encoding="utf-8")
    return cast(dict[str, Any], yaml.safe_load(text))


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
    specs, known = paper()["tables"], paper()["benchmarks"]
    for asked in ids or ():
        if asked not in specs:
            raise UserError(f"there is no table {asked!r} here; there are {', '.join(specs)}")
    for benchmark in measures or {}:
        if benchmark not in known:
            raise UserError(f"no benchmark {benchmark!r}{did_you_mean(benchmark, known)}; there are {', '.join(known)}")
    candidates = _main_study_first([Candidate(i, result) for result in results if (i := identify(result)) is not None])
    tables = [_fill(number, candidates, measures or {}) for number in ids or specs]
    used = {id(result) for table in tables for result in table.results}  # others may have the same name
    models = {_model_of(result) for result in results if id(result) in used} - {None}
    left = [result for result in results if id(result) not in used and _model_of(result) not in models]
    return tables, list(dict.fromkeys(map(_name_of, left)))


def render_tables(tables: Sequence[PaperTable], left_over: Sequence[str], output_format: str) -> str:
    """Return tables as text: ``terminal``, ``markdown``, ``latex`` or ``json``."""
    if output_format == "json":
        keys = ("title", "place", "ours")
        records = [
            {"table": t.id, **{key: getattr(t, key) for key in keys}, "figures": [vars(figure) for figure in t.figures]}
            for t in tables
        ]
        return to_json({"tables": records, "in_none": list(left_over)})
    parts: list[str] = []
    for table in tables:
        text = table.caption
        caption = {"markdown": f"**{markdown_text(text)}**\n", "latex": f"% {latex_text(text)}"}
        parts.append(f"{caption.get(output_format) or wrap(printable(text))}\n{draw(table.table, output_format)}")
    if left_over:
        text = printable(f"In none of these tables: {', '.join(left_over)}.")
        parts.append({"terminal": wrap(text), "markdown": markdown_text(text), "latex": f"% {text}"}[output_format])
    return "\n".join(parts).rstrip() + "\n"


# Which results there are


def identify(result: Result) -> Identity | None:
    """Tell which row of the paper a result belongs to; None for a control that the paper does not have."""
    training = result.get("training", {})
    words = re.findall(r"[a-z0-9]+", re.sub(r"\bpre[ _-]trained", "pretrained", result["name"].lower()))
    if training.get("variant") or CONTROL_WORDS.intersection(words):
        return None
    mixed = training.get("mixed")
    named = next((method for word, method in METHOD_WORDS.items() if word in words), None)
    if training.get("num_train_tokens") == 0:
        named = "pretrained"
    return Identity(
        method=result["model"]["method"] or named,
        checkpoint=training.get("checkpoint") or ("last" if LAST_WORDS.intersection(words) else "best"),
        domain=training.get("domain") or next((DOMAIN_WORDS[word] for word in words if word in DOMAIN_WORDS), None),
        mixed=bool(MIXED_WORDS.intersection(words)) if mixed is None else mixed,
        selection=training.get("selection") or ("threshold" if GLOBAL_WORDS.intersection(words) else "topk"),
        base=training.get("base"),
    )


def _main_study_first(candidates: list[Candidate]) -> list[Candidate]:
    """Order by how many rows of the tables their study has in their domain: a main study goes before an ablation."""
    rows: dict[tuple[str | None, str | None], set[tuple[Identity, int | None]]] = {}
    for identity, result, _ in candidates:
        rows.setdefault((_study_of(result), identity.domain), set()).add((identity, result["model"]["seed"]))
    return sorted(candidates, key=lambda each: -len(rows[_study_of(each.result), each.identity.domain]))


def _study_of(result: Result) -> str | None:
    return result.get("study", {}).get("study")


def _model_of(result: Result) -> tuple[str, str] | None:
    """What tells that two results of studies are of one model: hash of the run, and which of its models it is."""
    study = result.get("study", {})
    return (study["run"].rpartition("-")[2], study["role"]) if "run" in study and "role" in study else None


def _name_of(result: Result) -> str:
    study = _study_of(result)
    return result["name"] if study is None else f"{result['name']} of {study}"


# Which of them stand in a cell


def _choose(candidates: Iterable[Candidate], asked: Mapping[str, Any], measures: Mapping[str, str]) -> list[Candidate]:
    """Return the results of one study, one per seed, that have a value for what a row and a column ask for."""
    fitting = [
        candidate._replace(value=value)
        for candidate in candidates
        if _fits(candidate.identity, asked) and (value := _value(candidate, asked, measures))
    ]
    fitting = [each for each in fitting if each.identity.domain] or fitting  # those that state their domain
    fitting = [each for each in fitting if _study_of(each.result) == _study_of(fitting[0].result)]
    by_seed: dict[int | None, Candidate] = {}
    for each in fitting:
        # Every study measures the pre-trained model, and whatever its seed, nothing was trained.
        is_pretrained = each.identity.method == "pretrained"
        key = None if is_pretrained else each.result["model"]["seed"]
        other = by_seed.setdefault(key, each)
        if _model_of(other.result) is not None and _model_of(other.result) == _model_of(each.result):
            # Two evaluations of one model, by a study that changed: the newest counts.
            by_seed[key] = max(other, each, key=lambda one: one.result["created"])
        elif other is not each and not (other.value == each.value and (is_pretrained or "complete" in asked)):
            raise UserError(
                f"{other.result['name']!r} and {each.result['name']!r} are of one seed and both stand for "
                f"{asked['place']}; give one of them, or say in their block 'training' how they differ"
            )
    return list(by_seed.values())


def _fits(identity: Identity, asked: Mapping[str, Any]) -> bool:
    if identity.method != asked["method"] or identity.method == "pretrained":
        return bool(identity.method == asked["method"])
    if (identity.mixed, identity.selection) != (asked["mixed"], asked.get("selection", "topk")):
        return False
    if asked.get("checkpoint", "best") not in (identity.checkpoint, "any"):
        return False
    return identity.domain in ([asked["trained_on"]] if "trained_on" in asked else [asked["domain"], None])


def _of_backbone(candidates: list[Candidate], backbone: str) -> list[Candidate]:
    """Choose the results of the paper's base model, or, where there is none, those of one that is not in the paper."""
    theirs = [each for each in candidates if _backbone(each.identity.base) == backbone]
    others = [each for each in candidates if _backbone(each.identity.base) is None]
    bases = sorted({each.identity.base for each in others if each.identity.base})
    if not theirs and len(bases) > 1:
        raise UserError(f"the results are of several base models, {', '.join(bases)}; give those of one")
    return theirs or others


def _backbone(base: str | None) -> str | None:
    text = re.sub(r"[^a-z0-9]", "", (base or "").lower())
    return next((name for word, name in BACKBONES.items() if word in text), None)


# The tables


def _fill(number: str, candidates: list[Candidate], measures: Mapping[str, str]) -> PaperTable:
    spec, columns = paper()["tables"][number], paper()["benchmarks"] | paper()["runs"]
    figures: list[Figure] = []
    rows: list[tuple[str, ...]] = []
    used: list[Candidate] = []
    best: list[Figure] = []
    block = None
    for row in spec["rows"]:
        fitting = _of_backbone(candidates, row.get("backbone", spec.get("backbone")))
        heading = row.get("block", row.get("backbone"))
        if heading != block:
            block = heading
            rows.append((block, *[""] * len(spec["columns"])))
        line: list[Figure] = []
        for key, cell in zip(spec["columns"], row["cells"], strict=True):
            place = f"{row['label']}, {columns[key]['label']} of Table {number}"
            chosen = _choose(fitting, columns[key] | row | {"column": key, "place": place}, measures)
            label = row["label"] if block is None else f"{block}: {row['label']}"
            line.append(_figure(label, key, cell, chosen))
            used += chosen
        rows.append((row["label"], *map(_figure_text, line)))
        if row.get("method") == "full" and "checkpoint" not in row:
            best = line
        if row.get("delta"):
            rows.append(("  against Best FFT", *map(_delta_text, line, best)))
        figures += line
    names = (
        spec.get("heading", "Method"),
        *(_head(key, columns[key]["label"], spec, figures, used) for key in spec["columns"]),
    )
    bases = sorted({each.identity.base or "a base model that is not stated" for each in used})
    results = [each.result for each in used]
    ours = ", ".join(bases) or None
    return PaperTable(number, spec["title"], spec["place"], ours, figures, Table(names, rows), results)


def _head(
    column: str, label: str, spec: Mapping[str, Any], figures: Iterable[Figure], used: Iterable[Candidate]
) -> str:
    """Head of a column; it names our model where that is not the paper's, which stands above it."""
    names = {name for figure in figures if figure.column == column for name in figure.results}
    bases = {each.identity.base for each in used if _name_of(each.result) in names}
    others = sorted(base or "a base model that is not stated" for base in bases if _backbone(base) is None)
    return f"{label}, {spec.get('backbone', 'paper')} / {', '.join(others)}" if others else label


def _figure(row: str, column: str, cell: list[float], chosen: Sequence[Candidate]) -> Figure:
    """Return a cell: of a score with its spread over seeds, of epochs with their tokens."""
    of_paper = dict(zip(("paper", "paper_tokens" if column in paper()["runs"] else "paper_spread"), cell, strict=False))
    means = [statistics.fmean(numbers) for numbers in zip(*(each.value for each in chosen), strict=True)]
    is_score = len(means) == 1
    return Figure(
        row=row,
        column=column,
        **of_paper,
        ours=means[0] if means else None,
        ours_spread=statistics.stdev(each.value[0] for each in chosen) if is_score and len(chosen) > 1 else None,
        ours_tokens=round(means[1]) if len(means) == 2 else None,
        study=_study_of(chosen[0].result) if chosen else None,
        results=[_name_of(each.result) for each in chosen],
    )


def _value(candidate: Candidate, asked: Mapping[str, Any], measures: Mapping[str, str]) -> Value | None:
    """Return what a result has for a cell: a score in percent, or epochs and tokens; None for nothing."""
    if "complete" in asked:
        return _account(candidate, asked["complete"])
    task, _, metric = measures.get(asked["column"], "").partition("/")
    tasks = candidate.result["tasks"]
    for name in [task] if task else asked["tasks"]:
        metrics = tasks[name]["metrics"] if name in tasks else {}
        for known in [metric] if metric else asked["metrics"]:
            if known in metrics and (value := metrics[known]["value"]) is not None:
                if metrics[known]["unit"] != "fraction":
                    raise UserError(
                        f"{name}/{known} of {candidate.result['name']!r} has the unit {metrics[known]['unit']}, and "
                        f"scores stand in percent; measure {asked['column']} by a fraction, such as {name}/accuracy"
                    )
                return (100.0 * value,)
    return None


def _account(candidate: Candidate, complete: bool) -> Value | None:
    """Return epochs and tokens until the best checkpoint or until the end of the run, if the result states them."""
    training = candidate.result.get("training", {})
    epochs, tokens = training.get("num_epochs"), training.get("num_train_tokens")
    if complete and candidate.identity.checkpoint == "best":
        epochs, tokens = training.get("complete_num_epochs"), training.get("complete_num_train_tokens")
    elif complete != (candidate.identity.checkpoint == "last"):
        return None
    return None if epochs is None or tokens is None else (epochs, tokens)


def _figure_text(figure: Figure) -> str:
    theirs, ours = f"{figure.paper:.1f}", NO_RESULT if figure.ours is None else f"{figure.ours:.1f}"
    if figure.paper_tokens is not None:
        ours += "" if figure.ours_tokens is None else f" ({_tokens_text(figure.ours_tokens)})"
        return f"{theirs} epochs ({_tokens_text(figure.paper_tokens)}) / {ours}"
    theirs += "" if figure.paper_spread is None else f" ± {figure.paper_spread:.2f}"
    return f"{theirs} / {ours}" + ("" if figure.ours_spread is None else f" ± {figure.ours_spread:.2f}")


def _delta_text(figure: Figure, best: Figure) -> str:
    theirs = f"{figure.paper - best.paper:+.1f}"
    # Figures of two studies may be of two models.
    if figure.ours is None or best.ours is None or figure.study != best.study:
        return f"{theirs} / {NO_RESULT}"
    return f"{theirs} / {figure.ours - best.ours:+.1f}"


def _tokens_text(tokens: float) -> str:
    mantissa, _, exponent = f"{tokens:.2e}".partition("e")
    return f"{mantissa}e{int(exponent)}"
