"""``controls: standard`` of a recipe: the methods that every learned mask is compared with."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from maskft.training.method_arguments import FIXED_MASK_METHODS, PEFT
from maskft_common.yaml_file import read_yaml

TEMPLATE = Path(__file__).parents[1] / "recipes" / "controls.yaml"

# Options that a trained control takes from its mask: the length, and the rows and batch of a step.
_SHARED = (
    "num_train_epochs",
    "max_steps",
    "max_train_samples",
    "max_length",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "global_batch_size",
)

# Multiples of the parent's rate in the order in which they are tried. A mask that is tuned over more settings is
# compared with controls of as many rates, and never with fewer than _MIN_RATES.
_RATES = (0.5, 1, 2, 0.25, 4, 0.125, 8, 0.7, 1.4, 2.8, 0.35, 5.6)
# Rates of adapters, which are no multiples of a rate for all weights.
_ADAPTER_RATES = (1e-3, 3e-4, 3e-3, 1e-4, 1e-2, 3e-2, 3e-5, 2e-3, 5e-4, 5e-3, 2e-4, 2e-2)
_MIN_RATES = 3

Methods = dict[str, Any]  # section `methods` of the file


def with_standard_controls(
    methods: Methods,
    train: Mapping[str, Any],
    masks: list[str] | None = None,
    grid: Collection[str] = (),
) -> Methods:
    """Add the methods of ``recipes/controls.yaml`` for each learned mask.

    Args:
        methods: The recipe's own. A method with a control's name replaces the control; null leaves the control out.
        train: Options of all methods.
        masks: The learned masks that get controls; None: all.
        grid: The study's grid: ``METHOD.OPTION``.

    Raises:
        ValueError: If one of ``masks`` is not a learned mask, there is none at all, or the grid varies its length.
    """
    # The masks that get controls.
    learned = [name for name, method in methods.items() if _is_learned_mask(method)]
    if masks is not None:
        for name in masks:
            if name not in learned:
                raise ValueError(f"controls: {name!r} is not a learned mask; name one, or write standard")
        # In the order of the methods: the first mask's controls keep their plain names.
        learned = [name for name in learned if name in masks]
    if not learned:
        raise ValueError("controls: the study has no learned mask; add one, or remove controls")

    controls: Methods = {}
    for name in learned:
        _check_one_length(name, grid)
        for control, method in _controls_of(name, methods, train):
            # Two masks with one parent and the same number of steps share the controls that contain no mask.
            if method in controls.values():
                continue
            # The same control with other options gets the name of its mask.
            is_taken = control in controls
            unique_name = f"{control} ({name})" if is_taken else control
            controls[unique_name] = method

    # The recipe's own methods come first: a study without a baseline compares with its first full fine-tuning.
    kept = {}
    for name, method in methods.items():
        is_left_out = method is None and name in controls
        if not is_left_out:
            kept[name] = method
    for name, method in controls.items():
        if name not in methods:
            kept[name] = method
    return kept


def _is_learned_mask(method: Any) -> bool:
    return isinstance(method, dict) and method.get("method") == "mask"


def _check_one_length(name: str, grid: Collection[str]) -> None:
    for option in _SHARED:
        if f"{name}.{option}" in grid:
            raise ValueError(
                f"grid {name}.{option} gives the mask several lengths, but its controls have one; remove it"
            )


def _controls_of(
    name: str,
    methods: Methods,
    train: Mapping[str, Any],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and methods of the controls of one mask."""
    mask = methods[name]
    parent = mask.get("from")
    # The file has not been checked yet: a value of a wrong type counts as missing here, and pydantic reports it.
    parent_method = methods.get(parent) if isinstance(parent, str) else None
    has_full_parent = isinstance(parent_method, dict) and parent_method.get("method") == "full"
    layers_of_all = train.get("mask_layers_to_transform")
    layers = mask.get("mask_layers_to_transform", layers_of_all)
    tune = mask.get("tune")
    if not isinstance(tune, dict):
        tune = {}

    # What is tuned of the mask's length, rows and batches is tuned of its trained controls too.
    tuned_with_mask = {}
    for option in _SHARED:
        if option in tune:
            tuned_with_mask[option] = tune[option]

    # An option that `train` gives all methods is left out: written twice, two equal controls would look different.
    shared = {}
    for option in _SHARED:
        if option not in mask:
            continue
        is_repeated = option in train and mask[option] == train[option]
        if not is_repeated:
            shared[option] = mask[option]

    template = read_yaml(TEMPLATE)
    for control, entry in template.items():
        # All controls but fixed masks continue the mask's parent (at multiples of its rate), or undo a part of it.
        is_fixed_mask = entry["method"] in FIXED_MASK_METHODS
        if not is_fixed_mask and not has_full_parent:
            continue
        if entry.get("partial_layers") and not layers:
            continue

        # The entry with the names of this mask and its parent, and with options copied from the mask.
        method = {}
        for key, value in entry.items():
            if isinstance(value, str):
                value = value.format(mask=name, parent=parent)
            method[key] = value
        for key in ("from", "data", "seeds"):
            if key in mask:
                method[key] = mask[key]

        # A trained control gets the mask's length, rows and batches, and its own rates to choose from.
        is_trained = entry["method"] in ("full", PEFT)
        if is_trained:
            tried = dict(tuned_with_mask)
            if method.pop("tune", None):  # a mark in the file; the values depend on the mask
                tried |= _rates(tune, entry["method"])
            method = shared | method  # the entry's own options win
            if tried:
                method["tune"] = tried
        if "partial_layers" in entry:  # a mark too
            method["partial_layers"] = layers

        label = control.format(mask=name, parent=parent)
        yield label, method


def _rates(tune: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Rates to try: as many as the mask has settings, within the lists above."""
    num_settings = 1
    # A value of another form than these counts as one setting; pydantic reports it later.
    for option, values in tune.items():
        if option in _SHARED:
            continue  # tuned for the controls too
        if isinstance(values, dict):
            values = values.get("times_parent")
        if isinstance(values, list):
            num_settings *= len(values)
    number = max(num_settings, _MIN_RATES)

    if method == PEFT:
        rates = list(_ADAPTER_RATES[:number])
        return {"learning_rate": rates}
    factors = list(_RATES[:number])
    return {"learning_rate": {"times_parent": factors}}
