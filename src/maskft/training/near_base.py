"""The KL term of a run: its rows, its coefficient, and which checkpoints are within the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from pydantic import ConfigDict
from torch import Tensor, nn
from transformers import TrainerCallback

from maskft_common import files, processes
from maskft_common.errors import UserError
from maskft_common.schema import FileModel

from ..data.mixtures import load_examples, rename_sets
from ..data.prepared import Prepared
from ..data.tokenizing import supervised_token_count, tokenize_dataset
from ..loss import mean_nll, shared_rows, widest_float
from .arguments import TrainConfig
from .change import Change, largest_part
from .kl import Base, KLOnTask, KLOnText, kl_per_row
from .kl_budget import KLBudget, MeasuredKL, excess
from .verdict import decimals

# Share of the rows that the user names on which KL is measured; no batch contains them.
_HELDOUT_SHARE = 0.25
# Their largest number: a measurement takes two forward passes over them.
_MAX_HELDOUT = 100


class KLRows(NamedTuple):
    """Rows that the user names for KL.

    Attributes:
        train: Tokenised rows of the loss term.
        heldout: Tokenised rows of the measurement.
    """

    train: Dataset
    heldout: Dataset


class KLReport(FileModel):
    """KL(base || model) of a run in ``training.json``, in nats per token.

    Attributes:
        budget: ``kl_budget``; None with ``kl_to_base``.
        reached: KL of the kept checkpoint on held-out rows; of a mask even if it was not saved.
        part: Part of the training's change that was kept, in (0, 1].
        at_end: KL of the whole change at the last measurement.
        multiplier: Coefficient of KL in the loss after the last step.
        rows: ``task``, or the name of the rows; of a file without its folder.
        num_tokens: Number of tokens in the mean ``reached``.
        step: Step of the kept checkpoint; None if no checkpoint was chosen, and the model of the last step is kept.
    """

    model_config = ConfigDict(allow_inf_nan=True)

    budget: float | None
    reached: float
    part: float = 1.0
    at_end: float
    multiplier: float
    rows: str
    num_tokens: int
    step: int | None = None

    @property
    def is_met(self) -> bool:
        """Whether the kept checkpoint is within the budget."""
        return excess(self.reached, self.budget) == 0

    def __str__(self) -> str:
        # Enough decimals to see on which side of the budget a KL is.
        limit = self.budget or 0.0
        digits = decimals(self.reached, self.reached - limit, self.at_end - limit)
        text = f"KL(base || model) {self.reached:.{digits}f} nats per token on {self.num_tokens:,} held-out tokens"
        if self.rows != "task":
            text += f" of {self.rows}"
        if self.budget is None:
            return text

        text += f", budget {self.budget:g}, multiplier at the end {self.multiplier:.3g}"
        if self.part < 1:
            text += f"; {self.part:.2f} of the change is kept"
        at_end = f"{self.at_end:.{digits}f}"
        remedy = "raise kl_budget, lower learning_rate, or evaluate more often (eval_steps)"
        if not self.is_met:
            kept = "the nearest checkpoint is kept"
            if self.step is None:
                kept = "the model of the last step is kept"
                remedy = "raise kl_budget, lower learning_rate, or let evaluations choose a checkpoint (eval_strategy)"
            return f"{text}; the budget is not met: {kept}; {remedy}"
        # The model before its first step, whose KL is 0 or that of the starting mask.
        if self.step == 0:
            if excess(self.at_end, self.budget) == 0:
                # The budget was no obstacle, at least at the end.
                remedy = "the end is within it, so the loss did not fall: take more steps, or another learning_rate"
            return f"{text}; no later checkpoint is better and within the budget (at the end {at_end}); {remedy}"
        if self.at_end > self.budget and self.part == 1:
            return f"{text}; it is of step {self.step}: at the end KL is {at_end}, above the budget; {remedy}"
        return text


def load_kl_rows(config: TrainConfig, tokenizer) -> KLRows | None:
    """Read and tokenise the rows of ``kl_dataset_name``; None if it is not given.

    Raises:
        UserError: If there are fewer than two different rows, or a row without a supervised token.
    """
    training = config.training
    name = training.kl_dataset_name
    if name is None:
        return None
    examples = load_examples(
        name,
        as_chat=config.data.as_chat,
        tokenizer=tokenizer,
        text_field=training.dataset_text_field,
        data_dir=config.data.data_dir,
        seed=config.data.split_seed,
    )
    try:
        rows = tokenize_dataset(
            examples,
            tokenizer,
            max_length=training.max_length,
            # TRL's default None means true for rows with a completion.
            completion_only_loss=training.completion_only_loss is not False,
        )
    except UserError as error:
        raise UserError(f"kl_dataset_name {name!r}: {error}") from None

    # The first of equal rows; copies could be in both parts.
    first_positions: dict[tuple[int, ...], int] = {}
    for position, ids in enumerate(rows["input_ids"]):
        first_positions.setdefault(tuple(ids), position)
    rows = rows.select(sorted(first_positions.values()))
    if len(rows) < 2:
        raise UserError(
            f"kl_dataset_name {name!r} has {len(rows)} different row; at least 2 are needed, for the KL term and for "
            "its measurement"
        )

    num_heldout = round(_HELDOUT_SHARE * len(rows))
    num_heldout = min(max(1, num_heldout), _MAX_HELDOUT)
    generator = torch.Generator().manual_seed(config.data.split_seed)
    order = torch.randperm(len(rows), generator=generator).tolist()

    # Both in the order of the file. The loss term shuffles its rows itself.
    rows = rows.select_columns(["input_ids", "labels"])
    return KLRows(
        train=rows.select(sorted(order[num_heldout:])),
        heldout=rows.select(sorted(order[:num_heldout])),
    )


class NearBase(TrainerCallback):
    """Keeps a model near its base by a KL term in its loss, with a fixed coefficient or a budget.

    Args:
        model: The model to train, before its first step.
        data: Rows of the task.
        kl_rows: Rows that the user names; None for those of the task.
        config: The run.
        pad_token_id: Token for padding.

    Attributes:
        budget: Adapts the coefficient; None if it is ``kl_to_base``.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Prepared,
        kl_rows: KLRows | None,
        config: TrainConfig,
        pad_token_id: int,
    ):
        training = config.training
        # Now, before the Trainer loads the weights of a checkpoint into the model: the base is the model without them.
        self._base = Base(model)
        self._pad_token_id = pad_token_id
        self._eval_batch_size = training.per_device_eval_batch_size
        self._weight = training.kl_to_base
        self.budget = None
        self._change: Change | None = None
        # Nats per token by which the model before the first step exceeds the budget; None: not measured yet.
        self._start_excess: float | None = None
        if training.kl_budget is not None:
            self.budget = KLBudget(training.kl_budget)
            self._change = Change(model, self._base.frozen)

        self._is_on_task = kl_rows is None
        self._term: KLOnTask | KLOnText
        if kl_rows is None:
            self._name = "task"
            self._heldout = data.heldout.select_columns(["input_ids", "labels"])
            self._term = KLOnTask(model, self._base)
        else:
            self._name = rename_sets(str(training.kl_dataset_name), files.without_folder)
            self._heldout = kl_rows.heldout
            self._term = KLOnText(
                self._base,
                # Rows in memory: a Dataset decodes one at every access.
                kl_rows.train.to_list(),
                training.kl_batch_size,
                pad_token_id,
                seed=training.seed,
                rank=processes.rank(),
                num_processes=processes.num_processes(),
            )
        self._batches_per_step = training.gradient_accumulation_steps
        self._batch_in_step = 0
        self._step = 0
        # KL and number of tokens, summed over the micro-batches of a step; on the device, which is not waited for.
        self._sums: Tensor | None = None

    @property
    def multiplier(self) -> float:
        """Coefficient of KL in the loss."""
        if self.budget is None:
            return self._weight
        return self.budget.multiplier

    def before_forward(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Run the base on a micro-batch; call it before the forward pass of ``model``."""
        # Counted from the step, so that a resumed run has the same number. The last step of an epoch may have fewer
        # batches: it leaves out numbers, and none is used twice.
        batch_number = self._step * self._batches_per_step + self._batch_in_step
        self._term.before_forward(model, inputs, batch_number)
        self._batch_in_step += 1

    def after_forward(
        self,
        model: nn.Module,
        num_items: Tensor | int | None,
        num_micro_batches: int,
    ) -> Tensor:
        """The term of the loss for that micro-batch.

        Args:
            model: The model to train, not wrapped by accelerate.
            num_items: Number of tokens with a label in the step's batches, which divides the task's loss. None: the
                loss is a mean over this micro-batch, and the Trainer divides by the number of micro-batches.
            num_micro_batches: Micro-batches of the step.
        """
        kl = self._term.after_forward(model)
        # In float64 where there is one, because a step may have many thousands of tokens.
        total = kl.total.detach().to(widest_float(kl.total.device))
        # Filled on the device: torch.tensor(..., device) would copy the number there, and wait for it.
        num_tokens = torch.full_like(total, kl.num_tokens)
        sums = torch.stack([total, num_tokens])
        if self._sums is not None:
            sums = self._sums + sums
        self._sums = sums

        # Scaled like the task's loss. Without a count, that loss is a mean over the micro-batch. The Trainer divides it
        # by the number of micro-batches (training_step), and the term with it.
        if num_items is None:
            return self.multiplier * kl.total / max(kl.num_tokens, 1)
        # With a count, training_step divides nothing. The term is summed over the same tokens as the task's loss, so it
        # has the same divisor.
        if self._is_on_task:
            divisor = torch.as_tensor(num_items).clamp(min=1)
            return self.multiplier * kl.total / divisor
        # The mean over named rows, of which every micro-batch has the same number.
        mean = kl.total / max(kl.num_tokens, 1)
        return self.multiplier * mean / num_micro_batches

    @property
    def is_divided_by_all_tokens(self) -> bool:
        """Whether the term is divided by the tokens of all processes, as TRL's loss is; DDP averages its gradients."""
        return self._is_on_task

    def on_train_begin(self, args, state, control, **kwargs):
        """Count batches from the first step of the run, or the step that it resumes at."""
        self._step = state.global_step
        self._batch_in_step = 0

    def on_step_end(self, args, state, control, **kwargs):
        """Adapt the multiplier to the KL of the step, the same in every process."""
        self._step = state.global_step
        self._batch_in_step = 0
        # No micro-batch went through the term. That is so in all processes or in none, as reduce_ needs it.
        if self._sums is None:
            return
        # Summed over the processes, because all of them must have the same multiplier. tolist() waits for the device,
        # once per step.
        total, count = processes.reduce_(self._sums).tolist()
        self._sums = None
        # float16 may overflow in a step that the scaler skips; infinity would spoil the running mean for good.
        if self.budget is not None and math.isfinite(total):
            mean = total / max(count, 1)
            self.budget.update(mean)

    def metrics(self) -> dict[str, float]:
        """For the log: the running mean of KL in training, and the coefficient of the next step."""
        if self.budget is None:
            return {}
        return {
            "kl": self.budget.kl,
            "kl_multiplier": self.budget.multiplier,
        }

    def measure(self, model: nn.Module) -> float:
        """Mean KL on held-out rows, nats per token; every process must call it."""

        def kl_of(rows) -> list:
            return kl_per_row(
                model,
                self._base,
                rows,
                self._eval_batch_size,
                self._pad_token_id,
            )

        losses = shared_rows(self._heldout, kl_of)
        return mean_nll(losses)

    @contextmanager
    def within_budget(self, measure: Callable[[], float]) -> Iterator[MeasuredKL]:
        """Measures KL, of a model beyond the budget at the largest part of its change that is within it.

        Within the context the model is at that part; afterwards it is as trained. Every process must enter it.

        Args:
            measure: Measures KL of the model as it is. It must enter autocast itself: autocast keeps rounded weights
                until it is left, also of weights that have changed meanwhile.
        """
        whole = measure()
        # Without a budget both are None, else neither is; mypy needs both checks.
        if self._change is None or self.budget is None or self.excess(whole) == 0:
            yield MeasuredKL(whole, 1.0, whole)
            return

        with self._change.taken_back() as set_part:

            def kl_of(part: float) -> float:
                set_part(part)
                return measure()

            # A mask may begin with removed weights, far from the base. Then there is no part to look for.
            if self._start_excess is None:
                self._start_excess = self.excess(kl_of(0.0))
            found = None
            if self._start_excess == 0:
                found = largest_part(kl_of, whole, self.budget.budget)
            part, kl = found or (1.0, whole)
            set_part(part)
            yield MeasuredKL(kl, part, whole)

    def keep_part(self, part: float) -> None:
        """Take back all but this part, in (0, 1], of what training has changed."""
        if self._change is not None and part < 1:
            self._change.keep(part)

    def excess(self, kl: float) -> float:
        """Nats per token by which a measured KL exceeds the budget; see :func:`kl_budget.excess`."""
        limit = None if self.budget is None else self.budget.budget
        return excess(kl, limit)

    def report(
        self,
        kept: MeasuredKL,
        at_end: float,
        best_step: int | None,
    ) -> KLReport:
        """The entry of the record.

        Args:
            kept: KL of the kept checkpoint.
            at_end: KL of the whole change at the last measurement.
            best_step: Step of the kept checkpoint; None if none was chosen.
        """
        budget = None
        if self.budget is not None:
            budget = self.budget.budget
        return KLReport(
            budget=budget,
            reached=kept.kl,
            part=kept.part,
            at_end=at_end,
            multiplier=self.multiplier,
            rows=self._name,
            num_tokens=supervised_token_count(self._heldout),
            step=best_step,
        )
