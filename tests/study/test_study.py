"""Studies run for real: killed and gone on with, on a Ray cluster, and with a run that fails."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import psutil
import pytest
from rich.console import Console
from safetensors.torch import load_file

from killing import kill_ten_times, kill_when, start, stop_forked_when, wait_for
from maskft.masks.mask_set import MaskSet
from maskft_common import layout
from maskft_common.errors import UserError
from maskft_lab.cli.early import help_text
from maskft_lab.cli.main import main
from maskft_lab.study import board as boards
from maskft_lab.study import launchers
from maskft_lab.study import study as making
from maskft_lab.study.accounts import build_record, is_control
from maskft_lab.study.check import checked_plan
from maskft_lab.study.evaluate import _measured
from maskft_lab.study.folder import Study
from maskft_lab.study.launchers import launcher_of
from maskft_lab.study.launchers import slurm as slurm_launcher
from maskft_lab.study.load_recipe import load_recipe, parse_recipe
from maskft_lab.study.plan import build_plan
from maskft_lab.study.process import PYTHON, _can_run_here, last_line, run_command
from maskft_lab.study.run_record import read_run_record, write_run_record
from maskft_lab.study.study import failure_of, make, run_study
from maskft_lab.study.train import launch_words, record_at_point
from small_study import FULL, MASK, outcome, recipe, replace_commands, write

CHECKPOINT = f"{layout.RUNS}/full-*/checkpoint-3/{layout.MANIFEST}"  # the first, once it is whole


@pytest.mark.slow
def test_a_killed_study_ends_as_an_undisturbed_one(base, data, tmp_path, capsys):
    """Killed in the middle of training, after a checkpoint; asked to stop between training and evaluation."""
    content = recipe(base, data, {"full": FULL, "mask": MASK})
    content["data"]["sums"]["data_dir"] = str(tmp_path)
    file = write(tmp_path, content)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["study", str(file), "--output_dir", str(whole)]) == 0

    def checkpoint_is_there():
        return any(cut.glob(f"{layout.RUNS}/full-*/checkpoint-6/trainer_state.json"))

    def mask_is_trained():
        return any(cut.glob(f"{layout.RUNS}/mask-*/{layout.RUN}"))

    words = ["study", str(file), "--output_dir", str(cut)]
    kill_when(checkpoint_is_there, words, tmp_path / "killed.log")
    status, lines = stop_forked_when(mask_is_trained, words, tmp_path / "stopped.log")
    assert status == 143
    assert lines[-2:] == [
        "maskft: stopped by SIGTERM; finished work is kept, to resume:",
        shlex.join(["maskft", *words]),
    ]
    before = [p.stat().st_mtime_ns for p in cut.glob(f"{layout.RUNS}/*/{layout.TRAINING}")]
    assert main(["study", str(file), "--output_dir", str(cut)]) == 0
    assert outcome(cut) == outcome(whole)
    assert [p.stat().st_mtime_ns for p in cut.glob(f"{layout.RUNS}/*/{layout.TRAINING}")] == before
    # What is finished is not made again.
    capsys.readouterr()
    found_files = {p: p.stat().st_mtime_ns for p in cut.glob("r*/**/*") if p.is_file()}
    assert main(["study", str(file), "--output_dir", str(cut)]) == 0
    assert "2 runs, 2 finished before" in capsys.readouterr().out
    assert found_files == {p: p.stat().st_mtime_ns for p in cut.glob("r*/**/*") if p.is_file()}
    check_accounts(cut)
    check_that_another_study_in_the_folder_finds_what_is_made(content, tmp_path, cut, capsys)
    assert str(tmp_path) not in "".join(path.read_text() for path in cut.glob("results/*/result.json"))


def test_a_run_starts_while_its_parent_is_evaluated(base, data, tmp_path, monkeypatch):
    child_started = threading.Event()

    def evaluate(study, run, *rest):
        if run.method.method == "full" and not child_started.wait(60):
            raise UserError("no child in a minute")
        making.evaluate_in_fact(study, run, *rest)

    def train(study, run, call):
        if run.method.method == "mask":
            child_started.set()
        making.train_in_fact(study, run, call)

    for name, replacement in {"evaluate": evaluate, "train": train}.items():
        monkeypatch.setattr(making, f"{name}_in_fact", getattr(making, name), raising=False)
        monkeypatch.setattr(making, name, replacement)
    # Two masks, so that neither is alone: a run that gets all cores would wait for the evaluation.
    methods = {"full": FULL, "mask": MASK, "other mask": MASK | {"learning_rate": 0.1}}
    plan = checked_plan(parse_recipe(recipe(base, data, methods), tmp_path, "study.yaml"))
    run_study(plan, tmp_path / "out", launcher_of("local", 2))
    assert child_started.is_set()


def test_a_failed_evaluation_stops_no_child(base, data, tmp_path, monkeypatch):
    evaluate = making.evaluate

    def failing(study, run, *rest):
        if run.method.method == "full":
            raise UserError("no such task")
        return evaluate(study, run, *rest)

    monkeypatch.setattr(making, "evaluate", failing)
    methods = {"full": FULL, "mask": MASK, "random": {"method": "random_mask", "from": "full"}}
    plan = checked_plan(parse_recipe(recipe(base, data, methods), tmp_path, "study.yaml"))
    with pytest.raises(UserError, match=r"^run 'full, seed 0' failed: no such task$"):
        run_study(plan, tmp_path / "out", launcher_of("local"))
    made = {path.parent.name.split("-")[0] for path in (tmp_path / "out" / layout.RESULTS).glob("*/result.json")}
    assert made == {"mask", "random"}


@pytest.mark.parametrize(
    ("seeds", "expected"),
    # With two seeds, two trainings can run at once at any time; the mask and the restart begin together.
    [([1], {"full"}), ([1, 2], set())],
)
def test_a_run_beside_which_no_other_can_run_gets_all_cores(seeds, expected, base, data, tmp_path, monkeypatch):
    methods = {
        "before": {"method": "pretrained"},
        "full": FULL,
        "mask": MASK,
        "restart": FULL | {"from": "full"},
        "random": {"method": "random_mask", "from": "full", "match": "mask"},
    }
    content = recipe(base, data, methods) | {"seeds": seeds}
    plan = checked_plan(parse_recipe(content, tmp_path, "study.yaml"))
    runs_alone = launchers.alone(plan.runs)
    assert {run.method.name for run in runs_alone} == expected

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launchers, "num_cores", lambda: 4)
    go_on = threading.Event()
    threads = {}

    def work(study, run, tick, threads_of_run):
        threads[run.method.name] = threads_of_run
        assert go_on.wait(60)

    before, full = (next(run for run in plan.runs if run.method.name == name) for name in ("before", "full"))
    with launchers.local(Study(tmp_path, plan.recipe), work, runs_alone, num_at_once=2) as submit:
        try:
            # Nothing starts beside a run that has all cores.
            assert len(submit([full, before])) == (1 if full in runs_alone else 2)
        finally:
            go_on.set()
    assert threads["full"] == (None if full in runs_alone else 2, 2)


def check_that_another_study_in_the_folder_finds_what_is_made(content, tmp_path, folder, capsys):
    """Under another name: neither trained nor evaluated again, and called as this study calls it."""
    (tmp_path / "other").mkdir()
    content = {**content, "name": "other", "methods": {"everything": {**FULL, "last": "end"}}}
    trained = {path: path.stat().st_mtime_ns for path in folder.glob(f"{layout.RUNS}/*/*") if path.name != layout.LOG}
    assert main(["study", str(write(tmp_path / "other", content)), "--output_dir", str(folder)]) == 0
    assert trained == {p: p.stat().st_mtime_ns for p in folder.glob(f"{layout.RUNS}/*/*") if p.name != layout.LOG}
    assert "everything (best)" in capsys.readouterr().out
    found_files = [json.loads(file.read_text()) for file in folder.glob(f"{layout.RESULTS}/*/{layout.RESULT}")]
    found = {result["name"]: result for result in found_files}
    for name, same in (("everything (best)", "full (best)"), ("everything (end)", "full (continued)")):
        assert found[name]["created"] == found[same]["created"] and found[name]["tasks"] == found[same]["tasks"]
        assert found[name]["study"]["study"] == "other" and found[name]["study"]["run"] == found[same]["study"]["run"]
    content |= {"name": "third", "methods": {"full": FULL}}
    assert main(["study", str(write(tmp_path / "other", content)), "--output_dir", str(folder)]) == 0
    found_files = [json.loads(file.read_text()) for file in folder.glob(f"{layout.RESULTS}/full-*/{layout.RESULT}")]
    best = [(each["study"]["study"], each["name"]) for each in found_files if each["study"]["role"] == "best"]
    assert sorted(best) == [("small", "full (best)"), ("third", "full (best)")]
    assert trained == {p: p.stat().st_mtime_ns for p in folder.glob(f"{layout.RUNS}/*/*") if p.name != layout.LOG}


def check_accounts(folder):
    """Epochs and tokens add up from the base model to the mask (Tables 8 and 9)."""
    found_files = [json.loads(file.read_text()) for file in folder.glob("results/*/result.json")]
    results = {result["name"]: result["study"] for result in found_files}
    training = {result["name"]: result["training"] for result in found_files}
    full, last = results["full (best)"], results["full (continued)"]
    assert last["epochs"] == 2 and full["epochs"] == round(2 * full["best_step"] / full["num_steps"], 4)
    complete = results["mask (complete)"]
    assert training["mask (best)"]["complete_num_epochs"] == complete["total_epochs"]
    assert {block["variant"] for block in training.values()} == {None}
    assert [training[f"mask ({end})"]["checkpoint"] for end in ("best", "complete")] == ["best", "last"]
    assert complete["total_epochs"] == pytest.approx(full["epochs"] + 1)
    assert complete["total_tokens"] == full["tokens"] + complete["tokens"]
    assert 0 < complete["tokens"] == pytest.approx(last["tokens"] / 2, rel=0.01)


@pytest.mark.slow
def test_ten_kills_at_random_moments(base, data, tmp_path):
    methods = {
        "pre-trained": {"method": "pretrained"},
        "lora": {
            "method": "peft",
            "peft_config": {"peft_type": "LORA", "lora_dropout": 0.1},
            "num_train_epochs": 1,
            "last": "continued",
        },
        "full": FULL,
        "mask": MASK,
        "random mask": {"method": "random_mask", "from": "full", "match": "mask", "num_candidates": 3},
        "wanda mask": {"method": "wanda_mask", "from": "full", "match": "mask"},
        "annealed": {"method": "full", "from": "full", "num_train_epochs": 1, "learning_rate": "current"},
    }
    test_rows = tmp_path / "test.jsonl"  # held-out rows choose among the random masks
    test_rows.write_text("\n".join(json.dumps({"prompt": f"9{n}+9=", "completion": f"{99 + n}"}) for n in range(10)))
    content = recipe(base, data, methods)
    content["evaluation"]["heldout"]["dataset_name"] = str(test_rows)
    file = write(tmp_path, content)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["study", str(file), "--output_dir", str(whole)]) == 0
    expected = outcome(whole)

    def check():
        assert outcome(cut) == expected

    kill_ten_times(["study", file, "--output_dir", cut], cut, 16.0, check)


@pytest.mark.slow
def test_a_ray_cluster_of_two_nodes_gives_the_same_when_a_worker_is_killed(two_masks, alone, tmp_path, monkeypatch):
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="needs maskft[ray]")
    together = tmp_path / "together"
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        process = start(["study", two_masks, "--output_dir", together, "--launcher", "ray"])
        wait_for(process, lambda: any(together.glob(CHECKPOINT)))
        workers = [p for p in psutil.Process().children(recursive=True) if "ray::failure_of" in p.cmdline()[:1]]
        assert len(workers) == 1
        workers[0].kill()
        assert process.wait(timeout=300) == 0, process.stderr.read()
    finally:
        cluster.shutdown()
    check_resumed(together, "full")
    check_the_same(together, alone)


@pytest.mark.slow
def test_two_runs_at_once_give_the_same(two_masks, alone, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    together = tmp_path / "together"
    capsys.readouterr()
    assert main(["study", str(two_masks), "--output_dir", str(together), "--num_at_once", "2"]) == 0
    check_the_order(capsys.readouterr().out)
    check_the_same(together, alone)


@pytest.mark.slow
def test_jobs_of_submitit_give_the_same(two_masks, alone, tmp_path, monkeypatch):
    """By its executor for this machine; a job that is killed is submitted again, and its run resumes."""
    pytest.importorskip("submitit", reason="needs the extra slurm")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    together, plan, killed = tmp_path / "together", checked_plan(load_recipe(two_masks)), []

    @contextlib.contextmanager
    def kills_the_first(study, work, runs_alone):
        def submit(runs):
            jobs = submit_all(runs)
            if not killed:
                killed.append(jobs[0])
                while not list(together.glob(CHECKPOINT)) and not jobs[0].done():
                    time.sleep(0.01)
                for process in job_processes(together, num=1):
                    process.kill()
            return jobs

        with slurm_launcher(study, work, cluster="local", time_min=60) as submit_all:
            yield submit

    run_study(plan, together, kills_the_first)
    assert killed and killed[0].done()
    check_resumed(together, "full")
    check_the_same(together, alone)


def test_a_job_of_slurm_is_requeued_as_often_as_its_time_is_over(two_masks, tmp_path, monkeypatch):
    """And resumes each time; the commands of a cluster stand in a folder, and do nothing."""
    submitit = pytest.importorskip("submitit", reason="needs the extra slurm")
    for name in ("sbatch", "scancel", "squeue", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\n" + "echo Submitted batch job 7\n" * (name == "sbatch"))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    plan = checked_plan(load_recipe(two_masks))
    with slurm_launcher(Study(tmp_path, plan.recipe), failure_of) as submit:
        submit(plan.runs[:1])
    (job,) = tmp_path.glob(f"{layout.SLURM}/*/*_submitted.pkl")
    assert submitit.core.utils.DelayedSubmission.load(job)._timeout_countdown >= 1000


def test_more_runs_than_slurm_takes_in_an_array_are_several_arrays(two_masks, tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="needs the extra slurm")
    arrays = tmp_path / "arrays"
    submitted = f"echo Submitted batch job 7 | tee -a {arrays}\n"
    for name in ("sbatch", "scancel", "squeue", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\n" + submitted * (name == "sbatch"))
        (tmp_path / name).chmod(0o755)
    (tmp_path / "tee").symlink_to(shutil.which("tee"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(launchers, "_MAX_ARRAY", 2)
    plan = checked_plan(load_recipe(two_masks))
    with slurm_launcher(Study(tmp_path, plan.recipe), failure_of) as submit:
        jobs = submit(plan.runs[:1] * 5)
    assert len(jobs) == 5 and len(arrays.read_text().splitlines()) == 3


def test_a_data_file_that_changes_while_the_study_runs_is_not_trained_on(base, data, tmp_path):
    """A run, and a result, are named by the file that was there at the start."""
    rows, test = tmp_path / "rows.jsonl", tmp_path / "test.jsonl"
    for copy in (rows, test):
        shutil.copy(data, copy)
    content = recipe(base, rows, {"full": FULL})
    content["evaluation"]["heldout"]["dataset_name"] = str(test)
    plan = checked_plan(parse_recipe(content, tmp_path, "study.yaml"))
    [run] = plan.runs
    study = Study(tmp_path / "out", plan.recipe)
    study.result_file(run, "best")
    for copy in (rows, test):
        copy.write_text("\n".join(reversed(data.read_text().splitlines())))

    def call(*_):
        raise AssertionError("no command is run")

    with pytest.raises(UserError, match="a data file of 'full, seed 0' has changed since the study was started"):
        making.train(study, run, call)
    with pytest.raises(UserError, match="a file of the evaluation has changed since the study was started"):
        _measured(study, run, "best", call)


def test_what_is_no_mistake_of_the_user_is_told_with_its_name(two_masks, tmp_path, monkeypatch, capsys):
    replace_commands(monkeypatch, lambda words, log: None)
    monkeypatch.setattr("maskft_lab.study.study.make", lambda *_: {}[1.0])
    capsys.readouterr()
    assert main(["study", str(two_masks), "--output_dir", str(tmp_path)]) == 2
    assert "run 'full, seed 0' failed (and 2 more): KeyError: 1.0" in capsys.readouterr().err


@pytest.mark.slow
def test_slurm_gives_the_same_when_jobs_and_the_study_are_lost(two_masks, alone, tmp_path, slurm, capsys):
    """A real controller and daemon: the study is killed, then one job of an array; the other is preempted."""
    together = tmp_path / "together"
    words = ["study", str(two_masks), "--output_dir", str(together), "--launcher", "slurm", "--partition"]
    assert main([*words, "none"]) == 2
    assert re.search("^maskft: error: SLURM refused the jobs: .*invalid partition", capsys.readouterr().err, re.M)
    process = start([*words, "debug"])
    wait_for(process, lambda: any(together.glob(CHECKPOINT)))
    process.kill()
    process = start([*words, "debug"])  # which cancels the job that is left
    jobs: list = []
    wait_for(process, lambda: jobs.extend(job_processes(together, num=2)) or jobs)
    ahead: list = []
    wait_for(process, lambda: ahead.extend(together.glob(CHECKPOINT.replace("full", "mask_?"))) or ahead)
    # What is killed has a checkpoint: of mask N, task N of the array.
    lost, other = sorted(jobs, key=lambda job: f"mask_{job.environ()['SLURM_ARRAY_TASK_ID']}-" not in str(ahead[0]))
    lost.kill()
    ids = [other.environ()[f"SLURM_ARRAY_{name}_ID"] for name in ("JOB", "TASK")]
    subprocess.run(["scontrol", "requeue", "_".join(ids)], check=True)
    assert process.wait(timeout=300) == 0, process.stderr.read()
    deadline = time.monotonic() + 60  # a job has its result before its process has ended
    while left := queue():
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    check_resumed(together, "mask_?")
    check_the_same(together, alone)


def queue():
    return subprocess.run(["squeue", "-h", "-r"], capture_output=True, text=True, check=True).stdout.split()


def job_processes(folder, num):
    """The processes of an array of ``num`` jobs that SLURM's daemon has started, without srun; none before all run.

    A job that was cancelled may still be ending beside the first of the next array: it belongs to none. What a job
    starts has the job's words until it is another program: the first process of each task is the job.
    """
    wanted, arrays = f"{sys.executable} -u -m submitit.core._submit {folder}", {}
    for process in psutil.process_iter(["cmdline", "environ"]):
        if " ".join(process.info["cmdline"] or []).startswith(wanted):
            array, task = ((process.info["environ"] or {}).get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
            arrays.setdefault(array, {}).setdefault(task, process)
    return next((list(found.values()) for found in arrays.values() if len(found) == num), [])


@pytest.fixture
def slurm(tmp_path_factory, monkeypatch):
    """A cluster of this machine: munged, slurmctld and slurmd, on a socket and ports of its own."""
    pytest.importorskip("submitit", reason="needs the extra slurm")
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    if missing or os.geteuid():
        pytest.skip(f"needs root and Debian's slurm-wlm and munge; missing: {missing or 'root'}")
    folder = tmp_path_factory.mktemp("slurm")
    host, munge = os.uname().nodename.split(".")[0], folder / "munge"
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    (folder / "slurm.conf").write_text(
        f"ClusterName=test\nSlurmctldHost={host}(127.0.0.1)\nSlurmUser=root\nAuthType=auth/munge\n"
        f"AuthInfo=socket={munge}.socket,cred_expire=5\nSlurmctldPort={free_port()}\nSlurmdPort={free_port()}\n"
        f"StateSaveLocation={folder}/state\nSlurmdSpoolDir={folder}/spool\nKillWait=10\nReturnToService=2\n"
        f"SlurmctldPidFile={folder}/ctld.pid\nSlurmdPidFile={folder}/d.pid\nProctrackType=proctrack/linuxproc\n"
        f"SlurmctldLogFile={folder}/ctld.log\nSlurmdLogFile={folder}/d.log\nTaskPlugin=task/none\n"
        "SlurmdParameters=config_overrides\nSelectType=select/cons_tres\nSelectTypeParameters=CR_CPU\nMpiDefault=none\n"
        f"NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN\n"
        f"PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP\n"
    )
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    subprocess.run(["mungekey", "--create", f"--keyfile={munge}.key"], check=True)
    daemons = [
        subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for words in (
            ["munged", "--force", "--foreground", f"--socket={munge}.socket"]
            + [f"--{name}-file={munge}.{name}" for name in ("key", "pid", "seed", "log")],
            ["slurmctld", "-D"],
            ["slurmd", "-D"],
        )
    ]
    try:
        deadline = time.monotonic() + 60
        while "idle" not in subprocess.run(["sinfo", "-h"], capture_output=True, text=True).stdout:
            assert time.monotonic() < deadline, (folder / "ctld.log").read_text()[-2000:]
            time.sleep(0.5)
        yield
    finally:
        subprocess.run(["scancel", "--user", "root"], check=False)
        while daemons[1].poll() is None and queue() and time.monotonic() < deadline + 300:
            time.sleep(0.5)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def two_masks(base, data, tmp_path_factory):
    """Recipe of a full fine-tuning and two masks of it."""
    masks = {f"mask {n}": {**MASK, "mask_layers_to_transform": [n]} for n in (0, 1)}
    return write(tmp_path_factory.mktemp("two"), recipe(base, data, {"full": FULL, **masks}))


@pytest.fixture(scope="module")
def alone(two_masks):
    """Its study, one run after another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        assert main(["study", str(two_masks), "--output_dir", str(two_masks.parent / "alone")]) == 0
    return two_masks.parent / "alone"


