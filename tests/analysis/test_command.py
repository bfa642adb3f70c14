"""The command on a study's folder with models, adapters and rows, written by hand."""

import json
import shutil

import pytest
import torch
from datasets import Dataset

import tiny
from maskft_common import files, layout
from maskft_lab.analysis import landscape
from maskft_lab.analysis.curvature import analyse_curvature
from maskft_lab.analysis.landscape import analyse_landscape
from maskft_lab.analysis.losses import Sampling, load_rows
from maskft_lab.analysis.masks import analyse_masks
from maskft_lab.cli.main import main

MODULES = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]


def training(steps, **more):
    history = [{"step": step, "loss": 2.0 - 0.1 * step, **more} for step in range(1, steps + 1)]
    return {
        "summary": {
            "method": "x",
            "best_step": steps - 1,
            "num_steps": steps,
            "num_train_tokens": 100,
            "train_time_s": 1.0,
            "peak_memory_bytes": 1000,
            "history": [{"step": 0, "eval_loss": 2.0}, *history],
        },
        "recipe": {},
        "data": {"train": 6},
    }


def write_run(study, run_id, method, models, start=None, seed=0, **more):
    record = {"run": run_id, "name": method, "method": method, "seed": seed, "model": "tiny", "start": start}
    folder = study / layout.RUNS / run_id
    folder.mkdir(parents=True, exist_ok=True)
    (folder / layout.RUN).write_text(json.dumps(record | {"settings": {}, "models": models}))
    (folder / layout.TRAINING).write_text(json.dumps(training(4, **more)))
    return folder


@pytest.fixture
def study(tmp_path):
    full = write_run(tmp_path, "full-s0", "full", {"best": "runs/full-s0", "last": "runs/full-s0/last"})
    tiny.tiny_llama(num_layers=1, seed=0).save_pretrained(full)
    tiny.tiny_llama(num_layers=1, seed=1).save_pretrained(full / layout.LAST)
    for seed in range(2):
        run_id, generator = f"mask-s{seed}", torch.Generator().manual_seed(seed)
        folder = write_run(tmp_path, run_id, "mask", {"best": f"runs/{run_id}"}, "full-s0", seed, mask_flips_per_step=5)
        shapes = {"q": (32, 32), "k": (16, 32), "v": (16, 32)}
        masks = zip(MODULES, shapes.values(), strict=True)
        masks = {name: torch.rand(shape, generator=generator) > 0.1 for name, shape in masks}
        tiny.save_masks(masks, folder, mask_seed=seed)
    rows = [{"id": str(n), "input_ids": ids, "labels": ids} for n, ids in enumerate(tiny.token_ids(6, 7).tolist())]
    for split in ("train", "heldout"):
        Dataset.from_list(rows).save_to_disk(tmp_path / layout.PREPARED / "abc" / split)
    return tmp_path


def test_every_analysis_of_a_study(study, capsys):
    words = ["analyze", str(study), "--what", "bound,masks,landscape", "--grid", "3", "--num_rows", "4"]
    assert main(words) == 0
    folder = study / layout.ANALYSIS
    assert {file.name for file in folder.iterdir()} == {f"{what}.json" for what in ("bound", "masks", "landscape")}
    masks = json.loads((folder / "masks.json").read_text())
    assert len(masks["masks"]["mask-s0"]["by_head"]["0"]["shares"]) == 4
    bound = json.loads((folder / "bound.json").read_text())
    assert bound["training_loss"] == {"full": pytest.approx(1.7), "mask": pytest.approx(1.7)}  # step 3 of 1 to 3
    assert bound["settings"]["num_rows"] == 6
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir() if file.stem in ("masks", "landscape")}
    assert main(words) == 0
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())


def test_of_several_sets_of_rows_one_is_named(study, capsys):
    prepared = study / layout.PREPARED
    for split in ("train", "heldout"):
        Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 3).save_to_disk(prepared / "aaa" / split)
    words = ["analyze", str(study), "--what", "landscape", "--grid", "3", "--num_rows", "2"]
    assert main(words) == 2 and "name it with --rows" in capsys.readouterr().err
    assert main([*words, "--rows", str(prepared / "abc")]) == 0
    rows = load_rows(prepared / "abc", 2)
    settings = json.loads((study / layout.ANALYSIS / "landscape.json").read_text())["settings"]
    assert settings["rows"] == {split: files.digest(each) for split, each in rows.items()}


