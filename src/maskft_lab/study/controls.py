"""``controls: standard`` of a recipe: what every learned mask has to be better than, as methods of the study."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from maskft.training.method_arguments import FIXED_MASK_METHODS, PEFT
from maskft_common.yaml_file import read_yaml

TEMPLATE = Path(__file__).parents[1] / "recipes" / "controls.yaml"
LENGTHS = ("num_train_epochs", "max_steps")  # options that say how long a run trains
# Of the parent's rate, those that are tried first; a mask of more settings is compared with as many.
_RATES = (0.5, 1, 2, 0.25, 4, 0.125, 8, 0.7, 1.4, 2.8, 0.35, 5.6)
_ADAPTER_RATES = (1e-3, 3e-4, 3e-3, 1e-4, 1e-2, 3e-2, 3e-5, 2e-3, 5e-4, 5e-3, 2e-4, 2e-2)  # no multiples
_MIN_RATES = 3
# With the length: what a control that is trained has from the mask.
_OF_A_STEP = "max_train_samples max_length per_device_train_batch_size gradient_accumulation_steps global_batch_size"
_SHARED = (*LENGTHS, *_OF_A_STEP.split())

Methods = dict[str, Any]  # section `methods`, as it stands in the file


def with_standard_controls(
    methods: Methods, train: Mapping[str, Any], masks: list[str] | None = None, grid: Collection[str] = ()
) -> Methods:
    """The methods, and those of ``recipes/controls.yaml`` for each learned mask.

    Args:
        methods: The recipe's own; one of a control's name is kept instead of it, and null leaves that control out.
        train: Options of all methods.
        masks: The learned masks that get them; None: all.
        grid: What the study varies: ``METHOD.OPTION``.

    Raises:
        ValueError: Where one of ``masks`` is no learned mask, there is none at all, or the grid varies its length.
    """
    learned = [name for name, mask in methods.items() if isinstance(mask, dict) and mask.get("method") == "mask"]
    for name in masks or ():
        if name not in learned:
            raise ValueError(f"controls names {name!r}, which is no learned mask; name one, or write standard")
    learned = [name for name in learned if masks is None or name in masks]
    if not learned:
        raise ValueError("controls has no learned mask to stand beside; add one, or drop it")
    controls: Methods = {}
    for name in learned:
        varied = next((option for option in _SHARED if f"{name}.{option}" in grid), None)
        if varied:
            raise ValueError(f"grid {name}.{varied} gives the mask several lengths, and its controls have one; drop it")
        # Two masks of one parent and as many steps share the controls that no mask is in.
        for control, method in _controls_of(name, methods, train):
            if method not in controls.values():
                controls[control if control not in controls else f"{control} ({name})"] = method
    kept = {name: method for name, method in methods.items() if method is not None or name not in controls}
    return kept | {name: method for name, method in controls.items() if name not in methods}


def _controls_of(name: str, methods: Methods, train: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and methods of the controls of one mask."""
    mask = methods[name]
    parent = mask.get("from")
    made = methods.get(parent) if isinstance(parent, str) else None
    has_rate = isinstance(made, dict) and made.get("method") == "full"
    layers = mask.get("mask_layers_to_transform", train.get("mask_layers_to_transform"))
    tune = mask["tune"] if isinstance(mask.get("tune"), dict) else {}
    # Where the mask's steps are tuned, so are those of what is trained.
    lengths = {key: tune[key] for key in LENGTHS if key in tune}
    # What is said for all methods is theirs too; said once more, it would be another control.
    shared = {k: mask[k] for k in _SHARED if k in mask and (k not in train or mask[k] != train[k])}
    for control, entry in read_yaml(TEMPLATE).items():
        if (entry["method"] not in FIXED_MASK_METHODS and not has_rate) or (entry.get("partial_layers") and not layers):
            continue
        method = {k: v.format(mask=name, parent=parent) if isinstance(v, str) else v for k, v in entry.items()}
        method |= {key: mask[key] for key in ("from", "data", "seeds") if key in mask}
        if entry["method"] in ("full", PEFT):
            tried = lengths | (_rates(tune, entry["method"]) if method.pop("tune", None) else {})
            method = shared | method | ({"tune": tried} if tried else {})
        if "partial_layers" in entry:
            method["partial_layers"] = layers
        yield control.format(mask=name, parent=parent), method


def _rates(tune: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Rates of a method to try: no fewer than the settings that a mask is tuned over, of those there are."""
    lists = (values for option, values in tune.items() if option not in LENGTHS)
    sizes = (values.get("times_parent") if isinstance(values, dict) else values for values in lists)
    number = max(math.prod(len(values) for values in sizes if isinstance(values, list)), _MIN_RATES)
    return {"learning_rate": [*_ADAPTER_RATES[:number]] if method == PEFT else {"times_parent": [*_RATES[:number]]}}
