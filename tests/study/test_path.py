"""Paths: every trained method measured between the base model and the end of training."""

import json
import math
import re

import pytest
import yaml

from maskft.data.splits import load_splits
from maskft_common import files, layout
from maskft_common.errors import UserError
from maskft_lab.cli.main import main
from maskft_lab.evaluation import command_line as evaluate
from maskft_lab.study.check import checked_plan
from maskft_lab.study.evaluate import _model_options, evaluation_words
from maskft_lab.study.folder import Study, step_at
from maskft_lab.study.load_recipe import load_recipe, parse_recipe
from maskft_lab.study.path import choose, path_sets, points_of, with_chosen_point
from maskft_lab.study.plan import build_plan
from maskft_lab.study.recipe import Choice
from maskft_lab.study.run_options import parsed_run
from maskft_lab.study.study_run import Heldout, PathPoint, Trial, Tuned
from maskft_lab.study.train import heldout, training_summary
from small_study import recipe, replace_commands, write

LORA = {"method": "peft", "peft_config": {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}}
STEPS = {"max_steps": 4, "eval_steps": 0.5, "save_steps": 0.5}


@pytest.fixture(autouse=True)
def commands(monkeypatch):
    """Commands run in this process, which saves a start of Python for each."""
    found = []
    replace_commands(monkeypatch, lambda words, log: found.append(words[3]) or main(words[3:]))
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
    test, probe = ({"dataset_name": str(tmp_path / f"{name}.jsonl")} for name in ("test", "probe"))
    for factor, rows in ((1, test), (2, probe)):
        lines = [{"prompt": f"{n}*{factor}=", "completion": f"{n}", "answer": f"{n}"} for n in range(6)]
        (tmp_path / rows["dataset_name"]).write_text("\n".join(map(json.dumps, lines)))
    content["evaluation"] = {"heldout": test, "max_new_tokens": 2, "bf16": True}
    kl, text = {**test, "kl": True}, {**probe, "max_eval_samples": 5}
    content["path"] = {"checkpoints": [0.5, 1.0], "scales": [0.5], "before": {"kl": kl, "text": text}}
    return write(tmp_path, content)


@pytest.fixture
def content(study):
    return yaml.safe_load(study.read_text())


def planned(content, look=lambda run: None):
    return build_plan(checked_plan(parse_recipe(content)).recipe, look)


def test_every_point_is_measured_on_heldout_rows_and_probes(content, tmp_path, commands):
    """Of a run in one process; where one is missing it alone is measured again."""
    still = {"method": "full", "from": "full", "learning_rate": 0, **STEPS}  # which changes nothing of its start
    content["methods"]["still"], out = still, tmp_path / "study"
    content["evaluation"]["before"] = {"other": content["evaluation"]["heldout"]}
    study = write(tmp_path, content)
    assert main(["study", str(study), "--output_dir", str(out)]) == 0
    assert commands.count("evaluate") == 6 + 5  # paths of all runs, and all but one of full fine-tuning on test rows
    (lost,) = out.glob(f"{layout.RUNS}/mask-*/path/text-*/1-0.5/{layout.RESULT}")
    before = {path: path.stat().st_mtime_ns for path in out.glob(f"{layout.RUNS}/*/path/*/*/{layout.RESULT}")}
    lost.write_text("{")  # as a full disk leaves it
    (damaged := lost.parents[3] / "checkpoint-1.damaged").mkdir()  # as a resumed training renames one
    assert main(["study", str(study), "--output_dir", str(out)]) == 0
    damaged.rmdir()
    assert commands.count("evaluate") == 6 + 5 + 1
    assert "no curve is written without path.choose" in (out / layout.STUDY_TABLE.format("small")).read_text()
    assert [path for path in before if path.stat().st_mtime_ns != before[path]] == [lost]
    for folder in (out / layout.RUNS).iterdir():
        points = {
            p.parent.name: json.loads(p.read_text())["tasks"]["heldout"] for p in folder.glob("path/kl-*/*/result.json")
        }
        assert set(points) == ({"0-0"} if folder.name.startswith("base") else {"0.5-1", "1-1", "1-0.5"}), folder
        kl = {name: task["metrics"]["kl"]["value"] for name, task in points.items()}
        if folder.name.startswith("base"):
            assert kl == {"0-0": 0}
        else:
            assert 0 < kl["1-0.5"] < kl["1-1"]
            assert (kl["0.5-1"] == kl["1-1"]) == folder.name.startswith("still")
            assert len(list(folder.glob("checkpoint-*"))) == 2


