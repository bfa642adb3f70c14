"""Saved masks as an add-on: on and off, the same masks."""

import weakref

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import tiny
from maskft import MaskConfig, current_masks, masks
from maskft.masks import adapter
from maskft.masks.codec import encode_mask
from maskft.masks.verify import verify
from maskft_common.errors import UserError


def trained(seed=3, **options):
    """A masked model whose scores are not those of its seed."""
    model = get_peft_model(tiny.tiny_llama(), MaskConfig(sparsity=0.3, layers_to_transform=[1], **options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "mask_scores" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=tiny.token_ids()).logits


def test_switched_off_scores_are_saved_and_give_the_same_model(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path / "coded")
    with masks.disabled():
        assert not masks.is_enabled()
        model.save_pretrained(tmp_path / "plain")
        plain = PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path / "plain").eval()
    assert masks.is_enabled()
    coded = PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path / "coded").eval()

    names = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    assert names and all(key.endswith(".mask_scores") and value.dtype == torch.float32 for key, value in names.items())
    assert all(key.endswith(".mask_coded") for key in load_file(tmp_path / "coded" / "adapter_model.safetensors"))
    expected = current_masks(model)
    for loaded in (plain, coded):
        assert all(torch.equal(mask, expected[name]) for name, mask in current_masks(loaded).items())
        assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(plain.merge_and_unload()), logits(model))


def test_masks_are_coded_one_after_another(tmp_path, monkeypatch):
    """Together those of a 7B model take 7 GB, beside the model and its scores."""
    made = []

    def encode(mask):
        assert not any(reference() is not None for reference in made)
        made.append(weakref.ref(mask))
        return encode_mask(mask)

    monkeypatch.setattr(adapter, "encode_mask", encode)
    trained().save_pretrained(tmp_path / "scores")
    assert len(made) == 7
    PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path / "scores").save_pretrained(tmp_path / "masks")
    assert len(made) == 14


def test_files_of_one_kind_are_refused_by_the_other(tmp_path):
    """PEFT alone would leave the scores as they were drawn, and say so in a warning at most."""
    model = trained()
    model.save_pretrained(tmp_path / "coded")
    with masks.disabled():
        model.save_pretrained(tmp_path / "plain")
        with pytest.raises(UserError, match=r"the adapter file has no scores; .* maskft\.masks\.enable"):
            PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path / "coded")
    with pytest.raises(UserError, match=r"has no mask_sha256.*maskft\.masks\.disable"):
        PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path / "plain")


def test_a_mask_without_scores_is_not_saved_as_scores(tmp_path):
    trained().save_pretrained(tmp_path / "coded")
    loaded = PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path / "coded")
    with masks.disabled(), pytest.raises(UserError, match="has no scores to save"):
        loaded.save_pretrained(tmp_path / "plain")


@pytest.mark.parametrize("damage", ["NaN", "shape"])
def test_scores_that_do_not_load_leave_every_layer_as_it_was(damage, tmp_path):
    """The layers before the damaged one, too."""
    trained(save_scores=True).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    last = [key for key in tensors if "up_proj" in key and key.endswith(".mask_scores")][-1]
    tensors[last] = tensors[last].fill_(float("nan")) if damage == "NaN" else tensors[last][:1].clone()
    save_file(tensors, file)

    model = trained(seed=4, save_scores=True)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(UserError, match=f"up_proj: .*saved scores .*{damage}"):
        model.load_adapter(tmp_path, "default")
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize("name", ["adapter", "checkpoint-3"])
def test_damaged_scores_are_noticed_wherever_they_are_loaded(name, tmp_path):
    """One bit that leaves the mask as it is. A checkpoint has scores without being asked to."""
    folder = tmp_path / name
    trained(save_scores=name == "adapter").save_pretrained(folder)
    assert "sha256 of all scores matches" in verify(folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    scores = next(key for key in tensors if "up_proj" in key and key.endswith(".mask_scores"))
    tensors[scores].view(torch.int32)[0, 0] ^= 1
    save_file(tensors, file)

    message = r"up_proj: the saved scores do not match their sha256, so the file is damaged"
    with pytest.raises(UserError, match=message):
        PeftModel.from_pretrained(tiny.tiny_llama(), folder, is_trainable=True)
    model = trained(seed=4)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(UserError, match=message):  # as a trainer resumes
        model.load_adapter(folder, "default", is_trainable=True)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    with pytest.raises(UserError, match=message):
        verify(folder)

    # The mask itself is whole.
    used = PeftModel.from_pretrained(tiny.tiny_llama(), folder).eval()
    assert torch.equal(logits(used), logits(trained()))


def test_scores_that_were_saved_without_a_checksum_are_loaded(tmp_path):
    trained(save_scores=True).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {key: value for key, value in load_file(file).items() if not key.endswith("_sha256")}
    save_file(tensors, file)
    loaded = PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path, is_trainable=True).eval()
    assert torch.equal(logits(loaded), logits(trained()))
    assert not any("all scores" in line for line in verify(tmp_path))


def test_a_configuration_that_is_used_again_checks_its_file_again(tmp_path):
    """The second call found no checksums, and loaded a mask over other base weights without a word."""
    trained(save_scores=True).save_pretrained(tmp_path)
    config = MaskConfig.from_pretrained(tmp_path)
    for _ in range(3):
        with pytest.raises(UserError, match="trained on other base weights"):
            PeftModel.from_pretrained(tiny.tiny_llama(seed=9), tmp_path, config=config, is_trainable=True)
    # Over its own base it is loaded again and again, also after training has filled in the configuration.
    for _ in range(2):
        model = PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path, config=config, is_trainable=True).eval()
        assert torch.equal(logits(model), logits(trained()))
        model.peft_config["default"].mask_sha256 = "of later scores"
