"""The sandbox against real attacks, each bounded so that it does no harm should the sandbox fail.

Attacks print ``BROKE OUT`` when they succeed. Those that can be are also run unconfined, where they must succeed: an
attack that never works proves nothing. On a machine that cannot confine, every test that needs it fails.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maskft_common.errors import UserError
from maskft_lab.sandbox import sandbox, system_calls, watch
from maskft_lab.sandbox.sandbox import SandboxResult, run_code, run_many, why_unconfined

MIB = 2**20
SECRET = "decoy-secret-4f1c"


def run_unconfined(code: str, monkeypatch: pytest.MonkeyPatch, **limits: float) -> SandboxResult:
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "why_unconfined", lambda: "unshare: Operation not permitted")
        return run_code(code, allow_unconfined=True, **limits)


# ---- ordinary programs ----


def test_machine_can_confine() -> None:
    assert why_unconfined() is None


def test_ordinary_program_passes_with_its_output() -> None:
    code = "import sys\nprint('größer', {str(i) for i in range(50)})\nprint('x', file=sys.stderr)\nassert 1 + 1 == 2"
    result = run_code(code)
    assert result.passed
    assert (result.status, result.reason, result.exit_code) == ("passed", "", 0)
    assert result.stdout.startswith("größer {") and result.stderr == "x\n"
    assert result.stdout == run_code(code).stdout, "sets have the same order every time"
    assert 0 < result.cpu_time_s < 5
    assert result.confinement == "confined"


@pytest.mark.parametrize(
    "code",
    [
        "import numpy as np\nassert np.allclose(np.ones(3) @ np.eye(3), 1)",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nassert A(1) == A(1)",
        "import asyncio\nasync def one():\n    return 1\nassert asyncio.run(one()) == 1",
        "import multiprocessing\nwith multiprocessing.Pool(2) as pool:\n    assert pool.map(abs, [-1, 2]) == [1, 2]",
        "import os, tempfile\nwith tempfile.TemporaryFile() as file:\n    file.write(b'x')\nopen('a', 'w').write('x')",
        "import sys\nassert sys.stdin.read() == ''",
        "if __name__ == '__main__':\n    raise SystemExit('HumanEval does not run this')",
        "import os\nos.write = os._exit = os.getpid = None",  # the runner must not depend on them
        "import sys\nsys.stdout = sys.stderr = None",
        "import atexit, time\natexit.register(time.sleep, 600)",
        # A name that is no text, which the watch reads.
        "import ctypes, time\nctypes.CDLL(None).prctl(15, b'\\xff) 1 (\\n', 0, 0, 0)\ntime.sleep(0.3)",
        "import fcntl, shutil\nfcntl.fcntl(1, fcntl.F_GETFL)\nopen('a', 'w').write('x')\nshutil.copyfile('a', 'b')",
    ],
)
def test_programs_that_pass(code: str) -> None:
    result = run_code(code)
    assert result.passed, result


@pytest.mark.parametrize(
    ("code", "reason", "exit_code"),
    [
        ("assert 1 == 2, 'one is not two'", "AssertionError: one is not two", 1),
        ("def f():\n    return 1 / 0\nf()", "ZeroDivisionError: division by zero", 1),
        ("def f(:", "SyntaxError: invalid syntax", 1),
        ("x = '\0'", "SyntaxError: source code string cannot contain null bytes", 1),
        ("x = '\ud800'", "UnicodeEncodeError: ", 1),
        ("import sys\nsys.exit(0)\nassert False", "the program ended with code 0 before its last line", 0),
        ("raise SystemExit('done')", "the program ended with code 1 before its last line", 1),
        ("import os\nprint('passed')\nos._exit(0)", "the program ended with code 0 before its last line", 0),
        ("import os\nos.kill(os.getpid(), 11)", "the program was ended by signal 11 before its last line", -11),
        # A child that comes to the end is not the program.
        ("import os\nif os.fork():\n    os.wait()\n    os._exit(0)", "the program ended with code 0", 0),
        # A pipe in the place of ours, from which a child would learn the token when the program exits early.
        (
            "import os, sys, time\nfd = next(fd for fd in range(3, 64) if os.path.exists(fd))\nkept = os.dup(fd)\n"
            "read_end, write_end = os.pipe()\nos.dup2(write_end, fd)\nif os.fork() == 0:\n"
            "    os.write(kept, os.read(read_end, 99).split()[0] + b' passed ')\n    os._exit(0)\n"
            "class Slow:\n    flush = lambda self: time.sleep(0.5)\n    write = len\n"
            "sys.stdout = Slow()\nsys.exit(0)",
            "",
            0,
        ),
        # No descriptor takes "passed" from someone who does not know the token.
        (
            "import os\nfor fd in range(3, 256):\n    try:\n        os.write(fd, b'passed passed')\n"
            "    except OSError:\n        pass\nos._exit(0)",
            "the program ended with code 0",
            0,
        ),
        ("import os\nos.closerange(3, 256)", "the program ended with code 1 before its last line", 1),
    ],
)
def test_programs_that_fail(code: str, reason: str, exit_code: int) -> None:
    result = run_code(code)
    assert result.status == "failed"
    assert result.reason.startswith(reason)
    assert result.exit_code == exit_code


def test_traceback_shows_the_programs_lines_only() -> None:
    stderr = run_code("def half(x):\n    return x / 0\nhalf(1)").stderr
    assert "return x / 0" in stderr
    assert "sandbox_child" not in stderr


# ---- attacks that reach for something outside ----


@pytest.fixture
def listener_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def signals() -> list[int]:
    received: list[int] = []
    previous = signal.signal(signal.SIGUSR1, lambda number, _: received.append(number))
    yield received
    signal.signal(signal.SIGUSR1, previous)


OUTSIDE_ATTACKS = {
    "delete": "import shutil\nshutil.rmtree({decoy!r})",
    "read": "assert open({decoy!r} + '/secret').read() == {secret!r}",
    "climb out": "assert open('../' * 20 + {decoy!r}[1:] + '/secret').read() == {secret!r}",
    "symlink": "import os\nos.symlink({decoy!r}, 'link')\nassert open('link/secret').read() == {secret!r}\n"
    "open('link/new', 'w').close()",
    "users": "import pathlib\nassert pathlib.Path('/etc/passwd').read_text()",
    "processes": "import os\nassert '{pid}' in os.listdir('/proc')",
    "environment": "assert open('/proc/{pid}/environ', 'rb').read()",
    "memory": "open('/proc/{pid}/mem', 'r+b').close()",
    "program": "import subprocess\nsubprocess.run([{python!r}, '-c', ''], check=True)",
    "raw socket": "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()",
}


@pytest.mark.parametrize("attack", OUTSIDE_ATTACKS)
def test_attack_on_the_outside(attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoy = tmp_path / "decoy"
    decoy.mkdir()
    (decoy / "secret").write_text(SECRET)
    names = {"decoy": str(decoy), "secret": SECRET, "pid": os.getpid(), "python": sys.executable}
    code = OUTSIDE_ATTACKS[attack].format(**names) + "\nprint('BROKE OUT')"

    result = run_code(code)
    assert result.status == "failed" and "BROKE OUT" not in result.stdout and SECRET not in result.stdout
    assert [path.name for path in decoy.iterdir()] == ["secret"]
    assert (decoy / "secret").read_text() == SECRET

    assert "BROKE OUT" in run_unconfined(code, monkeypatch).stdout, "the attack itself does not work"


def test_root_holds_only_what_python_needs() -> None:
    folders, _ = sandbox._python_folders()
    result = run_code("import os\nprint(*os.listdir('/'))\nprint(*os.listdir('/etc'))\nprint(os.listdir('/tmp'))")
    root, etc, temp = result.stdout.splitlines()
    assert set(root.split()) <= {path.split("/")[1] for path in folders} | {"dev", "etc", "tmp"}
    assert etc == "ld.so.cache"
    assert temp == "[]" or any(path.startswith("/tmp/") for path in folders)


def test_connecting_to_a_listener(listener_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"import socket\nsocket.create_connection(('127.0.0.1', {listener_port}), 5)\nprint('BROKE OUT')"
    assert "PermissionError" in run_code(code).reason
    assert "BROKE OUT" in run_unconfined(code, monkeypatch).stdout


def test_signalling_the_parent(signals: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"import os, signal\nos.kill({os.getpid()}, signal.SIGUSR1)"
    assert "ProcessLookupError" in run_code(code).reason
    assert signals == []
    assert run_unconfined(code, monkeypatch).passed
    assert signals == [signal.SIGUSR1]


def test_killing_everything_in_sight_reaches_the_program_only(signals: list[int]) -> None:
    # SIGUSR1, which the handler above takes, in place of SIGKILL; pid 1 of the sandbox takes SIGKILL and stays.
    code = (
        "import os, signal\nsignal.signal(signal.SIGUSR1, signal.SIG_IGN)\n"
        "for target in (os.getppid(), -1):\n"
        "    try:\n        os.kill(target, signal.SIGUSR1)\n    except OSError:\n        pass\n"
        "if os.getppid() == 1:\n    try:\n        os.kill(1, signal.SIGKILL)\n    except OSError:\n        pass\n"
    )
    assert run_code(code).passed
    assert signals == []


def test_environment_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKFT_DECOY", SECRET)
    code = "import os\nprint(sorted(os.environ), os.environ['HOME'])\nassert 'MASKFT_DECOY' not in os.environ"
    result = run_code(code)
    assert result.passed
    assert "'/tmp'" not in result.stdout and "/tmp" in result.stdout
    assert "MASKFT_DECOY" not in run_unconfined(code, monkeypatch).stdout


def test_installed_packages_are_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = tmp_path / "site-packages"
    (packages / "decoy").mkdir(parents=True)
    module = packages / "decoy" / "__init__.py"
    module.write_text("value = 1\n")
    for path in (packages, packages / "decoy", module):
        path.chmod(0o777)  # no permission protects it, only the sandbox
    folders, import_paths = sandbox._python_folders()
    monkeypatch.setattr(sandbox, "_python_folders", lambda: ([*folders, str(packages)], [*import_paths, str(packages)]))
    code = f"""
