"""``maskft train --load_in_4bit true`` and ``--load_in_8bit true``: the base is held in fewer bits."""

import shutil

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from maskft.adapter.mask_set import MaskSet, read_config
from maskft.training.record import read_record
from maskft_base import files
from maskft_lab.cli.main import main
from tiny import tiny_llama
from tiny_tokenizer import tiny_tokenizer

pytest.importorskip("bitsandbytes", reason="pip install -e '.[quantized]': a wheel of 40 MB")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """In multiples of 64, which bitsandbytes' kernels for CPUs want of layers that are not masked."""
    folder, tokenizer = tmp_path_factory.mktemp("base"), tiny_tokenizer()
    tiny_llama(2, vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["mask", "peft", "l1_mask", "wanda_mask"])
def test_methods(method, call, base, tmp_path):
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "mask_sparsity": 0.1, "keep_worse": True}
    options |= {"peft_config": '{"peft_type": "LORA"}'} if method == "peft" else {}
    status, err = call(method=method, **options)
    assert status == 0, err
    if method == "peft":
        plain = AutoModelForCausalLM.from_pretrained(base)
        assert isinstance(PeftModel.from_pretrained(plain, tmp_path / "out"), PeftModel)
        return
    masks = MaskSet.from_adapter(tmp_path / "out")
    assert read_config(tmp_path / "out").base_quantisation == "nf4"
    assert all(int((~m).sum()) == round(0.1 * m.numel()) for m in masks.values()) and len(masks) == 14
    assert read_record(tmp_path / "out").summary.num_target_weights == masks.numel
    assert "nf4" in (tmp_path / "out" / files.CARD).read_text()


def test_it_resumes_and_starts_on_data(call, tmp_path):
    options = {"load_in_8bit": True, "mask_init_scores": "wanda", "keep_worse": True, "save_steps": 1, "eval_steps": 1}
    assert call("whole", **options)[0] == 0
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "cut" / "checkpoint-1")
    status, err = call("cut", **options, resume_from_checkpoint=True)
    assert status == 0, err
    whole, cut = (MaskSet.from_adapter(tmp_path / name) for name in ("whole", "cut"))
    assert all((whole[name] == cut[name]).all() for name in whole)


def test_evaluating_and_merging_are_of_the_full_precision_base(call, base, data, tmp_path, capsys):
    assert call(load_in_4bit=True, keep_worse=True)[0] == 0
    out = str(tmp_path / "out")
    evaluate = ["evaluate", "--adapter", out, "--dataset_name", str(data), "--output_dir", str(tmp_path / "result")]
    evaluate += ["--tasks", "heldout", "--max_new_tokens", "8"]
    assert main(evaluate) == 0
    assert main(["merge", out, "--output_dir", str(tmp_path / "merged")]) == 0
    err = " ".join(capsys.readouterr().err.split())
    assert "learned on weights held as nf4" in err
    assert main(["inspect", out]) == 0 and main(["verify", out, "--base", str(base)]) == 0


def test_what_is_refused(call):
    status, err = call(load_in_4bit=True, method="full")
    assert status == 2 and "method full changes weights, which quantised ones do not let" in err
