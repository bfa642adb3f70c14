"""What a run will need, before it is started: parameters, memory by term.

Only the model's configuration is loaded. What training keeps is counted; activations are what one forward pass saves
for the backward pass, seen on fake tensors, which have shapes and no data. A mask is stood in for by training the
effective weights: the same operations save the same tensors.
"""

from __future__ import annotations

import copy
import math
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig
from trl.trainer.utils import add_fused_lm_head

from maskft.models import load_config
from maskft.training.arguments import TrainConfig, with_accumulation
from maskft.training.build import build_model
from maskft.training.checks import check_method
from maskft.training.method_arguments import INTERPOLATE, MASK_METHODS, UNTRAINED_METHODS, mask_config
from maskft.tuner.targets import layer_indices, resolve_targets
from maskft_common.errors import UserError, did_you_mean, first_line
from maskft_common.memory import resident_memory_bytes

from .out_of_memory import ADVICE

TRAINER_BYTES = 70_000_000  # what reading data and building the trainer add to a process; measured once
MAX_MICRO_BATCH = 1024  # no larger one is tried; the answer then means this or more
RESERVE_BYTES = 2**30  # of a GPU, for its driver and fragmentation; an assumption
# TRL makes logits in tiles of so many tokens and entries; on a CPU, without Triton's kernel, ten float32 ones at once.
_TILE, _CPU_TILES = (4096, 32768), 10
# Bytes of optimizer state per trained parameter, as a function of the parameter's own size. 8-bit states carry a
# float32 scale per block of 256, 4-bit ones per block of 128, for each of the two moments.
OPTIMIZER_BYTES: dict[str, Callable[[int], float]] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused"), lambda size: 2 * size),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit"), lambda size: 2 * (1 + 4 / 256)),
    "adamw_torch_4bit": lambda size: 2 * (0.5 + 4 / 128),
    "sgd": lambda size: 0,
}
_REFRESH_BYTES = 12  # per weight of the largest matrix on a GPU: its magnitudes, a copy to rank them, masks


