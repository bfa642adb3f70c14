"""Layer group and sparsity of a mask, chosen by short probes on training data: successive halving over study runs.

The training data is cut in three, by prompts. What the fine-tuned model was trained on trains the probes; of the rows
held out from it a part ranks the candidates, and only the winner is measured on the others. No test item is read.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from maskft_base import files
from maskft_base.errors import UserError
from maskft_base.files import write_text

from ..results.schema import TaskRecord, read_result
from ..results.statistics import weighted_mean
from ..results.text import Table, draw
from .execute import Study, prepare_base
from .halving import survivors
from .launchers import Launcher
from .plan import BEST, Plan, StudyRun
from .recipe import Recipe
from .search_recipe import CACHE, NO_MASK, OF_DATA, PARTS, Candidate, Search
from .study import locked, make_all, refuse_failed


def run_search(
    search: Search, folder: str | Path, check: Callable[[Recipe], Plan], console: Console | None = None
) -> dict[str, Any]:
    """Make the probes of each rung, keep one in ``factor``, and measure the winner on rows that did not choose it.

    Args:
        search: What to try.
        folder: The search's folder; finished probes in it are not repeated.
        check: Expands a recipe into runs and checks their options (``cli.study.check``).
        console: Where to print; default stdout.

    Returns:
        What ``search.json`` holds.

    Raises:
        UserError: If a probe failed, or its loss is not finite.
    """
    console = console or Console()
    with locked(folder) as (folder, lock_fd):

        def measured(recipe: Recipe) -> tuple[Study, Plan]:
            """Make the runs of a rung that are not finished."""
            study, plan = Study(folder, recipe, lock_fd), check(recipe)
            refuse_failed(make_all(study, plan, Launcher(), console))
            return study, plan

        base = check(search.recipe)
        study = Study(folder, search.recipe, lock_fd)
        prepare_base(study, base.runs)
        rows = _split(search, study, base)
        candidates, rungs = search.candidates, []
        for number, steps in enumerate(search.steps, start=1):
            said = f"rung {number} of {len(search.steps)}: {len(candidates)} candidates, {steps} steps each"
            console.print(said, highlight=False)
            rungs.append(_rung_record(*measured(search.rung(candidates, steps, folder)), candidates, steps))
            candidates = _kept(rungs[-1]["candidates"], candidates, search.settings.factor)
            _drop_caches(folder, {str(min(candidate.layers)) for candidate in candidates})
        (winner,) = candidates
        recipe = search.rung([winner], search.steps[-1], folder)
        report = search.evaluation(str(search.part_file(folder, "report")))
        record = {
            "version": 1,
            "name": search.recipe.name,
            "model": search.recipe.models[0],
            "seeds": search.recipe.seeds,
            "rows": rows,
            "rungs": rungs,
            "winner": winner.options,
            "on_rows_that_chose_it": _gain(*measured(recipe)),
            "on_rows_that_did_not": _gain(*measured(recipe.model_copy(update={"evaluation": report}))),
        }
        shutil.rmtree(folder / CACHE, ignore_errors=True)
        write_text(folder / files.WINNER, _winner_recipe(search, winner))
        write_text(folder / files.SEARCH, json.dumps(record, indent=1) + "\n")
        _print(record, winner, folder, console)
    return record


def _kept(rows: list[dict], candidates: list[Candidate], factor: int) -> list[Candidate]:
    """The candidates that go on; notes in ``rows`` which these are."""
    kept = survivors([row["nll"] for row in rows], factor)
    for index, row in enumerate(rows):
        row["kept"] = index in kept
    return [candidates[index] for index in kept]


def print_rungs(search: Search, console: Console | None = None) -> None:
    """Print what a search would run; writes nothing."""
    console = console or Console()
    for number, (size, steps) in enumerate(zip(search.sizes, search.steps, strict=True)):
        probes = size * len(search.recipe.seeds)
        console.print(
            f"rung {number + 1}: {size} candidates, {probes} probes of {steps} steps = {probes * steps:,} steps",
            highlight=False,
        )
    for candidate in search.candidates:
        console.print(f"  {candidate.name}", highlight=False)


def _split(search: Search, study: Study, plan: Plan) -> dict[str, int]:
    """Write the three parts of the training data, once; returns their numbers of rows."""
    from maskft.data import load_splits
    from maskft.data.arguments import TEMPLATE, DataArguments
    from maskft.models import load_tokenizer

    files = {part: search.part_file(study.folder, part) for part in PARTS}
    if not all(file.is_file() for file in files.values()):
        base, template = study.base(plan.runs[0]), search.options.get(TEMPLATE)
        tokenizer = load_tokenizer(base, template, revision=search.recipe.revision)
        field = search.options.get("dataset_text_field", "text")
        # On rows it was trained on, whatever keeps the model as it is looks best.
        options = {key: value for key, value in search.options.items() if key in OF_DATA}
        whole = DataArguments(**{**options, "max_train_samples": None})
        train, held, _ = load_splits(whole, whole.split_seed, tokenizer, field)
        held_file = files["train"].with_name("held.jsonl")
        _write_rows(held, held_file)
        again = DataArguments(
            dataset_name=str(held_file), eval_split_size=search.settings.choose_size, as_chat=whole.as_chat
        )
        report, choose, _ = load_splits(again, whole.split_seed + 1, tokenizer, field)
        for part, rows in (("choose", choose), ("report", report), ("train", train)):
            _write_rows(rows, files[part])
        held_file.unlink()
    return {part: sum(1 for _ in file.open(encoding="utf-8")) for part, file in files.items()}


def _write_rows(rows, file: Path) -> None:
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _drop_caches(folder: Path, first_layers: set[str]) -> None:
    """Remove what is kept for groups of which no candidate is left."""
    for cache in (folder / CACHE).glob("*"):
        if cache.name not in first_layers:
            shutil.rmtree(cache)


# Results


def _rung_record(study: Study, plan: Plan, candidates: list[Candidate], steps: int) -> dict[str, Any]:
    """Losses on the rows that choose, nats per token, and training times in seconds."""
    nlls: dict[str, dict[str, float]] = {}
    times: Counter[str] = Counter()
    for run in plan.runs:
        value = _heldout(study, run)["metrics"]["nll"]["value"]
        if value is None:
            raise UserError(f"the loss of {run.title!r} is not finite; leave that candidate out")
        nlls.setdefault(run.method.name, {})[str(run.seed)] = value
        times[run.method.name] += study.record(run).train_time_s or 0.0
    mean = {name: sum(values.values()) / len(values) for name, values in nlls.items()}
    rows = [
        {"name": c.name, **c.options, "nll": mean[c.name], "nll_of_seed": nlls[c.name], "train_time_s": times[c.name]}
        for c in candidates
    ]
    return {"steps": steps, "nll_without_mask": mean[NO_MASK], "candidates": rows}


def _heldout(study: Study, run: StudyRun) -> TaskRecord:
    return read_result(study.result_file(run, BEST))["tasks"]["heldout"]


def _gain(study: Study, plan: Plan) -> dict[str, float | None]:
    """Loss of the unmasked model and of the one other candidate, and by how much it is lower, paired by items."""
    without, *masked = [_heldout(study, run)["items"] for run in plan.runs]
    tokens, before = [item["num_tokens"] for item in without], [item["nll"] for item in without]
    nlls = [sum(item["nll"] for item in items) / len(masked) for items in zip(*masked, strict=True)]
    gain, stderr = weighted_mean([a - b for a, b in zip(before, nlls, strict=True)], tokens)
    return {
        "num_items": len(tokens),
        "nll_without_mask": weighted_mean(before, tokens)[0],
        "nll": weighted_mean(nlls, tokens)[0],
        "gain": gain,
        "gain_stderr": None if math.isnan(stderr) else stderr,
    }


def _winner_recipe(search: Search, winner: Candidate) -> str:
    """The winner as a recipe of ``maskft train``; its head says the same as a study's method."""
    recipe = search.recipe
    seed = recipe.seeds[0]
    options = {
        "method": "mask",
        "model_name_or_path": recipe.models[0],
        "output_dir": f"runs/{recipe.name}-winner",
        **recipe.train,
        **search.data.options,
        "seed": seed,
        "mask_seed": seed,
        **winner.options,
    }
    method = yaml.safe_dump({"mask": {"method": "mask", **winner.options}}, default_flow_style=True, width=1000)
    return (
        f"# What: the winner of the search {recipe.name}; probes on training data chose layers and sparsity. "
        "Held-out rows ranked them: show a gain on test items.\n"
        f"# Launch: maskft train --config {files.WINNER}\n# As a method of a study: {method.strip()[1:-1]}\n"
        + yaml.safe_dump({key: value for key, value in options.items() if value is not None}, sort_keys=False)
    )


