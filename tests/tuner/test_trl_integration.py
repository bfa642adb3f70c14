"""The same MaskConfig beyond supervised fine-tuning: preference training, and a vision-language model's text layers."""

import math

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from trl import DPOConfig, DPOTrainer

from maskft import MaskConfig
from maskft.tuner import MaskedLinear
from tiny import TRAINER
from tiny_tokenizer import tiny_tokenizer


def dpo_trainer(model, folder, max_steps, **kwargs):
    pairs = [{"prompt": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": f"{a - b}"} for a in range(6) for b in range(6)]
    args = DPOConfig(str(folder), max_steps=max_steps, **TRAINER)
    data = Dataset.from_list(pairs)
    return DPOTrainer(model=model, args=args, train_dataset=data, processing_class=tiny_tokenizer(), **kwargs)


def test_dpo_learns_a_mask(base, tmp_path):
    """docs/studies.md shows this; the reference model of DPO is the base with the mask switched off."""
    model = AutoModelForCausalLM.from_pretrained(base)
    before = {name: p.clone() for name, p in model.named_parameters()}
    config = MaskConfig(sparsity=0.1, layers_to_transform=[1], task_type="CAUSAL_LM")
    trainer = dpo_trainer(model, tmp_path / "dpo", max_steps=6, peft_config=config)
    layers = [m for m in trainer.model.modules() if isinstance(m, MaskedLinear)]
    start = [layer.get_mask("default").clone() for layer in layers]
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    moved = sum(int((layer.get_mask("default") != mask).sum()) for layer, mask in zip(layers, start, strict=True))
    assert len(layers) == 7 and moved > 0
    trainer.save_model(tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert all(torch.equal(p, before[name]) for name, p in plain.named_parameters())
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    masks = [m.get_mask("default") for m in loaded.modules() if isinstance(m, MaskedLinear)]
    assert all(torch.equal(a, layer.get_mask("default")) for a, layer in zip(masks, layers, strict=True))


def test_dpo_goes_on_from_a_trained_mask_and_refers_to_it(base, tmp_path):
    """TRL adds a second adapter of the same configuration for the reference."""
    plain = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(plain, MaskConfig(sparsity=0.3, layers_to_transform=[1]))
    for name, parameter in model.named_parameters():
        if "mask_scores" in name:
            parameter.data = parameter.data.flip(0)  # as training would: another mask than the seed draws
    trainer = dpo_trainer(model, tmp_path / "dpo", max_steps=3)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)  # policy and reference are one model before the first step
    assert losses[-1] < losses[0]


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
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
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