import os, decoy
assert decoy.value == 1
succeeded = 0
for attempt in (
    lambda: open({str(module)!r}, "w").write("value = 2"),
    lambda: open({str(packages / "new.py")!r}, "w").close(),
    lambda: os.remove({str(module)!r}),
    lambda: os.rename({str(module)!r}, {str(packages / "moved.py")!r}),
    lambda: os.chmod({str(module)!r}, 0),
    lambda: os.rmdir({str(packages)!r}),
):
    try:
        attempt()
        succeeded += 1
    except OSError:
        pass
assert succeeded == 0, succeeded
"""
    result = run_code(code)
    assert result.passed, result
    assert module.read_text() == "value = 1\n"
    assert module.stat().st_mode & 0o777 == 0o777
    assert sorted(path.name for path in packages.rglob("*")) == ["__init__.py", "decoy"]


def refused_calls() -> list[tuple[int, list[int]]]:
    """Numbers of system calls, each with arguments for which it is refused."""
    machine = system_calls.MACHINES.index(platform.machine())
    calls = [(numbers[machine], [-1] * 6) for numbers in system_calls.REFUSED_CALLS.values()]
    for numbers, position, values in system_calls.REFUSED_VALUES.values():
        for value in values:
            calls.append((numbers[machine], [-1] * position + [value] + [-1] * (5 - position)))
    for numbers, position, bits in system_calls.REFUSED_BITS.values():
        for bit in (1 << n for n in range(32) if bits >> n & 1):
            calls.append((numbers[machine], [-1] * position + [bit] + [-1] * (5 - position)))
    return calls


@pytest.mark.parametrize(
    "code",
    [
        # By lost capabilities, or by the family of a socket: AF_VSOCK, AF_NETLINK.
        """
