"""Union, intersection and vote of saved masks: as files, and as PEFT's list of active adapters."""

import json
import weakref

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from maskft import MaskConfig
from maskft.masks import combine
from maskft.masks.codec import decode_mask, encode_mask
from maskft.masks.combine import combine_adapters, combine_masks
from maskft.masks.mask_set import MaskSet, read_config
from maskft.masks.verify import verify
from maskft_common.errors import UserError
from maskft_common.layout import ADAPTER_CONFIG, CARD
from maskft_lab.cli.main import main
from tiny_tokenizer import tiny_tokenizer


def removed(*columns):
    """A mask of one row that removes these columns of five."""
    mask = torch.ones(1, 5, dtype=torch.bool)
    mask[0, list(columns)] = False
    return mask


def removed_by(masks, module="up"):
    return (~masks[module][0]).nonzero().squeeze(1).tolist()


def combined(sets, combination):
    """The combination of masks that are not coded."""
    coded_sets = [{name: encode_mask(mask) for name, mask in masks.items()} for masks in sets]
    return {name: decode_mask(data) for name, data in combine_masks(coded_sets, combination).items()}


def test_each_combination_by_hand():
    sets = [{"up": removed(0, 1, 2)}, {"up": removed(1, 2, 3)}, {"up": removed(2)}]
    assert removed_by(combined(sets, "union")) == [0, 1, 2, 3]
    assert removed_by(combined(sets, "intersection")) == [2]
    assert removed_by(combined(sets, "vote")) == [1, 2]
    assert removed_by(combined(sets[:2], "vote")) == [1, 2]  # more than half of two is both


def test_a_module_that_only_some_masks_have():
    sets = [{"up": removed(0, 1)}, {"up": removed(1), "down": removed(3)}]
    assert removed_by(combined(sets, "union"), "down") == [3]
    assert combined(sets, "intersection").keys() == {"up"}


def test_masks_of_one_module_at_a_time_are_in_memory(monkeypatch):
    """Decoded, those of a 7B model take 7 GB each."""
    decoded = []

    def decode(data, name):
        mask = decode_mask(data, name)
        decoded.append((name, weakref.ref(mask)))
        assert {module for module, mask in decoded if mask() is not None} == {name}
        return mask

    monkeypatch.setattr(combine, "decode_mask", decode)
    combined([{"up": removed(1), "down": removed(2)}, {"up": removed(3), "down": removed(4)}], "union")
    assert len(decoded) == 4


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that is computed inside."""

    num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.num_bytes = max(self.num_bytes, result.nbytes)
        return result


def test_the_masks_of_a_module_are_counted_in_two_bytes_a_weight():
    """Torch's own sum of masks takes eight beside all of them."""
    sets = [{"up": encode_mask(torch.rand(64, 32) < 0.9)} for _ in range(3)]
    with LargestTensor() as largest:
        combine_masks(sets, "vote")
    assert largest.num_bytes == 2 * 64 * 32


@pytest.fixture
def adapters(tmp_path):
    """Three saved masks over one base, of which one masks fewer layers, and the base's folder."""
    base = tmp_path / "base"
    tiny.tiny_llama().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    folders = []
    for seed, settings in enumerate(({}, {}, {"target_modules": ["gate_proj"]})):
        model = tiny.tiny_llama()
        model.name_or_path = str(base)
        folder = tmp_path / f"mask{seed}"
        config = MaskConfig(sparsity=0.3, mask_seed=seed, task_type="CAUSAL_LM", **settings)
        get_peft_model(model, config).save_pretrained(folder)
        folders.append(folder)
    return folders


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=tiny.token_ids()).logits


@pytest.mark.parametrize("chosen", [(0, 1), (0, 2), (0, 1, 2)])
def test_the_union_is_bit_for_bit_the_adapters_active_together(adapters, chosen, tmp_path):
    parts = [adapters[number] for number in chosen]
    combine_adapters(parts, "union", tmp_path / "union")
    union = logits(PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path / "union"))

    model = PeftModel.from_pretrained(tiny.tiny_llama(), parts[0], adapter_name="part0")
    names = ["part0"]
    for number, part in enumerate(parts[1:], 1):
        names.append(f"part{number}")
        model.load_adapter(part, names[-1])
    model.base_model.set_adapter(names)
    assert torch.equal(union, logits(model))
    assert not torch.equal(union, logits(tiny.tiny_llama()))
    assert torch.equal(union, logits(model.merge_and_unload(adapter_names=names)))


