"""Which options of ``maskft train`` a method uses, so that no record, card or report shows another one.

A study gives the options of its `train` block to all methods, those of training and of learned masks included, although
a mask that is drawn or ranked (random, L1, Wanda) uses neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# How the scores of a mask are learned. Masks that are drawn or ranked have no scores.
LEARNER_OPTIONS = frozenset(
    f"mask_{name}"
    for name in "preset selection gradient price sharpness sharpness_end temperature temperature_end threshold "
    "rank_by init_scores init_std init_value".split()
)
_RAMP = "mask_sparsity_ramp"

# The term of the loss that keeps a model near its base.
KL_OPTIONS = frozenset("kl_to_base kl_budget kl_dataset_name kl_batch_size".split())
# How weights or scores are trained. Rows, their length, the dtype and the batch size of held-out rows are not among
# them: methods that are not trained are measured on the same held-out rows.
_TRAINING_OPTIONS = frozenset(
    "learning_rate num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps "
    "global_batch_size lr_scheduler_type lr_scheduler_kwargs warmup_steps weight_decay max_grad_norm optim optim_args "
    "adam_beta1 adam_beta2 adam_epsilon label_smoothing_factor neftune_noise_alpha loss_type "
    "gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing packing padding_free "
    "eval_strategy eval_steps eval_on_start save_strategy save_steps save_total_limit load_best_model_at_end "
    "logging_strategy logging_steps logging_first_step keep_last".split()
)
_RANKED = ("l1_mask", "wanda_mask")  # the same for every seed
_WITHOUT_ROWS = ("random_mask", "l1_mask")


# Options with a value called `no`, of maskft train and of accelerate launch. YAML reads a plain `no` as false.
TAKE_NO = frozenset({"eval_strategy", "save_strategy", "logging_strategy", "mixed_precision", "dynamo_backend"})


def false_as_no(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a YAML file, with false as the ``no`` that was written where an option has a value of that name."""
    meant = dict(options)
    for name in TAKE_NO & meant.keys():
        if meant[name] is False:
            meant[name] = "no"
    return meant


def unused_options(
    method: str | None,
    options: Mapping[str, Any],
    *,
    is_trained: bool,
    is_matched: bool,
) -> frozenset[str]:
    """Names of the options that do not change what a method does.

    Args:
        method: The method, such as ``l1_mask``, or the type of an adapter of PEFT's.
        options: Its options of ``maskft train``.
        is_trained: Whether it takes optimizer steps.
        is_matched: Whether it removes as many weights as another mask (``match_adapter``).
    """
    unused: set[str] = set()
    # A mask that is drawn or ranked once.
    if not is_trained:
        unused |= _TRAINING_OPTIONS | KL_OPTIONS | LEARNER_OPTIONS | {_RAMP}
    # The counts are those of the other mask.
    if is_matched:
        unused.add("mask_sparsity")
    if method in _RANKED:
        unused.add("mask_seed")

    # Calibration rows: for scores that start from Wanda's ranks, and for masks that are ranked by inputs or gradients.
    starts_on_rows = is_trained and options.get("mask_init_scores") == "wanda"
    is_made_from_rows = not is_trained and method not in _WITHOUT_ROWS
    if not starts_on_rows and not is_made_from_rows:
        unused.add("num_calibration_samples")
    return frozenset(unused)
