"""PEFT's own tests over masks: the test files of its source distribution, with their lists of methods replaced by ours.

Nothing of PEFT's is kept here: the files are read where they were unpacked, rewritten in memory, and run from a folder
for the time of the test. Failures that are known are in ``EXPECTED`` with their reasons, and each must say what its
reason says; nothing else may fail.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import peft
import pytest
import torch
import transformers

from tiny import tiny_gpt2, tiny_llama
from tiny_tokenizer import tiny_tokenizer

ARCHIVE = Path(sys.prefix) / "peft" / f"peft-{peft.__version__}.tar.gz"  # make test-slow fetches it
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ARCHIVE.is_file(), reason="needs PEFT's source distribution: make .venv/.peft"),
]
_IMPORT = "import maskft\nfrom maskft import MaskConfig\n"

# A mask has no start that changes nothing, which PEFT's `init_weights` turns off; models are folders, not on the hub.
_HELPERS = """

def set_init_weights_false(config_cls, kwargs):
    return kwargs


@contextmanager
def hub_online_once(model_id):
    yield
"""

# Name of a list in a file -> what it is replaced by.
MODELS = [
    ("MLP, one layer", "MLP", {"target_modules": ["lin0"], "sparsity": 0.3}),
    ("MLP, a name as a regular expression", "MLP", {"target_modules": "lin0", "sparsity": 0.3}),
    ("MLP, two layers", "MLP", {"target_modules": ["lin0", "lin1"], "sparsity": 0.3}),
    ("MLP, a layer beside", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "sparsity": 0.3}),
    ("MLP, logits", "MLP", {"target_modules": ["lin0"], "selection": "logit", "init_value": 0.005, "init_std": 0.01}),
    ("MLP, price", "MLP", {"target_modules": ["lin0"], "selection": "logit", "init_value": 0.005, "price": 0.1}),
    ("MLP, gumbel", "MLP", {"target_modules": ["lin0"], "selection": "gumbel", "init_value": 0.005}),
    ("MLP, hard concrete", "MLP", {"target_modules": ["lin0"], "selection": "hard_concrete", "init_value": 0.005}),
    ("MLP, threshold", "MLP", {"target_modules": ["lin0"], "selection": "threshold", "threshold": 0.01}),
    ("MLP, signed", "MLP", {"target_modules": ["lin0"], "rank_by": "signed", "sparsity": 0.3}),
    ("MLP, scores saved", "MLP", {"target_modules": ["lin0"], "save_scores": True, "sparsity": 0.3}),
    (
        "MLP, a layer excluded",
        "MLP",
        {"target_modules": ["lin0", "lin1"], "exclude_modules": ["lin1"], "sparsity": 0.3},
    ),
    ("embedding and Conv1D", "EmbConv1D", {"target_modules": ["conv1d"], "sparsity": 0.3}),
]


def cases() -> str:
    """The list ``TEST_CASES`` of PEFT's custom models as source text."""
    return "[" + ", ".join(f"({name!r}, {model!r}, MaskConfig, {options!r})" for name, model, options in MODELS) + "]"


LISTS = {
    "TEST_CASES": cases(),
    "ALL_PEFT_CONFIG_CLASSES": "[MaskConfig]",
    "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": "[('Two masks', 'Mask', MaskConfig, {'target_modules': ['lin0'], "
    "'sparsity': 0.3}, {'target_modules': ['lin0'], 'sparsity': 0.3, 'mask_seed': 1})]",
    "MIXED_ADAPTER_TEST_CASES": "[]",
}