assert libc.setuid(0) == libc.setgroups(0, None) == libc.sethostname(b'x', 1) == -1
for family, kind in ((40, 1), (16, 3)):
    assert libc.socketpair(family, kind, 0, ctypes.create_string_buffer(8)) == -1
""",
        # By the filter.
        f"""
for number, arguments in {refused_calls()}:
    assert libc.syscall(number, *arguments) == -1 and ctypes.get_errno() == errno.EPERM, (number, arguments)
""",
        # Calls that are newer than the filter do not exist.
        """
for number in (457, 470, 999, 0x40000000 + 39):
    assert libc.syscall(number, 0, 0, 0, 0) == -1 and ctypes.get_errno() == errno.ENOSYS, number
socket.socketpair()
""",
        # A session of its own: kill(0) would otherwise end the processes that watch it, where they are the same user's.
        "assert os.getsid(0) == os.getpgid(0) == os.getpid()",
        # Nobody, without capabilities and, by PR_GET_NO_NEW_PRIVS, unable to gain any.
        """
assert os.getresuid() == (65534,) * 3 and os.getresgid() == (65534,) * 3
assert 0 not in os.getgroups()
assert libc.prctl(39, 0, 0, 0, 0) == 1
data = (ctypes.c_uint32 * 6)(*[7] * 6)
assert libc.capget((ctypes.c_uint32 * 2)(0x20080522, 0), data) == 0
assert list(data) == [0] * 6, list(data)
""",
        # No program is started for a core dump.
        "import resource\nassert resource.getrlimit(resource.RLIMIT_CORE) == (1, 1)",
    ],
    ids=["refused", "filtered", "newer", "session", "nobody", "core"],
)
def test_walls_from_inside(code: str) -> None:
    result = run_code(f"import ctypes, errno, os, socket\nlibc = ctypes.CDLL(None, use_errno=True)\n{code}")
    assert result.passed, result


# ---- attacks on the machine's resources ----


@pytest.mark.parametrize(
    "start",
    [
        "pid = os.fork()\n    pid or (time.sleep(10), os._exit(0))",
        "threading.Thread(target=time.sleep, args=(10,), daemon=True).start()",
    ],
)
def test_processes_and_threads_are_bounded(start: str) -> None:
    code = f"""
