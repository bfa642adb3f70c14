"""Load what is to be evaluated: a model, or a model with an adapter over it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError

from ..adapter.mask_set import read_config
from ..adapter.merge import adapter_tokenizer
from ..data.tokenizing import tokenizer_rules
from ..errors import UserError, first_line
from ..files import ADAPTER_CONFIG, TRAINING, digest, digest_file, digest_tensors, holds_adapter
from ..models import (
    check_model_source,
    check_tokenizer_fits,
    load_config,
    load_model,
    load_tokenizer,
)

NO_ADAPTER = "none"  # the name under which the base model itself is evaluated among adapters
# Fields of an adapter_config.json that change no output: where the base was, how it was trained, who wrote it.
_NOT_OF_THE_OUTPUT = ("base_model_name_or_path", "recipe", "inference_mode", "peft_version", "revision")

# And of a model's configuration, beside those that begin with an underscore; the dtype is a setting of the evaluation.
_NOT_OF_THE_MODEL = ("transformers_version", "dtype", "torch_dtype", "architectures", "attn_implementation")


@dataclass
class Loaded:
    """A model ready to evaluate, and what is known of it.

    Args:
        model: The model; None where vLLM loads it.
        tokenizer: Its tokenizer.
        facts: What goes into its result file.
        source: The base model's name or folder.
        identity: A text that changes with the weights.
        selected_on: Ids of the held-out rows that it was measured on while it was trained, and hashes of their prompts.
    """

    model: Any
    tokenizer: Any
    facts: dict
    source: str
    identity: str
    selected_on: dict[str, str] = field(default_factory=dict)


def load_for_evaluation(
    model_name_or_path: str | None,
    adapter: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    revision: str | None = None,
) -> Loaded:
    """Load a model by name, a mask adapter (masked in memory, no merge needed) or a LoRA adapter; see `load_each`."""
    return next(load_each(model_name_or_path, [adapter] if adapter else [], dtype, device, revision=revision))


def load_each(
    model_name_or_path: str | None,
    adapters: Sequence[str] = (),
    dtype: str = "float32",
    device: str | None = None,
    chat_template_path: str | None = None,
    revision: str | None = None,
) -> Iterator[Loaded]:
    """Load a base model once, and put one adapter after another over it.

    What was yielded is no longer to be used when the next is asked for: it is the same model.

    Args:
        model_name_or_path: Base model; may be None when the adapters name it. An adapter folder is taken as one.
        adapters: Adapter folders; ``none`` is the base model itself. None at all: the base model.
        dtype: float32, bfloat16, float16 or auto.
        device: Where to run; default: the first GPU, else the CPU.
        chat_template_path: A ``.jinja`` file that becomes the tokenizers' chat template.
        revision: Of a hub model; default: the one that the adapters were trained on, else the newest.

    Raises:
        UserError: If a folder is not what it should be, or the adapters belong to different base models.
    """
    if not adapters and model_name_or_path is not None and holds_adapter(model_name_or_path):
        model_name_or_path, adapters = None, [model_name_or_path]
    adapters = list(adapters) or [NO_ADAPTER]
    base_name = _base_name(model_name_or_path, adapters)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    revision = revision or _named_revision(adapters, base_name) or "main"
    model = load_model(base_name, dtype, revision=revision)
    fingerprint = model_fingerprint(model)
    configuration = {**model.config.to_diff_dict(), "generation": model.generation_config.to_diff_dict()}
    wrapped, kind = None, None
    for number, adapter in enumerate(adapters):
        new_kind = None if adapter == NO_ADAPTER else _peft_type(adapter)
        if wrapped is not None and new_kind != kind:  # one PeftModel holds adapters of one kind
            model, wrapped = wrapped.unload(), None
            if model_fingerprint(model) != fingerprint:
                raise RuntimeError(f"taking off an adapter of kind {kind} did not give the base model back")
        if new_kind is None:
            tokenizer = load_tokenizer(base_name, chat_template_path, revision=revision)
        elif wrapped is None:
            with _one_line(adapter, f"does not fit {base_name!r}"):
                wrapped = PeftModel.from_pretrained(model, adapter, adapter_name=f"adapter_{number}")
        else:
            previous = wrapped.active_adapter
            with _one_line(adapter, f"does not fit {base_name!r}"):
                wrapped.load_adapter(adapter, adapter_name=f"adapter_{number}")
            wrapped.set_adapter(f"adapter_{number}")
            wrapped.delete_adapter(previous)
        kind = new_kind
        facts = {"name_or_path": _portable(base_name), "fingerprint": fingerprint}
        if kind is None:
            facts |= _training_facts(base_name)
        else:
            tokenizer = adapter_tokenizer(adapter, base_name, chat_template_path, revision=revision)
            facts |= {
                "adapter": _portable(adapter),
                "adapter_sha256": adapter_sha256(adapter),
                **_adapter_facts(adapter, kind),
            }
        evaluated = model if wrapped is None else wrapped
        check_tokenizer_fits(evaluated, tokenizer)
        facts["config_sha256"] = config_sha256(configuration, tokenizer)
        identity = f"{fingerprint}+{facts['adapter_sha256']}" if kind else fingerprint
        selected_on = _selected_on(base_name) | ({} if kind is None else _selected_on(adapter))
        yield Loaded(evaluated.to(device).eval(), tokenizer, facts, base_name, identity, selected_on)


def _check_device(device: str) -> None:
    """Refuse a device that is not here, before a model is loaded for it."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"device {device!r} cannot be used ({first}); name another: cpu, cuda, cuda:1, mps") from None


