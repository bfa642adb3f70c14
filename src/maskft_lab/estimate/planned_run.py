"""A run's model without data, and what one micro-batch of it keeps alive and computes.

Activations are not guessed by a formula: one micro-batch is run, forward and backward, on fake tensors, which have
shapes and no data, and the bytes that would be alive are followed operation by operation. So any architecture,
attention implementation, autocast and gradient checkpointing count as they are, and so do short-lived buffers and the
chunked output head.

A mask is stood in for by training the effective weights themselves: the same operations, and the same tensors are kept
for the backward pass. What the mask has besides is in the ledger (``ledger.py``).
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from maskft.models import load_config
from maskft.training.arguments import TrainConfig
from maskft.training.build import build_model
from maskft.training.callbacks import stop_gradient_at_frozen_embeddings
from maskft.training.method_arguments import COMBINED_METHODS, MASK_METHODS, PEFT, UNTRAINED_METHODS, mask_config
from maskft.tuner.codec import encode_mask
from maskft.tuner.config import MaskConfig
from maskft.tuner.effective import is_signed_weight_kept
from maskft.tuner.fixed import random_mask
from maskft.tuner.learners import blend_, draw_noise, has_slope, has_soft_gate, soft_gate
from maskft.tuner.scores import write_masked_
from maskft.tuner.selection import CHUNK_NUMEL
from maskft.tuner.targets import layer_indices, resolve_targets
from maskft_base.errors import UserError, did_you_mean, first_line
from maskft_base.runtime import resident_memory_bytes

from .ledger import OPTIMIZER_BYTES, kept_bytes, layer_passes
from .live_bytes import Gradients, LiveBytes, make_fake, triton_head

# What reading the data and building the trainer add to a process that has imported everything; measured once.
TRAINER_BYTES = 70_000_000

# Shape of a random mask that is coded, to see how many bits that takes.
_SAMPLE_SHAPE = (1024, 1024)


@dataclass
class MicroBatch:
    """What one micro-batch does, seen on fake tensors.

    Attributes:
        activation_bytes: Activations and temporary buffers alive at the peak, bytes.
        gradient_bytes: Gradients alive at that moment, bytes.
        allocator_bytes: On a CPU, what was measured to be resident beside live tensors, bytes: oneDNN keeps float32
            sums of the largest product in lower precision, and the heap a hole of about the largest buffer. 0 on
            a GPU; see ``reserve_gb``.
        forward_flops: Multiply-adds of the forward pass, times two.
        backward_flops: The same of the backward pass, recomputation included; 0 without one.
    """

    activation_bytes: int
    gradient_bytes: int
    allocator_bytes: int
    forward_flops: int
    backward_flops: int


class PlannedRun:
    """A run's model without data: what it keeps in memory and on disk, and what a step of it computes."""

    def __init__(self, run: TrainConfig, device: str):
        self.run, self.length, self.device = run, run.training.max_length, device
        self.process_bytes = resident_memory_bytes() + TRAINER_BYTES if device == "cpu" else 0
        self.method = run.method.method
        if self.method in COMBINED_METHODS:
            raise UserError(f"method {self.method} trains nothing, and there is no estimate of it")
        if run.model.load_in_4bit or run.model.load_in_8bit:
            raise UserError("there is no estimate of a quantised base: leave out load_in_4bit and load_in_8bit")
        self.is_trained = self.method not in UNTRAINED_METHODS
        self.config = load_config(run.model.model_name_or_path, revision=run.model.model_revision)
        self.dtype = _weight_dtype(run.model.dtype, self.config)
        self.optim = _optimizer(run.training)
        self.autocast = _autocast_dtype(run.training, device)
        self._seen: dict[tuple[int, bool], MicroBatch] = {}
        self._mode = FakeTensorMode()
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = meta_model(self.config, self.dtype, run.model.attn_implementation)
            self.num_parameters = sum(p.numel() for p in model.parameters())
            self.weight_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
            num_layers = len(layer_indices(name for name, _ in model.named_modules()))
            self.masked = _masked_modules(run, model) if self.method in MASK_METHODS else {}
            self.model = self._prepare(model)
        with self._mode:
            make_fake(self.model)
        self._count(num_layers)

    def _prepare(self, model: PreTrainedModel) -> nn.Module:
        """Make trainable what the method trains, as ``build_model`` does, and add the output head."""
        head = ("log_probs", "entropy", "is_top1")
        if self.method in MASK_METHODS:
            model.requires_grad_(False)
            for module in self.masked.values():
                weight = torch.empty_like(module.weight, dtype=self.autocast or self.dtype)
                module.weight = nn.Parameter(weight, requires_grad=self.method == "mask")
            for name, module in model.named_modules():
                if any(name.endswith(saved) for saved in self.run.mask.mask_modules_to_save or []):  # as PEFT does
                    module.requires_grad_(True)
            add_fused_lm_head(model, outputs=head)
        else:
            add_fused_lm_head(model, outputs=head)
            model = build_model(model, self.run.method, self.run.model, self.run.mask, self.run.training.seed)
        model.train()
        if self.run.training.gradient_checkpointing:
            # Its old name warns in new versions of transformers, and the new one is not in old versions.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable(self.run.training.gradient_checkpointing_kwargs)
            stop_gradient_at_frozen_embeddings(model)
        return model

    def _count(self, num_layers: int) -> None:
        masked = {id(module.weight) for module in self.masked.values()}
        self.masked_numels = [module.weight.numel() for module in self.masked.values()]
        self.num_masked = sum(self.masked_numels)
        self.num_scores = self.num_masked if self.method == "mask" else 0
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.trained: Counter[int] = Counter()  # bytes per parameter -> how many, without scores
        for parameter in trained.values():
            if id(parameter) not in masked:
                self.trained[parameter.element_size()] += parameter.numel()
        self.num_trainable = self.trained.total() + self.num_scores
        if self.is_trained and not self.num_trainable:
            raise UserError(f"method {self.method} trains no parameter of {self.run.model.model_name_or_path!r}")
        layers = layer_indices(trained)
        self.layer_passes = layer_passes(num_layers, layers) if layers and self.method != PEFT else None
        self.mask_config = mask_config(self.run.mask) if self.masked else MaskConfig()
        self.refresh_bytes = _refresh_bytes(self.mask_config) if self.masked else 0
        self.bits_per_weight = _bits_per_weight(self.mask_config) if self.masked else None

    @property
    def kept(self) -> dict[str, int]:
        """Bytes that are there all the time once training has begun, by term."""
        size = (self.autocast or self.dtype).itemsize
        are_added = self.method != "full"
        kept = kept_bytes(self.weight_bytes, self.trained, self.num_scores, size, self.optim, are_added)
        if self.mask_config.removed_value == "base":
            kept["removed values"] = self.num_masked * self.dtype.itemsize
        if has_slope(self.mask_config):
            kept["slopes"] = 4 * self.num_scores
        accumulates = self.run.training.gradient_accumulation_steps > 1
        if self.device == "cpu" and accumulates and is_signed_weight_kept(self.mask_config):
            kept["signed weights"] = self.num_scores * self.dtype.itemsize
        return {"process": self.process_bytes, **kept}

    @property
    def file_bytes(self) -> tuple[int, int]:
        """Bytes on disk of the result (adapter, or whole model) and of a checkpoint."""
        kept = self.kept
        coded = 0
        if self.bits_per_weight:
            # A header of 64 bytes, and about 128 bytes that safetensors writes about each tensor.
            coded = sum(int(n * self.bits_per_weight["coded"] / 8) + 192 for n in self.masked_numels)
        result = self.weight_bytes if self.method == "full" else coded + kept.get("adapter", 0)
        moments = 0 if self.run.training.save_only_model else kept["optimizer"]
        return result, result + kept.get("scores", 0) + moments if self.is_trained else 0

    def phases(self, batch: int) -> dict[str, dict[str, int]]:
        """Bytes per term in each phase of a run, by phase."""
        if not self.is_trained:
            return self._fixed_mask_phases()
        kept, training = self.kept, self.run.training
        micro = self.micro_batch(batch)
        # adamw_torch updates all tensors at once on a GPU, with a temporary of the size of what it updates.
        update = kept["gradients"] if self.optim == "adamw_torch" and self.device == "cuda" else 0
        seen = {"activations": micro.activation_bytes, "allocator": micro.allocator_bytes}
        phases = {
            "micro-batch": {**kept, "gradients": micro.gradient_bytes, **seen},
            "optimizer step": {**kept, **seen, "activations": update},
        }
        if self.method == "mask":
            # On logged steps the gradients are still there, and a byte per weight tells which bits have flipped.
            ranked = max(self.masked_numels)
            if self.device == "cpu" and self.mask_config.selection == "topk":
                ranked = min(ranked, CHUNK_NUMEL)
            phases["refresh"] = {**kept, "refresh": int(self.refresh_bytes * ranked) + self.num_masked}
        if str(getattr(training.eval_strategy, "value", training.eval_strategy)) != "no":
            seen = self.micro_batch(training.per_device_eval_batch_size, is_evaluation=True)
            activations = {"activations": seen.activation_bytes, "allocator": seen.allocator_bytes}
            phases["evaluation"] = {**kept, "gradients": 0, **activations}
        if self.device == "cpu":
            # A file's pages are resident while the weights are read from it.
            stored = _weight_dtype("auto", self.config).itemsize * self.num_parameters
            phases["loading"] = {"process": self.process_bytes, "weights": self.weight_bytes, "file": stored}
        return phases

    def _fixed_mask_phases(self) -> dict[str, dict[str, int]]:
        """Making the mask and, where inputs (Wanda) or candidates are measured, a forward pass with all logits."""
        # float32 ranking keys and bool masks of all matrices at once
        terms = {"process": self.process_bytes, "weights": self.weight_bytes, "masks": 5 * self.num_masked}
        phases = {"making the mask": terms | {"refresh": int(self.refresh_bytes * max(self.masked_numels))}}
        has_candidates = self.run.method.num_candidates > 1
        if self.method == "wanda_mask" or has_candidates:
            rows = self.run.training.per_device_eval_batch_size if has_candidates else 1
            seen = self.micro_batch(rows, is_evaluation=True)
            # A loss keeps the logits in float32 and in float64 beside.
            logits = rows * self.length * self.config.get_text_config().vocab_size
            activations = seen.activation_bytes + logits * (self.dtype.itemsize + (12 if has_candidates else 0))
            phases["measuring"] = terms | {"activations": activations, "allocator": seen.allocator_bytes}
        return phases

    def peak_bytes(self, batch: int) -> int:
        """Bytes in all at the peak of a run with micro-batches of ``batch`` rows."""
        return max(sum(terms.values()) for terms in self.phases(batch).values())

    def micro_batch(self, batch: int, is_evaluation: bool = False) -> MicroBatch:
        """Run one micro-batch on fake tensors; see :class:`MicroBatch`."""
        key = (batch, is_evaluation)
        if key not in self._seen:
            with self._mode, warnings.catch_warnings(), triton_head(self.device):
                warnings.simplefilter("ignore")
                self.model.train(not is_evaluation)
                self._seen[key] = self._follow(batch, is_evaluation)
        return self._seen[key]

    def _follow(self, batch: int, is_evaluation: bool) -> MicroBatch:
        ids = torch.zeros(batch, self.length, dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "use_cache": False}
        live = LiveBytes([*self.model.parameters(), *self.model.buffers()])
        gradients = Gradients(self.model, {id(module.weight) for module in self.masked.values()}, live)
        with torch.set_grad_enabled(not is_evaluation), gradients, live:
            if self.run.training.gradient_accumulation_steps > 1 and not is_evaluation:
                gradients.of_an_earlier_micro_batch()
            with torch.autocast("cpu", self.autocast or torch.bfloat16, enabled=self.autocast is not None):
                loss = -self.model(**inputs, fused_lm_head=True).log_probs.sum()
            forward_flops = live.flops
            if not is_evaluation:
                loss.backward()
            return MicroBatch(
                activation_bytes=live.peak - live.gradients_at_peak,
                gradient_bytes=live.gradients_at_peak,
                allocator_bytes=live.largest + 4 * live.largest_product if self.device == "cpu" else 0,
                forward_flops=forward_flops,
                backward_flops=live.flops - forward_flops,
            )


