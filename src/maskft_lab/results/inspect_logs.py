"""inspect-ai's logs (``.eval``, a zip archive, or ``.json``) as results; epochs are several samples of an item."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from maskft_base.errors import UserError
from maskft_base.files import check_unpacked, parse_json, read_text

from .elsewhere import add_samples, as_number, cluster_label, metrics_of, result_from
from .schema import Result, TaskRecord, build_task, items_fingerprint

_GRADES = {"C": 1, "I": 0, "P": 0.5, "N": 0}  # inspect_ai.scorer: correct, incorrect, partial, no answer
_ZSTD = 93  # method of newer logs, which zipfile reads from Python 3.14 on
_MAX_MEMBER_BYTES = 512 * 2**20
# What of a generation's settings changes answers.
_GENERATION = ("max_tokens", "temperature", "top_p", "top_k", "stop_seqs", "reasoning_effort", "reasoning_tokens")


class _Log(NamedTuple):
    """One log: what it says of the run, and its task."""

    path: Path
    spec: Mapping[str, Any]
    record: TaskRecord


def read_logs(paths: Sequence[Path], name: str | None = None, cluster_by: str | None = None) -> list[Result]:
    """Return logs as results, one per model: inspect-ai writes those of all models into one folder.

    Args:
        paths: ``.eval`` or ``.json`` files.
        name: Of the model that all of them are of; by default each is of the model that it names.
        cluster_by: Field of the samples' metadata whose values are the clusters; by default ``cluster_id`` where they
            have it.

    Raises:
        UserError: If a file is no log, the run did not end well, or two logs are of one task and model.
    """
    models: dict[str, dict[str, _Log]] = {}
    for path in paths:
        log = _read_log(path, cluster_by)
        model, task = str(name or log.spec.get("model") or path.stem), log.spec["task"]
        if task in models.setdefault(model, {}):
            raise UserError(f"{path}: a second log of task {task} and model {model}: give each a name, NAME={path}")
        models[model][task] = log
    return [_result(model, list(logs.values())) for model, logs in models.items()]


def _read_log(path: Path, cluster_by: str | None) -> _Log:
    header, samples = _eval_file(path) if path.suffix == ".eval" else _json_file(path)
    spec = header.get("eval")
    if not isinstance(spec, dict) or not isinstance(spec.get("task"), str):
        raise UserError(f"{path}: no log of inspect-ai, 'eval' or its 'task' is missing")
    if header.get("status") != "success":
        raise UserError(f"{path}: the run ended with status {header.get('status')!r}: retry it until it succeeds")
    record = _task(path, spec, samples, cluster_by)
    record["generation_kwargs"] = _generation(header, spec)
    return _Log(path, spec, record)


def _result(model: str, logs: Sequence[_Log]) -> Result:
    packages: dict[str, Any] = {}
    for log in logs:
        packages |= log.spec.get("packages") or {}
    tasks = {log.spec["task"]: log.record for log in logs}
    return result_from(model, logs[0].path, tasks, {}, packages, str(logs[-1].spec.get("created") or ""))


def _json_file(path: Path) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
    try:
        log = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}): is the file whole?") from None
    log = log if isinstance(log, dict) else {}
    return log, iter(log.get("samples") or [])


def _eval_file(path: Path) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
    """Return the header and the samples of an archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if "header.json" not in names:
                raise UserError(f"{path}: no header.json in it: the run has not ended, or it is no log of inspect-ai")
            header = parse_json(_member(path, archive, "header.json"))
            inside = [name for name in names if name.startswith("samples/") and name.endswith(".json")]
            check_unpacked(sum(archive.getinfo(name).file_size for name in inside), path.stat().st_size)
            samples = [_reduced(parse_json(_member(path, archive, name))) for name in inside]
    except (OSError, ValueError, zipfile.BadZipFile, zstandard.ZstdError, struct.error, NotImplementedError) as error:
        raise UserError(f"{path}: cannot be read as a log of inspect-ai ({error}): is the file whole?") from None
    return header, iter(samples)


