"""Preference training of a mask: TRL's DPOTrainer, whose reference is the base with the mask switched off.

python examples/dpo_with_a_mask.py
"""

from __future__ import annotations

import tempfile

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import maskft
import tiny


def main() -> None:
    """Prefer right sums to wrong ones."""
    pairs = [{"prompt": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": f"{a - b}"} for a in range(6) for b in range(6)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=tiny.language_model(),
            args=DPOConfig(
                folder,
                learning_rate=1e-2,
                max_steps=12,
                per_device_train_batch_size=12,
                logging_steps=4,
                report_to="none",
                bf16=False,
                use_cpu=True,
                gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_list(pairs),
            processing_class=tiny.tokenizer(),
            peft_config=maskft.MaskConfig(sparsity=0.1, layers_to_transform=[1, 2, 3]),
        )
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print(f"DPO loss {losses[0]:.4f} in the first steps, {losses[-1]:.4f} in the last")


if __name__ == "__main__":
    main()