@pytest.mark.slow
def test_a_choice_is_made_among_all_points_and_reported_on_test_rows(content, tmp_path):
    content["path"]["choose"] = {"forgetting_at_most": 1.0e-3}
    content["methods"]["random"] = {"method": "random_mask", "match": "mask"}
    content["evaluation"]["before"] = {"text": content["evaluation"]["heldout"]}
    content |= {"baseline": "LoRA", "seeds": [0, 1], "fixed_seeds": True}
    content["methods"]["mask"] |= {"eval_steps": 0.25, "save_steps": 0.25}  # more checkpoints than are kept elsewhere
    del content["methods"]["full"]
    out = tmp_path / "study"
    for name in ("small", "small-2"):  # of a probe that it has no more, and of another study
        files.write_text(out / layout.CURVE.format(name, "old"), '{"probe": "old"}')
    assert main(["study", str(write(tmp_path, content)), "--output_dir", str(out)]) == 0
    assert [file.name for file in out.glob("curve*old*")] == [layout.CURVE.format("small-2", "old")]
    summary = json.loads((out / layout.SUMMARY.format("small")).read_text())["models"]["base0"]
    assert {row["result"] for row in summary["runs"]} == {folder.name for folder in (out / layout.RESULTS).iterdir()}
    tuning = {each["method"]: each for each in summary["tuning"]}
    assert set(tuning) == {"LoRA", "mask"} and all(len(each["points"]) == 3 for each in tuning.values())
    results = {
        r["name"]: r for r in (json.loads(f.read_text()) for f in out.glob(f"{layout.RESULTS}/*/{layout.RESULT}"))
    }
    for name, each in tuning.items():
        within = [p for p in each["points"] if p["forgetting"] <= 1.0e-3] or [
            min(each["points"], key=lambda p: p["forgetting"])
        ]
        best = max(within, key=lambda p: (p["gain"], -p["forgetting"]))
        assert each["point"] == {key: best[key] for key in ("checkpoint", "scale")} == results[name]["study"]["point"]
        assert results[name]["model"]["scale"] == best["scale"]
    assert results["base"]["model"]["adapter"] is None and "point" not in results["random"]["study"]
    curve = json.loads((out / layout.CURVE.format("small", "text")).read_text())
    assert [p["is_chosen"] for p in curve["points"]] == [False] * 6 + [True] * 3
    for name, each in tuning.items():
        of_path, (chosen,) = (
            [p for p in curve["points"] if p["method"] == name and p["is_chosen"] == which] for which in (False, True)
        )
        assert [p["nats_forgotten"] for p in of_path] == pytest.approx([p["forgetting"] for p in each["points"]])
        low, high = chosen["nats_forgotten_interval"]
        assert low <= chosen["nats_forgotten"] <= high
    stored = {p["method"]: p["num_bytes"] for p in curve["points"] if p["is_chosen"]}
    assert stored["LoRA"] == 2 * 2 * 3 * (4 * 32 + 2 * (32 + 16) + 3 * (32 + 48))
    assert 0 < stored["mask"] < stored["LoRA"]
    assert "of the change, is the best of 3 on held-out rows" in (out / layout.STUDY_TABLE.format("small")).read_text()
    # Another study in the folder, without a path, leaves the checkpoints that were chosen.
    chosen = sorted(out.glob(f"{layout.RUNS}/*/checkpoint-*"))
    del content["path"], content["methods"]["random"], content["methods"]["mask"]
    assert main(["study", str(write(tmp_path, content | {"name": "other"})), "--output_dir", str(out)]) == 0
    assert sorted(out.glob(f"{layout.RUNS}/*/checkpoint-*")) == chosen and len(chosen) == 2 * (2 + 2)


def a_point(gain, forgetting, nll=0.0):
    return PathPoint(None, (1.0, gain), gain, forgetting, {"heldout": {"nll": nll}})


