"""A fixed mask of one's own."""

import subprocess
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from maskft import current_masks, topk_mask
from maskft.masks.mask_set import MaskSet

TOY = """
import sys
from maskft.baselines.fixed import FIXED_MASKS, FixedMask
FIXED_MASKS["largest_mask"] = FixedMask(lambda weight, norms, generator: -weight.abs())
from maskft_lab.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_fixed_mask_is_one_entry(base, data, tmp_path):
    """As docs/architecture.md tells: one that removes the largest weights, made, saved and loaded."""
    words = ["train", "--method", "largest_mask", "--model_name_or_path", base, "--dataset_name", data]
    words += ["--mask_sparsity", "0.2", "--eval_split_size", "16", "--output_dir", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-c", TOY, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(base)
    weights = {name: model.get_submodule(name).weight.detach() for name in MaskSet.from_adapter(tmp_path / "out")}
    for name, mask in current_masks(PeftModel.from_pretrained(model, tmp_path / "out")).items():
        assert torch.equal(mask, topk_mask(-weights[name].abs(), 0.2, "signed"))
