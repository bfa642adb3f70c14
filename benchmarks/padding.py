"""A training step on rows of different lengths, padded and without padding (``--padding_free true``).

The lengths are those of the messages of a bank's customers (Banking77) in tokens: the sixteenths of their distribution.
"""

from __future__ import annotations

import torch

from .common import SMOLLM2, TINY, Step, alternate, build, prepare

# Mean 22, so that 53 % is padding; of batches drawn at random it is half.
LENGTHS = (14, 15, 16, 16, 17, 18, 19, 19, 20, 21, 22, 23, 25, 28, 34, 47)
# Tokens of a row that have a label: its intent.
SUPERVISED = 3


class RowsStep(Step):
    """One optimizer step on rows of different lengths, in the form that TRL gives them to the model.

    Args:
        model: The model, ready to train.
        vocab_size: Token ids are drawn below it.
        is_padded: One row of the batch per row; otherwise one sequence of all of them.
        device: Where to compute.
    """

    def __init__(self, model, vocab_size: int, is_padded: bool, device: torch.device):
        longest = max(LENGTHS)
        super().__init__(model, vocab_size, longest, len(LENGTHS), device)
        ids_BT = self.batches[:, 0]
        lengths_B1 = torch.tensor(LENGTHS, device=device)[:, None]
        positions_BT = torch.arange(longest, device=device).expand(len(LENGTHS), -1)
        is_token_BT = positions_BT < lengths_B1
        is_supervised_BT = is_token_BT & (positions_BT >= lengths_B1 - SUPERVISED)
        labels_BT = ids_BT.masked_fill(~is_supervised_BT, -100)
        if is_padded:
            self.inputs = {"input_ids": ids_BT, "attention_mask": is_token_BT.long(), "labels": labels_BT}
            return
        # Row after row; their positions start again at 0, which separates them in attention.
        self.inputs = {
            "input_ids": ids_BT[is_token_BT][None],
            "position_ids": positions_BT[is_token_BT][None],
            "labels": labels_BT[is_token_BT][None],
        }

    def __call__(self) -> None:
        """Run the step."""
        with self.autocast:
            loss = self.model(**self.inputs, use_cache=False).loss
        loss.backward()
        self.update()


def run(report) -> None:
    """Add the rows."""
    name, shape = ("tiny", TINY) if report.quick else ("SmolLM2-135M", SMOLLM2)
    layers = list(range(shape["num_hidden_layers"]))
    for side, label in (("gates", "deletion mask"), ("full", "full fine-tuning"), ("lora", "LoRA r=16")):
        for implementation in ("eager", "sdpa"):
            steps = []
            for is_padded in (False, True):
                model = build(shape, report.device)
                model.set_attn_implementation(implementation)
                step = RowsStep(prepare(side, model, layers), shape["vocab_size"], is_padded, report.device)
                steps.append(step)
            free, padded = alternate(steps, report.rounds, report.device)
            what = f"{name}, {label}, {len(LENGTHS)} rows of {min(LENGTHS)} to {max(LENGTHS)} tokens, {implementation}"
            report.add_ratio("padding", f"{what}: without padding / padded", free, padded, None, rounds=report.rounds)