def test_what_is_chosen():
    points = [a_point(0.9, 0.5), a_point(0.9, 0.3), a_point(0.8, 0.1), a_point(0.4, 0.05)]
    least = [choose(points, 1.0, Choice(accuracy_at_least=share)).forgetting for share in (0.95, 0.8, 0.7, 0.4)]
    assert least == [0.3, 0.1, 0.1, 0.05]  # none gains 0.95, two come nearest
    most = [choose(points, 1.0, Choice(forgetting_at_most=most)).gain for most in (0.4, 0.2, 0.06, 0.01)]
    assert most == [0.9, 0.8, 0.4, 0.4]
    equal = [a_point(0.0, 0.1, 3.0), a_point(0.0, 0.1, 2.0)]  # the lower loss
    for rule in (Choice(accuracy_at_least=0.9), Choice(forgetting_at_most=0.2), Choice(forgetting_at_most=0.01)):
        assert choose(equal, 0.0, rule) is equal[1]
    heldout = Heldout(1.0, {(1.0, 1.0): {"heldout": {"nll": None}}, (0.5, 1.0): {"heldout": {"nll": 1.0}}})
    found = points_of([Trial({}, None, heldout)], {"heldout": {"nll": 2.0}})
    assert [point.point for point in found] == [(0.5, 1.0)], "the other diverged"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choose": {"accuracy_at_least": 0.9, "forgetting_at_most": 1.0}}, "one of accuracy_at_least and"),
        ({"choose": {"accuracy_at_least": 2}}, "less than or equal to 1"),
        ({"checkpoints": [0.25, 1.0]}, "path.checkpoints has 0.25, which must be a multiple of save_steps"),
        ({"checkpoints": []}, "at least 1 item"),
        ({"before": {"prompts": {"kl": True}}, "choose": {"forgetting_at_most": 1.0}}, "whose loss is measured"),
    ],
)
def test_a_path_that_cannot_be(change, message, content, tmp_path, capsys):
    content["path"] |= change
    content["methods"] = {name: content["methods"][name] for name in ("base", "LoRA")}
    content["methods"]["LoRA"] |= {"max_steps": 4}
    assert main(["study", str(write(tmp_path, content)), "--output_dir", str(tmp_path / "study")]) == 2
    assert message in capsys.readouterr().err


def test_a_path_that_is_added_later_is_refused_before_the_other_runs(content, tmp_path, capsys):
    """Without a path the checkpoints of a finished run are deleted; the error came after the runs that were missing."""
    path = content.pop("path")
    content["methods"] = {name: content["methods"][name] for name in ("base", "LoRA")}
    content["methods"]["LoRA"] |= {"max_steps": 4}
    out = tmp_path / "study"
    assert main(["study", str(write(tmp_path, content)), "--output_dir", str(out)]) == 0
    capsys.readouterr()

    content["methods"]["another"] = content["methods"]["LoRA"] | {"learning_rate": 2e-2}
    content["path"] = path
    before = sorted((out / layout.RUNS).iterdir())
    assert main(["study", str(write(tmp_path, content)), "--output_dir", str(out)]) == 2
    assert "delete runs made with other path settings first" in capsys.readouterr().err
    assert sorted((out / layout.RUNS).iterdir()) == before


def test_checkpoints_that_rounding_moves(content):
    """9 steps saved at every quarter: transformers rounds that up to every third."""
    content["methods"] = {name: content["methods"][name] for name in ("base", "LoRA")}
    content["methods"]["LoRA"] |= {"max_steps": 9, "save_steps": 0.25, "eval_steps": 0.25}
    content["path"]["checkpoints"] = [0.25, 0.75, 1.0]
    planned(content)
    content["path"]["checkpoints"] = [0.5]
    # Of save_steps 0 the last step alone is saved.
    content["methods"]["LoRA"] |= {"save_steps": 0, "eval_strategy": "no"}
    content["path"]["checkpoints"] = [1.0]
    planned(content)
    content["methods"]["LoRA"] |= {"save_steps": 0.25, "eval_strategy": "steps"}
    content["path"]["checkpoints"] = [0.5]
    message = "has 0.5, which must be a multiple of save_steps: of 9 steps, 3 is the nearest that is saved"
    with pytest.raises(UserError, match=re.escape(message)):
        planned(content)


def test_where_rounding_moves_a_checkpoint_the_nearest_is_measured(content, tmp_path):
    """Of 6 steps, known only with the rows, a quarter is saved every second: none at 3, which failed after training."""
    content["methods"] = {name: content["methods"][name] for name in ("base", "LoRA")}
    shares = {"max_steps": None, "num_train_epochs": 1, "per_device_train_batch_size": 8}
    content["methods"]["LoRA"] |= shares | {"save_steps": 0.25, "eval_steps": 0.25}
    content["path"] = {"checkpoints": [0.5, 1.0], "before": {"text": content["path"]["before"]["text"]}}
    out = tmp_path / "study"
    assert main(["study", str(write(tmp_path, content)), "--output_dir", str(out)]) == 0
    (folder,) = (out / layout.RUNS).glob("lora-*")
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]


