"""The inside of the sandbox: confine this process, then run one program in it.

``sandbox.py`` starts this file as a fresh, single-threaded interpreter and writes the job as JSON to its standard
input. Standard library only: nothing else can be imported here. Three processes, each the parent of the next:

- launcher: enters new namespaces, waits for init, and kills it on SIGTERM;
- init: process 1 of the new process namespace. It builds the file system, reports how the program ended, and exits;
  its exit makes the kernel kill all processes that the program left. Absent when the run is unconfined;
- program: gives up every privilege, takes on the limits and the system-call filter, and runs the code. It is forked,
  not started by exec, so that exec can be refused to it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import linecache
import math
import os
import resource
import signal
import struct
import sys
import traceback
import types

# linux/sched.h
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
ALL_NAMESPACES = (
    CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET
)

# linux/mount.h
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2
AT_FDCWD = -100
AT_RECURSIVE = 0x8000
MOUNT_ATTR_RDONLY = 1
MOUNT_ATTR_NOSUID = 2
SYS_MOUNT_SETATTR = 442  # the same number on every architecture; glibc has a wrapper only since 2.36

# linux/prctl.h, linux/seccomp.h, linux/capability.h
PR_SET_PDEATHSIG = 1
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2
CAPABILITY_VERSION_3 = 0x20080522

NOBODY = 65534  # the user and group the program runs as
TEMP_FOLDER = "/tmp"
TEMP_FOLDER_BYTES = 64 * 2**20
TEMP_FOLDER_FILES = 4096
MAX_OPEN_FILES = 64  # sockets and pipes hold memory that belongs to no process
MAX_PENDING_SIGNALS = 256
RLIMIT_SIGPENDING = 11  # the resource module has no name for it
# Not "__main__": HumanEval's own scorer does not run `if __name__ == "__main__":` blocks either.
MODULE_NAME = "program"
FILE_NAME = "program.py"
MAX_REASON = 500  # characters

libc = ctypes.CDLL(None, use_errno=True)


def call(
    name: str,
    *args: int | bytes | None,
    step: str = "",
) -> None:
    """Call a libc function that returns 0 on success.

    Raises:
        OSError: If it fails; ``filename`` is ``step`` or ``name``, so that the message says which step it was.
    """
    function = getattr(libc, name)
    arguments: list = []
    for arg in args:
        # ctypes would pass a Python integer as 32 bits; libc reads a whole register where it takes a long.
        arguments.append(ctypes.c_long(arg) if isinstance(arg, int) else arg)
    if function(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), step or name)


# ---- launcher: namespaces and identity ----


def enter_namespaces() -> None:
    """Put this process into new namespaces, in which it holds all capabilities and outside of which it holds none.

    An ordinary user maps itself to "nobody". Root also maps "nobody", the user that the program becomes: root's files
    are then out of its reach even if one were visible, and the limit on processes, which never applies to root,
    applies.
    """
    uid = os.getuid()
    gid = os.getgid()
    if uid == 0:
        enter_namespaces_as_root()
        return
    call("unshare", ALL_NAMESPACES)
    # The kernel takes a gid_map from an ordinary user only after this (user_namespaces(7)).
    write_file("/proc/self/setgroups", "deny")
    write_file("/proc/self/uid_map", f"{NOBODY} {uid} 1")
    write_file("/proc/self/gid_map", f"{NOBODY} {gid} 1")


def enter_namespaces_as_root() -> None:
    """Enter namespaces in which there are two users, root and "nobody".

    Only a process that stayed outside may write such a map: a helper is forked before, and writes it when it reads a
    byte from the pipe.
    """
    user_map = f"0 0 1\n{NOBODY} {NOBODY} 1"  # each line: first user inside, first user outside, how many
    pid = os.getpid()
    read_end, write_end = os.pipe()
    helper = os.fork()
    if helper == 0:
        code = 0
        try:
            os.close(write_end)
            if os.read(read_end, 1):
                for name in ("uid_map", "gid_map"):
                    write_file(f"/proc/{pid}/{name}", user_map)
        except OSError as error:
            code = error.errno
        os._exit(code)

    try:
        call("unshare", ALL_NAMESPACES)
        os.write(write_end, b"1")
    finally:
        os.close(write_end)  # if unshare failed, the helper reads the end of the pipe, and exits
        os.close(read_end)
        _, status = os.waitpid(helper, 0)
    code = os.waitstatus_to_exitcode(status)
    if code != 0:
        raise OSError(code, os.strerror(code), "uid_map")


def write_file(path: str, text: str) -> None:
    """Write ``text`` in one system call, as the files under /proc want it."""
    file = os.open(path, os.O_WRONLY)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)


# ---- init: the file system ----


def build_file_system(folders: list[str], files: list[str]) -> None:
    """Make a new root: ``folders`` and ``files`` at their own paths, read-only, and one empty writable folder.

    Everything is in memory and in this mount namespace; the disk outside is never written to.
    """
    os.umask(0o022)
    # Links are resolved now: below the new root they would point elsewhere.
    real_paths = {path: os.path.realpath(path) for path in [*folders, *files]}

    # From here on no mount propagates into this namespace or out of it (mount_namespaces(7)).
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)

    # The new root. Below /old it has all of the old one; its /tmp is visible there.
    call("mount", b"tmpfs", b"/tmp", b"tmpfs", MS_NOSUID | MS_NODEV, b"size=1m,mode=755")
    os.mkdir("/tmp/old")
    call("pivot_root", b"/tmp", b"/tmp/old")
    os.chdir("/")

    # The writable folder first: one of ``folders`` may be inside it.
    os.mkdir(TEMP_FOLDER)
    options = f"size={TEMP_FOLDER_BYTES},nr_inodes={TEMP_FOLDER_FILES},mode=700,uid={NOBODY},gid={NOBODY}"
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    call("mount", b"tmpfs", TEMP_FOLDER.encode(), b"tmpfs", flags, options.encode())

    # A bind mount needs a target of its kind: an empty file for a file, a folder for a folder.
    for path, real_path in real_paths.items():
        if path in files:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            empty = os.open(path, os.O_CREAT | os.O_WRONLY)
            os.close(empty)
        else:
            os.makedirs(path, exist_ok=True)
        source = os.fsencode("/old" + real_path)
        call("mount", source, os.fsencode(path), None, MS_BIND | MS_REC, None)
    os.symlink(TEMP_FOLDER, "/dev/shm")  # where libc makes the semaphores of multiprocessing

    # Lazily: the interpreter that runs this is mapped from files below /old, which keeps the mount busy.
    call("umount2", b"/old", MNT_DETACH)
    os.rmdir("/old")

    # Read-only last, after all targets were made, and with all mounts below; then the one exception.
    set_mount_attributes("/", AT_RECURSIVE, add=MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID)
    set_mount_attributes(TEMP_FOLDER, 0, remove=MOUNT_ATTR_RDONLY)
    os.chdir(TEMP_FOLDER)
    call("sethostname", b"sandbox", len("sandbox"))


def set_mount_attributes(
    path: str,
    flags: int,
    *,
    add: int = 0,
    remove: int = 0,
) -> None:
    """Change the attributes of the mount at ``path``; with ``AT_RECURSIVE`` also of all below it (Linux 5.12).

    mount() with MS_REMOUNT changes one mount only: mounts below a bound folder would stay writable.
    """
    propagation = 0
    user_namespace = 0
    attributes = struct.pack("QQQQ", add, remove, propagation, user_namespace)  # struct mount_attr
    call(
        "syscall",
        SYS_MOUNT_SETATTR,
        AT_FDCWD,
        path.encode(),
        flags,
        attributes,
        len(attributes),
        step="mount_setattr",
    )


# ---- program: limits, privileges, system calls ----


def set_limits(job: dict) -> None:
    """Set the kernel's limits, hard, on this process and its children."""
    limits = {
        resource.RLIMIT_AS: job["memory_bytes"],
        resource.RLIMIT_FSIZE: TEMP_FOLDER_BYTES,
        resource.RLIMIT_NOFILE: MAX_OPEN_FILES,
        RLIMIT_SIGPENDING: MAX_PENDING_SIGNALS,
        resource.RLIMIT_CORE: 1,  # with 0 the kernel still starts a program that takes core dumps
    }
    if job["confined"]:  # unconfined, it would count all processes of the user
        # Launcher and init have the same user as the program, unless root started them.
        num_helpers = 0 if os.getuid() == 0 else 2
        limits[resource.RLIMIT_NPROC] = job["max_processes"] + num_helpers

    # Later than the watch outside, which counts exactly and should decide. At the soft limit the kernel sends a signal
    # that the program may ignore, a second later, at the hard one, SIGKILL.
    cpu_time_s = math.ceil(job["cpu_time_s"]) + 1
    set_limit(resource.RLIMIT_CPU, cpu_time_s, cpu_time_s + 1)
    for which, value in limits.items():
        set_limit(which, value, value)


