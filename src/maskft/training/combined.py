"""Models made from a fine-tuned one and the one it was made from, without training: controls for a mask.

With t0 the weights before fine-tuning and t1 those after it, all of them, embeddings and norms included:

- ``interpolate``: (1 - a) * t0 + a * t1 with one a for all weights (WiSE-FT, arXiv:2109.01903).
- ``dare``: t0 + b * (t1 - t0) / (1 - p) with b = 0 with probability p, else 1, drawn for each weight (DARE,
  arXiv:2311.03099).

The held-out rows choose a, or p.
"""

from __future__ import annotations

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from maskft_base.errors import UserError
from maskft_base.runtime import peak_memory_bytes

from ..data.prepared import Prepared
from ..loss import mean_nll, nll_per_item
from ..models import check_model_source, load_model
from .arguments import TrainingArguments
from .method_arguments import COMBINED_METHODS, MethodArguments
from .record import TrainingSummary


@torch.no_grad()
def combine(
    model: PreTrainedModel,
    data: Prepared,
    method: MethodArguments,
    training: TrainingArguments,
    tokenizer,
    console: Console,
) -> tuple[PreTrainedModel, TrainingSummary]:
    """Combine ``model`` with ``method.before_model``, in place, as is best on the held-out rows.

    Returns:
        The model and what was done; ``history`` has the held-out loss at each value that was tried.

    Raises:
        UserError: If the two models differ in a parameter's name or shape.
    """
    check_model_source(method.before_model)
    before = dict(load_model(method.before_model, str(model.dtype).removeprefix("torch.")).named_parameters())
    after = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    odd = next((n for n in {**before, **after} if n not in before or n not in after), None)
    odd = odd or next((name for name in after if before[name].shape != after[name].shape), None)
    if odd:
        raise UserError(
            f"before_model {method.before_model!r} is another model: {odd} is not in both, or of another shape"
        )
    model = model.to(training.device).eval()
    history = []
    for value in method.combine_values or COMBINED_METHODS[method.method]:
        _set(model, method.method, before, after, value, training.seed)
        losses = nll_per_item(
            model,
            data.heldout,
            batch_size=training.per_device_eval_batch_size,
            pad_token_id=tokenizer.pad_token_id or 0,
        )
        history.append({"value": value, "eval_loss": mean_nll(losses)})
    best = min(history, key=lambda row: row["eval_loss"])
    _set(model, method.method, before, after, best["value"], training.seed)
    console.print(f"{method.method}: {best['value']:g} is the best of {len(history)} values by held-out loss")
    return model, TrainingSummary(
        method=method.method, best_loss=best["eval_loss"], peak_memory_bytes=peak_memory_bytes(), history=history
    )


def _set(model, method: str, before: dict[str, Tensor], after: dict[str, Tensor], value: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        t0, t1 = before[name].float(), after[name].to(before[name].device).float()
        mixed = interpolated(t0, t1, value) if method == "interpolate" else dare(t0, t1, value, generator)
        parameter.copy_(mixed)


def interpolated(before: Tensor, after: Tensor, share: float) -> Tensor:
    """``(1 - share) * before + share * after``; exactly ``after`` at 1 and ``before`` at 0."""
    return torch.lerp(before, after, share)


def dare(before: Tensor, after: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """``before`` plus each difference with probability ``1 - rate``, rescaled by ``1 / (1 - rate)``."""
    kept = torch.rand(before.shape, generator=generator).to(before.device) >= rate
    return before + kept * (after - before) / (1 - rate)
