"""A count of optimizer steps.

Fused and 8-bit optimizers write to parameters without raising torch's version counter, so that what is made from scores
is as old as the count it was made at.
"""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

_count = 0


def optimizer_steps() -> int:
    """Optimizer steps this process has taken, of any optimizer."""
    return _count


def _add_one(*_: Any) -> None:
    global _count
    _count += 1


register_optimizer_step_post_hook(_add_one)
