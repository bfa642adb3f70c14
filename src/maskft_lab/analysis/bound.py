"""The paper's generalisation bound (Eqs. 6-15, Table 7): code lengths, complexity terms, and the mask's file size.

The paper compares U(h) = training loss + Phi(C(h)) of full fine-tuning and of the mask. Its argument has limits: Eq. 6
holds for losses in [0, 1], not for nats per token, and needs C in nats (bits x ln 2); with many more weights than rows
Phi alone exceeds the loss of guessing (``is_vacuous``); and d[H(p) - b p] is the same for every mask of one sparsity,
also of a random one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from maskft_common.errors import UserError
from maskft_common.layout import ADAPTER_WEIGHTS

from .masks import masks_of
from .records import digest_folder, write_record

BITS = (8, 16)  # of a weight: "we always use b = 8 or 16"
DELTA = 0.05  # probability with which the bound may fail
TAIL_SHARE = 0.25  # "the mean training loss after training stabilizes" (Table 7): the last quarter of the log


def log2_binomial(d: int, z: int) -> float:
    """log2 of the number of ways to choose ``z`` of ``d`` weights, in bits: d H(p) up to terms of order log2 d."""
    # C(d, z) = d! / (z! (d - z)!), and lgamma(n + 1) is log n!. The coefficient itself, as math.comb returns it, would
    # have as many digits as there are weights.
    log_of_all = math.lgamma(d + 1)
    log_of_removed = math.lgamma(z + 1)
    log_of_kept = math.lgamma(d - z + 1)
    log_binomial = log_of_all - log_of_removed - log_of_kept
    return log_binomial / math.log(2)


def code_lengths(
    d: int,
    z: int,
    bits: float,
) -> dict[str, float]:
    """Code lengths of Eq. 11, in bits.

    Args:
        d: Number of weights.
        z: How many are removed, 0 to ``d``.
        bits: Width b of one weight, in bits.

    Returns:
        ``full``, b d; ``mask``, of the kept weights and of their places: b (d - z) + log2 C(d, z).
    """
    kept_bits = bits * (d - z)
    # Depends on the numbers alone: a mask at random places has the same length.
    place_bits = log2_binomial(d, z)
    return {"full": bits * d, "mask": kept_bits + place_bits}


def complexity_term(code_length: float, num_rows: int | None) -> float:
    """Phi of Eq. 6, of a code length in bits (as the paper puts it), for at least 2 training rows."""
    # Below 2 rows the denominator is 0 or negative.
    check_num_rows(num_rows)
    # As printed, with C in bits beside a natural logarithm. In nats, the code length would be ln 2 = 0.69 of it.
    numerator = code_length + math.log(1 / DELTA)
    denominator = 2 * (num_rows - 1)
    return math.sqrt(numerator / denominator)


def check_num_rows(num_rows: int | None) -> None:
    """Raise if there are too few training rows for a bound."""
    if num_rows is None or num_rows < 2:
        raise UserError(f"a bound needs 2 training rows or more, got {num_rows}")


def upper_bounds(
    losses: tuple[float, float],
    d: int,
    z: int,
    bits: float,
    num_rows: int | None,
    vocab_size: int,
) -> dict:
    """Both upper bounds and their difference, Eqs. 7-10 and 15.

    Args:
        losses: Training loss after full fine-tuning, and with the mask, nats per token.
        d: Number of weights.
        z: How many are removed.
        bits: Width b of one weight, in bits.
        num_rows: Of training; None: not known.
        vocab_size: Size of the vocabulary, whose logarithm is the loss of guessing.

    Returns:
        ``code_lengths``; ``phi`` and ``bound``, of ``full`` and ``mask``; ``delta_train`` and ``delta_complexity`` of
        Eq. 10, and ``difference``, their sum; ``is_vacuous``, whether the smaller Phi exceeds the loss of guessing.
    """
    # The difference of the bounds has two parts (Eq. 10): of the training losses, and of the complexity terms.
    loss_full, loss_mask = losses
    delta_train = loss_mask - loss_full

    lengths = code_lengths(d, z, bits)
    phi_full = complexity_term(lengths["full"], num_rows)
    phi_mask = complexity_term(lengths["mask"], num_rows)
    delta_complexity = phi_mask - phi_full

    bound_full = loss_full + phi_full
    bound_mask = loss_mask + phi_mask

    # A model that guesses has the loss log(vocabulary): a bound above that says nothing.
    loss_of_guessing = math.log(vocab_size)
    return {
        "code_lengths": lengths,
        "phi": {"full": phi_full, "mask": phi_mask},
        "bound": {"full": bound_full, "mask": bound_mask},
        "delta_train": delta_train,
        "delta_complexity": delta_complexity,
        "difference": delta_train + delta_complexity,
        # The losses are above 0, so a Phi that is too large alone makes the bound too large.
        "is_vacuous": min(phi_full, phi_mask) > loss_of_guessing,
    }


def stable_training_loss(
    history: Sequence[Mapping],
    until_step: int | None = None,
) -> float:
    """Mean of the last quarter of the training losses logged up to a step (None: the last), nats per token (Table 7).

    Raises:
        UserError: If none was logged by then.
    """
    losses: list[float] = []
    for row in history:
        # Rows of held-out losses have no training loss.
        is_in_time = until_step is None or row["step"] <= until_step
        # Losses after the best checkpoint are of weights that were not kept.
        if "loss" in row and is_in_time:
            losses.append(row["loss"])
    if not losses:
        raise UserError(
            f"no training loss was logged up to the best checkpoint (step {until_step}), and the bound needs it: train "
            "with smaller logging_steps, or until a step lowers held-out loss"
        )

    # A short run may log fewer than four losses.
    num_in_tail = max(1, round(TAIL_SHARE * len(losses)))
    tail = losses[-num_in_tail:]
    return sum(tail) / len(tail)


def analyse_bound(
    file: Path,
    adapter: str,
    losses: tuple[float, float],
    size: tuple[int, int],
    num_rows: int | None,
) -> None:
    """Write the bounds over the whole model and over the masked matrices alone, and the mask's file size (``.json``).

    Args:
        file: Where the record goes.
        adapter: Folder of the mask.
        losses: Training loss after full fine-tuning, and with the mask, nats per token.
        size: All weights of the model, and its vocabulary.
        num_rows: Of training; None: not known.
    """
    loss_full, loss_mask = losses
    num_weights, vocab_size = size
    masks = masks_of(adapter)
    # All removed weights are in masked matrices, so z is the same for both sizes.
    z = masks.num_removed

    # Over all weights of the model, where those that the mask does not cover count as kept, and over the masked
    # matrices alone.
    of_model: dict[str, dict] = {}
    of_matrices: dict[str, dict] = {}
    for bits in BITS:
        key = str(bits)  # JSON has text as keys
        of_model[key] = upper_bounds(
            losses,
            num_weights,
            z,
            bits,
            num_rows,
            vocab_size,
        )
        of_matrices[key] = upper_bounds(
            losses,
            masks.numel,
            z,
            bits,
            num_rows,
            vocab_size,
        )

    # A code length that exists: the file of an adapter is entropy-coded, so it can be compared with log2 C(d, z).
    weights_file = Path(adapter) / ADAPTER_WEIGHTS
    record = {
        "training_loss": {"full": loss_full, "mask": loss_mask},
        "num_weights": num_weights,
        "num_masked_weights": masks.numel,
        "num_removed": z,
        "model": of_model,
        "masked_matrices": of_matrices,
        "adapter_bytes": weights_file.stat().st_size,
    }
    settings = {
        "what": "bound",
        "adapter": digest_folder(adapter),
        "num_rows": num_rows,
    }
    write_record(file, record, settings)