# Why a test of PEFT's fails, and what the failure says: another message is another failure.
STARTS = "a mask removes weights before the first step, and PEFT expects a start that changes nothing"
CODED = "a loaded mask is its coded form: scores are read only where they were saved, in checkpoints"
PICKLED = "masks are saved as safetensors"
FLOAT32 = "scores stay float32 whatever the base is: in half precision they would tie at the cut"
PROGRESS = "gates with noise depend on the share of training done, which PEFT's loops do not set"
FSDP1 = "masks need FSDP2, whose shards are rows"
ANOTHER = "of another method of PEFT's, not of masks"
HUB = "loads a model or a data set from the hub"
CLOSE = "two masks of a tiny random model differ by less than the test's tolerance"
MESSAGES = {
    STARTS: r"assert False|AssertionError",
    CODED: r"KeyError: '.*mask_scores|holds a mask but not its scores|trained on other base weights|assert odict_keys"
    r"|^AssertionError$",
    PICKLED: r"masks are saved as safetensors",
    FLOAT32: r"^assert False$|^AssertionError|Could not determine the dtype of this adapter",
    PROGRESS: r"this mask depends on how far training is",
    FSDP1: r"is not sharded as masks need it: take FSDP2",
    ANOTHER: r"",
    HUB: r"huggingface\.co|offline|LocalEntryNotFound|couldn't find them in the cached files",
    CLOSE: r"assert False|AssertionError",
}
EXPECTED = {
    "test_adapter_dtype_autocast": [FLOAT32],
    "test_add_adapter_no_autocast_adapter_dtype": [FLOAT32],
    "test_disable_adapters": [STARTS],
    "test_disable_adapters_with_merging": [STARTS, PROGRESS],
    "test_inference_safetensors": [PROGRESS],
    "test_only_params_are_updated": [PROGRESS],
    "test_training_custom_models": [PROGRESS],
    "test_loading_model_requires_grad_set_correctly": [CODED],
    "test_loading_model_with_modules_to_save_requires_grad_set_correctly": [CODED],
    "test_parameters_after_loading_model": [CODED, PROGRESS],
    "test_save_pretrained": [CODED],
    "test_save_pretrained_pickle": [PICKLED],
    "test_save_pretrained_selected_adapters": [CODED],
    "test_save_pretrained_selected_adapters_pickle": [PICKLED],
    "test_save_load_roundtrip_direct_injection": [CODED],
    "test_save_load_roundtrip_fsdp_wrapped": [FSDP1],
    "test_merge_layers_multi": [CLOSE],
    "test_multiple_adapters_automatic_modules_to_save": [HUB],
    "test_multiple_adapters_no_needless_copy_modules_to_save": [HUB],
    "test_multiple_adapters_seq_cls_mixed_modules_to_save_merging_adapters": [HUB],
    "test_delete_adapter_multiple_adapters_with_trainable_token_indices": [HUB],
    "test_gpt2_dora_merge_and_unload": [HUB],
    "test_gpt2_dora_merge_and_unload_safe_merge": [HUB],
    "test_dora_save_and_load_remapping": [HUB],
    "test_pvera_reproducible": [HUB],
    "test_merge_and_unload_fixes_tie_word_embeddings_config": [HUB],
    "test_save_pretrained_targeting_lora_to_embedding_layer": [ANOTHER],
    "test_lora_embed_scale_is_applied": [ANOTHER],
    "test_lora_embed_scale_is_applied_mixed_batch": [ANOTHER],
    "test_lora_layer_replication": [ANOTHER],
    "test_generate_adalora_no_dropout": [ANOTHER],
    "test_active_adapters_prompt_learning": [ANOTHER],
    "test_save_shared_tensors": [HUB],
}
# Prompt learning adds no weights to layers, and its tests load models of their own from the hub.
OF_PROMPTS = re.compile(r"test_(prompt|prefix)_")
# File -> the classes that are run, all if "", and how many tests at least pass.
FILES = {
    "test_custom_models.py": (
        "TestPeftCustomModel or TestMultipleActive or TestRequiresGrad or TestPeftFsdpStateDict",
        700,
    ),
    "test_decoder_models.py": ("", 30),
    "test_encoder_decoder_models.py": ("", 20),
    "test_seq_classifier.py": ("", 10),
}


