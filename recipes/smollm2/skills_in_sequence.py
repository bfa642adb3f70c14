"""Tasks learned one after another: is the first still known after the last?

python recipes/smollm2/skills_in_sequence.py DATA OUT

DATA and the adapters of single tasks are those of skills_that_add_up.py; run that first with the same OUT, seed and
tasks. Compared, in the order of ``--tasks``:

- one deletion mask a task, and one LoRA of rank 16 a task, each used for its own task: a task with its own parameters
  cannot be forgotten; the price is bytes, and the task of a prompt has to be known;
- the union of the masks as it grows, for all tasks;
- one LoRA of rank 16, and all weights, trained on task after task;
- the same with replay: 6 % of the rows of each later task are rows of earlier ones;
- O-LoRA (Wang et al. 2023, https://arxiv.org/abs/2310.14152): a LoRA a task over those of the tasks before it, which
  are frozen and stay on; a penalty keeps its input directions orthogonal to theirs.

Accuracy is measured of every task seen so far after each task (exact, teacher-forced). Backward transfer: accuracy of a
task after the last one minus that just after its own training, mean over all tasks but the last. OUT gets
sequence.json with every answer and sequence.md. One core with bfloat16 instructions, three tasks: about an hour, 7 GB
of memory.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import skills_that_add_up as skills
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from skills_that_add_up import Measure, Task

from maskft.models import load_tokenizer
from maskft_common.command_line import run_script
from maskft_common.errors import UserError
from maskft_common.files import write_text
from maskft_common.layout import ADAPTER_WEIGHTS

REPLAY_SHARE = 0.06
O_LORA = "o-lora"
# Methods that are trained here; --methods chooses among them.
SEQUENTIAL = ("lora", "lora with replay", O_LORA, "full", "full with replay")
# The paper's coefficient of the penalty for its first tasks of text classification; not tuned here.
ORTHOGONALITY = 0.5


def main() -> None:
    """Train the methods that are missing, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the tasks' rows and of the probes")
    parser.add_argument("out", type=Path, help="folder that skills_that_add_up.py has written")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=SEQUENTIAL,
        default=list(SEQUENTIAL),
        help="what is trained on task after task (default: all)",
    )
    skills.add_options(parser)
    args = parser.parse_args()
    if len(args.tasks) < 2:
        raise UserError(f"--tasks {' '.join(args.tasks)}: a sequence has at least two")
    skills.check_adapters(args)
    torch.manual_seed(args.seed)

    tokenizer = load_tokenizer(args.model)
    tasks = [skills.read_task(args.data, name, tokenizer, args) for name in args.tasks]
    probes = skills.read_probes(args.data, tokenizer, args)
    measure = Measure(tokenizer, probes)

    # A second call continues where the first ended.
    file = args.out / "sequence.json"
    result = skills.continued_result(file, args)

    # Each is called only if its result is missing.
    methods: dict[str, Callable[[], dict]] = {
        "base": lambda: measure.all(skills.load(args.model).eval(), tasks),
        "mask a task": lambda: each_its_own("mask", tasks, measure, args),
        "lora a task": lambda: each_its_own("lora", tasks, measure, args),
        "union of masks": lambda: growing_union(tasks, measure, args),
    }
    for name in args.methods:
        run = orthogonal if name == O_LORA else one_after_another
        methods[name] = partial(run, name, tasks, measure, args)
    for name, run in methods.items():
        if name not in result:
            result[name] = run()
            write_text(file, json.dumps(result, indent=1) + "\n")  # whole or not at all
            print(f"{name}: done", flush=True)

    text = table(result)
    write_text(args.out / "sequence.md", text)
    print(text)


# Methods. Each returns a dictionary:
# - after: for each task, after training on it, {task: hits} of all tasks until then;
# - label_hits: {task: hits among its labels}, after the last task;
# - probes: losses, after the last task;
# - bytes: size of the parameters that it trained.