def set_limit(
    which: int,
    soft: int,
    hard: int,
) -> None:
    """Set one limit, or leave the hard limit that this process already has, if it is lower."""
    _, ceiling = resource.getrlimit(which)
    if ceiling != resource.RLIM_INFINITY:
        soft = min(soft, ceiling)
        hard = min(hard, ceiling)
    resource.setrlimit(which, (soft, hard))


def drop_privileges() -> None:
    """Become "nobody", without capabilities and unable to gain any."""
    # Groups first: without root they can no longer be changed.
    if os.getuid() != NOBODY:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    # Without this, an ordinary user may not install a system-call filter either.
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    this_process = 0
    header = struct.pack("Ii", CAPABILITY_VERSION_3, this_process)
    no_capabilities = bytes(24)  # effective, permitted and inheritable, 64 bits each
    call("capset", header, no_capabilities)


def filter_system_calls(code: bytes) -> None:
    """Install a filter made by ``system_calls.py``, for this process and all of its descendants."""
    buffer = ctypes.create_string_buffer(code, len(code))
    address = ctypes.addressof(buffer)
    num_instructions = len(code) // 8
    header = struct.pack("HxxxxxxQ", num_instructions, address)  # struct sock_fprog
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0)


# ---- program: the code itself ----


def run_program(job: dict, token_fd: int) -> None:
    """Run ``job["code"]`` and never return.

    The token is written only after the last line of the program. An early exit writes none, whatever its exit status or
    output, and so shows none to a program that replaced our pipe.
    """
    code = job.pop("code")
    token = job.pop("token").encode()
    pid = os.getpid()
    # The program may replace these in os.
    write = os.write
    leave = os._exit
    getpid = os.getpid

    def tell(outcome: bytes, reason: str = "") -> None:
        # A child that the program forked comes here too.
        if getpid() == pid:
            text = reason[:MAX_REASON].encode("utf-8", "replace")
            write(token_fd, outcome + b" " + text)

    sys.path += job["import_paths"]
    sys.argv[:] = [FILE_NAME]
    # Under both names: pickle looks for a function in the module of its name, and __main__ would be this file.
    module = types.ModuleType(MODULE_NAME)
    sys.modules[MODULE_NAME] = module
    sys.modules["__main__"] = module
    # Tracebacks read the lines of a file, and the program is in none.
    lines = code.splitlines(keepends=True)
    linecache.cache[FILE_NAME] = (len(code), None, lines, FILE_NAME)

    exit_code = 0
    try:
        program = compile(code, FILE_NAME, "exec", dont_inherit=True)
        exec(program, module.__dict__)
        tell(token)
    except SystemExit as error:
        # As the interpreter does: None is 0, a text is 1.
        exit_code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        exit_code = 1
        outcome = b"failed"
        error.__traceback__ = error.__traceback__.tb_next  # from the program's first frame on
        if isinstance(error, MemoryError):
            outcome = b"out_of_memory"
            # Frees the frames and their memory: the message below needs some.
            error.__traceback__ = None
            module.__dict__.clear()
        message_lines = traceback.format_exception_only(error)
        tell(outcome, message_lines[-1].strip())
        traceback.print_exception(error)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BaseException):  # it may be closed or replaced
                stream.flush()
        # Not sys.exit, which waits for the program's threads and exit handlers.
        leave(exit_code & 0xFF)


