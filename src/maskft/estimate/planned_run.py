"""A run's model without data, and what one micro-batch of it keeps alive and computes.

Activations are not guessed by a formula: one micro-batch is run, forward and backward, on fake tensors, which have
shapes and no data, and the bytes that would be alive are followed operation by operation. So any architecture,
attention implementation, autocast and gradient checkpointing count as they are, and so do short-lived buffers and the
chunked output head.

A mask is stood in for by training the effective weights themselves: the same operations, and the same tensors are kept
for the backward pass. What the mask has besides (the frozen weight, scores, float32 gradients, moments, the refresh) is
counted by :meth:`PlannedRun.phases`.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from ..errors import UserError, did_you_mean
from ..models import load_config
from ..runtime import resident_memory_bytes
from ..training.arguments import TrainConfig
from ..training.build import build_model
from ..training.callbacks import stop_gradient_at_frozen_embeddings
from ..training.method_arguments import FIXED_MASK_METHODS, MASK_METHODS, mask_config
from ..tuner.codec import encode_mask
from ..tuner.config import MaskConfig
from ..tuner.fixed import random_mask
from ..tuner.scores import write_masked_
from ..tuner.selection import CHUNK_NUMEL
from ..tuner.targets import layer_indices, resolve_targets
from .floor import layer_passes
from .live_bytes import Gradients, LiveBytes, make_fake, triton_head

# Bytes of optimizer state per trained parameter, as a function of the parameter's own size. 8-bit states carry a
# float32 scale per block of 256, 4-bit ones per block of 128, for each of the two moments.
OPTIMIZER_BYTES: dict[str, Callable[[int], float]] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused"), lambda size: 2 * size),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit"), lambda size: 2 * (1 + 4 / 256)),
    "adamw_torch_4bit": lambda size: 2 * (0.5 + 4 / 128),
    "sgd": lambda size: 0,
}

# What reading the data and building the trainer add to a process that has imported everything; measured once.
_TRAINER_BYTES = 70_000_000

# Shape of a matrix that is masked for real, to see how many bytes that takes and how many bits its mask.
_SAMPLE_SHAPE = (1024, 1024)


@dataclass
class MicroBatch:
    """What one micro-batch does, seen on fake tensors.

    Attributes:
        activation_bytes: Activations and temporary buffers alive at the height, bytes.
        gradient_bytes: Gradients alive at that moment, bytes.
        all_gradient_bytes: Gradients after the backward pass, bytes.
        allocator_bytes: On a CPU, what was measured to be resident beside live tensors, bytes: oneDNN keeps float32
            sums of the largest product in lower precision, and the heap a hole of about the largest buffer. 0 on
            a GPU; see ``reserve_gb``.
        forward_flops: Multiply-adds of the forward pass, times two.
        backward_flops: The same of the backward pass, recomputation included; 0 without one.
    """

    activation_bytes: int
    gradient_bytes: int
    all_gradient_bytes: int
    allocator_bytes: int
    forward_flops: int
    backward_flops: int


class PlannedRun:
    """A run's model without data: what it keeps in memory and on disk, and what a step of it computes."""

    def __init__(self, run: TrainConfig, length: int, device: str):
        self.run, self.length, self.device = run, length, device
        self.process_bytes = resident_memory_bytes() + _TRAINER_BYTES if device == "cpu" else 0
        self.method = run.method.method
        self.is_trained = self.method not in FIXED_MASK_METHODS
        self.config = load_config(run.model.model_name_or_path, revision=run.model.model_revision)
        self.dtype = _weight_dtype(run.model.dtype, self.config)
        self.optim = _optimizer(run.training)
        self.compute_dtype = _compute_dtype(run.training, self.dtype)
        self._seen: dict[tuple[int, bool], MicroBatch] = {}
        self._mode = FakeTensorMode()
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = _meta_model(self.config, self.dtype, run.model.attn_implementation)
            self.num_parameters = sum(p.numel() for p in model.parameters())
            self.weight_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
            self.num_layers = len(layer_indices(name for name, _ in model.named_modules()))
            self.masked = self._masked_modules(model) if self.method in MASK_METHODS else {}
            self.masked_numels = [module.weight.numel() for module in self.masked.values()]
            self.num_masked = sum(self.masked_numels)
            self.model = self._prepare(model)
        with self._mode:
            make_fake(self.model)
            trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        layers = layer_indices(trained)
        self.layer_passes = layer_passes(self.num_layers, layers) if layers and self.method != "lora" else None
        masked = {id(module.weight) for module in self.masked.values()}
        # Trained besides the scores: all weights, LoRA matrices, modules_to_save.
        self.trained_sizes = [(p.numel(), p.element_size()) for p in trained.values() if id(p) not in masked]
        if self.method == "mask":
            self.trained_sizes += [(numel, 4) for numel in self.masked_numels]
        self.num_trainable = sum(numel for numel, _ in self.trained_sizes)
        if self.is_trained and not self.num_trainable:
            raise UserError(f"method {self.method} trains no parameter of {run.model.model_name_or_path!r}")
        self.refresh_bytes = _refresh_bytes(mask_config(run.mask)) if self.method in MASK_METHODS else 0
        self._count_files()

    # What is where

    def _masked_modules(self, model) -> dict[str, nn.Module]:
        config = mask_config(self.run.mask)
        resolve_targets(config, model)
        return {n: m for n, m in model.named_modules() if n and check_target_module_exists(config, n)}

    def _prepare(self, model: PreTrainedModel) -> nn.Module:
        """Make trainable what the method trains, as ``build_model`` does, and add the output head."""
        head = ("log_probs", "entropy", "is_top1")
        if self.method in MASK_METHODS:
            model.requires_grad_(False)
            for module in self.masked.values():
                weight = torch.empty_like(module.weight, dtype=self.compute_dtype)
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
            model.activation_checkpointing_enable(self.run.training.gradient_checkpointing_kwargs)
            stop_gradient_at_frozen_embeddings(model)
        return model

    def _count_files(self) -> None:
        moments = int(self._optimizer_bytes())
        trained = sum(numel * size for numel, size in self.trained_sizes)
        self.bits_per_weight = None
        coded = 0
        if self.method in MASK_METHODS:
            self.bits_per_weight = _bits_per_weight(self.run.mask)
            # A header of 64 bytes, and about 128 bytes that safetensors writes about each tensor.
            coded = sum(int(n * self.bits_per_weight["coded"] / 8) + 192 for n in self.masked_numels)
        others = trained - (4 * self.num_masked if self.method == "mask" else 0)
        self.adapter_bytes = self.weight_bytes if self.method == "full" else coded + others
        kept = self.weight_bytes if self.method == "full" else coded + trained
        self.checkpoint_bytes = (
            0 if not self.is_trained else kept + (0 if self.run.training.save_only_model else moments)
        )

    def _optimizer_bytes(self) -> float:
        per_parameter = OPTIMIZER_BYTES[self.optim]
        return sum(numel * per_parameter(size) for numel, size in self.trained_sizes)

    # Memory

    def _state_terms(self) -> dict[str, int]:
        """Bytes that are there all the time once training has begun."""
        terms = {"process": self.process_bytes, "weights": self.weight_bytes}
        if self.method == "mask":
            # The base weights stay beside the effective ones.
            terms["effective weights"] = self.num_masked * self.compute_dtype.itemsize
            terms["scores"] = 4 * self.num_masked
        others = sum(n * s for n, s in self.trained_sizes) - terms.get("scores", 0)
        if self.method != "full" and others:
            terms["adapter"] = others
        terms["optimizer"] = int(self._optimizer_bytes())
        return terms

    def phases(self, batch: int) -> dict[str, dict[str, int]]:
        """Bytes per term in each phase of a run, by phase."""
        if not self.is_trained:
            keys = 5 * self.num_masked  # float32 ranking keys and bool masks of all matrices at once
            largest = int(self.refresh_bytes * max(self.masked_numels))
            terms = {"process": self.process_bytes, "weights": self.weight_bytes, "masks": keys, "refresh": largest}
            return {"making the mask": terms} | self._measuring(keys)
        state = self._state_terms()
        micro = self.micro_batch(batch)
        phases = {
            "micro-batch": {
                **state,
                "gradients": micro.gradient_bytes,
                "activations": micro.activation_bytes,
                "allocator": micro.allocator_bytes,
            },
            # adamw_torch updates all tensors at once on a GPU, with a temporary of the size of what it updates.
            "optimizer step": {
                **state,
                "gradients": micro.all_gradient_bytes,
                "activations": micro.all_gradient_bytes if self.optim == "adamw_torch" and self.device == "cuda" else 0,
                "allocator": micro.allocator_bytes,
            },
        }
        if self.method == "mask":
            # On logged steps the gradients are still there, and a byte per weight tells which bits have flipped.
            ranked = max(self.masked_numels)
            if self.device == "cpu" and self.run.mask.mask_selection == "topk":
                ranked = min(ranked, CHUNK_NUMEL)
            phases["refresh"] = {
                **state,
                "gradients": micro.all_gradient_bytes,
                "refresh": int(self.refresh_bytes * ranked) + self.num_masked,
            }
        if str(getattr(self.run.training.eval_strategy, "value", self.run.training.eval_strategy)) != "no":
            seen = self.micro_batch(self.run.training.per_device_eval_batch_size, is_evaluation=True)
            phases["evaluation"] = {
                **state,
                "activations": seen.activation_bytes,
                "allocator": seen.allocator_bytes,
            }
        if self.device == "cpu":
            # A file's pages are resident while the weights are read from it.
            stored = _weight_dtype("auto", self.config).itemsize * self.num_parameters
            phases["loading"] = {"process": self.process_bytes, "weights": self.weight_bytes, "file": stored}
        return phases

    def _measuring(self, mask_bytes: int) -> dict[str, dict[str, int]]:
        """Of a fixed mask: the forward pass that measures inputs (Wanda) or what candidates are worth, if there is one.

        Both take the logits as a whole; a loss keeps them in float32 and in float64 beside.
        """
        candidates = self.run.method.num_candidates > 1
        if self.method != "wanda_mask" and not candidates:
            return {}
        rows = self.run.training.per_device_eval_batch_size if candidates else 1
        seen = self.micro_batch(rows, is_evaluation=True)
        logits = rows * self.length * self.config.get_text_config().vocab_size
        return {
            "measuring": {
                "process": self.process_bytes,
                "weights": self.weight_bytes,
                "masks": mask_bytes,
                "activations": seen.activation_bytes + logits * (self.dtype.itemsize + (12 if candidates else 0)),
                "allocator": seen.allocator_bytes,
            }
        }

    def peak_bytes(self, batch: int) -> int:
        """Bytes in all at the height of a run with micro-batches of ``batch`` rows."""
        return max(sum(terms.values()) for terms in self.phases(batch).values())

    def flops(self, batch: int) -> dict[str, int]:
        """FLOPs of one optimizer step."""
        if not self.is_trained:
            return {"forward": 0, "backward": 0, "total": 0}
        micro, times = self.micro_batch(batch), self.run.training.gradient_accumulation_steps
        forward, backward = times * micro.forward_flops, times * micro.backward_flops
        return {"forward": forward, "backward": backward, "total": forward + backward}

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
            with torch.autocast("cpu", self.compute_dtype, enabled=_is_autocast(self.run.training)):
                loss = -self.model(**inputs, fused_lm_head=True).log_probs.sum()
            forward_flops = live.flops
            if not is_evaluation:
                loss.backward()
            return MicroBatch(
                activation_bytes=live.peak - live.gradients_at_peak,
                gradient_bytes=live.gradients_at_peak,
                all_gradient_bytes=live.gradients,
                allocator_bytes=live.largest + 4 * live.largest_product if self.device == "cpu" else 0,
                forward_flops=forward_flops,
                backward_flops=live.flops - forward_flops,
            )