def check_resumed(folder, name):
    """One of the runs began twice, and measured its start once: that is all its log says of a resumption."""
    logs = [file.read_text() for file in folder.glob(f"{layout.RUNS}/{name}-*/{layout.LOG}")]
    starts = [(log.count("trainable parameters"), len(re.findall("^  step +0/", log, re.M))) for log in logs]
    assert any(begun > 1 == measured for begun, measured in starts), logs


def check_the_order(out):
    """Both masks are handed out once the full model is trained, before either is finished."""
    states = re.findall(r"^  runs \d/3  (\w[\w ]*), seed 0: (\w+)", out, flags=re.M)
    assert states[0] == ("full", "started")
    of_masks = [state for state in states if state[0] != "full"]
    assert sorted(of_masks[:2]) == [("mask 0", "started"), ("mask 1", "started")]


def check_the_same(together, alone):
    # Ray gives each worker as many threads as CPUs; nothing else differs.
    one, two = outcome(together), outcome(alone)
    for result in (*one.values(), *two.values()):
        if isinstance(result, dict):
            result.get("environment", {}).pop("num_threads", None)
    assert one == two


@pytest.mark.parametrize(
    ("kind", "missing"), [("ray", "ray, which is not installed"), ("slurm", "(submitit|sbatch), ")]
)
def test_a_launcher_without_its_cluster_is_one_line(kind, missing, base, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    file = write(tmp_path, recipe(base, data, {"full": FULL}))
    capsys.readouterr()
    assert main(["study", str(file), "--output_dir", str(tmp_path / "out"), "--launcher", kind]) == 2
    assert re.search(f"^maskft: error: --launcher {kind} needs {missing}", capsys.readouterr().err, re.M)


def test_a_run_that_fails_stops_what_needs_it_and_nothing_else(base, data, tmp_path, capsys):
    methods = {"full": {**FULL, "learning_rate": 1e30}, "mask": MASK, "pre-trained": {"method": "pretrained"}}
    file = write(tmp_path, recipe(base, data, methods))
    capsys.readouterr()
    assert main(["study", str(file), "--output_dir", str(tmp_path / "out"), "--num_at_once", "2"]) == 2
    out, err = capsys.readouterr()
    assert "run 'full, seed 0' failed (and 1 more): " in err and "stopped before the update was applied" in err
    assert "it needs 'full, seed 0', which failed" in out and "pre-trained, seed 0: finished" in out
    (file,) = (tmp_path / "out").glob(f"{layout.RESULTS}/*/{layout.RESULT}")
    assert json.loads(file.read_text())["model"]["method"] == "pretrained"


def test_the_recipe_beside_a_table_is_the_one_that_made_it(base, data, tmp_path, monkeypatch):
    """Also if a run failed, and if the file was edited while the study ran."""
    file, folder = write(tmp_path, recipe(base, data, {"full": FULL})), tmp_path / "out"
    copy = folder / layout.STUDY_RECIPE.format("small")
    folder.mkdir()
    copy.write_text("of an earlier call")
    text = file.read_text()

    def make_all(study, *_):
        file.write_text("edited for the next call")
        plan = build_plan(study.recipe)
        return plan, {plan.runs[0]: "memory ran out"}

    monkeypatch.setattr("maskft_lab.study.study._make_all", make_all)
    assert main(["study", str(file), "--output_dir", str(folder)]) == 2
    assert (folder / layout.STUDY_TABLE.format("small")).is_file() and copy.read_text() == text


@pytest.mark.parametrize("mistake", ["columns", "too many rows"])
def test_a_mistake_in_the_data_of_the_last_run_stops_before_the_first(mistake, base, data, tmp_path, capsys):
    """The second data set, which only the mask trains on, is read before full fine-tuning starts."""
    other = tmp_path / "metamathqa.jsonl"
    other.write_text("".join(json.dumps({"question": f"{n}?", "response": "r"}) + "\n" for n in range(9)))
    content = recipe(base, data, {"full": FULL, "mask": {**MASK, "data": "other"}})
    name = "metamathqa" if mistake == "columns" else f"{data}:1000"
    content["data"]["other"] = {"dataset_name": name, "data_dir": str(tmp_path), "eval_split_size": 2}
    capsys.readouterr()
    folder = tmp_path / "out"
    assert main(["study", str(write(tmp_path, content)), "--output_dir", str(folder)]) == 2
    err = capsys.readouterr().err
    wanted = ["query", "question"] if mistake == "columns" else ["asks for 1,000 rows", "which has 64"]
    assert all(word in err for word in wanted) and len(err.strip().splitlines()) == 1
    assert not list(folder.glob(f"{layout.RUNS}/*"))


def test_a_rate_of_zero_changes_weights_that_a_mask_removes(base, data, tmp_path):
    """Only full fine-tuning from a run is its parent then; and a mask is not, though its scores stay as they were."""
    methods = {
        "still": {"method": "full", "learning_rate": 0, "max_steps": 1},
        "again": {"method": "full", "from": "still", "learning_rate": 0},
        "mask": {"method": "mask", "from": "still", "learning_rate": 0, "max_steps": 1},
    }
    content = recipe(base, data, methods)
    content["evaluation"]["no_generate"] = True
    assert main(["study", str(write(tmp_path, content)), "--output_dir", str(tmp_path / "out")]) == 0
    found_files = (tmp_path / "out").glob(f"{layout.RESULTS}/*/{layout.RESULT}")
    results = {result["name"]: result for result in (json.loads(file.read_text()) for file in found_files)}
    nll = {name: result["tasks"]["heldout"]["metrics"]["nll"]["value"] for name, result in results.items()}
    assert nll["still"] == nll["again"] != nll["mask"]


@pytest.mark.skipif(sys.platform != "linux", reason="how a process ended is told by its signal there")
@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(137)"])
def test_a_run_that_is_killed_says_so(end, tmp_path):
    """The second is how a launcher tells of its process."""
    code = f"import os, signal, sys; print('10/20 steps', flush=True); {end}"
    with pytest.raises(UserError, match=r"ended by SIGKILL, as when memory runs out \(see .*log\)"):
        run_command([sys.executable, "-c", code], tmp_path / "log")


def test_what_a_training_advises_is_not_what_it_does(tmp_path):
    (tmp_path / "log").write_text("step 3/3\nsaved to out\nnext: maskft evaluate --output_dir results/NAME\n")
    assert last_line(tmp_path / "log") == "saved to out" and last_line(tmp_path / "none") == ""
    with (tmp_path / "log").open("a") as log:  # of the evaluation after it
        log.write("answers 3/20\n")
    assert last_line(tmp_path / "log") == "answers 3/20"


def test_a_mistake_of_a_command_in_a_fork_is_its_last_line(tmp_path):
    with pytest.raises(UserError, match=r"^unknown option --rate.*\(see .*log\)"):
        run_command([*PYTHON, "train", "--rate", "1"], tmp_path / "log")


def test_a_command_starts_anew_where_a_fork_has_no_gpu(monkeypatch):
    """PEFT imports bitsandbytes if it is installed, and that asks for the GPU in the fork server."""
    command = [*PYTHON, "train", "--max_steps", "1"]
    assert _can_run_here(command) and not _can_run_here(["accelerate", "launch"])
    monkeypatch.setattr("torch.cuda._is_in_bad_fork", lambda: True)
    assert not _can_run_here(command)


@pytest.mark.skipif(sys.platform != "linux", reason="commands are forked there")
def test_a_command_in_a_fork_ends_with_its_study(tmp_path):
    import fcntl

    # The command's log is a pipe that nobody reads, and smaller than the help, so it waits. The help is a file that
    # is printed: the fork server need not import anything for it, which would take seconds.
    os.mkfifo(tmp_path / "log")
    code = (
        "import fcntl, pathlib, sys\n"
        "from maskft_lab.study import process\n"
        "process.IMPORTED.clear()\n"
        "lock = open(sys.argv[1], 'w')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "words = [*process.PYTHON, 'train', '--help']\n"
        "process.run_command(words, pathlib.Path(sys.argv[2]), lambda: print('.', flush=True), lock.fileno())\n"
    )
    words = [sys.executable, "-c", code, *(str(tmp_path / name) for name in ("lock", "log"))]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as study, (tmp_path / "lock").open("w") as lock:
        assert study.stdout.readline()
        with (tmp_path / "log").open("rb") as log:  # opens once the command has opened it
            assert fcntl.fcntl(log, fcntl.F_SETPIPE_SZ, 4096) == 4096 < len(help_text("train"))
            with pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            study.kill()
            study.wait()
            fcntl.flock(lock, fcntl.LOCK_EX)  # the child held it too


def test_a_folder_in_use_is_refused(base, data, tmp_path, monkeypatch, capsys):
    import fcntl

    monkeypatch.setattr("maskft_lab.study.study.LOCK_WAIT_S", 0)
    file, folder = write(tmp_path, recipe(base, data, {"full": FULL})), tmp_path / "out"
    folder.mkdir()
    with (folder / layout.LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["study", str(file), "--output_dir", str(folder)]) == 2
    assert "another study is running in" in capsys.readouterr().err


@pytest.fixture
def records(base, data):
    """Records of runs that are said to have been made, of methods and what their trainings left."""

    def build(content, trainings):
        plan, found = checked_plan(parse_recipe(content)), {}
        for run in plan.runs:
            name = run.method.name
            before = next(iter(run.masks.values()), run.start)
            parent = before and found[before.method.name]
            found[name] = build_record(run, plan.recipe, {"best": "x"}, run.options, trainings.get(name), parent)
        return found

    return build


def test_the_end_of_training_is_accounted_for_where_it_is_not_kept(base, data, records, tmp_path):
    """Of the mask from the best of its start on, not from where that one's training ended.

    Of a chosen point of a path until its checkpoint; and the model before training is where it is now.
    """
    methods = {
        "pre-trained": {"method": "pretrained"},
        "full": {"method": "full"},
        "mask": {"method": "mask", "from": "full"},
        "l1": {"method": "l1_mask", "from": "full", "match": "mask"},
        "dsd": {"method": "full", "from": "full", "start_mask": "mask"},
        "twin": {"method": "full", "from": "full", "start_mask": "l1"},
    }
    common = {"best_loss": 1.0, "train_time_s": 1.0, "peak_memory_bytes": 1, "history": []}
    trainings = {
        "full": {"best_step": 2, "num_steps": 8, "num_epochs": 4.0, "num_train_tokens": 800},
        "mask": {"best_step": 3, "num_steps": 4, "num_epochs": 2.0, "num_train_tokens": 400},
        "l1": {"best_step": None, "num_steps": 0, "num_epochs": 0.0, "num_train_tokens": 0},
    }
    trainings["dsd"] = trainings["twin"] = {**trainings["mask"], "best_step": 4}
    trainings = {name: common | training for name, training in trainings.items()}
    trainings["full"]["history"] = [{"step": 2, "eval_loss": 1.0, "eval_num_tokens": 190}]
    found = records(recipe(base, data, methods), trainings)
    assert {
        name: [getattr(record, f"total_{count}")[role] for role in ("best", "last") for count in ("epochs", "tokens")]
        for name, record in found.items()
    } == {
        "pre-trained": [0.0, 0, 0.0, 0],
        "full": [1.0, 190, 4.0, 800],
        "mask": [2.5, 490, 3.0, 590],
        "l1": [1.0, 190, 1.0, 190],
        "dsd": [4.5, 890, 4.5, 890],
        "twin": [3.0, 590, 3.0, 590],
    }
    plan = checked_plan(parse_recipe(recipe(base, data, methods)))
    study, before, point = Study(tmp_path, plan.recipe), plan.runs[0], replace(plan.runs[1], point=(0.5, 1.0))
    write_run_record(study.run_folder(point), found["full"])
    (study.run_folder(point) / layout.TRAINING).write_text(json.dumps({"summary": trainings["full"]}))
    for step in (3, 4):
        (study.run_folder(point) / f"checkpoint-{step}").mkdir()
    record = record_at_point(study, point)
    assert (record.best_step, record.total_tokens) == (4, {"best": 400, "last": 800})
    early = replace(point, point=(0.3, 1.0))  # 2.4 of the 8 steps: transformers saves the third
    record = record_at_point(study, early)
    assert (record.best_step, record.total_tokens) == (3, {"best": 300, "last": 800})
    write_run_record(study.run_folder(before), found["pre-trained"])
    assert study.model(before, "best") == str(base)


@pytest.mark.parametrize("name", ["openai/gsm8k:0.5,meta-math/MetaMathQA:100", "FILE:0.5,openai/gsm8k", "FILE"])
def test_a_record_names_data_without_folders_of_this_machine(name, base, data, records):
    content = recipe(base, data, {"full": FULL})
    content["data"]["sums"]["dataset_name"] = name.replace("FILE", str(data))
    assert records(content, {})["full"].settings["dataset_name"] == name.replace("FILE", "sums.jsonl")


def test_a_record_that_is_damaged_is_one_line(base, data, records, tmp_path):
    record = records(recipe(base, data, {"full": FULL}), {})["full"]
    write_run_record(tmp_path, record)
    assert read_run_record(tmp_path) == record
    content = json.loads((tmp_path / layout.RUN).read_text())
    (tmp_path / layout.RUN).write_text(json.dumps(content | {"seed": "zero"}))
    with pytest.raises(UserError, match=r"run\.json: seed is 'zero': .*; delete the run's folder"):
        read_run_record(tmp_path)


def test_weights_are_trained_after_a_mask_that_is_worse_too(base, data, tmp_path, monkeypatch):
    """The mask hurts, and is there to be compared and to be started from all the same."""
    train = {"max_steps": 2, "eval_steps": 2, "save_steps": 2}
    methods = {
        "mask": {"method": "mask", "mask_sparsity": 0.5, "learning_rate": 0, **train},
        "sparse": {"method": "full", "keep_mask": "mask", **train},
        "dsd": {"method": "full", "start_mask": "mask", "learning_rate": 0, **train},
    }
    content = recipe(base, data, methods)
    content["evaluation"]["no_generate"] = True
    content["train"] |= {"mask_init_scores": "magnitude", "mask_rank_by": "signed"}
    replace_commands(monkeypatch, lambda words, log: main(words[3:]))
    plan = checked_plan(parse_recipe(content))
    study = Study(tmp_path, plan.recipe)
    for run in plan.runs:
        make(study, run)
    folders = {run.method.name: study.run_folder(run) for run in plan.runs}
    masks = MaskSet.from_adapter(folders["mask"])
    assert masks.sparsity == pytest.approx(0.5, abs=1e-3)
    for name in ("sparse", "dsd"):
        weights = load_file(folders[name] / "model.safetensors")
        assert all(not weights[f"{module}.weight"][~mask].any() for module, mask in masks.items())


def test_how_a_run_is_launched(base, data):
    content = recipe(base, data, {"full": FULL, "l1": {"method": "l1_mask", "from": "full"}})
    train = [sys.executable, "-m", "maskft_lab.cli.main", "train"]
    for launch in ({}, {"num_processes": 2}, {"num_processes": 1}):  # the last: of a configuration that is for eight
        content["launch"] = launch | ({"accelerate_config": "multi_gpu"} if launch else {})
        plan = checked_plan(parse_recipe(content))
        words = [word for name, value in content["launch"].items() for word in (f"--{name}", str(value))]
        assert sorted(launch_words(plan.recipe, plan.runs[0])) == sorted([*train, *words])
        assert launch_words(plan.recipe, plan.runs[1]) == train


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_board_shows_one_bar_on_a_terminal_and_lines_in_a_log(is_terminal, base, data, tmp_path, monkeypatch):
    """With the last line of the log as it is."""
    plan = checked_plan(parse_recipe(recipe(base, data, {"full": FULL, "mask [x]": MASK})))
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=80, color_system=None)
    full, mask = plan.runs
    study = Study(tmp_path, plan.recipe)
    with boards.Board(plan.runs, [], lambda run: study.run_folder(run) / layout.LOG, console) as board:
        board.started(full)
        log = tmp_path / layout.RUNS / full.id / layout.LOG
        log.parent.mkdir(parents=True)
        log.write_text("[INST] 3+4= [/INST][[ 7]]")
        board.tick()
        for name in ("SECONDS_BETWEEN_REFRESHES", "SECONDS_BETWEEN_LINES"):
            monkeypatch.setattr(boards, name, 0.0)
        board.tick()
        board._progress.refresh()
        board.finished(full, "finished")
        board.started(mask)
        board.has_failed(mask, "no [room]")
    frames = [frame for frame in re.split(r"[\r\n]+|\x1b\[[?\d;]*[A-Za-z]", console.file.getvalue()) if frame.strip()]
    if is_terminal:
        assert max(map(len, frames)) <= 80, frames
        assert any(re.match(r"runs +0/2 .*full, seed 0: \[INST\] 3\+4= \[/INST\]", frame) for frame in frames), frames
        assert "mask [x], seed 0: failed: no [room], 0 s" in frames
    else:
        assert [re.sub(r"  \d+ s left$", "", line) for line in frames] == [
            "  runs 0/2  full, seed 0: started",
            "  runs 0/2  full, seed 0: [INST] 3+4= [/INST][[ 7]]",
            "  runs 1/2  full, seed 0: finished, 0 s",
            "  runs 1/2  mask [x], seed 0: started",
            "  runs 2/2  mask [x], seed 0: failed: no [room], 0 s",
        ]


