"""A count of optimizer steps, by which caches know that scores have changed.

torch's version counter is not enough: fused and 8-bit optimizers write to parameters without raising it.
"""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from . import compiled

# Never reset: a count that began again could equal that of an older weight.
_num_steps = 0
_is_watching = False


def watch_optimizers() -> None:
    """Count the steps of all optimizers of this process from now on; repeated calls change nothing."""
    global _is_watching
    if not _is_watching:
        _is_watching = True
        # torch's hook of all optimizers, those that are created later included.
        register_optimizer_step_post_hook(_after_step)


def num_optimizer_steps() -> int:
    """Optimizer steps this process has taken, of any optimizer."""
    return _num_steps


def _after_step(*_: Any) -> None:
    global _num_steps
    _num_steps += 1
    # After counting: a refreshed weight compares its age with the count.
    compiled.refresh_graphs()
