"""Further learners of masks, registered as a user's own would be: ``gumbel`` and ``hard_concrete``; and removed weights
that take the value of another model (``removed_value="base"``).
"""

from . import gates, removed_value

__all__ = ["gates", "removed_value"]
