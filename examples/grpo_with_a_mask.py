"""Reinforcement learning of a mask over a fine-tuned model: TRL's GRPOTrainer, with a reward that can be checked.

python examples/grpo_with_a_mask.py
"""

from __future__ import annotations

import tempfile

from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import maskft
import tiny

# TRL's defaults are bfloat16 and gradient checkpointing, which a tiny model on a CPU does not need.
SETTINGS = {
    "logging_steps": 5,
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
}


def share_of_ones(completions: list[str], answer: list[str], **columns) -> list[float]:
    """The reward, a toy: answers with many ones. Yours compares each completion with its row's ``answer``."""
    return [text.count("1") / 4 for text in completions]  # a completion has at most four tokens


def main() -> None:
    """Fine-tune on sums, then learn a mask that makes the model prefer the digit 1."""
    model = tiny.language_model()
    rows = tiny.sums(range(8), range(8))

    with tempfile.TemporaryDirectory() as folder:
        # A mask selects among weights that are useful already, so the random model is fine-tuned first.
        fine_tuning = SFTTrainer(
            model,
            SFTConfig(
                f"{folder}/full",
                learning_rate=3e-3,
                max_steps=40,
                per_device_train_batch_size=32,
                **SETTINGS,
            ),
            train_dataset=rows,
            processing_class=tiny.tokenizer(),
        )
        fine_tuning.train()

        # SFTTrainer has trained `model` in place. Now its weights are frozen, and the mask's scores are trained.
        # `magnitude` orders the first scores by the size of the weights: the mask begins by removing the smallest
        # 10 %, where the default order, a random one, would damage the fine-tuned model.
        mask_config = maskft.MaskConfig(sparsity=0.1, init_scores="magnitude")
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=share_of_ones,
            args=GRPOConfig(
                f"{folder}/mask",
                # Far above the usual rate of GRPO: scores are trained, not weights, and a step changes the model only
                # where it moves a score across the cut between kept and removed.
                learning_rate=1e-2,
                max_steps=20,
                per_device_train_batch_size=128,
                num_generations=16,
                max_completion_length=4,
                lr_scheduler_type="constant",
                **SETTINGS,
            ),
            # GRPOTrainer passes every column but `prompt` to the reward function by its name.
            train_dataset=rows.rename_column("completion", "answer"),
            processing_class=tiny.tokenizer(),
            peft_config=mask_config,
        )
        trainer.train()

    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    print(f"reward {rewards[0]:.4f} in the first steps, {rewards[-1]:.4f} in the last")


if __name__ == "__main__":
    main()
