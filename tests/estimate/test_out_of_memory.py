"""What counts as running out of memory; ``tests/cli/test_evaluate_tasks.py`` runs out of it in earnest."""

import pytest
import torch

from maskft_base.errors import UserError
from maskft_lab.estimate.out_of_memory import explained


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), UserError),
        (torch.OutOfMemoryError("CUDA out of memory."), UserError),
        (RuntimeError("unable to mmap 8 bytes from file <x>: Cannot allocate memory (12)"), UserError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), UserError),
        (RuntimeError("shapes differ"), RuntimeError),
        (OSError("out of memory"), OSError),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    with pytest.raises(expected), explained():
        raise error
