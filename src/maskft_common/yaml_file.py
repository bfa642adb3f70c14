"""Reading YAML: as the standard says, with numbers and repeated keys as people expect them."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML as it is, but a key given twice is an error, 1e-3 a number, and a date the text that was written."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *name`; what it brings may be replaced
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if isinstance(key, dict | list):
                raise UserError(f"line {line}: {key!r} stands where a name should be")
            if key in seen:
                raise UserError(f"line {line}: two entries are named {key!r}; rename one")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _number_or_text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float | str:
    text = loader.construct_scalar(node)
    with suppress(ValueError):  # YAML 1.1 takes 1e-3 for text
        return float(text) if node.style is None and text.lstrip("+-")[:1].isdigit() else text
    return text


_Loader.add_constructor("tag:yaml.org,2002:str", _number_or_text)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda loader, node: loader.construct_scalar(node))


def read_yaml(file: str | os.PathLike) -> Any:
    """What a YAML file holds, unchecked.

    Raises:
        UserError: If it does not exist, is no YAML, or has two entries of one name in one place.
    """
    if not Path(file).is_file():
        raise UserError(f"recipe {os.fspath(file)!r} does not exist")
    try:
        return yaml.load(Path(file).read_text(encoding="utf-8"), _Loader)
    except UserError as error:
        raise UserError(f"{os.fspath(file)}, {error}") from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{os.fspath(file)} is not YAML: {' '.join(str(error).split())}") from None
