"""Answers already given, on disk, so that an evaluation that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError

_REQUEST_KINDS = ("generate_until", "loglikelihood", "loglikelihood_rolling")


class Journal:
    """An append-only JSONL file: what the answers depend on in the first line, then one answer per line.

    It has the interface of lm-eval's cache hook, which models call with each answer as soon as they have it.

    Args:
        file: The file; made if it does not exist.
        settings: What all answers depend on, JSON-able: model, adapter, dtype, ...
        overwrite: Throw away a journal of other settings instead of refusing it.

    Raises:
        UserError: If the file is the journal of another evaluation.
    """

    def __init__(self, file: Path, settings: Mapping, overwrite: bool = False):
        self.file = file
        self.answers: dict[str, Any] = {}
        settings = json.loads(json.dumps(settings))
        lines = _readable_lines(file)
        if lines and lines[0] != settings:
            if not overwrite:
                differing = sorted(key for key in {*lines[0], *settings} if lines[0].get(key) != settings.get(key))
                raise UserError(
                    f"{file} holds answers of an unfinished evaluation with other settings ({', '.join(differing)}); "
                    "name another output_dir, or pass --overwrite to throw them away"
                )
            lines = []
        file.parent.mkdir(parents=True, exist_ok=True)
        self._out = file.open("a" if lines else "w", encoding="utf-8")
        if lines:
            self._out.write("\n")  # ends a line that a kill cut short
            self.answers = {line["key"]: line["answer"] for line in lines[1:]}
        else:
            self._write(settings)

    def key(self, kind: str, arguments: Sequence) -> str:
        """The name of a request: its kind, prompt and settings, whatever task it comes from."""
        return hashlib.sha256(json.dumps([kind, *arguments], sort_keys=True).encode()).hexdigest()

    def add_partial(self, kind: str, arguments: Sequence, answer: Any) -> None:
        """Keep one answer."""
        key = self.key(kind, arguments)
        self.answers[key] = answer
        self._write({"key": key, "answer": answer})

    def remove(self) -> None:
        """Delete the file: the result is written."""
        self._out.close()
        self.file.unlink()

    def _write(self, line: Mapping) -> None:
        self._out.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._out.flush()


class Resuming:
    """An lm-eval model that asks the wrapped one only what the journal does not know."""

    def __init__(self, lm, journal: Journal):
        self.lm, self.journal = lm, journal
        lm.set_cache_hook(journal)

    def __getattr__(self, name: str) -> Any:
        if name not in _REQUEST_KINDS:
            return getattr(self.lm, name)
        return lambda requests: self._answer(name, requests)

    def _answer(self, kind: str, requests: list) -> list:
        keys = [None if _is_sampled(request) else self.journal.key(kind, request.args) for request in requests]
        known = [key in self.journal.answers for key in keys]
        missing = [request for request, is_known in zip(requests, known, strict=True) if not is_known]
        fresh = iter(getattr(self.lm, kind)(missing) if missing else ())
        return [
            self.journal.answers[key] if is_known else next(fresh) for key, is_known in zip(keys, known, strict=True)
        ]


def _is_sampled(request) -> bool:
    """Whether the answer is drawn at random, and each repetition of the request wants another."""
    settings = request.args[1] if len(request.args) > 1 else None
    return isinstance(settings, dict) and bool(settings.get("do_sample"))


def _readable_lines(file: Path) -> list[dict]:
    lines = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                lines.append(json.loads(line))
            except ValueError:  # cut short by a kill
                continue
    return lines
