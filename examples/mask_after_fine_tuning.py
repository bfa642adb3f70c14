"""Fine-tune a model, learn a mask on top of its best checkpoint, and write an ordinary checkpoint.

python examples/mask_after_fine_tuning.py [MODEL_FOLDER]
"""

from __future__ import annotations

import argparse
import tempfile

from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

import maskft
import tiny
from maskft.models import load_model, load_tokenizer
from maskft_common.command_line import run_script


def settings(folder: str, **options) -> SFTConfig:
    """The same checkpoints, chosen by held-out loss, for fine-tuning and for the mask."""
    return SFTConfig(
        folder,
        per_device_train_batch_size=16,
        # A mask often gets worse again after its best step, so the checkpoint with the lowest loss is kept.
        eval_strategy="steps",
        eval_steps=10,
        save_steps=10,
        load_best_model_at_end=True,
        logging_steps=10,
        report_to="none",
        bf16=False,  # TRL's default is bfloat16
        use_cpu=True,
        **options,
    )


def main() -> None:
    """Run the chain in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_folder", nargs="?", help="model to fine-tune (default: a tiny random one)")
    args = parser.parse_args()
    if args.model_folder:
        # In float32, whatever its files have: full fine-tuning in bfloat16 rounds small steps away.
        model = load_model(args.model_folder)
        tokenizer = load_tokenizer(args.model_folder)
    else:
        model = tiny.language_model()
        tokenizer = tiny.tokenizer()
    data = tiny.sums(range(12), range(12)).train_test_split(0.2, seed=0)

    with tempfile.TemporaryDirectory() as folder:
        # 1. Fine-tune all weights.
        full = SFTTrainer(
            model,
            settings(f"{folder}/full", learning_rate=3e-3, max_steps=40),
            train_dataset=data["train"],
            eval_dataset=data["test"],
            processing_class=tokenizer,
        )
        full.train()
        before = full.evaluate()["eval_loss"]
        full.save_model(f"{folder}/best")  # with the tokenizer, which the next trainer reads from here

        # 2. Freeze the fine-tuned weights and learn which of them to remove.
        mask_config = maskft.MaskConfig(
            sparsity=0.1,  # the fraction of weights to remove, not the fraction to keep
            # Remove the smallest 10 % of the weights first; training then exchanges some of them. The default, a
            # random 10 %, would first damage the model.
            init_scores="magnitude",
            # Rank scores by value. By their magnitude (the default, as published) a score that training pushes far
            # below 0 would be kept again.
            rank_by="signed",
        )
        masked = SFTTrainer(
            f"{folder}/best",
            settings(f"{folder}/mask", learning_rate=1e-3, max_steps=20),
            train_dataset=data["train"],
            eval_dataset=data["test"],
            peft_config=mask_config,
        )
        masked.train()
        masked.save_model(f"{folder}/adapter")  # the mask alone, less than one bit per weight

        # 3. Write zeros into a copy of the fine-tuned weights. The result needs neither maskft nor PEFT.
        base = AutoModelForCausalLM.from_pretrained(f"{folder}/best")
        with_mask = PeftModel.from_pretrained(base, f"{folder}/adapter")
        merged = with_mask.merge_and_unload()
        merged.save_pretrained(f"{folder}/merged")

        after = masked.evaluate()["eval_loss"]
        print(f"held-out loss {before:.4f} fine-tuned, {after:.4f} with the mask")


if __name__ == "__main__":
    run_script(main)
