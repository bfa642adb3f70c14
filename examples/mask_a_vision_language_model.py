"""Mask the language part of a vision-language model and leave its vision tower alone.

python examples/mask_a_vision_language_model.py
"""

from __future__ import annotations

import torch
from peft import get_peft_model
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

import maskft
import tiny

IMAGE = 2  # the token <image>


def vision_language_model() -> LlavaForConditionalGeneration:
    """Return a tiny random LLaVA; an image of 8 x 8 pixels is four tokens."""
    vision_config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=tiny.text_config(),
        image_token_index=IMAGE,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config)


def main() -> None:
    """Learn to caption four random images."""
    # The vision tower has projections of the same names, q_proj and so on, so a list of names would mask them as well.
    # The regular expression has to match the whole name of a module, as in PEFT.
    config = maskft.MaskConfig(sparsity=0.1, target_modules=r".*language_model\.layers\.\d+\..*_proj")
    model = get_peft_model(vision_language_model(), config)
    layers = maskft.adapter_layers(model)
    print(f"{len(layers)} layers are masked, none of the vision tower's")
    assert not any("vision_tower" in name for name in maskft.current_masks(model))

    texts = [f"{'<image>' * 4}image {n}" for n in range(4)]
    captions = tiny.tokenizer()(texts, return_tensors="pt")
    images = torch.randn(4, 3, 8, 8)
    # The image's tokens are input only: -100 leaves them out of the loss.
    labels = captions.input_ids.masked_fill(captions.input_ids == IMAGE, -100)

    # The only parameters that require a gradient are the scores of the masked layers.
    scores = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(scores, lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(**captions, pixel_values=images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    # A mask starts from random scores, so the first loss is that of a model without a random 10 % of its weights.
    print(f"loss {losses[0]:.4f} with the random start, {losses[-1]:.4f} after 20 steps")

    # Merging writes zeros into the base weights. The result is an ordinary LlavaForConditionalGeneration.
    merged = model.merge_and_unload()
    num_zeros = 0
    for name, parameter in merged.named_parameters():
        if "language_model.layers" in name:
            num_zeros += int((parameter == 0).sum())
    print(f"{num_zeros} weights of the language layers are zero in the merged model")


if __name__ == "__main__":
    main()