import os, threading, time
count = 0
try:
  for _ in range(300):
    {start}
    count += 1
except (OSError, RuntimeError):
    print(count)
"""
    assert int(run_code(code, max_processes=8).stdout) == 7  # and the program itself


def test_endless_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_code("while True: pass", cpu_time_s=0.5)
    assert (result.status, result.reason) == ("timeout", "used more than 0.5 s of CPU time")
    assert 0.4 < result.cpu_time_s < 2
    result = run_unconfined("while True: pass", monkeypatch, cpu_time_s=0.5)
    assert (result.status, result.confinement) == ("timeout", "unconfined")


def test_the_kernels_limit_stands_behind_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "tree_usage", lambda *_: (0, 0.0))
    code = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    result = run_code(code, cpu_time_s=0)  # rounded up to whole seconds, and two more
    assert (result.status, result.reason) == ("failed", "the program was ended by signal 9 before its last line")


def test_cpu_time_of_children_counts() -> None:
    code = """
import os, time
for _ in range(6):
    if os.fork() == 0:
        while time.process_time() < 0.4:  # each of them below the limit
            pass
        os._exit(0)
for _ in range(6):
    os.wait()
"""
    result = run_code(code, cpu_time_s=0.8)
    assert (result.status, result.reason) == ("timeout", "used more than 0.8 s of CPU time")


def test_waiting_program_ends_at_the_wall_limit() -> None:
    result = run_code("print('waiting', flush=True)\nimport time\ntime.sleep(60)", wall_time_s=0.5)
    assert (result.status, result.reason, result.stdout) == ("timeout", "ran for more than 0.5 s", "waiting\n")


@pytest.mark.parametrize(
    "code",
    [
        "x = bytearray(2**30)",
        "x = []\nwhile True:\n    x.append(bytes(2**20))",
        "import numpy as np\nx = np.ones(2**28)",
    ],
)
def test_allocating_beyond_the_limit(code: str) -> None:
    result = run_code(code, memory_bytes=256 * MIB)
    assert result.status == "out_of_memory"
    assert "MemoryError" in result.reason


@pytest.mark.parametrize(
    "hold",
    [
        "time.sleep(20)",
        # A first thread that has ended.
        "threading.Thread(target=time.sleep, args=[20]).start()\n"
        "        ctypes.CDLL(None).syscall({'x86_64': 60, 'aarch64': 93}[platform.machine()], 0)",
        # Threads that are started all the time.
        "while True:\n            threading.Thread(target=int).start()",
    ],
)
def test_memory_of_children_counts(hold: str) -> None:
    code = f"""