def no_model(name: str) -> Iterator[Loaded]:
    """For outputs that were made elsewhere: nothing but the name under which they are reported."""
    return iter([Loaded(None, None, {"name_or_path": name}, name, name)])


def load_for_vllm(model_name_or_path: str | None, adapters: Sequence[str] = ()) -> Iterator[Loaded]:
    """What `load_each` yields, without the model: vLLM loads a merged folder or a hub model itself.

    Raises:
        UserError: If vLLM is not installed, or there is an adapter.
    """
    adapters = list(adapters) or [model for model in [model_name_or_path] if model and holds_adapter(model)]
    if adapters:
        raise UserError(f"vLLM does not know masks: run maskft merge on {adapters[0]!r}, and name the merged folder")
    if importlib.util.find_spec("vllm") is None:
        raise UserError("backend vllm needs vLLM, which is not installed; run: pip install vllm, or use --backend hf")
    source = _base_name(model_name_or_path, [])
    identity = _files_sha256(source) if Path(source).is_dir() else f"{source}@{_revision(source)}"
    fingerprint = identity if Path(source).is_dir() else None
    tokenizer = load_tokenizer(source)
    facts = {
        "name_or_path": _portable(source),
        "fingerprint": fingerprint,
        "config_sha256": config_sha256(load_config(source).to_diff_dict(), tokenizer),
        **_training_facts(source),
    }
    return iter([Loaded(None, tokenizer, facts, source, identity)])


def model_fingerprint(model) -> str:
    """sha256 over the names, dtypes, shapes and bytes of all weights."""
    weights = sorted(model.state_dict().items())
    return digest_tensors((f"{name} {tensor.dtype} {tuple(tensor.shape)}", tensor) for name, tensor in weights)


def config_sha256(configuration: Mapping, tokenizer) -> str:
    """sha256 over what changes outputs in a model's configuration and in its tokenizer, chat template apart."""
    return digest({"configuration": _of_the_output(configuration), **tokenizer_rules(tokenizer)})


def _of_the_output(value):
    if not isinstance(value, Mapping):
        return value
    kept = {str(key): _of_the_output(each) for key, each in value.items()}
    return {key: each for key, each in kept.items() if key not in _NOT_OF_THE_MODEL and not key.startswith("_")}


def _files_sha256(folder: str) -> str:
    """sha256 over a model folder's weight files and configuration: what vLLM reads, and we do not load."""
    names = ("*.safetensors", "*.bin", "config.json", "generation_config.json")
    found = sorted(file for name in names for file in Path(folder).glob(name))
    return digest([[file.name, digest_file(file)] for file in found])


def _revision(name: str) -> str | None:
    """The commit of a hub model."""
    return getattr(load_config(name), "_commit_hash", None)


