"""The coded mask: exact, small, and impossible to misread."""

import math
import struct
import tracemalloc

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from maskft.errors import UserError
from maskft.tuner.codec import _HEADER, decode_mask, encode_mask, mask_info


def entropy(p):
    return 0.0 if p in (0, 1) else -(p * math.log2(p) + (1 - p) * math.log2(1 - p))


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_round_trip(rows, columns, density, seed):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    coded = encode_mask(mask)
    assert torch.equal(decode_mask(coded), mask)
    info = mask_info(coded)
    assert info["shape"] == (rows, columns) and info["num_removed"] == int((~mask).sum())


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 765, 65534, 65535, 65536, 131070])
def test_gaps_around_the_escape(gap):
    mask = torch.ones(1, gap + 1 + 1000, dtype=torch.bool)
    mask[0, gap] = mask[0, -1] = False
    assert torch.equal(decode_mask(encode_mask(mask)), mask)


@pytest.mark.parametrize("sparsity,slack", [(0.0005, 1.05), (0.01, 1.03), (0.1, 1.05), (0.3, 1.08)])
def test_size_against_the_entropy_bound(sparsity, slack):
    mask = torch.rand(2000, 4000, generator=torch.Generator().manual_seed(0)) >= sparsity
    bits = 8 * encode_mask(mask).numel() / mask.numel()
    assert bits <= slack * entropy(sparsity)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_never_larger_than_packed_bits(sparsity):
    mask = torch.rand(500, 1000, generator=torch.Generator().manual_seed(0)) >= sparsity
    assert 8 * encode_mask(mask).numel() / mask.numel() <= 1.01


def test_one_weight_in_two_hundred_thousand_at_sparsity_a_tenth_is_below_half_a_bit():
    mask = torch.rand(400, 500, generator=torch.Generator().manual_seed(1)) >= 0.1
    assert 8 * encode_mask(mask).numel() / mask.numel() <= 0.5


@pytest.mark.parametrize("sparsity", [0.1, 0.6])
def test_every_flipped_byte_is_found(sparsity):
    mask = torch.rand(20, 30, generator=torch.Generator().manual_seed(0)) >= sparsity
    coded = encode_mask(mask)
    padding = {7, *range(_HEADER.size - 8, _HEADER.size)}
    for position in range(coded.numel()):
        damaged = coded.clone()
        damaged[position] ^= 1
        if position in padding:
            assert torch.equal(decode_mask(damaged), mask)
            continue
        with pytest.raises(UserError, match=r"q_proj (is corrupted|has mask format 257)"):
            decode_mask(damaged, "q_proj")


def test_truncated_and_foreign_bytes():
    coded = encode_mask(torch.rand(20, 30) > 0.1)
    for broken in (coded[:-1], coded[:70], coded[:10], coded[:0], torch.zeros(200, dtype=torch.uint8)):
        with pytest.raises(UserError, match="corrupted"):
            decode_mask(broken, "q_proj")


def test_newer_format_says_upgrade():
    coded = encode_mask(torch.rand(20, 30) > 0.1)
    coded[4] = 9
    with pytest.raises(UserError, match="mask format 9, this maskft reads up to 1; upgrade"):
        decode_mask(coded)


def test_only_two_dimensional_bool_masks():
    for bad in (torch.ones(3, dtype=torch.bool), torch.ones(3, 3)):
        with pytest.raises(ValueError, match="2-D bool"):
            encode_mask(bad)


def test_layout_does_not_matter():
    mask = torch.rand(20, 30) > 0.1
    assert torch.equal(encode_mask(mask.t().contiguous().t()), encode_mask(mask))
    assert np.array_equal(decode_mask(encode_mask(mask.t())).numpy(), mask.t().numpy())


@pytest.mark.parametrize("declares_size", [True, False])
def test_a_mask_unpacks_to_no_more_than_its_weights(declares_size):
    """2 kB of zstd hold 64 MiB; where the frame declares so, the library takes that for its bound."""
    compressor = zstandard.ZstdCompressor(write_content_size=declares_size)
    bomb = encode_mask(torch.ones(20, 30, dtype=torch.bool))[: _HEADER.size].numpy().tobytes()
    bomb += compressor.compress(bytes(64 * 2**20))
    assert len(bomb) < 10_000
    tracemalloc.start()
    with pytest.raises(UserError, match="q_proj is corrupted"):
        decode_mask(torch.frombuffer(bytearray(bomb), dtype=torch.uint8), "q_proj")
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


@pytest.mark.parametrize("shape", [(2**16, 2**16), (0, 5)])
def test_shapes_that_no_layer_has(shape):
    coded = encode_mask(torch.ones(20, 30, dtype=torch.bool))
    coded[8:16] = torch.frombuffer(bytearray(struct.pack("<II", *shape)), dtype=torch.uint8)
    for read in (decode_mask, mask_info):
        with pytest.raises(UserError, match=f"it removes 0 of {shape[0]} x {shape[1]} weights"):
            read(coded)