import ctypes, os, platform, threading, time
for _ in range(4):
    if os.fork() == 0:
        data = b"x" * (100 * 2**20)
        {hold}
time.sleep(20)
"""
    result = run_code(code, memory_bytes=256 * MIB)
    assert (result.status, result.reason) == ("out_of_memory", "its processes together used more than 268435456 bytes")


@pytest.mark.parametrize("memory", ["-1", "os.open('/dev/zero', os.O_RDWR)"])
def test_memory_that_no_process_shows_is_refused(memory: str) -> None:
    """Shared pages stay when those who filled them have dropped them, and no process's resident pages count them."""
    code = f"""
import mmap, os, time
for _ in range(4):
    if os.fork() == 0:
        held = mmap.mmap({memory}, 100 * 2**20)
        for start in range(0, len(held), 2**20):
            held[start : start + 2**20] = bytes([1]) * 2**20
            held.madvise(mmap.MADV_DONTNEED, start, 2**20)
        print("BROKE OUT", held[5], flush=True)
        time.sleep(1)
        os._exit(0)
time.sleep(1)
"""
    assert "BROKE OUT" not in run_code(code, memory_bytes=256 * MIB).stdout


def test_memory_in_sockets_is_bounded() -> None:
    code = """
import contextlib, socket
pairs, held = [], 0
try:
    while True:
        pairs.append(socket.socketpair())
        for end in pairs[-1]:
            with contextlib.suppress(PermissionError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**30)
            end.setblocking(False)
            try:
                while True:
                    held += end.send(bytes(2**16))
            except BlockingIOError:
                pass
except OSError as error:
    print(error.strerror)
print(held)
"""
    message, held = run_code(code).stdout.splitlines()
    assert message == "Too many open files" and int(held) < 32 * MIB


