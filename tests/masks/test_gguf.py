"""A mask in a GGUF file: exact, undone bit for bit, checked, and refused in one line."""

import base64
import dataclasses
import errno
import io
import itertools
import json
import os
import resource
import signal
import struct
import tracemalloc
import zlib
from types import SimpleNamespace

import pytest
import torch

import gguf
from gguf import GGMLQuantizationType as Type
from maskft.gguf.header import read_head
from maskft.gguf.names import dequantised, find_tensors
from maskft.masks import gguf as masks_in_gguf
from maskft.masks.fingerprints import weights_fingerprint
from maskft.masks.gguf import merge_into_gguf, undo_in_gguf, verify_gguf
from maskft_common import layout
from maskft_common.errors import UserError
from maskft_lab.cli.main import main

from ..killing import Fork
from ..tiny import save_masks, tiny_llama
from ..tiny_gguf import permuted, read_gguf, tensor_name, write_gguf

# Q8_0 and a tensor of plain floats beside Q4_0: one mask over several types.
KINDS = {"blk.0.ffn_up.weight": Type.Q8_0, "blk.0.ffn_gate.weight": Type.Q5_0, "blk.1.attn_v.weight": Type.F16}


def tiny_model(seed=0):
    return tiny_llama(2, 288, seed, hidden_size=64, intermediate_size=96, head_dim=16, num_key_value_heads=2)


def random_masks(model, parts=("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), seed=3):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(module.weight.shape, generator=generator) > 0.1
        for name, module in model.named_modules()
        if name.endswith(parts)
    }


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def base(tmp_path_factory, model):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "base.gguf", model, kinds=KINDS)


@pytest.fixture
def masks(model):
    return random_masks(model)


@pytest.fixture
def adapter(tmp_path, base, masks):
    head = read_head(base)
    weights = ((name, dequantised(head, tensor_name(f"{name}.weight"))) for name in sorted(masks))
    folder = tmp_path / "mask"
    save_masks(masks, folder, base_fingerprint=weights_fingerprint(weights), base_model_name_or_path="tiny")
    return folder


