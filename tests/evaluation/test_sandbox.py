"""Programs that mean harm are not passed, and harm nothing."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from dsv3_jax.errors import ConfigError
from dsv3_jax.evaluation.sandbox import Limits, Program, check_sandbox, run_program, run_programs

TEST = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate([3]) == [3, 3]\n"
GOOD = "def double(x):\n    return x + x\n"
LIMITS = Limits(seconds=4.0, memory=1 << 29, file=1 << 20)


def program(text: str, test: str = TEST) -> Program:
    return Program(text, "double", test)


@pytest.fixture(scope="module", autouse=True)
def _works() -> None:
    check_sandbox()


HOSTILE = {
    "exit": "import sys\nsys.exit(0)\n",
    "hard exit": "import os\nos._exit(0)\n",
    "exit when called": "import os\ndef double(x):\n    os._exit(0)\n",
    "endless": "while True: pass\n",
    "asleep": "import time\ntime.sleep(100)\n",
    "fork bomb": "import os\nwhile True: os.fork()\n",
    "threads": "import threading\ndef double(x):\n    threading.Thread(target=print).start()\n    return x\n",
    "memory": "x = 'a' * (1 << 31)\n",
    "memory when called": "def double(x):\n    y = []\n    while True: y.append(bytearray(1 << 24))\n",
    "endless output": "import sys\nwhile True: sys.stdout.write('x' * 100000)\n",
    "endless answer": "def double(x):\n    return 'x' * (1 << 22)\n",
    "disk": "f = open('big', 'wb')\nwhile True: f.write(b'x' * (1 << 20)); f.flush()\n",
    "equal to all": "class A(int):\n    def __eq__(self, o): return True\ndef double(x):\n    return A(0)\n",
    "not plain": "class A:\n    def __eq__(self, o): return True\ndef double(x):\n    return A()\n",
    "patches": "import builtins\nbuiltins.check = lambda c: None\ncheck = lambda c: None\n"
    "builtins.AssertionError = SystemExit\ndef double(x):\n    return 0\n",
    "prints a pass": "print('passed')\nimport os\nfor fd in range(64):\n"
    '    try: os.write(fd, b\'["passed", ""]\\n\')\n    except OSError: pass\ndef double(x):\n    return 0\n',
    "forged answers": "import os\nfor fd in range(3, 64):\n"
    '    try: os.write(fd, b\'["ready"]\\n["value", true]\\n\' * 9)\n'
    "    except OSError: pass\ndef double(x):\n    return 0\n",
    "kills its parent": "import os, signal\nos.kill(os.getppid() or -1, signal.SIGKILL)\n"
    + "while True: pass\n",
    "signals": "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
    "    except (OSError, ValueError): pass\nwhile True: pass\n",
    "debugs its parent": "import os\nfor p in range(1, 5000):\n    try: open(f'/proc/{p}/mem', 'r+b')\n"
    "    except OSError: pass\n",
    "syntax": "def double(x) return x\n",
    "no function": "x = 1\n",
    "no text": "def double(x):\n    raise ValueError('\\ud800')\n",
    "deep": "def double(x):\n    y = []\n    for _ in range(100000): y = [y]\n    return y\n",
}


def test_right_programs_pass() -> None:
    wide = "def double(x):\n    return {'a': (1, 2.5, None), 3: {4}, 'inf': float('inf'), b'x': frozenset([1j])}\n"
    test = wide.replace("double(x)", "check(c)").replace("return", "assert c(0) ==")
    plain = "assert double(2) == 4\n"
    raises = "try:\n    double(None)\nexcept TypeError:\n    pass\nelse:\n    assert False\n"
    programs = [program(GOOD), program(wide, test), program(GOOD, plain), program(GOOD, raises)]
    assert [one.outcome for one in run_programs(programs, LIMITS)] == ["passed"] * 4


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_do_not_pass(name: str) -> None:
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    limits = (
        Limits(1.5, LIMITS.memory, LIMITS.file)
        if name in ("endless", "asleep", "signals", "endless output", "debugs its parent", "kills its parent")
        else LIMITS
    )
    begun = time.monotonic()
    verdict = run_program(program(HOSTILE[name]), limits)
    assert not verdict.passed, verdict
    assert verdict.outcome in ("failed", "ended", "timeout") and verdict.reason.encode()
    assert time.monotonic() - begun < limits.seconds + 3
    assert threading.active_count() == threads and len(os.listdir("/proc/self/fd")) == files
    assert not left()


def left() -> list[str]:
    """Folders of programs, and processes that judge or run one."""
    found = [str(path) for path in Path(tempfile.gettempdir()).glob("dsv3-code-*")]
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            mine = int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid()
        except OSError:
            continue
        if mine and any(word.endswith(b"sandbox_child.py") for word in words):
            found.append(folder.name)
    return found


def named(name: str) -> list[int]:
    """Processes that call themselves so."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "comm").read_text().strip() == name:
                found.append(int(folder.name))
    return found


