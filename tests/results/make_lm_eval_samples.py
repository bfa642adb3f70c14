"""Write the files of ``tests/results/lm_eval`` with lm-eval and tiny random models: ``python THIS FOLDER``.

Paths and the description of the machine are taken out of lm-eval's results; the samples are as it writes them.
"""

import json
import os
import random
import sys
from pathlib import Path

os.environ.update(HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1", HF_EVALUATE_OFFLINE="1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import lm_eval
import yaml
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from tiny import tiny_llama
from tiny_tokenizer import tiny_tokenizer


def write_tasks(folder: Path) -> None:
    """One task of choices and one of two sampled answers per question, over 40 sums of 8 passages."""
    rng = random.Random(0)
    rows = []
    for _ in range(40):
        a, b = rng.randrange(10), rng.randrange(10)
        rows.append({"question": f"{a}+{b}", "choices": [str(a + b), str(a + b + 1), str(abs(a - b) + 20)]})
        rows[-1]["passage"] = f"p{a % 8}"
    for row in rows:
        right = row["choices"][0]
        rng.shuffle(row["choices"])
        row["label"] = row["choices"].index(right)
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"train": str(data), "test": str(data)}},
        "test_split": "test",
        "fewshot_split": "train",
        "doc_to_text": "{{question}}=",
        "metadata": {"version": 1.0},
    }
    choices = {
        "task": "tiny_sums",
        "output_type": "multiple_choice",
        "doc_to_target": "label",
        "doc_to_choice": "choices",
    }
    words = {"task": "tiny_words", "output_type": "generate_until", "doc_to_target": "{{choices[label]}}", "repeats": 2}
    words["generation_kwargs"] = {"until": ["\n"], "max_gen_toks": 4, "do_sample": True, "temperature": 1.0}
    words["filter_list"] = [{"name": "first", "filter": [{"function": "take_first"}]}]
    for task, metrics in ((choices, ("acc", "acc_norm")), (words, ("exact_match",))):
        listed = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics]
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task | {"metric_list": listed}))


def evaluate(folder: Path, name: str, seed: int, shots: int) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), seed=seed)
    tracker = EvaluationTracker(output_path=str(folder))
    tracker.general_config_tracker.log_experiment_args("hf", f"pretrained={name}", None, None, False)
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=128),
        tasks=["tiny_sums"] if shots else ["tiny_sums", "tiny_words"],
        num_fewshot=shots,
        task_manager=TaskManager(include_path=str(folder)),
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = found.pop("samples")
    for key in ("pretty_env_info", "git_hash"):
        found.pop(key, None)
    for config in found["configs"].values():
        for key in [key for key, value in config.items() if str(target) in str(value)]:
            del config[key]
    tracker.save_results_aggregated(results=found, samples=samples)
    for task, each in samples.items():
        tracker.save_results_samples(task_name=task, samples=each)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    write_tasks(target)
    for model_name, model_seed, num_shots in (("tiny-base", 0, 0), ("tiny-tuned", 1, 0), ("tiny-fewshot", 1, 2)):
        evaluate(target, model_name, model_seed, num_shots)
