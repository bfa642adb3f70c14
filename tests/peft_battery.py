"""PEFT's own tests over masks: the test files of its source distribution, with their lists of methods replaced by ours.

Nothing of PEFT's is kept here: the files are read where they were unpacked, rewritten in memory, and run from a folder
for the time of the test.
"""

from __future__ import annotations

import ast
import shutil
import tarfile
from pathlib import Path

import peft

HERE = Path(__file__).parent
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
    ("MLP, one pool", "MLP", {"target_modules": ["lin0", "lin1"], "scope": "global", "sparsity": 0.3}),
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
    "ALL_CONFIGS": "[(MaskConfig, {'sparsity': 0.3, 'task_type': TASK})]",
    "MIXED_ADAPTER_TEST_CASES": "[]",
}


def unpack(archive: Path, folder: Path) -> Path:
    """The folder of PEFT's tests out of its source distribution."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / f"peft-{peft.__version__}" / "tests"


def write(tests: Path, name: str, folder: Path, **more: str) -> Path:
    """Write one of PEFT's files with our lists, and the helpers it imports, as a package into ``folder``."""
    package = folder / "peft_tests"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").touch()
    shutil.copy(tests / "testing_common.py", package)
    helpers = (tests / "testing_utils.py").read_text(encoding="utf-8")
    (package / "testing_utils.py").write_text(helpers + _HELPERS, encoding="utf-8")
    text = (tests / name).read_text(encoding="utf-8")
    lines, lists = text.splitlines(keepends=True), LISTS | more
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    for node in reversed(nodes):
        target = node.targets[0]
        if isinstance(target, ast.Name) and target.id in lists:
            lines[node.lineno - 1 : node.end_lineno] = [f"{target.id} = {lists[target.id]}\n"]
    file = package / name
    file.write_text(_IMPORT + "".join(lines), encoding="utf-8")
    return file
