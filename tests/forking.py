"""Scripts in a fork of the test's process, which has imported torch and the others: a start of Python takes seconds."""

import os
import runpy
import sys
import traceback

import torch


def forked(call, out):
    """Call a function in a fork; its output and errors go to the file ``out``.

    Returns:
        Exit status: 0 if ``call`` returned, its code if it called ``sys.exit``, 1 after an exception.
    """
    pid = os.fork()
    if pid == 0:
        _call_and_exit(call, out)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def run_script(file, *arguments):
    """Run a script or, by its name, a module as Python does with these arguments."""
    sys.argv = [str(file), *map(str, arguments)]
    if str(file).endswith(".py"):
        sys.path.insert(0, str(file.parent))
        runpy.run_path(str(file), run_name="__main__")
    else:
        runpy.run_module(file, run_name="__main__", alter_sys=True)


def _call_and_exit(call, out):
    status = 1
    try:
        # The threads of the forked process are not here, and torch would wait for them.
        torch.set_num_threads(1)
        sys.stdout = sys.stderr = open(out, "w")
        call()
        status = 0
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)