STAYS = """
import ctypes, os, time
libc = ctypes.CDLL(None)
libc.prctl(15, b"NAME", 0, 0, 0)
libc.prctl(1, 0, 0, 0, 0)  # no signal at its parent's end
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("target", ["0", "os.getppid() or 0"])
def test_nothing_is_left_of_a_program_that_kills_its_judge(target: str) -> None:
    name = f"left-{secrets.token_hex(4)}"
    text = STAYS.replace("NAME", name) + f"libc.kill({target}, 9)\nlibc.setsid()\ntime.sleep(30)\n"
    assert not run_program(program(text), Limits(1.5)).passed
    until = time.monotonic() + 5  # what is killed is a zombie for a moment; the program would sleep longer
    while named(name) and time.monotonic() < until:
        time.sleep(0.05)
    assert not named(name)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_programs_end_with_a_killed_evaluation() -> None:
    name = f"left-{secrets.token_hex(4)}"
    text = f'import ctypes, time\nctypes.CDLL(None).prctl(15, b"{name}", 0, 0, 0)\ntime.sleep(30)\n'
    command = (
        "from dsv3_jax.evaluation.sandbox import *\n"
        f"run_program(Program({text!r}, 'double', 'assert False'), Limits(30))\n"
    )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)
        own = {**os.environ, "TMPDIR": folder}  # the program's folder stays: nobody is left to remove it
        with subprocess.Popen([sys.executable, "-c", command], env=own) as process:
            until = time.monotonic() + 20
            while not named(name) and time.monotonic() < until:
                time.sleep(0.05)
            running = named(name)
            process.kill()
    until = time.monotonic() + 5
    while named(name) and time.monotonic() < until:
        time.sleep(0.05)
    assert running and not named(name)


ANSWERS = """
import os, sys
def told():
    frame = sys._getframe()
    while "answers" not in frame.f_locals: frame = frame.f_back
    return frame.f_locals["answers"]
pipe = told()
def double(x):
    os.write(pipe, ANSWER)
    os._exit(0)
"""


@pytest.mark.parametrize(
    "answer", [b'["value"]', b'["other", 1]', b'["value", ["int", Infinity]]', b"[" * 10000, b"\xff"]
)
def test_tests_cannot_take_what_is_no_answer_for_an_error(answer: bytes) -> None:
    test = "try:\n    double(1)\nexcept Exception:\n    pass\n"
    verdict = run_program(program(ANSWERS.replace("ANSWER", repr(answer + b"\n")), test), LIMITS)
    assert verdict.outcome == "ended" and "no answer" in verdict.reason


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_namespaces_without_rights_in_them_are_told() -> None:
    """As AppArmor gives them to ordinary users: made, but nothing may be mapped or mounted."""
    code = (
        "import builtins, json\nfrom dsv3_jax.evaluation import sandbox_child as child\nreal = open\n"
        "def refuse(path, *rest):\n"
        "    if 'map' in str(path): raise PermissionError(1, 'Operation not permitted')\n"
        "    return real(path, *rest)\n"
        "builtins.open = refuse\nprint(json.dumps(child.lose_rights(None)), child.LIBC.prctl(3, 0, 0, 0, 0))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    missing, dumpable = done.stdout.rsplit(" ", 1)
    assert "files can be written" in missing
    assert dumpable.strip() == "0"  # the judge stays closed


def test_a_root_that_is_the_only_user_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "chown", refuse)
    with pytest.raises(ConfigError, match="run as another user"):
        run_program(program(GOOD), LIMITS)
    assert not left()


def test_the_tests_are_not_in_the_programs_memory() -> None:
    """A program that could read the tests could answer them: it looks through all of its memory."""
    looks = """