def write(tests: Path, name: str, package: Path, lists: dict[str, str]) -> None:
    """Write one of PEFT's files with our lists into ``package``."""
    text = (tests / name).read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    for node in reversed([node for node in ast.parse(text).body if isinstance(node, ast.Assign)]):
        target = node.targets[0]
        if isinstance(target, ast.Name) and target.id in lists:
            lines[node.lineno - 1 : node.end_lineno] = [f"{target.id} = {lists[target.id]}\n"]
    (package / name).write_text(_IMPORT + "".join(lines), encoding="utf-8")


def models(folder: Path) -> dict[str, list[str]]:
    """Tiny models with a tokenizer, by the name of PEFT's list they replace."""
    tokenizer, sizes = tiny_tokenizer(), {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    vocab = max(96, len(tokenizer))
    torch.manual_seed(0)
    t5 = transformers.T5Config(
        vocab_size=vocab, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    bert, roberta = (
        kind(vocab_size=vocab, hidden_size=32, **sizes)
        for kind in (transformers.BertConfig, transformers.RobertaConfig)
    )
    made = {
        "PEFT_DECODER_MODELS_TO_TEST": [tiny_llama(vocab_size=len(tokenizer)), tiny_gpt2()],
        "PEFT_ENCODER_DECODER_MODELS_TO_TEST": [transformers.T5ForConditionalGeneration(t5)],
        "PEFT_SEQ_CLS_MODELS_TO_TEST": [
            transformers.BertForSequenceClassification(bert),
            transformers.RobertaForSequenceClassification(roberta),
        ],
    }
    places = {}
    for name, group in made.items():
        places[name] = [str(folder / f"tiny-random-{type(model).__name__}") for model in group]
        for model, place in zip(group, places[name], strict=True):
            model.save_pretrained(place)
            tokenizer.save_pretrained(place)
    return places


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(folder, filter="data")
    tests, package = folder / f"peft-{peft.__version__}" / "tests", folder / "peft_tests"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(tests / "testing_common.py", package)
    helpers = (tests / "testing_utils.py").read_text(encoding="utf-8")
    (package / "testing_utils.py").write_text(helpers + _HELPERS, encoding="utf-8")
    lists = LISTS | {name: repr(places) for name, places in models(folder).items()}
    tasks = {"decoder_models": "CAUSAL_LM", "encoder_decoder_models": "SEQ_2_SEQ_LM", "seq_classifier": "SEQ_CLS"}
    for name in FILES:
        task = tasks.get(name.removeprefix("test_").removesuffix(".py"))
        write(
            tests, name, package, lists | {"ALL_CONFIGS": f"[(MaskConfig, {{'sparsity': 0.3, 'task_type': {task!r}}})]"}
        )
    return package


def failures(output: str) -> list[tuple[str, str]]:
    """Names of the tests that failed, with the message of each, from pytest's summary."""
    return re.findall(
        r"^(?:FAILED|ERROR) [^:]*::(?:\w+::)?(test_\w+)(?:\[.*?\])?(?: - (.*))?$", output, flags=re.MULTILINE
    )


def is_expected(test: str, message: str) -> bool:
    if OF_PROMPTS.match(test):
        return True
    return any(re.search(MESSAGES[reason], message) for reason in EXPECTED.get(test, ()))


def test_only_what_has_a_reason_fails_and_every_reason_is_needed(package, capsys):
    needed = set()
    # Wide, so that pytest's summary does not cut the messages.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "COLUMNS": "400"}
    for name, (chosen, least) in FILES.items():
        command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider"]
        command += [f"peft_tests/{name}", *(["-k", chosen] if chosen else [])]
        done = subprocess.run(command, cwd=package.parent, env=environment, capture_output=True, text=True)
        last = done.stdout.splitlines()[-1:]
        with capsys.disabled():
            print(name, *last)
        assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]  # 1: some failed
        assert int(re.search(r"(\d+) passed", last[0])[1]) >= least
        failed = failures(done.stdout)
        unexpected = Counter((test, message) for test, message in failed if not is_expected(test, message))
        assert not unexpected, f"{unexpected}\n{last}"
        needed |= {test for test, _ in failed}
    assert set(EXPECTED) <= needed, f"nothing fails any more: {set(EXPECTED) - needed}"
