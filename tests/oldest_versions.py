"""Print the lowest versions that ``pyproject.toml`` admits, as a constraints file for pip: ``make test-oldest``."""

import re
import tomllib
from pathlib import Path

EXTRAS = ("train", "lab", "test", "analysis", "alpaca", "demo", "eval", "tensorboard", "trackio")  # what the tests need


def lowest(requirement):
    """``trl[vllm]>=1.16,<2`` -> ``trl==1.16``; None where there is no lower bound (our own extras)."""
    found = re.match(r"([\w.-]+)[^<>=;]*.*?>=([\w.]+)", requirement)
    return found and f"{found[1]}=={found[2]}"


def lowest_versions(project):
    """One line per requirement of the project and of its extras for tests."""
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *(each for extra in EXTRAS for each in extras[extra])]
    return sorted({line for line in map(lowest, requirements) if line})


if __name__ == "__main__":
    file = Path(__file__).parents[1] / "pyproject.toml"
    print("\n".join(lowest_versions(tomllib.loads(file.read_text())["project"])))
