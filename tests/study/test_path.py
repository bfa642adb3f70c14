"""Paths: every trained method measured between the base model and the end of training."""

import json

import pytest
import yaml

from maskft_base import files
from maskft_lab.cli.main import main
from maskft_lab.study.execute import Study
from maskft_lab.study.recipe import Choice
from maskft_lab.study.runs import ChosenFrom
from maskft_lab.study.tuning import choose
from small_study import recipe, write

LORA = {"method": "peft", "peft_config": {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}}
STEPS = {"max_steps": 4, "eval_steps": 0.5, "save_steps": 0.5}


@pytest.fixture(autouse=True)
def commands(monkeypatch):
    """Commands run in this process, which saves a start of Python for each."""
    found = []
    monkeypatch.setattr(Study, "call", lambda self, words, log, tick: found.append(words[3]) or main(words[3:]))
    return found


@pytest.fixture
def study(base, data, tmp_path):
    methods = {
        "base": {"method": "pretrained"},
        "full": {"method": "full", **STEPS, "tune": {"learning_rate": [1.0e-3, 3.0e-3]}},
        "LoRA": {**LORA, **STEPS, "learning_rate": 1.0e-2},
        "mask": {"method": "mask", **STEPS, "learning_rate": 1.0e-2},
    }
    content = recipe(base, data, methods)
    test = tmp_path / "test.jsonl"
    test.write_text(
        "".join(json.dumps({"prompt": f"{n}*1=", "completion": str(n), "answer": str(n)}) + "\n" for n in range(6))
    )
    content["evaluation"] = {"heldout": {"dataset_name": str(test)}, "max_new_tokens": 2, "bf16": True}
    probe = {"dataset_name": str(test), "max_eval_samples": 5}
    content["path"] = {
        "checkpoints": [0.5, 1.0],
        "scales": [0.5],
        "before": {"kl": {**probe, "kl": True}, "text": probe},
    }
    return write(tmp_path, content)


def test_every_point_is_measured_on_heldout_rows_and_probes(study, tmp_path, commands):
    """Of a run in one process; where one is missing it alone is measured again."""
    out = tmp_path / "study"
    assert main(["study", str(study), "--output_dir", str(out)]) == 0
    assert commands.count("evaluate") == 5 + 4  # paths of all runs, and all but one of full fine-tuning on test rows
    (lost,) = out.glob(f"{files.RUNS}/mask-*/path/text-*/1-0.5/{files.RESULT}")
    before = {path: path.stat().st_mtime_ns for path in out.glob(f"{files.RUNS}/*/path/*/*/{files.RESULT}")}
    lost.unlink()
    assert main(["study", str(study), "--output_dir", str(out)]) == 0
    assert commands.count("evaluate") == 5 + 4 + 1
    assert [path for path in before if path.stat().st_mtime_ns != before[path]] == [lost]
    for folder in (out / files.RUNS).iterdir():
        points = {
            p.parent.name: json.loads(p.read_text())["tasks"]["heldout"] for p in folder.glob("path/kl-*/*/result.json")
        }
        assert set(points) == ({"0-0"} if folder.name.startswith("base") else {"0.5-1", "1-1", "1-0.5"}), folder
        kl = {name: task["metrics"]["kl"]["value"] for name, task in points.items()}
        if folder.name.startswith("base"):
            assert kl == {"0-0": 0}
        else:
            assert 0 < kl["1-0.5"] < kl["1-1"] and kl["0.5-1"] != kl["1-1"]
            assert len(list(folder.glob("checkpoint-*"))) == 2