@pytest.mark.parametrize("combination", ["union", "intersection", "vote"])
def test_the_command_writes_a_verified_adapter_with_its_card(adapters, combination, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["masks", combination, *map(str, adapters[:2]), "--output", str(out)]
    assert main(command) == 0
    expected = MaskSet(combined([MaskSet.from_adapter(folder) for folder in adapters[:2]], combination))
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert f"the {combination} of 2 masks removes {expected.num_removed:,} of {expected.numel:,} weights" in printed
    assert any("fingerprint of the masked layers match" in line for line in verify(out, str(tmp_path / "base")))
    found = MaskSet.from_adapter(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[module], expected[module]) for module in expected)
    card = (out / CARD).read_text()
    assert f"{combination} of 2 masks" in card
    assert "mask0" in card
    assert str(tmp_path) not in card


def test_the_folder_one_is_in_is_a_part_with_its_name(adapters, tmp_path, monkeypatch):
    monkeypatch.chdir(adapters[0])
    combine_adapters([".", "../mask1"], "union", tmp_path / "new")
    recipe = read_config(tmp_path / "new").recipe
    assert recipe["part 1"].startswith("mask0 (mask") and recipe["part 2"].startswith("mask1 (mask")


def test_the_fingerprint_of_the_base_is_kept_where_an_adapter_has_the_same_modules(adapters, tmp_path, capsys):
    few = tmp_path / "few"
    model = get_peft_model(tiny.tiny_llama(), MaskConfig(target_modules=["up_proj"]))
    model.save_pretrained(few)
    edit(few, base_model_name_or_path=str(tmp_path / "base"))
    assert main(["masks", "union", str(adapters[0]), str(adapters[2]), "--output", str(tmp_path / "known")]) == 0
    assert "not recorded" not in capsys.readouterr().err
    assert main(["masks", "union", str(few), str(adapters[2]), "--output", str(tmp_path / "unknown")]) == 0
    assert "the base's fingerprint is not recorded" in capsys.readouterr().err


def test_of_a_mask_without_a_fingerprint_nothing_is_known(adapters, tmp_path, capsys):
    """None is recorded over float16."""
    edit(adapters[1], base_fingerprint=None)
    combine_adapters(adapters[:2], "union", tmp_path / "both")
    expected = read_config(adapters[0]).base_fingerprint
    assert read_config(tmp_path / "both").base_fingerprint == expected is not None


def test_the_tokenizer_of_the_parts_is_kept_if_they_agree(adapters, tmp_path):
    for adapter in adapters[:2]:
        tiny_tokenizer().save_pretrained(adapter)
        (adapter / "chat_template.jinja").write_text("{{ messages }}")
    said = combine_adapters(adapters[:2], "union", tmp_path / "both")
    assert "template" not in said
    for file in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "both" / file).read_bytes() == (adapters[0] / file).read_bytes()

    (adapters[1] / "chat_template.jinja").write_text("{{ another }}")
    said = combine_adapters(adapters[:2], "union", tmp_path / "differ")
    assert said.endswith("their tokenizers or chat templates differ, and the base's is used")
    assert not list((tmp_path / "differ").glob("token*"))


def test_how_the_base_was_stored_is_kept(adapters, tmp_path):
    """Else the combination would be refused over floats, where each part warns that it was trained over codes."""
    for adapter in adapters[:2]:
        edit(adapter, base_quantisation="bitsandbytes nf4")
    combine_adapters(adapters[:2], "union", tmp_path / "both")
    assert json.loads((tmp_path / "both" / ADAPTER_CONFIG).read_text())["base_quantisation"] == "bitsandbytes nf4"
    combine_adapters([adapters[2], adapters[2]], "union", tmp_path / "floats")
    assert json.loads((tmp_path / "floats" / ADAPTER_CONFIG).read_text())["base_quantisation"] is None


# Bad input