def each_its_own(
    method: str,
    tasks: Sequence[Task],
    measure: Measure,
    args,
) -> dict:
    """An adapter a task, each used for its own rows; forgetting is the mean over the adapters."""
    # All adapters are in one model, and one is active at a time.
    model = skills.with_adapters(tasks, method, args)
    alone = {}
    label_hits = {}
    probes = []
    for task in tasks:
        model.set_adapter(task.name)
        alone[task.name] = measure.hits(model, task.test)
        label_hits |= measure.label_hits(model, [task])
        probes.append(measure.probe_losses(model))

    # Later tasks do not touch the adapters of earlier ones, so their hits stay as they are.
    after = []
    for place in range(len(tasks)):
        seen = tasks[: place + 1]
        after.append({task.name: alone[task.name] for task in seen})

    mean_losses = {}
    for name in skills.PROBES:
        losses_of_probe = [losses[name] for losses in probes]
        mean_losses[name] = float(np.mean(losses_of_probe))
    return {
        "after": after,
        "label_hits": label_hits,
        "probes": mean_losses,
        "bytes": sum(file_bytes(method, task, args) for task in tasks),
    }


def growing_union(tasks: Sequence[Task], measure: Measure, args) -> dict:
    """The union of all masks so far, for every task."""
    model = skills.with_adapters(tasks, "mask", args)
    after = []
    for place in range(len(tasks)):
        seen = tasks[: place + 1]
        # PeftModel.set_adapter takes one name; the tuner's takes a list.
        model.base_model.set_adapter([task.name for task in seen])
        after.append({task.name: measure.hits(model, task.test) for task in seen})
    num_bytes = sum(file_bytes("mask", task, args) for task in tasks)
    return last_state(model, tasks, measure) | {"after": after, "bytes": num_bytes}


def one_after_another(
    name: str,
    tasks: Sequence[Task],
    measure: Measure,
    args,
) -> dict:
    """One LoRA, or all weights, trained on task after task."""
    method, *_ = name.split()
    has_replay = name.endswith("with replay")
    model = skills.untrained(method, args)

    after = []
    for place, task in enumerate(tasks):
        seen = tasks[: place + 1]
        rows = task.train
        if has_replay:
            rows = with_replay(task, tasks[:place], args.seed)
        # Optimizer and schedule start anew with each task.
        skills.learn(
            model,
            rows,
            skills.rate_of(method, task),
            skills.num_steps_of(task, args),
            measure.tokenizer,
            args.seed,
            label=f"{name} {task.name}",
        )
        after.append({other.name: measure.hits(model, other.test) for other in seen})

    num_trained = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            num_trained += parameter.numel()
    num_bytes = 4 * num_trained  # float32
    return last_state(model, tasks, measure) | {"after": after, "bytes": num_bytes}


def orthogonal(
    name: str,
    tasks: Sequence[Task],
    measure: Measure,
    args,
) -> dict:
    """O-LoRA: one LoRA a task, orthogonal to the earlier ones, which stay on; all of them answer every task."""
    model: PeftModel | None = None
    after = []
    for place, task in enumerate(tasks):
        seen = tasks[: place + 1]
        earlier = [other.name for other in tasks[:place]]
        # Another seed for each task: with the same one all LoRAs would start with the same A.
        torch.manual_seed(args.seed + place)
        config = skills.lora_config()
        if model is None:
            base = skills.load(args.model)
            model = get_peft_model(base, config, adapter_name=task.name)
        else:
            model.add_adapter(task.name, config)

        # set_adapter makes all adapters in the list trainable. Only the new one is to be trained.
        model.base_model.set_adapter([other.name for other in seen])
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(f".{task.name}." in parameter_name)
        skills.learn(
            model,
            task.train,
            skills.rate_of("lora", task),
            skills.num_steps_of(task, args),
            measure.tokenizer,
            args.seed,
            label=f"{name} {task.name}",
            penalty=partial(overlap, model, task.name, earlier),
        )
        after.append({other.name: measure.hits(model, other.test) for other in seen})

    # All LoRAs have to be kept, also those that were frozen.
    num_weights = 0
    for parameter_name, parameter in model.named_parameters():
        if ".lora_" in parameter_name:
            num_weights += parameter.numel()
    num_bytes = 4 * num_weights  # float32
    return last_state(model, tasks, measure) | {"after": after, "bytes": num_bytes}


def last_state(model, tasks: Sequence[Task], measure: Measure) -> dict:
    """Measures of a model after the last task, beside accuracy."""
    return {
        "label_hits": measure.label_hits(model, tasks),
        "probes": measure.probe_losses(model),
    }