def test_no_time_is_estimated_from_the_base_alone(base, data, tmp_path):
    """Nothing is trained for it, so at its speed the trained runs would take days."""
    methods = {"base": {"method": "pretrained"}, "full": FULL, "mask": MASK}
    plan = checked_plan(parse_recipe(recipe(base, data, methods)))
    first, full, mask = plan.runs
    console = Console(file=io.StringIO(), width=80)
    costs = {first: 1.0, full: 100.0, mask: 100.0}
    with boards.Board(plan.runs, [], lambda run: tmp_path, console, costs=costs) as board:
        board.finished(first, "finished")
        assert "left" not in console.file.getvalue()
        board.finished(full, "finished")
        assert console.file.getvalue().rstrip().endswith("0 s left")


def test_a_mistake_in_its_benchmarks_stops_a_study_before_the_first_run(base, data, tmp_path, capsys):
    """Their names are checked by the same call, tests/evaluation/test_tasks.py; lm-eval's index of them takes 7 s."""
    content, message = recipe(base, data, {"full": FULL}), "include_path 'nowhere' is not a folder"
    content["evaluation"] |= {"tasks": ["gsm8k"], "include_path": "nowhere"}
    capsys.readouterr()
    assert main(["study", str(write(tmp_path, content)), "--output_dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_without_its_prepared_rows(base, data, tmp_path):
    """Also where a default was written out in between, which names the same run."""
    content = recipe(base, data, {"full": FULL})
    file, folder = write(tmp_path, content), tmp_path / "out"
    kill_when(
        lambda: any(folder.glob(f"{layout.RUNS}/full-*/checkpoint-3/*.json")),
        ["study", file, "--output_dir", folder],
        tmp_path / "killed.log",
    )
    shutil.rmtree(folder / layout.PREPARED)
    content["data"]["sums"]["dataset_train_split"] = "train"
    assert main(["study", str(write(tmp_path, content)), "--output_dir", str(folder)]) == 0


def test_masks_by_threshold_and_by_share_each_have_their_row(base, data):
    threshold = {"mask_selection": "threshold", "mask_rank_by": "signed", "mask_init_scores": "constant"}
    methods = {"full": FULL, "mask": MASK, "global mask": {**MASK, **threshold, "last": "end of global"}}
    methods["again"] = {**MASK, "last": "end", "learning_rate": 1e-3}
    plan = checked_plan(parse_recipe(recipe(base, data, methods)))
    assert [is_control(plan.recipe, run) for run in plan.runs] == [False, False, False, True]
