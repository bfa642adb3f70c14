"""Searches: probes rank candidates on rows that the winner is not reported on; what is finished is not made again."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from killing import kill_ten_times
from maskft.data import load_splits
from maskft.data.arguments import DataArguments
from maskft_base import files
from maskft_base.errors import UserError
from maskft_lab.cli.main import main
from maskft_lab.cli.study import check
from maskft_lab.cli.train import parse
from maskft_lab.study.recipe import parse_recipe
from maskft_lab.study.search_recipe import Candidate, load_search


@pytest.fixture
def content(base, data):
    return {
        "version": 1,
        "name": "tiny",
        "model": str(base),
        # Options about data may stand with it, also those that are TRL's.
        "data": {"sums": {"dataset_name": str(data), "eval_split_size": 16, "max_length": 32}},
        "train": {
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "bf16": False,
            "gradient_checkpointing": False,
            "dataloader_pin_memory": False,
            "report_to": "none",
        },
        # Two rungs: of three candidates, two go on.
        "search": {"layer_groups": [[1, 2]], "sparsities": [0.9, 0.02, 0.0], "budget_steps": 12, "min_steps": 2}
        | {"choose_size": 8},
    }


def write(folder, content):
    file = folder / "search.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def prompts(file):
    return {json.loads(line)["prompt"] for line in file.read_text().splitlines()}


def test_a_search_ends_with_a_recipe_and_goes_on_where_it_stopped(content, data, tmp_path, capsys):
    file, folder = write(tmp_path, content), tmp_path / "out"
    assert main(["search", str(file), "--output_dir", str(folder)]) == 0
    record = json.loads((folder / files.SEARCH).read_text())
    check_rungs(record, folder)
    check_rows(record, folder, data)
    assert not (folder / "cache").exists()
    out = capsys.readouterr().out
    assert "layers 1-2, sparsity 0.9" in out and "8 rows that did not: nll" in out

    # As `maskft train` takes it, and as a method of a study.
    run = parse(["--config", str(folder / files.WINNER)])
    assert run.mask.mask_sparsity == record["winner"]["mask_sparsity"]
    assert run.mask.mask_layers_to_transform == [1, 2] and run.training.max_steps == -1
    head = (folder / files.WINNER).read_text().splitlines()[2]
    method = yaml.safe_load(head.removeprefix("# As a method of a study: "))
    study = {key: value for key, value in content.items() if key != "search"} | {"methods": method}
    assert check(parse_recipe(study)).runs[0].options["mask_sparsity"] == run.mask.mask_sparsity

    # Without one result, only that one is made again, and the end is the same.
    times = {path: path.stat().st_mtime_ns for path in folder.glob("r*/**/*") if path.is_file()}
    lost = max(folder.glob(f"{files.RESULTS}/layers*/{files.RESULT}"), key=lambda path: path.stat().st_mtime_ns)
    lost.unlink()
    assert main(["search", str(file), "--output_dir", str(folder)]) == 0
    changed = {path for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed <= {lost, *folder.glob(f"{files.RUNS}/*/{files.LOG}")} and lost in changed
    assert json.loads((folder / files.SEARCH).read_text()) == record


@pytest.mark.slow
def test_ten_kills_of_a_search(content, tmp_path):
    content["search"]["prefix_cache"] = False  # its rounding follows the batches that came first
    file, whole, cut = write(tmp_path, content), tmp_path / "whole", tmp_path / "cut"
    assert main(["search", str(file), "--output_dir", str(whole)]) == 0

    def end_of(folder):
        record = json.loads((folder / files.SEARCH).read_text())
        for rung in record["rungs"]:
            for row in rung["candidates"]:
                del row["train_time_s"]
        return record, (folder / files.WINNER).read_text().replace(str(folder), "")

    expected = end_of(whole)

    def check():
        assert end_of(cut) == expected

    kill_ten_times(["search", file, "--output_dir", cut], cut, 12.0, check)


def check_rungs(record, folder):
    first, last = record["rungs"]
    assert [first["steps"], last["steps"]] == [2, 3]
    losses = {row["mask_sparsity"]: row["nll"] for row in first["candidates"]}
    kept = {row["mask_sparsity"] for row in first["candidates"] if row["kept"]}
    assert kept == set(sorted(losses, key=losses.get)[:2]) == {row["mask_sparsity"] for row in last["candidates"]}
    assert record["winner"]["mask_sparsity"] == min(last["candidates"], key=lambda row: row["nll"])["mask_sparsity"]
    # Each probe was trained from scratch to the end of its own schedule, in a run of a study.
    runs = [json.loads(file.read_text()) for file in folder.glob(f"{files.RUNS}/*/{files.RUN}")]
    assert sorted(run["num_steps"] for run in runs if run["method"] == "mask") == [2, 2, 2, 3, 3]
    assert all("prefix cache: 1 frozen layers" in file.read_text() for file in folder.glob("runs/layers*/log.txt"))
    # Removing nothing is no mask: the same loss.
    assert losses[0.0] == pytest.approx(first["nll_without_mask"], abs=1e-5)


def check_rows(record, folder, data):
    parts = {part: prompts(next(folder.glob(f"data/*/{part}.jsonl"))) for part in ("train", "choose", "report")}
    assert sum(map(len, parts.values())) == 64 and parts["train"] | parts["choose"] | parts["report"] == prompts(data)
    assert record["rows"] == {"train": 48, "choose": 8, "report": 8}
    assert record["on_rows_that_chose_it"]["num_items"] == 8
    report = record["on_rows_that_did_not"]
    assert report["num_items"] == 8 and report["gain"] == pytest.approx(report["nll_without_mask"] - report["nll"])
    # They are among those that the winner's recipe holds out, as are those that chose it.
    from maskft.data import load_splits

    run = parse(["--config", str(folder / files.WINNER)])
    assert set(load_splits(run.data, run.data.split_seed).heldout["prompt"]) == parts["report"] | parts["choose"]


def test_groups_and_rungs(content, tmp_path, capsys):
    content["model_facts"] = {"num_layers": 10}
    content["search"] = {
        "group_sizes": [4, 10],
        "sparsities": [0.05, 0.1],
        "budget_steps": 480,
        "learning_rates": [1e-3],
    }
    content["seeds"] = [0, 1]
    search = load_search(write(tmp_path, content))
    groups = [(0, 1, 2, 3), (4, 5, 6, 7), (6, 7, 8, 9), tuple(range(10))]
    assert search.candidates == [Candidate(group, s, 1e-3) for group in groups for s in (0.05, 0.1)]
    assert search.sizes == [8, 4, 2] and search.steps == [10, 20, 40]
    runs = check(search.rung(search.candidates, 10, Path("x"))).runs
    assert [run.options.get("mask_prefix_cache") for run in runs[1::4]] == [None, None, "x/cache/4", "x/cache/6"]
    assert len({run.id for run in runs}) == 17
    moved = check(search.rung(search.candidates, 10, Path("y"))).runs
    assert [run.id.split("-s")[0] for run in moved] == [run.id.split("-s")[0] for run in runs]
    assert main(["search", str(tmp_path / "search.yaml"), "--dry_run"]) == 0
    assert "rung 3: 2 candidates, 4 probes of 40 steps = 160 steps" in capsys.readouterr().out


def test_parts_of_the_data_are_of_one_chat_template(content, base, tmp_path):
    """What the rows are written as follows from it."""
    write(tmp_path, content)
    search = load_search(tmp_path / "search.yaml")
    other = tmp_path / "other"
    shutil.copytree(base, other)
    assert load_search(tmp_path / "search.yaml", model=str(other)).part_file(tmp_path, "train") == search.part_file(
        tmp_path, "train"
    )
    (other / "chat_template.jinja").write_text("{{ messages }}")
    changed = load_search(tmp_path / "search.yaml", model=str(other))
    assert changed.part_file(tmp_path, "train") != search.part_file(tmp_path, "train")
    content["train"]["chat_template_path"] = str(other / "chat_template.jinja")
    named = load_search(write(tmp_path, content))
    assert named.part_file(tmp_path, "train") != search.part_file(tmp_path, "train")


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("search", {"layer_groups": None, "group_sizes": [4]}, "search: a group has layers"),
        ("search", {"layer_groups": [[2, 3]]}, "search: a group has layers [2, 3]; the model has layers 0 to 2"),
        ("search", {"sparsities": [0.1, 1.0]}, "search: sparsities.1 is 1.0: input should be less than 1"),
        ("search", {"sparsities": None}, "search: sparsities is None: input should be a valid list"),
        ("search", {"sparsities": [0.1, 0.10000000001]}, "search: two candidates are named 'layers 1-2, sparsity 0.1'"),
        ("search", {"sparsities": [0.1]}, "search: there is 1 candidate; give more"),
        ("search", {"budget_steps": 11}, "is too small for one rung: the first of 2 has 3 probes of 1 steps"),
        ("search", {"budget": 5}, "search: unknown key 'budget' (did you mean 'budget_steps'?)"),
        ("search", {"group_sizes": [1]}, "group_sizes or layer_groups, and not both"),
        (
            "data",
            {"sums": {"dataset_name": "absent.jsonl"}},
            "data file 'absent.jsonl' does not exist; name the folder",
        ),
        ("train", {"max_steps": 5}, "train sets max_steps, which the search decides"),
        ("train", {"learning_rat": 5}, "unknown option 'learning_rat' (did you mean 'learning_rate'?)"),
        ("evaluation", {"tasks": ["gsm8k"]}, "evaluation sets tasks; a search measures loss on held-out training rows"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(content, tmp_path, capsys, section, change, message):
    content[section] = content.get(section, {}) | change
    file = write(tmp_path, content)
    assert main(["search", str(file), "--output_dir", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err and len(err.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_data_dir_that_is_missing_is_one_line(content, tmp_path, capsys):
    assert main(["search", str(write(tmp_path, content)), "--data_dir", str(tmp_path / "none")]) == 2
    assert "none' is no folder; name the one that holds the training data" in capsys.readouterr().err


def test_what_train_says_about_the_data_decides_the_parts(content, data, tmp_path, capsys):
    """As in a study: otherwise rows that the model was fine-tuned on would rank the candidates."""
    held_out = content["data"]["sums"].pop("eval_split_size")
    # The last says how the whole is read, not its parts, which are files.
    content["train"] |= {"eval_split_size": held_out, "split_seed": 3, "deduplicate": True}
    content["train"]["model_revision"] = "main"
    file, folder = write(tmp_path, content), tmp_path / "out"
    named = load_search(file).part_file(folder, "train")
    assert main(["search", str(file), "--output_dir", str(folder)]) == 0
    splits = load_splits(DataArguments(dataset_name=str(data), eval_split_size=held_out), 3, None)
    assert prompts(named) == set(splits.train["prompt"])
    content["train"]["split_seed"] = 4
    assert load_search(write(tmp_path, content)).part_file(folder, "train") != named


def test_a_mixture_of_files_may_be_searched_on(content, data, tmp_path):
    other = tmp_path / "other.jsonl"
    shutil.copy(data, other)
    content["data"]["sums"]["dataset_name"] = {str(data): 20, str(other): None}
    assert load_search(write(tmp_path, content)).data.options["dataset_name"] == f"{data}:20,{other}"
    content["data"]["sums"]["dataset_name"] = {str(data): 20, "gone.jsonl": 3}
    with pytest.raises(UserError, match=r"data file 'gone\.jsonl' does not exist; name the folder it is in"):
        load_search(write(tmp_path, content))
