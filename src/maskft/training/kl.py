"""KL(base || model): a term of the loss that keeps a model near its base, and its measurement on held-out rows.

KL(base || model) in nats per token is how much better the base predicts its own continuations than the model does: on
text that the base writes, it measures forgetting. It is computed on the tokens with a label, either of the task's rows
(:class:`KLOnTask`) or of rows that the user names (:class:`KLOnText`).

Shapes: B rows, T tokens, N tokens with a label, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskft_common.errors import UserError

from ..data.tokenizing import IGNORED
from ..loss import RowLoss, length_sorted_batches, pad
from ..models import attention_by
from .peft_config import keeps_base
from .row_attention import OF_ALL_PAIRS, PREFIX

# Tokens on which the head is compared with the model's own logits.
_CHECKED_TOKENS = 4


class KLSum(NamedTuple):
    """KL(base || model) summed over tokens.

    Attributes:
        total: Nats, 0-dimensional, float32, with a gradient to the model.
        num_tokens: Number of tokens in the sum.
    """

    total: Tensor
    num_tokens: int


class Base:
    """The model before training: the model without its adapter, or a frozen copy where training changes the base.

    Args:
        model: The model to train, before its first step.

    Attributes:
        frozen: The copy; None if there is none.
    """

    def __init__(self, model: nn.Module):
        self.frozen: nn.Module | None = None
        if not keeps_base(model):
            frozen = copy.deepcopy(model)
            frozen.requires_grad_(False)
            self.frozen = frozen.eval()

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[nn.Module]:
        """The base, in evaluation mode; ``model`` is the model to train, not wrapped by accelerate."""
        if self.frozen is not None:
            # It was copied before the Trainer moved the model to its device. Once moved, it stays there.
            device = next(model.parameters()).device
            yield self.frozen.to(device)
            return

        # In evaluation mode, because dropout would change the base from batch to batch.
        was_training = model.training
        model.eval()
        with model.disable_adapter():
            yield model
        model.train(was_training)


class KLOnTask:
    """KL on the tokens with a label of each training batch.

    The forward pass that computes the task's loss returns no logits (TRL's fused head), and a second forward pass would
    double the cost. So a hook on the decoder computes the logits of the labelled tokens within that forward pass, where
    FSDP has gathered the head's weight and autocast is on.

    Args:
        model: The model to train, before its first step.
        base: The model before training.

    Raises:
        UserError: If the logits of this architecture are not the head's output, scaled and capped.
    """

    def __init__(self, model: nn.Module, base: Base):
        self._base = base
        # The transformers model, whose decoder and head are used. A mask is inside its layers.
        self._model = model
        if hasattr(model, "peft_config"):
            self._model = model.get_base_model()
        # Set for one forward pass, in which the hook takes it.
        self._is_supervised_BT: Tensor | None = None
        # Of the current batch; freed as soon as its KL is computed.
        self._base_log_probs_NV: Tensor | None = None
        self._logits_NV: Tensor | None = None

        # TRL's fused head calls the decoder and keeps no logits, so the decoder's output is where hidden states can be
        # read.
        decoder = self._model.get_decoder()
        decoder.register_forward_hook(self._compute_logits)
        # With the base: a resumed run loads its scores later.
        with base.of(model):
            self._check_logits()

    def before_forward(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        batch_number: int,
    ) -> None:
        """Compute the base's log-probabilities of a batch.

        Call it before the forward pass of ``model``. Under FSDP2, the base's forward pass unmasks weights that the
        backward pass gathers again.

        Args:
            model: The model to train, not wrapped by accelerate.
            inputs: The batch, with ``labels``.
            batch_number: Number of the batch since the start of training; not used here.
        """
        is_supervised_BT = is_before_label(inputs["labels"])
        # The head runs only in columns with a label: with a large vocabulary it is a good part of a forward pass.
        columns = is_supervised_BT.any(0).nonzero().flatten()
        # Without the labels: the base's loss is not needed.
        given = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad(), self._base.of(model) as base:
            # A tensor of positions in the row; as a number, logits_to_keep would count from the end.
            outputs = base(**given, logits_to_keep=columns, use_cache=False)
            logits_NV = outputs.logits[is_supervised_BT[:, columns]]
        # The logits of other rows in these columns would stay in memory through the softmax.
        del outputs
        self._base_log_probs_NV = logits_NV.float().log_softmax(-1)
        # Set after the base's forward pass, which runs the hook as well.
        self._is_supervised_BT = is_supervised_BT

    def after_forward(self, model: nn.Module) -> KLSum:
        """KL of the batch that ``model`` has just computed."""
        assert self._logits_NV is not None and self._base_log_probs_NV is not None
        total = kl_sum(self._base_log_probs_NV, self._logits_NV)
        num_tokens = len(self._logits_NV)
        self._logits_NV = None
        self._base_log_probs_NV = None
        return KLSum(total, num_tokens)

    def _compute_logits(self, module, args, output) -> None:
        if self._is_supervised_BT is None:
            return
        is_supervised_BT = self._is_supervised_BT
        # Once per batch: gradient checkpointing repeats layers of the decoder, not the decoder and its hook.
        self._is_supervised_BT = None
        # What transformers calls the decoder of ModernBERT is its head. _check_logits then finds no logits.
        if not hasattr(output, "last_hidden_state"):
            return
        hidden_ND = output.last_hidden_state[is_supervised_BT]
        self._logits_NV = head_logits(self._model, hidden_ND)

    @torch.no_grad()
    def _check_logits(self) -> None:
        """Compare :func:`head_logits` with the model's own logits of some tokens."""
        device = next(self._model.parameters()).device
        # Several, because the embedding of one may be all zeros, as that of padding is: its logits can be zero too.
        ids_BT = torch.arange(_CHECKED_TOKENS, device=device)[None]
        self._is_supervised_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        with _attention_on(device, self._model):
            expected_BTV = self._model(input_ids=ids_BT, use_cache=False).logits
        is_equal = False
        if self._logits_NV is not None:
            # Tolerances for bfloat16; a missing scale or cap is an error of another order.
            is_equal = torch.allclose(
                self._logits_NV.float(),
                expected_BTV[0].float(),
                rtol=1e-2,
                atol=1e-2,
            )
        if not is_equal:
            kind = self._model.config.model_type
            raise UserError(
                f"kl_to_base and kl_budget on the task's rows: the logits of a {kind} model are not its head's output, "
                "scaled and capped; name rows with kl_dataset_name"
            )
        self._logits_NV = None


