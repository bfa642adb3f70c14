"""What counts as running out of memory; ``tests/cli/test_evaluate_tasks.py`` runs out of it in earnest."""

import torch

from maskft_lab.estimate.out_of_memory import is_out_of_memory


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(RuntimeError("unable to mmap 8 bytes from file <x>: Cannot allocate memory (12)"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(OSError("out of memory"))
