"""The paper's generalisation bound (Eqs. 6-15, Table 7): code lengths, complexity terms, and the real file beside them.

The paper compares U(h) = training loss + Phi(C(h)) of full fine-tuning and of the mask. Beside its figures stands what
its argument leaves out: Eq. 6 holds for losses in [0, 1], not for nats per token, and wants C in nats (bits x ln 2);
with fewer rows than weights Phi alone exceeds the loss of guessing (``is_vacuous``); and d[H(p) - b p] is the same for
every mask of one sparsity, also a random one.
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
TAIL_SHARE = 0.25  # "the mean training loss after training stabilizes" (Table 7): the last quarter of what was logged


def log2_binomial(d: int, z: int) -> float:
    """log2 of the number of ways to choose ``z`` of ``d`` weights, in bits, by ``lgamma``: d H(p) but for log2 d."""
    return (math.lgamma(d + 1) - math.lgamma(z + 1) - math.lgamma(d - z + 1)) / math.log(2)


def code_lengths(d: int, z: int, bits: float) -> dict[str, float]:
    """Code lengths of Eq. 11, in bits.

    Args:
        d: Number of weights.
        z: How many are removed, 0 to ``d``.
        bits: Width b of one weight, in bits.

    Returns:
        ``full``, b d; ``mask``, of the kept weights and of their places: b (d - z) + log2 C(d, z).
    """
    return {"full": bits * d, "mask": bits * (d - z) + log2_binomial(d, z)}


def complexity_term(code_length: float, num_rows: int | None) -> float:
    """Phi of Eq. 6, of a code length in bits (as the paper puts it), for at least 2 training rows."""
    check_num_rows(num_rows)
    return math.sqrt((code_length + math.log(1 / DELTA)) / (2 * (num_rows - 1)))


def check_num_rows(num_rows: int | None) -> None:
    """Raise if there are too few training rows for a bound."""
    if num_rows is None or num_rows < 2:
        raise UserError(f"a bound needs 2 training rows or more, got {num_rows}")


def upper_bounds(
    losses: tuple[float, float], d: int, z: int, bits: float, num_rows: int | None, vocab_size: int
) -> dict:
    """Both upper bounds and their difference, Eqs. 7-10 and 15.

    ``losses``: training loss after full fine-tuning and with the mask, nats per token; ``d`` weights, ``z`` removed,
    ``bits`` wide; guessing has a loss of ln ``vocab_size``.

    Returns:
        ``code_lengths``; ``phi`` and ``bound``, of ``full`` and ``mask``; ``delta_train`` and ``delta_complexity`` of
        Eq. 10, and ``difference``, their sum; ``is_vacuous``, whether the smaller Phi exceeds the loss of guessing.
    """
    lengths = code_lengths(d, z, bits)
    phi = {name: complexity_term(lengths[name], num_rows) for name in ("full", "mask")}
    delta_train = losses[1] - losses[0]
    delta_complexity = phi["mask"] - phi["full"]
    return {
        "code_lengths": lengths,
        "phi": phi,
        "bound": {name: loss + phi[name] for name, loss in zip(phi, losses, strict=True)},
        "delta_train": delta_train,
        "delta_complexity": delta_complexity,
        "difference": delta_train + delta_complexity,
        "is_vacuous": min(phi.values()) > math.log(vocab_size),
    }


def stable_training_loss(history: Sequence[Mapping], until_step: int | None = None) -> float:
    """Mean of the last quarter of the training losses logged up to a step (None: the last), nats per token (Table 7).

    Raises:
        UserError: If none was logged by then.
    """
    losses = [row["loss"] for row in history if "loss" in row and (until_step is None or row["step"] <= until_step)]
    if not losses:
        raise UserError(
            f"no training loss was logged up to the best checkpoint (step {until_step}), and the bound needs it: train "
            "with smaller logging_steps, or until a step lowers held-out loss"
        )
    tail = losses[-max(1, round(TAIL_SHARE * len(losses))) :]
    return sum(tail) / len(tail)


def analyse_bound(
    file: Path, adapter: str, losses: tuple[float, float], size: tuple[int, int], num_rows: int | None
) -> None:
    """Write the bounds over the whole model and over the masked matrices alone, and the mask's file size (``.json``).

    Args:
        file: Where the record goes.
        adapter: Folder of the mask.
        losses: Training loss after full fine-tuning, and with the mask, nats per token.
        size: All weights of the model, and its vocabulary.
        num_rows: Of training; None: not known.
    """
    masks, (num_weights, vocab_size) = masks_of(adapter), size
    z = masks.num_removed
    masked = masks.numel
    record = {
        "training_loss": {"full": losses[0], "mask": losses[1]},
        "num_weights": num_weights,
        "num_masked_weights": masked,
        "num_removed": z,
        "model": {f"{b}": upper_bounds(losses, num_weights, z, b, num_rows, vocab_size) for b in BITS},
        "masked_matrices": {f"{b}": upper_bounds(losses, masked, z, b, num_rows, vocab_size) for b in BITS},
        "adapter_bytes": (Path(adapter) / ADAPTER_WEIGHTS).stat().st_size,
    }
    write_record(file, record, {"what": "bound", "adapter": digest_folder(adapter), "num_rows": num_rows})
