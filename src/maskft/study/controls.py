"""``controls: standard`` of a recipe: what every learned mask has to be better than, as methods of the study."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from ..training.method_arguments import DSD

LENGTHS = ("num_train_epochs", "max_steps")  # options that say how long a run trains
_LAYERS = "mask_layers_to_transform"
_RATES = {"times_parent": [0.5, 1, 2]}
_NUM_DRAWN = 8  # masks of which the best is taken
_NUM_AVERAGED = 5  # checkpoints
_AFTER = ("start_mask", "keep_mask")  # options that name the mask after which weights train
# Where these differ, epochs or steps of two methods are not of one length.
_OF_A_STEP = (
    "data",
    "max_train_samples",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "global_batch_size",
)

Methods = dict[str, Any]  # section `methods`, as it stands in the file


def with_standard_controls(
    methods: Methods, train: dict[str, Any], masks: list[str] | None = None, grid: Collection[str] = ()
) -> Methods:
    """The methods, and controls for each learned mask that starts from another method.

    For the mask's parent, at the mask's steps: a warm restart at the best of three rates, another whose last
    checkpoints are averaged, and an annealed fine-tuning; for a parent that was fine-tuned itself, its interpolation
    with what it was made from. For each mask: partial fine-tuning of its layers, random masks (one, the best of
    eight, one with all weights trained after it at the best of three rates), magnitude and Wanda masks. Where the
    mask's steps are tuned or doubled, so are those of what is trained. Halving ends at the mask's own length, which
    they have.

    For each method in which the weights train after such a mask (``start_mask``, ``keep_mask``), two twins, as long as
    mask and weights together and tuned as the weights are: the same after the random mask, and with no mask at all.
    Where one of the two lengths is tuned, in the grid or not given, or their steps are of different data or batches,
    there is no sum and no twin.

    Args:
        methods: The recipe's own; one of a control's name is kept instead of it.
        train: Options of all methods.
        masks: The learned masks that get them; None: all.
        grid: What the study varies: ``METHOD.OPTION``.

    Raises:
        ValueError: Where one of ``masks`` is no learned mask with a ``from``.
    """
    controls: Methods = {}
    for name in masks or ():
        mask = methods.get(name)
        if not _is_learned(mask):
            raise ValueError(
                f"controls names {name!r}, which is no learned mask with a `from`; name one, or write standard"
            )
    for name, mask in methods.items():
        if masks is not None and name not in masks:
            continue
        if _is_learned(mask):
            # Two masks of one parent and as many steps share the controls that no mask is in.
            for control, method in (*_of_parent(mask, methods), *_of_mask(name, mask, train)):
                if method not in controls.values():
                    controls[control if control not in controls else f"{control} ({name})"] = method
    for name, method in methods.items():
        for twin, control in _twins(name, method, methods, train, masks, grid):
            # It may be written out under another name, and two ways to train after a mask share a restart.
            there = map(_without_tuning, (*methods.values(), *controls.values()))
            if _without_tuning(control) not in there:
                controls[twin] = control
    return methods | {name: method for name, method in controls.items() if name not in methods}


def _is_learned(mask: Any) -> bool:
    """Whether it is a learned mask that starts from another method."""
    return isinstance(mask, dict) and mask.get("method") == "mask" and isinstance(mask.get("from"), str)


def _tune(method: dict[str, Any]) -> dict[str, Any]:
    return method["tune"] if isinstance(method.get("tune"), dict) else {}


def _trained(mask: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Full fine-tuning on the data and for the steps of a mask."""
    tune = _tune(mask)
    tuned = {key: tune[key] for key in LENGTHS if key in tune}
    tuned |= {"double": tune["double"]} if tune.get("double") in LENGTHS else {}
    length = {key: mask[key] for key in LENGTHS if key in mask}
    tune = tuned | options.pop("tune", {})
    return {
        "method": "full",
        "from": mask["from"],
        **_kept(mask),
        **length,
        **options,
        **({"tune": tune} if tune else {}),
    }