@pytest.mark.parametrize(
    ("share", "num_steps", "interval", "step"),
    [(0.5, 33, 0.25, 18), (0.5, 102, 0.1, 55), (0.1, 102, 0.1, 11), (1.0, 33, 0.25, 33), (0.5, 11, 0.1, 6)],
)
def test_the_step_at_a_share(share, num_steps, interval, step):
    assert step_at(share, num_steps, interval) == step
    # In steps, and at the end of epochs, the share itself.
    assert step_at(share, num_steps, 3) == share * num_steps


def test_checkpoints_of_other_strategies(content):
    """Two epochs, saved at the end of each; and strategies that do not save where the path looks."""
    content["methods"] = {name: content["methods"][name] for name in ("base", "LoRA")}
    lora = content["methods"]["LoRA"]
    lora |= {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch", "eval_strategy": "epoch"}
    content["path"]["checkpoints"] = [0.5, 1.0]
    planned(content)
    content["path"]["checkpoints"] = [0.25, 1.0]
    with pytest.raises(UserError, match=r"has 0\.25, but save_strategy epoch saves at the end of each of 2 epochs"):
        planned(content)
    for strategy in ("no", "best"):
        lora |= {"save_strategy": strategy, "load_best_model_at_end": strategy == "best"}
        with pytest.raises(UserError, match=f"which save_strategy '{strategy}' does not save; set save_strategy to"):
            planned(content)


def restart(content, choose=None, scales=(), **options):
    content["methods"]["restart"] = {"method": "full", "from": "full", **options}
    content["path"] |= {"choose": choose, "scales": [*scales]}


MOST = {"accuracy_at_least": 0.95}
OVER_BASE = "a path measures adapters over the model before training; drop from or path"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["path"]["before"].update(heldout={}), "path.before: heldout are the rows that choose"),
        (lambda c: c["methods"].pop("base"), r"add the model before it, \{method: pretrained\}"),
        (lambda c: c["methods"]["mask"].update({"from": "full"}), f"mask.from is 'full', and {OVER_BASE}"),
        (lambda c: c["methods"]["LoRA"].update({"from": "full"}), f"LoRA.from is 'full', and {OVER_BASE}"),
        (lambda c: restart(c, MOST, [0.5]), "restart starts from 'full', of which path.choose may take a part"),
        (lambda c: restart(c, MOST, learning_rate="current"), "may take .* drop choose, or scales and"),
        (lambda c: c["methods"]["mask"].update(split_seed=1), "'base, .*' and 'mask, .*' have different held-out rows"),
    ],
)
def test_what_does_not_go_with_a_path(change, message, content):
    change(content)
    with pytest.raises(UserError, match=message):
        planned(content)


@pytest.mark.parametrize("options", [{}, {"eval_split_size": 5, "split_seed": 3}, {"eval_dataset_name": "probe.jsonl"}])
def test_a_path_is_measured_on_the_rows_that_training_holds_out(options, content, tmp_path, monkeypatch):
    """The model before training too; without an option these are those of the default."""
    monkeypatch.chdir(tmp_path)
    del content["data"]["sums"]["eval_split_size"]
    content["train"] |= options
    plan = planned(content)
    trained = parsed_run(next(run for run in plan.runs if run.name == "LoRA")).data
    rows = load_splits(trained, trained.split_seed).heldout["prompt"]
    for run in plan.runs:
        _, how = path_sets(plan.recipe, run, tmp_path)["heldout"]
        args = evaluate.make_parser().parse_args(["--output_dir", "any", *evaluation_words(how)])
        assert [row["prompt"] for row in evaluate.check_inputs(args)] == list(rows), run.title


