"""``maskft verify`` against a base."""

import json

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import tiny
from maskft import MaskConfig
from maskft.masks import fingerprints
from maskft.masks.verify import verify
from maskft_common.errors import UserError
from maskft_common.layout import ADAPTER_CONFIG
from tiny_tokenizer import tiny_tokenizer


def test_a_base_that_is_stored_otherwise_is_not_said_to_match(base, tmp_path):
    """Loading the mask of a four-bit model over floats warns, and is no error."""
    folder = tmp_path / "adapter"
    config = MaskConfig(task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    file = folder / ADAPTER_CONFIG
    values = {"base_quantisation": "bitsandbytes nf4", "base_fingerprint": "0" * 64}
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.warns(
        UserWarning, match="trained over weights stored as bitsandbytes nf4, and these are stored as floats"
    ):
        passed = verify(folder, str(base))
    assert passed[-1] == f"fits {base}: names, shapes match; its weights: stored as floats, trained as bitsandbytes nf4"


@pytest.mark.parametrize("verify_base", [True, False])
def test_the_base_is_read_once(verify_base, base, tmp_path, monkeypatch):
    """When it is loaded, or where that is not asked for, afterwards."""
    config = MaskConfig(verify_base=verify_base, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    weights_alone = tmp_path / "weights"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(weights_alone)
    calls, fingerprint = [], fingerprints.base_fingerprint
    monkeypatch.setattr(fingerprints, "base_fingerprint", lambda layers: calls.append(1) or fingerprint(layers))
    assert "fingerprint of the masked layers match" in " ".join(verify(tmp_path / "adapter", str(weights_alone)))
    assert len(calls) == 1
    # A folder of weights alone: nothing is tokenised here.
    tiny.tiny_llama(vocab_size=len(tiny_tokenizer()), seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="was trained on other base weights"):
        verify(tmp_path / "adapter", str(tmp_path / "other"))