@dataclass(frozen=True)
class Estimate:
    """What a run needs; the memory is that of one process, in bytes.

    Attributes:
        num_parameters: Parameters of the base model; tied ones count once.
        num_masked: Weights that a mask covers, 0 for other methods.
        memory: Bytes per term at the peak; ``process`` is Python and its libraries.
        largest_micro_batch: Largest ``per_device_train_batch_size`` for the device; None when none was given.
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


def estimate(run: TrainConfig, device: str | None = None, device_memory_gb: float | None = None) -> Estimate:
    """Estimate what ``run`` needs, from the configuration of its model.

    Args:
        run: The run as ``maskft train`` would start it; ``model_name_or_path`` may also be a ``config.json``. Rows are
            taken to have ``max_length`` tokens.
        device: ``cpu`` or ``cuda``; default: what this machine has.
        device_memory_gb: Memory of the device as it is sold, for the largest micro-batch: 24 means 24 * 2**30 bytes.

    Raises:
        UserError: For an unknown model, layers out of range, or a device too small for micro-batch 1.
    """
    _check(run)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    run = replace(run, training=with_accumulation(run.training))
    planned = _Planned(run, device)
    largest = None
    if device_memory_gb is not None:
        if not 0 < device_memory_gb < math.inf:
            raise UserError(f"device_memory_gb is {device_memory_gb}; give a number of GB, > 0")
        limit = int(device_memory_gb * 2**30) - (RESERVE_BYTES if device == "cuda" else 0)
        sizes = range(1, MAX_MICRO_BATCH + 1)
        largest = bisect_right(sizes, limit, key=lambda rows: sum(planned.memory(rows).values()))
        if not largest:
            needed = sum(planned.memory(1).values()) / 1e9
            raise UserError(
                f"device memory is too small for micro-batch 1: about {needed:.3g} GB are needed, {limit / 1e9:.3g} GB "
                f"are there; {ADVICE}"
            )
    return Estimate(
        method=run.method.method,
        model=str(run.model.model_name_or_path),
        device=device,
        num_parameters=planned.num_parameters,
        num_trainable=planned.num_trainable,
        num_masked=sum(planned.masked_sizes),
        memory=planned.memory(run.training.per_device_train_batch_size),
        largest_micro_batch=largest,
    )


class _Planned:
    """The model of a run without data: what training it keeps in memory and computes."""

    def __init__(self, run: TrainConfig, device: str):
        self.run, self.device, self.method = run, device, run.method.method
        source = run.model
        self.config = load_config(source.model_name_or_path, revision=source.model_revision)
        own = getattr(self.config, "dtype", None)
        self.stored = own if isinstance(own, torch.dtype) else torch.float32
        self.dtype = self.stored if source.dtype == "auto" else getattr(torch, source.dtype)
        self.autocast = _autocast_dtype(run.training, device)
        self.optim = _optimizer(run.training)
        self.mask = mask_config(run.mask) if self.method in MASK_METHODS else None
        self.process_bytes = resident_memory_bytes() + TRAINER_BYTES if device == "cpu" else 0
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = model_without_data(self.config, self.dtype, source.attn_implementation)
            self.num_parameters = sum(p.numel() for p in model.parameters())
            self.weight_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
            num_layers = len(layer_indices(name for name, _ in model.named_modules()))
            self._prepare(model)
        with FakeTensorMode():
            _make_fake(self.model)
            # One row and two, from which those of more follow.
            self._seen = [self._run_forward(rows) for rows in (1, 2)]
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.num_trainable = sum(p.numel() for p in trained.values())
        if self.method not in UNTRAINED_METHODS and not trained:
            raise UserError(f"method {self.method} trains no parameter of {source.model_name_or_path!r}")
        self._count(trained)
        self.num_backward_layers = num_layers - min(layer_indices(trained), default=0)  # from the lowest trained one up

    def _prepare(self, model: nn.Module) -> None:
        """Make trainable what the method trains, as ``build_model`` does."""
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        self.masked: dict[str, nn.Module] = {}
        if self.mask is None:
            self.model = build_model(model, self.run.method, self.run.model, self.run.mask, self.run.training.seed)
            return
        self.model = model.requires_grad_(False)
        resolve_targets(self.mask, model)
        self.masked = {n: m for n, m in model.named_modules() if n and check_target_module_exists(self.mask, n)}
        for module in self.masked.values():
            weight = torch.empty_like(module.weight, dtype=self.autocast or self.dtype)
            module.weight = nn.Parameter(weight, requires_grad=self.method == "mask")
        for name, module in model.named_modules():
            if any(name.endswith(saved) for saved in self.run.mask.mask_modules_to_save or []):  # as PEFT does
                module.requires_grad_(True)

    def _count(self, trained: dict[str, nn.Parameter]) -> None:
        masked = {id(module.weight) for module in self.masked.values()}
        self.masked_sizes = [module.weight.numel() for module in self.masked.values()]
        others: Counter[int] = Counter()  # bytes per parameter -> how many
        for parameter in trained.values():
            others[parameter.element_size()] += 0 if id(parameter) in masked else parameter.numel()
        num_scores = sum(self.masked_sizes) if self.method == "mask" else 0
        counts, moments = others + Counter({4: num_scores}), OPTIMIZER_BYTES[self.optim]  # scores are float32
        has_base = self.mask is not None and self.mask.removed_value == "base"
        self.kept = {
            # The base weights stay beside the effective ones.
            "effective weights": num_scores * (self.autocast or self.dtype).itemsize,
            "scores": 4 * num_scores,
            "optimizer": math.ceil(sum(count * moments(size) for size, count in counts.items())),
            "gradients": sum(size * count for size, count in counts.items()),
            "adapter": 0 if self.method == "full" else sum(size * count for size, count in others.items()),
            "removed values": sum(self.masked_sizes) * self.dtype.itemsize if has_base else 0,
        }

    def memory(self, rows: int) -> dict[str, int]:
        """Bytes per term at the peak of a run with micro-batches of ``rows`` rows."""
        start = {"process": self.process_bytes, "weights": self.weight_bytes}
        if not self.num_trainable:  # float32 ranking keys and bool masks of all matrices at once
            return start | {"masks": 5 * sum(self.masked_sizes)}
        step = {**start, **self.kept, "activations": 0, "buffers": self._step_bytes}
        during = {**step, "activations": self._activations(rows), "buffers": 0, "logits": self._logits(rows)}
        if self.run.training.gradient_accumulation_steps == 1:
            during["gradients"] = 0  # they come as activations go
        phases = [step, during]
        if self.run.training.do_eval:
            phases.append({**start, **self.kept, "gradients": 0, "logits": self._heldout_logits()})
        if self.device == "cpu":  # a file's pages are resident while the weights are read from it
            phases.append(start | {"file": self.stored.itemsize * self.num_parameters})
        return max(phases, key=lambda terms: sum(terms.values()))

    def _heldout_logits(self) -> int:
        """Those of a batch of held-out rows, and a copy of one row in float32 and one in float64."""
        one = self.run.training.max_length * self.config.get_text_config().vocab_size
        return one * (self.run.training.per_device_eval_batch_size * (self.autocast or self.dtype).itemsize + 12)

    def _logits(self, rows: int) -> int:
        """What the head takes for a moment, when the backward pass begins."""
        vocab = self.config.get_text_config().vocab_size
        tile = 4 * min(rows * self.run.training.max_length, _TILE[0]) * min(vocab, _TILE[1])
        head = 4 * sum(p.numel() for p in self.model.get_output_embeddings().parameters() if p.requires_grad)
        return head + tile * (_CPU_TILES if self.device == "cpu" else 1)

    @property
    def _step_bytes(self) -> int:
        """What an optimizer step and the refresh of a mask take for a moment."""
        # adamw_torch updates all tensors at once on a GPU; a byte per weight tells which bits have flipped.
        update = self.kept["gradients"] if self.optim == "adamw_torch" and self.device == "cuda" else 0
        ranked = _REFRESH_BYTES * max(self.masked_sizes, default=0) if self.device == "cuda" else 0
        return max(update, ranked + sum(self.masked_sizes))

    def _activations(self, rows: int) -> int:
        saved = self._forward(rows)
        if not self.run.training.gradient_checkpointing:
            return saved
        num_layers = self.num_backward_layers  # each keeps its input; one at a time is computed again
        hidden = rows * self.run.training.max_length * self.config.get_text_config().hidden_size
        return num_layers * hidden * (self.autocast or self.dtype).itemsize + saved // num_layers

    def _forward(self, rows: int) -> int:
        """Bytes that a forward pass saves for the backward pass."""
        one, two = self._seen
        return one + (rows - 1) * (two - one)

    def _run_forward(self, rows: int) -> int:
        there = {t.untyped_storage()._cdata for t in (*self.model.parameters(), *self.model.buffers())}
        saved: dict[int, torch.UntypedStorage] = {}  # held, or another could take its place

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in there:
                saved[storage._cdata] = storage
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            ids = torch.zeros(rows, self.run.training.max_length, dtype=torch.long)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "use_cache": False}
            self.model.train()(**inputs, fused_lm_head=True).log_probs.sum()
        return sum(storage.nbytes() for storage in saved.values())


def model_without_data(config: PretrainedConfig, dtype: torch.dtype | None = None, attention: str | None = None):
    """Return a model of a configuration, to be called under ``torch.device("meta")``."""
    # Flash attention, from whatever package, keeps what sdpa keeps.
    named = {"attn_implementation": attention if attention in ("eager", "sdpa") else "sdpa"} if attention else {}
    try:
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False, **named)
    except (ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError) as error:
        raise UserError(f"the configuration makes no causal language model: {first_line(error)}") from error
    if not layer_indices(name for name, _ in model.named_modules()):
        raise UserError(f"the configuration has no decoder layers ({type(model).__name__}); is it complete?")
    return model


def _make_fake(model: nn.Module) -> None:
    """Put fake CPU tensors, which choose CPU kernels, in place of a model's meta tensors; tied ones stay tied."""
    made: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[tensor] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                tensors[name] = made[tensor]


