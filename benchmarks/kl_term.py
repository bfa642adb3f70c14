"""A training step with a KL term to the base (``--kl_to_base``, ``--kl_budget``) beside the same step without one.

On the tokens with a label of the task's rows the term costs a forward pass of the base; on rows that the user names
(``--kl_dataset_name``), a forward pass of the base and a training pass of the model over them.
"""

from __future__ import annotations

import torch

from maskft.training.kl import Base, KLOnTask, KLOnText
from maskft.training.row_attention import attention_within_rows

from .common import SMOLLM2, TINY, alternate, build, prepare
from .padding import MESSAGES, RowsStep, WithinRowsStep

# As the default of kl_batch_size. The base's own text has all of its tokens labelled.
NUM_TEXTS = 4
TOKENS_OF_TEXT = 64
COEFFICIENT = 0.1


class KLStep(RowsStep):
    """A step on messages without padding, with a KL term.

    Args:
        model: The model, ready to train.
        vocab_size: Token ids are drawn below it.
        device: Where to compute.
        on_text: Whether the term is taken on other rows than the task's.
    """

    def __init__(
        self,
        model,
        vocab_size: int,
        device: torch.device,
        on_text: bool,
    ):
        super().__init__(model, vocab_size, MESSAGES, is_padded=False, device=device)
        base = Base(model)
        self.term: KLOnTask | KLOnText
        if on_text:
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(vocab_size, (NUM_TEXTS, TOKENS_OF_TEXT), generator=generator).tolist()
            rows = [{"input_ids": text, "labels": text} for text in ids]
            self.term = KLOnText(base, rows, NUM_TEXTS)
        else:
            self.term = KLOnTask(model, base)
        self.num_steps = 0

    def __call__(self) -> None:
        """Run the step."""
        with self.autocast, attention_within_rows(self.model):
            self.term.before_forward(self.model, self.inputs, self.num_steps)
            loss = self.model(**self.inputs, use_cache=False).loss
            kl = self.term.after_forward(self.model)
        loss = loss + COEFFICIENT * kl.total / kl.num_tokens
        loss.backward()
        self.update()
        self.num_steps += 1


def run(report) -> None:
    """Add the rows."""
    name, shape = ("tiny", TINY) if report.quick else ("SmolLM2-135M", SMOLLM2)
    layers = list(range(shape["num_hidden_layers"]))
    vocab_size = shape["vocab_size"]

    def prepared(side: str):
        model = build(shape, report.device)
        model.set_attn_implementation("eager")
        return prepare(side, model, layers)

    for side, label in (("gates", "deletion mask"), ("lora", "LoRA r=16"), ("full", "full fine-tuning")):
        steps = [
            WithinRowsStep(prepared(side), vocab_size, MESSAGES, is_padded=False, device=report.device),
            KLStep(prepared(side), vocab_size, report.device, on_text=False),
            KLStep(prepared(side), vocab_size, report.device, on_text=True),
        ]
        plain, on_task, on_text = alternate(steps, report.rounds, report.device)
        what = f"{name}, {label}, {len(MESSAGES)} messages"
        of_text = f"KL on {NUM_TEXTS} texts of {TOKENS_OF_TEXT} tokens"
        for term, times in (("KL on their answers", on_task), (of_text, on_text)):
            report.add_ratio("kl_term", f"{what}: {term} / no KL", times, plain, None, rounds=report.rounds)