def overlap(
    model: PeftModel,
    new: str,
    earlier: Sequence[str],
) -> torch.Tensor:
    """Sum over layers and earlier adapters of |A_earlier A_new^T|, times its coefficient; A is (r, in_features)."""
    total = torch.zeros(())
    # A maps a layer's input to the rank: orthogonal rows of two A read different parts of the input.
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        new_A = module.lora_A[new].weight
        for name in earlier:
            products = module.lora_A[name].weight @ new_A.T
            # Not in place: the sum is part of the loss.
            total = total + products.abs().sum()
    return ORTHOGONALITY * total


def with_replay(
    task: Task,
    earlier: Sequence[Task],
    seed: int,
) -> list[dict]:
    """Rows of a task, REPLAY_SHARE of them replaced by rows of earlier tasks, equally many of each."""
    rows = task.train
    if not earlier:
        return rows
    rng = random.Random(seed)
    num_replayed = round(REPLAY_SHARE * len(rows))
    replayed = []
    for place in range(num_replayed):
        task_in_turn = earlier[place % len(earlier)]
        replayed.append(rng.choice(task_in_turn.train))
    num_kept = len(rows) - num_replayed
    return rows[:num_kept] + replayed


def file_bytes(method: str, task: Task, args) -> int:
    """Size of the saved adapter of a task; LoRA's as if it was float32."""
    file = skills.adapter_folder(task, method, args) / ADAPTER_WEIGHTS
    if method == "mask":
        return file.stat().st_size
    num_bytes = 0
    with safe_open(str(file), framework="pt") as tensors:
        for name in tensors.keys():  # it is not a dictionary, and cannot be iterated over itself
            num_bytes += 4 * tensors.get_tensor(name).numel()
    return num_bytes


# The table


def table(result: dict) -> str:
    """Accuracy after the last task, backward transfer, bytes and forgetting as Markdown."""
    settings = result["settings"]
    tasks = settings["tasks"]
    base = result["base"]
    base_label_hits = base.get("label_hits", {})
    brackets = ""
    # The published sequence-seed0.json has none: it was measured before label hits were, and its models are not kept.
    if base_label_hits:
        brackets = "In brackets: the right one of the task's own labels, maybe written in another task's form. "
    lines = [
        "# Skills in sequence",
        "",
        f"`{settings['model']}`, seed {settings['seed']}, {settings['num_test']} test rows a task, in the order "
        f"{', '.join(tasks)}; accuracy exact and teacher-forced, in %, after the last task. Backward transfer: after "
        f"the last task minus just after its own, mean over all but the last. {brackets}Forgetting: nats per token, "
        "after minus before; with an adapter a task the mean over the adapters. Replay: 6 % of the rows of later "
        "tasks.",
        "",
        f"| learned | {' | '.join(tasks)} | mean | backward transfer, points | MB | instructions | wikipedia |",
        f"|---|{'---|' * len(tasks)}---|---|---|---|---|",
    ]
    # A row for each method, in the order in which they were measured.
    for name, found in result.items():
        if name in ("settings", "base"):
            continue
        cells = [name]
        hits_at_end = found["after"][-1]
        label_hits = found.get("label_hits", {})
        last = []  # accuracy after the last task, in %
        transfers = []
        for place, task in enumerate(tasks):
            cells.append(skills.percent(hits_at_end[task], label_hits.get(task)))
            accuracy = 100 * float(np.mean(hits_at_end[task]))
            # Just after its own training.
            hits_at_first = found["after"][place][task]
            accuracy_at_first = 100 * float(np.mean(hits_at_first))
            last.append(accuracy)
            transfers.append(accuracy - accuracy_at_first)

        transfer = float(np.mean(transfers[:-1]))  # nothing was learned after the last task
        cells.append(f"{np.mean(last):.1f}")
        cells.append(f"{transfer:+.1f}")
        cells.append(f"{found['bytes'] / 1e6:.1f}")
        for probe in skills.PROBES:
            cells.append(f"{found['probes'][probe] - base['probes'][probe]:+.3f}")
        lines.append(f"| {' | '.join(cells)} |")

    before = []
    for task in tasks:
        before.append(f"{task} {skills.percent(base['hits'][task], base_label_hits.get(task))}")
    lines += ["", f"Before training: {', '.join(before)} %."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_script(main)
