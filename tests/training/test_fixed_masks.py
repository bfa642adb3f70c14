"""A fixed mask of one's own."""

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from killing import Fork, forget
from maskft import current_masks, topk_mask
from maskft.baselines.fixed import FIXED_MASKS, FixedMask
from maskft.masks.mask_set import MaskSet


def add_a_method():
    """Add one before training is imported, which makes its list of methods then."""
    FIXED_MASKS["largest_mask"] = FixedMask(lambda weight, norms, generator: -weight.abs())
    forget("maskft.training", "maskft_lab.cli.train")


def test_a_fixed_mask_is_one_entry(base, data, tmp_path):
    """As docs/architecture.md tells: one that removes the largest weights, made, saved and loaded."""
    words = ["train", "--method", "largest_mask", "--model_name_or_path", base, "--dataset_name", data]
    words += ["--mask_sparsity", "0.2", "--eval_split_size", "16", "--output_dir", tmp_path / "out"]
    err = tmp_path / "err"
    assert Fork([str(word) for word in words], err, add_a_method).wait() == 0, err.read_text()
    model = AutoModelForCausalLM.from_pretrained(base)
    weights = {name: model.get_submodule(name).weight.detach() for name in MaskSet.from_adapter(tmp_path / "out")}
    for name, mask in current_masks(PeftModel.from_pretrained(model, tmp_path / "out")).items():
        assert torch.equal(mask, topk_mask(-weights[name].abs(), 0.2, "signed"))