def _check(run: TrainConfig) -> None:
    check_method(run.method)
    method = run.method.method
    if method == INTERPOLATE:
        raise UserError(f"method {method} trains nothing, and there is no estimate of it")
    if run.model.load_in_4bit or run.model.load_in_8bit:
        raise UserError("there is no estimate of a quantised base: leave out load_in_4bit and load_in_8bit")
    if run.training.kl_to_base:
        raise UserError("there is no estimate of kl_to_base, which runs the base model too: leave it out")
    if run.training.max_length is None:
        raise UserError("max_length is not set, so rows have any length; give that of the longest")


def _autocast_dtype(training, device: str) -> torch.dtype | None:
    """The dtype matrices are multiplied in under autocast; None without."""
    # float32 that nobody asked for is the default of this machine, and not of the one that is asked about.
    if training.bf16 or (device == "cuda" and training.is_float32_by_machine):
        return torch.bfloat16
    return torch.float16 if training.fp16 else None


def _optimizer(training) -> str:
    name = str(getattr(training.optim, "value", training.optim))
    if name not in OPTIMIZER_BYTES:
        known = ", ".join(OPTIMIZER_BYTES)
        raise UserError(f"optim is {name!r}{did_you_mean(name, OPTIMIZER_BYTES)}; estimates are made for: {known}")
    return name
