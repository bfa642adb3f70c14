"""Mixing two sets of weights: entries that do not change keep their bits."""

import math

import pytest
import torch

from maskft.weights import lerp

START = torch.tensor([-0.0, 0.0, -0.0, 2.0, math.inf, -1.0, 3.0])
END = torch.tensor([-0.0, 0.0, 0.0, 2.0, math.inf, 1.0, 5.0])


def is_bitwise_equal(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_a_share_of_zero_or_one_is_a_copy():
    assert is_bitwise_equal(lerp(START, END, 0), START)
    assert is_bitwise_equal(lerp(START, END, 1), END)
    assert lerp(START, END, 0) is not START, "the caller may change the result"


def test_equal_entries_keep_the_bits_of_the_start():
    expected = torch.tensor([-0.0, 0.0, -0.0, 2.0, math.inf, -0.5, 3.5])
    assert is_bitwise_equal(lerp(START, END, 0.25), expected)
    # torch's own function changes the first entry, which is why this one exists.
    assert not is_bitwise_equal(torch.lerp(START, START, 0.25), START)  # noqa: TID251


@pytest.mark.parametrize("share", [0, 0.25, 0.7, 1])
@pytest.mark.parametrize("place", ["start", "end"])
def test_the_result_may_replace_an_input(share, place):
    expected = lerp(START, END, share)
    inputs = {"start": START.clone(), "end": END.clone()}
    out = lerp(**inputs, share=share, out=inputs[place])
    assert out is inputs[place]
    assert is_bitwise_equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_entries_are_those_of_torch(dtype):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1000, generator=generator).to(dtype)
    end = torch.randn(1000, generator=generator).to(dtype)
    assert torch.equal(lerp(start, end, 0.3), torch.lerp(start, end, 0.3))  # noqa: TID251
