"""System calls refused to a confined program, as a seccomp filter.

The program may make all other calls: a list of the allowed ones would break with every new libc. Namespaces and lost
privileges already confine it. Refused are the ways around these: nested namespaces and mounts, other processes' memory,
other programs, memory that the kernel keeps and no process shows, effects on the whole machine, and kernel code with a
history of security holes.
"""

from __future__ import annotations

import errno
import platform
import struct

from maskft_common.errors import UserError

# Numbers below are given for these machines, in this order.
MACHINES = ("x86_64", "aarch64")
AUDIT_ARCH = (0xC000003E, 0xC00000B7)  # the machine in the kernel's struct seccomp_data (linux/audit.h)

# Calls refused whatever their arguments are.
REFUSED_CALLS = {
    # Other programs, other processes, namespaces and mounts.
    "chroot": (161, 51),
    "execve": (59, 221),
    "execveat": (322, 281),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "kcmp": (312, 272),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "setns": (308, 268),
    "umount2": (166, 39),
    "unshare": (272, 97),
    # Sockets with a name: data of clients stays in the listener's queue after every client has closed its end. Two
    # listeners held 1,779 MB. A socketpair has no queue of connections, and its memory is freed with its ends.
    "accept": (43, 202),
    "accept4": (288, 242),
    "bind": (49, 200),
    "connect": (42, 203),
    "listen": (50, 201),
    # Other memory that no process shows: files without a folder, keys, messages, segments, pages lent to a pipe.
    "add_key": (248, 217),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "request_key": (249, 218),
    "semget": (64, 190),
    "sendfile": (40, 71),
    "shmget": (29, 194),
    "splice": (275, 76),
    "tee": (276, 77),
    "vmsplice": (278, 75),
    # The page cache, which shows the files that other programs have read.
    "cachestat": (451, 451),
    "fadvise64": (221, 223),
    "mincore": (27, 232),  # it answers the owner of a file, as an ordinary user is of installed packages
    "readahead": (187, 213),
    # Quotas, locks and disks of the whole machine: a lock on a library's file would be one for programs outside.
    "fanotify_init": (300, 262),
    "flock": (73, 32),
    "inotify_add_watch": (254, 27),
    "inotify_init": (253, 26),  # aarch64 has inotify_init1 alone
    "inotify_init1": (294, 26),
    "io_setup": (206, 0),
    "sync": (162, 81),
    "syncfs": (306, 267),
    # Kernel code with a history of holes.
    "bpf": (321, 280),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "landlock_create_ruleset": (444, 444),
    "perf_event_open": (298, 241),
    "seccomp": (317, 277),
    "userfaultfd": (323, 282),
}

# Calls refused if an argument has one of some values: numbers of the call, position of the argument, values.
REFUSED_VALUES = {
    # F_SETLK, F_SETLKW, F_OFD_SETLK, F_OFD_SETLKW, F_SETLEASE, F_NOTIFY, F_SETPIPE_SZ
    "fcntl": ((72, 25), 1, (6, 7, 37, 38, 1024, 1026, 1031)),
    # PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_FUTEX_HASH. With the first a program hides its mappings from the watch, unless
    # root watches it.
    "prctl": ((157, 167), 0, (4, 22, 78)),
    # SO_SNDBUF, SO_PASSCRED, SO_PASSPIDFD: with the last two the kernel gives a socket a name
    "setsockopt": ((54, 208), 2, (7, 16, 76)),
}

# Calls refused if an argument has any of these bits.
ALL_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET (linux/sched.h)
RWF_NOWAIT = 8  # fails if a file is not in the page cache, which shows the files that others have read
REFUSED_BITS = {
    "clone": ((56, 220), 0, ALL_NAMESPACES),
    "preadv2": ((327, 286), 5, RWF_NOWAIT),
}

# Calls that do nothing here and succeed: files that a program can write to are in memory, and a call for a library's
# file would flush the cache of the disk that it is on.
SKIPPED_CALLS = {
    "fsync": (74, 82),
    "fdatasync": (75, 83),
}

# clone3 hides its flags behind a pointer, which a filter cannot follow. Without it libc falls back on clone.
CLONE3 = (435, 435)
# A network namespace does not confine every family: AF_VSOCK reaches the host of a virtual machine.
SOCKETS = {"socket": (41, 198), "socketpair": (53, 199)}
AF_UNIX = 1
# Pages that are shared and of no file stay when no process shows them.
MMAP = (9, 222)
SHARED_AND_ANONYMOUS = 0x21
# Newer than Linux 6.7. x86_64 numbers the calls of its x32 variant far above.
FIRST_UNKNOWN_CALL = 457