import re
def double(x):
    memory, hits = open("/proc/self/mem", "rb", 0), 0
    for line in open("/proc/self/maps").read().splitlines():
        span, rights = line.split()[:2]
        low, high = (int(i, 16) for i in span.split("-"))
        if "r" in rights:
            try:
                memory.seek(low)
                hits += len(re.findall(rb"candidat[e]\\('xyzz[y]", memory.read(high - low)))
            except (OSError, ValueError, OverflowError):
                pass
    return hits > 0
"""
    unseen = "def check(candidate):\n    assert candidate('xyzzy') is False\n"
    assert run_program(program(looks, unseen), LIMITS).outcome == "passed"
    seen = looks + 'known = "candidate(\'xyzzy"\n'  # what it would look like
    assert run_program(program(seen, unseen), LIMITS).outcome == "failed"


def test_no_environment_no_files_no_network_no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_PARENT", "1")
    missing = check_sandbox()
    text = (
        "import os, socket\ndef double(x):\n"
        "    if x == 'environment': return 'SECRET_OF_THE_PARENT' in os.environ\n"
        "    if x == 'folder': return os.listdir('.')\n"
        "    if x == 'scratch': open('a', 'w').write('b'); return open('a').read()\n"
        "    if x == 'files': return sum(1 for fd in range(64) if alive(fd))\n"
        "    if x == 'fork':\n        try: os.fork()\n        except OSError: return True\n        return False\n"
        "    if x == 'network':\n        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "        try: s.connect(('127.0.0.1', 9)); return True\n        except OSError: return False\n"
        "    if x == 'pid': return os.getppid()\n"
        "    if x == 'processes': return sum(name.isdigit() for name in os.listdir('/proc'))\n"
        "    try: open(x, 'w').write('x'); return True\n    except OSError: return False\n"
        "def alive(fd):\n    try: os.fstat(fd); return True\n    except OSError: return False\n"
    )
    outside = tempfile.mkdtemp()
    os.chmod(outside, 0o777)  # the program's user could write here
    # Standard streams, two pipes, and for root the standard library's folders.
    most = 5 + 3 * (os.geteuid() == 0)
    asserts = [
        "c('environment') == False",
        "c('folder') == []",
        "c('scratch') == 'b'",
        f"c('files') <= {most}",
        "c('fork') == True",
    ]
    if not missing:
        asserts += [
            "c('network') == False",
            "c('pid') == 0",
            "c('processes') == 1",
            f"c({outside!r} + '/new') == False",
        ]
    test = "def check(c):\n" + "".join(f"    assert {line}, {line!r}\n" for line in asserts)
    verdict = run_program(program(text, test), LIMITS)
    assert verdict.passed, verdict
    if missing:
        pytest.skip(f"held without what this machine does not give: {', '.join(missing)}")


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_many_at_once_keep_their_verdicts() -> None:
    programs = [program(GOOD if at % 3 else HOSTILE["hard exit"]) for at in range(12)]
    verdicts = run_programs(programs, LIMITS, workers=4)
    assert [one.passed for one in verdicts] == [bool(at % 3) for at in range(12)]
