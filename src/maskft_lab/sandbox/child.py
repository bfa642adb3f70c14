"""The inside of the sandbox: confine this process, then run one program in it.

``sandbox.py`` starts this file as a fresh, single-threaded interpreter and writes the job as JSON to its standard
input. Standard library only: nothing else can be imported here. Three processes, each the parent of the next:

- launcher: enters new namespaces, waits for init, and takes it down when told to stop;
- init: process 1 of the new process namespace. It builds the file system, reports how the program ended, and leaves;
  its end makes the kernel kill everything the program left behind. Absent when the run is unconfined;
- program: gives up every privilege, takes on the limits and the system-call filter, and runs the code. It is forked,
  not started by exec, so that exec can be refused to it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import linecache
import math
import os
import platform
import resource
import signal
import struct
import sys
import traceback
import types

# linux/sched.h, linux/mount.h, linux/prctl.h
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
ALL_NAMESPACES = (
    CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET
)
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = -100, 0x8000, 1, 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2
SYS_MOUNT_SETATTR = 442  # the same number on every architecture; glibc has a wrapper only since 2.36

NOBODY = 65534  # the user and group the program runs as
TEMP_FOLDER = "/tmp"
TEMP_FOLDER_BYTES = 64 * 2**20
TEMP_FOLDER_FILES = 4096
MAX_OPEN_FILES = 64  # sockets and pipes hold memory that belongs to no process
MAX_PENDING_SIGNALS = 256
RLIMIT_SIGPENDING = 11  # the resource module has no name for it
MODULE_NAME = (
    "program"  # not "__main__": HumanEval's own scorer does not run `if __name__ == "__main__":` blocks either
)

# System calls refused to the program, with their numbers on MACHINES. It may make all others: a list of the allowed
# ones would break with every new libc. Namespaces and lost privileges already confine it; these are the doors beside
# them: nested namespaces and mounts, other processes' memory, other programs, memory that no limit counts, and kernel
# code with a history of holes.
MACHINES = ("x86_64", "aarch64")
AUDIT_ARCH = (0xC000003E, 0xC00000B7)  # how a filter names the machine (linux/audit.h)
REFUSED_CALLS = {
    "add_key": (248, 217),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "execve": (59, 221),
    "execveat": (322, 281),
    "fadvise64": (221, 223),
    "fanotify_init": (300, 262),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "inotify_add_watch": (254, 27),
    "inotify_init": (253, 26),  # arm has the newer one alone
    "inotify_init1": (294, 26),
    "io_setup": (206, 0),  # its number of events is a quota of the whole machine
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "kcmp": (312, 272),
    "keyctl": (250, 219),
    "landlock_create_ruleset": (444, 444),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "readahead": (187, 213),
    "request_key": (249, 218),
    "semget": (64, 190),
    "sendfile": (40, 71),  # a socket then holds pages that no process shows
    "setns": (308, 268),
    "shmget": (29, 194),
    "splice": (275, 76),
    "tee": (276, 77),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "vmsplice": (278, 75),
}
CLONE_CALL, CLONE3_CALL = (56, 220), (435, 435)  # allowed with some arguments only
SOCKET_CALLS = ((41, 198), (53, 199))  # socket, socketpair
# Calls that are refused with some values of an argument (its position): memory that belongs to no process, and
# F_NOTIFY, whose number is a quota of the whole machine.
REFUSED_VALUES = {
    "fcntl": ((72, 25), 1, (6, 7, 37, 38, 1026)),  # F_SETLK, F_SETLKW, F_OFD_SETLK, F_OFD_SETLKW, F_NOTIFY
    "prctl": ((157, 167), 0, (78,)),  # PR_FUTEX_HASH
    "setsockopt": ((54, 208), 2, (7,)),  # SO_SNDBUF
}
MMAP_CALL, SHARED_MEMORY = (9, 222), 0x21  # MAP_SHARED and MAP_ANONYMOUS: pages that stay when no process shows them
FIRST_UNKNOWN_CALL = 457  # newer than Linux 6.7; x86_64 numbers its x32 calls far above

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args: int | bytes | None, step: str = "") -> None:
    """Call a libc function that returns 0 on success.

    Raises:
        OSError: If it fails; ``filename`` is ``step`` or ``name``, so that the message says which step it was.
    """
    arguments = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    if getattr(libc, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), step or name)


# ---- launcher: namespaces and identity ----


def enter_namespaces() -> None:
    """Put this process into new namespaces, in which it holds all capabilities and outside of which it holds none.

    Root also maps "nobody", the user that the program becomes: root's files are then out of its reach even if one were
    visible, and the limit on processes, which never applies to root, applies. Only a process that stayed outside may
    write a map with two ids, hence the helper. An ordinary user maps itself to "nobody".
    """
    uid, gid, pid = os.getuid(), os.getgid(), os.getpid()
    if uid != 0:
        call("unshare", ALL_NAMESPACES)
        write_file("/proc/self/setgroups", "deny")
        write_file("/proc/self/uid_map", f"{NOBODY} {uid} 1")
        write_file("/proc/self/gid_map", f"{NOBODY} {gid} 1")
        return
    read_end, write_end = os.pipe()
    helper = os.fork()
    if helper == 0:
        code = 0
        try:
            os.close(write_end)
            if os.read(read_end, 1):
                for name in ("uid_map", "gid_map"):
                    write_file(f"/proc/{pid}/{name}", f"0 0 1\n{NOBODY} {NOBODY} 1")
        except OSError as error:
            code = error.errno
        os._exit(code)
    try:
        call("unshare", ALL_NAMESPACES)
        os.write(write_end, b"1")
    finally:
        os.close(write_end)
        os.close(read_end)
        code = os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1])
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

    Everything lives in memory and in this mount namespace; nothing of it is ever on the disk outside.
    """
    os.umask(0o022)
    real_paths = {path: os.path.realpath(path) for path in (*folders, *files)}
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    call("mount", b"tmpfs", b"/tmp", b"tmpfs", MS_NOSUID | MS_NODEV, b"size=1m,mode=755")
    os.mkdir("/tmp/old")
    call("pivot_root", b"/tmp", b"/tmp/old")
    os.chdir("/")
    # The old root is whole again below /old, its /tmp included. Our own /tmp comes first: a folder may be inside it.
    os.mkdir(TEMP_FOLDER)
    options = f"size={TEMP_FOLDER_BYTES},nr_inodes={TEMP_FOLDER_FILES},mode=700,uid={NOBODY},gid={NOBODY}"
    call("mount", b"tmpfs", TEMP_FOLDER.encode(), b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options.encode())
    for path, real_path in real_paths.items():
        if path in files:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
        else:
            os.makedirs(path, exist_ok=True)
        call("mount", os.fsencode("/old" + real_path), os.fsencode(path), None, MS_BIND | MS_REC, None)
    os.symlink(TEMP_FOLDER, "/dev/shm")  # where libc makes the semaphores of multiprocessing
    call("umount2", b"/old", MNT_DETACH)
    os.rmdir("/old")
    set_mount_attributes("/", AT_RECURSIVE, add=MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID)
    set_mount_attributes(TEMP_FOLDER, 0, remove=MOUNT_ATTR_RDONLY)
    os.chdir(TEMP_FOLDER)
    call("sethostname", b"sandbox", len("sandbox"))


