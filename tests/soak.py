"""Runs that are killed at random moments and given again end as undisturbed ones: ``make soak``.

usage: python tests/soak.py [--cycles 200] [--seed 0] [--only KIND ...] [--folder DIR]

A cycle starts a run, kills it (SIGKILL, up to three times, each at a random moment), lets the same command run to its
end, and compares all that it leaves with what the undisturbed run left: weights and histories bit for bit. Commands
run in forks of this process, which has imported what they import: a cycle takes seconds, and kills fall into the
command's work and not into its imports. What a study starts are forks too, which end with it, as its own processes do.
"""

import argparse
import ctypes
import gc
import importlib
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch
import yaml

import small_study
import tiny
from maskft_base import files
from maskft_base.errors import UserError
from maskft_lab.cli.main import main
from maskft_lab.study import execute, process
from tiny_tokenizer import tiny_tokenizer

PR_SET_PDEATHSIG = 1
MAX_KILLS = 3
# Of the cycles of `train`, one in how many each of the others gets.
SHARES = {"train": 1, "two processes": 40, "evaluate": 10, "study": 20}
IMPORTED = [*process.IMPORTED, "maskft_lab.cli.study", "maskft_lab.study.study", "maskft_lab.estimate.out_of_memory"]
TIMES = re.compile(r"_s$|per_second|runtime|peak_memory|^created$")  # what no two runs have in common


@dataclass(frozen=True)
class Kind:
    """A command, in as many processes as work together, and what of its folder must not depend on kills.

    ``is_refused`` says of a folder that the command will not run in it again, because it is finished.
    """

    command: Callable[[Path], list[str]]
    outcome: Callable[[Path], dict]
    num_processes: int = 1
    is_refused: Callable[[Path], bool] = lambda folder: False


# Forks


def start(words: list[str], log: Path, environment: dict[str, str]) -> int:
    """Run a command of maskft in a fork that ends with this process; returns its process id."""
    parent, child = os.getpid(), os.fork()
    if child:
        return child
    status = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == parent:
            output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ.update(environment)
            status = main([str(word) for word in words])
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_forked(words, log, tick=lambda: None, lock_fd=None):
    """In place of the study's own ``run_command``: the same command in a fork, which holds the lock as it is open."""
    log.parent.mkdir(parents=True, exist_ok=True)
    child = start(words[words.index("maskft_lab.cli.main") + 1 :], log, {})
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        raise UserError(f"exit status {status} (see {log})")