@pytest.mark.slow
def test_a_budget_comes_before_the_rule(content, tmp_path):
    """A point is held to it by the KL of its checkpoint; the table says what was reached."""
    content["path"] |= {"choose": {"accuracy_at_least": 0.01}, "scales": [0.5]}
    # A mask begins with removed weights, beyond the first budget. Of LoRA a part of the change is within it.
    budgets = {"mask": [1.0e-6, 10.0], "LoRA": [1.0e-4]}
    content["methods"] = {name: content["methods"][name] for name in ("base", "mask", "LoRA")}
    for name, values in budgets.items():
        content["methods"][name]["tune"] = {"kl_budget": values}
    file, out = write(tmp_path, content), tmp_path / "study"
    assert main(["study", str(file), "--output_dir", str(out)]) == 0

    study = Study(out, load_recipe(file))
    trials = {}
    for run in checked_plan(study.recipe).runs:
        if run.tried:
            trials[run.name, run.options["kl_budget"]] = run
    assert len(trials) == 3
    excess = {key: heldout(study, run).points_over_budget for key, run in trials.items()}
    half, whole, part = (0.5, 1.0), (1.0, 1.0), (1.0, 0.5)
    assert all(set(of_points) == {half, whole, part} for of_points in excess.values())
    assert all(value == 0 for value in excess["mask", 10.0].values())
    assert all(0 < value < 1 for value in excess["mask", 1.0e-6].values())
    # LoRA keeps a part of the change of one step, which its point has. Other checkpoints hold the whole change.
    lora = trials["LoRA", 1.0e-4]
    kept = training_summary(study.run_folder(lora))["kl"]
    assert kept["step"] == 2 and kept["part"] < 1
    assert study.checkpoint(lora, 0.5) == study.run_folder(lora)
    assert study.checkpoint(lora, 1.0) == study.run_folder(lora) / "checkpoint-4"
    of_lora = excess["LoRA", 1.0e-4]
    assert of_lora[half] == 0 < of_lora[whole] == of_lora[part]

    summary = json.loads((out / layout.SUMMARY.format("small")).read_text())["models"]["base0"]
    of_mask, of_lora = summary["tuning"]
    assert of_mask["winner"] == {"kl_budget": 10.0}
    assert of_lora["point"] == {"checkpoint": 0.5, "scale": 1.0}
    table = (out / layout.STUDY_TABLE.format("small")).read_text()
    assert "| KL of budget |" in table
    for tuned, budget in ((of_mask, "10"), (of_lora, "0.0001")):
        # The KL of a scaled change is not measured.
        is_whole = tuned["point"]["scale"] == 1
        cell = rf"0\.\d+ of {budget}" if is_whole else f"not measured, of {budget}"
        assert re.search(rf"\| {cell} \|", table), table


def test_a_rival_beyond_its_budget_sets_no_bar():
    """Its gain would be the best, of which each method has to reach a share."""
    early, whole = (0.5, 1.0), (1.0, 1.0)
    base = {"heldout": {"nll": 3.0}, "text": {"nll": 1.0}}

    def tuned(early_gain, whole_gain, whole_excess):
        gains = {early: early_gain, whole: whole_gain}
        # The whole training forgets more.
        texts = {early: 1.1, whole: 1.5}
        values = {point: {"heldout": {"nll": 3.0 - gains[point]}, "text": {"nll": texts[point]}} for point in gains}
        heldout = Heldout(1.0, values, points_over_budget={early: 0.0, whole: whole_excess})
        trial = Trial({}, None, heldout)
        return Tuned([trial], trial, is_settled=True)

    def chosen(own, *rivals):
        return with_chosen_point(own, rivals, base, Choice(accuracy_at_least=0.95)).point

    own = tuned(0.97, 1.0, 0.0)
    assert chosen(own) == early
    assert chosen(own, tuned(0.1, 2.0, 0.0)) == whole, "neither reaches 95 % of the rival's: the most gain"
    assert chosen(own, tuned(0.1, 2.0, 0.2)) == early
    # The most gain of its own is beyond too.
    assert chosen(tuned(0.5, 1.0, 0.2)) == early
    assert chosen(tuned(0.5, 1.0, math.inf)) == early


