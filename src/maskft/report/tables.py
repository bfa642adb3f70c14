"""The paper's tables with one's own figures in them: Tables 1, 2, 4, 5, 6, 8 and 9, from result files only.

The paper's figures are in ``paper.yaml``. A result goes where its method, checkpoint, domain and base model say, which
it states in ``model.method`` and its block ``training``; what a result does not state is read from the words of its
name: ``full (last)``, ``random_mask [math]``, ``mixed mask``.
"""

from __future__ import annotations

import gzip
import json
import re
import statistics
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path

import yaml

from .. import paths
from ..errors import UserError, did_you_mean
from ..evaluation.results import Result, read_result, read_text
from ..evaluation.text_tables import Table, latex_table, latex_text, markdown_table, terminal_table

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
NO_RESULT = "–"


@dataclass(frozen=True)
class Identity:
    """Which row of the paper a result belongs to; None where the result does not say."""

    method: str | None
    checkpoint: str
    domain: str | None
    mixed: bool
    selection: str
    base: str | None


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
    """

    id: str
    title: str
    place: str
    ours: str | None
    figures: list[Figure]
    table: Table

    @property
    def caption(self) -> str:
        """The line above the table."""
        ours = self.ours or "no results"
        return f"Table {self.id} ({self.place}): {self.title}. The paper's figure / ours ({ours})"


@cache
def paper() -> dict:
    """Return the content of ``paper.yaml``."""
    return yaml.safe_load(resources.files(__package__).joinpath("paper.yaml").read_text(encoding="utf-8"))


def read_results(places: Sequence[str]) -> list[Result]:
    """Read result files, and those in folders and all folders below, where other JSON files are passed over.

    Returns:
        The results in the order of the places. A file reached twice, or a copy of one, counts once.

    Raises:
        UserError: If a place does not exist or holds no result.
    """
    results = []
    for place in map(Path, places):
        files = [place]
        if place.is_dir():
            inside = sorted([*place.rglob("*.json"), *place.rglob("*.json.gz")])
            files = [file for file in inside if _is_result(file)]
        if not files:
            raise UserError(f"{place} holds no result.json and no other result file; give a folder of results")
        for result in map(read_result, files):
            if result not in results:
                results.append(result)
    return results


def _is_result(file: Path) -> bool:
    if not file.is_file():
        return False
    if file.name == paths.RESULT:
        return True  # also a damaged one, so that reading it says so
    try:
        text = read_text(file)
        # A folder of runs is full of tokenizers, which would take long to parse.
        content = json.loads(text) if '"evaluation"' in text else None
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error):
        return False
    return isinstance(content, dict) and content.get("kind") == "evaluation"


def identify(result: Result) -> Identity | None:
    """Tell which row of the paper a result belongs to; None for a control that the paper does not have."""
    training = result.get("training") or {}
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
    candidates = _broadest_study_first(candidates)
    tables = []
    for number in ids or content["tables"]:
        fill = _epochs_table if "epochs" in content["tables"][number] else _scores_table
        tables.append(fill(number, content["tables"][number], candidates, measures or {}))
    used = {name for table in tables for figure in table.figures for name in figure.results}
    models = {_model(result) for result in results if _name(result) in used} - {None}
    left = (result for result in results if _name(result) not in used and _model(result) not in models)
    return tables, list(dict.fromkeys(map(_name, left)))


def _name(result: Result) -> str:
    """Name of a result, with its study's where it is of one."""
    return result["name"] if _study(result) is None else f"{result['name']} of {_study(result)}"


def _scores_table(number: str, spec: dict, candidates: list, measures: Mapping[str, str]) -> PaperTable:
    benchmarks = paper()["benchmarks"]
    figures: list[Figure] = []
    rows: list[tuple[str, ...]] = []
    block, bases, best = None, set(), []
    for row in spec["rows"]:
        backbone = row.get("backbone", spec.get("backbone"))
        fitting = _of_backbone(candidates, backbone)
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
            chosen = _one_per_seed(_of_one_study(chosen), place)
            scores = [score for _, _, score in chosen]
            bases |= {identity.base for identity, _, _ in chosen}
            line.append(
                Figure(
                    row=row["label"] if block is None else f"{block}: {row['label']}",
                    column=key,
                    paper=value,
                    paper_spread=spread[0] if spread else None,
                    ours=statistics.fmean(scores) if scores else None,
                    ours_spread=statistics.stdev(scores) if len(scores) > 1 else None,
                    study=_study(chosen[0][1]) if chosen else None,
                    results=[_name(result) for _, result, _ in chosen],
                )
            )
        rows.append((row["label"], *map(_score_text, line)))
        if row["method"] == "full" and "checkpoint" not in row:
            best = line
        if row.get("delta"):
            rows.append(("  against Best FFT", *map(_delta_text, line, best)))
        figures += line
    columns = ("Method", *(benchmarks[key]["label"] for key in spec["columns"]))
    return PaperTable(number, spec["title"], spec["place"], _bases(bases, figures), figures, Table(columns, rows))


