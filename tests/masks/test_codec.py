"""The coded mask: exact, small, and impossible to misread."""

import base64
import math
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskft.masks.codec import HEADER_BYTES, check_claims, decode_mask, encode_mask, mask_info
from maskft_common.errors import UserError


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


COMMITTED = {
    "numeral system": (
        torch.tensor([(place * 2654435761 >> 7) % 11 != 0 for place in range(400)]).view(10, 40),
        "TUZUTQIAAwAKAAAAKAAAACkAAAAAAAAAG10UHRO3tSr2KeXuzLf83mlYmknmj+COy4EbdoeVwcUAAAAAAAAAAIbg3x77W8hzG7XgOKpW+i6Ye7kv"
        "C2j6JtMx",
    ),
    "bitmap": (
        (torch.arange(120) * torch.arange(120) // 3 % 3 > 0).view(10, 12),
        "TUZUTQIAAQAKAAAADAAAAEMAAAAAAAAAvIk3Y4VX1n6WonUvJ4oJuih9e/qobf4/3nuLgSbDSg0AAAAAAAAAANLpdLpdLpdLpdLpdLpdLg==",
    ),
    "zlib": (
        (torch.arange(64) % 5 > 0).repeat(16, 1),
        "TUZUTQIABQAQAAAAQAAAANAAAAAAAAAA08+v8iq+MPV2CwzvgePr5pZhuzcni/EKL7k8BlUvjrkAAAAAAAAAAHgBa1HkcBJoUeQAogGhAc9KGsE=",
    ),
}


@pytest.mark.parametrize("coding", COMMITTED)
def test_files_of_every_coding_stay_readable(coding):
    mask, text = COMMITTED[coding]
    coded = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
    assert torch.equal(decode_mask(coded, expected=mask.shape), mask)
    assert mask_info(coded)["sha256"] == mask_info(encode_mask(mask))["sha256"]


def test_the_coder_writes_what_it_wrote():
    """Another release of it with another code could not read what is on disk."""
    mask, text = COMMITTED["numeral system"]
    assert base64.b64encode(encode_mask(mask).numpy().tobytes()).decode() == text


@pytest.mark.parametrize("sparsity", [0.0005, 0.01, 0.1, 0.3, 0.45, 0.5])
def test_size_is_within_two_percent_of_the_entropy(sparsity):
    """Without the header, whose 64 bytes are a third of the smallest of these."""
    mask = torch.rand((1000, 2000), generator=torch.Generator().manual_seed(0)) >= sparsity
    exact = 1 - float(mask.float().mean(dtype=torch.float64))
    bits = 8 * (encode_mask(mask).numel() - HEADER_BYTES)
    assert bits <= 1.02 * entropy(exact) * mask.numel()


@pytest.mark.parametrize("whole", ["rows", "columns"])
def test_whole_rows_and_columns_take_less_than_their_entropy(whole):
    mask = (torch.rand(512, generator=torch.Generator().manual_seed(0)) >= 0.3).repeat(512, 1)
    mask = mask.t().contiguous() if whole == "rows" else mask
    assert torch.equal(decode_mask(encode_mask(mask)), mask)
    assert encode_mask(mask).numel() < 1000


@pytest.mark.parametrize("sparsity", [0.1, 0.6])
def test_every_flipped_byte_is_found(sparsity):
    mask = torch.rand(20, 30, generator=torch.Generator().manual_seed(0)) >= sparsity
    coded = encode_mask(mask)
    padding = {7, *range(HEADER_BYTES - 8, HEADER_BYTES)}
    for position in range(coded.numel()):
        damaged = coded.clone()
        damaged[position] ^= 1
        if position in padding:
            assert torch.equal(decode_mask(damaged), mask)
            continue
        with pytest.raises(UserError, match=r"q_proj (is corrupted|claims|has mask format (3|25[78]))"):
            decode_mask(damaged, "q_proj")


def test_truncated_and_foreign_bytes():
    coded = encode_mask(torch.rand(20, 30) > 0.1)
    for broken in (coded[:-1], coded[:70], coded[:10], coded[:0], torch.zeros(200, dtype=torch.uint8)):
        with pytest.raises(UserError, match="corrupted"):
            decode_mask(broken, "q_proj")


def test_only_two_dimensional_bool_masks():
    for bad in (torch.ones(3, dtype=torch.bool), torch.ones(3, 3)):
        with pytest.raises(ValueError, match="2-D bool"):
            encode_mask(bad)


@pytest.mark.parametrize("shape", [(2**16, 2**16), (0, 5)])
def test_a_mask_that_could_not_be_read_again_is_not_written(shape):
    """Expanded, so that it takes one byte of memory."""
    mask = torch.ones(1, 1, dtype=torch.bool).expand(*shape) if 0 not in shape else torch.ones(shape, dtype=torch.bool)
    with pytest.raises(UserError, match=f"a mask of {shape[0]} x {shape[1]} weights cannot be saved"):
        encode_mask(mask)


def test_layout_does_not_matter():
    mask = torch.rand(20, 30) > 0.1
    assert torch.equal(encode_mask(mask.t().contiguous().t()), encode_mask(mask))
    assert np.array_equal(decode_mask(encode_mask(mask.t())).numpy(), mask.t().numpy())


def test_a_mask_unpacks_to_no_more_than_its_weights():
    """64 kB of zlib hold 64 MiB."""
    bomb = bytearray(encode_mask(torch.ones(20, 30, dtype=torch.bool))[:HEADER_BYTES].numpy().tobytes())
    bomb[6], bomb[16] = 5, 1  # its coding, and one removed weight
    bomb += zlib.compress(bytes(64 * 2**20))
    tracemalloc.start()
    with pytest.raises(UserError, match="q_proj is corrupted"):
        decode_mask(torch.frombuffer(bomb, dtype=torch.uint8), "q_proj")
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


@pytest.mark.parametrize("count", [0, 1, 2**31 - 1, 2**31])
def test_a_header_alone_claims_no_more_than_a_large_matrix(count):
    """Of a mask that removes nothing there is no payload, so that its shape is bounded where no layer bounds it."""
    coded = encode_mask(torch.ones(20, 30, dtype=torch.bool))
    coded[8:24] = torch.frombuffer(bytearray(struct.pack("<IIQ", 2**15, 2**16, count)), dtype=torch.uint8)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"q_proj claims 32768 x 65536 weights in 64 bytes; read it with its base"):
        decode_mask(coded, "q_proj")
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


