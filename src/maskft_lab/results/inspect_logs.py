"""inspect-ai's logs (``.eval``, a zip archive, or ``.json``); epochs are several samples of an item."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import zstandard

from maskft_base.errors import UserError
from maskft_base.files import check_unpacked, parse_json, read_text

from .elsewhere import Asked, Log, add_samples, as_number, metrics_of, set_cluster
from .schema import build_task, items_fingerprint

_GRADES = {"C": 1, "I": 0, "P": 0.5, "N": 0}  # inspect_ai.scorer: correct, incorrect, partial, no answer
_ZSTD = 93  # method of newer logs, which zipfile reads from Python 3.14 on
_LOCAL_HEADER = 30  # bytes of a member's own header, the last four of which are two lengths
# What of a generation's settings changes answers.
_GENERATION = ("max_tokens", "temperature", "top_p", "top_k", "stop_seqs", "reasoning_effort", "reasoning_tokens")
_KEPT = ("id", "epoch", "input", "target", "scores", "metadata")  # of a sample, whose events may have many megabytes

Sample = Mapping[str, Any]


def read_log(path: Path, asked: Asked) -> Log:
    """Return a log as a task of the model that it names.

    Raises:
        UserError: If it is no log, or its run did not end well.
        ValueError: If it cannot be read; other exceptions where its content is not what it should be.
    """
    if path.suffix == ".eval":
        header, samples = _archive(path)
    else:
        header = parse_json(read_text(path))
        samples = header.get("samples") or []
    spec = header.get("eval")
    if not isinstance(spec, dict) or not isinstance(spec.get("task"), str):
        raise UserError(f"{path}: no log of inspect-ai, 'eval' or its 'task' is missing")
    if header.get("status") != "success":
        raise UserError(f"{path}: the run ended with status {header.get('status')!r}: retry it until it succeeds")
    by_item: dict[str, list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: int(sample.get("epoch") or 1)):
        by_item.setdefault(str(sample.get("id")), []).append(sample)
    if not by_item:
        raise UserError(f"{path}: no samples in it: log them (--log-samples)")
    items: list[dict[str, Any]] = [{"id": identity} for identity in by_item]
    groups = list(by_item.values())
    for item, group in zip(items, groups, strict=True):
        set_cluster(item, group[0].get("metadata") or {}, asked, path)
    known: dict[str, bool] = {}
    found = [[_scores(sample, known) for sample in group] for group in groups]
    for scorer in dict.fromkeys(name for group in found for scores in group for name in scores):
        add_samples(items, scorer, [[scores.get(scorer) for scores in group] for group in found])
    metrics = metrics_of(items, known, asked, path)
    if not metrics:
        raise UserError(f"{path}: no score is a number or a grade (C, I, P, N), so there is nothing to compare")
    arguments = spec.get("task_args") or {}
    fewshot = arguments.get("fewshot", arguments.get("num_fewshot"))
    questions = [
        {"id": identity, "prompt": _wording(group[0].get("input")), "reference": group[0].get("target")}
        for identity, group in by_item.items()
    ]
    record = build_task(
        items,
        metrics,
        version=spec.get("task_version"),
        num_fewshot=fewshot if isinstance(fewshot, int) and not isinstance(fewshot, bool) else None,
        fingerprint=items_fingerprint(questions),
    )
    record["task_args"] = arguments
    record["generation_kwargs"] = _generation(header, spec)
    if len(groups[0]) > 1:
        record["num_samples"] = len(groups[0])
    model, created = str(spec.get("model") or path.stem), str(spec.get("created") or "")
    return Log(path, model, spec["task"], record, {}, dict(spec.get("packages") or {}), created)


def _archive(path: Path) -> tuple[dict[str, Any], Sequence[Sample]]:
    """Return the header and the samples of an archive, none of which unpacks to far more than logs do."""
    with zipfile.ZipFile(path) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        if "header.json" not in infos:
            raise UserError(f"{path}: no header.json in it: the run has not ended, or it is no log of inspect-ai")
        inside = [name for name in infos if name.startswith("samples/") and name.endswith(".json")]
        check_unpacked(sum(infos[name].file_size for name in ("header.json", *inside)), path.stat().st_size)
        samples = [parse_json(_member(path, archive, infos[name])) for name in inside]
        header = parse_json(_member(path, archive, infos["header.json"]))
    return header, [{key: sample.get(key) for key in _KEPT} for sample in samples]


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.compress_type != _ZSTD or hasattr(zipfile, "ZIP_ZSTANDARD"):
        return archive.read(info)
    with path.open("rb") as file:
        file.seek(info.header_offset + _LOCAL_HEADER - 4)
        name_length, extra_length = (int.from_bytes(file.read(2), "little") for _ in range(2))
        file.seek(name_length + extra_length, 1)
        packed = file.read(info.compress_size)
    reader = zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True)
    return bytes(reader.read(info.file_size))


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


def _scores(sample: Sample, known: dict[str, bool]) -> dict[str, float | int]:
    """Return scorer -> number, of several values one each; of grades ``known`` then says that more is better."""
    found: dict[str, float | int] = {}
    for scorer, score in (sample.get("scores") or {}).items():
        value = score.get("value") if isinstance(score, dict) else score
        parts = {f"{scorer}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {scorer: value}
        for name, part in parts.items():
            number = _GRADES.get(part) if isinstance(part, str) else as_number(part)
            if number is not None:
                found[name] = number
                known |= {name: True} if isinstance(part, str) else {}
    return found