def _epochs_table(number: str, spec: dict, candidates: list, measures: Mapping[str, str]) -> PaperTable:
    """Fill a table of epochs and tokens: of the best checkpoint, and of the whole run."""
    columns = {"Best FFT": ("full", False), "Continued FFT": ("full", True)}
    columns |= {"Best MFT": ("mask", False), "Complete MFT": ("mask", True)}
    figures, rows, bases = [], [], set()
    for domain, cells in spec["epochs"].items():
        line = []
        for (label, (method, complete)), (epochs, tokens) in zip(columns.items(), cells, strict=True):
            asked = {"method": method, "mixed": spec["mixed"]}
            chosen = []
            for identity, result in _of_backbone(candidates, spec["backbone"]):
                account = _account(identity, result, complete)
                if account and _fits(identity, asked | {"checkpoint": identity.checkpoint}, domain):
                    chosen.append((identity, result, account))
            place = f"{label}, {domain} of Table {number}"
            chosen = _one_per_seed(_of_one_study(chosen), place, same_value_is_fine=True)
            bases |= {identity.base for identity, _, _ in chosen}
            line.append(
                Figure(
                    row=domain,
                    column=label,
                    paper=epochs,
                    paper_tokens=tokens,
                    ours=statistics.fmean(account[0] for *_, account in chosen) if chosen else None,
                    ours_tokens=round(statistics.fmean(account[1] for *_, account in chosen)) if chosen else None,
                    study=_study(chosen[0][1]) if chosen else None,
                    results=[_name(result) for _, result, _ in chosen],
                )
            )
        rows.append((paper()["domains"][domain], *map(_epochs_text, line)))
        figures += line
    table = Table(("Domain", *columns), rows)
    return PaperTable(number, spec["title"], spec["place"], _bases(bases, figures), figures, table)


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


def _of_backbone(candidates: list, backbone: str) -> list:
    """Choose the results of the paper's base model, or, where there is none, those of one that is not in the paper."""
    theirs = [pair for pair in candidates if _backbone(pair[0].base) == backbone]
    others = [pair for pair in candidates if _backbone(pair[0].base) is None]
    bases = sorted({identity.base for identity, _ in others if identity.base})
    if not theirs and len(bases) > 1:
        raise UserError(f"the results are of several base models, {', '.join(bases)}; give those of one")
    return theirs or others


def _backbone(base: str | None) -> str | None:
    """Return the paper's name of a base model, or None for one that the paper does not use."""
    text = re.sub(r"[^a-z0-9]", "", (base or "").lower())
    return next(
        (name for word, name in (("llama27b", "LLaMA2-7B"), ("llama318b", "LLaMA3.1-8B")) if word in text), None
    )


def _broadest_study_first(candidates: list) -> list:
    """Order the results such that in each domain those of the study with most rows of the tables come first.

    So a main study goes before an ablation that has some of the same models.
    """
    rows: dict[tuple, set] = {}
    for identity, result in candidates:
        rows.setdefault((_study(result), identity.domain), set()).add((identity, result["model"]["seed"]))
    return sorted(candidates, key=lambda each: -len(rows[_study(each[1]), each[0].domain]))


def _of_one_study(chosen: list) -> list:
    """Keep the results of one study, that of the first: seeds of two studies are not seeds of one thing."""
    chosen = [each for each in chosen if each[0].domain] or chosen  # those that state their domain
    return [each for each in chosen if _study(each[1]) == _study(chosen[0][1])]


def _study(result: Result) -> str | None:
    return (result.get("study") or {}).get("study")


def _model(result: Result) -> tuple | None:
    """What tells that two results of studies are of one model: hash of the run, and which of its models it is."""
    study = result.get("study") or {}
    return (study["run"].rpartition("-")[2], study["role"]) if "run" in study and "role" in study else None


def _one_per_seed(chosen: list, place: str, same_value_is_fine: bool = False) -> list:
    """Refuse two results of one seed."""
    by_seed: dict = {}
    for each in chosen:
        # Every study measures the pre-trained model, and whatever its seed, nothing was trained.
        is_pretrained = each[0].method == "pretrained"
        other = by_seed.setdefault(None if is_pretrained else each[1]["model"]["seed"], each)
        if _model(other[1]) is not None and _model(other[1]) == _model(each[1]):
            continue  # named otherwise once
        if other is not each and not ((same_value_is_fine or is_pretrained) and other[2] == each[2]):
            names = f"{other[1]['name']!r} and {each[1]['name']!r}"
            raise UserError(
                f"{names} are of one seed and both stand for {place}; give one of them, or say in their block "
                "'training' how they differ"
            )
    return list(by_seed.values())


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