# The filter is a program for the kernel's packet filter (linux/filter.h): operation, instructions to skip where a test
# is true, where it is false, operand.
Instruction = tuple[int, int, int, int]
LOAD = 0x20
JUMP_IF_EQUAL = 0x15
JUMP_IF_GREATER_OR_EQUAL = 0x35
JUMP_IF_ANY_BIT = 0x45
AND = 0x54
RETURN = 0x06

# Values that the filter returns (linux/seccomp.h).
ALLOW = 0x7FFF0000
FAIL = 0x00050000
KILL = 0x80000000

# Offsets in struct seccomp_data. Of an argument's 64 bits, tests see the lower half.
NUMBER_AT = 0
MACHINE_AT = 4
ARGUMENTS_AT = [16 + 8 * position for position in range(6)]


def seccomp_filter(machine_name: str | None = None) -> bytes:
    """Return the filter as an array of ``struct sock_filter``.

    Args:
        machine_name: Of ``MACHINES``; default: this one.

    Raises:
        UserError: If the numbers of the machine's calls are not known.
    """
    name = machine_name or platform.machine()
    if name not in MACHINES:
        raise UserError(f"seccomp: no system-call filter for {name}")
    machine = MACHINES.index(name)

    program: list[Instruction] = [
        # A call in another machine's numbers, such as a 32-bit one on x86_64, would be mistaken for a different call.
        (LOAD, 0, 0, MACHINE_AT),
        (JUMP_IF_EQUAL, 1, 0, AUDIT_ARCH[machine]),
        (RETURN, 0, 0, KILL),
        # ENOSYS, on which libc falls back to an older call; EPERM would be an error to it.
        (LOAD, 0, 0, NUMBER_AT),
        (JUMP_IF_GREATER_OR_EQUAL, 0, 1, FIRST_UNKNOWN_CALL),
        (RETURN, 0, 0, FAIL | errno.ENOSYS),
        (JUMP_IF_EQUAL, 0, 1, CLONE3[machine]),
        (RETURN, 0, 0, FAIL | errno.ENOSYS),
    ]
    # The number of the call is loaded from here on; a block of `_refuse_if` that loads an argument returns.
    for numbers in REFUSED_CALLS.values():
        program.append((JUMP_IF_EQUAL, 0, 1, numbers[machine]))
        program.append((RETURN, 0, 0, FAIL | errno.EPERM))
    for numbers in SKIPPED_CALLS.values():
        program.append((JUMP_IF_EQUAL, 0, 1, numbers[machine]))
        program.append((RETURN, 0, 0, FAIL | 0))
    for numbers, position, bits in REFUSED_BITS.values():
        program += _refuse_if(numbers[machine], position, [(JUMP_IF_ANY_BIT, 0, 1, bits)])
    for numbers in SOCKETS.values():
        # The other way round: AF_UNIX skips the instruction that refuses.
        program += _refuse_if(numbers[machine], 0, [(JUMP_IF_EQUAL, 1, 0, AF_UNIX)])
    for numbers, position, values in REFUSED_VALUES.values():
        program += _refuse_if(numbers[machine], position, _is_one_of(values))
    is_shared_and_anonymous = [
        (AND, 0, 0, SHARED_AND_ANONYMOUS),
        (JUMP_IF_EQUAL, 0, 1, SHARED_AND_ANONYMOUS),
    ]
    program += _refuse_if(MMAP[machine], 3, is_shared_and_anonymous)
    program.append((RETURN, 0, 0, ALLOW))

    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def _refuse_if(
    number: int,
    position: int,
    test: list[Instruction],
) -> list[Instruction]:
    """Refuse a call where ``test`` of an argument falls through to the next instruction; skipping one allows it."""
    block: list[Instruction] = [
        (LOAD, 0, 0, ARGUMENTS_AT[position]),
        *test,
        (RETURN, 0, 0, FAIL | errno.EPERM),
        (RETURN, 0, 0, ALLOW),
    ]
    return [(JUMP_IF_EQUAL, 0, len(block), number), *block]


def _is_one_of(values: tuple[int, ...]) -> list[Instruction]:
    """A test that falls through where the argument has one of the values, and else skips an instruction."""
    last = len(values) - 1
    tests: list[Instruction] = []
    for index, value in enumerate(values):
        skip_if_equal = last - index  # the tests that follow
        skip_if_other = 1 if index == last else 0
        tests.append((JUMP_IF_EQUAL, skip_if_equal, skip_if_other, value))
    return tests
