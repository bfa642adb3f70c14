"""``controls: standard`` of a recipe: what every learned mask has to be better than, as methods of the study."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

LENGTHS = ("num_train_epochs", "max_steps")  # options that say how long a run trains
_LAYERS = "mask_layers_to_transform"
# Of the parent's rate, those that are tried first; a mask of more settings is compared with as many.
_RATES = (0.5, 1, 2, 0.25, 4, 0.125, 8)
_MIN_RATES = 3
_NUM_DRAWN = 8  # masks of which the best is taken
_AFTER = ("start_mask", "keep_mask")  # options that name the mask after which weights train
# Where these differ, epochs or steps of two methods are not of one length.
_OF_A_STEP = (
    "data",
    "max_train_samples",
    "max_length",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "global_batch_size",
)

Methods = dict[str, Any]  # section `methods`, as it stands in the file


def with_standard_controls(
    methods: Methods,
    train: dict[str, Any],
    masks: list[str] | None = None,
    grid: Collection[str] = (),
) -> Methods:
    """The methods, and controls for each learned mask.

    For the mask's parent, at the mask's steps, a warm restart at the best of three rates, or of as many as the mask is
    tuned over (at most seven), and an annealed fine-tuning; for a parent that was fine-tuned itself, its interpolation
    with what it was made from. For each mask: random masks (one, the best of eight), magnitude and Wanda masks and, of
    a fine-tuned parent, partial fine-tuning of its layers and all weights trained after the random mask, both at the
    best of the restart's rates. Where the mask's steps are tuned or doubled, so are those of what is trained. Halving
    ends at the mask's own length, which they have.

    For each method in which the weights train after a mask of a fine-tuned model (``start_mask``, ``keep_mask``), two
    twins, as long as mask and weights together and tuned as the weights are: the same after the random mask, and with
    no mask at all. Where one of the two lengths is tuned, in the grid or not given, or their steps are of different
    data or batches, there is no sum and no twin.

    Args:
        methods: The recipe's own; one of a control's name is kept instead of it.
        train: Options of all methods.
        masks: The learned masks that get them; None: all.
        grid: What the study varies: ``METHOD.OPTION``.

    Raises:
        ValueError: Where one of ``masks`` is no learned mask, there is none at all, or the grid varies its length.
    """
    for name in masks or ():
        if not isinstance(name, str) or not _is_learned(methods.get(name)):
            raise ValueError(f"controls names {name!r}, which is no learned mask; name one, or write standard")
    learned = {
        name: mask
        for name, mask in methods.items()
        if _is_learned(mask) and name in (methods if masks is None else masks)
    }
    if not learned:
        raise ValueError("controls has no learned mask to stand beside; add one, or drop it")
    controls: Methods = {}
    for name, mask in learned.items():
        varied = next((option for option in (*LENGTHS, *_OF_A_STEP) if f"{name}.{option}" in grid), None)
        if varied:
            raise ValueError(
                f"grid {name}.{varied} gives the mask several lengths, and its controls can have but one; write a "
                "method for each, or drop controls"
            )
        # Two masks of one parent and as many steps share the controls that no mask is in.
        for control, method in (*_of_parent(mask, methods, train), *_of_mask(name, mask, methods, train)):
            if method not in controls.values():
                controls[control if control not in controls else f"{control} ({name})"] = method
    for name, method in methods.items():
        for twin, control in _twins(name, method, learned, train, grid):
            # It may be written out under another name, and two ways to train after a mask share a restart.
            there = map(_without_tuning, (*methods.values(), *controls.values()))
            if _without_tuning(control) not in there:
                controls[twin] = control
    return methods | {name: method for name, method in controls.items() if name not in methods}


def sum_of_lengths(
    first: Mapping[str, Any], second: Mapping[str, Any], train: Mapping[str, Any]
) -> dict[str, float] | None:
    """What says how long two trainings are together, e.g. ``{"max_steps": 5}``; None where they cannot be added.

    Args:
        first: A method as it stands in the file, or its options.
        second: Another.
        train: Options of all methods.
    """
    lengths = [length_of(method, train) for method in (first, second)]
    steps = [[method.get(option, train.get(option)) for option in _OF_A_STEP] for method in (first, second)]
    if not all(lengths) or lengths[0].keys() != lengths[1].keys() or steps[0] != steps[1]:
        return None
    return {key: round(number + lengths[1][key], 6) for key, number in lengths[0].items()}


def length_of(method: Mapping[str, Any], train: Mapping[str, Any]) -> dict[str, float]:
    """What says how long a method trains, e.g. ``{"max_steps": 5}``; nothing where that is tuned or not given."""
    tune = _tune(method)
    if any(key in tune or tune.get("double") == key for key in LENGTHS):
        return {}
    given = {key: method.get(key, train.get(key)) for key in reversed(LENGTHS)}  # max_steps wins, as in training
    return next(({key: n} for key, n in given.items() if isinstance(n, int | float) and n > 0), {})


def _is_learned(mask: Any) -> bool:
    return isinstance(mask, dict) and mask.get("method") == "mask"


def _tune(method: Mapping[str, Any]) -> dict[str, Any]:
    return method["tune"] if isinstance(method.get("tune"), dict) else {}


def _rates(mask: dict[str, Any]) -> dict[str, Any]:
    """Rates to try: no fewer than the settings that a mask is tuned over."""
    lists = (values for option, values in _tune(mask).items() if option not in ("halving", "double", *LENGTHS))
    sizes = (values.get("times_parent") if isinstance(values, dict) else values for values in lists)
    number = math.prod(len(values) for values in sizes if isinstance(values, list))
    return {"learning_rate": {"times_parent": list(_RATES[: max(number, _MIN_RATES)])}}


def _trained(mask: dict[str, Any], train: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Full fine-tuning on the data and for the steps of a mask."""
    tune = _tune(mask)
    tuned = {key: tune[key] for key in LENGTHS if key in tune}
    tuned |= {"double": tune["double"]} if tune.get("double") in LENGTHS else {}
    # What is said for all methods is theirs too; said once more, it would be another control.
    same = {k: mask[k] for k in (*LENGTHS, *_OF_A_STEP) if k in mask and (k not in train or mask[k] != train[k])}
    tune = tuned | options.pop("tune", {})
    return {
        "method": "full",
        "from": mask["from"],
        **_kept(mask),
        **same,
        **options,
        **({"tune": tune} if tune else {}),
    }


