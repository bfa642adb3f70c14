"""What counts as running out of memory; ``tests/cli/test_evaluate_tasks.py`` runs out of it in earnest."""

import pytest
import torch

from maskft_common.errors import UserError
from maskft_lab.estimate.out_of_memory import explained


def test_what_counts_as_out_of_memory():
    said = (
        "unable to mmap 8 bytes from file <x>: Cannot allocate memory (12)",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED",
    )
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), *map(RuntimeError, said)):
        with pytest.raises(UserError, match="out of memory"), explained():
            raise error
    for error in (RuntimeError("shapes differ"), OSError("out of memory")):
        with pytest.raises(type(error)), explained():
            raise error