def _reduced(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what is needed of a sample: its events may have many megabytes."""
    return {key: sample.get(key) for key in ("id", "epoch", "input", "target", "scores", "metadata")}


def _member(path: Path, archive: zipfile.ZipFile, name: str) -> bytes:
    """Return a file of the archive."""
    info = archive.getinfo(name)
    if info.file_size > _MAX_MEMBER_BYTES:
        raise UserError(f"{path}: {name} unpacks to {info.file_size:,} bytes, more than {_MAX_MEMBER_BYTES:,}")
    if info.compress_type != _ZSTD or hasattr(zipfile, "ZIP_ZSTANDARD"):
        return archive.read(name)
    with path.open("rb") as file:
        # The local header has the lengths of its own name and extra field at bytes 26 to 29 of 30.
        file.seek(info.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", file.read(4))
        file.seek(name_length + extra_length, 1)
        packed = file.read(info.compress_size)
    reader = zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True)
    return bytes(reader.read(info.file_size))


def _task(path: Path, spec: Mapping[str, Any], samples: Iterator[dict[str, Any]], cluster_by: str | None) -> TaskRecord:
    by_item: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        by_item.setdefault(str(sample.get("id")), []).append(sample)
    if not by_item:
        raise UserError(f"{path}: no samples in it: log them (--log-samples)")
    items: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    for identity, group in by_item.items():
        group.sort(key=lambda sample: int(sample.get("epoch") or 1))
        item: dict[str, Any] = {"id": identity}
        metadata = group[0].get("metadata") or {}
        if cluster_by or "cluster_id" in metadata:
            item["cluster_id"] = cluster_label(metadata.get(cluster_by or "cluster_id"), f"{path}, {cluster_by}")
        items.append(item)
        questions.append(
            {"id": identity, "prompt": _wording(group[0].get("input")), "reference": group[0].get("target")}
        )
    groups = list(by_item.values())
    num_samples = len(groups[0])
    for scorer in dict.fromkeys(name for group in groups for sample in group for name in _scores(sample)):
        scores = [[_scores(sample).get(scorer) for sample in group] for group in groups]
        add_samples(items, scorer, scores)
    names = [name for name in items[0] if name not in ("id", "cluster_id")]
    if not names:
        raise UserError(f"{path}: no score is a number or a grade (C, I, P, N), so there is nothing to compare")
    arguments = spec.get("task_args") or {}
    fewshot = arguments.get("fewshot", arguments.get("num_fewshot"))
    record = build_task(
        items,
        metrics_of(items, names, {}),
        version=spec.get("task_version"),
        num_fewshot=fewshot if isinstance(fewshot, int) and not isinstance(fewshot, bool) else None,
        fingerprint=items_fingerprint(questions),
    )
    record["task_args"] = arguments
    if num_samples > 1:
        record["num_samples"] = num_samples
    return record


def _wording(prompt: Any) -> Any:
    """Return a prompt without what is drawn anew in every run: messages have an id each."""
    if not isinstance(prompt, list):
        return prompt
    return [{key: m.get(key) for key in ("role", "content")} if isinstance(m, dict) else m for m in prompt]


def _generation(header: Mapping[str, Any], spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return what shaped the answers: options of the model, and over them those of the run and its task."""
    of_model, of_run = spec.get("model_generate_config") or {}, (header.get("plan") or {}).get("config") or {}
    found = {key: of_model.get(key) if of_run.get(key) is None else of_run[key] for key in _GENERATION}
    return {key: value for key, value in found.items() if value is not None}


def _scores(sample: Mapping[str, Any]) -> dict[str, float | int | None]:
    """Return scorer -> number, of several values one each; values of other kinds are left out."""
    found: dict[str, float | int | None] = {}
    for scorer, score in (sample.get("scores") or {}).items():
        value = score.get("value") if isinstance(score, dict) else score
        parts = {f"{scorer}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {scorer: value}
        for name, part in parts.items():
            number = _GRADES.get(part) if isinstance(part, str) else as_number(part)
            if number is not None:
                found[name] = number
    return found