class KLOnText:
    """KL on the tokens with a label of rows that the user names; every training batch gets a batch of them.

    The cost is a forward pass of the base, and a forward and backward pass of the model, over these rows.

    Args:
        base: The model before training.
        rows: Rows with ``input_ids`` and ``labels``.
        batch_size: Rows of one batch on one process.
        pad_token_id: Token for padding on the right, which does not change results.
        seed: Seed of the order of the rows.
        rank: Rank of this process.
        num_processes: Number of processes.
    """

    def __init__(
        self,
        base: Base,
        rows: Sequence[Mapping[str, Any]],
        batch_size: int,
        pad_token_id: int = 0,
        seed: int = 0,
        rank: int = 0,
        num_processes: int = 1,
    ):
        self._base = base
        self._rows = rows
        self._batch_size = batch_size
        self._pad_token_id = pad_token_id
        self._seed = seed
        self._rank = rank
        self._num_processes = num_processes
        self._batch: Mapping[str, Tensor] = {}
        self._base_log_probs_NV: Tensor | None = None
        # Epoch -> order of the rows; of the current epoch alone.
        self._orders: dict[int, list[int]] = {}

    def before_forward(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        batch_number: int,
    ) -> None:
        """Compute the base's log-probabilities of a batch; see :meth:`KLOnTask.before_forward`.

        Args:
            model: The model to train, not wrapped by accelerate.
            inputs: The training batch; only its device is used.
            batch_number: Number of the batch since the start of training.
        """
        device = inputs["input_ids"].device
        # Made here and not by a data loader, so that a resumed run has no position in it to restore.
        self._batch = _batch(self.rows_of(batch_number), self._pad_token_id, device)
        with torch.no_grad(), self._base.of(model) as base:
            logits_NV = _supervised_logits(base, self._batch)
        self._base_log_probs_NV = logits_NV.float().log_softmax(-1)

    def after_forward(self, model: nn.Module) -> KLSum:
        """KL of that batch.

        ``model`` is called without DDP's wrapper, whose reducer expects one forward pass per backward pass. The
        gradients are still reduced, because they accumulate in the same parameters.
        """
        assert self._base_log_probs_NV is not None
        logits_NV = _supervised_logits(model, self._batch)
        total = kl_sum(self._base_log_probs_NV, logits_NV)
        self._base_log_probs_NV = None
        return KLSum(total, len(logits_NV))

    def rows_of(self, batch_number: int) -> list[Mapping[str, Any]]:
        """Rows of a batch. They depend on its number alone, so that a resumed run sees the same rows."""
        # Batches of all processes in turn, over an endless row of shuffled epochs.
        first = (batch_number * self._num_processes + self._rank) * self._batch_size
        chosen = []
        for position in range(first, first + self._batch_size):
            epoch, place = divmod(position, len(self._rows))
            index = self._order(epoch)[place]
            chosen.append(self._rows[index])
        return chosen

    def _order(self, epoch: int) -> list[int]:
        # Kept, because a large set takes milliseconds to shuffle, and every row of every batch asks for it.
        if epoch not in self._orders:
            # Another order in every epoch; the prime keeps the epochs of neighbouring seeds apart.
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            order = torch.randperm(len(self._rows), generator=generator)
            self._orders = {epoch: order.tolist()}
        return self._orders[epoch]