def test_a_run_that_a_figure_needs_is_named(study, capsys, monkeypatch):
    def error(*words):
        assert main(["analyze", str(study), *words]) == 2
        message = capsys.readouterr().err
        assert message.count("maskft: error") == 1
        return message

    assert "no mask is called 'mask-s7' (did you mean 'mask-s" in error("--what", "bound", "--mask", "mask-s7")
    assert "device 'tpu' cannot be used" in error("--device", "tpu", "--what", "curvature")
    assert "--device is 'mps', which has no float64" in error("--device", "mps", "--what", "curvature")
    assert "no analysis ''; there are bound" in error("--what", ",") and "--seed is -1; give 0" in error("--seed", "-1")
    assert "losses need one folder with tokenised rows" in error("--what", "landscape", "--rows", str(study))
    monkeypatch.setattr(landscape, "load_model", lambda *_: torch.empty(2**60))
    assert "out of memory (tried to allocate" in error("--what", "landscape")
    write_run(study, "full-s0", "full", {"best": "runs/full-s0", "last": "runs/full-s0"})
    assert "and the end of full-s0 is its best checkpoint: train longer" in error("--what", "landscape")
    other = json.loads((study / layout.RUNS / "mask-s1" / layout.RUN).read_text())
    (study / layout.RUNS / "mask-s1" / layout.RUN).write_text(json.dumps(other | {"model": "large"}))
    assert "runs of different base models cannot be compared (tiny, large)" in error("--what", "bound")


def test_what_has_no_data_is_left_out_and_the_others_are_made(study, capsys):
    write_run(study, "full-s0", "full", {"best": "runs/full-s0"})  # its end was not kept: no landscape
    words = ["--what", "landscape,bound", "--num_rows", "2"]
    assert main(["analyze", str(study), *words]) == 0
    out, folder = capsys.readouterr().out, study / layout.ANALYSIS
    assert {file.name for file in folder.iterdir()} == {"bound.json"}
    assert "left out landscape: a landscape needs a third model, and the end of full-s0 was not kept" in out
    assert main(["analyze", str(study), "--what", "landscape"]) == 2
    error = capsys.readouterr().err
    assert "nothing was computed; landscape: " in error and error.count("\n") == 1


def test_reasons_known_beforehand_come_before_what_is_computed(study, capsys):
    write_run(study, "full-s0", "full", {"best": "runs/full-s0"})  # its end was not kept: no landscape
    assert main(["analyze", str(study), "--what", "bound,masks,landscape", "--num_rows", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["left out landscape", "bound", "masks"]


def test_progress_is_reported_by_piece(study):
    adapters = {
        f"mask-s{seed}": (str(study / "runs" / f"mask-s{seed}"), str(study / "runs/full-s0")) for seed in (0, 1)
    }
    calls = []
    analyse_masks(study / "masks.json", adapters, lambda *call: calls.append(call))
    assert calls == [(1, 2), (2, 2)]

    models = [str(study / "runs" / name) for name in ("full-s0", "full-s0/last", "mask-s0")]
    rows = load_rows(study / layout.PREPARED / "abc", 2)
    calls.clear()
    analyse_landscape(study / "plane.json", models, rows, Sampling(), 3, lambda *call: calls.append(call))
    assert calls == [(n, 9) for n in range(1, 10)]

    calls.clear()
    analyse_curvature(
        study / "c.json", models[0], models[2], rows["train"], 2, Sampling(), lambda *call: calls.append(call)
    )
    assert calls == [(n, 12) for n in range(1, 13)]


def prepared(folder, rows):
    for split in ("train", "heldout"):
        Dataset.from_list(rows).save_to_disk(folder / split)
    return folder


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}], "cannot be read as tokenised rows (Column name"),
        ([{"input_ids": "abc", "labels": "abc"}], "cannot be read as tokenised rows (new(): invalid data type 'str')"),
        ([{"input_ids": [1.5, 2.0], "labels": [1, 2]}], "not two lists of whole numbers, of one length"),
        ([{"input_ids": [1, 2, 3], "labels": [1, 2]}], "not two lists of whole numbers, of one length"),
        ([{"input_ids": [1, 2], "labels": [1, -100]}] * 3, "none of the 3 rows from "),
        ([{"input_ids": [1, 2, 96], "labels": [1, 2, 3]}], "a row has the token id 96, and the model has 96 tokens"),
        ([{"input_ids": [1, 2, 3], "labels": [1, 2, 96]}], "a row has the token id 96, and the model has 96 tokens"),
    ],
)
def test_rows_that_no_loss_can_be_computed_on(rows, message, study, capsys):
    words = ["--what", "landscape", "--grid", "3", "--rows", str(prepared(study / "rows", rows))]
    assert main(["analyze", str(study), *words]) == 2
    assert message in capsys.readouterr().err