def test_files_in_the_home_folder(tmp_path, base, adapter, monkeypatch):
    """A shell leaves the ~ of --gguf=~/base.gguf as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.gguf").write_bytes(base.read_bytes())
    assert main(["merge", "--adapter=~/mask", "--gguf=~/base.gguf", "--output=~/task.gguf"]) == 0
    assert main(["verify", "--adapter=~/mask", "--gguf=~/task.gguf", "--base=~/base.gguf"]) == 0


def test_only_removed_weights_differ(tmp_path, base, adapter, masks, model):
    before_bytes = base.read_bytes()
    lines = merge_into_gguf(adapter, base, tmp_path / "task.gguf")

    assert base.read_bytes() == before_bytes
    assert f"{sum(int((~mask).sum()) for mask in masks.values()):,} of" in lines[0]
    assert "F16, Q4_0, Q5_0, Q8_0" in lines[0]
    assert "fingerprints match" in lines[1]
    before = read_gguf(base)
    after = read_gguf(tmp_path / "task.gguf")
    assert list(after) == list(before)
    heads = {"q_proj": 4, "k_proj": 2}
    in_file = {}
    for name, mask in masks.items():
        part = name.rpartition(".")[2]
        in_file[tensor_name(f"{name}.weight")] = permuted(mask, heads[part]) if part in heads else mask
    for tensor, values in before.items():
        expected = values * in_file[tensor] if tensor in in_file else values
        assert torch.equal(after[tensor], expected), tensor


def test_tensor_bytes_of_scales_and_other_tensors_stay(tmp_path, base, adapter):
    merge_into_gguf(adapter, base, tmp_path / "task.gguf")
    old = {tensor.name: tensor.data for tensor in gguf.GGUFReader(base).tensors}
    for tensor in gguf.GGUFReader(tmp_path / "task.gguf").tensors:
        if tensor.name == "blk.0.attn_q.weight":
            blocks = tensor.data.reshape(-1, 18)
            assert (blocks[:, :2] == old[tensor.name].reshape(-1, 18)[:, :2]).all()
        if tensor.name.startswith(("token_embd", "output", "blk.0.ffn_down", "blk.1.attn_output")):
            assert (tensor.data == old[tensor.name]).all()


def test_metadata_says_which_mask_and_the_rest_is_the_bases(tmp_path, base, adapter):
    merge_into_gguf(adapter, base, tmp_path / "task.gguf")
    old = gguf.GGUFReader(base)
    new = gguf.GGUFReader(tmp_path / "task.gguf")
    config = json.loads((adapter / layout.ADAPTER_CONFIG).read_text())
    assert new.fields["maskft.mask_sha256"].contents() == config["mask_sha256"]
    added = {key for key in new.fields if key.startswith("maskft.")}
    assert set(new.fields) - set(old.fields) == added
    for key, field in old.fields.items():
        if not key.startswith("GGUF."):
            assert field.contents() == new.fields[key].contents()


def test_undo_gives_the_base_bit_for_bit(tmp_path, base, adapter):
    merge_into_gguf(adapter, base, tmp_path / "task.gguf")
    undo_in_gguf(adapter, tmp_path / "task.gguf", tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == base.read_bytes()


def test_verify_says_yes(tmp_path, base, adapter):
    merge_into_gguf(adapter, base, tmp_path / "task.gguf")
    passed = verify_gguf(adapter, tmp_path / "task.gguf", base)
    assert any("removed weights" in line and "are zero" in line for line in passed)
    assert passed[-1] == f"that is {base}"


@pytest.mark.parametrize("place", ["a removed weight", "another tensor", "the metadata"])
def test_verify_says_no(tmp_path, base, adapter, place):
    task = tmp_path / "task.gguf"
    merge_into_gguf(adapter, base, task)
    head = read_head(task)
    content = bytearray(task.read_bytes())
    if place == "a removed weight":
        tensor = head.tensors["blk.0.ffn_up.weight"]
        codes = range(tensor.start + 2, tensor.start + 34)
        first_zero = next(at for at in codes if content[at] == 0)
        content[first_zero] = 5
        expected = "has weights where the mask removes them"
    elif place == "another tensor":
        content[head.tensors["blk.0.ffn_down.weight"].start + 3] ^= 1
        expected = "is not its base with this mask"
    else:
        at = bytes(content).index(b"tiny")
        content[at : at + 4] = b"tinY"
        expected = "is not its base with this mask"
    task.write_bytes(content)
    with pytest.raises(UserError, match=expected):
        verify_gguf(adapter, task)
    if place != "a removed weight":
        with pytest.raises(UserError, match=expected):
            undo_in_gguf(adapter, task, tmp_path / "again.gguf")
        assert not (tmp_path / "again.gguf").exists()


@pytest.mark.parametrize("place", ["a key that is there twice", "the padding", "the number of removed weights"])
def test_a_head_that_was_changed_is_not_the_one_that_was_written(tmp_path, base, adapter, place):
    """What the base's head is not made from."""
    task = tmp_path / "task.gguf"
    merge_into_gguf(adapter, base, task)
    content = bytearray(task.read_bytes())
    if place == "a key that is there twice":
        (count,) = struct.unpack_from("<Q", content, 16)
        struct.pack_into("<Q", content, 16, count + 1)
        name = b"general.name"
        assert name in content
        # An empty text, in front of all keys. These are 32 bytes, so that the data stay aligned.
        content[24:24] = struct.pack("<Q", len(name)) + name + struct.pack("<IQ", 8, 0)
    elif place == "the padding":
        last = read_head(task).data_start - 1
        assert content[last] == 0
        content[last] = 1
    else:
        content[content.index(b"maskft.num_removed") + len("maskft.num_removed") + 4] ^= 1
    task.write_bytes(content)
    for check in (verify_gguf, lambda *paths: undo_in_gguf(*paths, tmp_path / "again.gguf")):
        with pytest.raises(UserError, match=r"the head of .* was changed after the merge"):
            check(adapter, task)


def test_a_mask_without_a_fingerprint_is_said_to_be_unchecked(tmp_path, base, masks):
    save_masks(masks, tmp_path / "mask")
    lines = merge_into_gguf(tmp_path / "mask", base, tmp_path / "task.gguf")
    assert lines[-1].startswith("not checked: whether the mask was trained over these weights")
    assert verify_gguf(tmp_path / "mask", tmp_path / "task.gguf")[-1] == lines[-1]


def test_a_mask_of_another_file_is_not_the_one_in_it(tmp_path, base, adapter, model):
    merge_into_gguf(adapter, base, tmp_path / "task.gguf")
    save_masks(random_masks(model, seed=8), tmp_path / "other")
    with pytest.raises(UserError, match=r"holds another mask"):
        verify_gguf(tmp_path / "other", tmp_path / "task.gguf")


