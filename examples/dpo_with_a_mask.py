"""Preference training of a mask: TRL's DPOTrainer, whose reference is the base with the mask switched off.

python examples/dpo_with_a_mask.py
"""

from __future__ import annotations

import tempfile

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import maskft
import tiny


def preferences() -> Dataset:
    """The right sum of two numbers is preferred to their difference."""
    pairs = []
    for a in range(6):
        for b in range(6):
            pairs.append({"prompt": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": f"{a - b}"})
    return Dataset.from_list(pairs)


def main() -> None:
    """Prefer right sums to wrong ones."""
    # As with LoRA, no reference model is loaded: TRL computes the reference's log-probabilities with the adapter
    # switched off, which here means with no weight removed.
    mask_config = maskft.MaskConfig(
        sparsity=0.1,  # the fraction of weights to remove, not the fraction to keep
        layers_to_transform=[1, 2, 3],  # decoder layers to mask, counted from 0; default: all
    )

    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=tiny.language_model(),
            args=DPOConfig(
                folder,
                # Far above the usual rate of DPO. The trained parameters are scores with a standard deviation of 0.02,
                # and a step changes the model only where it moves a score across the cut between kept and removed.
                learning_rate=1e-2,
                max_steps=12,
                per_device_train_batch_size=12,
                logging_steps=4,
                report_to="none",
                # TRL's defaults are bfloat16 and gradient checkpointing, which a tiny model on a CPU does not need.
                bf16=False,
                use_cpu=True,
                gradient_checkpointing=False,
            ),
            train_dataset=preferences(),
            processing_class=tiny.tokenizer(),
            peft_config=mask_config,
        )
        trainer.train()

    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print(f"DPO loss {losses[0]:.4f} in the first steps, {losses[-1]:.4f} in the last")


if __name__ == "__main__":
    main()
