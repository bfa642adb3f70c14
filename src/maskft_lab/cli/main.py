"""The ``maskft`` command: one module per command, imported only when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import signal
import sys
import threading
import time
from types import FrameType

from safetensors import SafetensorError

from maskft_common import __version__
from maskft_common.errors import Stopped, UserError, did_you_mean, install_hint, printable

COMMANDS = {
    "demo": "learn a mask on a small model in minutes, and see whether it helped",
    "train": "train a mask, LoRA or all weights on your data",
    "estimate": "tell the memory of a training run before it is started",
    "evaluate": "measure held-out loss and accuracy, item by item",
    "compare": "compare results on the same items, with intervals",
    "study": "run all methods, controls and seeds of a recipe, and compare them",
    "analyze": "compute what the figures of the paper show, from your own finished runs",
    "report": "write one page about a study, its figures, or the paper's tables with your results",
    "merge": "apply a mask to its base model and write an ordinary checkpoint",
    "masks": "combine several masks over one base into one adapter",
    "inspect": "show what an adapter removes, module by module",
    "verify": "check an adapter's integrity, and that it fits a base model",
    "env": "print versions and machine facts for a bug report",
}

# Seconds that a process of a distributed run waits for the main one to report an error first.
_PATIENCE_S = 5
RESUME = "--resume_from_checkpoint"
# They keep what is finished, and find it when they are given again. Training finishes its step first (StopRequest).
_RESUMED_BY_REPEATING = ("demo", "study", "evaluate")


def usage() -> str:
    """Text of ``maskft --help``."""
    lines = [
        "usage: maskft COMMAND [options]",
        "",
        "Mask Fine-Tuning: learn which weights of a fine-tuned language model to remove so that it gets better.",
        "",
        "commands:",
        *(f"  {name:<10}{text}" for name, text in COMMANDS.items()),
        "",
        "maskft COMMAND --help shows a command's options. maskft --version prints the version.",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 2 wrong input, 130 Ctrl-C, 141 no reader, 143 SIGTERM)."""
    try:
        status = _run(argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # of `maskft ... | head`; what is left must not be written again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _run(argv: list[str] | None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"maskft {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        print(f"maskft: error: no command {name!r}{did_you_mean(name, COMMANDS)}; see maskft --help", file=sys.stderr)
        return 2
    module = importlib.import_module(f".{name}", __package__)
    before = _heed_sigterm() if name in _RESUMED_BY_REPEATING else None
    try:
        if hasattr(module, "main"):
            module.main(rest)
        else:
            parser = OneLineParser(prog=f"maskft {name}", description=f"{COMMANDS[name]}.", allow_abbrev=False)
            module.add_arguments(parser)
            module.run(parser.parse_args(rest))
    except UserError as error:
        _print_error(str(error))
        return 2
    except ModuleNotFoundError as error:
        _print_error(
            f"{name} needs {error.name}, which is not installed; {install_hint('train' if name == 'train' else 'lab')}"
        )
        return 2
    except BrokenPipeError:
        raise
    except (OSError, ImportError, SafetensorError) as error:
        # A full disk, a file without permission: the machine's word for it is the best there is.
        _print_error(f"{type(error).__name__}: {error}")
        return 2
    except Stopped as stop:
        if not int(os.environ.get("RANK", "0")):
            print(f"maskft: {stop}; to resume:\n{_resume_line(argv)}", file=sys.stderr)
        return stop.status
    except KeyboardInterrupt as stop:
        number = signal.Signals(*stop.args or (signal.SIGINT,))
        advice = f"; what is finished is kept, to resume:\n{_command(argv)}" if name in _RESUMED_BY_REPEATING else ""
        print(f"maskft: stopped by {number.name}{advice}", file=sys.stderr)
        return 128 + number
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    return 0


def _heed_sigterm():
    """Let SIGTERM end this process as Ctrl-C does, children first; returns the handler that was there before."""
    if threading.current_thread() is not threading.main_thread():
        return None
    this = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == this:
            raise KeyboardInterrupt(number)
        os._exit(128 + number)  # a fork, which has nothing to say

    return signal.signal(signal.SIGTERM, end)


def _command(words: list[str]) -> str:
    # Without what would drop what is kept.
    return re.sub(r"(?i) --overwrite(=\S+| true| false)?(?!\S)", "", shlex.join(["maskft", *words]))


def _resume_line(words: list[str]) -> str:
    """The command that resumes what ``words`` began; a launcher has put its own into the environment."""
    from maskft_common.processes import COMMAND

    words = shlex.split(os.environ.get(COMMAND, "")) or ["maskft", *words]
    return shlex.join([*words, *(() if RESUME in words else (RESUME, "true"))])


def _print_error(message: str) -> None:
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        # The same error in the main process ends this one before it repeats the line.
        time.sleep(_PATIENCE_S)
    where = f" on rank {rank}" if rank else ""
    print(f"maskft: error{where}: {printable(' '.join(message.split()))}", file=sys.stderr)


class OneLineParser(argparse.ArgumentParser):
    """Argument parser whose mistakes are one line and which suggests the flag that was meant."""

    def error(self, message: str):
        """Raise instead of printing usage and exiting."""
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            flag = message.removeprefix(prefix).split()[0]
            known = [option for action in self._actions for option in action.option_strings]
            message = f"unknown option {flag}{did_you_mean(flag.split('=')[0], known)}"
        raise UserError(f"{message}; see {self.prog} --help")


if __name__ == "__main__":
    sys.exit(main())
