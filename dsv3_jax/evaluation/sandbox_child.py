"""Started by `sandbox.py` as a program of its own: judges one solution. Standard library only; imports nothing of ours.

Two processes. The judge reads the solution, forks the process that runs it, and only then reads the tests: they and the
word that means "passed" are never in the solution's memory. The judge runs the tests; what they call is a proxy that
sends plain values to the solution and gets plain values back, so a result cannot bring an `__eq__` of its own. To pass,
a solution must give right answers to questions that it cannot see.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import itertools
import json
import os
import resource
import signal
import sys
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
MOST_ANSWER = 1 << 20  # bytes of one answer
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 0x4000, 0x40000
SEEN = "other processes can be seen"
AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_SETATTR = 0x8000, 1, 442


def encode(value: Any) -> Any:
    """A plain value as JSON with its type. Raises TypeError for what is no literal of Python."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, (int, float, complex)):
        number: Any = int if isinstance(value, int) else float if isinstance(value, float) else complex
        return [number.__name__, repr(number(value))]
    if isinstance(value, str):
        return str(value)
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", bytes(value).hex()]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, [encode(item) for item in value]]
    if isinstance(value, dict):
        return ["dict", [[encode(key), encode(item)] for key, item in value.items()]]
    raise TypeError(
        f"{type(value).__name__} is no plain value (number, string, list, tuple, set, dictionary)"
    )


def decode(value: Any) -> Any:
    """The value of `encode`'s JSON, of built-in types only."""
    if value is None or isinstance(value, (bool, str)):
        return value
    kind, content = value
    if kind in ("int", "float", "complex"):
        return {"int": int, "float": float, "complex": complex}[kind](content)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "dict":
        return {decode(key): decode(item) for key, item in content}
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](map(decode, content))


def hold_library() -> list[int]:
    """Open the standard library's folders and import through them: the next user may not be let into them by name."""
    held = []
    for at, old in enumerate(sys.path):
        if not os.path.isdir(old):
            continue
        held.append(os.open(old, os.O_RDONLY | os.O_DIRECTORY))
        new = f"/proc/self/fd/{held[-1]}"
        sys.path[at] = new
        for module in list(sys.modules.values()):
            own = getattr(module, "__path__", None)
            if isinstance(own, list):
                own[:] = [
                    new + path.removeprefix(old) if path.startswith(old + "/") else path for path in own
                ]
    sys.path_importer_cache.clear()
    return held


def lose_rights(uid: int | None) -> list[str]:
    """Another user where we are root, then namespaces; what could not be had."""
    missing = []
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    user, group = os.geteuid(), os.getegid()
    LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # no other process of the user may look into the judge
    if LIBC.unshare(NEWUSER | NEWNS | NEWPID | NEWNET | NEWIPC) != 0:
        return ["no network of its own", "no process ids of its own", "files can be written", SEEN]
    # The judge's capabilities, which the solution gives up, keep it closed from here on; its own /proc/self is wanted.
    LIBC.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
    try:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),  # without a map files cannot be made in the scratch space
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except (
        OSError
    ):  # namespaces without rights in them, as AppArmor gives: no capability keeps the judge closed
        LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        return ["files can be written", "files cannot be made in the scratch space", SEEN]
    root = b"/"
    ok = LIBC.mount(None, root, None, MS_REC | MS_PRIVATE, None) == 0
    ok = ok and LIBC.mount(b"scratch", os.fsencode(os.getcwd()), b"tmpfs", 0, b"size=64m,mode=0777") == 0
    scratch = os.getcwd()
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    ok = ok and LIBC.syscall(MOUNT_SETATTR, -100, root, AT_RECURSIVE, attributes, 32) == 0
    attributes = (ctypes.c_uint64 * 4)(0, MOUNT_ATTR_RDONLY, 0, 0)
    ok = ok and LIBC.syscall(MOUNT_SETATTR, -100, os.fsencode(scratch), 0, attributes, 32) == 0
    if not ok:
        missing.append("files can be written")
    os.chdir(scratch)
    return missing


def own_processes() -> list[str]:
    """Let /proc show the process ids of this namespace alone, for this process alone; what could not be had."""
    flags = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC
    hidden = os.getpid() == 1 and LIBC.unshare(NEWNS) == 0
    return [] if hidden and LIBC.mount(b"proc", b"/proc", b"proc", flags, None) == 0 else [SEEN]


