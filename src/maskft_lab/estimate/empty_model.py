"""Models without data: parameters that have a shape and a dtype and take no memory."""

from __future__ import annotations

import copy
import logging

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from maskft.tuner.targets import layer_indices
from maskft_common.errors import UserError, first_line

# A configuration with wrong values fails somewhere in the model's constructor or in a forward pass, with any of these
# errors.
_ERRORS = (
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    ZeroDivisionError,
    RuntimeError,
)

# Even without data, a module takes some microseconds and kilobytes: a configuration may be a stranger's.
MAX_LAYERS = 2_000


def model_without_data(
    config: PretrainedConfig,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
) -> PreTrainedModel:
    """Return a model of a configuration, to be called under ``torch.device("meta")``.

    Args:
        config: The model's configuration.
        dtype: Of its parameters; None: the configuration's.
        attention: ``attn_implementation``; None: the model's default.

    Raises:
        UserError: If the configuration is not one of a causal language model with decoder layers.
    """
    text_config = config.get_text_config()  # of models with images too, the part that decodes text
    num_layers = getattr(text_config, "num_hidden_layers", None)
    if isinstance(num_layers, int) and num_layers > MAX_LAYERS:
        raise UserError(f"the configuration has {num_layers:,} layers; there are estimates up to {MAX_LAYERS:,}")

    options = {"dtype": dtype}
    if attention:
        # Flash attention, from whichever package, keeps the tensors that sdpa keeps.
        options["attn_implementation"] = "eager" if attention == "eager" else "sdpa"
    own_config = copy.deepcopy(config)  # from_config writes dtype and attention into it

    try:
        model = AutoModelForCausalLM.from_config(
            own_config,
            trust_remote_code=False,
            **options,
        )
    except _ERRORS as error:
        raise UserError(f"the configuration makes no causal language model: {first_line(error)}") from error

    # Decoder layers are the modules with an index in their name, as in `model.layers.0`.
    names = [name for name, _ in model.named_modules()]
    if not layer_indices(names):
        raise UserError(f"the configuration has no decoder layers ({type(model).__name__}); is it complete?")
    return model


def bytes_saved_for_backward(
    model: nn.Module,
    batch_sizes: tuple[int, ...],
    num_tokens: int,
    autocast: torch.dtype | None,
) -> list[int]:
    """Bytes that a forward pass saves for the backward pass, for each batch size.

    The model's meta tensors are replaced by fake CPU tensors: those choose the kernels of a CPU, meta tensors others.

    Args:
        model: A model without data, with a fused head (``add_fused_lm_head``).
        batch_sizes: Rows of each batch.
        num_tokens: Tokens of each row.
        autocast: The dtype of autocast; None: without.

    Raises:
        UserError: If the shapes of the model's tensors do not fit each other.
    """
    all_bytes = []
    # torch logs a traceback for shapes that do not fit.
    logger = logging.getLogger(FakeTensorMode.__module__)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        # Tensors made in this mode are fake: operations on them compute shapes and run no kernel.
        with FakeTensorMode():
            _make_fake(model)
            for num_rows in batch_sizes:
                saved_bytes = _saved_bytes(model, num_rows, num_tokens, autocast)
                all_bytes.append(saved_bytes)
    except _ERRORS as error:
        raise UserError(
            f"the model of this configuration cannot be computed ({first_line(error)}); is it complete?"
        ) from error
    finally:
        logger.setLevel(level)
    return all_bytes


def _saved_bytes(
    model: nn.Module,
    num_rows: int,
    num_tokens: int,
    autocast: torch.dtype | None,
) -> int:
    """Bytes that one forward pass of a model of fake tensors saves, without the model's own tensors."""
    # Autograd saves weights too, which are counted as such elsewhere.
    own_tensors = [*model.parameters(), *model.buffers()]
    own = {_storage_id(tensor) for tensor in own_tensors}

    # By id, as views of one storage count once. The storages are held: a later one could get the id of a freed one.
    saved: dict[int, torch.UntypedStorage] = {}

    # Autograd calls `keep` with each tensor that it saves. The plain way, memory before and after a forward pass, needs
    # the memory that is to be estimated.
    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage_id = _storage_id(tensor)
        if storage_id not in own:
            saved[storage_id] = tensor.untyped_storage()
        return tensor

    def give_back(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, give_back)
    autocast_context = torch.autocast(
        "cpu",
        autocast or torch.bfloat16,  # a dtype is needed even where it is off
        enabled=autocast is not None,
    )

    # B rows of T tokens. The ids are all 0: memory depends on shapes alone.
    ids_BT = torch.zeros(num_rows, num_tokens, dtype=torch.long)
    inputs = {
        "input_ids": ids_BT,
        "attention_mask": torch.ones_like(ids_BT),
        "labels": ids_BT,
        "use_cache": False,  # the cache of generation is not a part of training
    }
    with hooks, autocast_context, _GroupedProducts():
        model.train()  # dropout saves its mask
        # The head of `add_fused_lm_head`, as TRL's trainer calls it: log-probabilities, and no logits of all tokens.
        outputs = model(**inputs, fused_lm_head=True)
        outputs.log_probs.sum()

    # Of whole storages: a view keeps all of its storage in memory.
    sizes = [storage.nbytes() for storage in saved.values()]
    return sum(sizes)


class _GroupedProducts(TorchFunctionMode):
    """Multiply by the weights of several experts without data, in any dtype.

    torch's own shapes of a grouped product are of bfloat16 alone, where its kernel of the CPU takes float32 as well.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__name__", "").lstrip("_") == "grouped_mm":
            # S pairs of a token and an expert, sorted by the expert: (S, in) by (experts, in, out) is (S, out). The
            # product by one expert alone has this shape, and saves the same tensors for the backward pass.
            input_SI, weight_EIO = args
            # As the grouped product, which autocast does not know.
            with torch.autocast("cpu", enabled=False):
                return input_SI @ weight_EIO[0]
        return function(*args, **kwargs)


def _storage_id(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata  # fake tensors have no data_ptr


def _make_fake(model: nn.Module) -> None:
    """Replace all tensors of a model; tied tensors stay tied."""
    made: dict[torch.Tensor, torch.Tensor] = {}  # old tensor -> new; tied tensors are one object
    for module in model.modules():
        _replace(module._parameters, made)
        _replace(module._buffers, made)


def _replace(
    tensors: dict[str, torch.Tensor | None],
    made: dict[torch.Tensor, torch.Tensor],
) -> None:
    """Replace the values of a module's dictionary of parameters or buffers in place.

    Args:
        tensors: The dictionary.
        made: Old tensor -> new, of the whole model; added to.
    """
    for name, tensor in tensors.items():
        if tensor is None:  # such as the bias of a layer without one
            continue
        if tensor not in made:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, tensor.requires_grad)
            made[tensor] = fake
        tensors[name] = made[tensor]