def _meta_model(config, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    # Flash attention, from whatever package, keeps what sdpa keeps.
    attention = "sdpa" if attention and attention not in ("eager", "sdpa") else attention
    try:
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, **({"attn_implementation": attention} if attention else {})
        )
    except (ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError) as error:
        raise UserError(
            f"the configuration makes no causal language model: {str(error).strip().splitlines()[0]}"
        ) from error
    if not layer_indices(name for name, _ in model.named_modules()):
        raise UserError(f"the configuration has no decoder layers ({type(model).__name__}); is it complete?")
    return model


def _weight_dtype(name: str, config) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    own = getattr(config, "dtype", None)
    return own if isinstance(own, torch.dtype) else torch.float32


def _is_autocast(training) -> bool:
    return bool(training.bf16 or training.fp16)


def _compute_dtype(training, weight_dtype: torch.dtype) -> torch.dtype:
    """The dtype matrices are multiplied in."""
    if not _is_autocast(training):
        return weight_dtype
    return torch.bfloat16 if training.bf16 else torch.float16


def _optimizer(training) -> str:
    name = str(getattr(training.optim, "value", training.optim))
    if name not in OPTIMIZER_BYTES:
        known = ", ".join(OPTIMIZER_BYTES)
        raise UserError(f"optim is {name!r}{did_you_mean(name, OPTIMIZER_BYTES)}; estimates are made for: {known}")
    return name


def _bits_per_weight(mask) -> dict[str, float]:
    """Size of a coded mask, measured on a random one, and the entropy no code can go below; 1 at most."""
    if mask.mask_selection == "threshold":
        return {"coded": 1.0, "bound": 1.0}  # how many weights fall below the threshold is not known before
    share = mask.mask_sparsity
    coded = 8 * encode_mask(random_mask(_SAMPLE_SHAPE, share, seed=0)).numel() / math.prod(_SAMPLE_SHAPE)
    bound = -sum(p * math.log2(p) for p in (share, 1 - share) if p > 0)
    return {"coded": coded, "bound": bound}


def _refresh_bytes(config: MaskConfig) -> float:
    """Bytes that a refresh takes at its height per weight of the part it looks at, measured on a random matrix."""
    scores = torch.randn(CHUNK_NUMEL, generator=torch.Generator().manual_seed(0))
    weight, out = torch.zeros_like(scores), torch.empty_like(scores)
    with LiveBytes([scores, weight, out]) as live:
        write_masked_(config, [out], [weight], [scores])
    return live.peak / scores.numel()
