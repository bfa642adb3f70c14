"""Files from elsewhere with random changes: each is read, or refused in one line. ``make fuzz``; a few in the tests.

usage: python tests/fuzzing.py [--minutes 10] [--seed 0] [--only TARGET ...]

Each target takes a valid file, changes values, keys or bytes of it, and reads it as the commands do. Anything raised
but :class:`UserError` is a finding, and so is a message of several lines, and a mask that is read and not the one that
was written. hypothesis makes the changes smaller until they are a case for a test.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from peft import PeftModel

import gguf
import tiny
from gguf import GGMLQuantizationType as Type
from maskft.gguf.header import read_head
from maskft.masks.gguf import merge_into_gguf, undo_in_gguf, verify_gguf
from maskft.masks.mask_set import MaskSet, read_config
from maskft.masks.merge import one_line
from maskft.masks.verify import verify
from maskft_common import layout
from maskft_common.errors import UserError
from maskft_lab.results.compare import compare
from maskft_lab.results.render import render
from maskft_lab.results.schema import build_result, build_task, items_fingerprint, metric_from_items, read_result

# Values that readers stumble over, beside any others.
ODD = [
    None,
    True,
    0,
    -1,
    1e400,
    -1e-9,
    float("nan"),
    2**70,
    10**400,
    "",
    " ",
    "\x1b[31m",
    "a\nb",
    "\ud800",
    "../x",
    "x" * 300,
]
ODD += [[], [[]], {}, {"": ""}, {"a": {"a": {}}}, "nan", "1e3", "0-3", "true", "~", "2026-11-26", "$(id)", "\\input{x}"]
values = st.recursive(
    st.one_of(st.sampled_from(ODD), st.integers(-3, 10), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)
numbers = st.integers(0, 2**30)
# (where, how, value): applied in turn.
changes = st.lists(
    st.tuples(numbers, st.sampled_from(["set", "delete", "rename", "copy", "wrap"]), values), min_size=1, max_size=3
)
edits = st.lists(
    st.tuples(numbers, st.sampled_from(["flip", "cut", "insert", "end", "repeat"]), st.binary(min_size=1, max_size=6)),
    min_size=1,
    max_size=4,
)


def places(content, path=()):
    """Paths of all entries below ``content``."""
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [found for key, value in entries for found in ((*path, key), *places(value, (*path, key)))]


def changed(content, how):
    """A copy of parsed JSON with random entries replaced, removed, renamed, copied elsewhere or wrapped."""
    content = copy.deepcopy(content)
    for where, kind, value in how:
        found = places(content)
        if not found:
            break
        *above, key = found[where % len(found)]
        holder = content
        for part in above:
            holder = holder[part]
        if kind == "set":
            holder[key] = copy.deepcopy(value)  # else a later change could put it into itself
        elif kind == "delete":
            del holder[key]
        elif kind == "wrap":
            holder[key] = [holder[key]]
        elif kind == "rename" and isinstance(holder, dict):
            holder[str(value)] = holder.pop(key)
        elif kind == "copy":
            other = found[(where // 7) % len(found)]
            taken = content
            for part in other:
                taken = taken[part] if isinstance(taken, dict | list) else taken
            holder[key] = copy.deepcopy(taken)
    return content


def edited(data: bytes, how) -> bytes:
    """Bytes with some flipped, cut out, inserted or repeated, or with a new end."""
    data = bytearray(data)
    for where, kind, piece in how:
        at = where % (len(data) + 1)
        if kind == "flip" and at < len(data):
            data[at] ^= piece[0] or 1
        elif kind == "cut":
            del data[at : at + len(piece) * 3]
        elif kind == "insert":
            data[at:at] = piece
        elif kind == "repeat":
            data[at:at] = data[at : at + 40]
        elif kind == "end":
            data = data[:at]
    return bytes(data)


def dumped(content) -> bytes | None:
    """Content as a JSON file; None where no file can hold it."""
    try:
        return json.dumps(content).encode("utf-8", "surrogatepass")
    except (ValueError, TypeError, RecursionError):
        return None


def accepts(read: Callable) -> bool:
    """Whether a reader takes its file; an error that is no line for the user is a finding."""
    try:
        read()
    except UserError as error:
        assert "\n" not in str(error), f"a message of several lines: {error}"
        return False
    return True


class Target:
    """A valid file in a folder of its own, and how it is read."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True)


