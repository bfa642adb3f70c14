"""The memory of a run before it is started, term by term.

Only the model's configuration is loaded. Weights, scores, gradients and optimizer states are counted. Activations are
the tensors that one forward pass saves for the backward pass, seen on fake tensors, which have shapes and no data. A
mask is replaced by training the effective weights: the same operations save the same tensors.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from maskft.fast.masker import kept_bytes_per_weight
from maskft.models import load_config
from maskft.training.arguments import TrainConfig, with_accumulation
from maskft.training.build import build_model
from maskft.training.checks import check_options
from maskft.training.method_arguments import (
    INTERPOLATE,
    MASK_METHODS,
    PEFT,
    UNTRAINED_METHODS,
    mask_config,
)
from maskft.training.peft_config import keeps_base
from maskft.tuner.targets import is_target, layer_indices, resolve_targets
from maskft_common.errors import UserError, did_you_mean
from maskft_common.memory import resident_memory_bytes

from .empty_model import bytes_saved_for_backward, model_without_data
from .out_of_memory import ADVICE

GIB = 2**30
FLOAT32_BYTES = 4

TRAINER_BYTES = 70_000_000  # reading data and building the trainer, in a process; measured once
MAX_LENGTH = 2**20  # tokens of a row; the head is computed in tiles, and a billion tokens would take a day
MAX_MICRO_BATCH = 1024  # larger ones are not tried; the answer then means this or more
RESERVE_BYTES = GIB  # of a GPU, for its driver and fragmentation; an assumption

# TRL computes logits in tiles of this many tokens and entries of the vocabulary. On a CPU, without Triton's kernel, ten
# float32 tiles exist at once.
_TILE_TOKENS = 4096
_TILE_ENTRIES = 32768
_CPU_TILES = 10

# A refresh of the mask on a GPU, per weight of the largest matrix: magnitudes, a copy to rank them, masks.
_REFRESH_BYTES = 12
# A fixed mask, per weight of all matrices at once: a float32 key and a bool.
_FIXED_MASK_BYTES = FLOAT32_BYTES + 1
# Held-out rows, per logit of one row: a copy in float32 and one in float64.
_HELDOUT_COPY_BYTES = 4 + 8

# A KL term, per logit of its tokens, beside the logits themselves: the base's log-probabilities and the model's, the
# base's probabilities, the differences and their products, all in float32.
_KL_BYTES = 5 * FLOAT32_BYTES
# KL of held-out rows, per logit of a batch and byte of a logit: the base's logits, the model's, a selection of them.
_KL_HELDOUT_COPIES = 3

# Bytes of a quantised moment: 8-bit ones have a float32 scale per block of 256, 4-bit ones per block of 128.
_MOMENT_8BIT = 1 + FLOAT32_BYTES / 256
_MOMENT_4BIT = 0.5 + FLOAT32_BYTES / 128

# Bytes of optimizer state per trained parameter, as a function of the parameter's own size. Adam has two moments.
OPTIMIZER_BYTES: dict[str, Callable[[int], float]] = {
    "adamw_torch": lambda size: 2 * size,
    "adamw_torch_fused": lambda size: 2 * size,
    "adamw_bnb_8bit": lambda size: 2 * _MOMENT_8BIT,
    "adamw_8bit": lambda size: 2 * _MOMENT_8BIT,
    "adamw_torch_8bit": lambda size: 2 * _MOMENT_8BIT,
    "adamw_torch_4bit": lambda size: 2 * _MOMENT_4BIT,
    "sgd": lambda size: 0,
}


@dataclass(frozen=True)
class Estimate:
    """The needs of a run; the memory is that of one process, in bytes.

    Attributes:
        num_parameters: Parameters of the base model; tied ones count once.
        num_masked: Weights that a mask covers, 0 for other methods.
        memory: Bytes per term at the peak; ``process`` is Python and its libraries.
        largest_micro_batch: Largest ``per_device_train_batch_size`` for the device; None if no device was given.
    """

    method: str
    model: str
    device: str
    num_parameters: int
    num_trainable: int
    num_masked: int
    memory: dict[str, int]
    largest_micro_batch: int | None = None

    @property
    def peak_bytes(self) -> int:
        """Total bytes at the peak."""
        return sum(self.memory.values())


def estimate(
    run: TrainConfig,
    device: str | None = None,
    device_memory_gb: float | None = None,
) -> Estimate:
    """Estimate the needs of ``run`` from the configuration of its model.

    Args:
        run: The run as ``maskft train`` would start it; ``model_name_or_path`` may also be a ``config.json``. Every row
            is assumed to have ``max_length`` tokens.
        device: ``cpu`` or ``cuda``; default: ``cuda`` if the run would use one here.
        device_memory_gb: Memory of the device as it is sold, for the largest micro-batch: 24 means 24 * 2**30 bytes.

    Raises:
        UserError: For an unknown model, layers out of range, or a device too small for micro-batch 1.
    """
    _check(run)
    # An estimate for another machine names its device.
    if not device:
        is_on_gpu = torch.cuda.is_available() and not run.training.use_cpu
        device = "cuda" if is_on_gpu else "cpu"
    training = with_accumulation(run.training)  # global_batch_size as accumulation steps
    run = replace(run, training=training)

    # The expensive part, once: the model is built and traced. `memory` below is arithmetic.
    needs = RunMemory(run, device)
    return Estimate(
        method=run.method.method,
        model=str(run.model.model_name_or_path),
        device=device,
        num_parameters=needs.num_parameters,
        num_trainable=needs.num_trainable,
        num_masked=sum(needs.masked_sizes),
        memory=needs.memory(run.training.per_device_train_batch_size),
        largest_micro_batch=_largest_micro_batch(needs, device, device_memory_gb),
    )


def _largest_micro_batch(
    needs: RunMemory,
    device: str,
    device_memory_gb: float | None,
) -> int | None:
    if device_memory_gb is None:
        return None
    limit_or_inf = device_memory_gb * GIB
    # NaN is in no range; the product of a large number may be infinite.
    if not 0 < limit_or_inf < math.inf:
        raise UserError(f"device_memory_gb is {device_memory_gb}; give a number of GB, > 0")

    limit = int(limit_or_inf)
    if device == "cuda":
        limit = max(limit - RESERVE_BYTES, 0)

    def peak(num_rows: int) -> int:
        terms = needs.memory(num_rows)
        return sum(terms.values())

    # The peak grows with the rows. The position at which the limit would be inserted among the peaks of 1, 2, ... rows
    # is the number of micro-batches that fit, and so the largest that does.
    candidates = range(1, MAX_MICRO_BATCH + 1)
    # `key` (Python 3.10) computes about ten of the 1,024 peaks.
    largest = bisect_right(candidates, limit, key=peak)
    if largest == 0:
        raise UserError(
            f"device memory is too small for micro-batch 1: about {peak(1) / 1e9:.3g} GB are needed, "
            f"{limit / 1e9:.3g} GB are there; {ADVICE}"
        )
    return largest


class RunMemory:
    """The memory of a run as a function of its micro-batch.

    Attributes:
        num_parameters: Parameters of the base model.
        num_trainable: Parameters that are trained; scores count as the weights they cover.
        masked_sizes: Number of weights of each masked matrix.
    """

    def __init__(self, run: TrainConfig, device: str):
        self.run = run
        self.device = device
        self.method = run.method.method
        source = run.model

        # From the configuration and the options.
        self.config = load_config(
            source.model_name_or_path,
            revision=source.model_revision,
        )
        if getattr(self.config, "quantization_config", None) is not None:
            raise UserError(f"{source.model_name_or_path!r} is stored quantised, and there is no estimate of it")
        stored = getattr(self.config, "dtype", None)
        self.stored_dtype = torch.float32  # of files whose configuration names none
        if isinstance(stored, torch.dtype):
            self.stored_dtype = stored
        if source.dtype == "auto":
            self.dtype = self.stored_dtype
        else:
            self.dtype = getattr(torch, source.dtype)
        # Under autocast, matrices are multiplied in another dtype than they are stored in.
        self.autocast = _autocast_dtype(run.training, device)
        self.compute_dtype = self.autocast or self.dtype
        self.optimizer = _optimizer(run.training)
        # Rows of each KL term beside the task's; 0: it is on the task's own rows.
        self.has_kl = bool(run.training.kl_to_base) or run.training.kl_budget is not None
        self.num_kl_rows = 0
        if run.training.kl_dataset_name is not None:
            self.num_kl_rows = run.training.kl_batch_size
        self.mask = None
        if self.method in MASK_METHODS:
            self.mask = mask_config(run.mask)

        # On a CPU, Python and its libraries are in the same memory as the model.
        self.process_bytes = 0
        if device == "cpu":
            self.process_bytes = resident_memory_bytes() + TRAINER_BYTES

        # The base model, and then the model that trains, both without data.
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = model_without_data(self.config, self.dtype, source.attn_implementation)
            self.num_parameters = _num_weights(model.parameters())
            tensors = [*model.parameters(), *model.buffers()]
            self.weight_bytes = sum(tensor.nbytes for tensor in tensors)
            names = [name for name, _ in model.named_modules()]
            layers = layer_indices(names)
            # TRL's trainer computes the loss with this head, which never holds the logits of all tokens.
            add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
            self.model, self.masked = with_trained_parameters(model, run, self.compute_dtype)

        # The bytes for more rows follow from those for one and two, see `_activation_bytes`.
        num_tokens = run.training.max_length
        self._saved_bytes = bytes_saved_for_backward(
            self.model,
            (1, 2),
            num_tokens,
            self.autocast,
        )

        # The numbers of trained and of masked weights.
        trained = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                trained[name] = parameter
        self.num_trainable = _num_weights(trained.values())
        if self.method not in UNTRAINED_METHODS and not trained:
            raise UserError(f"method {self.method} trains no parameter of {source.model_name_or_path!r}")
        masked_modules = self.masked.values()
        self.masked_sizes = [module.weight.numel() for module in masked_modules]
        self.kept = self._kept(trained)

        # The backward pass ends at the lowest trained layer.
        lowest_layer = min(layer_indices(trained), default=0)
        self.num_backward_layers = len(layers) - lowest_layer

    def _kept(self, trained: dict[str, nn.Parameter]) -> dict[str, int]:
        """Bytes of everything that exists throughout training, beside the weights."""
        num_masked = sum(self.masked_sizes)
        num_scores = num_masked if self.method == "mask" else 0

        # Bytes per parameter -> number of parameters: trained ones beside the scores, and all.
        masked_weights = {id(module.weight) for module in self.masked.values()}
        others: Counter[int] = Counter()
        for parameter in trained.values():
            if id(parameter) not in masked_weights:
                others[parameter.element_size()] += parameter.numel()
        all_trained = others + Counter({FLOAT32_BYTES: num_scores})

        moments = OPTIMIZER_BYTES[self.optimizer]
        optimizer_bytes = 0.0
        for size, number in all_trained.items():
            optimizer_bytes += number * moments(size)

        adapter_bytes = 0
        if self.method != "full":  # for which they are the weights, and counted as such
            adapter_bytes = _num_bytes(others)

        # Where training changes the base, its KL term keeps a frozen copy.
        base_bytes = 0
        changes_base = self.method == "full" or (self.method == PEFT and not keeps_base(self.model))
        if self.has_kl and changes_base:
            base_bytes = self.weight_bytes
        # A budget takes back a part of the change, from where training started.
        self.change_bytes = 0
        if self.run.training.kl_budget is not None and self.device == "cpu":
            self.change_bytes = _num_bytes(all_trained)
        # The frozen copy is where it started.
        start_bytes = 0 if changes_base else self.change_bytes

        removed_bytes = 0
        if self.mask is not None and self.mask.removed_value == "base":
            removed_bytes = num_masked * self.dtype.itemsize

        factor_bytes = 0
        if self.mask is not None and num_scores:
            factor_bytes = kept_bytes_per_weight(
                self.mask,
                self.dtype.itemsize,
                self.device == "cpu",
                self.run.training.gradient_accumulation_steps,
            )

        return {
            # The base weights stay beside the effective ones.
            "effective weights": num_scores * self.compute_dtype.itemsize,
            "factors of gradients": num_scores * factor_bytes,
            "scores": num_scores * FLOAT32_BYTES,
            "optimizer": math.ceil(optimizer_bytes),
            "gradients": _num_bytes(all_trained),
            "adapter": adapter_bytes,
            "removed values": removed_bytes,
            "base of the KL": base_bytes,
            "start of the change": start_bytes,
        }

    def memory(self, rows: int) -> dict[str, int]:
        """Bytes per term at the peak of a run with micro-batches of ``rows`` rows."""
        start = {
            "process": self.process_bytes,
            "weights": self.weight_bytes,
        }
        if not self.num_trainable:
            masks = _FIXED_MASK_BYTES * sum(self.masked_sizes)
            return start | {"masks": masks}

        # The peak is one of these phases: the optimizer's step, the backward pass, an evaluation, the loading.
        # A phase has the terms of all of training, and its own in their place.
        # Nothing of the forward pass is left when the optimizer steps.
        step_terms = {
            "activations": 0,
            "buffers": self._step_bytes(),
        }
        step = start | self.kept | step_terms
        backward = step | {
            "activations": self._activation_bytes(rows),
            "buffers": 0,
            "logits": self._logit_bytes(rows),
        }
        if self.run.training.gradient_accumulation_steps == 1:
            backward["gradients"] = 0  # they appear as activations are freed
        phases = [step, backward]
        if self.has_kl:
            # The task's loss is computed first, and the KL term after it.
            backward["logits"] += self._held_for_kl_bytes(rows)
            kl_terms = {"logits": self._kl_bytes(rows)}
            if self.num_kl_rows:
                # Of a forward pass of its own, in which autocast casts the weights again.
                own_activations = self._activation_bytes(self.num_kl_rows)
                kl_terms["activations"] = backward["activations"] + own_activations
            phases.append(backward | kl_terms)

        if self.run.training.do_eval:
            evaluation_terms = {
                "gradients": 0,  # set to None after a step
                "logits": self._heldout_logit_bytes(),
            }
            evaluation = start | self.kept | evaluation_terms
            phases.append(evaluation)
        if self.has_kl:
            # With every evaluation; without one, at the end of training.
            measurement_terms = {
                "gradients": 0,
                "logits": self._heldout_kl_bytes(),
                # The whole change, while parts of it are measured.
                "buffers": self.change_bytes,
            }
            phases.append(start | self.kept | measurement_terms)
        if self.device == "cpu":
            # The pages of the weights' file are resident while it is read.
            file_bytes = self.num_parameters * self.stored_dtype.itemsize
            phases.append(start | {"file": file_bytes})

        def total(terms: dict[str, int]) -> int:
            return sum(terms.values())

        return max(phases, key=total)

    @property
    def _vocab_size(self) -> int:
        text_config = self.config.get_text_config()
        return text_config.vocab_size

    def _heldout_logit_bytes(self) -> int:
        """Logits of a batch of held-out rows, and copies of one row's in higher precision."""
        training = self.run.training
        logits_of_row = training.max_length * self._vocab_size
        num_rows = training.per_device_eval_batch_size
        size = self.compute_dtype.itemsize
        if self.autocast is None:
            return logits_of_row * (num_rows * size + _HELDOUT_COPY_BYTES)
        # accelerate converts the outputs of a model under autocast to float32, all rows at once.
        while_converted = num_rows * (size + FLOAT32_BYTES)
        afterwards = num_rows * FLOAT32_BYTES + _HELDOUT_COPY_BYTES
        return logits_of_row * max(while_converted, afterwards)

    def _num_kl_logits(self, rows: int) -> int:
        """Logits of all tokens of the KL term's rows, its own or the task's."""
        num_rows = self.num_kl_rows or rows
        return num_rows * self.run.training.max_length * self._vocab_size

    def _held_for_kl_bytes(self, rows: int) -> int:
        """What waits for the KL term while the task's loss is computed: the base's log-probabilities, and logits."""
        size = FLOAT32_BYTES
        if not self.num_kl_rows:
            # Those of the task's rows are computed in the same forward pass.
            size += self.compute_dtype.itemsize
        return size * self._num_kl_logits(rows)

    def _kl_bytes(self, rows: int) -> int:
        """A KL term, from the logits to the loss."""
        return self._num_kl_logits(rows) * (self.compute_dtype.itemsize + _KL_BYTES)

    def _heldout_kl_bytes(self) -> int:
        """KL of a batch of held-out rows, in which the softmax is computed row by row."""
        logits_of_row = self.run.training.max_length * self._vocab_size
        num_rows = self.run.training.per_device_eval_batch_size
        of_batch = num_rows * logits_of_row * self.compute_dtype.itemsize
        return _KL_HELDOUT_COPIES * of_batch + logits_of_row * _KL_BYTES

    def _logit_bytes(self, rows: int) -> int:
        """Temporary memory of the head, when the backward pass begins."""
        num_tokens = rows * self.run.training.max_length
        num_tokens = min(num_tokens, _TILE_TOKENS)
        num_entries = min(self._vocab_size, _TILE_ENTRIES)
        tile_bytes = FLOAT32_BYTES * num_tokens * num_entries
        num_tiles = _CPU_TILES if self.device == "cpu" else 1

        # TRL sums the gradient of a trained head in float32, whatever its dtype.
        head = self.model.get_output_embeddings()
        trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
        gradient_bytes = FLOAT32_BYTES * _num_weights(trained)
        return gradient_bytes + tile_bytes * num_tiles

    def _step_bytes(self) -> int:
        """Temporary memory of an optimizer step, or of the refresh of a mask."""
        # adamw_torch updates all tensors at once on a GPU.
        updates_all = self.optimizer == "adamw_torch" and self.device == "cuda"
        update = self.kept["gradients"] if updates_all else 0

        # Matrices are ranked one after the other, and so the largest decides.
        largest = max(self.masked_sizes, default=0)
        ranking = _REFRESH_BYTES * largest if self.device == "cuda" else 0
        flipped = sum(self.masked_sizes)  # a byte per weight: whether its bit has flipped
        refresh = ranking + flipped
        return max(update, refresh)

    def _activation_bytes(self, rows: int) -> int:
        """Tensors that the forward pass keeps for the backward pass."""
        # Linear in the rows. Tensors that do not depend on them, such as weights cast by autocast, count once.
        one_row, two_rows = self._saved_bytes
        bytes_per_row = two_rows - one_row
        saved = one_row + (rows - 1) * bytes_per_row
        if not self.run.training.gradient_checkpointing:
            return saved

        # Each layer keeps its input; the activations of one layer at a time are computed again.
        num_layers = self.num_backward_layers
        hidden_size = self.config.get_text_config().hidden_size
        num_inputs = rows * self.run.training.max_length * hidden_size
        bytes_of_input = num_inputs * self.compute_dtype.itemsize
        # Layers are alike; the tensors of embedding and head are spread over them.
        bytes_in_layer = saved // num_layers
        return num_layers * bytes_of_input + bytes_in_layer


