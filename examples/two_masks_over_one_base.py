"""Two masks over one base model in memory: switch between them, switch them off, and compare what they remove.

python examples/two_masks_over_one_base.py
"""

from __future__ import annotations

import tempfile

import torch
from peft import PeftModel, get_peft_model

import maskft
import tiny


def train(
    model: PeftModel,
    prompts: list[str],
    steps: int = 20,
) -> None:
    """Minimise the loss on ``prompts``. Only the scores of the active mask require a gradient."""
    batch = tiny.tokenizer()(prompts, return_tensors="pt", padding=True)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    scores = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(scores, lr=5e-3)
    for _ in range(steps):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    """Learn one mask on sums and one on words, save them, and load both over a fresh base."""
    all_sums = []
    for a in range(6):
        for b in range(6):
            all_sums.append(f"{a}+{b}={a + b}")
    tasks = {"sums": all_sums, "words": ["one two", "three four"]}

    with tempfile.TemporaryDirectory() as folder:
        for name, prompts in tasks.items():
            # Both masks belong to the same base weights: tiny.language_model() returns the same model every time.
            model = get_peft_model(tiny.language_model(), maskft.MaskConfig(sparsity=0.1))
            train(model, prompts)
            # Writes the mask, less than one bit per weight. The scores, 4 bytes per weight, are left out unless
            # `save_scores=True`, and only further training needs them.
            model.save_pretrained(f"{folder}/{name}")

        # Loading compares a checksum of the base weights with the one in the adapter, and raises for another base.
        model = PeftModel.from_pretrained(tiny.language_model(), f"{folder}/sums", adapter_name="sums")
        model.load_adapter(f"{folder}/words", adapter_name="words")
    model.eval()

    batch = tiny.tokenizer()(["2+3=5"], return_tensors="pt")
    for name in tasks:
        model.set_adapter(name)
        loss = model(**batch, labels=batch.input_ids).loss
        print(f"{name}: loss on a sum {loss:.4f}")
    with model.disable_adapter():
        loss = model(**batch, labels=batch.input_ids).loss
        print(f"no mask: loss on a sum {loss:.4f}")

    # Module name -> bool mask of its weight. True is a weight that is kept.
    sums = maskft.current_masks(model, "sums")
    words = maskft.current_masks(model, "words")
    num_both = 0
    num_each = 0
    for layer in sums:
        removed_by_both = ~sums[layer] & ~words[layer]
        num_both += int(removed_by_both.sum())
        num_each += int((~sums[layer]).sum())
    print(f"{num_both} weights are removed by both masks, of {num_each} by each")


if __name__ == "__main__":
    main()