class Results(Target):
    """Result files, and comparing them."""

    def __init__(self, folder: Path):
        super().__init__(folder)

        def result(name, shift):
            values = ((f"i{n}", f"{n}?", "r", 1.0 + shift * n, n + 1, n % 2) for n in range(6))
            names = ("id", "prompt", "reference", "nll", "num_tokens", "accuracy")
            items = [dict(zip(names, row, strict=True)) for row in values]
            metrics = {key: metric_from_items(items, key) for key in ("nll", "accuracy")}
            task = build_task(items, metrics, version="1", num_fewshot=0, fingerprint=items_fingerprint(items))
            model = {"name_or_path": "m", "seed": 0, "method": "mask"}
            return build_result(
                name, model, {"dtype": "float32"}, {"heldout": task}, training={"base": "m", "domain": "math"}
            )

        self.other, self.content = result("full", 0.1), result("mask", 0.05)

    def read(self, which, how, bytes_how) -> bool | None:
        data = dumped(changed(self.content, how))
        if data is None:
            return None
        data = edited(data, bytes_how)
        file = self.folder / ("result.json.gz" if which % 2 else "result.json")
        file.write_bytes(
            edited(gzip.compress(data, 1), bytes_how)
            if which % 4 == 3
            else gzip.compress(data, 1)
            if which % 2
            else data
        )

        def read():
            comparison = compare([self.other, read_result(file)])
            for form in ("terminal", "markdown", "json"):
                render(comparison, form)

        return accepts(read)


