"""The card of an adapter, its README.md: the base, the removed weights, lines that load it, how it was trained."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open

from maskft_common import __version__, files, layout
from maskft_common.errors import HOW_TO_INSTALL, printable

from ..models import is_gguf
from .codec import mask_info

PAPER = "https://arxiv.org/abs/2503.22764"
# In a card that has it, everything but the tags is replaced when the folder is saved.
_MARK = "<!-- written by maskft, and again whenever the folder is saved -->"
# Marks of the cards that PEFT and TRL write for a method they do not know. Any other card is its author's, and left.
_OF_OTHERS = ("<!-- Provide a quick summary of what the model is/does. -->", "It has been trained using [TRL]")
# Python for the section "Use", by the kind of the base. It runs in the adapter's folder, and a test runs it.
_ASK = """
inputs = tokenizer("The capital of France is", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))"""
_LOAD = """import maskft  # lets PEFT know masks
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

adapter = "."  # this folder, or its name on the hub
model = AutoPeftModelForCausalLM.from_pretrained(adapter)
tokenizer = AutoTokenizer.from_pretrained({tokenizer})"""
_LOAD_BY_MASKFT = """from maskft.masks.merge import load_masked

model, tokenizer, _ = load_masked(".")  # this folder"""
_LOAD_OVER = """import maskft  # lets PEFT know masks
from peft import PeftModel

model = PeftModel.from_pretrained(base, ".")  # base: the model that was masked, loaded before"""


def write_card(folder: str | Path, config: Any) -> None:
    """Write the card of an adapter folder, unless its author has written one.

    Args:
        folder: Adapter folder.
        config: Its ``MaskConfig``.
    """
    file = Path(folder) / layout.CARD
    if file.is_file():
        text = file.read_text(encoding="utf-8", errors="replace")
    else:
        text = f"---\n{{}}\n---\n{_MARK}"  # an empty card of ours
    is_generated = any(mark in text for mark in (_MARK, *_OF_OTHERS))
    if not is_generated:
        return

    # Tags such as those of add_model_tags are kept, but not PEFT's own, which name the base: it may be a private path.
    metadata = ModelCard(text, ignore_metadata_errors=True).data
    old_tags = getattr(metadata, "tags", None) or []
    tags = [tag for tag in old_tags if not tag.startswith("base_model:")]
    card = _card(Path(folder), config, tags)
    files.write_text(file, card)


def hub_name(base: str | None) -> str | None:
    """``base`` if it can only be a name on the hub, else None: a local folder may be named like one."""
    # OWNER/NAME.
    if base is None or not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        return None
    if files.is_there(base):
        return None
    return base


def _card(folder: Path, config: Any, tags: list[str]) -> str:
    """Metadata and text. A base that is not on the hub is left out of the metadata: the hub would look for it."""
    # maskft's commands write one, other trainers do not.
    recipe = config.recipe or {}
    datasets = list(recipe.get("datasets") or ())
    is_causal = config.task_type == "CAUSAL_LM"
    # Each once, in this order: a card that is written again has ours already.
    all_tags = dict.fromkeys(["maskft", "mask-fine-tuning", *tags])
    front = ModelCardData(
        base_model=hub_name(config.base_model_name_or_path),
        datasets=datasets or None,
        library_name="peft",
        pipeline_tag="text-generation" if is_causal else None,
        tags=list(all_tags),
    )
    lines = [
        _MARK,
        "",
        *_about(folder, config),
        *_use(folder, config),
        *_training(config, recipe),
    ]
    text = "\n".join(lines).rstrip()
    return str(ModelCard(f"---\n{front.to_yaml()}\n---\n{text}\n"))


def _about(folder: Path, config: Any) -> Iterator[str]:
    """The base, how many weights are removed and replaced, and the verdict of its training."""
    # Counted from the headers of the masks, without decoding them.
    num_masks = 0
    removed = 0
    numel = 0
    with safe_open(folder / layout.ADAPTER_WEIGHTS, "pt") as tensors:
        for name in tensors.keys():
            if not name.endswith(".mask_coded"):
                continue
            info = mask_info(tensors.get_tensor(name), name)
            rows, columns = info["shape"]
            num_masks += 1
            removed += info["num_removed"]
            numel += rows * columns

    # A name on the hub becomes a link; of a path, only the last part is shown.
    path = config.base_model_name_or_path or "a language model"
    base = _last_part(path)
    on_hub = hub_name(path)
    if on_hub:
        shown = f"[{on_hub}](https://huggingface.co/{on_hub})"
    else:
        shown = f"`{base}`"
    yield f"# A mask for {base}"
    yield ""
    yield f"[Mask Fine-Tuning]({PAPER}): of {shown}, this"
    yield f"removes {removed:,} of {numel:,} weights ({removed / numel:.2%}) in {num_masks} matrices."
    yield ""

    if config.removed_value == "base":
        value_model = _last_part(config.removed_value_model or "")
        yield f"A removed weight takes its value in `{value_model}`."
        yield ""
    if config.weights_sha256:
        replaced = ", ".join(f"`{printable(name)}`" for name in config.weights_sha256)
        yield f"Trained beside the mask, and replaced in full: {replaced}."
        yield ""

    verdict = (config.recipe or {}).get("verdict")
    if verdict:
        yield f"On held-out rows of its training data, {_cell(str(verdict))}."
        yield "Methods that train on the same tokens were not compared; `maskft study` does that."
        yield ""


def _use(folder: Path, config: Any) -> Iterator[str]:
    """Lines of Python that load the mask."""
    base = config.base_model_name_or_path
    if base is None:
        load = _LOAD_OVER
    elif base == layout.EMBEDDED_MODEL or is_gguf(base):
        # Neither is a folder or a name that transformers loads by itself.
        load = _LOAD_BY_MASKFT + _ASK
    else:
        load = _LOAD + _ASK

    # A Python expression: the adapter's own tokenizer, or that of the base.
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = "adapter"
    else:
        tokenizer = "model.peft_config['default'].base_model_name_or_path"
    install = HOW_TO_INSTALL.format(".")
    yield "## Use"
    yield ""
    yield f"It needs maskft ({install})."
    yield ""
    yield "```python"
    yield load.format(tokenizer=tokenizer)
    yield "```"


def _training(config: Any, recipe: Mapping[str, Any]) -> Iterator[str]:
    """The recipe as a table, with the fingerprints of base and mask."""
    shown_above = ("model_name_or_path", "datasets", "verdict")
    facts = {key: value for key, value in recipe.items() if key not in shown_above}
    facts["base fingerprint"] = config.base_fingerprint or "not recorded"
    facts["mask fingerprint"] = config.mask_sha256
    facts["made with"] = f"maskft {__version__}"
    yield ""
    yield "## How it was made"
    yield ""
    yield "| setting | value |"
    yield "| --- | --- |"
    for name, value in facts.items():
        yield f"| {_cell(name)} | {_cell(str(value))} |"


def _last_part(path: str) -> str:
    """The last part of a path, for a code span: the rest is nobody else's business."""
    return printable(Path(path).name).replace("`", "'")


def _cell(text: str) -> str:
    """Text with escapes for characters that Markdown would read as a cell's end, a link, HTML or emphasis."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", printable(text))
