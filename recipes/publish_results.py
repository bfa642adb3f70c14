"""Copy what a finished study found into a folder of published results: files without weights, small enough for git.

python recipes/publish_results.py runs/NAME results/NAME [--study_name NAME] [--against "deletion mask"]

Written are

- ``METHOD-sSEED.json.gz``, the results of the study's table, item by item, for ``maskft compare``;
- ``summary.json`` and ``curve-*.json``, the study's own;
- ``training.json``: of every training, also those that tuning tried and did not choose, its steps, losses and time;
- ``points.md``: of a study with a path, every point that was measured;
- ``against_mask.md``, with ``--against``: the same results with another model as the baseline;
- ``table.md``: the study's table. The paragraphs above the first table are kept where the file exists; else they are
  begun from the recipe, and the last of them, who chose, is for a person to write.

Runs, points and curves are those of the study's last summary: what earlier versions of its recipe left in the folder is
not published. Nothing is written if a file names a folder of this machine, or if the target holds a result or a curve
that the study does not have.
"""

from __future__ import annotations

import argparse
import glob
import gzip
import json
import re
from pathlib import Path
from typing import Any

from maskft_common import layout
from maskft_common.command_line import run_script
from maskft_common.errors import UserError
from maskft_common.files import write_bytes
from maskft_lab.analysis.runs import plain_name
from maskft_lab.results.compare import compare_measured
from maskft_lab.results.comparison import Settings
from maskft_lab.results.render import render
from maskft_lab.results.schema import check_result, run_identity
from maskft_lab.study.plan import slug

# The first line of a table's body: everything above it was written by a person.
BODY = re.compile(r"^## ", re.MULTILINE)


def published(
    study: Path,
    name: str,
    target: Path,
) -> dict[Path, bytes]:
    """Return the content of each file, without the comparison with another baseline.

    Raises:
        UserError: If the study is not finished, two results would have one file, or a file names a folder of this
            machine.
    """
    summary_file = study / layout.SUMMARY.format(name)
    if not summary_file.is_file():
        raise UserError(
            f"{study} has no {summary_file.name}: name the folder of a finished study, and its --study_name"
        )
    summary_text = _text(summary_file)
    files = {target / "summary.json": summary_text.encode()}

    for record in json.loads(summary_text)["models"].values():
        for row in record["runs"]:
            text = _result_text(study, row)
            # A study has one result of a method and seed, except where both its best and its last model are shown.
            role = "" if row["role"] == "best" else f"-{row['role']}"
            file = target / f"{slug(row['name'])}-s{row['seed']}{role}.json.gz"
            if file in files:
                raise UserError(
                    f"{file.name} would be of two models, {row['name']!r} and another with the same letters: rename one"
                )
            # Without the time of compression, so that the same results are the same bytes.
            files[file] = gzip.compress(text.encode(), mtime=0)

    # A name may have characters that a pattern has too.
    for curve in sorted(study.glob(layout.CURVE.format(glob.escape(name), "*"))):
        # The pattern also matches curves of another study in the folder, whose name begins with this one's.
        probe = json.loads(_text(curve))["probe"]
        if curve.name == layout.CURVE.format(name, probe):
            files[target / curve.name] = curve.read_bytes()

    folders = runs_of(study, name)
    trainings = {}
    for folder in folders:
        training = folder / layout.TRAINING
        if training.is_file():  # the model before training has none
            trainings[folder.name] = json.loads(_text(training))["summary"]
    files[target / "training.json"] = (json.dumps(trainings, indent=1) + "\n").encode()

    points = points_table(folders, name, names_of_runs(study, name))
    if points:
        files[target / "points.md"] = points.encode()

    table = _text(study / layout.STUDY_TABLE.format(name))
    files[target / "table.md"] = with_head(table, target / "table.md", study, name).encode()

    for file, content in files.items():
        text = gzip.decompress(content) if file.suffix == ".gz" else content
        _check_paths(file, text.decode(), study)
    return files


def _text(file: Path) -> str:
    if not file.is_file():
        raise UserError(f"{file} does not exist: finish the study with maskft study, which writes it")
    return file.read_text(encoding="utf-8")


def _result_text(study: Path, row: dict[str, Any]) -> str:
    """A result under the name that the study's table has: its file keeps the name of an earlier recipe."""
    text = _text(study / layout.RESULTS / row["result"] / layout.RESULT)
    result = json.loads(text)
    if result["name"] == row["name"]:
        return text
    # As a result is written, so that nothing else differs.
    return json.dumps(result | {"name": row["name"]}, indent=1, ensure_ascii=False) + "\n"


