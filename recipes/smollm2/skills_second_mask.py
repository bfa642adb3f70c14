"""Can the second of two masks be trained so that their union keeps more of both tasks?

python recipes/smollm2/skills_second_mask.py DATA OUT --first banking77 --second sst2

DATA and the masks of single tasks are those of skills_that_add_up.py; run that first with the same OUT, seed and tasks.
The second task's mask is trained again, in one way at a time:

- on top: over the base from which the first mask has removed its weights;
- apart: it may not remove weights that the first removes;
- among others: in every step, other weights of the same layers are removed at random, as many as the first removes;
- price 3: each removed weight costs three times as much, so fewer are removed.

They are compared with the union of the masks that were trained alone. Accuracy is exact and teacher-forced, on test
rows. OUT gets second_mask-FIRST-SECOND.json with every answer, and the table as .md. Four minutes a way on one core
with bfloat16 instructions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import skills_that_add_up as skills
import torch
from peft import get_peft_model
from skills_that_add_up import Measure, Task
from torch import Tensor

from maskft import MaskConfig, current_masks
from maskft.models import load_tokenizer
from maskft_common.command_line import run_script
from maskft_common.files import write_text

# A score that training cannot bring below the cut at 0: AdamW moves a score by at most about the sum of the learning
# rates, 0.12 in 48 steps at 5e-3.
ALWAYS_KEPT = 1.0
WAYS = ("on top", "apart", "among others", "price 3")

Masks = dict[str, Tensor]  # module name -> bool, True = keep


def main() -> None:
    """Train the masks that are missing, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the tasks' rows and of the probes")
    parser.add_argument("out", type=Path, help="folder that skills_that_add_up.py has written")
    parser.add_argument(
        "--first",
        default="banking77",
        metavar="TASK",
        help="task whose mask stays as it is (default: %(default)s)",
    )
    parser.add_argument(
        "--second",
        default="sst2",
        metavar="TASK",
        help="task whose mask is trained again (default: %(default)s)",
    )
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=WAYS,
        default=list(WAYS),
        help="how it is trained, see above (default: all)",
    )
    skills.add_options(parser)
    args = parser.parse_args()
    skills.check_adapters(args)

    tokenizer = load_tokenizer(args.model)
    first = skills.read_task(args.data, args.first, tokenizer, args)
    second = skills.read_task(args.data, args.second, tokenizer, args)
    probes = skills.read_probes(args.data, tokenizer, args)
    measure = Measure(tokenizer, probes)

    # A second call continues where the first ended.
    file = args.out / f"second_mask-{args.first}-{args.second}.json"
    found = skills.continued_result(file, args)
    found.setdefault("ways", {})

    masks = saved_masks((first, second), args)
    first_mask = masks[first.name]
    if "base" not in found:
        model = skills.load(args.model).eval()
        found["base"] = measure.all(model, [first, second])
        for task in (first, second):
            mask = masks[task.name]
            found[task.name] = measured([mask], [first, second], measure, args)
        # Both masks as they were trained alone.
        found["ways"]["by itself"] = union(
            first_mask,
            masks[second.name],
            first,
            second,
            measure,
            args,
        )

    for way in args.ways:
        if way not in found["ways"]:
            learned = train(way, second, first_mask, tokenizer, args)
            found["ways"][way] = union(
                first_mask,
                learned,
                first,
                second,
                measure,
                args,
            )
            write_text(file, json.dumps(found, indent=1) + "\n")  # whole or not at all
            print(f"{way}: done", flush=True)

    text = table(found, first.name, second.name)
    write_text(file.with_suffix(".md"), text)
    print(text)


def saved_masks(tasks: tuple[Task, ...], args) -> dict[str, Masks]:
    """Masks of the tasks as they were trained alone."""
    model = skills.with_adapters(tasks, "mask", args)
    return {task.name: current_masks(model, task.name) for task in tasks}


# Training


