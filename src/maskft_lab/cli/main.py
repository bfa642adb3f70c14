"""The ``maskft`` command: one module per command, imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import shlex
import signal
import sys
import threading
import time
from types import FrameType, ModuleType

from safetensors import SafetensorError

from maskft_common import __version__
from maskft_common.command_line import OneLineParser
from maskft_common.errors import Stopped, UserError, did_you_mean, install_hint, printable
from maskft_common.processes import COMMAND, is_main, rank

# Command -> its line in `maskft --help`. The module of a command has its name.
COMMANDS = {
    "demo": "learn a mask on a small model in minutes, and see whether it helped",
    "train": "train a mask, LoRA or all weights on your data",
    "estimate": "estimate the memory of a training run before it is started",
    "evaluate": "measure held-out loss and accuracy, item by item",
    "compare": "compare results on the same items, with intervals",
    "study": "run all methods, controls and seeds of a recipe, and compare them",
    "analyze": "compute the arrays behind the paper's figures, from your own finished runs",
    "report": "write one page about a study, its figures, or the paper's tables with your results",
    "merge": "apply a mask to its base model and write an ordinary checkpoint",
    "masks": "combine several masks over one base into one adapter",
    "inspect": "show the weights that an adapter removes, module by module",
    "verify": "check an adapter's integrity, and that it fits a base model",
    "env": "print versions and machine facts for a bug report",
}

RESUME = "--resume_from_checkpoint"

# Commands that keep finished work and find it when they are repeated.
_RESUMED_BY_REPEATING = ("demo", "study", "evaluate")
# Training finishes its step first (StopRequest).
_WITH_OWN_HANDLER = ("train",)
# Seconds that a process of a distributed run leaves to the main process to report the same error first.
_PATIENCE_S = 5


def usage() -> str:
    """Text of ``maskft --help``."""
    lines = [
        "usage: maskft COMMAND [options]",
        "",
        "Mask Fine-Tuning: learn which weights of a fine-tuned language model to remove so that it gets better.",
        "",
        "commands:",
    ]
    for name, text in COMMANDS.items():
        lines.append(f"  {name:<10}{text}")
    lines.append("")
    lines.append("maskft COMMAND --help shows a command's options. maskft --version prints the version.")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 2 wrong input, 130 Ctrl-C, 141 no reader, 143 SIGTERM)."""
    if argv is None:
        argv = sys.argv[1:]
    # Tables have characters that are not in ASCII or Latin-1, such as ±: where the terminal or the locale knows no
    # others, they are question marks, and not an error after the work is done.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")
    try:
        status = _run(list(argv))
        # Here, where a closed reader can still be handled, and not when Python exits. Python has no stdout where it was
        # closed before the start, as some schedulers do.
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader of `maskft ... | head` has closed. Python flushes stdout once more at exit, which would raise
        # again; into /dev/null it does not.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _run(argv: list[str]) -> int:
    # The program's own options, which need no command
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"maskft {__version__}")
        return 0

    # The command, whose module is imported only now: that of another one may need a package that is not installed.
    name = argv[0]
    words = argv[1:]
    if name not in COMMANDS:
        print(f"maskft: error: no command {name!r}{did_you_mean(name, COMMANDS)}; see maskft --help", file=sys.stderr)
        return 2

    # Whatever prints asks which process it is in, errors too.
    try:
        rank()
    except UserError as error:
        print(f"maskft: error: {error}", file=sys.stderr)
        return 2

    module = importlib.import_module(f".{name}", __package__)
    # Schedulers send SIGTERM at a job's time limit; it then ends as with Ctrl-C: half-written files are removed, and it
    # says how to resume.
    is_resumable = name in _RESUMED_BY_REPEATING
    handler_before = None
    if name not in _WITH_OWN_HANDLER:
        handler_before = _end_at_sigterm()

    try:
        _call(module, name, words)
    except UserError as error:
        # A mistake of the user's: one line without traceback.
        _print_error(str(error))
        return 2
    except ModuleNotFoundError as error:
        # An ImportError too: this clause comes before that of the others.
        extra = "train" if name == "train" else "lab"
        _print_error(f"{name} needs {error.name}, which is not installed; {install_hint(extra)}")
        return 2
    except BrokenPipeError:
        # An OSError, which `main` handles.
        raise
    except (OSError, ImportError, SafetensorError) as error:
        # The OS error is already clear (a full disk, a file without permission); print it unchanged.
        _print_error(f"{type(error).__name__}: {error}")
        return 2
    except Stopped as stop:
        # Training ended after a step that it saved. All processes of a distributed run end so, and one says it.
        if is_main():
            print(f"maskft: {stop}; to resume:\n{_resume_line(argv)}", file=sys.stderr)
        return stop.status
    except KeyboardInterrupt as stop:
        # The handler of SIGTERM passes its number; Python's own of Ctrl-C passes nothing.
        number = signal.Signals(stop.args[0]) if stop.args else signal.SIGINT
        advice = ""
        if is_resumable:
            command = shlex.join(["maskft", *_without_overwrite(argv)])
            advice = f"; finished work is kept, to resume:\n{command}"
        print(f"maskft: stopped by {number.name}{advice}", file=sys.stderr)
        return 128 + number
    finally:
        # `main` may be called by a program that handles SIGTERM itself.
        if handler_before is not None:
            signal.signal(signal.SIGTERM, handler_before)
    return 0


