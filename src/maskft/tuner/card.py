"""The card of a folder, README.md on the hub: the base, what is removed of it, lines that load it, how it was made."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open

from maskft_base import __version__, files
from maskft_base.errors import HOW_TO_INSTALL, printable

from .codec import PREFIX, mask_info

PAPER = "https://arxiv.org/abs/2503.22764"
_MARK = "<!-- written by maskft, and again whenever the folder is saved -->"
# What PEFT and TRL write for a method they do not know; anything else is the author's own and is left alone.
_OF_OTHERS = ("<!-- Provide a quick summary of what the model is/does. -->", "It has been trained using [TRL]")
_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_ASKING = (
    'inputs = tokenizer("The capital of France is", return_tensors="pt").to(model.device)',
    "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))",
)


def mask_infos(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Module name -> header of its mask: shape and num_removed; read without decoding."""
    suffix = ".mask_coded"
    with safe_open(Path(folder) / files.ADAPTER_WEIGHTS, "pt") as tensors:
        names = [name for name in tensors.keys() if name.endswith(suffix)]
        return {
            name.removeprefix(PREFIX).removesuffix(suffix): mask_info(tensors.get_tensor(name), name) for name in names
        }


def write_card(folder: str | Path, config: Any, scores: Sequence[str] = ()) -> None:
    """Write the card of an adapter folder, unless its author has written one; see :func:`adapter_card`."""
    if may_write(folder):
        files.write_text(Path(folder) / files.CARD, adapter_card(folder, config, scores=scores))


def may_write(folder: str | Path) -> bool:
    """Whether there is no card, or one that no person has written."""
    file = Path(folder) / files.CARD
    if not file.is_file():
        return True
    text = file.read_text(encoding="utf-8", errors="replace")
    return any(mark in text for mark in (_MARK, *_OF_OTHERS))


def adapter_card(
    folder: str | Path, config: Any, repository: str | None = None, scores: Sequence[str] = (), **data: Any
) -> str:
    """The card of an adapter folder.

    Args:
        folder: Adapter folder.
        config: Its configuration: a ``MaskConfig``, or what is read of one without a model.
        repository: Name on the hub, for the lines that load it; default: the folder itself.
        scores: Lines about scores.
        **data: Of the metadata at the top, such as ``license``.
    """
    base, place = config.base_model_name_or_path, f'adapter = "{repository or "."}"'
    lines = ["## Use", "", f"It needs maskft ({HOW_TO_INSTALL.format('.')}).", "", "```python"]
    if base is None:
        lines += ["import maskft  # lets PEFT know masks", "from peft import PeftModel", "", place]
        lines += ["model = PeftModel.from_pretrained(base, adapter)  # base: the model that was masked, loaded before"]
    elif base == files.EMBEDDED_MODEL:
        lines += ["from maskft.adapter.merge import load_masked", "", place]
        lines += ["model, tokenizer, _ = load_masked(adapter)", *_ASKING]
    else:
        has_tokenizer = (Path(folder) / "tokenizer_config.json").is_file()
        tokenizer = "adapter" if has_tokenizer else "model.peft_config['default'].base_model_name_or_path"
        lines += ["import maskft  # lets PEFT know masks", "from peft import AutoPeftModelForCausalLM"]
        lines += ["from transformers import AutoTokenizer", "", place]
        lines += ["model = AutoPeftModelForCausalLM.from_pretrained(adapter)"]
        lines += [f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})", *_ASKING]
    lines += ["```", "", *scores]
    found = Path(folder) / files.CARD
    known = ModelCard.load(found, ignore_metadata_errors=True).data.tags if found.is_file() else None
    data = {"library_name": "peft", "pipeline_tag": _PIPELINES.get(str(config.task_type)), **data}
    return _card(config, base, mask_infos(folder), lines, "adapter", known or (), **data)