def set_mount_attributes(path: str, flags: int, *, add: int = 0, remove: int = 0) -> None:
    """Change the attributes of the mount at ``path``; with ``AT_RECURSIVE`` also of all below it (Linux 5.12)."""
    attributes = struct.pack("QQQQ", add, remove, 0, 0)
    number = SYS_MOUNT_SETATTR
    call("syscall", number, AT_FDCWD, path.encode(), flags, attributes, len(attributes), step="mount_setattr")


# ---- program: limits, privileges, system calls ----


def set_limits(job: dict) -> None:
    """Set the kernel's limits, hard, on this process and its children."""
    cpu_time_s = math.ceil(job["cpu_time_s"]) + 1  # the watch outside, whose count is exact, is to decide
    limits = {
        resource.RLIMIT_CPU: (cpu_time_s, cpu_time_s + 1),
        resource.RLIMIT_AS: (job["memory_bytes"],) * 2,
        resource.RLIMIT_FSIZE: (TEMP_FOLDER_BYTES,) * 2,
        resource.RLIMIT_NOFILE: (MAX_OPEN_FILES,) * 2,
        RLIMIT_SIGPENDING: (MAX_PENDING_SIGNALS,) * 2,
        resource.RLIMIT_CORE: (1, 1),  # with 0 the kernel still starts a program that takes core dumps
    }
    if job["confined"]:  # elsewhere it would count everything that the user runs
        num_helpers = 0 if os.getuid() == 0 else 2  # launcher and init are the program's user, unless started by root
        limits[resource.RLIMIT_NPROC] = (job["max_processes"] + num_helpers,) * 2
    for which, values in limits.items():
        ceiling = resource.getrlimit(which)[1]
        if ceiling != resource.RLIM_INFINITY:
            values = tuple(min(value, ceiling) for value in values)
        resource.setrlimit(which, values)