def test_a_base_is_not_patched_twice(tmp_path, base, adapter):
    merge_into_gguf(adapter, base, tmp_path / "task.gguf")
    with pytest.raises(UserError, match=r"already holds a mask .* --undo"):
        merge_into_gguf(adapter, tmp_path / "task.gguf", tmp_path / "twice.gguf")


def test_a_key_of_ours_without_a_mask_could_not_be_restored(tmp_path, model, adapter):
    path = write_gguf(tmp_path / "other.gguf", model, kinds=KINDS, added={"maskft.note": 7})
    with pytest.raises(UserError, match=r"has the key 'maskft.note' .* --remove-metadata maskft.note"):
        merge_into_gguf(adapter, path, tmp_path / "task.gguf")


def test_more_codes_than_llama_cpp_reads_are_refused(tmp_path, base, adapter, monkeypatch):
    monkeypatch.setattr(masks_in_gguf, "_MAX_TEXT", 1000)
    with pytest.raises(UserError, match=r"of which llama.cpp reads 1,000: merge into a file of fewer bits"):
        merge_into_gguf(adapter, base, tmp_path / "task.gguf")
    assert not (tmp_path / "task.gguf").exists()


def test_codes_are_deflated_piece_by_piece():
    """Together those of a large mask take gigabytes."""
    piece = bytes(2**20)
    masks = SimpleNamespace(removed_codes=lambda: itertools.repeat(piece, 32), num_removed=32 * 2**20)
    tracemalloc.start()
    try:
        text = masks_in_gguf._encode_codes(masks)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**20
    assert zlib.decompress(base64.b64decode(text)) == bytes(32 * 2**20)


def test_a_base_that_is_missing_is_an_error_before_minutes_of_reading(tmp_path, base, adapter, monkeypatch):
    merge_into_gguf(adapter, base, tmp_path / "task.gguf")
    monkeypatch.setattr(masks_in_gguf, "read_coded", None)
    with pytest.raises(UserError, match=r"none.gguf' does not exist"):
        verify_gguf(adapter, tmp_path / "task.gguf", tmp_path / "none.gguf")


def test_a_file_without_a_mask_has_none_to_undo(tmp_path, base, adapter):
    with pytest.raises(UserError, match=r"holds no mask"):
        undo_in_gguf(adapter, base, tmp_path / "again.gguf")


@pytest.mark.parametrize("kind", [Type.Q4_1, Type.Q5_1], ids=lambda kind: kind.name)
def test_a_type_without_zero_is_refused_with_the_way_out(tmp_path, model, adapter, kind):
    path = write_gguf(tmp_path / "other.gguf", model, kinds={**KINDS, "blk.1.ffn_gate.weight": kind})
    with pytest.raises(UserError, match=rf"blk.1.ffn_gate.weight is {kind.name}.*--tensor-type ffn_gate=q5_0"):
        merge_into_gguf(adapter, path, tmp_path / "task.gguf")


def test_a_type_that_is_unknown_matters_only_where_it_is_masked(tmp_path, base, model, masks):
    head = read_head(base)
    content = bytearray(base.read_bytes())
    for name in ("blk.1.ffn_down.weight", "blk.1.ffn_gate.weight"):
        at = bytes(content).index(name.encode()) + len(name) + 4 + 16
        assert content[at] == head.tensors[name].kind
        content[at] = 99
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        save_masks(masks, tmp_path / name)
        if "down" in name:
            merge_into_gguf(tmp_path / name, path, tmp_path / "task.gguf")
        else:
            with pytest.raises(UserError, match=r"is ggml type 99, whose codes maskft cannot write"):
                merge_into_gguf(tmp_path / name, path, tmp_path / "task2.gguf")


def test_other_weights_are_refused_or_accepted_and_named(tmp_path, adapter):
    path = write_gguf(tmp_path / "other.gguf", tiny_model(), Type.Q8_0)
    with pytest.raises(UserError, match=r"trained over other weights \(tiny.*Q8_0.*--accept_other_base"):
        merge_into_gguf(adapter, path, tmp_path / "task.gguf")
    _, line = merge_into_gguf(adapter, path, tmp_path / "task.gguf", accept_other_base=True)
    assert line.startswith("the mask was trained over other weights (tiny, fingerprint ")
    assert line.endswith("; measure the result before you serve it")
    verify_gguf(adapter, tmp_path / "task.gguf", path)


