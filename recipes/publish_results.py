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

Nothing is written if a file names a folder of this machine.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
from pathlib import Path

from maskft_common import layout
from maskft_common.errors import UserError
from maskft_common.files import write_bytes
from maskft_lab.results.compare import compare
from maskft_lab.results.reading import read_all
from maskft_lab.results.render import render
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
        UserError: If the study is not finished, or a file names a folder of this machine.
    """
    summary_file = study / layout.SUMMARY.format(name)
    if not summary_file.is_file():
        raise UserError(
            f"{study} has no {summary_file.name}: name the folder of a finished study, and its --study_name"
        )
    summary_text = summary_file.read_text(encoding="utf-8")
    files = {target / "summary.json": summary_text.encode()}

    for record in json.loads(summary_text)["models"].values():
        for row in record["runs"]:
            text = (study / layout.RESULTS / row["result"] / layout.RESULT).read_text(encoding="utf-8")
            # A study has one result of a method and seed, except where both its best and its last model are shown.
            role = "" if row["role"] == "best" else f"-{row['role']}"
            file = target / f"{slug(row['name'])}-s{row['seed']}{role}.json.gz"
            # Without the time of compression, so that the same results are the same bytes.
            files[file] = gzip.compress(text.encode(), mtime=0)

    for curve in sorted(study.glob(layout.CURVE.format(name, "*"))):
        files[target / curve.name] = curve.read_bytes()

    folders = runs_of(study, name)
    trainings = {}
    for folder in folders:
        training = folder / layout.TRAINING
        if training.is_file():  # the model before training has none
            trainings[folder.name] = json.loads(training.read_text(encoding="utf-8"))["summary"]
    files[target / "training.json"] = (json.dumps(trainings, indent=1) + "\n").encode()

    points = points_table(folders, name)
    if points:
        files[target / "points.md"] = points.encode()

    table = (study / layout.STUDY_TABLE.format(name)).read_text(encoding="utf-8")
    files[target / "table.md"] = with_head(table, target / "table.md", study, name).encode()

    for file, content in files.items():
        text = gzip.decompress(content) if file.suffix == ".gz" else content
        _check_paths(file, text.decode(), study)
    return files


def runs_of(study: Path, name: str) -> list[Path]:
    """Folders of the runs that a study made, also to tune, and of runs of another study that it shows."""
    summary = json.loads((study / layout.SUMMARY.format(name)).read_text(encoding="utf-8"))
    shown = set()
    for record in summary["models"].values():
        shown |= {row["run"] for row in record["runs"]}

    folders = []
    for file in sorted(study.glob(f"{layout.RUNS}/*/{layout.RUN}")):
        run = json.loads(file.read_text(encoding="utf-8"))
        if run["study"] == name or file.parent.name in shown:
            folders.append(file.parent)
    return folders


def _check_paths(
    file: Path,
    text: str,
    study: Path,
) -> None:
    """Check that a text names no folder of this machine."""
    for folder in (Path.home(), Path.cwd(), study.resolve()):
        # The first two components, such as /home/NAME: what a study reads is often beside its folder.
        start = "/" + "/".join(folder.parts[1:3])
        if len(start) > 1 and start in text:
            raise UserError(
                f"{file.name} would name {start}, a folder of this machine: run the study with relative paths"
            )


def points_table(folders: list[Path], name: str) -> str | None:
    """Every measured point of the paths of a study's runs, as Markdown; None if there is no path."""
    rows = []
    probes: list[str] = []
    for folder in folders:
        run = json.loads((folder / layout.RUN).read_text(encoding="utf-8"))
        measured = _points_of(folder)
        for point, values in measured.items():
            probes += [probe for probe in values if probe not in probes]
            rows.append((run["name"], run["seed"], run["settings"], point, values))
    if not rows:
        return None

    # The model before training has one point, 0-0, from which forgetting is counted.
    (before,) = (values for *_, point, values in rows if point == "0-0")
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
        share, scale = point.split("-")
        setting = ", ".join(f"{key} {settings[key]:g}" for key in varied if settings.get(key) is not None)
        cells = [method, str(seed), setting, share, scale]
        for metric in heldout:
            value = values["heldout"][metric]
            cells.append(f"{100 * value:.1f}" if metric == "accuracy" else f"{value:.4f}")
        for probe in probes:
            if "kl" in values[probe]:
                cells.append(f"{values[probe]['kl']:.4f}")
            else:
                cells.append(f"{values[probe]['nll'] - before[probe]['nll']:+.4f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _points_of(run: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Point, such as ``1-0.85`` -> set of rows -> metric -> value, of one run."""
    points: dict[str, dict[str, dict[str, float]]] = {}
    for file in sorted(run.glob(f"path/*/*/{layout.RESULT}")):
        result = json.loads(file.read_text(encoding="utf-8"))
        (record,) = result["tasks"].values()
        # The folder's name ends with a digest of the rows' options.
        rows = file.parents[1].name.rpartition("-")[0]
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
    body = table[BODY.search(table).start() :]
    if target.is_file():
        old = target.read_text(encoding="utf-8")
        return old[: BODY.search(old).start()] + body

    recipe = (study / layout.STUDY_RECIPE.format(name)).read_text(encoding="utf-8")
    comment = [line.removeprefix("# ") for line in recipe.splitlines() if line.startswith("#")]
    return f"# {name}\n\n" + "\n".join(comment) + "\n\nMachine: \n\nChosen: \n\n" + body


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
    target.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        write_bytes(file, content)
        print(f"{file.name}: {len(content):,} bytes")

    if against:
        comparison = compare(read_all([str(target)]), against)
        write_bytes(target / "against_mask.md", render(comparison, "markdown").encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="folder of a finished study")
    parser.add_argument("target", type=Path, help="folder of published results")
    parser.add_argument("--study_name", help="the study, where the folder holds several")
    parser.add_argument("--against", metavar="NAME", help="also compare all with this model")
    given = parser.parse_args()
    try:
        main(given.study, given.target, given.study_name, given.against)
    except UserError as error:
        sys.exit(f"error: {error}")
