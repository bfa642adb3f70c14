"""Print the lowest versions that ``pyproject.toml`` admits, as a constraints file for pip: ``make test-oldest``.

usage: python tests/oldest_versions.py [method]

``method``: those of the method alone; its bounds are lower than those of the extras that the whole test suite needs.
"""

import re
import sys
import tomllib
from pathlib import Path

EXTRAS = ("train", "lab", "test", "analysis", "alpaca", "demo", "eval", "tensorboard", "trackio")  # the tests need them


def lowest(requirement):
    """``trl[vllm]>=1.16,<2`` -> ``("trl", "1.16")``; None where there is no lower bound (our own extras)."""
    found = re.match(r"([\w.-]+)[^<>=;]*.*?>=([\w.]+)", requirement)
    return found and (found[1], found[2])


def as_numbers(version):
    return [int(part) for part in re.findall(r"\d+", version)]


def lowest_versions(project, extras=EXTRAS):
    """One line per requirement of the project and of some extras; of two bounds of a package the higher one."""
    optional = project["optional-dependencies"]
    requirements = [*project["dependencies"], *(each for extra in extras for each in optional[extra])]
    bounds = {}
    for name, version in filter(None, map(lowest, requirements)):
        bounds[name] = max(bounds.get(name, "0"), version, key=as_numbers)
    return sorted(f"{name}=={version}" for name, version in bounds.items())


if __name__ == "__main__":
    file = Path(__file__).parents[1] / "pyproject.toml"
    extras = () if sys.argv[1:] == ["method"] else EXTRAS
    print("\n".join(lowest_versions(tomllib.loads(file.read_text())["project"], extras)))
