"""vLLM's plugin: ``vllm serve`` with the weight transfer backend ``maskft`` applies and undoes masks while it runs.

vLLM calls ``register`` in each of its processes (entry point ``vllm.general_plugins``). Written against vLLM 0.33.0:
``vllm/plugins/__init__.py``, ``vllm/distributed/weight_transfer/{base,factory}.py`` and
``vllm/model_executor/model_loader/checkpoint_weight_patch.py``. docs/many_masks.md says what was run and what was not.
"""

from __future__ import annotations

import contextlib
import logging

BACKEND = "maskft"


def register() -> None:
    """Make the backend known; another call, or a vLLM without weight transfer, changes nothing."""
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    except ImportError as error:
        logging.getLogger(__name__).warning("masks need a newer vLLM, with weight transfer engines: %s", error)
        return
    with contextlib.suppress(ValueError):  # registered already
        WeightTransferEngineFactory.register_engine(BACKEND, "maskft.adapter.vllm_engine", "MaskEngine")