def merged_card(config: Any, base: str, infos: Mapping[str, Mapping[str, Any]], target: str) -> str:
    """The card of a checkpoint that a mask was merged into.

    Args:
        config: The adapter's configuration.
        base: The model that was masked.
        infos: Module name -> ``shape`` and ``num_removed`` of its mask.
        target: What removed weights were set to, in words.
    """
    lines = [f"The mask is merged: removed weights are set to {target}; only transformers is needed.", "", "## Use", ""]
    lines += ["```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += ['folder = "."  # this folder, or its name on the hub']
    lines += ["model = AutoModelForCausalLM.from_pretrained(folder)"]
    lines += ["tokenizer = AutoTokenizer.from_pretrained(folder)", *_ASKING, "```", ""]
    return _card(
        config, base, infos, lines, "finetune", (), library_name="transformers", pipeline_tag="text-generation"
    )


def hub_name(base: str | None) -> str | None:
    """``base`` where it can only be a name on the hub."""
    is_name = base is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not files.is_there(base)
    return base if is_name else None


def _card(
    config: Any, base: str | None, infos: Mapping[str, Any], use: Sequence[str], relation: str, tags: Any, **data: Any
) -> str:
    """Metadata and text; a base that is not on the hub is not named in the metadata, the hub would look for it."""
    name, recipe = hub_name(base), config.recipe or {}
    own = ["maskft", "mask-fine-tuning", *([f"base_model:{relation}:{name}"] if name else [])]
    own += [tag for tag in tags if tag not in own and not tag.startswith("base_model:")]
    metadata = {
        "base_model": name,
        "base_model_relation": relation if name else None,
        "datasets": list(recipe.get("datasets") or ()) or None,
        **data,
        "tags": own,
    }
    lines = [_MARK, "", *_about(base, infos), *_beside(config), *use, *_how(config, recipe)]
    front = ModelCardData(**{name: value for name, value in metadata.items() if value is not None})
    return str(ModelCard(f"---\n{front.to_yaml()}\n---\n" + "\n".join(lines).rstrip() + "\n"))


def _about(base: str | None, infos: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What this is, and what of the base it removes, by kind of layer."""
    kinds: dict[str, list[tuple[int, int]]] = {}
    for module, info in infos.items():
        kind = next((part for part in reversed(module.split(".")) if not part.isdecimal()), module)
        rows, columns = info["shape"][-2:]
        kinds.setdefault(kind, []).append((info["num_removed"], rows * columns))
    removed, numel = (sum(each[n] for group in kinds.values() for each in group) for n in (0, 1))
    name = hub_name(base)
    # Of a folder the last part: the rest is nobody else's business.
    shown = f"[{name}](https://huggingface.co/{name})" if name else f"`{printable(Path(base).name)}`" if base else None
    yield from (f"# A mask for {printable(Path(base).name) if base else 'a language model'}", "")
    yield f"[Mask Fine-Tuning]({PAPER}): of {shown or 'a model that was not named when the mask was saved'}, this "
    yield from (f"removes {removed:,} of {numel:,} weights ({removed / numel:.2%}) in {len(infos)} matrices.", "")
    yield from ("| layers | matrices | weights | removed | share |", "| --- | --- | --- | --- | --- |")
    for kind, group in kinds.items():
        part, whole = sum(r for r, _ in group), sum(n for _, n in group)
        yield f"| `{printable(kind)}` | {len(group)} | {whole:,} | {part:,} | {part / whole:.2%} |"
    yield ""


def _beside(config: Any) -> Iterator[str]:
    """What a mask does beside setting weights to zero, and the verdict of its training."""
    if config.removed_value == "base":
        yield from (f"A removed weight takes its value in `{Path(config.removed_value_model or '').name}`.", "")
    if config.weights_sha256:
        names = ", ".join(f"`{printable(name)}`" for name in config.weights_sha256)
        yield from (f"Trained beside the mask, and replaced in full: {names}.", "")
    if (config.recipe or {}).get("verdict"):
        yield from (f"On held-out rows of its training data, {_cell(str(config.recipe['verdict']))}.", "")


def _how(config: Any, recipe: Mapping[str, Any]) -> Iterator[str]:
    """The recipe as a table, and what tells this mask from any other."""
    facts = {key: value for key, value in recipe.items() if key not in ("model_name_or_path", "datasets", "verdict")}
    facts["base fingerprint"] = (config.base_fingerprint or "not recorded").partition(":")[0]
    facts |= {"mask fingerprint": config.mask_sha256, "made with": f"maskft {__version__}"}
    yield from ("", "## How it was made", "", "| | |", "| --- | --- |")
    for name, value in facts.items():
        yield f"| {_cell(name)} | {_cell(str(value))} |"


def _cell(text: str) -> str:
    """Text without what Markdown would read as a cell's end, a link, HTML or emphasis."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", printable(text))
