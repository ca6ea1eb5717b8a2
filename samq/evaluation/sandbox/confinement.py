"""Taking from this process, for good, what generated code has no business with: Linux's seccomp and Landlock.

Neither needs root, a container or a namespace, and neither can be undone. Only the standard library is imported: this runs
in the child that runs the code (`child.py`), which sees no other packages.

- seccomp forbids sockets, except pairs that are connected to each other (asyncio needs one). It forbids new processes and
  programs (threads are allowed), signals, and what only an administrator does. A forbidden call fails with "Operation not
  permitted".
- Landlock: files are written in one folder only, and read there and in Python's own folders. It does not cover permissions,
  times and attributes, nor truncating before Linux 6.2. seccomp forbids what changes those by path, in the folder as well.

No library does the same job. libseccomp 2.5 (behind pyseccomp) does not know the calls since Linux 6.13 that change
attributes. The packages for Landlock are pre-releases of ten times this size. Bubblewrap must be installed first, and needs
user namespaces, which containers and Ubuntu 24.04 refuse. It leaves processes and attributes to a filter like this.
"""

import ctypes
import os
import platform
import resource
import sys
from collections.abc import Sequence

# name, number on x86-64, number on arm64 (from the kernel's headers; a dash: this machine has no such call)
_FORBIDDEN = """
socket 41 198 / connect 42 203 / bind 49 200 / listen 50 201 / accept 43 202 / accept4 288 242
sendmsg 46 211 / sendmmsg 307 269 / truncate 76 45 / io_uring_setup 425 425 / open_by_handle_at 304 265
fork 57 - / vfork 58 - / execve 59 221 / execveat 322 281
kill 62 129 / tkill 200 130 / tgkill 234 131 / rt_sigqueueinfo 129 138 / rt_tgsigqueueinfo 297 240
pidfd_open 434 434 / pidfd_getfd 438 438 / pidfd_send_signal 424 424
ptrace 101 117 / process_vm_readv 310 270 / process_vm_writev 311 271 / perf_event_open 298 241
bpf 321 280 / userfaultfd 323 282 / add_key 248 217 / request_key 249 218 / keyctl 250 219
shmget 29 194 / msgget 68 186 / semget 64 190 / mq_open 240 180
setrlimit 160 164 / prlimit64 302 261 / setpriority 141 140 / ioprio_set 251 30 / sched_setscheduler 144 119
chmod 90 - / fchmod 91 52 / fchmodat 268 53 / fchmodat2 452 452
chown 92 - / fchown 93 55 / lchown 94 - / fchownat 260 54
setxattr 188 5 / lsetxattr 189 6 / fsetxattr 190 7 / setxattrat 463 463
removexattr 197 14 / lremovexattr 198 15 / fremovexattr 199 16 / removexattrat 466 466 / file_setattr 469 469
utime 132 - / utimes 235 - / futimesat 261 - / utimensat 280 88
unshare 272 97 / setns 308 268 / chroot 161 51 / pivot_root 155 41 / mount 165 40 / umount2 166 39
move_mount 429 429 / open_tree 428 428 / fsopen 430 430 / mount_setattr 442 442 / swapon 167 224 / swapoff 168 225
init_module 175 105 / finit_module 313 273 / delete_module 176 106 / kexec_load 246 104 / kexec_file_load 320 294
reboot 169 142 / sethostname 170 161 / setdomainname 171 162 / acct 163 89 / quotactl 179 60 / syslog 103 116
settimeofday 164 170 / clock_settime 227 112 / adjtimex 159 171 / clock_adjtime 305 266 / iopl 172 - / ioperm 173 -
"""
_SOMETIMES_ALLOWED = "clone 56 220 / socketpair 53 199 / sendto 44 206 / open 2 - / openat 257 56"
_NOT_THERE = "clone3 435 435 / openat2 437 437"  # a filter cannot read their flags; the C library does without them
_MACHINES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}  # column of the tables, AUDIT_ARCH_...
_X32_CALLS = 0x40000000  # x86-64 knows every call by a second number, for the x32 ABI
_CLONE_THREAD, _AF_UNIX = 0x00010000, 1
_EPERM, _ENOSYS = 1, 38

# linux/bpf_common.h: load a word of the call's description; keep these bits; jump if equal, not below, any bit set; return
_LOAD, _AND, _IF_EQUAL, _IF_NOT_BELOW, _IF_ANY_BIT, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_CALL_NUMBER, _CALL_MACHINE = 0, 4  # offsets in struct seccomp_data
_ARGUMENT = range(16, 64, 8)  # of their lower halves; the upper ones are 4 bytes further
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_PERMIT, _REFUSE, _HIDE = ((_RETURN, 0, 0, result) for result in (_ALLOW, _FAIL | _EPERM, _FAIL | _ENOSYS))
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _FILTER_MODE, _SIGKILL = 1, 22, 38, 2, 9

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # Landlock's calls, the same numbers everywhere
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # by Landlock's version; 16 since the fifth
_READ = 0b1101  # execute, read a file, list a folder
_READ_FILE = 0b0101


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction)))


class _PathRule(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("rights", ctypes.c_uint64), ("folder", ctypes.c_int32))


