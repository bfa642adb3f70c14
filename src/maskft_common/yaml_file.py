"""Reading YAML: as the standard says, with numbers and repeated keys as people expect them."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError
from .files import check_regular

_MAX_BYTES = 2**20  # recipes have a few kB
# Values of a file after its aliases (``*name``) were replaced by their content, which nine lines can make 10**9 of.
_MAX_VALUES = 10**6


class _Loader(yaml.SafeLoader):
    """YAML whose names are text and given once, and whose values are plain: what JSON has.

    ``1e-3`` is a number; dates and ``1:30`` are text.
    """

    def construct_mapping(self, node, deep=False):
        if not isinstance(node, yaml.MappingNode):  # `!!map [a]`, for which PyYAML has an error
            return super().construct_mapping(node, deep)
        # PyYAML would let the last of two equal keys win without a word.
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *name`, whose entries may be replaced
                continue
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                quotes = "" if isinstance(key, dict | list | set) else "; put it in quotes"
                raise UserError(f"line {line}: a name must be text, not {key!r}{quotes}")
            if key in seen:
                raise UserError(f"line {line}: two entries are named {key!r}; rename one")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _text_or_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float | str:
    text = loader.construct_scalar(node)
    # Half of a pair of UTF-16, and the end of a text in C: neither can be written, or be part of a path.
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(
            f"line {node.start_mark.line + 1}: {text!r} has a character that no file can hold; leave it out"
        )
    # YAML 1.1 takes 1e-3 for text. In quotes (which are the node's style) it is text.
    is_plain = node.style is None
    without_sign = text.lstrip("+-")
    if is_plain and without_sign[:1].isdigit():
        with suppress(ValueError):
            return float(text)
    return text


def _text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    # A revision such as 2026-11-26 is meant as text; as a date it would not be JSON.
    return loader.construct_scalar(node)


def _int_or_text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | str:
    # YAML 1.1 reads 1:30 in base 60, which takes time quadratic in the length: minutes for 600 kB.
    text = loader.construct_scalar(node)
    if ":" in text:
        return text
    number = loader.construct_yaml_int(node)
    # Of an option it would be an error deep in torch or numpy.
    if not -(2**63) <= number < 2**63:
        line = node.start_mark.line + 1
        raise UserError(f"line {line}: {text[:20]} is larger than a number of 64 bits; write a smaller one")
    return number


def _float_or_text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float | str:
    text = loader.construct_scalar(node)
    if ":" in text:
        return text
    return loader.construct_yaml_float(node)


# By the tags that PyYAML gives to plain scalars, from their form.
_Loader.add_constructor("tag:yaml.org,2002:str", _text_or_float)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _text)
_Loader.add_constructor("tag:yaml.org,2002:int", _int_or_text)
_Loader.add_constructor("tag:yaml.org,2002:float", _float_or_text)


def read_yaml(file: str | os.PathLike) -> Any:
    """Return the content of a YAML file, unchecked.

    Raises:
        UserError: If it does not exist, is not a regular file or not YAML, is too large, or has two entries of one
            name in one place.
    """
    path = Path(file)
    check_regular(path)
    if not path.is_file():
        raise UserError(f"recipe {os.fspath(file)!r} does not exist")
    if path.stat().st_size > _MAX_BYTES:
        raise UserError(f"{os.fspath(file)} has more than {_MAX_BYTES // 2**20} MiB, which is too large for a recipe")
    try:
        text = path.read_text(encoding="utf-8")
        # Not unsafe: the loader is a SafeLoader, which builds plain values only.
        content = yaml.load(text, _Loader)
        # Counted without replacing aliases, which could fill the memory.
        num_values = _num_values(content, {})
    except UserError as error:
        # Raised by the functions above, which do not know the file.
        raise UserError(f"{os.fspath(file)}, {error}") from None
    except (ValueError, LookupError, yaml.YAMLError, RecursionError) as error:
        # ValueError: not UTF-8, an integer of 5,000 digits. LookupError: PyYAML's own constructors raise it for a tag
        # whose text does not fit, such as `!!bool maybe`.
        raise UserError(f"{os.fspath(file)} is not YAML: {' '.join(str(error).split())}") from None
    if num_values > _MAX_VALUES:
        raise UserError(f"{os.fspath(file)} repeats its aliases (*name) without end; write the values out")
    return content


def _num_values(content: Any, known: dict[int, float]) -> float:
    """Number of values in ``content``, each alias counted with its content; infinite where one contains itself.

    Args:
        content: The content of a file, or a part of it.
        known: Numbers that have been counted, by the id of the part: aliases of one name are one object.
    """
    if not isinstance(content, dict | list):
        # Others are of tags: `!!binary`, `!!set`, and the pairs of `!!omap`.
        if not isinstance(content, str | int | float | None):
            raise UserError(f"{content!r} is of a kind that is not read; write text, numbers, lists or `name: value`")
        return 1
    key = id(content)
    if key not in known:
        # Until it is counted: seen again meanwhile, it is inside itself.
        known[key] = float("inf")
        below = content.values() if isinstance(content, dict) else content
        total = 1.0
        for value in below:
            total += _num_values(value, known)
        known[key] = total
    return known[key]