def runs_of(study: Path, name: str) -> list[Path]:
    """Folders of the runs that a study shows, and of those that tuning tried; another study may have made them.

    Raises:
        UserError: If a run that the study shows is not there.
    """
    wanted = names_of_runs(study, name)
    files = sorted(study.glob(f"{layout.RUNS}/*/{layout.RUN}"))
    found = [file.parent for file in files if run_identity(file.parent.name) in wanted]

    # Trials of tuning may have been removed; of what the table shows, the training is published too.
    hashes = {run_identity(folder.name) for folder in found}
    summary = json.loads(_text(study / layout.SUMMARY.format(name)))
    for record in summary["models"].values():
        for row in record["runs"]:
            if run_identity(row["run"]) not in hashes:
                raise UserError(f"{study} has no finished run {row['run']}, which its table shows: run the study again")
    return found


def names_of_runs(study: Path, name: str) -> dict[str, str]:
    """Hash of a run -> its name in the study; its record has the name that the study had which made it."""
    summary = json.loads(_text(study / layout.SUMMARY.format(name)))
    names = {}
    for record in summary["models"].values():
        for row in record["runs"]:
            names[run_identity(row["run"])] = plain_name(row["name"])
        # What tuning tried has no row of its own, but for the winner.
        for tuned in record.get("tuning", []):
            for trial in tuned["trials"]:
                for run in trial["runs"]:
                    names[run_identity(run)] = tuned["method"]
    return names


def _check_target(files: dict[Path, bytes], target: Path) -> None:
    """Check that the target holds no result or curve that the study lacks: whoever reads the folder reads it too."""
    for pattern in ("*.json.gz", "curve-*.json"):
        for file in sorted(target.glob(pattern)):
            if file not in files:
                raise UserError(f"{file} is of no model or probe of this study: delete it, or name another folder")


def _check_paths(
    file: Path,
    text: str,
    study: Path,
) -> None:
    """Check that a text names no folder of this machine."""
    for folder in (Path.home(), Path.cwd(), study.resolve()):
        # The first two components, such as /home/NAME: what a study reads is often beside its folder.
        start = "/" + "/".join(folder.parts[1:3])
        # In JSON, letters beyond ASCII may be written as codes.
        spellings = (start, json.dumps(start)[1:-1])
        if len(start) > 1 and any(spelling in text for spelling in spellings):
            raise UserError(
                f"{file.name} would name {start}, a folder of this machine: run the study with relative paths"
            )