def confine(folder: str) -> list[str]:
    """Confine this process to `folder`, and return what this system does not allow to be confined; empty: nothing."""
    if sys.platform != "linux":
        return [f"{sys.platform} has neither seccomp nor Landlock", *_limit_processes()]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL)  # when the parent dies
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return [f"no new privileges cannot be forbidden ({_reason()})", *_limit_processes()]
    files = _confine_files(libc, folder)
    calls = _confine_calls(libc)
    return [*files, *calls, *(_limit_processes() if calls else [])]


def _limit_processes() -> list[str]:
    """Instead of seccomp: Linux spares root this limit, and counts other users' threads as processes."""
    try:
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    except (ValueError, OSError) as error:
        return [f"RLIMIT_NPROC: {error}"]
    return []


def _confine_files(libc: ctypes.CDLL, folder: str) -> list[str]:
    version = libc.syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return [f"files: this kernel has no Landlock ({_reason()})"]
    every_right = (1 << _FILE_RIGHTS.get(version, 16)) - 1
    ruleset = libc.syscall(_CREATE_RULESET, ctypes.byref(ctypes.c_uint64(every_right)), 8, 0)
    if ruleset < 0:
        return [f"files: Landlock refuses ({_reason()})"]
    for path, rights in ((folder, every_right), *((path, _READ) for path in _python_folders())):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rights = rights if os.path.isdir(path) else rights & _READ_FILE
        refused = libc.syscall(_ADD_RULE, ruleset, 1, ctypes.byref(_PathRule(rights, place)), 0)
        os.close(place)
        if refused:
            return [f"files: Landlock refuses {path} ({_reason()})"]
    refused = libc.syscall(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
    return [f"files: Landlock refuses ({_reason()})"] if refused else []


def _python_folders() -> Sequence[str]:
    """Where the standard library and the libraries that it loads lie."""
    folders = [os.path.dirname(os.__file__), os.path.join(sys.base_prefix, "lib")]
    folders += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/dev/null", "/dev/urandom"]
    return [path for path in folders if os.path.exists(path)]


def _confine_calls(libc: ctypes.CDLL) -> list[str]:
    without_it = "network, processes, and permissions and lengths of files"
    if platform.machine() not in _MACHINES:
        return [f"{without_it}: the calls of {platform.machine()} are not known here"]
    instructions = [_Instruction(*line) for line in _filter(platform.machine())]
    program = _Program(len(instructions), (_Instruction * len(instructions))(*instructions))
    if libc.prctl(_PR_SET_SECCOMP, _FILTER_MODE, ctypes.byref(program), 0, 0):
        return [f"{without_it}: seccomp refuses ({_reason()})"]
    return []


def _filter(machine: str) -> list[tuple[int, int, int, int]]:
    """The filter, as (code, instructions to skip if true, if false, operand); see linux/seccomp.h."""
    column, architecture = _MACHINES[machine]
    lines = [
        (_LOAD, 0, 0, _CALL_MACHINE),
        (_IF_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _CALL_NUMBER),
        (_IF_NOT_BELOW, 0, 1, _X32_CALLS),
        _REFUSE,
    ]
    decisions = {number: [_HIDE] for _, number in _numbers(_NOT_THERE, column)}
    decisions |= {number: [_REFUSE] for _, number in _numbers(_FORBIDDEN, column)}
    decisions |= {number: _decision(name) for name, number in _numbers(_SOMETIMES_ALLOWED, column)}
    for number, decision in decisions.items():
        lines += [(_IF_EQUAL, 0, len(decision), number), *decision]
    return [*lines, _PERMIT]


def _numbers(table: str, column: int) -> list[tuple[str, int]]:
    calls = [call.split() for call in table.strip().replace("\n", " / ").split(" / ")]
    return [(call[0], int(call[column])) for call in calls if call[column] != "-"]


def _decision(name: str) -> list[tuple[int, int, int, int]]:
    """What decides, by its arguments, whether this call is allowed."""
    if name == "clone":  # a thread
        return [(_LOAD, 0, 0, _ARGUMENT[0]), (_IF_ANY_BIT, 0, 1, _CLONE_THREAD), _PERMIT, _REFUSE]
    if name == "socketpair":  # of this machine's own kind; asking for another makes Linux load its driver
        return [(_LOAD, 0, 0, _ARGUMENT[0]), (_IF_EQUAL, 0, 1, _AF_UNIX), _PERMIT, _REFUSE]
    if name == "sendto":  # without an address, which is how the C library sends to the other end of a pair
        address = _ARGUMENT[4]
        lower, upper = (_LOAD, 0, 0, address), (_LOAD, 0, 0, address + 4)
        return [lower, (_IF_EQUAL, 0, 3, 0), upper, (_IF_EQUAL, 0, 1, 0), _PERMIT, _REFUSE]
    # `open` may not empty a file without asking for the right to write: Landlock before Linux 6.2 looks at that right only.
    # Nor may it use the access mode 3, which asks for no right at all.
    return [
        (_LOAD, 0, 0, _ARGUMENT[2 if name == "openat" else 1]),
        (_AND, 0, 0, os.O_TRUNC | os.O_ACCMODE),
        (_IF_EQUAL, 1, 0, os.O_TRUNC | os.O_RDONLY),
        (_IF_EQUAL, 0, 1, os.O_TRUNC | os.O_ACCMODE),
        _REFUSE,
        _PERMIT,
    ]


def _reason() -> str:
    return os.strerror(ctypes.get_errno())
