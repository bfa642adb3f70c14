"""A finished study of tiny models, written by hand: runs, results item by item, summary; and a reader of its page."""

import json
from html.parser import HTMLParser

import torch
from datasets import Dataset

import tiny
from maskft_common import layout
from maskft_lab.results.compare import compare
from maskft_lab.results.schema import build_result, build_task, items_fingerprint, metric_from_items, write_result

NUM_ITEMS = 40
HOSTILE = "</script><script>alert('x')</script> $x_1$ <b>&amp;"
MODULES = {f"model.layers.0.self_attn.{name}_proj": rows for name, rows in {"q": 32, "k": 16, "v": 16}.items()}


def task_of(quality, seed):
    """Items of which about ``quality`` are right."""
    draws = torch.rand(NUM_ITEMS, generator=torch.Generator().manual_seed(17 + seed)).tolist()
    items = [
        {"id": f"item{n}", "nll": 1.5 - quality + draw, "num_tokens": 2 + n % 3, "accuracy": int(draw < quality)}
        for n, draw in enumerate(draws)
    ]
    prints = [{"id": item["id"], "prompt": item["id"], "reference": "a"} for item in items]
    metrics = {name: metric_from_items(items, name) for name in ("nll", "accuracy")}
    return build_task(
        items, metrics, version=1, num_fewshot=0, fingerprint=items_fingerprint(prints), chat_template_hash=None
    )


def write_run(study, run, name, method, seed, start=None, steps=8, settings=None, quality=0.5, roles=("best",), **more):
    """A run with its record, history and results; returns the results."""
    folder = study / layout.RUNS / run
    folder.mkdir(parents=True, exist_ok=True)
    models = {role: f"runs/{run}" + ("/last" if role == "last" else "") for role in roles}
    record = {"run": run, "name": name, "method": method, "seed": seed, "model": "tiny", "start": start}
    record |= {"settings": settings or {}, "models": models}
    (folder / layout.RUN).write_text(json.dumps(record))
    history = [
        {"step": step, "loss": 2.0 - 0.1 * step, "eval_loss": 2.0 - quality * step / 8 + 0.01 * seed, **more}
        for step in range(1, steps + 1)
    ]
    summary = {"method": method, "best_step": steps - 1, "num_steps": steps, "num_train_tokens": 100 * steps}
    summary |= {"train_time_s": 60.0, "peak_memory_bytes": 10**9, "history": history}
    training = {"summary": summary if steps else {}, "recipe": {}, "data": {"train": 6}}
    (folder / layout.TRAINING).write_text(json.dumps(training))
    results = []
    for role in roles:
        label = f"{name} ({'continued' if role == 'last' else role})" if len(roles) > 1 else name
        block = {"role": role, "model": "tiny", "study": "tiny-study", "name": name, "data": "d", "run": run}
        block |= {"start": start, "match": None, "settings": settings or {}, "num_steps": steps, "best_step": steps - 1}
        block |= {"best_heldout_loss": 1.0, "epochs": 1.0, "tokens": 700, "total_epochs": 2.0, "total_tokens": 1400}
        model = {"name_or_path": run, "method": method, "seed": seed}
        task = task_of(quality - (0.1 if role == "last" else 0), seed)
        result = build_result(label, model, {"dtype": "float32"}, {"sums": task}, {"base": "tiny"})
        result |= {"study": block, "created": "2026-11-26T00:00:00+00:00"}
        write_result(study / layout.RESULTS / f"{run}-{role}" / layout.RESULT, result)
        results.append(result)
    return results


def write_summary(study, results, baseline="full (best)"):
    """``summary-tiny-study.json`` as ``maskft study`` writes it."""
    keys = ("run", "role", "best_step", "num_steps", "epochs", "tokens", "total_epochs", "total_tokens")
    rows = [
        {"name": result["name"], "seed": result["model"]["seed"]}
        | {key: result["study"][key] for key in keys}
        | {"result": f"{result['study']['run']}-{result['study']['role']}"}
        | {"metrics": {f"sums/{name}": metric["value"] for name, metric in result["tasks"]["sums"]["metrics"].items()}}
        for result in results
    ]
    comparison = compare(results, baseline).to_dict()
    record = {"study": "tiny-study", "models": {"tiny": {"baseline": baseline, "runs": rows, "comparison": comparison}}}
    (study / layout.SUMMARY.format("tiny-study")).write_text(json.dumps(record))


_MASKS = (("mask", 0.1, "mask"), ("mask 20 %", 0.2, "mask"), ("random", 0.1, "random_mask"))


def make_study(folder):
    """Full fine-tuning, masks of two sparsities, a random mask, two seeds each; models, adapters, rows."""
    results = []
    for seed in range(2):
        full = f"full-s{seed}"
        results += write_run(folder, full, "full", "full", seed, quality=0.5, roles=("best", "last"))
        tiny.tiny_llama(num_layers=1, seed=seed).save_pretrained(folder / layout.RUNS / full)
        tiny.tiny_llama(num_layers=1, seed=seed + 5).save_pretrained(folder / layout.RUNS / full / layout.LAST)
        for name, sparsity, method in _MASKS:
            run = f"{name.replace(' ', '_').replace('%', 'x')}-s{seed}"
            quality = {"mask": 0.7, "random_mask": 0.2}[method]
            steps, more = (8, {"mask_flips_per_step": 5}) if method == "mask" else (0, {})
            settings = {"mask_sparsity": sparsity}
            results += write_run(
                folder, run, name, method, seed, full, steps=steps, settings=settings, quality=quality, **more
            )
            generator = torch.Generator().manual_seed(seed)
            masks = {module: torch.rand((rows, 32), generator=generator) > sparsity for module, rows in MODULES.items()}
            tiny.save_masks(masks, folder / layout.RUNS / run, mask_seed=seed)
    write_summary(folder, results)
    rows = [{"id": str(n), "input_ids": ids, "labels": ids} for n, ids in enumerate(tiny.token_ids(6, 7).tolist())]
    for split in ("train", "heldout"):
        Dataset.from_list(rows).save_to_disk(folder / layout.PREPARED / "abc" / split)


class Page(HTMLParser):
    """Tags with their attributes, and texts by the section that they stand in."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self._open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if data.strip() and not (self._open and self._open[-1][0] == "script"):
            self.texts.append(data.strip())
