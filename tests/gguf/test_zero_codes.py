"""Codes of GGUF's formats against gguf's own dequantize."""

import numpy as np
import pytest
import torch

import gguf
from gguf import GGMLQuantizationType as Type
from maskft.gguf.zero_codes import (
    FORMATS,
    TYPE_NAMES,
    block_of,
    codes_from_bytes,
    codes_to_bytes,
    read_codes,
    removed_codes,
    restore_codes,
    why_no_zero,
    write_zeros,
)

KINDS = sorted(FORMATS)
ids = [FORMATS[kind].name for kind in KINDS]


def random_rows(kind, num_rows=6, num_columns=512, seed=0):
    """Rows of random bytes, every code among them, with scales that are finite."""
    form = FORMATS[kind]
    generator = torch.Generator().manual_seed(seed)
    num_bytes = num_columns // form.block_size * form.block_bytes
    rows = torch.randint(0, 256, (num_rows, num_bytes), generator=generator, dtype=torch.uint8)
    blocks = rows.view(-1, form.block_bytes)
    # A half float without its highest exponent bit is finite; some scales are negative, as they are in real files.
    if form.block_size == 32:
        blocks[:, 1] &= 0xBF
    if form.block_size == 256:
        blocks[:, -1] &= 0xBF
    if form.block_size == 1:
        blocks[:, -1] &= 0xBF
    return rows


def dequantise(rows, kind):
    return torch.from_numpy(gguf.dequantize(rows.numpy().copy(), Type(kind)).copy())


def random_mask(shape=(6, 512), seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3


@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_sizes_are_those_of_gguf(kind):
    form = FORMATS[kind]
    assert form.name == Type(kind).name
    assert (form.block_size, form.block_bytes) == gguf.GGML_QUANT_SIZES[Type(kind)]


def test_sizes_of_the_other_types_are_those_of_gguf():
    """They say where a tensor ends, of every type with a name here."""
    known = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    for kind in TYPE_NAMES:
        # An older gguf has fewer types.
        if kind in known:
            assert block_of(kind) == known[kind], TYPE_NAMES[kind]
        assert block_of(kind) is not None
    assert block_of(99) is None


@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_removed_weights_are_zero_and_no_other_value_differs(kind):
    rows = random_rows(kind)
    removed = random_mask()
    before = dequantise(rows, kind)

    write_zeros(rows, removed, FORMATS[kind])

    after = dequantise(rows, kind)
    assert before[removed].abs().sum() > 0
    assert torch.equal(after[removed], torch.zeros(int(removed.sum())))
    assert torch.equal(after[~removed], before[~removed])


@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_the_old_codes_restore_every_byte(kind):
    rows = random_rows(kind)
    removed = random_mask()
    before = rows.clone()
    form = FORMATS[kind]

    codes = codes_from_bytes(codes_to_bytes(removed_codes(rows, removed, form), form), form)
    write_zeros(rows, removed, form)
    assert not torch.equal(rows, before)
    restore_codes(rows, removed, codes, form)

    assert torch.equal(rows, before)


@pytest.mark.parametrize("kind", [2, 6, 8], ids=["Q4_0", "Q5_0", "Q8_0"])
def test_codes_are_values_over_the_scale(kind):
    rows = random_rows(kind)
    form = FORMATS[kind]
    blocks = rows.view(-1, form.block_bytes)
    scale = blocks[:, :2].contiguous().view(torch.float16).float()
    codes = read_codes(blocks, form)
    signed = codes.to(torch.int8).int() if kind == 8 else codes - form.zero
    assert torch.equal(signed * scale, dequantise(rows, kind).view(-1, form.block_size))


def test_a_block_written_by_hand():
    """A Q4_0 block of scale 1.0 with codes 0, 1, ..., 15 twice: value is code - 8."""
    nibbles = [code | code << 4 for code in range(16)]
    rows = torch.tensor([[0x00, 0x3C, *nibbles]], dtype=torch.uint8)
    removed = torch.zeros(1, 32, dtype=torch.bool)
    removed[0, 0] = removed[0, 17] = True  # low half of byte 0, high half of byte 1

    write_zeros(rows, removed, FORMATS[2])

    expected = list(nibbles)
    expected[0] = 0x08
    expected[1] = 0x81
    assert rows.tolist() == [[0x00, 0x3C, *expected]]


def test_types_without_a_zero_level_are_refused_with_the_way_out():
    reason = why_no_zero("blk.3.ffn_gate.weight", int(Type.Q4_K))
    assert reason.startswith("blk.3.ffn_gate.weight is Q4_K, which has no code for zero")
    assert "llama-quantize --tensor-type ffn_gate=q5_0" in reason
    for kind in (Type.Q4_1, Type.Q5_1, Type.Q2_K, Type.Q5_K, Type.IQ4_NL, Type.IQ4_XS):
        assert f"is {kind.name}," in why_no_zero("blk.0.ffn_up.weight", int(kind))
    assert why_no_zero("blk.0.ffn_up.weight", int(Type.Q6_K)) is None
    # Of a type that is newer than this maskft, nothing is known.
    assert why_no_zero("blk.0.ffn_up.weight", 99).startswith("blk.0.ffn_up.weight is ggml type 99, whose codes maskft")
    # MXFP4: it has a zero, which the message does not deny.
    assert why_no_zero("blk.0.ffn_up.weight", 39).startswith("blk.0.ffn_up.weight is MXFP4, whose codes maskft cannot")


def test_the_way_out_of_the_head_leaves_attention_as_it_is():
    """llama-quantize takes the name of --tensor-type as a pattern: "output" is in attn_output, too."""
    reason = why_no_zero("output.weight", int(Type.Q4_K))
    assert "`llama-quantize --output-tensor-type q5_0`" in reason
    assert "--tensor-type attn_output=q5_0" in why_no_zero("blk.0.attn_output.weight", int(Type.Q4_K))


@pytest.mark.parametrize("kind", [Type.Q4_1, Type.Q5_1, Type.IQ4_NL], ids=lambda kind: kind.name)
def test_the_refused_types_have_no_zero(kind):
    """Quantise zeros beside a minimum of -1 and a maximum of 1.3: no code gives exactly zero."""
    values = np.linspace(-1.0, 1.3, 32, dtype=np.float32)
    values[5] = 0.0
    if kind == Type.IQ4_NL:  # gguf cannot write it: all codes of one block with scale 1.0
        rows = np.array([[0x00, 0x3C, *(code | code << 4 for code in range(16))]], dtype=np.uint8)
    else:
        rows = gguf.quantize(values[None], kind)
    assert (gguf.dequantize(rows, kind) != 0).all()