def train(
    way: str,
    task: Task,
    first: Masks,
    tokenizer,
    args,
) -> Masks:
    """Learn a task by a mask in one of WAYS; ``first`` is the mask that it will be combined with."""
    torch.manual_seed(args.seed)
    # Of WAYS the first changes the base, the others the configuration, the scores or the steps.
    base = skills.load(args.model)
    if way == "on top":
        remove(base, first)

    options = {}
    if way == "price 3":
        options["price"] = 3.0  # the preset's is 1
    config = MaskConfig(
        preset="deletion_tuning",
        mask_seed=args.seed,
        task_type="CAUSAL_LM",
        **options,
    )
    model = get_peft_model(base, config)

    # The masked layers by their names in the unwrapped model, which the first mask uses too.
    layers = {}
    for name, module in model.get_base_model().named_modules():
        if name in first:
            layers[name] = module

    if way == "apart":
        with torch.no_grad():
            for name, layer in layers.items():
                removed_by_first = ~first[name]
                layer.mask_scores["default"][removed_by_first] = ALWAYS_KEPT

    before_step: Callable[[], None] = lambda: None  # noqa: E731
    if way == "among others":
        weights = {}
        values = {}
        shares = {}
        for name, layer in layers.items():
            weight = layer.base_layer.weight
            weights[name] = weight
            values[name] = weight.detach().clone()
            removed = ~first[name]  # True is a weight that is kept
            shares[name] = float(removed.float().mean())
        before_step = partial(
            remove_at_random,
            weights=weights,
            values=values,
            shares=shares,
            generator=torch.Generator().manual_seed(args.seed),
        )
    skills.learn(
        model,
        task.train,
        skills.rate_of("mask", task),
        skills.num_steps_of(task, args),
        tokenizer,
        args.seed,
        label=f"{way}: {task.name}",
        before_step=before_step,
    )
    return current_masks(model)


@torch.no_grad()
def remove_at_random(
    weights: dict[str, Tensor],
    values: dict[str, Tensor],
    shares: dict[str, float],
    generator: torch.Generator,
) -> None:
    """Set a random share of each weight to zero, the others to their values.

    Args:
        weights: Module name -> weight, which is changed in place.
        values: Module name -> the values of all weights.
        shares: Module name -> the share to remove.
        generator: Of the random places.
    """
    for name, weight in weights.items():
        is_kept = torch.rand(weight.shape, generator=generator) >= shares[name]
        weight.copy_(values[name] * is_kept)


# Measuring


@torch.no_grad()
def remove(model, masks: Masks) -> None:
    """Set the weights that a mask removes to zero, in place."""
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        weight.mul_(mask.to(weight.device))


def measured(
    masks: list[Masks],
    tasks: list[Task],
    measure: Measure,
    args,
) -> dict:
    """Accuracy and probes of the base without the weights that any of the masks removes."""
    # A fresh base each time, because masks are applied in place.
    model = skills.load(args.model).eval()
    for mask in masks:
        remove(model, mask)
    return measure.all(model, tasks)


def union(
    first_mask: Masks,
    second_mask: Masks,
    first: Task,
    second: Task,
    measure: Measure,
    args,
) -> dict:
    """The second mask alone and the union of both."""
    # How much the second mask removes, and how much of it the first removes as well.
    num_removed = 0
    num_common = 0
    for name, mask in second_mask.items():
        removed_by_both = ~mask & ~first_mask[name]
        num_removed += int((~mask).sum())
        num_common += int(removed_by_both.sum())
    return {
        "second alone": measured([second_mask], [second], measure, args),
        "union": measured([first_mask, second_mask], [first, second], measure, args),
        "num_removed": num_removed,
        "num_common": num_common,
    }


def table(found: dict, first: str, second: str) -> str:
    """Accuracies and forgetting as Markdown."""
    # Forgetting is counted from the base.
    base = found["base"]
    num_test = len(base["hits"][first])
    lines = [
        f"Seed {found['settings']['seed']}, {num_test} test rows a task, accuracy in %; alone, the mask of {first} is "
        f"right for {percent(found[first], first)}. In brackets: the right one of the task's own labels, which may be "
        "written in the other task's form. Forgetting: nats per token, union minus base.",
        "",
        f"| mask of {second} trained | removes | of these {first}'s too | {second} mask only: {second} | "
        f"union: {first} | union: {second} | instructions | wikipedia |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way, row in found["ways"].items():
        union_row = row["union"]
        cells = [
            way,
            f"{row['num_removed']:,}",
            f"{row['num_common']:,}",
            percent(row["second alone"], second),
            percent(union_row, first),
            percent(union_row, second),
        ]
        for probe in skills.PROBES:
            cells.append(f"{union_row['probes'][probe] - base['probes'][probe]:+.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def percent(measured: dict, task: str) -> str:
    """Accuracy on a task, also among its labels."""
    return skills.percent(measured["hits"][task], measured["label_hits"].get(task))


if __name__ == "__main__":
    run_script(main)