class Adapters(Target):
    """Adapter folders: the configuration, the file of masks, and loading both over a base."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        generator = torch.Generator().manual_seed(0)
        base = tiny.tiny_llama(num_layers=1)
        shapes = {
            f"model.layers.0.{name}": base.get_submodule(f"model.layers.0.{name}").weight.shape
            for name in ("self_attn.q_proj", "mlp.up_proj")
        }
        self.masks = {name: torch.rand(shape, generator=generator) > 0.1 for name, shape in shapes.items()}
        # Codings that the others have not: the bitmap, and few removed weights.
        self.masks["model.layers.0.self_attn.k_proj"] = torch.rand(16, 32, generator=generator) > 0.5
        self.masks["model.layers.0.mlp.down_proj"] = torch.rand(32, 48, generator=generator) > 0.002
        masks = MaskSet(self.masks)
        config = {"base_model_name_or_path": "org/model", "selection": "threshold", "sparsity": masks.sparsity}
        config["target_modules"] = [name.rpartition(".")[2] for name in masks]
        tiny.save_masks(self.masks, folder, **config)
        self.config = json.loads((folder / layout.ADAPTER_CONFIG).read_text())
        self.weights = (folder / layout.ADAPTER_WEIGHTS).read_bytes()

    def read(self, which, how, bytes_how) -> bool | None:
        config, weights = self.config, self.weights
        if which % 3 != 1:
            config = changed(config, how)
        if which % 3:
            weights = edited(weights, bytes_how)
        data = dumped(config)
        if data is None:
            return None
        (self.folder / layout.ADAPTER_CONFIG).write_bytes(edited(data, bytes_how) if which % 6 == 0 else data)
        (self.folder / layout.ADAPTER_WEIGHTS).write_bytes(weights)
        taken = accepts(lambda: verify(self.folder))
        if accepts(lambda: (read_config(self.folder), MaskSet.from_adapter(self.folder))):
            found = MaskSet.from_adapter(self.folder)
            assert found.keys() == self.masks.keys(), "masks of other layers"
            assert all(torch.equal(found[name], mask) for name, mask in self.masks.items()), "another mask"
        accepts(self.load)
        return taken

    def load(self):
        """As the commands do."""
        read_config(self.folder)
        with one_line(self.folder, "does not fit"):
            PeftModel.from_pretrained(tiny.tiny_llama(num_layers=1), str(self.folder))


class Gguf(Target):
    """GGUF files: a mask is merged into one, checked in one, and taken out."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        kinds = {"ffn_gate": Type.Q4_0, "ffn_up": Type.Q8_0, "attn_q": Type.Q4_0, "ffn_down": Type.F16}
        base = folder / "base.gguf"
        writer = gguf.GGUFWriter(base, "llama")
        writer.add_custom_alignment(32)
        writer.add_block_count(1)
        writer.add_head_count(4)
        writer.add_token_list(["a", "bc", "d"])
        writer.add_token_scores([0.5, 1.5, 2.5])
        for name, kind in kinds.items():
            weights = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).numpy()
            writer.add_tensor(f"blk.0.{name}.weight", gguf.quantize(weights, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

        self.mask = folder / "mask"
        generator = torch.Generator().manual_seed(1)
        names = ("mlp.gate_proj", "mlp.up_proj", "self_attn.q_proj")
        masks = {f"model.layers.0.{name}": torch.rand(64, 64, generator=generator) > 0.1 for name in names}
        tiny.save_masks(masks, self.mask)
        merge_into_gguf(self.mask, base, folder / "task.gguf")
        # Of weights any byte is as good as another: heads are changed.
        self.heads, self.weights = [], []
        for file in (base, folder / "task.gguf"):
            content, start = file.read_bytes(), read_head(file).data_start
            self.heads.append(content[:start])
            self.weights.append(content[start:])

    def read(self, which, how, bytes_how) -> bool | None:
        if not bytes_how:  # only changes of parsed JSON
            return None
        content = edited(self.heads[which % 2], bytes_how) + self.weights[which % 2]
        file, out, again = (self.folder / name for name in ("changed.gguf", "out.gguf", "again.gguf"))
        file.write_bytes(content)
        for path in (out, again):
            path.unlink(missing_ok=True)
        is_intact = accepts(lambda: verify_gguf(self.mask, file))
        is_base = accepts(lambda: merge_into_gguf(self.mask, file, out))
        if is_base:
            undo_in_gguf(self.mask, out, again)
            assert again.read_bytes() == content, "another base after --undo"
        assert not list(self.folder.glob(".*")), "a half-written file"
        return is_intact or is_base


TARGETS = {"results": Results, "adapters": Adapters, "gguf": Gguf}


def examine(target: Target, max_examples: int, number: int | None = None) -> Counter:
    """Read files with random changes; returns how many were read, refused, and could not be written.

    Args:
        target: What is changed and read.
        max_examples: How many.
        number: Seed; None: always the same files.

    Raises:
        BaseException: The finding, with the smallest changes that show it.
    """
    counts: Counter = Counter()

    # Most files are changed in one way only; both together are mostly refused for the bytes.
    @settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        derandomize=number is None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        print_blob=False,
    )
    @given(
        numbers, st.one_of(st.tuples(changes, st.just([])), st.tuples(st.just([]), edits), st.tuples(changes, edits))
    )
    def read_one(which, how):
        counts[{True: "read", False: "refused", None: "not written"}[target.read(which, *how)]] += 1

    (read_one if number is None else seed(number)(read_one))()
    return counts


def main() -> int:
    """Fuzz each target for some minutes; returns 1 where there were findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="for each target (default: 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    num_findings = 0
    for name in args.only:
        place = Path(tempfile.mkdtemp(prefix="fuzz-"))
        target, counts, number = TARGETS[name](place / name), Counter(), args.seed
        deadline = time.monotonic() + 60 * args.minutes
        while time.monotonic() < deadline:
            try:
                counts += examine(target, 200, number)
            except Exception:
                traceback.print_exc()
                counts["findings"] += 1
                num_findings += 1
            number += 1
        shutil.rmtree(place)
        print(f"{name}: {', '.join(f'{count:,} {what}' for what, count in sorted(counts.items()))}", flush=True)
    return int(num_findings > 0)


if __name__ == "__main__":
    sys.exit(main())