def drop_privileges() -> None:
    """Become "nobody", without capabilities and unable to gain any."""
    if os.getuid() != NOBODY:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    version_3 = struct.pack("Ii", 0x20080522, 0)
    call("capset", version_3, bytes(24))


def filter_system_calls() -> None:
    """Refuse ``REFUSED_CALLS``, what is newer, ``REFUSED_VALUES``, nested namespaces, and sockets but AF_UNIX's.

    A network namespace alone does not confine every family: AF_VSOCK reaches the host of a virtual machine.
    """
    machine = MACHINES.index(platform.machine())
    load, equal, greater_equal, any_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF_LD|W|ABS, BPF_JMP|.., BPF_RET
    allow, refuse, absent, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS, 0x80000000
    keep_bits = 0x54  # BPF_ALU|AND
    af_unix, number_at, machine_at = 1, 0, 4  # offsets in struct seccomp_data; below, the lower half of each argument
    arguments_at = [16 + 8 * position for position in range(6)]
    program = [
        (load, 0, 0, machine_at),
        (equal, 1, 0, AUDIT_ARCH[machine]),  # (operation, instructions to skip if true, if false, operand)
        (end, 0, 0, kill),
        (load, 0, 0, number_at),
        (greater_equal, 0, 1, FIRST_UNKNOWN_CALL),
        (end, 0, 0, absent),
    ]
    for numbers in REFUSED_CALLS.values():
        program += [(equal, 0, 1, numbers[machine]), (end, 0, 0, refuse)]
    # clone3 hides its flags behind a pointer; told that it does not exist, libc falls back on clone.
    program += [(equal, 0, 1, CLONE3_CALL[machine]), (end, 0, 0, absent)]

    def refuse_if(numbers: tuple[int, int], argument_at: int, *test: tuple[int, int, int, int]) -> None:
        block = [(load, 0, 0, argument_at), *test, (end, 0, 0, refuse), (end, 0, 0, allow)]
        program.extend([(equal, 0, len(block), numbers[machine]), *block])

    refuse_if(CLONE_CALL, arguments_at[0], (any_bit, 0, 1, ALL_NAMESPACES))
    for numbers in SOCKET_CALLS:
        refuse_if(numbers, arguments_at[0], (equal, 1, 0, af_unix))
    for numbers, position, values in REFUSED_VALUES.values():
        last = len(values) - 1
        tests = [(equal, last - index, index == last, value) for index, value in enumerate(values)]
        refuse_if(numbers, arguments_at[position], *tests)
    refuse_if(MMAP_CALL, arguments_at[3], (keep_bits, 0, 0, SHARED_MEMORY), (equal, 0, 1, SHARED_MEMORY))
    program.append((end, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    header = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0)


# ---- program: the code itself ----


def run_program(job: dict, token_fd: int) -> None:
    """Run ``job["code"]`` and never return.

    Only a program whose last line was reached writes the token: an early exit writes none, whatever the exit status or
    the output, and so shows none to a program that has put a pipe of its own in the place of ours.
    """
    token, pid = job.pop("token").encode(), os.getpid()
    write, leave, getpid = os.write, os._exit, os.getpid  # the program may replace these in os

    def tell(outcome: bytes, reason: str = "") -> None:
        if getpid() == pid:  # not a child that the program forked and that came this far too
            write(token_fd, outcome + b" " + reason[:500].encode("utf-8", "replace"))

    code, exit_code = job.pop("code"), 0
    sys.path += job["import_paths"]
    sys.argv[:] = ["program.py"]
    module = types.ModuleType(MODULE_NAME)
    sys.modules[MODULE_NAME] = sys.modules["__main__"] = module
    linecache.cache["program.py"] = (len(code), None, code.splitlines(keepends=True), "program.py")
    try:
        exec(compile(code, "program.py", "exec", dont_inherit=True), module.__dict__)
        tell(token)
    except SystemExit as error:
        exit_code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        exit_code, outcome = 1, b"failed"
        error.__traceback__ = error.__traceback__.tb_next  # from the program's first frame on
        if isinstance(error, MemoryError):
            outcome, error.__traceback__ = b"out_of_memory", None  # lets go of the frames and what they hold
            module.__dict__.clear()
        tell(outcome, traceback.format_exception_only(error)[-1].strip())
        traceback.print_exception(error)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BaseException):  # it may be closed or replaced
                stream.flush()
        leave(exit_code & 0xFF)