def _print(record: dict[str, Any], winner: Candidate, folder: Path, console: Console) -> None:
    total = sum(row["train_time_s"] for rung in record["rungs"] for row in rung["candidates"]) or 1.0
    rows = []
    for number, rung in enumerate(record["rungs"], start=1):
        rows.append((NO_MASK, str(number), "", f"{rung['nll_without_mask']:.4f}", "", ""))
        for row in sorted(rung["candidates"], key=lambda row: row["nll"]):
            time, fate = f"{row['train_time_s'] / total:.0%}", "kept" if row["kept"] else "dropped"
            rows.append((row["name"], str(number), str(rung["steps"]), f"{row['nll']:.4f}", time, fate))
    columns = ("candidate", "rung", "steps", "held-out nll", "time", "")
    console.print(draw(Table(columns, rows), "terminal"), highlight=False, markup=False, soft_wrap=True)
    seeds = ", ".join(map(str, record["seeds"]))
    lines = [f"seeds {seeds}; training {total:.0f} s", f"winner: {winner.name}"]
    for key, rows in (("on_rows_that_chose_it", "rows that chose it"), ("on_rows_that_did_not", "rows that did not")):
        part = record[key]
        error = "" if part["gain_stderr"] is None else f" ± {part['gain_stderr']:.4f}"
        lines.append(
            f"  {part['num_items']} {rows}: nll {part['nll']:.4f}, without mask {part['nll_without_mask']:.4f}, "
            f"gain {part['gain']:.4f}{error}"
        )
    lines.append(f"recipe: {folder / files.WINNER}; record: {folder / files.SEARCH}")
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