def fails(match, adapters, tmp_path, combination="union"):
    out = tmp_path / "new"
    with pytest.raises(UserError, match=match) as raised:
        combine_adapters(adapters, combination, out)
    assert "\n" not in str(raised.value)
    assert not out.exists()


def edit(folder, **values):
    file = folder / ADAPTER_CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_one_adapter_is_not_enough(adapters, tmp_path):
    fails("two adapters or more; found 1", adapters[:1], tmp_path)


def test_other_bases(adapters, tmp_path):
    for fingerprint in (None, "0" * 64):
        edit(adapters[1], base_model_name_or_path="another", base_fingerprint=fingerprint)
        fails("'another'; combine masks of one base model", adapters[:2], tmp_path)
    edit(adapters[0], base_fingerprint=None)
    fails("'another'; combine masks of one base model", adapters[:2], tmp_path)


def test_other_revisions_of_the_base(adapters, tmp_path):
    """Of adapters with other modules no fingerprints can be compared: their names are all there is."""
    edit(adapters[2], revision="v1")
    fails(r"over '.*base' \(revision 'v1'\); combine masks of one base model", adapters[1:], tmp_path)
    edit(adapters[1], revision="v1")
    combine_adapters(adapters[1:], "union", tmp_path / "both")


def test_one_base_under_two_names(adapters, tmp_path):
    edit(adapters[1], base_model_name_or_path="/on/another/machine/base")
    combine_adapters(adapters[:2], "union", tmp_path / "both")
    assert verify(tmp_path / "both", str(tmp_path / "base"))[-1].endswith("fingerprint of the masked layers match")


def test_other_weights_of_the_base(adapters, tmp_path):
    edit(adapters[1], base_fingerprint="0" * 64)
    fails("trained on other weights", adapters[:2], tmp_path)


def test_removed_value_base(adapters, tmp_path):
    edit(adapters[1], removed_value="base", removed_value_model="other")
    fails("mask1.*removed_value='base'", adapters[:2], tmp_path)


def test_weights_beside_the_mask(adapters, tmp_path):
    model = get_peft_model(tiny.tiny_llama(tie_word_embeddings=False), MaskConfig(modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path / "head")
    fails("'.*head' holds weights beside its masks", [tmp_path / "head", adapters[0]], tmp_path)


def test_other_shapes(tmp_path):
    tiny.save_masks({"up": removed(1)}, tmp_path / "narrow")
    tiny.save_masks({"up": removed(1).t().contiguous()}, tmp_path / "tall")
    fails(r"shapes \(1, 5\) and \(5, 1\)", [tmp_path / "narrow", tmp_path / "tall"], tmp_path)


def test_masks_that_remove_nothing(tmp_path):
    tiny.save_masks({"up": removed()}, tmp_path / "empty")
    message = "the union of these 2 masks removes nothing; name masks that remove weights"
    fails(message, [tmp_path / "empty"] * 2, tmp_path)


def test_masks_that_leave_nothing(tmp_path):
    tiny.save_masks({"up": removed(0, 1, 2)}, tmp_path / "one")
    tiny.save_masks({"up": removed(2, 3, 4)}, tmp_path / "two")
    message = "the union of these 2 masks removes all 5 weights; name masks that remove less"
    fails(message, [tmp_path / "one", tmp_path / "two"], tmp_path)


def test_nothing_in_common(tmp_path):
    tiny.save_masks({"up": removed(1)}, tmp_path / "one")
    tiny.save_masks({"up": removed(2)}, tmp_path / "two")
    fails(
        "the intersection of these 2 masks removes nothing; try union",
        [tmp_path / "one", tmp_path / "two"],
        tmp_path,
        "intersection",
    )


def test_a_folder_that_is_not_empty_is_left_alone(adapters, tmp_path):
    with pytest.raises(UserError, match="is not empty"):
        combine_adapters(adapters[:2], "union", adapters[2])


def test_a_folder_without_a_mask(adapters, tmp_path, capsys):
    status = main(["masks", "union", str(adapters[0]), str(tmp_path / "none"), "--output", str(tmp_path / "new")])
    assert status == 2
    assert capsys.readouterr().err.count("\n") == 1