def test_the_name_of_a_strangers_base_does_not_steer_the_terminal(tmp_path, base, masks, capsys):
    folder = tmp_path / "mask"
    save_masks(masks, folder, base_fingerprint="0" * 64, base_model_name_or_path="a\x1b[31mb\nc")
    words = ["merge", str(folder), "--gguf", str(base), "--output", str(tmp_path / "task.gguf")]
    assert main([*words, "--accept_other_base"]) == 0
    error = capsys.readouterr().err
    assert r"other weights (a\x1b[31mb\nc, fingerprint" in error and error.count("\n") == 2


def test_a_file_of_another_model_is_refused(tmp_path, adapter):
    small = tiny_llama(1, 288, hidden_size=64, intermediate_size=96, head_dim=16)
    path = write_gguf(tmp_path / "small.gguf", small)
    with pytest.raises(UserError, match=r"another model"):
        merge_into_gguf(adapter, path, tmp_path / "task.gguf")
    wide = tiny_llama(2, 288, hidden_size=64, intermediate_size=128, head_dim=16)
    path = write_gguf(tmp_path / "wide.gguf", wide)
    with pytest.raises(UserError, match=r"another model: blk.0.ffn_gate.weight has shape \(128, 64\)"):
        merge_into_gguf(adapter, path, tmp_path / "task.gguf")


def test_an_architecture_whose_order_is_unknown_is_refused(tmp_path, model, adapter):
    path = write_gguf(tmp_path / "other.gguf", model, architecture="minicpm")
    with pytest.raises(UserError, match=r"holds a 'minicpm' model; maskft knows .*llama"):
        merge_into_gguf(adapter, path, tmp_path / "task.gguf")


@pytest.mark.parametrize("count", [None, "two", 2**31])
def test_a_file_without_a_number_of_layers_is_refused(base, count):
    head = read_head(base)
    metadata = {**head.metadata, "llama.block_count": count}
    with pytest.raises(UserError, match=r"llama\.block_count is (None|two|2147483648)"):
        find_tensors(dataclasses.replace(head, metadata=metadata), {"model.layers.0.mlp.up_proj": (96, 64)})


def test_an_architecture_that_an_older_gguf_does_not_know(base, monkeypatch):
    monkeypatch.setattr(gguf, "MODEL_ARCH_NAMES", {})
    with pytest.raises(UserError, match=r"holds a 'llama' model, which the installed gguf does not know; update gguf"):
        find_tensors(read_head(base), {"model.layers.0.mlp.up_proj": (96, 64)})


def test_layers_of_a_vision_language_model_are_those_of_its_decoder(base):
    """Gemma 3 is converted to a file of the decoder and a second one (mmproj) of the rest."""
    name = "model.language_model.layers.0.mlp.up_proj"
    assert find_tensors(read_head(base), {name: (96, 64)}) == {name: "blk.0.ffn_up.weight"}
    with pytest.raises(UserError, match=r"vision_tower.encoder.layers.0.mlp.fc1 has no place in a llama of 2 layers"):
        find_tensors(read_head(base), {"model.vision_tower.encoder.layers.0.mlp.fc1": (96, 64)})


def with_info(base, path, tensor, dims=None, offset=None):
    """A copy of a file whose table says something else of a matrix."""
    content = bytearray(base.read_bytes())
    at = bytes(content).index(tensor.encode()) + len(tensor) + 4
    if dims is not None:
        struct.pack_into("<QQ", content, at, *dims)
    if offset is not None:
        struct.pack_into("<Q", content, at + 16 + 4, offset)
    path.write_bytes(content)
    return path