def points_table(
    folders: list[Path],
    name: str,
    names: dict[str, str],
) -> str | None:
    """Every measured point of the paths of a study's runs, as Markdown; None if there is no path.

    Args:
        folders: The runs' folders.
        name: The study's name.
        names: Hash of a run -> its name in the study.
    """
    rows = []
    probes: list[str] = []
    for folder in folders:
        run = json.loads(_text(folder / layout.RUN))
        measured = _points_of(folder)
        for point, values in measured.items():
            probes += [probe for probe in values if probe not in probes]
            method = names[run_identity(folder.name)]
            rows.append((method, run["seed"], run["settings"], point, values))
    if not rows:
        return None

    # The model before training has one point, 0-0, from which forgetting is counted.
    of_base = [values for *_, point, values in rows if point == "0-0"]
    if len(of_base) != 1:
        raise UserError(f"{len(of_base)} models before training were measured along the paths, which count from one")
    (before,) = of_base
    probes.remove("heldout")
    heldout = [metric for metric in ("accuracy", "nll") if metric in before["heldout"]]
    columns = ["method", "seed", "setting", "of training", "of the change", *heldout, *probes]
    lines = [
        f"# Every point that was measured: {name}",
        "",
        "Accuracy in % and loss (nll) in nats per token on the held-out rows of the training data; of the probes the "
        "loss after minus before training, or KL(base || model), in nats per token. No test row is in this table.",
        "",
        "| " + " | ".join(columns) + " |",
        "| --- " * 5 + "| ---: " * (len(columns) - 5) + "|",
    ]
    varied = _varied_settings(rows)
    for method, seed, settings, point, values in rows:
        if point == "0-0":
            continue
        # A small scale may have a dash itself, as 1e-05 has.
        share, _, scale = point.partition("-")
        setting = ", ".join(f"{key} {settings[key]:g}" for key in varied if settings.get(key) is not None)
        cells = [method, str(seed), setting, share, scale]
        for metric in heldout:
            scale, digits = (100, 1) if metric == "accuracy" else (1, 4)
            cells.append(_number(values["heldout"][metric], scale, f".{digits}f"))
        for probe in probes:
            of_probe = values.get(probe, {})
            if "kl" in of_probe:
                cells.append(_number(of_probe["kl"], 1, ".4f"))
                continue
            rise = None
            if of_probe.get("nll") is not None:
                rise = of_probe["nll"] - before[probe]["nll"]
            cells.append(_number(rise, 1, "+.4f"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _number(
    value: float | None,
    scale: float,
    form: str,
) -> str:
    """A number of a table; a dash where there is none, as of a point whose loss was not finite."""
    return "–" if value is None else f"{scale * value:{form}}"


def _points_of(run: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Point, such as ``1-0.85`` -> set of rows -> metric -> value, of one run.

    Raises:
        UserError: If two sets of rows have one name.
    """
    points: dict[str, dict[str, dict[str, float]]] = {}
    folders: dict[str, Path] = {}
    for file in sorted(run.glob(f"path/*/*/{layout.RESULT}")):
        result = json.loads(file.read_text(encoding="utf-8"))
        (record,) = result["tasks"].values()
        # The folder's name ends with a digest of the rows' options.
        folder = file.parents[1]
        rows = folder.name.rpartition("-")[0]
        # Measurements on earlier rows stay where the recipe, or a file that it names, was changed.
        if folders.setdefault(rows, folder) != folder:
            raise UserError(f"{folders[rows]} and {folder} are of two sets of rows called {rows}: delete the older one")
        values = {metric: entry["value"] for metric, entry in record["metrics"].items()}
        points.setdefault(file.parent.name, {})[rows] = values
    return points


def _varied_settings(rows: list) -> list[str]:
    """The numbers of the runs' settings that have more than one value among these runs, without seeds."""
    values: dict[str, set] = {}
    for _, _, settings, _, _ in rows:
        for key, value in settings.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and not key.endswith("seed"):
                values.setdefault(key, set()).add(value)
    varied = [key for key, found in values.items() if len(found) > 1]
    return sorted(varied, key=lambda key: key != "learning_rate")  # the rate first


def with_head(
    table: str,
    target: Path,
    study: Path,
    name: str,
) -> str:
    """The study's table below the paragraphs that a person wrote, or their beginning."""
    _, body = _split(table, study / layout.STUDY_TABLE.format(name))
    if target.is_file():
        head, _ = _split(target.read_text(encoding="utf-8"), target)
        return head + body

    recipe = _text(study / layout.STUDY_RECIPE.format(name))
    comment = [line.removeprefix("# ") for line in recipe.splitlines() if line.startswith("#")]
    return f"# {name}\n\n" + "\n".join(comment) + "\n\nMachine: \n\nChosen: \n\n" + body


def _split(text: str, file: Path) -> tuple[str, str]:
    """What a person wrote, and the tables below it."""
    found = BODY.search(text)
    if found is None:
        raise UserError(f"{file} has no line that begins with '## ', as the tables of a finished study do")
    return text[: found.start()], text[found.start() :]


def main(
    study: Path,
    target: Path,
    name: str | None,
    against: str | None,
) -> None:
    """Write the files, all or none of them."""
    if name is None:
        summaries = sorted(study.glob(layout.SUMMARY.format("*")))
        names = [file.stem.removeprefix("summary-") for file in summaries]
        if len(names) != 1:
            there = ", ".join(names) or "no finished study"
            raise UserError(f"{study} holds {there}; name one with --study_name")
        (name,) = names

    files = published(study, name, target)
    if against:
        summary = json.loads(files[target / "summary.json"])
        (models,) = summary["models"].values()
        # The same claim as the study's table: about these trained models, or about any seeds.
        settings = Settings(fixed_seeds=models["comparison"]["fixed_seeds"])
        files[target / "against_mask.md"] = _against(files, against, settings).encode()
    _check_target(files, target)
    target.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        write_bytes(file, content)
        print(f"{file.name}: {len(content):,} bytes")


def _against(
    files: dict[Path, bytes],
    baseline: str,
    settings: Settings,
) -> str:
    """The comparison of the published results with another model as the baseline, as Markdown."""
    # In the order of their files, as `maskft compare` reads a folder.
    results = []
    for file in sorted(files):
        if file.suffix == ".gz":
            result = json.loads(gzip.decompress(files[file]))
            results.append(check_result(result, file))
    return render(compare_measured(results, baseline, settings=settings), "markdown")


def command() -> None:
    """Publish the study on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="folder of a finished study")
    parser.add_argument("target", type=Path, help="folder of published results")
    parser.add_argument("--study_name", help="the study, where the folder holds several")
    parser.add_argument("--against", metavar="NAME", help="also compare all with this model")
    given = parser.parse_args()
    main(given.study, given.target, given.study_name, given.against)


if __name__ == "__main__":
    run_script(command)