def _kept(mask: dict[str, Any]) -> dict[str, Any]:
    """What a control has in common with a mask."""
    return {key: mask[key] for key in ("data", "seeds") if key in mask}


def _of_parent(mask: dict[str, Any], methods: Methods) -> Iterator[tuple[str, dict[str, Any]]]:
    parent = mask["from"]
    made = methods.get(parent)
    if not isinstance(made, dict) or made.get("method") not in ("full", DSD):
        return
    yield f"warm restart of {parent}", _trained(mask, tune={"learning_rate": _RATES})
    averaged = _trained(mask, average_checkpoints=_NUM_AVERAGED, tune={"learning_rate": _RATES})
    yield f"averaged restart of {parent}", averaged
    yield f"interpolated {parent}", {"method": "interpolate", "from": parent, **_kept(mask)}
    yield f"dare {parent}", {"method": "dare", "from": parent, **_kept(mask)}
    yield f"annealed {parent}", _trained(mask, learning_rate="current", warmup_steps=0)


def _of_mask(name: str, mask: dict[str, Any], train: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    layers = mask.get(_LAYERS, train.get(_LAYERS))
    if layers is not None:
        yield f"partial full, layers of {name}", _trained(mask, partial_layers=layers)
    fixed = {"from": mask["from"], **_kept(mask), "match": name}
    yield f"random mask of {name}", {"method": "random_mask", **fixed}
    drawn = {"method": "random_mask", **fixed, "num_candidates": _NUM_DRAWN}
    yield f"best of {_NUM_DRAWN} random masks of {name}", drawn
    yield f"L1 mask of {name}", {"method": "l1_mask", **fixed}
    yield f"Wanda mask of {name}", {"method": "wanda_mask", **fixed}
    refit = _trained(mask, start_mask=f"random mask of {name}", tune={"learning_rate": _RATES})
    yield f"random damage of {name}, refit", refit


def _twins(
    name: str, method: Any, methods: Methods, train: dict[str, Any], masks: list[str] | None, grid: Collection[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    option = next((option for option in _AFTER if isinstance(method, dict) and method.get(option)), None)
    if option is None or method.get("method") not in ("full", DSD) or not isinstance(method[option], str):
        return
    mask = methods.get(method[option])
    if not _is_learned(mask):
        return
    (key, weights), (key_of_mask, length_of_mask) = _length(method, train), _length(mask, train)
    is_sum = weights is not None and key == key_of_mask
    is_sum = is_sum and all(method.get(k, train.get(k)) == mask.get(k, train.get(k)) for k in _OF_A_STEP)
    is_sum = is_sum and not any(f"{each}.{key}" in grid for each in (name, method[option]))
    if not is_sum or mask["from"] != method.get("from") or (masks is not None and method[option] not in masks):
        return
    trained = {k: v for k, v in method.items() if k not in (*_AFTER, "last", "tuned_elsewhere")}
    trained |= {"method": "full", key: round(weights + length_of_mask, 6)}
    if "tuned_elsewhere" in method and "tune" not in method:
        # Its rate was chosen for what follows this mask, not for what follows damage.
        trained = {k: v for k, v in trained.items() if k != "learning_rate"} | {"tune": {"learning_rate": _RATES}}
    yield f"random damage, twin of {name}", trained | {option: f"random mask of {method[option]}"}
    yield f"restart, twin of {name}", trained


def _without_tuning(method: Any) -> Any:
    tuning = ("learning_rate", "tune", "tuned_elsewhere", "last")
    return {k: v for k, v in method.items() if k not in tuning} if isinstance(method, dict) else method


def _length(method: dict[str, Any], train: dict[str, Any]) -> tuple[str | None, float | None]:
    """Option and number that say how long a run trains; none of a length that is tuned or not given."""
    tune = _tune(method)
    if any(key in tune or tune.get("double") == key for key in LENGTHS):
        return None, None
    given = {key: method.get(key, train.get(key)) for key in reversed(LENGTHS)}  # max_steps wins, as in training
    return next(((key, n) for key, n in given.items() if isinstance(n, int | float) and n > 0), (None, None))
