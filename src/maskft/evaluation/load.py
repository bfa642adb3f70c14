"""Load what is to be evaluated: a model, or a model with an adapter over it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel

from ..errors import UserError
from ..mask_set import read_config
from ..merge import load_masked
from ..models import check_tokenizer_fits, load_model, load_tokenizer
from ..paths import TRAINING, holds_adapter


@dataclass
class Loaded:
    """A model ready to evaluate, and the facts that go into its result file."""

    model: Any
    tokenizer: Any
    facts: dict


def load_for_evaluation(
    model_name_or_path: str | None, adapter: str | None = None, dtype: str = "float32", device: str | None = None
) -> Loaded:
    """Load a model by name, a mask adapter (masked in memory, no merge needed) or a LoRA adapter.

    Args:
        model_name_or_path: Model; may be None when the adapter names its base. An adapter folder is taken as one.
        adapter: Adapter folder.
        dtype: float32, bfloat16, float16 or auto.
        device: Where to run; default: the first GPU, else the CPU.
    """
    import maskft.tuner  # noqa: F401 - registers the method with PEFT

    if adapter is None and model_name_or_path is not None and holds_adapter(model_name_or_path):
        model_name_or_path, adapter = None, model_name_or_path
    if adapter is None:
        if model_name_or_path is None:
            raise UserError("name a model: --model_name_or_path or --adapter")
        model, tokenizer = load_model(model_name_or_path, dtype), load_tokenizer(model_name_or_path)
        facts = {"name_or_path": _portable(model_name_or_path), **_training_facts(model_name_or_path)}
    else:
        if not holds_adapter(adapter):
            raise UserError(f"{adapter!r} is not an adapter folder: it has no adapter_config.json")
        peft_type = PeftConfig.from_pretrained(adapter).peft_type
        if str(getattr(peft_type, "value", peft_type)) == "MASK":
            model, tokenizer, base = load_masked(adapter, model_name_or_path, dtype)
            config = read_config(adapter)
            facts = {
                "fingerprint": config.get("base_fingerprint"),
                "mask_fingerprint": config.get("mask_sha256"),
                "method": (config.get("recipe") or {}).get("method", "mask"),
                "seed": (config.get("recipe") or {}).get("seed"),
            }
        else:
            base = model_name_or_path or PeftConfig.from_pretrained(adapter).base_model_name_or_path
            model = PeftModel.from_pretrained(load_model(base, dtype), adapter)
            tokenizer, facts = load_tokenizer(base), {"method": "lora", **_training_facts(adapter)}
        facts |= {"name_or_path": _portable(base), "adapter": _portable(adapter)}
    check_tokenizer_fits(model, tokenizer)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Loaded(model.eval(), tokenizer, facts)


def _portable(name: str) -> str:
    """A result file is shared: a folder is named by its last component, a hub model in full."""
    return Path(name).name if Path(name).exists() else name


def _training_facts(folder: str) -> dict:
    """Method and seed of a folder that ``maskft train`` wrote."""
    file = Path(folder) / TRAINING
    if not file.is_file():
        return {}
    recipe = json.loads(file.read_text())["recipe"]
    return {"method": recipe["method"], "seed": recipe["seed"]}
