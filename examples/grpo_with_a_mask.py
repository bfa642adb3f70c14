"""Reinforcement learning of a mask over a fine-tuned model: TRL's GRPOTrainer, with a reward that can be checked.

python examples/grpo_with_a_mask.py
"""

from __future__ import annotations

import tempfile

from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import maskft
import tiny

SETTINGS = {
    "logging_steps": 5,
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
}


def share_of_ones(completions: list[str], answer: list[str], **columns) -> list[float]:
    """The reward, a toy: answers with many ones. Yours compares each completion with its row's ``answer``."""
    return [text.count("1") / 4 for text in completions]


def main() -> None:
    """Fine-tune on sums, then learn a mask that makes the model prefer the digit 1."""
    model, rows = tiny.language_model(), tiny.sums(range(8), range(8))
    with tempfile.TemporaryDirectory() as folder:
        full = SFTConfig(f"{folder}/full", learning_rate=3e-3, max_steps=40, per_device_train_batch_size=32, **SETTINGS)
        SFTTrainer(model, full, train_dataset=rows, processing_class=tiny.tokenizer()).train()
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=share_of_ones,
            args=GRPOConfig(
                f"{folder}/mask",
                learning_rate=1e-2,
                max_steps=20,
                per_device_train_batch_size=128,
                num_generations=16,
                max_completion_length=4,
                lr_scheduler_type="constant",
                **SETTINGS,
            ),
            train_dataset=rows.rename_column("completion", "answer"),
            processing_class=tiny.tokenizer(),
            peft_config=maskft.MaskConfig(sparsity=0.1, init_scores="magnitude"),
        )
        trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    print(f"reward {rewards[0]:.4f} in the first steps, {rewards[-1]:.4f} in the last")


if __name__ == "__main__":
    main()
