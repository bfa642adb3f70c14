"""Sizes of what a run writes to disk, from the configuration of its model alone.

``disk_needs`` in ``maskft.training.checkpoints`` makes checkpoints and saved models of them.
"""

from __future__ import annotations

import copy
import warnings
from functools import lru_cache

import torch
from transformers import PretrainedConfig

from maskft.models import load_config
from maskft.training.arguments import TrainConfig
from maskft.training.method_arguments import INTERPOLATE, UNTRAINED_METHODS
from maskft_common.errors import UserError

from .empty_model import model_without_data
from .estimate import FLOAT32_BYTES, with_trained_parameters

# Bytes of all weights, of the trained parameters with scores in float32, and of these scores.
Sizes = tuple[int, int, int]


def sizes_of(run: TrainConfig) -> Sizes | None:
    """Sizes of a run's model; None if its configuration is not on this machine, or makes no model that trains."""
    try:
        return _sizes(run)
    except UserError:
        # The run itself says what is wrong.
        return None


@lru_cache(maxsize=1)
def _local_config(name_or_path: str, revision: str | None) -> PretrainedConfig:
    """Configuration of a model on this machine; read once for all runs of a study.

    transformers reads the whole vocabulary of a GGUF file to make it, which takes seconds.
    """
    return load_config(name_or_path, revision=revision, local_files_only=True)


def _sizes(run: TrainConfig) -> Sizes:
    source = run.model
    config = copy.deepcopy(_local_config(source.model_name_or_path, source.model_revision))
    # None: as the configuration says.
    dtype = None
    if source.dtype != "auto":
        dtype = getattr(torch, source.dtype)

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_without_data(config, dtype, source.attn_implementation)
        weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
        if run.method.method == INTERPOLATE:
            return weight_bytes, 0, 0
        model, masked = with_trained_parameters(model, run, torch.float32)

    # In the place of scores are the effective weights, in float32 as well. Those of fixed masks are not trained.
    scores = [module.weight for module in masked.values()]
    score_bytes = FLOAT32_BYTES * sum(score.numel() for score in scores)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained_bytes = sum(parameter.nbytes for parameter in trained)
    if run.method.method in UNTRAINED_METHODS:
        trained_bytes = score_bytes
    return weight_bytes, trained_bytes, score_bytes
