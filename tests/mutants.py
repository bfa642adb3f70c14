"""Mutation tests, by mutmut: every operator, constant and argument of a module is changed, one at a time.

A mutant is killed where a test of ``MODULES`` fails. ``python tests/mutants.py [MODULE ...]`` runs modules one after
another, each in a copy of the sources below ``build/mutants/``, and prints the shares and the survivors' differences.
mutmut imports once and forks for each mutant, so that a mutant costs the seconds of its tests alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "mutants"
# Module -> nearest tests, the fastest first: the first that fails ends the run of a mutant. Simulations of a minute are
# left out below.
MODULES = {
    "maskft/masking.py": ["tests/test_masking.py"],
    "maskft/loss.py": ["tests/test_loss.py"],
    "maskft/weights.py": ["tests/test_weights.py"],
    "maskft/data/splits.py": ["tests/data/test_splits.py", "tests/data/test_data.py"],
    "maskft/tuner/config.py": ["tests/tuner/test_config.py"],
    "maskft/tuner/layer.py": ["tests/tuner/test_layer.py", "tests/tuner/test_plain.py", "tests/quant/test_layers.py"],
    "maskft/tuner/model.py": ["tests/tuner/test_plain.py", "tests/tuner/test_model.py"],
    "maskft/training/checkpoints.py": ["tests/training/test_output_folder.py"],
    "maskft/training/manifest.py": ["tests/training/test_manifest.py"],
    "maskft_lab/results/statistics.py": [
        "tests/results/test_statistics_by_hand.py",
        "tests/results/test_statistics.py",
    ],
}
LEFT_OUT = {
    # mutmut adds calls between the warning and the caller.
    "maskft/tuner/config.py": "not points_at_the_line",
    # torch.compile, and many models of functional_call.
    "maskft/tuner/layer.py": "not compile and not noise and not passed_in",
    "maskft/tuner/model.py": "not compile and not noise and not passed_in",
    "maskft_lab/results/statistics.py": "not covers_in_93_to_97_percent and not holm_holds_over_methods",
}
SETTINGS = """\
[tool.mutmut]
source_paths = ["src"]
only_mutate = ["src/{module}"]
pytest_add_cli_args_test_selection = {tests}
pytest_add_cli_args = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", {selected}]
{pytest}
"""


def main() -> None:
    """Run the modules that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(MODULES)} (default: all)")
    parser.add_argument("--workers", type=int, default=1, help="mutants at one time (default: 1)")
    options = parser.parse_args()
    unknown = [module for module in options.modules if module not in MODULES]
    if unknown:
        parser.error(f"no module {unknown[0]!r}; there are {', '.join(MODULES)}")
    for module in options.modules or MODULES:
        run(module, options.workers)


def run(module: str, workers: int) -> None:
    """Test the mutants of one module and print how many were killed, and those that were not."""
    folder = BUILD / module.removesuffix(".py").replace("/", ".")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    tests = json.dumps(MODULES[module])
    selected = json.dumps(LEFT_OUT.get(module, ""))
    settings = SETTINGS.format(module=module, tests=tests, selected=selected, pytest=pytest_settings())
    (folder / "pyproject.toml").write_text(settings)

    # mutmut puts its own copy of the sources on the path; another one there would hide the mutants.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    mutmut = [sys.executable, "-m", "mutmut"]
    with open(folder / "log.txt", "w") as log:
        command = [*mutmut, "run", "--max-children", str(workers)]
        subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)

    results = subprocess.run([*mutmut, "results", "--all", "true"], cwd=folder, env=environment, capture_output=True)
    states = dict(line.strip().split(": ") for line in results.stdout.decode().splitlines() if ": " in line)
    if not states:
        raise SystemExit(f"{module}: mutmut ended without results; see {folder / 'log.txt'}")

    survivors = []
    num_equivalent = 0
    for mutant, state in states.items():
        if state in ("killed", "timeout"):
            continue
        shown = subprocess.run([*mutmut, "show", mutant], cwd=folder, env=environment, capture_output=True).stdout
        changed = [line for line in shown.decode().splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
        if is_equivalent(changed):
            num_equivalent += 1
        else:
            survivors.append(f"{mutant} ({state})\n" + "\n".join(changed))

    num_mutants = len(states) - num_equivalent
    num_killed = num_mutants - len(survivors)
    share = 100 * num_killed / num_mutants
    print(f"{module}: {num_killed} of {num_mutants} killed, {share:.1f} %; {num_equivalent} without effect left out")
    for survivor in survivors:
        print(f"\n{survivor}", flush=True)


# Changes without effect: ``strict=`` of sequences whose lengths the lines before made equal, the default device where
# the only device is the CPU, and the type that ``cast`` names for type checkers.
WITHOUT_EFFECT = re.compile(r", *strict=\w+|, *device=[\w.]+|(?<=\bcast\()\w+(?=, )|, *(?=\))")


def is_equivalent(changed: list[str]) -> bool:
    """Whether the lines before and after a change differ in nothing but arguments that have no effect here."""
    before = [WITHOUT_EFFECT.sub("", line[1:]) for line in changed if line.startswith("-")]
    after = [WITHOUT_EFFECT.sub("", line[1:]) for line in changed if line.startswith("+")]
    return before == after


def pytest_settings() -> str:
    """The section of the project's own settings for pytest."""
    text = (ROOT / "pyproject.toml").read_text()
    start = text.index("[tool.pytest.ini_options]")
    section = text[start:].split("\n[", 1)[0]
    return "\n".join(line for line in section.splitlines() if not line.startswith("testpaths"))


if __name__ == "__main__":
    main()