@torch.no_grad()
def kl_per_row(
    model: nn.Module,
    base: Base,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int,
    pad_token_id: int = 0,
) -> list[RowLoss]:
    """Mean KL(base || model) over the tokens with a label of each row.

    Args:
        model: The model to train, not wrapped by accelerate; it is left in evaluation mode.
        base: The model before training.
        rows: Rows with ``input_ids`` and ``labels``.
        batch_size: Rows of a forward pass.
        pad_token_id: Token for padding on the right, which does not change results.

    Returns:
        Per row: nats per token, and the number of tokens.
    """
    model.eval()
    device = next(model.parameters()).device
    # Filled in the order of the batches, returned in the order of the rows.
    found: list[RowLoss] = [(0.0, 0)] * len(rows)
    lengths = [len(row["input_ids"]) for row in rows]
    for indices in length_sorted_batches(lengths, batch_size):
        chosen = [rows[index] for index in indices]
        batch = _batch(chosen, pad_token_id, device)
        with base.of(model) as unchanged:
            base_logits_NV = _supervised_logits(unchanged, batch)
        logits_NV = _supervised_logits(model, batch)

        # Row by row, to save memory: log-probabilities are float32 copies of logits that may be bfloat16. The N tokens
        # are in the order of the rows, so their counts are where to split.
        counts = is_before_label(batch["labels"]).sum(1).tolist()
        parts = zip(
            indices,
            counts,
            base_logits_NV.split(counts),
            logits_NV.split(counts),
            strict=True,
        )
        for index, count, base_part, part in parts:
            base_log_probs = base_part.float().log_softmax(-1)
            total = float(kl_sum(base_log_probs, part))
            # A row without a labelled token has a KL of 0.
            found[index] = (total / max(count, 1), count)
    return found


def kl_sum(base_log_probs_NV: Tensor, logits_NV: Tensor) -> Tensor:
    """Sum over tokens of KL(base || model), nats, from the base's log-probabilities and the model's logits."""
    # In float32, whatever the logits are: a softmax over the vocabulary in bfloat16 loses the small probabilities.
    log_probs_NV = logits_NV.float().log_softmax(-1)
    # torch's order of arguments: kl_div(q, p) is KL(p || q).
    return nn.functional.kl_div(
        log_probs_NV,
        base_log_probs_NV,
        reduction="sum",
        log_target=True,
    )


def is_before_label(labels_BT: Tensor) -> Tensor:
    """Tokens just before a token with a label, bool (B, T): their logits predict it."""
    # The last token predicts nothing. With padding_free, the rows of a batch follow each other in a single one. TRL's
    # collator has removed the label of each row's first token, so no row predicts the next one.
    next_labels_BT = nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)
    return next_labels_BT != IGNORED


def _attention_on(device: torch.device, model: Any) -> AbstractContextManager[None]:
    """Let a model that waits for its GPU compute on the CPU, where kernels such as flash attention do not run."""
    kind = (model.config._attn_implementation or "eager").removeprefix(PREFIX)
    if device.type != "cpu" or kind in OF_ALL_PAIRS:
        return nullcontext()
    return attention_by(model, "eager")


def head_logits(model: nn.Module, hidden_ND: Tensor) -> Tensor:
    """Logits (N, V) of the decoder's hidden states, scaled and capped as in the model's own forward pass.

    The names of the settings are those of transformers' models; TRL's ``add_fused_lm_head`` reads the same ones.
    """
    config = model.config.get_text_config()
    logits_NV = model.get_output_embeddings()(hidden_ND)

    # A model has at most one of these factors: Cohere, Muse Glimmer and Falcon H1 have different names for it.
    scale = None
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if scale is None:
            scale = getattr(config, name, None)
    divisor = getattr(config, "logits_scaling", None)
    if scale is not None:
        logits_NV = logits_NV * scale
    elif divisor is not None:
        # Granite and MiniCPM3 divide by it; HyperCLOVA X multiplies.
        if config.model_type == "hyperclovax":
            logits_NV = logits_NV * divisor
        else:
            logits_NV = logits_NV / divisor

    # Gemma's soft cap, which keeps logits within (-cap, cap).
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None:
        logits_NV = cap * torch.tanh(logits_NV / cap)
    return logits_NV


def _batch(
    rows: Sequence[Mapping[str, Any]],
    pad_token_id: int,
    device,
) -> dict[str, Tensor]:
    ids = [row["input_ids"] for row in rows]
    labels = [row["labels"] for row in rows]
    ids_BT, mask_BT = pad(ids, pad_token_id, device)
    labels_BT, _ = pad(labels, IGNORED, device)
    return {
        "input_ids": ids_BT,
        "attention_mask": mask_BT,
        "labels": labels_BT,
    }


def _supervised_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits (N, V) of the tokens that predict a label, row by row.

    The head runs from the first such column on: with a large vocabulary it is a good part of a forward pass, and
    prompts do not need it.
    """
    is_supervised_BT = is_before_label(batch["labels"])
    columns = is_supervised_BT.any(0).nonzero()
    # Without any label all columns are computed, and the last line selects none of them.
    first = 0
    if len(columns) > 0:
        first = int(columns.min())
    positions = torch.arange(
        first,
        is_supervised_BT.shape[1],
        device=is_supervised_BT.device,
    )
    logits_BTV = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        logits_to_keep=positions,
        use_cache=False,
    ).logits
    return logits_BTV[is_supervised_BT[:, first:]]