def looks(gains):
    """Losses of a mask and of the others: what of 3 nats ``gains`` says of a run, at points that forget 1 and 0.1."""

    def look(run):
        gained = gains(run)
        points = {(1.0, 1.0): (3 - gained, 2.0), (0.5, 1.0): (3.05 - gained, 1.1)} if gained else {(0.0, 0.0): (3, 1.0)}
        return Heldout(1.0, {p: {"heldout": {"nll": own}, "text": {"nll": text}} for p, (own, text) in points.items()})

    return look


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["methods"]["LoRA"].update(data="sums"),  # the first, written out
        lambda c: c["methods"]["LoRA"].update({"from": "base"}),
        lambda c: c["methods"]["LoRA"].update(learning_rate=1e-3) or c.update(grid={"LoRA.learning_rate": [1e-3, 0.1]}),
        lambda c: c["methods"].update(sparse={"method": "full", "start_mask": "mask", **STEPS}),  # no rival: it waits
    ],
)
def test_all_methods_from_the_base_are_rivals(change, content):
    """None but LoRA reaches 95 % of what it gains, at the best of its rates: of others the point with most gain."""
    content["path"] |= {"choose": MOST, "scales": []}
    change(content)
    gains = {"base": 0.0, "LoRA": 2.9}

    def gain(run):
        return 2.0 if run.options.get("learning_rate") == 1e-3 else gains.get(run.method.name, 2.0)

    plan = planned(content, looks(gain))
    assert {run.point for run in plan.runs if run.name == "mask"} == {(1.0, 1.0)}
    rates = {run.options["learning_rate"] for run in plan.runs if run.method.name == "LoRA"}
    assert rates == ({1e-3, 0.1} if "grid" in content else {1e-2})
    del content["methods"]["LoRA"]
    plan = planned(content | {"grid": {}}, looks(gain))
    assert {run.point for run in plan.runs if run.name == "mask"} == {(0.5, 1.0)}


def test_what_is_made_from_another_point_is_another_run(content):
    restart(content)
    content["methods"]["random"] = {"method": "random_mask", "match": "mask"}

    def ids(choose):
        content["path"] = path | {"choose": choose} if path else None
        plan = planned(content, looks(lambda run: 2.0 if run.options else 0.0))
        return {run.name: run.id for run in plan.runs if run.tried is None}

    path = content["path"]
    most, least = ids({"forgetting_at_most": 5.0}), ids({"forgetting_at_most": 0.5})
    assert {name for name in most if most[name] != least[name]} == {"random", "restart"}
    without, path = ids(None), None
    assert without == ids(None) and not {*without.items()} & {(name, most[name]) for name in ("random", "restart")}


def test_a_fixed_mask_is_kept_as_far_as_its_mask(content, tmp_path, monkeypatch):
    content["methods"]["random"] = {"method": "random_mask", "match": "mask"}
    content["path"] |= {"choose": {"forgetting_at_most": 0.5}}
    values = {"heldout": {"nll": 1.0}, "text": {"nll": 1.0}}
    plan = planned(content, lambda run: Heldout(1.0, {(1.0, 0.5) if run.options else (0.0, 0.0): values}))
    monkeypatch.setattr(Study, "model", lambda self, run, role: run.id)
    of_runs = {run.name: run for run in plan.runs if run.tried is None}
    scales = {name: _model_options(Study(tmp_path, plan.recipe), run, "best")["scale"] for name, run in of_runs.items()}
    assert scales["random"] == scales["mask"] == 0.5 and scales["base"] == 1.0


def test_where_the_base_fails_the_study_says_why(content, tmp_path, monkeypatch, capsys):
    def call(words, log):
        if words[3] == "evaluate" and log.parent.name.startswith("base"):
            raise UserError("no room")
        main(words[3:])

    replace_commands(monkeypatch, call)
    content["path"]["choose"] = MOST
    content["methods"] = {name: content["methods"][name] for name in ("base", "LoRA")}
    assert main(["study", str(write(tmp_path, content)), "--output_dir", str(tmp_path / "study")]) == 2
    assert "run 'base, seed 0' failed: no room" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, sums, probe: c["evaluation"].update(heldout=sums), "would be tuned on 16 held-out rows"),
        (
            lambda c, sums, probe: c["evaluation"].update(before={"earlier": probe}),
            "path.before.text would choose points on 5 held-out rows, and evaluation reports on the prompts of 5",
        ),
        (
            lambda c, sums, probe: c["path"]["before"].update(x={"tasks": "gsm8k"}),
            "path.before.x has an unknown option 'tasks'",
        ),
    ],
)
def test_points_are_not_chosen_on_test_rows(change, message, content, tmp_path, capsys):
    content["path"]["choose"] = {"accuracy_at_least": 0.9}
    change(content, {"dataset_name": content["data"]["sums"]["dataset_name"]}, content["path"]["before"]["text"])
    del content["methods"]["full"]
    assert main(["study", str(write(tmp_path, content)), "--output_dir", str(tmp_path / "study")]) == 2
    assert message in capsys.readouterr().err
