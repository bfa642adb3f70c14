"""Result files for the paper's tables: where they are, which row each belongs to, and which of several stand in a cell.

A result goes where its method, checkpoint, domain and base model say, which it states in ``model.method`` and its block
``training``; what a result does not state is read from the words of its name: ``full (last)``, ``random_mask [math]``,
``mixed mask``. A cell is of one study and of one result per seed.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import files
from ..errors import UserError
from ..files import read_text
from .schema import Result, read_result

# A word of a name -> the method it stands for; of several, the first.
METHOD_WORDS = {
    "random": "random_mask",
    "l1": "l1_mask",
    "lora": "lora",
    "mask": "mask",
    "mft": "mask",
    "full": "full",
    "fft": "full",
    "base": "pretrained",
    "pretrained": "pretrained",
}
DOMAIN_WORDS = {"math": "math", "coding": "coding", "code": "coding", "instruction": "instruction", "if": "instruction"}
LAST_WORDS = {"last", "continued", "complete", "end"}
MIXED_WORDS = {"mixed", "mix", "multi"}
GLOBAL_WORDS = {"global", "threshold"}
CONTROL_WORDS = {"warm", "restart", "annealed", "anneal", "partial", "wanda", "control"}


@dataclass(frozen=True)
class Identity:
    """Which row of the paper a result belongs to; None where the result does not say."""

    method: str | None
    checkpoint: str
    domain: str | None
    mixed: bool
    selection: str
    base: str | None


def read_results(places: Sequence[str]) -> list[Result]:
    """Read result files, and those in folders and all folders below, where other JSON files are passed over.

    Returns:
        The results in the order of the places. A file reached twice, or a copy of one, counts once.

    Raises:
        UserError: If a place does not exist or holds no result.
    """
    results = []
    for place in map(Path, places):
        files = [place]
        if place.is_dir():
            inside = sorted([*place.rglob("*.json"), *place.rglob("*.json.gz")])
            files = [file for file in inside if _is_result(file)]
        if not files:
            raise UserError(f"{place} holds no result.json and no other result file; give a folder of results")
        for result in map(read_result, files):
            if result not in results:
                results.append(result)
    return results


def _is_result(file: Path) -> bool:
    if not file.is_file():
        return False
    if file.name == files.RESULT:
        return True  # also a damaged one, so that reading it says so
    try:
        text = read_text(file)
        # A folder of runs is full of tokenizers, which would take long to parse.
        content = json.loads(text) if '"evaluation"' in text else None
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error):
        return False
    return isinstance(content, dict) and content.get("kind") == "evaluation"


def identify(result: Result) -> Identity | None:
    """Tell which row of the paper a result belongs to; None for a control that the paper does not have."""
    training = result.get("training") or {}
    words = re.findall(r"[a-z0-9]+", re.sub(r"\bpre[ _-]trained", "pretrained", result["name"].lower()))
    if training.get("variant") or CONTROL_WORDS.intersection(words):
        return None
    mixed = training.get("mixed")
    named = next((method for word, method in METHOD_WORDS.items() if word in words), None)
    if training.get("num_train_tokens") == 0:
        named = "pretrained"
    return Identity(
        method=result["model"]["method"] or named,
        checkpoint=training.get("checkpoint") or ("last" if LAST_WORDS.intersection(words) else "best"),
        domain=training.get("domain") or next((DOMAIN_WORDS[word] for word in words if word in DOMAIN_WORDS), None),
        mixed=bool(MIXED_WORDS.intersection(words)) if mixed is None else mixed,
        selection=training.get("selection") or ("threshold" if GLOBAL_WORDS.intersection(words) else "topk"),
        base=training.get("base"),
    )


def of_backbone(candidates: list, backbone: str) -> list:
    """Choose the results of the paper's base model, or, where there is none, those of one that is not in the paper."""
    theirs = [pair for pair in candidates if _backbone(pair[0].base) == backbone]
    others = [pair for pair in candidates if _backbone(pair[0].base) is None]
    bases = sorted({identity.base for identity, _ in others if identity.base})
    if not theirs and len(bases) > 1:
        raise UserError(f"the results are of several base models, {', '.join(bases)}; give those of one")
    return theirs or others


def _backbone(base: str | None) -> str | None:
    """Return the paper's name of a base model, or None for one that the paper does not use."""
    text = re.sub(r"[^a-z0-9]", "", (base or "").lower())
    return next(
        (name for word, name in (("llama27b", "LLaMA2-7B"), ("llama318b", "LLaMA3.1-8B")) if word in text), None
    )


def broadest_study_first(candidates: list) -> list:
    """Order the results such that in each domain those of the study with most rows of the tables come first.

    So a main study goes before an ablation that has some of the same models.
    """
    rows: dict[tuple, set] = {}
    for identity, result in candidates:
        rows.setdefault((study_of(result), identity.domain), set()).add((identity, result["model"]["seed"]))
    return sorted(candidates, key=lambda each: -len(rows[study_of(each[1]), each[0].domain]))


def of_one_study(chosen: list) -> list:
    """Keep the results of one study, that of the first: seeds of two studies are not seeds of one thing."""
    chosen = [each for each in chosen if each[0].domain] or chosen  # those that state their domain
    return [each for each in chosen if study_of(each[1]) == study_of(chosen[0][1])]


def one_per_seed(chosen: list, place: str, same_value_is_fine: bool = False) -> list:
    """Refuse two results of one seed; of two evaluations of one model, by a study that changed, keep the newest."""
    by_seed: dict = {}
    for each in chosen:
        # Every study measures the pre-trained model, and whatever its seed, nothing was trained.
        is_pretrained = each[0].method == "pretrained"
        key = None if is_pretrained else each[1]["model"]["seed"]
        other = by_seed.setdefault(key, each)
        if model_of(other[1]) is not None and model_of(other[1]) == model_of(each[1]):
            by_seed[key] = max(other, each, key=lambda one: one[1]["created"])
        elif other is not each and not ((same_value_is_fine or is_pretrained) and other[2] == each[2]):
            names = f"{other[1]['name']!r} and {each[1]['name']!r}"
            raise UserError(
                f"{names} are of one seed and both stand for {place}; give one of them, or say in their block "
                "'training' how they differ"
            )
    return list(by_seed.values())


def study_of(result: Result) -> str | None:
    """Return the name of the study that a result is of; None for one of none."""
    return (result.get("study") or {}).get("study")


def model_of(result: Result) -> tuple | None:
    """What tells that two results of studies are of one model: hash of the run, and which of its models it is."""
    study = result.get("study") or {}
    return (study["run"].rpartition("-")[2], study["role"]) if "run" in study and "role" in study else None


def name_of(result: Result) -> str:
    """Name of a result, with its study's where it is of one."""
    return result["name"] if study_of(result) is None else f"{result['name']} of {study_of(result)}"