def run_solution(job: dict[str, Any], requests: int, answers: int, held: list[int]) -> None:
    """The process of the solution: limits, then its text, then calls until there is no judge."""
    os.setsid()  # so that signals to its group do not reach the judge
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    missing = own_processes() if sys.platform == "linux" else []
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    kept = sorted((2, requests, answers, *held, 4096))
    for low, high in itertools.pairwise(kept):
        os.closerange(low + 1, high)
    seconds = int(job["seconds"]) + 1
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: job["memory"],
        resource.RLIMIT_FSIZE: job["file"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    if hasattr(resource, "RLIMIT_NPROC"):
        limits[resource.RLIMIT_NPROC] = 1  # the user has this process already: no other can be made
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if sys.platform == "linux" and LIBC.capset(header, data) != 0:
        os._exit(97)
    space: dict[str, Any] = {"__name__": "solution"}
    with open(requests, "rb") as asked, open(answers, "wb", buffering=0) as told:

        def tell(value: Any) -> None:
            told.write(json.dumps(value).encode() + b"\n")

        tell(missing)
        if not asked.readline():  # nothing runs before whoever started the judge can end this process
            os._exit(0)
        try:
            exec(compile(job["program"], "<solution>", "exec"), space)
            function = space[job["entry_point"]]
        except BaseException as error:
            tell(["error", type(error).__name__, str(error)[:200]])
            os._exit(0)
        tell(["ready"])
        for line in asked:
            try:
                arguments, named = (decode(part) for part in json.loads(line))
                tell(["value", encode(function(*arguments, **named))])
            except BaseException as error:
                tell(["error", type(error).__name__, str(error)[:200]])
    os._exit(0)


class Ended(BaseException):
    """The solution's process is gone, or said what is no answer. No test can catch it by `except Exception`."""


class Proxy:
    """Stands for the solution's function in the tests."""

    def __init__(self, requests: int, answers: int) -> None:
        self._requests, self._answers = open(requests, "wb", buffering=0), open(answers, "rb")

    def begin(self) -> None:
        """Let the solution's text run."""
        with contextlib.suppress(BrokenPipeError):  # told by the missing answer
            self._requests.write(b"\n")

    def prepared(self) -> list[str]:
        """What the solution's process could not have, told before the solution's text runs."""
        missing: list[str] = json.loads(self._answers.readline(MOST_ANSWER))
        return missing

    def read(self) -> Any:
        """One answer of the solution."""
        line = self._answers.readline(MOST_ANSWER)
        if not line.endswith(b"\n"):
            raise Ended("the program ended" if len(line) < MOST_ANSWER else "an answer is too long")
        try:
            kind, *rest = json.loads(line)
            if kind == "error":
                name, message = map(str, rest)
            elif kind == "value":
                return decode(rest[0])
            elif kind == "ready":
                return None
            else:
                raise ValueError(kind)
        except Exception as error:  # whatever it is, it is not the tests' own
            raise Ended(f"what came is no answer ({type(error).__name__})") from None
        made = getattr(builtins, name, None)
        if not (isinstance(made, type) and issubclass(made, Exception)):
            made = RuntimeError
        try:
            raised = made(message)
        except TypeError:  # such as UnicodeDecodeError, which wants more than a message
            raised = RuntimeError(f"{name}: {message}")
        raise raised

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        try:
            self._requests.write(json.dumps([encode(arguments), encode(named)]).encode() + b"\n")
        except BrokenPipeError:
            raise Ended("the program ended") from None
        return self.read()


def judge(job: dict[str, Any], proxy: Proxy) -> None:
    """Run the tests; returns only if all of them passed."""
    space: dict[str, Any] = {"__name__": "tests"}
    # Helpers of the prompt are the tests' too; the function itself is the proxy.
    for text in (job["prompt"] + "\n    pass\n", job["prompt"]):
        with contextlib.suppress(Exception):
            exec(compile(text, "<prompt>", "exec"), space)
            break
    space[job["entry_point"]] = proxy
    exec(compile(job["test"], "<tests>", "exec"), space)
    if callable(space.get("check")):
        space["check"](proxy)


def main() -> None:
    """Two lines on stdin: the solution with its limits, then the tests. Lines on stdout: what happened."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    job = json.loads(sys.stdin.buffer.readline())
    held = [] if job["uid"] is None or sys.platform != "linux" else hold_library()
    missing = lose_rights(job["uid"]) if sys.platform == "linux" else ["no namespaces on this system"]
    if sys.platform == "linux":  # after the change of user, which would undo it
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != job["parent"]:  # gone before
            os._exit(96)
    ask_read, ask_write = os.pipe()
    tell_read, tell_write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            out.close()
            run_solution(job, ask_read, tell_write, held)
        finally:
            os._exit(98)
    os.close(ask_read)
    os.close(tell_write)
    resource.setrlimit(
        resource.RLIMIT_AS, (job["memory"], job["memory"])
    )  # answers take the judge's memory too
    proxy = Proxy(ask_write, tell_read)
    out.write(json.dumps(["started", child, [*missing, *proxy.prepared()]]) + "\n")
    tests = json.loads(sys.stdin.buffer.readline())
    verdict: list[Any]
    try:
        proxy.begin()
        proxy.read()
        judge({**job, **tests}, proxy)
        verdict = ["passed", tests["word"]]
    except AssertionError as error:
        verdict = ["failed", f"a test does not hold: {str(error)[:200]}"]
    except Ended as error:
        verdict = ["ended", str(error)]
    except BaseException as error:
        verdict = ["failed", f"{type(error).__name__}: {str(error)[:200]}"]
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    out.write(json.dumps(verdict) + "\n")
    out.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