def _call(module: ModuleType, name: str, words: list[str]) -> None:
    """Call a command: its own ``main``, else ``run`` with the options of its parser."""
    # `main` is of commands that parse their words themselves: train, evaluate, estimate, report.
    if hasattr(module, "main"):
        module.main(words)
        return
    args = make_parser(module, name).parse_args(words)
    # For messages, see `adapter_of`.
    args.command = name
    module.run(args)


def make_parser(module: ModuleType, name: str) -> argparse.ArgumentParser:
    """The parser of a command with ``add_arguments``."""
    text = COMMANDS[name]
    parser = OneLineParser(
        f"maskft {name}",
        getattr(module, "HINTS", None),
        description=f"{text[:1].upper()}{text[1:]}.",
    )
    module.add_arguments(parser)
    return parser


# Signals


def _end_at_sigterm():
    """Let SIGTERM end this process as Ctrl-C does, children first; returns the handler that was there before."""
    # Python lets only the main thread set a handler.
    if threading.current_thread() is not threading.main_thread():
        return None
    this_process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == this_process:
            raise KeyboardInterrupt(number)
        # A fork inherits the handler. It ends at once: an exception would make it print the advice as well.
        os._exit(128 + number)

    return signal.signal(signal.SIGTERM, end)


def _without_overwrite(words: list[str]) -> list[str]:
    """A command without ``--overwrite``, which would delete the finished work when the command is repeated."""
    return _without_option(words, "--overwrite", values=("true", "false"))


def _without_option(words: list[str], option: str, values: tuple[str, ...] | None = None) -> list[str]:
    """A command without an option and its value.

    Args:
        words: The command.
        option: Name of the option, with its dashes.
        values: Lower-case values that may follow the name; None: one follows it always.
    """
    kept = []
    previous = ""
    for word in words:
        is_option = word == option or word.startswith(f"{option}=")
        is_value = previous == option and (values is None or word.lower() in values)
        if not is_option and not is_value:
            kept.append(word)
        previous = word
    return kept


def _resume_line(words: list[str]) -> str:
    """The command that resumes the training run that ``words`` started."""
    # With several processes, these are words for one worker; the launcher has put the user's into the environment.
    typed = shlex.split(os.environ.get(COMMAND, ""))
    if not typed:
        typed = ["maskft", *words]

    # Without the user's own value: false would start again, and a checkpoint's name would go back to that one.
    return shlex.join([*_without_option(typed, RESUME), RESUME, "true"])


def _print_error(message: str) -> None:
    where = ""
    if not is_main():
        # The main process has the same error: it prints it, and the launcher ends this process meanwhile.
        time.sleep(_PATIENCE_S)
        where = f" on rank {rank()}"
    line = " ".join(message.split())
    print(f"maskft: error{where}: {printable(line)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
