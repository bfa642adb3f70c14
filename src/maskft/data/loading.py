"""One split of a file, a hub data set or a procedural task, as examples."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset

from .formats import to_examples
from .procedural import PROCEDURAL_PREFIX, procedural_rows
from .sources import is_hub_name, load_from_hub, numbered, read_file


def load_examples(
    name: str,
    split: str = "train",
    *,
    config: str | None = None,
    as_chat: bool | None = None,
    tokenizer=None,
    text_field: str = "text",
    size: int = 500,
    seed: int = 0,
    options: dict | None = None,
) -> Dataset:
    """Read one split of a file, a hub data set or a procedural task as examples (see the module's docstring).

    ``split`` and ``config`` are for hub data sets; ``size``, ``seed`` and ``options`` for procedural tasks.
    """
    if name.startswith(PROCEDURAL_PREFIX):
        task = name.removeprefix(PROCEDURAL_PREFIX)
        rows = numbered(procedural_rows(task, size, seed, options or {}, plain=as_chat is not True))
    elif is_hub_name(name):
        rows = numbered(load_from_hub(name, config, split))
    else:
        rows = read_file(Path(name).expanduser())
    if as_chat is None:
        as_chat = tokenizer is None or bool(tokenizer.chat_template)
    return to_examples(rows, name, as_chat, text_field)
