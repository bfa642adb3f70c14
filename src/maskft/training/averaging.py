"""The mean of the weights of a training's last checkpoints: a control for a mask, which also acts on finished weights.

The mean of a few checkpoints at equal distances, as machine translation has used it (arXiv:1706.03762, Sec. 6.1); with
a rate that does not fall it is stochastic weight averaging (arXiv:1803.05407).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from ..data.prepared import Prepared
from ..loss import mean_nll
from ..models import load_model
from .checkpoints import checkpoints_in, damage, step_of
from .record import TrainingSummary
from .trainer import MaskTrainer


@torch.no_grad()
def average_checkpoints(
    trainer: MaskTrainer, number: int, data: Prepared, summary: TrainingSummary, console: Console
) -> TrainingSummary:
    """Give the model the mean of its last ``number`` checkpoints, where held-out loss is lower than at the best one.

    Fewer where there are fewer, at least two; damaged ones are left out.

    Returns:
        The summary; with the steps of the checkpoints, and the loss of their mean, where that is what is kept.
    """
    if number < 2:
        return summary
    newest_first = reversed(checkpoints_in(Path(trainer.args.output_dir)))  # each is read whole, so no more than needed
    folders = list(islice((folder for folder in newest_first if damage(folder) is None), number))[::-1]
    if len(folders) < 2:
        return summary
    model = trainer.model
    best = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    _set(model, mean_weights(folders))
    loss, steps = mean_nll(trainer.heldout_loss()(data.heldout)), [step_of(folder) for folder in folders]
    is_kept = summary.best_loss is None or loss < summary.best_loss
    if not is_kept:
        _set(model, best)
    console.print(
        f"mean of {len(steps)} checkpoints (steps {', '.join(map(str, steps))}): held-out loss {loss:.4f}, "
        + ("the best" if is_kept else f"not better than the best one's {summary.best_loss:.4f}"),
        highlight=False,
    )
    if not is_kept:
        return summary
    return summary.model_copy(update={"best_loss": loss, "best_step": summary.num_steps, "averaged_steps": steps})


def mean_weights(folders: Sequence[Path]) -> dict[str, Tensor]:
    """Mean of each parameter over the checkpoints, float32; one of them is in memory beside it."""
    means: dict[str, Tensor] = {}
    for count, folder in enumerate(folders, 1):
        for name, parameter in load_model(str(folder)).named_parameters():
            value = parameter.detach().float()
            means[name] = value.clone() if count == 1 else means[name].lerp_(value, 1 / count)
    return means


def _set(model, weights: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
