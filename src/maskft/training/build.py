"""The parts of a run: rows, the base model, and its trainable parameters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from rich.console import Console
from transformers import PreTrainedModel, set_seed
from trl import ModelConfig, get_quantization_config

from maskft_common.errors import UserError, first_line
from maskft_common.files import from_anywhere, whole_folder
from maskft_common.layout import EMBEDDED_MODEL

from ..baselines.wanda import wanda_keys
from ..data.arguments import DataArguments
from ..data.prepared import Prepared, prepare
from ..gguf.header import read_head
from ..gguf.names import find_tensors
from ..loss import HeldoutLoss
from ..masks.codec import PREFIX
from ..masks.gguf import check_takes_mask
from ..masks.merge import ONE_LINE
from ..models import (
    check_model_source,
    check_tokenizer_fits,
    gguf_on_disk,
    is_gguf,
    load_model,
    load_tokenizer,
)
from ..tuner import MaskConfig, adapter_layers, start_scores
from ..tuner.config import DATA_STARTS
from ..tuner.quantized import keep_codes
from ..tuner.targets import resolve_targets
from .arguments import TrainingArguments
from .checks import check_quantised
from .masked_start import set_removed_to_zero
from .method_arguments import ADAPTER, PEFT, MaskArguments, MethodArguments, mask_config
from .peft_config import adapter_config


def unpack_embedded(folder: str) -> None:
    """Write the embedded model as an ordinary checkpoint; after an error the folder is removed."""
    with whole_folder(Path(folder)) as unpacked:
        tokenizer = load_tokenizer(EMBEDDED_MODEL)
        tokenizer.save_pretrained(unpacked)
        model = load_model(EMBEDDED_MODEL, "float32")
        model.save_pretrained(unpacked)


def load_tokenizer_of(source: ModelConfig, training: TrainingArguments):
    """Tokenizer of the base model, with the chat template of the arguments."""
    check_model_source(source.model_name_or_path)
    return load_tokenizer(
        source.model_name_or_path,
        training.chat_template_path,
        revision=source.model_revision,
    )


def load_data(
    args: DataArguments,
    training: TrainingArguments,
    tokenizer,
    console: Console,
) -> Prepared:
    """Read and tokenise the rows that ``args`` names."""
    data = prepare(
        args,
        tokenizer,
        text_field=training.dataset_text_field,
        max_length=training.max_length,
        # TRL's default is None, which means true for rows with a completion.
        completion_only_loss=training.completion_only_loss is not False,
        num_proc=training.dataset_num_proc,
    )
    console.print(f"data: {data.report['text']}", highlight=False)
    return data


def load_base(
    args: ModelConfig,
    tokenizer,
    method: str,
) -> PreTrainedModel:
    """Load the base model that ``args`` names; its embedding must have a row for every token of ``tokenizer``.

    Raises:
        UserError: If it cannot be loaded or does not fit the tokenizer, or if it is quantised and ``method`` is neither
            a learned mask nor an adapter of PEFT's.
    """
    options = {
        "revision": args.model_revision,
        "attn_implementation": args.attn_implementation,
        # None without load_in_4bit and load_in_8bit.
        "quantization_config": get_quantization_config(args),
    }
    # None would override what the model's own configuration says.
    given = {name: value for name, value in options.items() if value is not None}
    model = load_model(args.model_name_or_path, args.dtype, **given)
    # transformers sets it for a model that is quantised in its own files, too.
    if getattr(model, "is_quantized", False):
        check_quantised(method)
    check_tokenizer_fits(model, tokenizer)
    return model


def build_model(
    model: PreTrainedModel,
    method: MethodArguments,
    source: ModelConfig,
    mask: MaskArguments,
    seed: int,
):
    """Prepare the trainable parameters of the method: all weights, some layers, an adapter of PEFT's, or mask scores.

    Args:
        model: The base model.
        method: The method and its settings.
        source: Where the base model came from.
        mask: The settings of a mask.
        seed: Seed of an adapter's random start; the Trainer sets its seed later.

    Raises:
        UserError: If the method's settings do not fit the model.
    """
    set_seed(seed)
    # Before an adapter is added: a mask names the modules of the base model, without PEFT's prefix.
    set_removed_to_zero(model, method)

    if method.method == "full":
        model.requires_grad_(True)
        if method.partial_layers is not None or method.partial_target_modules is not None:
            _train_only_layers(model, method.partial_layers, method.partial_target_modules)
        return model

    if method.method == PEFT:
        # The tuner does it for masks. Over four-bit layers on a CPU, an evaluation would cost the adapter its gradient.
        keep_codes(model)
        config = adapter_config(method.peft_config or {})
        try:
            return with_adapter(model, config, source)
        except (*ONE_LINE, ImportError) as error:
            raise UserError(f"peft_config: PEFT does not take it for this model: {first_line(error)}") from error

    masked = with_adapter(model, mask_config(mask), source)
    check_gguf_takes_mask(masked, source.model_name_or_path, source.model_revision)
    return masked


def check_gguf_takes_mask(model: PeftModel, name_or_path: str, revision: str | None = None) -> None:
    """Check, before training over a GGUF file, that the mask can be written into it.

    Raises:
        UserError: If the file holds a mask already, or for the first masked layer whose tensor has no code for zero
            or is not in the file.
    """
    if not is_gguf(name_or_path):
        return
    # The model was loaded from it, so that a file on the hub is in the cache. None: the cache was just deleted.
    file = gguf_on_disk(name_or_path, revision)
    if file is None:
        return

    # Names in the base model: PEFT has put a prefix before them.
    shapes = {}
    for name, layer in adapter_layers(model, ADAPTER).items():
        base_name = name.removeprefix(PREFIX)
        shapes[base_name] = tuple(layer.weight.shape)
    head = read_head(file)
    check_takes_mask(head)
    # It raises for a tensor that is missing or cannot hold a zero.
    find_tensors(head, shapes)


def with_adapter(
    model: PreTrainedModel,
    config: PeftConfig,
    source: ModelConfig,
) -> PeftModel:
    """Add an adapter whose configuration names the base model and, unless it is `main`, its revision."""
    # "main" is TRL's default, and of a local folder there are no revisions.
    revision = None
    if source.model_revision != "main":
        revision = source.model_revision
    adapted = get_peft_model(model, config, revision=revision)
    # get_peft_model has written model.name_or_path there: a relative path would be valid in this folder only.
    adapted.peft_config[ADAPTER].base_model_name_or_path = from_anywhere(source.model_name_or_path)
    return adapted


def heldout_loss(
    model,
    tokenizer,
    args: TrainingArguments,
) -> HeldoutLoss:
    """Measures held-out rows without a trainer, in the dtype that training computes in."""
    # Without fp16 and bf16 the context is disabled, and the dtype is not used.
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    is_autocast = bool(args.fp16 or args.bf16)
    context = partial(
        torch.autocast,
        args.device.type,
        dtype,
        enabled=is_autocast,
    )
    return HeldoutLoss(
        model=model,
        batch_size=args.per_device_eval_batch_size,
        pad_token_id=tokenizer.pad_token_id or 0,
        context=context,
    )


def start_on_data(
    model: PeftModel,
    rows: Dataset,
    num_samples: int,
    device: torch.device,
) -> None:
    """Initialise scores in the order of ``init_scores``, if that order needs data.

    Args:
        model: The model with an untrained adapter.
        rows: Tokenised training rows.
        num_samples: Number of rows to use, at least 1.
        device: Device to compute on; the model is moved back.
    """
    if model.peft_config[ADAPTER].init_scores not in DATA_STARTS:
        return
    # Moved back, because the Trainer moves the model itself, to a device per process.
    before = model.device
    # In evaluation mode, because dropout would change the norms of inputs.
    model.to(device).eval()
    calibration_rows = rows["input_ids"][:num_samples]
    keys = wanda_keys(model, calibration_rows, ADAPTER)
    start_scores(model, keys, ADAPTER)
    model.to(before).train()


def _train_only_layers(
    model: PreTrainedModel,
    layers: Sequence[int] | None,
    target_modules: Sequence[str] | None,
) -> None:
    """Freeze all weights but those for which a mask of the same layers would have scores.

    Args:
        model: The model.
        layers: Numbers of decoder layers, from 0; None: all.
        target_modules: Names of linear layers, such as ``gate_proj``; None: all.

    Raises:
        UserError: If there is no such layer.
    """
    # The rules of a mask, so that both change the same layers.
    config = MaskConfig(
        layers_to_transform=None if layers is None else list(layers),
        target_modules="all-linear" if target_modules is None else list(target_modules),
    )
    try:
        resolve_targets(config, model)
    except UserError as error:
        # The message names the options of masks.
        message = str(error)
        message = message.replace("layers_to_transform", "partial_layers")
        message = message.replace("target_modules", "partial_target_modules")
        raise UserError(message) from None

    model.requires_grad_(False)
    for name, module in model.named_modules():
        # The model itself has an empty name.
        if name and check_target_module_exists(config, name):
            # The weight alone: masks have no scores for biases.
            module.weight.requires_grad_(True)