def with_trained_parameters(
    model: PreTrainedModel,
    run: TrainConfig,
    mask_dtype: torch.dtype,
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Make trainable the parameters that the method trains, as ``build_model`` does.

    A masked layer trains its effective weights here, see the top of the file.

    Args:
        model: The base model without data, under ``torch.device("meta")``.
        run: The run.
        mask_dtype: Of effective weights.

    Returns:
        The model, and the masked modules by name.
    """
    if run.method.method not in MASK_METHODS:
        # Zeros change no size, and a model without data has no weights to compare a mask's base with.
        method = replace(run.method, keep_mask=None, start_mask=None)
        trained_model = build_model(
            model,
            method,
            run.model,
            run.mask,
            run.training.seed,
        )
        return trained_model, {}

    # The modules that PEFT would wrap.
    mask = mask_config(run.mask)
    model.requires_grad_(False)
    resolve_targets(mask, model)
    masked = {}
    for name, module in model.named_modules():
        if name and is_target(mask, name):
            masked[name] = module

    is_learned = run.method.method == "mask"
    for module in masked.values():
        # On the meta device, as the module's own weight: nothing is allocated.
        weight = torch.empty_like(module.weight, dtype=mask_dtype)
        module.weight = nn.Parameter(weight, requires_grad=is_learned)

    # Modules that train in full beside the mask.
    saved_in_full = tuple(run.mask.mask_modules_to_save or ())
    for name, module in model.named_modules():
        if saved_in_full and name.endswith(saved_in_full):  # as PEFT matches them
            module.requires_grad_(True)
    return model, masked


def _num_weights(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _num_bytes(counts: Counter[int]) -> int:
    """Total of a number of parameters for each size, in bytes per parameter."""
    return sum(number * size for size, number in counts.items())


def _check(run: TrainConfig) -> None:
    """Raise for runs that are not estimated: no training, quantised bases, rows of any length."""
    check_options(run)
    method = run.method.method
    if method == INTERPOLATE:
        raise UserError(f"method {method} trains nothing, and there is no estimate of it")
    if run.model.load_in_4bit or run.model.load_in_8bit:
        raise UserError("there is no estimate of a quantised base: leave out load_in_4bit and load_in_8bit")
    if run.training.max_length is None:
        raise UserError("max_length is not set, so rows have any length; give that of the longest")
    if run.training.max_length > MAX_LENGTH:
        raise UserError(f"max_length is {run.training.max_length:,}; there are estimates up to {MAX_LENGTH:,} tokens")


def _autocast_dtype(training, device: str) -> torch.dtype | None:
    """The dtype matrices are multiplied in under autocast; None without."""
    # A float32 that this machine's processor caused is not the default of the GPU that is asked about.
    is_default_of_gpu = device == "cuda" and training.is_float32_by_machine
    if training.bf16 or is_default_of_gpu:
        return torch.bfloat16
    if training.fp16:
        return torch.float16
    return None


def _optimizer(training) -> str:
    """Name of the optimizer, whose state has a known size."""
    name = str(getattr(training.optim, "value", training.optim))  # of transformers' enum
    if name not in OPTIMIZER_BYTES:
        known = ", ".join(OPTIMIZER_BYTES)
        hint = did_you_mean(name, OPTIMIZER_BYTES)
        raise UserError(f"optim is {name!r}{hint}; estimates are made for: {known}")
    return name
