"""The coded mask: exact, small, and impossible to misread."""

import base64
import math
import struct
import tracemalloc

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from maskft.tuner.codec import HEADER_BYTES, decode_mask, encode_mask, mask_info, mask_sha256
from maskft_base.errors import UserError


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


def scattered(rows, columns, every):
    """A mask that no version of a random generator changes."""
    places = torch.arange(rows * columns)
    return ((places * places * 7 + places * 3) % every != 0).view(rows, columns)


# What maskft wrote at format version 1 (gaps, wide gaps, bitmap), and the first of version 2.
COMMITTED = {
    "gaps": (
        scattered(20, 30, 11),
        "TUZUTQEAAAAUAAAAHgAAAG0AAAAAAAAA4QinbhZOIbSZ8+xYy8auO55WKrxX5T6p+kqCUBsS9OoAAAAAAAAAACi1L/0gbVUAABgACAEBAKfUDQE=",
    ),
    "wide gaps": (
        scattered(4, 500, 331),
        "TUZUTQEAAgAEAAAA9AEAAA0AAAAAAAAAMl3taxglaP0CgwQSKF8aJYm83O4m/GP4OFNdA7F2suYAAAAAAAAAACi1L/0gGmgAAADrXute617rXute"
        "615rAAAA",
    ),
    "bitmap": (
        (torch.arange(120) * torch.arange(120) // 3 % 3 > 0).view(10, 12),
        "TUZUTQEAAQAKAAAADAAAAEMAAAAAAAAAvIk3Y4VX1n6WonUvJ4oJuih9e/qobf4/3nuLgSbDSg0AAAAAAAAAANLpdLpdLpdLpdLpdLpdLg==",
    ),
    "numeral system": (
        torch.tensor([(place * 2654435761 >> 7) % 11 != 0 for place in range(400)]).view(10, 40),
        "TUZUTQIAAwAKAAAAKAAAACkAAAAAAAAAG10UHRO3tSr2KeXuzLf83mlYmknmj+COy4EbdoeVwcUAAAAAAAAAAIbg3x77W8hzG7XgOKpW+i6Ye7kv"
        "C2j6JtMx",
    ),
    "zstd": (
        scattered(20, 30, 11),
        "TUZUTQIABAAUAAAAHgAAAG0AAAAAAAAA4QinbhZOIbSZ8+xYy8auO55WKrxX5T6p+kqCUBsS9OoAAAAAAAAAACi1L/0gS40AAFiAUAoBQCgFAKAU"
        "AgEAtVS8",
    ),
}


@pytest.mark.parametrize("coding", COMMITTED)
def test_files_of_every_format_stay_readable(coding):
    mask, text = COMMITTED[coding]
    coded = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
    assert torch.equal(decode_mask(coded, expected=mask.shape), mask)
    assert mask_info(coded)["sha256"] == mask_sha256(mask) == mask_info(encode_mask(mask))["sha256"]


def test_the_coder_writes_what_it_wrote():
    """Another release of it with another code could not read what is on disk."""
    mask, text = COMMITTED["numeral system"]
    assert base64.b64encode(encode_mask(mask).numpy().tobytes()).decode() == text


def in_version_1(mask, gaps, coding):
    """A file of format version 1 that holds these bytes of gaps."""
    data = bytearray(encode_mask(mask)[:HEADER_BYTES].numpy().tobytes())
    data[4:7] = struct.pack("<HB", 1, coding)
    return torch.frombuffer(data + zstandard.ZstdCompressor().compress(bytes(gaps)), dtype=torch.uint8)


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 765, 65534, 65535, 65536, 131070])
def test_gaps_around_the_escape_in_version_1(gap):
    mask = torch.ones(1, gap + 1 + 1000, dtype=torch.bool)
    mask[0, gap] = mask[0, -1] = False
    for coding, escape in ((0, 255), (2, 65535)):
        gaps = [number for each in (gap, 999) for number in [escape] * (each // escape) + [each % escape]]
        if coding == 2:
            gaps = [number & 255 for number in gaps] + [number >> 8 for number in gaps]
        assert torch.equal(decode_mask(in_version_1(mask, gaps, coding)), mask)


@pytest.mark.parametrize("shape", [(512, 512), (2000, 4000)])
@pytest.mark.parametrize("sparsity", [0.0005, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.45, 0.5])
def test_size_is_within_two_percent_of_the_entropy(shape, sparsity):
    """Without the header, whose 64 bytes are a third of the smallest of these."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) >= sparsity
    exact = 1 - float(mask.float().mean(dtype=torch.float64))
    bits = 8 * (encode_mask(mask).numel() - HEADER_BYTES)
    assert bits <= 1.02 * entropy(exact) * mask.numel()


@pytest.mark.parametrize("whole", ["rows", "columns"])
def test_whole_rows_and_columns_take_less_than_their_entropy(whole):
    mask = (torch.rand(512, generator=torch.Generator().manual_seed(0)) >= 0.3).repeat(512, 1)
    mask = mask.t().contiguous() if whole == "rows" else mask
    assert torch.equal(decode_mask(encode_mask(mask)), mask)
    assert encode_mask(mask).numel() < 1000


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_never_larger_than_packed_bits(sparsity):
    mask = torch.rand(500, 1000, generator=torch.Generator().manual_seed(0)) >= sparsity
    assert 8 * encode_mask(mask).numel() / mask.numel() <= 1.01


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
        with pytest.raises(UserError, match=r"q_proj (is corrupted|has mask format (3|25[78]))"):
            decode_mask(damaged, "q_proj")


def test_truncated_and_foreign_bytes():
    coded = encode_mask(torch.rand(20, 30) > 0.1)
    for broken in (coded[:-1], coded[:70], coded[:10], coded[:0], torch.zeros(200, dtype=torch.uint8)):
        with pytest.raises(UserError, match="corrupted"):
            decode_mask(broken, "q_proj")


def test_newer_format_says_upgrade():
    coded = encode_mask(torch.rand(20, 30) > 0.1)
    coded[4] = 9
    with pytest.raises(UserError, match="mask format 9, this maskft reads up to 2; upgrade"):
        decode_mask(coded)


def test_only_two_dimensional_bool_masks():
    for bad in (torch.ones(3, dtype=torch.bool), torch.ones(3, 3)):
        with pytest.raises(ValueError, match="2-D bool"):
            encode_mask(bad)


def test_layout_does_not_matter():
    mask = torch.rand(20, 30) > 0.1
    assert torch.equal(encode_mask(mask.t().contiguous().t()), encode_mask(mask))
    assert np.array_equal(decode_mask(encode_mask(mask.t())).numpy(), mask.t().numpy())


@pytest.mark.parametrize("coding", [(1, 0), (1, 2), (2, 4)])
@pytest.mark.parametrize("declares_size", [True, False])
def test_a_mask_unpacks_to_no_more_than_its_weights(declares_size, coding):
    """2 kB of zstd hold 64 MiB; where the frame declares so, the library takes that for its bound."""
    compressor = zstandard.ZstdCompressor(write_content_size=declares_size)
    bomb = bytearray(encode_mask(torch.ones(20, 30, dtype=torch.bool))[:HEADER_BYTES].numpy().tobytes())
    bomb[4:7] = struct.pack("<HB", *coding)
    bomb += compressor.compress(bytes(64 * 2**20))
    assert len(bomb) < 10_000
    tracemalloc.start()
    with pytest.raises(UserError, match="q_proj is corrupted"):
        decode_mask(torch.frombuffer(bomb, dtype=torch.uint8), "q_proj")
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_few_bytes_cannot_claim_many_weights():
    """The number removed is compared with the bytes there are, before memory is taken for a mask."""
    mask = torch.rand(20, 30, generator=torch.Generator().manual_seed(0)) >= 0.1
    coded = encode_mask(mask)
    assert coded[6] == 3
    for count in (2**26, 2**29, 2**30):
        coded[8:24] = torch.frombuffer(bytearray(struct.pack("<IIQ", 2**15, 2**16, count)), dtype=torch.uint8)
        tracemalloc.start()
        with pytest.raises(UserError, match="q_proj is corrupted"):
            decode_mask(coded, "q_proj")
        assert tracemalloc.get_traced_memory()[1] < 1e6
        tracemalloc.stop()


def test_gaps_of_many_weights_take_two_bytes_for_each():
    """Format 1 in 2 kB: a mask that removes all of 2^24 weights, by gaps of 0."""
    numel = 2**24
    coded = bytearray(encode_mask(torch.zeros(4096, 4096, dtype=torch.bool))[:HEADER_BYTES].numpy().tobytes())
    coded[4:7] = struct.pack("<HB", 1, 0)
    coded += zstandard.ZstdCompressor(level=19).compress(bytes(numel))
    assert len(coded) < 2_000
    tracemalloc.start()
    mask = decode_mask(torch.frombuffer(coded, dtype=torch.uint8), "q_proj")
    assert not mask.any() and mask.shape == (4096, 4096)
    assert tracemalloc.get_traced_memory()[1] < 2.6 * numel + 64 * 2**20
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