def test_rows_of_damaged_files_are_one_line(study, capsys):
    folder = prepared(study / "rows", [{"input_ids": [1, 2], "labels": [1, 2]}])
    words = ["analyze", str(study), "--what", "landscape", "--rows", str(folder)]
    for damage in ("state.json", "dataset_info.json"):
        (folder / "train" / damage).write_text("[")
        assert main(words) == 2 and "cannot be read as tokenised rows" in capsys.readouterr().err
    shutil.rmtree(folder / "train")
    Dataset.from_dict({"input_ids": [], "labels": []}).save_to_disk(folder / "train")
    assert main(words) == 2 and "cannot be read as tokenised rows" in capsys.readouterr().err


def change_training(study, run, **summary):
    file = study / layout.RUNS / run / layout.TRAINING
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"summary": content["summary"] | summary}))


def test_a_bound_is_of_the_loss_of_its_mask_alone(study, capsys):
    """Not of a loss with a KL term, and not of a mask that was emptied because it was not better than none."""

    def error():
        assert main(["analyze", str(study), "--what", "bound"]) == 2
        return capsys.readouterr().err

    change_training(study, "full-s0", kl={"budget": None})
    assert "the training losses of full-s0 contain its KL term" in error()
    change_training(study, "full-s0", kl=None)
    empty = {MODULES[0]: torch.ones(32, 32, dtype=torch.bool)}
    tiny.save_masks(empty, study / layout.RUNS / "mask-s0")
    assert "mask-s0 removes nothing" in error()
    (study / layout.RUNS / "mask-s0" / layout.TRAINING).unlink()
    assert "mask-s0 has no training history" in error()


def test_a_damaged_history_is_one_line(study, capsys):
    for history in ([{"loss": 1.0}], [{"step": "x", "loss": 1.0}], 5):
        change_training(study, "mask-s1", history=history)
        assert main(["analyze", str(study), "--what", "bound"]) == 2
        assert "mask-s1/training.json is not as maskft study writes it" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_does_not_stop_the_other_analyses(study, capsys):
    (study / layout.ANALYSIS / ".landscape.json.parts.jsonl").mkdir(parents=True)
    assert main(["analyze", str(study), "--what", "landscape,bound", "--grid", "3", "--num_rows", "2"]) == 0
    assert "left out landscape: [Errno" in capsys.readouterr().out
    assert (study / layout.ANALYSIS / "bound.json").is_file()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--what", "no analysis ''; there are bound"),
        ("--base", "no base model is called ''; there are tiny"),
        ("--mask", "no mask is called ''; there are mask"),
        ("--rows", "losses need one folder with tokenised rows (train and heldout), got .:"),
    ],
)
def test_an_empty_name_is_no_default(option, message, study, capsys):
    """As "$NAME" is in a shell where NAME is not set."""
    words = ["--what", "landscape"] if option != "--what" else []
    assert main(["analyze", str(study), *words, option, ""]) == 2
    assert message in capsys.readouterr().err