# Bytes that the kernel keeps and no process shows, and effects outside of the sandbox.
KERNEL_ATTACKS = {
    # What closed clients sent waits for an accept: 1,779 MB in two listeners under a limit of 64 MiB.
    "accept queue": """
import socket
server = socket.socket(socket.AF_UNIX)
server.bind("queue")
server.listen(8)
for _ in range(4):
    client = socket.socket(socket.AF_UNIX)
    client.connect("queue")
    client.send(bytes(1000))
    client.close()
""",
    # The kernel names a socket that wants credentials when it sends; others can then send to that name.
    "named by credentials": """
import contextlib, socket
SO_PASSCRED = 16
receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
receiver.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 1)
with contextlib.suppress(ConnectionRefusedError):
    receiver.sendto(b"x", b"\\0nobody")
sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
sender.sendto(bytes(1000), receiver.getsockname())
""",
    "locks of other programs": """
import fcntl, os
fcntl.flock(os.open(os.__file__, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
""",
    "files that others have read": """
import contextlib, os
with contextlib.suppress(BlockingIOError):  # an answer, too: the file is not in memory
    os.preadv(os.open(os.__file__, os.O_RDONLY), [bytearray(1)], 0, os.RWF_NOWAIT)
""",
    "pages of other programs": """
import ctypes, mmap, os
libc = ctypes.CDLL(None, use_errno=True)
held = ctypes.create_string_buffer(2 * mmap.PAGESIZE)
page = -(-ctypes.addressof(held) // mmap.PAGESIZE) * mmap.PAGESIZE
if libc.mincore(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), ctypes.create_string_buffer(1)) != 0:
    raise OSError(ctypes.get_errno(), "mincore")
""",
    # The watch of an ordinary user could no longer read how many mappings the program has.
    "hidden from the watch": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
PR_SET_DUMPABLE = 4
if libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
    raise OSError(ctypes.get_errno(), "prctl")
""",
    "pipes of a megabyte": """
import fcntl, os
F_SETPIPE_SZ = 1031
fcntl.fcntl(os.pipe()[1], F_SETPIPE_SZ, 2**20)
""",
    "the machine's disks": """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
if libc.syscall({"x86_64": 306, "aarch64": 267}[os.uname().machine], os.open("/", os.O_RDONLY)) != 0:  # syncfs
    raise OSError(ctypes.get_errno(), "syncfs")
""",
}


@pytest.mark.parametrize("attack", KERNEL_ATTACKS)
def test_attack_through_the_kernel(attack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = KERNEL_ATTACKS[attack] + "\nprint('BROKE OUT')"
    result = run_code(code)
    assert result.status == "failed" and "[Errno 1]" in result.reason  # EPERM
    assert "BROKE OUT" in run_unconfined(code, monkeypatch).stdout, "the attack itself does not work"


def test_no_file_flushes_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel refuses a pipe; here the call succeeds and does nothing, as a program may call it for its own files.
    code = "import os\nfor sync in (os.fsync, os.fdatasync):\n    sync(os.pipe()[0])\n"
    assert run_code(code).passed
    assert "Invalid argument" in run_unconfined(code, monkeypatch).reason


def test_what_python_needs_of_sockets_and_pipes_stays() -> None:
    code = """
import asyncio, multiprocessing, os, socket, subprocess

a, b = socket.socketpair()
a.sendall(b"x")
assert b.recv(1) == b"x"
os.preadv(os.open(os.__file__, os.O_RDONLY), [bytearray(1)], 0)


async def main():
    reader, writer = await asyncio.open_connection(sock=a)
    b.sendall(b"line\\n")
    assert await reader.readline() == b"line\\n"
    writer.close()


asyncio.run(main())
queue = multiprocessing.Queue()
process = multiprocessing.Process(target=queue.put, args=(3,))
process.start()
assert queue.get() == 3
process.join()
"""
    result = run_code(code)
    assert result.passed, result


def test_mappings_count_as_memory() -> None:
    """The kernel's record of a mapping is in no process's resident pages; each process may have 65,530."""
    code = """
import ctypes, os, time
PROT_READ, PROT_WRITE, MAP_PRIVATE_AND_ANONYMOUS = 1, 2, 0x22
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
for number in range(40_000):
    # Neighbours with other rights are not joined into one mapping.
    rights = PROT_READ if number % 2 else PROT_READ | PROT_WRITE
    assert libc.mmap(None, 4096, rights, MAP_PRIVATE_AND_ANONYMOUS, -1, 0) != 2**64 - 1
for _ in range(3):
    os.fork()
time.sleep(20)
"""
    result = run_code(code, memory_bytes=256 * MIB)
    assert (result.status, result.reason) == ("out_of_memory", "its processes together used more than 268435456 bytes")


def test_queued_signals_are_bounded() -> None:
    code = """
import ctypes, os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN])
libc = ctypes.CDLL(None)
print(sum(libc.sigqueue(os.getpid(), int(signal.SIGRTMIN), None) == 0 for _ in range(2000)))
"""
    assert 0 < int(run_code(code).stdout) <= 256


def test_output_beyond_its_limit_is_thrown_away() -> None:
    result = run_code("while True:\n    print('x' * 1000)", cpu_time_s=0.3, max_output_bytes=5000)
    assert (result.status, len(result.stdout)) == ("timeout", 5000)
    result = run_code("for _ in range(10**4):\n    print('x' * 100)", max_output_bytes=100)
    assert (result.status, len(result.stdout)) == ("passed", 100)


@pytest.mark.parametrize("megabytes,files", [(160, 8), (0, 10_000)])
def test_files_are_bounded(megabytes: int, files: int) -> None:
    code = f"""
