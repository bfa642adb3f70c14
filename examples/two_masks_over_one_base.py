"""Two masks over one base model in memory: switch between them, switch them off, and compare what they remove.

python examples/two_masks_over_one_base.py
"""

from __future__ import annotations

import tempfile

import torch
from peft import PeftModel, get_peft_model

import maskft
import tiny


def train(model: PeftModel, prompts: list[str], steps: int = 20) -> None:
    """Minimise the loss on ``prompts``. Only the scores of the active mask require a gradient."""
    batch = tiny.tokenizer()(prompts, return_tensors="pt", padding=True)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(steps):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    """Learn one mask on sums and one on words, save them, and load both over a fresh base."""
    tasks = {"sums": [f"{a}+{b}={a + b}" for a in range(6) for b in range(6)], "words": ["one two", "three four"]}
    with tempfile.TemporaryDirectory() as folder:
        for name, prompts in tasks.items():
            model = get_peft_model(tiny.language_model(), maskft.MaskConfig(sparsity=0.1))
            train(model, prompts)
            model.save_pretrained(f"{folder}/{name}")

        model = PeftModel.from_pretrained(tiny.language_model(), f"{folder}/sums", adapter_name="sums")
        model.load_adapter(f"{folder}/words", adapter_name="words")
    model.eval()
    batch = tiny.tokenizer()(["2+3=5"], return_tensors="pt")
    for name in tasks:
        model.set_adapter(name)
        print(f"{name}: loss on a sum {model(**batch, labels=batch.input_ids).loss:.4f}")
    with model.disable_adapter():
        print(f"no mask: loss on a sum {model(**batch, labels=batch.input_ids).loss:.4f}")

    sums, words = (maskft.current_masks(model, name) for name in tasks)
    both = sum(int((~sums[layer] & ~words[layer]).sum()) for layer in sums)
    print(f"{both} weights are removed by both masks, of {sum(int((~mask).sum()) for mask in sums.values())} by each")


if __name__ == "__main__":
    main()
