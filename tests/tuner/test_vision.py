"""A vision-language model, whose text layers are masked."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from maskft import MaskConfig
from maskft.tuner import MaskedLinear


@pytest.fixture
def vlm():
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=95))


def test_the_language_layers_of_a_vision_language_model(vlm, tmp_path):
    """The vision tower has layers and projections of the same names; the regular expression leaves it alone."""
    config = MaskConfig(
        sparsity=0.1, target_modules=r".*language_model\.layers\.[12]\..*_proj", task_type="CAUSAL_LM", save_scores=True
    )
    state = {name: p.clone() for name, p in vlm.named_parameters()}
    model = get_peft_model(vlm, config)
    masked = [m for m in model.modules() if isinstance(m, MaskedLinear)]
    assert len(masked) == 14 and all("language_model" in m.module_name for m in masked)
    assert {n for n, p in model.named_parameters() if p.requires_grad and "mask_scores" not in n} == set()
    ids = torch.randint(2, 90, (2, 10), generator=torch.Generator().manual_seed(0))
    ids[:, 1:5] = 95  # 8 x 8 pixels in patches of 4: four image tokens
    batch = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8), "labels": ids.masked_fill(ids == 95, -100)}
    model(**batch).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0).step()
    model.eval()
    with torch.no_grad():
        expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    plain = LlavaForConditionalGeneration(vlm.config)
    plain.load_state_dict(state)
    with torch.no_grad():
        merged = PeftModel.from_pretrained(plain, tmp_path).merge_and_unload().eval()
        assert torch.equal(merged(**batch).logits, expected)
    for name, parameter in merged.named_parameters():
        if "vision_tower" in name or "projector" in name:
            assert torch.equal(parameter, state[name])
