"""Tuning: stages follow from held-out losses, and from nothing else."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import yaml

import benchmark_files
from maskft.data.arguments import DataArguments
from maskft.data.splits import load_splits
from maskft_common import layout
from maskft_common.errors import UserError
from maskft_lab.cli.main import main
from maskft_lab.report.evidence import gather
from maskft_lab.report.methods import series_looks
from maskft_lab.study.check import check_before_running, checked_plan
from maskft_lab.study.folder import Study
from maskft_lab.study.load_recipe import load_recipe, parse_recipe
from maskft_lab.study.plan import build_plan
from maskft_lab.study.study_run import Heldout
from maskft_lab.study.train import heldout
from small_study import replace_commands, write

RATES = [1e-3, 1e-2]


@pytest.fixture
def content(base, data, tmp_path):
    """A recipe whose full fine-tuning is tuned over rates, with a restart and masks made from the winner."""
    test_rows = tmp_path / "test.jsonl"
    sums = [{"prompt": f"9+{n}=", "completion": f"{9 + n}", "answer": f"{9 + n}"} for n in range(9)]
    test_rows.write_text("\n".join(json.dumps(row | {"answer_type": "number"}) for row in sums))
    full = {"method": "full", "max_steps": 2, "tune": {"learning_rate": RATES}}
    options = "bf16 gradient_checkpointing dataloader_pin_memory".split()
    return {
        "version": 1,
        "name": "small",
        "model": str(base),
        "seeds": [0, 1],
        "data": {"sums": {"dataset_name": str(data), "eval_split_size": 16, "tokens_per_row": 5}},
        "train": {"eval_steps": 2, "save_steps": 2, "report_to": "none", **dict.fromkeys(options, False)},
        "methods": {"full": full, "mask": {"method": "mask", "from": "full", "max_steps": 2}},
        "evaluation": {"heldout": {"dataset_name": str(test_rows)}, "no_generate": True},
    }


@pytest.fixture
def in_process(monkeypatch):
    """Commands run in this process, which saves a start of Python for each."""

    def call(words, log):
        assert main(words[3:]) == 0

    replace_commands(monkeypatch, call)


def plan_of(content, look=lambda run: None):
    return build_plan(checked_plan(parse_recipe(content)).recipe, look)


def looks(losses):
    """Held-out losses by what is tried."""
    return lambda run: Heldout(losses[tuple(run.tried.values())]) if run.tried else Heldout(0.0)


def test_what_follows_from_tuning_waits_and_then_has_the_winner_as_parent(content):
    plan = plan_of(content)
    ready = [(run.name, run.seed, run.tried) for run in plan.ready.runs]
    assert ready == [("full", 0, {"learning_rate": rate}) for rate in RATES], "first seed alone, not evaluated"
    assert all(run.labels == {} and run.stage == 1 for run in plan.ready.runs)
    assert {(run.name, run.seed) for run in plan.runs if run.is_assumed} == {
        ("full", 0), ("full", 1), ("mask", 0), ("mask", 1)
    }  # fmt: skip
    for winner, losses in ((1e-3, (1.0, 2.0)), (1e-2, (2.0, 1.0))):
        tuned = plan_of(content, looks({(rate,): loss for rate, loss in zip(RATES, losses, strict=True)}))
        assert not any(run.is_assumed for run in tuned.runs)
        finals = [run for run in tuned.runs if run.tried is None]
        assert [(run.name, run.seed, run.stage) for run in finals] == [
            ("full", 0, 2), ("full", 1, 2), ("mask", 0, 2), ("mask", 1, 2)
        ]  # fmt: skip
        assert all(run.options["learning_rate"] == winner for run in finals[:2])
        assert [run.start for run in finals[2:]] == finals[:2]
        # The winner of the first seed is the run that was tried; it is made once.
        tried = {run.tried["learning_rate"]: run.id for run in plan.ready.runs}
        assert finals[0].id == tried[winner] and len({run.id for run in tuned.runs}) == len(tuned.runs) == 5
    assert [run.num_tried for run in finals] == [2, 2, 0, 0]
    content["methods"]["mask"]["tuned_elsewhere"] = 5
    assert sorted(run.num_tried for run in plan_of(content).runs if run.name == "mask") == [5, 5]


def test_a_failed_run_loses(content):
    plan = plan_of(content, looks({(1e-3,): 3.0, (1e-2,): math.inf}))
    assert plan.tunings[0].winner.settings == {"learning_rate": 1e-3}
    assert plan.tunings[0].to_dict()["trials"][1]["heldout_loss"] is None
    assert "same" not in str(plan_of(content, looks({(1e-3,): math.inf, (1e-2,): math.inf})).tunings[0])
    content["methods"]["full"]["tune"] = {"bf16": [True, False]}
    assert "was tried" not in str(plan_of(content, looks({(True,): 1.0, (False,): 2.0})).tunings[0])


def test_a_run_within_its_budget_wins_over_one_with_a_lower_loss(content):
    """As among the checkpoints of a run: of those beyond it the nearest, and any before a run that diverged."""

    def winner(*measured):
        found = dict(zip(RATES, measured, strict=True))
        plan = plan_of(content, lambda run: found[run.tried["learning_rate"]] if run.tried else Heldout(0.0))
        return plan.tunings[0].winner.settings["learning_rate"]

    within, beyond = Heldout(2.0), Heldout(1.0, over_budget=0.3)
    assert winner(within, beyond) == winner(Heldout(2.0, over_budget=0.1), beyond) == RATES[0]
    assert winner(Heldout(math.inf), beyond) == RATES[1]


@pytest.mark.parametrize(("why", "status"), [("NaN: stopped before the update was applied", 0), ("no room", 2)])
def test_what_diverges_loses_once_and_what_fails_decides_nothing(why, status, content, tmp_path, monkeypatch, capsys):
    def call(words, log):
        if "0.01" in words:
            raise UserError(why)
        assert main(words[3:]) == 0

    replace_commands(monkeypatch, call)
    content["methods"], file = {"full": content["methods"]["full"]}, tmp_path / "study.yaml"
    for rates, end in ((RATES, status), (RATES, status), ([1e-2], 2)):
        content["methods"]["full"]["tune"] = {"learning_rate": rates}
        file.write_text(yaml.safe_dump(content | {"seeds": [0]}))
        assert main(["study", str(file), "--output_dir", str(tmp_path)]) == end
        assert len(list(tmp_path.glob(f"{layout.RESULTS}/*"))) == (status == 0)
    out, err = capsys.readouterr()
    assert ("2 runs, 2 finished before" in out) == ("was not finite; lower learning_rate" in err) == (status == 0)


def test_rates_can_be_multiples_of_the_parents_tuned_one(content):
    restart = {"method": "full", "from": "full", "tune": {"learning_rate": {"times_parent": [0.5, 2]}}}
    content["methods"]["restart"] = restart
    losses = {(1e-3,): 2.0, (1e-2,): 1.0, (5e-3,): 1.0, (2e-2,): 0.5}
    plan = plan_of(content, looks(losses))
    assert [run.options["learning_rate"] for run in plan.runs if run.name == "restart" and not run.tried] == [2e-2] * 2
    assert next(run for run in plan.runs if run.name == "restart" and not run.tried).stage == 3


def test_copies_of_test_rows_are_not_tuned_on(content, data, tmp_path, capsys):
    """Another file, in which some rows are those that the training file holds out."""
    test = Path(content["evaluation"]["heldout"]["dataset_name"])
    lines = data.read_text().splitlines()
    test.write_text("\n".join([*lines[:60], json.dumps({"prompt": "9+9=", "completion": "18"})]))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content))
    assert main(["study", str(recipe), "--output_dir", str(tmp_path / "study")]) == 2
    heldout = load_splits(DataArguments(dataset_name=str(data), eval_split_size=16), 0).heldout["prompt"]
    number = len(set(heldout) & {json.loads(line)["prompt"] for line in lines[:60]})
    said = f"would be tuned on 16 held-out rows, and evaluation reports on the prompts of {number} of them"
    assert number > 0 and said in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    "chooses",
    [
        {"tune": {"learning_rate": RATES}},
        {"method": "interpolate"},
        {"method": "random_mask", "match": "mask", "num_candidates": 2},
    ],
)
def test_no_method_chooses_on_test_rows(content, chooses, tmp_path):
    del content["methods"]["full"]["tune"]
    content["evaluation"]["heldout"]["dataset_name"] = content["data"]["sums"]["dataset_name"]
    check_before_running(plan_of(content))  # full fine-tuning chooses nothing but a checkpoint
    content["methods"]["choosing"] = {"method": "full", "from": "full", "max_steps": 2} | chooses
    with pytest.raises(UserError, match=r"'choosing' would be (tuned|chosen) on 16 held-out rows, and evaluation"):
        check_before_running(plan_of(content))
    content["data"]["sums"]["eval_dataset_name"] = "openai/gsm8k"
    del content["data"]["sums"]["eval_split_size"]
    for split in ("test", "train + test[:5]"):
        content["data"]["sums"]["dataset_eval_split"] = split
        with pytest.raises(UserError, match=f"'choosing' would be .* split '{re.escape(split)}' of 'openai/gsm8k'"):
            check_before_running(plan_of(content))
    # A registered set says which split is its held-out one: of gsm8k alone it is the test split.
    content["data"]["sums"] |= {"eval_dataset_name": "gsm8k", "dataset_eval_split": None}
    with pytest.raises(UserError, match=r"'choosing' would be .* the split 'test' of 'gsm8k'"):
        check_before_running(plan_of(content))
    # Also from a file of that split; a file of a set that nobody knows is the user's own.
    own = tmp_path / "files"
    own.mkdir()
    shutil.copy(content["data"]["sums"]["dataset_name"], own / "gsm8k_test.jsonl")
    (own / "mine.jsonl").write_text('{"prompt": "7*7=", "completion": "49"}\n')
    others = [{"prompt": f"{number}*2=", "completion": str(2 * number)} for number in range(8)]
    (tmp_path / "others.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in others))
    content["evaluation"]["heldout"]["dataset_name"] = str(tmp_path / "others.jsonl")
    content["data"]["sums"]["data_dir"] = str(own)
    with pytest.raises(UserError, match="the split 'test' of 'gsm8k'"):
        check_before_running(plan_of(content))
    content["data"]["sums"]["eval_dataset_name"] = "mine"
    check_before_running(plan_of(content))
    content["evaluation"]["heldout"]["dataset_name"] = content["data"]["sums"]["dataset_name"]
    del content["data"]["sums"]["data_dir"]
    content["data"]["sums"] |= {"eval_dataset_name": ["nowhere.jsonl", "neither.jsonl"], "dataset_eval_split": None}
    with pytest.raises(
        UserError, match=r"data file nowhere\.jsonl does not exist"
    ):  # files, of which none is a test split
        check_before_running(plan_of(content))


def test_rows_are_the_same_as_chat_and_as_plain_text(content, tmp_path):
    """Questions in plain text were compared with those in the chat template word by word, and none was the same."""
    del content["methods"]["full"]["tune"]
    rows = [{"question": f"How much is {number} + 1?", "answer": str(number + 1)} for number in range(40)]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    content["data"]["sums"] |= {"dataset_name": str(file), "as_chat": False}
    content["evaluation"]["heldout"] = {"dataset_name": str(file)}
    content["methods"]["choosing"] = {
        "method": "full",
        "from": "full",
        "max_steps": 2,
        "tune": {"learning_rate": [1e-3, 1e-4]},
    }
    with pytest.raises(UserError, match=r"'choosing' would be tuned on 16 held-out rows, and evaluation"):
        check_before_running(plan_of(content))


def test_rows_that_are_trained_and_reported_on_are_said(content, in_process, tmp_path, capsys):
    """A test file that is the training file, whole or in part, gave a table of memorised answers without a word."""
    assert check_before_running(plan_of(content)) == []
    test_rows = Path(content["evaluation"]["heldout"]["dataset_name"])
    trained = Path(content["data"]["sums"]["dataset_name"]).read_text().splitlines()
    del content["methods"]["full"]["tune"]
    content["methods"] = {"full": content["methods"]["full"] | {"learning_rate": 1e-3}}
    test_rows.write_text("\n".join([*test_rows.read_text().splitlines(), *trained]))
    content["evaluation"]["before"] = {"others": {"dataset_name": str(tmp_path / "others.jsonl")}}
    (tmp_path / "others.jsonl").write_text(json.dumps({"text": "nothing of sums"}))
    note = (
        "Note: 48 of the 73 prompts of evaluation are training rows of 'sums' too: scores on them say nothing of new "
        "rows; take them out of one of the two."
    )
    chosen = (
        "Note: 16 of the 16 held-out rows of 'sums', which choose checkpoints, have prompts that evaluation reports "
        "on: its scores are better than on new rows; hold out other rows (eval_split_size)."
    )
    assert check_before_running(plan_of(content)) == [chosen, note]
    kept = dict(content["train"])
    content["train"]["load_best_model_at_end"] = False
    assert check_before_running(plan_of(content)) == [note], "the last step is kept, nothing is chosen"
    content["train"] = kept
    out = tmp_path / "out"
    file = write(tmp_path, content)
    assert main(["study", str(file), "--output_dir", str(out), "--model", content["model"]]) == 0
    assert note in capsys.readouterr().out
    # The copy says which model was trained; what a study that shares the folder has is not shown as its recipe.
    copied = out / layout.STUDY_RECIPE.format("small")
    said = f"# Run with --model {content['model']}, in place of the model below.\n"
    assert copied.read_text() == said + file.read_text() == gather(out).recipe
    copied.rename(out / layout.STUDY_RECIPE.format("other"))
    assert gather(out).recipe is None
    assert f"- {note}\n" in (out / layout.STUDY_TABLE.format("small")).read_text()
    assert note in gather(out).notes

    # Rows of the KL term are trained on as well: forgetting on them is what the term forbids.
    content["train"] |= {"kl_to_base": 0.1, "kl_dataset_name": str(tmp_path / "others.jsonl")}
    *_, note = check_before_running(plan_of(content))
    assert note.startswith("Note: 1 of the 1 prompts of evaluation.before.others are rows of kl_dataset_name too: sc")

    # Rows that cannot be read are the preparation's to report, and those of the hub may be nowhere but prepared.
    for name in ("nowhere.jsonl", "someone/rows"):
        content["data"]["sums"]["dataset_name"] = name
        content["train"]["kl_dataset_name"] = name
        assert check_before_running(plan_of(content)) == []


def test_what_an_earlier_method_chooses_or_reads_hides_no_note(content, tmp_path):
    """Methods with the same data were one to the check: of a mask that is not trained, or keeps its last step."""
    del content["methods"]["full"]["tune"]
    full = content["methods"]["full"]
    content["evaluation"]["heldout"]["dataset_name"] = content["data"]["sums"]["dataset_name"]
    content["methods"] = {"full": full}
    notes = check_before_running(plan_of(content))
    assert [" training rows of " in note for note in notes] == [False, True]
    content["methods"] = {"L1 mask": {"method": "l1_mask"}, "full": full}
    assert check_before_running(plan_of(content)) == notes
    for last_step in ({"load_best_model_at_end": False}, {"eval_strategy": "no"}):
        content["methods"] = {"last step": full | last_step, "full": full}
        assert sorted(check_before_running(plan_of(content))) == sorted(notes)

    # Another column of the same file is other rows, of the KL term as well.
    file = tmp_path / "columns.jsonl"
    file.write_text("".join(json.dumps({"text": f"own {n}", "other": f"reported {n}"}) + "\n" for n in range(40)))
    reported = tmp_path / "reported.jsonl"
    reported.write_text("".join(json.dumps({"text": f"reported {n}"}) + "\n" for n in range(40)))
    content["evaluation"]["before"] = {"others": {"dataset_name": str(reported)}}
    content["data"]["sums"] |= {"dataset_name": str(file)}
    content["methods"] = {"own": full, "other": full | {"dataset_text_field": "other"}}
    chosen, note = check_before_running(plan_of(content))
    assert chosen.startswith("Note: 16 of the 16 held-out rows")
    assert note.startswith("Note: 24 of the 40 prompts of evaluation.before.others are training rows of 'sums' too")
    content["train"] |= {"kl_to_base": 0.1, "kl_dataset_name": str(file)}
    assert "40 prompts of evaluation.before.others are rows of kl_dataset" in check_before_running(plan_of(content))[-1]


def odd(**method):
    return lambda content: content["methods"].update(odd=method)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["methods"]["full"].update(learning_rate=1.0), "has values in tune and one beside it"),
        (lambda c: c["methods"]["full"].update(tune=3), "full.tune is 3"),
        (lambda c: c["methods"]["full"].update(tune={"rate": [1]}), "unknown key 'rate'"),
        (lambda c: c["methods"]["full"]["tune"].update(learning_rate=[1.0, 1.0]), "duplicate value"),
        (lambda c: c["train"].update(mask_seed=7), "sets mask_seed, which the study decides"),
        (lambda c: c["train"].update(eval_strategy="no"), "tune needs held-out losses, but eval_strategy is no"),
        # As YAML reads a plain `no`.
        (lambda c: c["train"].update(eval_strategy=False), "tune needs held-out losses, but eval_strategy is no"),
        (
            lambda c: c["methods"]["full"]["tune"].update(num_train_epochs=[1, 2]),
            "max_steps decides the length, and tune is of num_train_epochs",
        ),
        *(
            (
                odd(method="full", max_steps=2, tune={option: values}),
                f"'odd': tune has {option}, which changes the held-out rows or their tokens, .* grid odd.{option}",
            )
            for option, values in {
                "max_length": [8, 16],
                "completion_only_loss": [True, False],
                "dataset_text_field": ["text", "other"],
                "chat_template_path": ["a.jinja", "b.jinja"],
                "dataset_name": ["a.jsonl", "b.jsonl"],
                "dataset_train_split": ["train", "test"],
                "eval_dataset_name": ["a.jsonl", "b.jsonl"],
                "eval_split_size": [8, 16],
                "max_eval_samples": [4, 8],
                "split_seed": [0, 1],
                "as_chat": [True, False],
            }.items()
        ),
        (
            odd(method="full", max_steps=2, kl_budget=0.1, tune={"kl_dataset_name": ["a.jsonl", "b.jsonl"]}),
            "'odd': tune has kl_dataset_name, and a kl_budget on different rows is a different limit; give one value",
        ),
        (
            lambda c: c["methods"].update(l1={"method": "l1_mask", "from": "full", "mask_selection": "logit"}),
            "run 'l1, seed 0': mask_selection is 'logit'; l1_mask removes mask_sparsity",
        ),
        (lambda c: c.update(grid={"full.learning_rate": [1.0]}), "in the method's tune too"),
        (
            lambda c: c["methods"].update(l1={"method": "l1_mask", "from": "full", "tune": {"num_candidates": [1]}}),
            "tune is for full, peft, mask, not for method l1_mask",
        ),
        (odd(method="full", start_mask="full"), "name a mask made from the same model"),
        (odd(method="full", start_mask="mask"), "name a mask made from the same model"),
        (odd(method="mask", keep_mask="mask", **{"from": "full"}), "keep_mask is for full, not for method mask"),
        (
            odd(method="full", keep_mask="mask", start_mask="mask", **{"from": "full"}),
            "only one of start_mask",
        ),
        (
            odd(method="mask", tune={"mask_preset": [None, "recommended"]}, **{"from": "full"}),
            "tune has mask_preset=None and mask_preset=recommended, which mean the same; drop one",
        ),
        (odd(method="interpolate"), "interpolate needs `from`"),
        (
            odd(method="full", last="end", kl_budget=0.1),
            "methods.odd: last is the end of training, which kl_budget does",
        ),
        (odd(method="full", last="end", tune={"kl_budget": [0.1, 0.2]}), "methods.odd: last is the end of training"),
        (lambda c: c["evaluation"].update(before=[1]), "evaluation.before"),
        (lambda c: c["evaluation"].update(before={"x": {"dataset": "y"}}), "evaluation.before.x has an unknown"),
    ],
)
def test_a_mistake_is_one_line(content, change, message):
    change(content)
    with pytest.raises(UserError, match=message):
        plan_of(content)


def test_options_of_training_rows_are_tuned_where_others_are_held_out(content, data):
    full = content["methods"]["full"]
    full["tune"] = {"max_train_samples": [8, 16]}
    assert len(plan_of(content).tunings[0].trials) == 2
    content["data"]["sums"] = {"dataset_name": str(data), "eval_dataset_name": str(data)}
    full["tune"] = {"dataset_name": [f"{data}:8", f"{data}:16"]}
    assert len(plan_of(content).tunings[0].trials) == 2
    content["train"] |= {"kl_to_base": 0.1}
    full["tune"] = {"kl_dataset_name": [f"{data}:8", f"{data}:16"]}
    assert len(plan_of(content).tunings[0].trials) == 2


def test_fixed_masks_beside_masks_that_all_learn_by_logits(content):
    """They take counts and places of the mask they match; how that is learned is not theirs."""
    content["train"] |= {"mask_preset": "deletion_tuning", "mask_target_modules": ["gate_proj"]}
    plan = plan_of(content | {"controls": "standard"}, lambda run: Heldout(1.0))
    options = {run.name: run.options for run in plan.runs if run.method.method.endswith("_mask")}
    assert len(options) == 4
    for of_run in options.values():
        assert of_run["mask_target_modules"] == ["gate_proj"] and not {"mask_preset", "mask_selection"} & of_run.keys()


def test_a_tuned_study_runs_in_stages_and_resumes(content, tmp_path, capsys, in_process):
    content |= {"seeds": [0]}
    content["methods"]["mask"] |= {"tune": {"mask_sparsity": [0.1, 0.3]}}
    file, folder = tmp_path / "study.yaml", tmp_path / "study"
    file.write_text(yaml.safe_dump(content))
    assert main(["study", str(file), "--output_dir", str(folder), "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "4 runs: 4 of yours, 0 controls; training left" in " ".join(said.split())
    assert "stage 1: 2, stage 2: 2" in said
    assert main(["study", str(file), "--output_dir", str(folder)]) == 0
    said = capsys.readouterr().out
    table = (folder / layout.STUDY_TABLE.format("small")).read_text()
    assert table.count("is the best of 2 on held-out rows; no ") == 2 and "is the best of" not in said  # of one page
    summary = json.loads((folder / layout.SUMMARY.format("small")).read_text())
    tunings = next(iter(summary["models"].values()))["tuning"]
    for tuned in tunings:
        assert len(tuned["trials"]) == 2
        losses = {trial["heldout_loss"]: trial["settings"] for trial in tuned["trials"]}
        for trial in tuned["trials"]:
            (run,) = trial["runs"]
            record = json.loads((folder / layout.RUNS / run / layout.TRAINING).read_text())
            assert trial["heldout_loss"] == record["summary"]["best_loss"]
        assert tuned["winner"] == losses[min(losses)]
    assert len(list((folder / layout.RUNS).iterdir())) == 4, "the winner of each is one of the two tried"
    assert len(list((folder / layout.RESULTS).iterdir())) == 2, "only winners are evaluated"
    table = (folder / layout.STUDY_TABLE.format("small")).read_text()
    assert "| tuned |" in table and "no evaluation.before" in table
    before = {path: path.stat().st_mtime_ns for path in folder.glob("r*/**/*")}
    assert main(["study", str(file), "--output_dir", str(folder)]) == 0
    assert "4 runs, 4 finished before" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("r*/**/*")}
    # Killed between a record and the deletion: checkpoints of a losing trial stayed, three times as large as the model.
    for run in (folder / layout.RUNS).iterdir():
        (run / "checkpoint-2").mkdir()
        (run / "checkpoint-2" / "optimizer.pt").write_text("large")
    assert main(["study", str(file), "--output_dir", str(folder)]) == 0
    assert not list(folder.glob(f"{layout.RUNS}/*/checkpoint-*"))
    assert before.keys() == set(folder.glob("r*/**/*"))


def test_standard_controls_are_methods_at_the_masks_steps(content):
    methods = content["methods"]
    methods["mask"] |= {"mask_layers_to_transform": [1], "tune": {"mask_sparsity": [0.1, 0.3]}}
    methods["other"] = {"method": "mask", "from": "full", "max_steps": 2}
    methods["L1 mask of other"] = {"method": "l1_mask", "from": "full", "match": "mask"}
    methods["LoRA r 4 on full"] = None
    recipe = parse_recipe(content | {"controls": "standard"})
    assert list(recipe.methods)[:4] == list(methods)[:-1], "null leaves a control out"
    assert set(recipe.methods) - set(methods) == {
        "warm restart of full", "annealed full", "interpolated full",
        "partial full, layers of mask",
        *(f"{control} of mask" for control in ("random mask", "best of 8 random masks", "L1 mask", "Wanda mask")),
        *(f"{control} of other" for control in ("random mask", "best of 8 random masks", "Wanda mask")),
        *(f"random damage of {mask}, {then}" for mask in ("mask", "other") for then in ("refit", "LoRA r 16")),
        "LoRA r 1 on full", "LoRA r 16 on full",
    }  # fmt: skip
    assert recipe.methods["L1 mask of other"].match == "mask", "a control of that name is the recipe's own"
    red, blue = ["mask", "my mask", "mask 20 %", "a mask with KL", "mask 3", "mask 4"], ["full", "full with KL to base"]
    shown = series_looks(dict.fromkeys([*recipe.methods, *red, *blue])).values()
    assert len({(look.colour, look.marker) for look in shown}) == len(shown), "no two have one look"
    assert [[look.name for look in shown if look.colour == colour] for colour in ("red", "blue")] == [red, blue]
    for method in recipe.methods.values():
        if method.method in ("full", "peft") and method.name != "full":
            assert method.start == "full" and method.options["max_steps"] == 2
    plan = plan_of(content | {"controls": "standard"}, lambda run: Heldout(1.0))
    runs = {run.name: run for run in plan.runs if run.seed == 1}
    refit, restart = runs["random damage of mask, refit"], runs["warm restart of full"]
    assert refit.masks == {"start_mask": runs["random mask of mask"]} and refit.num_tried == restart.num_tried == 3
    tried = ("best of 8 random masks of mask", "interpolated full", "mask", "L1 mask of mask")
    assert [runs[name].num_tried for name in tried] == [8, 10, 2, 0]
    assert refit.options["learning_rate"] == 0.5 * restart.start.options["learning_rate"]
    # Where the mask's steps are tuned, so are those of what is trained beside it.
    methods["mask"] = {"method": "mask", "from": "full", "tune": {"max_steps": [2, 4]}}
    restart = parse_recipe(content | {"controls": "standard"}).methods["warm restart of full"]
    assert restart.tune["max_steps"] == [2, 4] and "learning_rate" in restart.tune
    # So are rows and batches, which are no more rates to try.
    tried = {"max_train_samples": [8, 16, 24, 32], "per_device_train_batch_size": [2, 4]}
    methods["mask"] = {"method": "mask", "from": "full", "tune": tried | {"learning_rate": [1e-3]}}
    restart = parse_recipe(content | {"controls": "standard"}).methods["warm restart of full"]
    assert restart.tune | tried == restart.tune and len(restart.tune["learning_rate"].times_parent) == 3


def test_controls_of_the_masks_that_are_named(content):
    content["methods"] |= {"other": {"method": "mask", "from": "full", "max_steps": 2}}
    names = parse_recipe(content | {"controls": ["mask"]}).methods
    assert "L1 mask of mask" in names and not [name for name in names if "of other" in name]
    with pytest.raises(UserError, match="controls: 'full' is not a learned mask"):
        parse_recipe(content | {"controls": ["full"]})
    with pytest.raises(UserError, match="is not a learned mask"):
        parse_recipe(content | {"controls": [["mask"]]})
    without = {name: method for name, method in content["methods"].items() if method["method"] != "mask"}
    with pytest.raises(UserError, match="controls: the study has no learned mask"):
        parse_recipe(content | {"controls": "standard", "methods": without})
    with pytest.raises(UserError, match=r"grid mask.max_steps gives the mask several lengths"):
        parse_recipe(content | {"controls": "standard", "grid": {"mask.max_steps": [2, 4]}})


def test_controls_have_the_masks_batches_and_no_fewer_settings(content):
    own = {"per_device_train_batch_size": 2, "max_train_samples": 24, "mask_layers_to_transform": [1], "max_steps": 2}
    tried = {"learning_rate": [1e-3, 1e-2], "mask_sparsity": [0.1, 0.3, 0.5]}
    content["methods"]["mask"] = {"method": "mask", "from": "full", "tune": tried} | own
    content["train"]["max_steps"] = 2  # said for all: not once more for each
    made = parse_recipe(content | {"controls": "standard"}).methods
    trained = ("warm restart of full", "annealed full", "random damage of mask, refit")
    for name in (*trained, "partial full, layers of mask"):
        options = made[name].options
        assert options["per_device_train_batch_size"] == 2 and options["max_train_samples"] == 24
        assert "max_steps" not in options
        if name != "annealed full":
            assert sorted(made[name].tune["learning_rate"].times_parent) == [0.125, 0.25, 0.5, 1, 2, 4]
    content["methods"]["other"] = {"method": "mask", "from": "full", "max_steps": 2} | own
    assert "warm restart of full (other)" in parse_recipe(content | {"controls": "standard"}).methods, "three rates"


def test_a_mask_of_a_model_that_was_not_tuned_has_the_controls_that_need_no_rate(content):
    """Deletion tuning, for one; nothing there has a rate of which others would be multiples."""
    content["methods"] = {"base": {"method": "pretrained"}, "mask": {"method": "mask", "max_steps": 2}}
    fixed = {f"{control} of mask" for control in ("random mask", "best of 8 random masks", "L1 mask", "Wanda mask")}
    for start in ({}, {"from": "base"}):
        content["methods"]["mask"] |= start
        plan = plan_of(content | {"controls": "standard"}, lambda run: Heldout(1.0))
        assert set(plan.recipe.methods) == {"base", "mask"} | fixed
    content["methods"]["refit"] = {
        "method": "full",
        "from": "base",
        "tune": {"learning_rate": {"times_parent": [1, 2]}},
    }
    with pytest.raises(UserError, match="is given as times_parent, and 'base' has none; give the values"):
        plan_of(content)


@pytest.mark.slow
def test_a_study_with_standard_controls_runs_to_its_end(content, tmp_path, in_process):
    content |= {"seeds": [0], "controls": "standard"}
    content["methods"]["mask"]["mask_layers_to_transform"] = [1]
    file, folder = tmp_path / "study.yaml", tmp_path / "study"
    file.write_text(yaml.safe_dump(content))
    assert main(["study", str(file), "--output_dir", str(folder)]) == 0
    results = [json.loads(path.read_text()) for path in folder.glob(f"{layout.RESULTS}/*/{layout.RESULT}")]
    assert {result["name"] for result in results} == set(parse_recipe(content).methods)
    tokens = {result["name"]: result["study"]["total_tokens"] for result in results}
    assert tokens["random damage of mask, refit"] == tokens["warm restart of full"] > tokens["interpolated full"]


def test_earlier_abilities_are_measured_beside_the_gain(content, tmp_path, in_process):
    content |= {"seeds": [0], "methods": {"base": {"method": "pretrained"}}}
    content["methods"]["full"] = {"method": "full", "max_steps": 2}
    content["methods"]["mixed"] = {"method": "interpolate", "from": "full"}
    earlier = tmp_path / "earlier.jsonl"
    earlier.write_text("\n".join(json.dumps({"prompt": f"{n}+8=", "completion": f"{n + 8}"}) for n in range(80, 90)))
    long = shutil.copytree(content["model"], tmp_path / "long")  # whose context has room for a benchmark's answer
    config = json.loads((long / "config.json").read_text())
    (long / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    content["model"] = str(long)
    school = {"tasks": ["gsm8k"], "data_dir": str(benchmark_files.write(tmp_path / "files")), "limit": 2}
    content["evaluation"]["before"] = {"sums": {"dataset_name": str(earlier), "eval_split_size": 8}, "school": school}
    file, folder = tmp_path / "study.yaml", tmp_path / "study"
    file.write_text(yaml.safe_dump(content))
    assert main(["study", str(file), "--output_dir", str(folder)]) == 0
    results = [json.loads(path.read_text()) for path in folder.glob(f"{layout.RESULTS}/*/{layout.RESULT}")]
    assert {result["name"] for result in results} == {"base", "full", "mixed"}
    for result in results:
        assert [(name, len(task["items"])) for name, task in result["tasks"].items()] == [
            ("heldout", 9), ("before: school gsm8k", 2), ("before: sums", 8)
        ]  # fmt: skip
    # Killed when of the evaluations of a model one was finished.
    (whole,) = folder.glob(f"{layout.RESULTS}/full-*/{layout.RESULT}")
    part = json.loads(whole.read_text())
    part["tasks"] = {"heldout": part["tasks"]["heldout"]}
    partial = whole.parent.rename(whole.parent.with_name(f"{whole.parent.name}.partial"))
    (partial / layout.RESULT).write_text(json.dumps(part))
    assert main(["study", str(file), "--output_dir", str(folder)]) == 0
    assert len(json.loads(whole.read_text())["tasks"]) == 3 and not partial.exists()
    table = (folder / layout.STUDY_TABLE.format("small")).read_text()
    assert "before: sums" in table and "no evaluation.before" not in table
    (record,) = folder.glob(f"{layout.RUNS}/mixed-*/{layout.TRAINING}")
    assert len(json.loads(record.read_text())["summary"]["history"]) == 10  # fractions of the way


def test_two_sets_with_files_of_one_name_have_two_names_in_tables(content, tmp_path, in_process):
    content |= {"seeds": [0], "methods": {"base": {"method": "pretrained"}}}
    before = {}
    for name in ("English", "French"):
        file = tmp_path / name / "test.jsonl"
        file.parent.mkdir()
        file.write_text("\n".join(json.dumps({"text": f"{name} {n}"}) for n in range(4)))
        before[name] = {"dataset_name": str(file)}
    content["evaluation"]["before"] = before
    file, folder = tmp_path / "study.yaml", tmp_path / "study"
    file.write_text(yaml.safe_dump(content))
    assert main(["study", str(file), "--output_dir", str(folder)]) == 0
    table = (folder / layout.STUDY_TABLE.format("small")).read_text()
    head = "| test.jsonl nll (nats/token) | before: English nll (nats/token) | before: French nll (nats/token) |"
    assert head in table  # the test set of `heldout` is a test.jsonl too


def test_rows_of_a_kl_term_are_checked_before_anything_is_trained(content, tmp_path, monkeypatch):
    """Also those of a method that waits for its parent."""

    def call(words, log):
        if main(words[3:]) != 0:
            raise UserError("the command failed")

    replace_commands(monkeypatch, call)
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "one row"}')
    content["methods"]["mask"] |= {"kl_budget": 0.1, "kl_dataset_name": str(text)}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(content))
    assert main(["study", str(file), "--output_dir", str(tmp_path / "study")]) == 2
    assert not list((tmp_path / "study").glob(f"{layout.RUNS}/*/{layout.RUN}"))


def test_a_budget_for_forgetting_is_tuned(content, tmp_path, in_process):
    """Its rows are named by their content, and found in the folder of the data."""
    folder = tmp_path / "study"
    (tmp_path / "data").mkdir()
    text = tmp_path / "data" / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"one and {n}"}) for n in range(9)))
    of_budget = {"kl_dataset_name": "text.jsonl", "kl_batch_size": 2, "tune": {"kl_budget": [1e-6, 10.0]}}
    content |= {"seeds": [0], "methods": {"mask": {"method": "mask", "max_steps": 2, **of_budget}}}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(content))
    words = ["study", str(file), "--data_dir", str(text.parent), "--output_dir", str(folder)]
    assert main(words) == 0
    records = [json.loads(path.read_text()) for path in folder.glob(f"{layout.RUNS}/*/{layout.RUN}")]
    assert sorted(record["settings"]["kl_budget"] for record in records) == [1e-6, 10.0]
    assert {record["settings"]["kl_dataset_name"] for record in records} == {"text.jsonl"}
    summary = json.loads((folder / layout.SUMMARY.format("small")).read_text())
    (tuning,) = summary["models"]["base0"]["tuning"]
    assert tuning["winner"]["kl_budget"] == 10.0 and tuning["num_settings"] == 2

    recipe = load_recipe(file, text.parent)
    found = {run.options["kl_budget"]: heldout(Study(folder, recipe), run) for run in checked_plan(recipe).runs}
    assert found[1e-6].over_budget > 0 and found[10.0].over_budget == 0

    def ids():
        return {run.id for run in checked_plan(load_recipe(file, text.parent)).runs}

    assert ids() == {record["run"] for record in records}
    text.write_text(text.read_text().replace("one", "two"))
    assert not ids() & {record["run"] for record in records}