# ---- the three processes ----


def launcher(job: dict, report_fd: int) -> None:
    """Enter the namespaces, start init (or, unconfined, the program itself), wait for it."""
    parent = os.getppid()
    if job["confined"]:
        if platform.machine() not in MACHINES:
            raise OSError(errno.ENOSYS, f"no system-call filter for {platform.machine()}", "seccomp")
        enter_namespaces()
    if sys.platform == "linux":
        # After the change of identity, which would clear it: end with the process that started us.
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    if not job["confined"]:
        supervise(job, report_fd)
        os.killpg(0, signal.SIGKILL)  # this process and what the program left in its group
    child = os.fork()
    if child == 0:
        init(job, report_fd)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    os.waitpid(child, 0)


def init(job: dict, report_fd: int) -> None:
    """Be process 1 of the new process namespace; never return."""
    try:
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
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
        try:
            set_limits(job)
            if job["confined"]:
                os.setsid()  # out of the group of the processes above, which kill(0) would end
                drop_privileges()
                filter_system_calls()
        except (OSError, ValueError) as error:
            report(report_fd, {"refused": describe(error)})
            os._exit(1)
        os.closerange(3, write_end)
        os.closerange(write_end + 1, report_fd + 1)
        run_program(job, write_end)
    report(report_fd, {"started": True})
    os.close(write_end)
    if not job["confined"]:
        signal.signal(signal.SIGTERM, lambda *_: os.kill(program, signal.SIGKILL))
    while True:  # init also inherits, and must reap, the processes whose parents are gone
        pid, status, usage = os.wait4(-1, 0)
        if pid == program:
            break
    os.set_blocking(read_end, False)
    try:
        message = os.read(read_end, 4096)
    except BlockingIOError:
        message = b""
    outcome, _, reason = message.decode("utf-8", "replace").partition(" ")
    if outcome == job["token"]:
        outcome = "passed"
    elif outcome not in ("failed", "out_of_memory"):
        outcome = reason = ""
    report(
        report_fd,
        {
            "outcome": outcome,
            "reason": reason,
            "exit_code": os.waitstatus_to_exitcode(status),
            "cpu_time_s": usage.ru_utime + usage.ru_stime,
        },
    )


def describe(error: Exception) -> str:
    """Return "step: what the kernel said"."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {error}"


def report(report_fd: int, message: dict) -> None:
    """Send ``message`` to the process outside."""
    os.write(report_fd, json.dumps(message).encode() + b"\n")


def main() -> None:
    """Read the job from standard input and run it; the report goes to the descriptor named on the command line."""
    report_fd = int(sys.argv[1])
    job = json.load(sys.stdin)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    try:
        launcher(job, report_fd)
    except OSError as error:
        report(report_fd, {"refused": describe(error)})


if __name__ == "__main__":
    main()
