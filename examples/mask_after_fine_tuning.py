"""Fine-tune a model, learn a mask on top of its best checkpoint, and write an ordinary checkpoint.

python examples/mask_after_fine_tuning.py [MODEL_FOLDER]
"""

from __future__ import annotations

import sys
import tempfile

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import maskft
import tiny


def settings(folder: str, **options) -> SFTConfig:
    """The same checkpoints, chosen by held-out loss, for fine-tuning and for the mask."""
    return SFTConfig(
        folder,
        per_device_train_batch_size=16,
        eval_strategy="steps",
        eval_steps=10,
        save_steps=10,
        load_best_model_at_end=True,
        logging_steps=10,
        report_to="none",
        bf16=False,
        use_cpu=True,
        **options,
    )


def main(model_folder: str | None = None) -> None:
    """Run the chain in a temporary folder."""
    model = AutoModelForCausalLM.from_pretrained(model_folder) if model_folder else tiny.language_model()
    tokenizer = AutoTokenizer.from_pretrained(model_folder) if model_folder else tiny.tokenizer()
    data = tiny.sums(range(12), range(12)).train_test_split(0.2, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        full = SFTTrainer(
            model,
            settings(f"{folder}/full", learning_rate=3e-3, max_steps=40),
            train_dataset=data["train"],
            eval_dataset=data["test"],
            processing_class=tokenizer,
        )
        full.train()
        before = full.evaluate()["eval_loss"]
        full.save_model(f"{folder}/best")

        masked = SFTTrainer(
            f"{folder}/best",
            settings(f"{folder}/mask", learning_rate=1e-3, max_steps=20),
            train_dataset=data["train"],
            eval_dataset=data["test"],
            # The smallest 10 % of the weights are removed first; training then exchanges some of them.
            peft_config=maskft.MaskConfig(sparsity=0.1, init_scores="magnitude", rank_by="signed"),
        )
        masked.train()
        masked.save_model(f"{folder}/adapter")

        base = AutoModelForCausalLM.from_pretrained(f"{folder}/best")
        PeftModel.from_pretrained(base, f"{folder}/adapter").merge_and_unload().save_pretrained(f"{folder}/merged")
        print(f"held-out loss {before:.4f} fine-tuned, {masked.evaluate()['eval_loss']:.4f} with the mask")


if __name__ == "__main__":
    main(*sys.argv[1:2])