# ---- the three processes ----


def launcher(job: dict, report_fd: int) -> None:
    """Enter the namespaces, start init (or, unconfined, the program itself), wait for it."""
    parent = os.getppid()
    if job["confined"]:
        enter_namespaces()
    if sys.platform == "linux":
        # End with the process that started us. After the change of identity, which would clear it.
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # If that process ended before the call, no signal will come.
    if os.getppid() != parent:
        os._exit(1)

    if not job["confined"]:
        supervise(job, report_fd)
        os.killpg(0, signal.SIGKILL)  # this process and all that are left in its group

    # The first child after unshare is process 1 of the new namespace; this process stays outside of it.
    child = os.fork()
    if child == 0:
        init(job, report_fd)

    def kill_init(*_: object) -> None:
        os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGTERM, kill_init)
    os.waitpid(child, 0)


def init(job: dict, report_fd: int) -> None:
    """Be process 1 of the new process namespace; never return."""
    try:
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # Processes of a namespace can send process 1 only signals that it handles, and Python handles this one.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        build_file_system(job["folders"], job["files"])
        supervise(job, report_fd)
    except OSError as error:
        report(report_fd, {"refused": describe(error)})
    finally:
        os._exit(0)


def supervise(job: dict, report_fd: int) -> None:
    """Fork the program, wait for it, report how it ended."""
    read_end, write_end = os.pipe()
    program = os.fork()
    if program == 0:
        become_program(job, report_fd, write_end)

    report(report_fd, {"started": True})
    os.close(write_end)
    if not job["confined"]:
        # This process is the launcher; confined, that one is above, and kills init and all below it.
        def kill_program(*_: object) -> None:
            os.kill(program, signal.SIGKILL)

        signal.signal(signal.SIGTERM, kill_program)

    # Any child, not the program alone: init also inherits, and must reap, the processes whose parents are gone.
    while True:
        pid, status, usage = os.wait4(-1, 0)
        if pid == program:
            break

    outcome, reason = read_outcome(read_end, job["token"])
    end = {
        "outcome": outcome,
        "reason": reason,
        "exit_code": os.waitstatus_to_exitcode(status),
        "cpu_time_s": usage.ru_utime + usage.ru_stime,
    }
    report(report_fd, end)