def start_all(kind: Kind, folder: Path) -> list[int]:
    """Start the processes of a run, each with what a launcher tells it."""
    if kind.num_processes == 1:
        return [start(kind.command(folder), folder.with_suffix(".log"), {})]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASKFT_LAUNCHED": "1",
        "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "WORLD_SIZE": str(kind.num_processes),
        "LOCAL_WORLD_SIZE": str(kind.num_processes),
    }
    return [
        start(kind.command(folder), folder.with_suffix(".log"), shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(kind.num_processes)
    ]


def end(processes: list[int], deadline: float | None) -> list[int]:
    """Wait for processes until a moment; returns the exit statuses, or none where one still ran and all were killed."""
    statuses: dict[int, int] = {}
    while len(statuses) < len(processes):
        for pid in (pid for pid in processes if pid not in statuses):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        # A launcher ends the others where one has failed.
        is_late = deadline is not None and time.monotonic() > deadline
        if is_late or any(statuses.values()):
            left = [process for process in processes if process not in statuses]
            for process in left:
                os.kill(process, signal.SIGKILL)
            for process in left:
                os.waitpid(process, 0)
            return [] if is_late else [*statuses.values()]
        time.sleep(0.002)
    return [*statuses.values()]


# What is run


def without_times(value):
    """Parsed JSON without times and memory."""
    if isinstance(value, dict):
        return {key: without_times(entry) for key, entry in value.items() if not TIMES.search(key)}
    return [without_times(entry) for entry in value] if isinstance(value, list) else value


def outcome_of_training(folder: Path) -> dict:
    summary = json.loads((folder / files.TRAINING).read_text())["summary"]
    places = {"best": folder, "last": folder / files.LAST}
    weights = {name: path.read_bytes() for name, place in places.items() for path in place.glob("*.safetensors")}
    return {"summary": without_times(summary), "heldout": (folder / files.HELDOUT).read_text(), **weights}


def outcome_of_evaluation(folder: Path) -> dict:
    return {"result": without_times(json.loads((folder / files.RESULT).read_text()))}


def outcome_of_study(folder: Path) -> dict:
    return {key: without_times(value) for key, value in small_study.outcome(folder).items()}


def flags(**options) -> list[str]:
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def make_kinds(place: Path) -> dict[str, Kind]:
    """Write a tiny model, data and recipes, and say what is run on them."""
    base, data, prepared = place / "base", place / "sums.jsonl", place / "prepared"
    training = {
        "model_name_or_path": base,
        "dataset_name": data,
        "eval_split_size": 16,
        "prepared_data_dir": prepared,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "eval_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "keep_worse": True,
        "keep_last": True,
        "resume_from_checkpoint": "auto",
    }
    methods = {"full": {**small_study.FULL, "num_train_epochs": 1}, "mask": small_study.MASK}
    study = small_study.recipe(base, data, methods)
    (place / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    evaluation = {"model_name_or_path": base, "dataset_name": data, "max_new_tokens": 4, "batch_size": 4}
    return {
        "train": Kind(lambda out: ["train", *flags(**training, output_dir=out)], outcome_of_training),
        "two processes": Kind(lambda out: ["train", *flags(**training, output_dir=out)], outcome_of_training, 2),
        "evaluate": Kind(
            lambda out: ["evaluate", *flags(**evaluation, output_dir=out)],
            outcome_of_evaluation,
            is_refused=lambda folder: (folder / files.RESULT).is_file(),
        ),
        "study": Kind(lambda out: ["study", place / "study.yaml", "--output_dir", out], outcome_of_study),
    }


def make_files(place: Path) -> None:
    """Write the model and the data; in a fork, for the process that forks must not have computed anything."""
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        return
    tokenizer = tiny_tokenizer()
    tiny.tiny_llama(vocab_size=len(tokenizer), num_layers=3).save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    rows = [{"prompt": f"{a}+{b}=", "completion": f"{a + b}"} for a in range(8) for b in range(8)]
    rows = [row | {"answer": row["completion"], "answer_type": "number"} for row in rows]
    (place / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    os._exit(0)


# Cycles


def run_whole(kind: Kind, folder: Path) -> None:
    statuses = end(start_all(kind, folder), None)
    if any(statuses):
        log = folder.with_suffix(".log")
        sys.exit(f"{folder}: exit status {statuses}\n{log.read_text()[-3000:]}")


def cycle(kind: Kind, folder: Path, rng: random.Random, seconds: float) -> int:
    """Kill a run now and then, and let it run to its end; returns how often it was killed."""
    killed = 0
    for _ in range(rng.randint(1, MAX_KILLS)):
        if kind.is_refused(folder):
            return killed
        statuses = end(start_all(kind, folder), time.monotonic() + rng.uniform(0.0, 1.1 * seconds))
        if not statuses:
            killed += 1
        elif any(statuses):
            sys.exit(f"{folder}: exit status {statuses}\n{folder.with_suffix('.log').read_text()[-3000:]}")
    if not kind.is_refused(folder):
        run_whole(kind, folder)
    return killed


def soak(name: str, kind: Kind, place: Path, num_cycles: int, seed: int) -> str:
    """Make cycles of one kind; returns a line of counts.

    Raises:
        SystemExit: At the first difference or error; the folder is kept.
    """
    folder = place / name.replace(" ", "_")
    folder.mkdir()
    run_whole(kind, folder / "warm")  # reads and tokenises the data, for all that come
    started = time.monotonic()
    run_whole(kind, folder / "whole")
    seconds, expected, killed = time.monotonic() - started, kind.outcome(folder / "whole"), 0
    for number in range(num_cycles):
        out = folder / f"cycle-{number}"
        killed += cycle(kind, out, random.Random(f"{name} {seed} {number}"), seconds)
        found = kind.outcome(out)
        different = [key for key in {*expected, *found} if expected.get(key) != found.get(key)]
        if different:
            sys.exit(f"{out}: {', '.join(different)} differ from {folder / 'whole'}")
        shutil.rmtree(out)
        out.with_suffix(".log").unlink()
        if (number + 1) % 25 == 0:
            print(f"  {name}: {number + 1} of {num_cycles} cycles, {killed} kills, all equal", flush=True)
    return f"{name}: {num_cycles} cycles, {killed} kills, all equal, {time.monotonic() - started:.0f} s"


def main_of_soak() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=200, help="of train; the others get a part (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="decides the moments (default: 0)")
    parser.add_argument("--only", nargs="+", choices=SHARES, default=list(SHARES), help="kinds (default: all)")
    parser.add_argument("--folder", type=Path, help="an empty folder to work in (default: a temporary one)")
    args = parser.parse_args()
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # a collection in a fork would copy every page that it looks at
    torch.set_num_threads(1)
    execute.run_command = run_forked
    place = args.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    place.mkdir(parents=True, exist_ok=True)
    make_files(place)
    kinds = make_kinds(place)
    for name in args.only:
        print(soak(name, kinds[name], place, -(-args.cycles // SHARES[name]), args.seed), flush=True)
    if args.folder is None:
        shutil.rmtree(place)


if __name__ == "__main__":
    main_of_soak()
