"""File names inside a run folder. No other module spells one."""

from __future__ import annotations

from pathlib import Path

RESULT = "result.json"
TRAINING = "training.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
LAST = "last"
SETTINGS = "settings.json"
TABLE = "table.md"
COMPARISON = "comparison.json"


def holds_adapter(folder: str | Path) -> bool:
    """Whether ``folder`` is an adapter folder."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()