@given(st.binary(max_size=60), st.integers(0, 600))
@settings(max_examples=200, deadline=None)
def test_no_bytes_do_more_than_end_in_one_line(payload, count):
    coded = encode_mask(torch.rand(20, 30, generator=torch.Generator().manual_seed(0)) >= 0.1)
    data = bytearray(coded[:HEADER_BYTES].numpy().tobytes() + payload)
    data[16:24] = struct.pack("<Q", count)
    with pytest.raises(UserError, match="is corrupted"):
        decode_mask(torch.frombuffer(data, dtype=torch.uint8))


@pytest.mark.parametrize("shape", [(2**16, 2**16), (0, 5)])
def test_shapes_that_no_layer_has(shape):
    coded = encode_mask(torch.ones(20, 30, dtype=torch.bool))
    coded[8:16] = torch.frombuffer(bytearray(struct.pack("<II", *shape)), dtype=torch.uint8)
    for read in (decode_mask, mask_info):
        with pytest.raises(UserError, match=f"it removes 0 of {shape[0]} x {shape[1]} weights"):
            read(coded)


def test_sixty_masks_together_claim_no_more_than_a_model():
    """Each alone may be a large matrix in 64 bytes; decoded they would take 4 GB."""
    coded = encode_mask(torch.ones(20, 30, dtype=torch.bool))
    coded[8:16] = torch.frombuffer(bytearray(struct.pack("<II", 2**13, 2**13)), dtype=torch.uint8)
    check_claims({f"layers.{n}": coded for n in range(31)})
    with pytest.raises(UserError, match="the adapter claims 4,026,531,840 weights in 3,840 bytes"):
        check_claims({f"layers.{n}": coded for n in range(60)})
