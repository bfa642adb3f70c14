"""A training step on rows of different lengths, padded and without padding (``--padding_free true``).

The lengths are those of the messages of a bank's customers (Banking77) and of exercises with their answers (GSM8K) in
tokens: the parts of a batch's size of their distributions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from maskft.training.row_attention import attention_within_rows

from .common import SMOLLM2, TINY, Step, alternate, build, prepare

# Mean 22, so that 53 % is padding; of batches drawn at random it is half.
MESSAGES = (14, 15, 16, 16, 17, 18, 19, 19, 20, 21, 22, 23, 25, 28, 34, 47)
# Mean 214, so that 36 % is padding.
EXERCISES = (131, 155, 172, 191, 213, 241, 272, 334)
# Share of a row's tokens that have a label: of a message its intent.
SUPERVISED = 1 / 7


class RowsStep(Step):
    """One optimizer step on rows of different lengths, in the form that TRL gives them to the model.

    Args:
        model: The model, ready to train.
        vocab_size: Token ids are drawn below it.
        lengths: Tokens of each row.
        is_padded: One row of the batch per row; otherwise one sequence of all of them.
        device: Where to compute.
    """

    def __init__(
        self,
        model,
        vocab_size: int,
        lengths: Sequence[int],
        is_padded: bool,
        device: torch.device,
    ):
        longest = max(lengths)
        super().__init__(model, vocab_size, longest, len(lengths), device)
        ids_BT = self.batches[:, 0]
        lengths_B1 = torch.tensor(lengths, device=device)[:, None]
        positions_BT = torch.arange(longest, device=device).expand(len(lengths), -1)
        is_token_BT = positions_BT < lengths_B1
        is_supervised_BT = is_token_BT & (positions_BT >= lengths_B1 * (1 - SUPERVISED))
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


class WithinRowsStep(RowsStep):
    """The same with attention within rows, as ``maskft train`` computes it."""

    def __call__(self) -> None:
        """Run the step."""
        with attention_within_rows(self.model):
            super().__call__()


def run(report) -> None:
    """Add the rows."""
    name, shape = ("tiny", TINY) if report.quick else ("SmolLM2-135M", SMOLLM2)
    layers = list(range(shape["num_hidden_layers"]))

    def step_of(
        side: str, implementation: str, lengths: Sequence[int], kind: type[RowsStep], is_padded: bool
    ) -> RowsStep:
        model = build(shape, report.device)
        model.set_attn_implementation(implementation)
        prepared = prepare(side, model, layers)
        return kind(prepared, shape["vocab_size"], lengths, is_padded, report.device)

    def add(what: str, sides: str, steps: list[RowsStep]) -> None:
        first, second = alternate(steps, report.rounds, report.device)
        report.add_ratio("padding", f"{name}, {what}: {sides}", first, second, None, rounds=report.rounds)

    cases = [
        ("gates", "deletion mask", "eager", MESSAGES),
        ("gates", "deletion mask", "sdpa", MESSAGES),
        ("full", "full fine-tuning", "eager", MESSAGES),
        ("full", "full fine-tuning", "sdpa", MESSAGES),
        ("lora", "LoRA r=16", "eager", MESSAGES),
        ("lora", "LoRA r=16", "sdpa", MESSAGES),
        ("gates", "deletion mask", "eager", EXERCISES),
    ]
    for side, label, implementation, lengths in cases:
        free = step_of(side, implementation, lengths, WithinRowsStep, is_padded=False)
        padded = step_of(side, implementation, lengths, RowsStep, is_padded=True)
        what = f"{label}, {len(lengths)} rows of {min(lengths)} to {max(lengths)} tokens, {implementation}"
        add(what, "without padding / padded", [free, padded])

    # Attention alone. Of rows as long as exercises the scores of all pairs do not fit into the memory of many machines.
    for implementation in ("eager", "sdpa"):
        within_rows = step_of("gates", implementation, MESSAGES, WithinRowsStep, is_padded=False)
        all_pairs = step_of("gates", implementation, MESSAGES, RowsStep, is_padded=False)
        what = f"deletion mask, {len(MESSAGES)} rows of {min(MESSAGES)} to {max(MESSAGES)} tokens, {implementation}"
        add(what, "attention within rows / among all tokens, masked", [within_rows, all_pairs])
