"""Tiny files in the benchmarks' published formats, and a model of lm-eval's interface that answers from a script."""

import gzip
import json

import yaml
from lm_eval.api.model import LM

GSM8K = [
    {
        "question": f"Tom has {a} pens and buys {b} more. How many has he?",
        "answer": f"{a}+{b}=<<{a + b}>>\n#### {a + b}",
    }
    for a, b in ((3, 4), (10, 5), (6, 6), (120, 3))
]
MATH = [
    {"problem": "What is $2+3$?", "solution": "It is $\\boxed{5}$.", "level": "Level 1", "type": "Algebra"},
    {"problem": "Halve $3$.", "solution": "It is $\\boxed{\\frac{3}{2}}$.", "level": "Level 1", "type": "Algebra"},
]
HUMANEVAL = [
    {
        "task_id": f"HumanEval/{n}",
        "prompt": f'def {name}(x):\n    """{doc}"""\n',
        "entry_point": name,
        "canonical_solution": f"    return {body}\n",
        "test": f"def check(candidate):\n    assert candidate(3) == {value}\n",
    }
    for n, (name, doc, body, value) in enumerate(
        [("double", "Twice x.", "2 * x", 6), ("square", "x times x.", "x * x", 9)]
    )
]
IFEVAL = [
    {
        "key": 1000,
        "prompt": "Say hello without commas, in lower case.",
        "instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"],
        "kwargs": [{}, {}],
    },
    {
        "key": 1005,
        "prompt": "Use the word banana.",
        "instruction_id_list": ["keywords:existence"],
        "kwargs": [{"keywords": ["banana"]}],
    },
]


def write(folder):
    """Write all files below ``folder``, some of them compressed, some in folders of their own."""
    (folder / "math").mkdir(parents=True)
    for name, rows in {
        "math/gsm8k_test.jsonl": GSM8K,
        "math/gsm8k_train.jsonl.gz": [{**row, "question": f"Train: {row['question']}"} for row in GSM8K],
        "math/minerva_math_test.jsonl": MATH,
        "HumanEval.jsonl.gz": HUMANEVAL,
        "HumanEvalPlus.jsonl.gz": HUMANEVAL,
        "ifeval_prompts.jsonl.gz": IFEVAL,
    }.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        file = folder / name
        file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return folder


def write_local_tasks(folder):
    """Write tasks of lm-eval whose data is beside them, and groups; returns the folder."""
    folder.mkdir()
    for name, count in {"rows": 3, "more": 20}.items():
        rows = [{"q": f"{n} and", "a": str(n)} for n in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"dataset_kwargs": {"data_files": {"test": str(folder / "more.jsonl")}}}
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    }
    tasks = {
        "one": {},
        "two": {},
        "gsm8k": {},
        "code": {"unsafe_code": True},
        "image": {"doc_to_image": "q"},
        "shots": {"fewshot_split": "test", "num_fewshot": 2, **more},
        "long": {"doc_to_text": "{{'~' * (5 + a|int)}}"},
    }
    for name, more in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **more}))
    for name, members in {"pair": ["one", "two"], "ours": ["one", "gsm8k"]}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"group": name, "task": members}))
    return folder


class ScriptedLM(LM):
    """Answers with the text whose key is in the prompt; remembers the prompts."""

    tokenizer_name = "scripted"

    def __init__(self, answers, tokenizer=None):
        super().__init__()
        self.answers, self.tokenizer, self.prompts = answers, tokenizer, []

    def generate_until(self, requests):
        self.prompts += [request.args[0] for request in requests]
        return [
            next(answer for key, answer in self.answers.items() if request.args[0].rfind(key) >= 0)
            for request in requests
        ]

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def loglikelihood(self, requests):
        raise AssertionError("no log-likelihood is asked for")

    loglikelihood_rolling = loglikelihood