def _kept(mask: dict[str, Any]) -> dict[str, Any]:
    """What a control has in common with a mask."""
    return {key: mask[key] for key in ("data", "seeds") if key in mask}


def _is_tuned_model(name: Any, methods: Methods) -> bool:
    """Whether all weights of a method were trained, so that it has a rate, of which others are multiples."""
    made = methods.get(name) if isinstance(name, str) else None
    return isinstance(made, dict) and made.get("method") == "full"


def _of_parent(mask: dict[str, Any], methods: Methods, train: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    parent = mask.get("from")
    if not _is_tuned_model(parent, methods):
        return
    yield f"warm restart of {parent}", _trained(mask, train, tune=_rates(mask))
    yield f"interpolated {parent}", {"method": "interpolate", "from": parent, **_kept(mask)}
    yield f"annealed {parent}", _trained(mask, train, learning_rate="current", warmup_steps=0)


def _of_mask(
    name: str, mask: dict[str, Any], methods: Methods, train: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    layers, is_tuned = mask.get(_LAYERS, train.get(_LAYERS)), _is_tuned_model(mask.get("from"), methods)
    if layers is not None and is_tuned:
        yield f"partial full, layers of {name}", _trained(mask, train, partial_layers=layers, tune=_rates(mask))
    fixed = {key: mask[key] for key in ("from", "data", "seeds") if key in mask} | {"match": name}
    yield f"random mask of {name}", {"method": "random_mask", **fixed}
    drawn = {"method": "random_mask", **fixed, "num_candidates": _NUM_DRAWN}
    yield f"best of {_NUM_DRAWN} random masks of {name}", drawn
    yield f"L1 mask of {name}", {"method": "l1_mask", **fixed}
    yield f"Wanda mask of {name}", {"method": "wanda_mask", **fixed}
    if is_tuned:
        refit = _trained(mask, train, start_mask=f"random mask of {name}", tune=_rates(mask))
        yield f"random damage of {name}, refit", refit


def _twins(
    name: str, method: Any, learned: Methods, train: dict[str, Any], grid: Collection[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    after = {key: method[key] for key in _AFTER if isinstance(method, dict) and isinstance(method.get(key), str)}
    option, mask_name = next(iter(after.items()), (None, None))
    mask = learned.get(mask_name)
    if mask is None or not mask.get("from") or mask["from"] != method.get("from"):
        return
    length = sum_of_lengths(method, mask, train)
    if length is None or any(f"{each}.{key}" in grid for each in (name, mask_name) for key in length):
        return
    trained = {k: v for k, v in method.items() if k not in (*_AFTER, "last", "tuned_elsewhere")}
    trained |= {"method": "full", **length}
    if "tuned_elsewhere" in method and "tune" not in method:
        # Its rate was chosen for what follows this mask, not for what follows damage.
        trained = {k: v for k, v in trained.items() if k != "learning_rate"} | {"tune": _rates(method)}
    yield f"random damage, twin of {name}", trained | {option: f"random mask of {mask_name}"}
    yield f"restart, twin of {name}", trained


def _without_tuning(method: Any) -> Any:
    if not isinstance(method, dict):
        return method
    return {k: v for k, v in method.items() if k not in ("learning_rate", "tune", "tuned_elsewhere", "last")}
