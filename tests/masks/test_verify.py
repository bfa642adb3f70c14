"""``maskft verify`` against a base."""

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import tiny
from maskft import MaskConfig
from maskft.masks import fingerprints
from maskft.masks.verify import verify
from maskft_common.errors import UserError
from tiny_tokenizer import tiny_tokenizer


@pytest.mark.parametrize("verify_base", [True, False])
def test_the_base_is_read_once(verify_base, base, tmp_path, monkeypatch):
    """When it is loaded, or where that is not asked for, afterwards."""
    config = MaskConfig(verify_base=verify_base, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    calls, fingerprint = [], fingerprints.base_fingerprint
    monkeypatch.setattr(fingerprints, "base_fingerprint", lambda layers: calls.append(1) or fingerprint(layers))
    assert "base fingerprint match" in " ".join(verify(tmp_path / "adapter", str(base)))
    assert len(calls) == 1
    tiny.tiny_llama(vocab_size=len(tiny_tokenizer()), seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="was trained on other base weights"):
        verify(tmp_path / "adapter", str(tmp_path / "other"))