def become_program(
    job: dict,
    report_fd: int,
    token_fd: int,
) -> None:
    """Confine this process, close inherited descriptors, and run the code; never return."""
    try:
        # In this order: the limits depend on the user before it changes, and the kernel takes the filter only after
        # `drop_privileges` has set no_new_privs.
        set_limits(job)
        if job["confined"]:
            os.setsid()  # a separate process group: kill(0) would end the processes above too
            drop_privileges()
            code = bytes.fromhex(job["seccomp_filter"])
            filter_system_calls(code)
    except (OSError, ValueError) as error:
        report(report_fd, {"refused": describe(error)})
        os._exit(1)

    # The report goes to the process outside, which believes it: the program must not write there. Its own pipe stays.
    os.closerange(3, token_fd)
    os.closerange(token_fd + 1, report_fd + 1)
    run_program(job, token_fd)


def read_outcome(read_end: int, token: str) -> tuple[str, str]:
    """Read the outcome from the program's pipe: ``passed`` with the token, ``failed``, ``out_of_memory``, or empty."""
    # The program has ended, but its children may still hold the other end: a blocking read could wait for them.
    os.set_blocking(read_end, False)
    try:
        message = os.read(read_end, 4096)
    except BlockingIOError:
        message = b""
    text = message.decode("utf-8", "replace")
    outcome, _, reason = text.partition(" ")
    if outcome == token:
        return "passed", reason
    if outcome in ("failed", "out_of_memory"):
        return outcome, reason
    return "", ""


def describe(error: Exception) -> str:
    """Return "step: the kernel's message"."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {error}"


def report(report_fd: int, message: dict) -> None:
    """Send ``message`` to the process outside, as a line of JSON in one system call."""
    line = json.dumps(message) + "\n"
    os.write(report_fd, line.encode())


def main() -> None:
    """Read the job from standard input and run it; the report goes to the descriptor named on the command line."""
    report_fd = int(sys.argv[1])
    job = json.load(sys.stdin)

    # The program has no standard input.
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    try:
        launcher(job, report_fd)
    except OSError as error:
        report(report_fd, {"refused": describe(error)})


if __name__ == "__main__":
    main()
