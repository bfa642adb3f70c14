"""The wheel alone, in an environment that has its required packages and nothing else; then with the extra train."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

METHOD = """
import sys
import tarfile
from importlib.util import find_spec
assert not [name for name in ("trl", "datasets", "scipy", "matplotlib", "lm_eval") if find_spec(name)]
sys.path.append(sys.argv[1])
import torch
from peft import PeftModel, get_peft_model
import maskft
assert not sys.argv[1] in maskft.__file__ and maskft.__version__
from maskft.masks.merge import merge
from tiny import tiny_llama, token_ids
from tiny_tokenizer import tiny_tokenizer

base = tiny_llama(vocab_size=264)
base.save_pretrained("base")
tiny_tokenizer().save_pretrained("base")
base.config._name_or_path = base.name_or_path = "base"
model = get_peft_model(base, maskft.MaskConfig(sparsity=0.1, task_type="CAUSAL_LM"))
scores = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.Adam(scores, 1e-2)
for _ in range(2):
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.eval().save_pretrained("mask")
expected = model(input_ids=token_ids()).logits
loaded = PeftModel.from_pretrained(tiny_llama(vocab_size=264), "mask").eval()
assert torch.equal(loaded(input_ids=token_ids()).logits, expected)
assert torch.equal(loaded.merge_and_unload()(input_ids=token_ids()).logits, expected)
print(merge("mask", "merged", base="base"))
"""
TYPES = "import maskft\nreveal_type(maskft.MaskConfig(sparsity=0.1).sparsity)\nreveal_type(maskft.topk_mask)\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built without a network."""
    place = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--quiet", "-w", place, ROOT]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [file] = place.glob("maskft-*.whl")
    return file


def with_what_they_need(requirements):
    """Names of installed distributions: those of the requirements, and what these require."""
    found, waiting = {}, [Requirement(line) for line in requirements]
    while waiting:
        requirement = waiting.pop()
        if requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name == "maskft" or (requirement.extras <= found.get(name, set()) and name in found):
            continue
        found[name] = found.get(name, set()) | requirement.extras
        for line in metadata.requires(name) or ():
            below = Requirement(line)
            extras = ("", *requirement.extras)
            if below.marker is None or any(below.marker.evaluate({"extra": extra}) for extra in extras):
                below.marker = None
                waiting.append(below)
    return sorted(found)


def environment(folder, wheel, requirements):
    """Python of a new environment that sees these installed packages and the wheel, and nothing else."""
    venv.create(folder / "venv", with_pip=False)
    [site] = (folder / "venv").glob("lib/python*/site-packages")
    for name in with_what_they_need(requirements):
        for file in metadata.files(name):
            top = file.parts[0]
            link, target = site / top, Path(metadata.distribution(name).locate_file(top))
            if top != ".." and top != "__pycache__" and not link.exists():
                link.symlink_to(target)
    zipfile.ZipFile(wheel).extractall(site)
    return folder / "venv" / "bin" / "python"


def run(python, folder, *words):
    done = subprocess.run(
        [str(python), *map(str, words)],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_method_alone_and_training_on_top(wheel, tmp_path):
    assert len(PROJECT["dependencies"]) <= 9
    python = environment(tmp_path, wheel, PROJECT["dependencies"])
    status, out, err = run(python, tmp_path, "-c", METHOD, ROOT / "tests")
    assert status == 0 and "bitwise equal to the masked model" in out, err
    status, out, err = run(python, tmp_path, "-m", "maskft", "verify", "mask")
    assert status == 0 and "sha256 of every mask matches" in out, err
    rows = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = "--model_name_or_path base --dataset_name rows.jsonl --output_dir out"
    status, out, err = run(python, tmp_path, "-m", "maskft", "train", *options.split())
    assert status == 2 and err.count("\n") == 1 and "pip install -e '.[train]'" in err
    (tmp_path / "with_train").mkdir()
    extra = [line for line in PROJECT["optional-dependencies"]["train"] if not line.startswith("maskft")]
    python = environment(tmp_path / "with_train", wheel, [*PROJECT["dependencies"], *extra])
    options += " --max_steps 2 --eval_split_size 4"
    options += " --bf16 false --keep_worse true --dataloader_pin_memory false"
    status, out, err = run(python, tmp_path, "-m", "maskft", "train", *options.split())
    assert status == 0 and (tmp_path / "out" / "adapter_model.safetensors").is_file(), err
    status, out, err = run(python, tmp_path, "-m", "maskft", "compare", "out")
    assert status == 2 and err.count("\n") == 1


def test_a_type_checker_outside_sees_the_names(wheel, tmp_path):
    pytest.importorskip("mypy", reason="needs maskft[dev]")
    python = environment(tmp_path, wheel, [])
    (tmp_path / "user.py").write_text(TYPES)
    command = ["--python-executable", python, "--ignore-missing-imports", "--cache-dir", tmp_path / "cache", "user.py"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *map(str, command)], cwd=tmp_path, env={}, capture_output=True, text=True
    )
    assert re.search(r'type is "(builtins\.)?float"', done.stdout), done.stdout
    assert "scores: Any, sparsity: " in done.stdout, done.stdout  # torch is not there


def test_the_source_distribution_holds_the_tests_helpers_and_recipes(tmp_path):
    for name in ("src", "tests", "recipes", "examples", "benchmarks"):
        shutil.copytree(
            ROOT / name, tmp_path / "here" / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path / "here")
    build = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=tmp_path / "here", capture_output=True)
    assert done.returncode == 0, done.stderr
    [archive] = tmp_path.glob("maskft-*.tar.gz")
    names = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    assert {"tests/tiny.py", "tests/reference.py", "tests/training/conftest.py", "tests/data/golden_rows.json"} <= names
    assert {str(file.relative_to(ROOT)) for file in (ROOT / "recipes").rglob("*.yaml")} <= names