def meta_model(config, dtype: torch.dtype | None = None, attention: str | None = None) -> PreTrainedModel:
    """Return a model without data, to be called under ``torch.device("meta")``."""
    # Flash attention, from whatever package, keeps what sdpa keeps.
    attention = "sdpa" if attention and attention not in ("eager", "sdpa") else attention
    try:
        named = {"attn_implementation": attention} if attention else {}
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False, **named)
    except (ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError) as error:
        raise UserError(f"the configuration makes no causal language model: {first_line(error)}") from error
    if not layer_indices(name for name, _ in model.named_modules()):
        raise UserError(f"the configuration has no decoder layers ({type(model).__name__}); is it complete?")
    return model


def _masked_modules(run: TrainConfig, model: PreTrainedModel) -> dict[str, nn.Module]:
    config = mask_config(run.mask)
    resolve_targets(config, model)
    return {n: m for n, m in model.named_modules() if n and check_target_module_exists(config, n)}


def _weight_dtype(name: str, config) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    own = getattr(config, "dtype", None)
    return own if isinstance(own, torch.dtype) else torch.float32


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


def _bits_per_weight(config: MaskConfig) -> dict[str, float]:
    """Size of a coded mask, measured on a random one, and the entropy no code can go below; 1 at most."""
    if config.selection != "topk":
        return {"coded": 1.0, "bound": 1.0}  # how many weights will be removed is not known before
    share = config.sparsity
    coded = 8 * encode_mask(random_mask(_SAMPLE_SHAPE, share, seed=0)).numel() / math.prod(_SAMPLE_SHAPE)
    bound = -sum(p * math.log2(p) for p in (share, 1 - share) if p > 0)
    return {"coded": coded, "bound": bound}


def _refresh_bytes(config: MaskConfig) -> float:
    """Bytes that a refresh takes at its peak per weight of the part it looks at, measured on a random matrix."""
    scores = torch.randn(CHUNK_NUMEL, generator=torch.Generator().manual_seed(0))
    weight, out = torch.zeros_like(scores), torch.empty_like(scores)
    with LiveBytes([scores, weight, out]) as live:
        if has_soft_gate(config):
            gate, _ = soft_gate(config, scores, draw_noise(config, "", scores.shape, scores.device))
            blend_(out, weight, gate)
        else:
            write_masked_(config, [out], [weight], [scores])
    return live.peak / scores.numel()