def test_a_choice_is_made_among_all_points_and_reported_on_test_rows(study, tmp_path):
    content = yaml.safe_load(study.read_text())
    content["path"]["choose"] = {"forgetting_at_most": 1.0e-3}
    content["methods"]["random"] = {"method": "random_mask", "match": "mask"}
    content["evaluation"]["before"] = {"text": content["evaluation"]["heldout"]}
    content |= {"baseline": "base", "seeds": [0, 1], "fixed_seeds": True}
    content["methods"]["mask"] |= {"eval_steps": 0.25, "save_steps": 0.25}  # more checkpoints than are kept elsewhere
    del content["methods"]["full"]
    out = tmp_path / "study"
    assert main(["study", str(write(tmp_path, content)), "--output_dir", str(out)]) == 0
    tuning = {
        each["method"]: each
        for each in json.loads((out / files.SUMMARY.format("small")).read_text())["models"]["base0"]["tuning"]
    }
    assert set(tuning) == {"LoRA", "mask"} and all(len(each["points"]) == 3 for each in tuning.values())
    results = {r["name"]: r for r in (json.loads(f.read_text()) for f in out.glob(f"{files.RESULTS}/*/{files.RESULT}"))}
    for name, each in tuning.items():
        within = [p for p in each["points"] if p["forgetting"] <= 1.0e-3] or [
            min(each["points"], key=lambda p: p["forgetting"])
        ]
        best = max(within, key=lambda p: (p["gain"], -p["forgetting"]))
        assert each["point"] == {key: best[key] for key in ("checkpoint", "scale")} == results[name]["study"]["point"]
        assert results[name]["model"]["scale"] == best["scale"]
    assert results["base"]["model"]["adapter"] is None and "point" not in results["random"]["study"]
    curve = json.loads((out / files.CURVE.format("small", "text")).read_text())
    assert [p["is_chosen"] for p in curve["points"]] == [False] * 6 + [True] * 3
    for name, each in tuning.items():
        of_path, (chosen,) = (
            [p for p in curve["points"] if p["method"] == name and p["is_chosen"] == which] for which in (False, True)
        )
        assert [p["nats_forgotten"] for p in of_path] == pytest.approx([p["forgetting"] for p in each["points"]])
        low, high = chosen["nats_forgotten_interval"]
        assert low <= chosen["nats_forgotten"] <= high
    stored = {p["method"]: p["num_bytes"] for p in curve["points"] if p["is_chosen"]}
    assert (
        stored["LoRA"] == 2 * 2 * 3 * (4 * 32 + 2 * (32 + 16) + 3 * (32 + 48)) and 0 < stored["mask"] < stored["LoRA"]
    )
    assert "of the change, is the best of 3 on held-out rows" in (out / files.STUDY_TABLE.format("small")).read_text()


def a_point(gain, forgetting):
    return ChosenFrom(None, (1.0, gain), gain, forgetting, {})


def test_what_is_chosen():
    points = [a_point(0.9, 0.3), a_point(0.8, 0.1), a_point(0.4, 0.05)]
    least = [choose(points, 1.0, Choice(accuracy_at_least=share)).gain for share in (0.95, 0.8, 0.7, 0.4)]
    assert least == [0.9, 0.8, 0.8, 0.4]  # none gains 0.95, the first comes nearest
    assert [choose(points, 1.0, Choice(forgetting_at_most=most)).gain for most in (0.4, 0.2, 0.06, 0.01)] == [
        0.9,
        0.8,
        0.4,
        0.4,
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choose": {"accuracy_at_least": 0.9, "forgetting_at_most": 1.0}}, "one of accuracy_at_least and"),
        ({"choose": {"accuracy_at_least": 2}}, "less than or equal to 1"),
        ({"checkpoints": [0.2]}, "has no checkpoint at step 0.8"),
        ({"checkpoints": []}, "at least 1 item"),
    ],
)
def test_a_path_that_cannot_be(change, message, study, tmp_path, capsys):
    content = yaml.safe_load(study.read_text())
    content["path"] |= change
    content["methods"] = {name: content["methods"][name] for name in ("base", "LoRA")}
    content["methods"]["LoRA"] |= {"max_steps": 4}
    assert main(["study", str(write(tmp_path, content)), "--output_dir", str(tmp_path / "study")]) == 2
    assert message in capsys.readouterr().err


def test_a_path_needs_the_model_before_training(study, tmp_path, capsys):
    content = yaml.safe_load(study.read_text())
    del content["methods"]["base"]
    assert main(["study", str(write(tmp_path, content)), "--dry_run"]) == 2
    assert "add the model before it, {method: pretrained}" in capsys.readouterr().err


def test_points_are_not_chosen_on_test_rows(study, tmp_path, capsys):
    content = yaml.safe_load(study.read_text())
    content["path"]["choose"] = {"accuracy_at_least": 0.9}
    content["evaluation"]["heldout"] = {"dataset_name": content["data"]["sums"]["dataset_name"]}
    del content["methods"]["full"]
    assert main(["study", str(write(tmp_path, content)), "--output_dir", str(tmp_path / "study")]) == 2
    assert "would be tuned on 16 held-out rows" in capsys.readouterr().err