def test_a_tensor_takes_little_more_memory_than_its_floats(tmp_path):
    """Its bytes, and its floats twice; each step of a format's arithmetic would be another copy."""
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    weight = torch.randn(512, 1024).numpy()
    writer.add_tensor("blk.0.ffn_up.weight", gguf.quantize(weight, Type.Q5_0), raw_dtype=Type.Q5_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    head = read_head(tmp_path / "one.gguf")
    tracemalloc.start()
    try:
        found = dequantised(head, "blk.0.ffn_up.weight")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 9.5 * weight.size
    expected = gguf.dequantize(gguf.quantize(weight, Type.Q5_0), Type.Q5_0)
    assert torch.equal(found, torch.from_numpy(expected))


def test_rows_that_are_no_whole_number_of_blocks_are_damage(tmp_path, base):
    path = with_info(base, tmp_path / "other.gguf", "blk.0.ffn_up.weight", dims=(48, 96))
    with pytest.raises(
        UserError, match=r"damaged: .*blk.0.ffn_up.weight has rows of 48 weights, and Q8_0 blocks of 32"
    ):
        read_head(path)


def test_tensors_over_the_same_bytes_are_damage(tmp_path, base):
    """The second one would be written behind its place, and all that follow."""
    path = with_info(base, tmp_path / "other.gguf", "blk.0.ffn_up.weight", offset=0)
    with pytest.raises(UserError, match=r"is damaged: .* starts at byte [\d,]+, before the tensor in front of it ends"):
        read_head(path)


def test_two_modules_over_one_tensor_are_refused(base):
    """Its bytes would be written twice."""
    shapes = {"model.layers.0.mlp.up_proj": (96, 64), "transformer.h.0.mlp.c_fc": (96, 64)}
    with pytest.raises(UserError, match=r"up_proj and transformer.h.0.mlp.c_fc are one tensor, blk.0.ffn_up.weight"):
        find_tensors(read_head(base), shapes)


def test_a_key_of_ours_with_another_type_is_one_line(tmp_path, model, adapter):
    path = write_gguf(tmp_path / "other.gguf", model, added={"maskft.mask_sha256": 7})
    with pytest.raises(UserError, match=r"already holds a mask \(7\)"):
        merge_into_gguf(adapter, path, tmp_path / "task.gguf")


def test_fused_layers_are_refused(tmp_path, model):
    save_masks(random_masks(model, ("q_proj",)), tmp_path / "mask")
    writer = gguf.GGUFWriter(tmp_path / "fused.gguf", "phi3")
    writer.add_block_count(2)
    for block in range(2):
        qkv = torch.zeros(128, 64).numpy()
        writer.add_tensor(f"blk.{block}.attn_qkv.weight", gguf.quantize(qkv, Type.Q4_0), raw_dtype=Type.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"has no blk.0.attn_q.weight .* fused in blk.0.attn_qkv"):
        merge_into_gguf(tmp_path / "mask", tmp_path / "fused.gguf", tmp_path / "task.gguf")


def test_parts_are_to_be_joined_first(tmp_path, model, adapter):
    path = write_gguf(tmp_path / "part.gguf", model, added={"split.count": 3})
    with pytest.raises(UserError, match=r"one of 3 parts .* --merge"):
        merge_into_gguf(adapter, path, tmp_path / "task.gguf")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_a_cut_file_is_refused(tmp_path, base, adapter, share):
    content = base.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=r"is cut"):
        merge_into_gguf(adapter, path, tmp_path / "task.gguf")


def test_a_file_that_is_cut_in_a_tensor_without_zero_is_refused(tmp_path, model, adapter):
    """The last tensor of a file in Q4_K_M is often one in Q4_K."""
    last = "output.weight"
    path = write_gguf(tmp_path / "other.gguf", model, kinds={**KINDS, last: Type.Q4_1})
    places = read_head(path).tensors
    assert max(places, key=lambda name: places[name].start) == last
    # More than the padding at the end.
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(UserError, match=r"is cut: output.weight ends at byte"):
        merge_into_gguf(adapter, path, tmp_path / "task.gguf")


@pytest.mark.parametrize("shown", [1, 3 << 24], ids=["version 1", "version 3 in the other byte order"])
def test_another_version_or_byte_order_says_how_to_convert(tmp_path, base, shown):
    content = bytearray(base.read_bytes())
    content[4:8] = struct.pack("<I", shown)
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"is GGUF version {shown}; .* with gguf-convert-endian"):
        read_head(path)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model", b"GGUF" + b"\xff" * 64])
def test_what_is_not_gguf_is_refused(tmp_path, adapter, content):
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"other\.gguf"):
        merge_into_gguf(adapter, path, tmp_path / "task.gguf")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general.alignment", struct.pack("<II", 4, 0)),
        ("general.alignment", struct.pack("<Ii", 5, -32)),
        ("general.alignment", struct.pack("<IQ", 10, 2**62)),
        ("general.alignment", struct.pack("<IIQII", 9, 4, 2, 32, 32)),
        ("split.count", struct.pack("<IQ2s", 8, 2, b"no")),
    ],
    ids=["zero", "negative", "huge", "array", "text"],
)
def test_a_head_with_values_of_other_kinds_is_refused_in_one_line(tmp_path, adapter, key, value):
    path = tmp_path / "other.gguf"
    pair = struct.pack("<Q", len(key)) + key.encode() + value
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + pair + bytes(64))
    with pytest.raises(UserError, match=r"other\.gguf"):
        merge_into_gguf(adapter, path, tmp_path / "task.gguf")