def adapter_sha256(folder: str) -> str:
    """sha256 over an adapter's weights and what its ``adapter_config.json`` says about their use."""
    config = json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    used = {
        # PEFT writes sets, target_modules for one, in no fixed order.
        key: sorted(value, key=str) if isinstance(value, list) else value
        for key, value in config.items()
        if key not in _NOT_OF_THE_OUTPUT
    }
    weights = b"".join(file.read_bytes() for file in sorted(Path(folder).glob("adapter_model.*")))
    return digest(json.dumps(used, sort_keys=True).encode() + weights)


def _base_name(model_name_or_path: str | None, adapters: Sequence[str]) -> str:
    """The base model's name, and a check of all folders before anything is loaded."""
    named = {}
    for adapter in adapters:
        if adapter == NO_ADAPTER:
            continue
        if not holds_adapter(adapter):
            raise UserError(f"{adapter!r} is not an adapter folder: it has no adapter_config.json")
        named[adapter] = _peft_config(adapter).base_model_name_or_path
    if model_name_or_path is not None:
        check_model_source(model_name_or_path)
        return model_name_or_path
    if not named:
        raise UserError("name a model: --model_name_or_path or --adapter")
    if len(set(named.values())) > 1:
        raise UserError(
            "the adapters belong to different base models ("
            + ", ".join(f"{Path(adapter).name}: {base}" for adapter, base in named.items())
            + "); evaluate them one by one"
        )
    base = next(iter(named.values()))
    if not base:
        raise UserError(f"the adapter {next(iter(named))!r} does not name its base model; pass --model_name_or_path")
    return base


def _named_revision(adapters: Sequence[str], base: str) -> str | None:
    """The revision of ``base`` that the adapters were trained on; None where they do not say or it is another model."""
    configs = [_peft_config(adapter) for adapter in adapters if adapter != NO_ADAPTER]
    named = {config.revision for config in configs if config.base_model_name_or_path == base}
    if len(named) > 1:
        shown = ", ".join(sorted(str(revision or "the newest") for revision in named))
        raise UserError(f"the adapters belong to different revisions of {base!r} ({shown}); evaluate them one by one")
    return next(iter(named), None)


def _peft_config(adapter: str) -> PeftConfig:
    with _one_line(adapter, "has no adapter_config.json that PEFT can read"):
        return PeftConfig.from_pretrained(adapter)


@contextlib.contextmanager
def _one_line(adapter: str, problem: str) -> Iterator[None]:
    """Make one line of the errors that PEFT raises for an adapter."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, OSError, SafetensorError) as error:
        raise UserError(
            f"adapter {adapter!r} {problem} ({type(error).__name__}: {first_line(error)}); check both"
        ) from error


def _peft_type(adapter: str) -> str:
    kind = _peft_config(adapter).peft_type
    return str(getattr(kind, "value", kind))


def _adapter_facts(adapter: str, kind: str) -> dict:
    if kind != "MASK":
        return {"method": kind.lower(), **_training_facts(adapter)}
    config = read_config(adapter)
    return {
        "mask_fingerprint": config.mask_sha256,
        "method": config.recipe.get("method", "mask"),
        "seed": config.recipe.get("seed"),
    }


def training_seed(source: str | None) -> int | None:
    """The training seed that a folder of a model or an adapter tells; None if it tells none."""
    if source is None or not Path(source).is_dir():
        return None
    facts = _adapter_facts(source, _peft_type(source)) if holds_adapter(source) else _training_facts(source)
    return facts.get("seed")


def _portable(name: str) -> str:
    """A result file is shared: a folder is named by its last component, a hub model in full."""
    return Path(name).name if Path(name).exists() else name


def _training_facts(folder: str) -> dict:
    """Method and seed of a folder that ``maskft train`` wrote."""
    recipe = _training(folder).get("recipe")
    return {"method": recipe["method"], "seed": recipe["seed"]} if recipe else {}


def _selected_on(folder: str) -> dict[str, str]:
    return _training(folder).get("data", {}).get("selected_on", {})


def _training(folder: str) -> dict:
    file = Path(folder) / TRAINING
    return json.loads(file.read_text()) if file.is_file() else {}