written = 0
try:
    for number in range({files}):
        with open(f"file{{number}}", "wb", buffering=0) as file:
            for _ in range({megabytes // files}):
                written += file.write(bytes(2**20))
except OSError as error:
    print(error.strerror)
print(written)
"""
    message, written = run_code(code).stdout.splitlines()
    assert message == "No space left on device" and int(written) <= 64 * MIB


def test_background_process_is_ended() -> None:
    name = f"left-{os.getpid()}"
    code = f"""
import ctypes, os, time
read_end, write_end = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        ctypes.CDLL(None).prctl(15, {name.encode()!r}, 0, 0, 0)  # PR_SET_NAME
        os.write(write_end, b"x")
        time.sleep(20)
    os._exit(0)
os.read(read_end, 1)
"""
    assert run_code(code).passed
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            assert path.read_text(errors="replace").strip() != name


def test_temporary_folders_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').close()\nopen('/tmp/decoy-left-behind', 'w').close()"
    assert run_code(code).passed
    assert not Path("/tmp/decoy-left-behind").exists()
    assert run_unconfined("import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').close()", monkeypatch).passed
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_no_folder(tmp_path: Path) -> None:
    code = "from maskft_lab.sandbox.sandbox import run_code\nrun_code('import time; time.sleep(60)')"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)})
    children = Path(f"/proc/{process.pid}/task")
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s and not any(file.read_text() for file in children.glob("*/children")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert list(tmp_path.iterdir()) == []


# ---- refusal, many programs, bad input ----


def test_unconfined_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "why_unconfined", lambda: "unshare: Operation not permitted")
    message = r"cannot be confined .*\(unshare: Operation not permitted\).*--allow_unconfined_code"
    with pytest.raises(UserError, match=message):
        run_code("print(1)")
    result = run_code("print(1)", allow_unconfined=True)
    assert (result.status, result.stdout, result.confinement) == ("passed", "1\n", "unconfined")


def test_step_that_fails_inside_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_VISIBLE_FILES", ("/proc/self/status",))  # a file that cannot be bound there
    monkeypatch.setattr(sandbox, "_python_folders", lambda: (["/nonexistent-folder"], []))
    message = "the program could not be started in the sandbox: mount: No such file or directory"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=message):
        patch.setattr(sandbox, "why_unconfined", lambda: None)
        run_code("print(1)")
    assert why_unconfined.__wrapped__() == message
    monkeypatch.setattr(sys, "platform", "darwin")
    assert why_unconfined.__wrapped__() == "it takes Linux namespaces, and this is darwin"


def test_run_many_keeps_the_order_and_reports_progress() -> None:
    programs = [f"import time\ntime.sleep({0.4 if i == 0 else 0})\nprint({i})\nassert {i} != 3" for i in range(6)]
    seen: list[tuple[int, int]] = []
    results = run_many(
        programs, num_workers=2, progress=lambda done, total, result: seen.append((done, total)), cpu_time_s=5
    )
    assert [result.stdout for result in results] == [f"{i}\n" for i in range(6)]
    assert [result.passed for result in results] == [True, True, True, False, True, True]
    assert seen == [(i, 6) for i in range(1, 7)]
    assert run_many([]) == []


def test_interrupt_does_not_wait_for_running_programs() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    start_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_many(["pass", *["import time\ntime.sleep(60)"] * 5], num_workers=2, progress=interrupt)
    assert time.monotonic() - start_s < 10