def test_masks_that_do_more_than_zero_are_refused(tmp_path, base, masks):
    save_masks(masks, tmp_path / "base-valued", removed_value="base", removed_value_model="parent")
    with pytest.raises(UserError, match=r"the values of parent; only zero"):
        merge_into_gguf(tmp_path / "base-valued", base, tmp_path / "task.gguf")


def test_a_full_disk_leaves_nothing(tmp_path, base, adapter):
    """A limit on file sizes stops the write where a full disk would."""
    before = base.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(UserError, match=r"task.gguf' cannot be written"):
            merge_into_gguf(adapter, base, tmp_path / "task.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["mask"]
    assert base.read_bytes() == before


def test_a_base_whose_disk_fails_is_not_said_to_be_the_output(tmp_path, base, adapter, monkeypatch):
    class Failing(io.BytesIO):
        name = "base.gguf"

        def read(self, *args):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    copy = masks_in_gguf._copy
    monkeypatch.setattr(masks_in_gguf, "_copy", lambda file, start, end: copy(Failing(), start, end))
    with pytest.raises(UserError, match=r"'base.gguf' cannot be read \(Input/output error\); copy it again"):
        merge_into_gguf(adapter, base, tmp_path / "task.gguf")


def test_sigterm_leaves_nothing(tmp_path, base, adapter):
    """Schedulers and ``docker stop`` end a command with it."""

    def stop_at_the_data():
        masks_in_gguf._copy = lambda *args: os.kill(os.getpid(), signal.SIGTERM)

    words = ["merge", str(adapter), "--gguf", str(base), "--output", str(tmp_path / "task.gguf")]
    assert Fork(words, tmp_path / "err", stop_at_the_data).wait() == 128 + signal.SIGTERM
    assert (tmp_path / "err").read_text() == "maskft: stopped by SIGTERM\n"
    assert {path.name for path in tmp_path.iterdir()} == {"mask", "err"}


def test_a_folder_that_cannot_be_written_to_is_refused_before_minutes_of_reading(tmp_path, base, adapter, monkeypatch):
    monkeypatch.setattr(masks_in_gguf, "read_head", None)
    folder = tmp_path / "mine"
    folder.mkdir(mode=0o500)
    if os.geteuid() == 0:
        # Root may write anywhere, so that the system would say yes.
        monkeypatch.setattr(os, "access", lambda path, mode: path != folder)
    with pytest.raises(UserError, match=r"mine' cannot be written to; name another folder"):
        merge_into_gguf(adapter, base, folder / "task.gguf")


def test_outputs_are_new_files(tmp_path, base, adapter):
    (tmp_path / "task.gguf").write_text("mine")
    with pytest.raises(UserError, match=r"exists; name a new file"):
        merge_into_gguf(adapter, base, tmp_path / "task.gguf")
    with pytest.raises(UserError, match=r"exists; name a new file"):
        merge_into_gguf(adapter, base, base)
    with pytest.raises(UserError, match=r"folder .* does not exist"):
        merge_into_gguf(adapter, base, tmp_path / "nowhere" / "task.gguf")
    assert (tmp_path / "task.gguf").read_text() == "mine"


def test_the_commands(tmp_path, base, adapter, capsys):
    task, again = str(tmp_path / "task.gguf"), str(tmp_path / "again.gguf")
    assert main(["merge", str(adapter), "--gguf", str(base), "--output", task]) == 0
    assert main(["verify", str(adapter), "--gguf", task, "--base", str(base)]) == 0
    assert capsys.readouterr().out.count("ok  ") == 4
    assert main(["merge", str(adapter), "--gguf", task, "--undo", "--output", again]) == 0
    assert (tmp_path / "again.gguf").read_bytes() == base.read_bytes()
    capsys.readouterr()
    for words, message in (
        (["--gguf", str(base)], "needs --output"),
        (["--output", task], "--output goes with --gguf"),
        ([], "give --output_dir"),
        (["--gguf", str(base), "--output", task, "--scale", "0.5"], "drop --output_dir"),
    ):
        assert main(["merge", str(adapter), *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
