"""The set-up a newcomer meets: the run script, the Makefile, the extras and the constraints."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
RUN = REPO / "run"
COMMANDS = ["setup", "demo", "test", "parity", "lint", "bench", "h200-env", "h200", "interpret"]
COMMANDS += ["train", "infer", "evaluate", "serve", "convert", "describe", "help"]
# How a stand-in Python answers `python -m venv FOLDER`: it copies itself to where .venv's python would be.
FAKE_VENV = """'-m venv'*) for last; do :; done; rm -rf "$last"; mkdir -p "$last/bin"; cp "$0" "$last/bin/python";;\n"""
EXTRAS = {"cuda12", "cuda13", "test", "browser", "parity", "serve", "eval", "data", "tb"}


def run(
    *arguments: str, cwd: Path = REPO, script: Path = RUN, **env: str
) -> subprocess.CompletedProcess[str]:
    # Without the caller's own DSV3_VENV: these tests must never touch a real environment.
    clean = {key: value for key, value in os.environ.items() if not key.startswith("DSV3_")}
    return subprocess.run(
        [str(script), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**clean, **env},
        timeout=60,
        check=False,
    )


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of what the script needs, with no environment in it."""
    folder = tmp_path / "a clone"
    (folder / "constraints").mkdir(parents=True)
    for name in ("run", "pyproject.toml", "constraints/py311.txt", "constraints/py312.txt"):
        shutil.copy2(REPO / name, folder / name)
    return folder


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A stand-in Python 3.11 that makes environments of itself and notes what it is asked in `calls`."""
    fake = tmp_path / "python3"
    fake.write_text(
        f'#!/bin/sh\necho "$*" >>"{tmp_path}/calls"\n'
        'case "$*" in\n'
        f"{FAKE_VENV}"
        f"""*'pip install'*) [ ! -e "{tmp_path}/disk-full" ] || {{ echo "ERROR: No space left"; exit 1; }};;\n"""
        "*py311.txt*) echo py311.txt;;\n"
        "--version) echo Python 3.11.9;;\n"
        "esac\n",
        encoding="utf-8",
    )
    fake.chmod(0o755)
    return fake


@pytest.fixture
def graphics_card(tmp_path: Path) -> Callable[[str], str]:
    """A PATH whose nvidia-smi reports a driver of the given CUDA version."""

    def path(version: str) -> str:
        smi = tmp_path / "bin" / "nvidia-smi"
        smi.parent.mkdir()
        header = f"| NVIDIA-SMI 580.1  Driver Version: 580.1  CUDA Version: {version} |"
        smi.write_text(
            f'#!/bin/sh\ncase "$*" in "") echo "{header}";; *) echo "NVIDIA H100";; esac\n', encoding="utf-8"
        )
        smi.chmod(0o755)
        return f"{smi.parent}:{os.environ['PATH']}"

    return path


def metadata() -> dict:
    return tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))


def words(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~ ;]", line)[0].lower() for line in requirements}


@pytest.mark.parametrize("shell", ["sh", "dash", "bash --posix"])
def test_run_parses_in_every_shell(shell: str) -> None:
    if shutil.which(shell.split()[0]) is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run([*shell.split(), "-n", str(RUN)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_run_is_an_executable_posix_script() -> None:
    assert RUN.read_text(encoding="utf-8").startswith("#!/bin/sh\n")
    assert os.access(RUN, os.X_OK)


def test_help_names_every_command_and_extra() -> None:
    done = run("help")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")] == COMMANDS
    assert set(done.stdout.splitlines()[-1].removeprefix("extras: ").split()) == EXTRAS


def test_makefile_has_the_same_names() -> None:
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^COMMANDS := (.*)$", makefile, re.MULTILINE).group(1).split() == COMMANDS


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nonsense"], "nonsense"),
        (["setup", "--extras", "cuda14"], "cuda14"),
        (["setup", "--extras"], "--extras"),
        (["setup", "--cpu"], "--cpu"),
        (["convert", "from_gguf"], "from_gguf"),
        (["convert"], "from_hf"),
        (["setup", "--extras", "cuda12,cuda13"], "exclude each other"),
    ],
)
def test_wrong_arguments_exit_2_and_make_nothing(clone: Path, arguments: list[str], named: str) -> None:
    done = run(*arguments, cwd=clone, script=clone / "run")
    assert done.returncode == 2
    assert "error: " in done.stderr and named in done.stderr
    assert not (clone / ".venv").exists()


def test_a_python_that_is_too_old_is_named(clone: Path, tmp_path: Path) -> None:
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    old.chmod(0o755)
    done = run("setup", cwd=clone, script=clone / "run", DSV3_PYTHON=str(old))
    assert done.returncode == 2
    assert "Python 3.11 or later is needed" in done.stderr and str(old) in done.stderr


def test_a_finished_setup_is_left_alone_and_a_changed_one_is_not(
    clone: Path, python: Path, tmp_path: Path
) -> None:
    calls = tmp_path / "calls"

    def setup(*arguments: str) -> list[str]:
        """The pip installs of one run of setup."""
        calls.write_text("", encoding="utf-8")
        done = run("setup", *arguments, cwd=clone, script=clone / "run", DSV3_PYTHON=str(python))
        assert done.returncode == 0, done.stderr
        return [line for line in calls.read_text(encoding="utf-8").splitlines() if "pip install" in line]

    first = setup("--extras", "test")
    assert len(first) == 1
    assert "constraints/py311.txt" in first[0] and first[0].endswith("a clone[test]")
    assert setup() == []
    assert setup("--extras", "test") == []
    assert setup("--extras", "data")[0].endswith("a clone[data,test]"), "extras add up"
    extras = (clone / ".venv" / ".setup").read_text(encoding="utf-8").splitlines()[1]
    (clone / ".venv" / ".setup").unlink()
    (clone / ".venv" / ".setup.pending").write_text(f"interrupted\n{extras}\n", encoding="utf-8")
    (clone / ".venv" / "half-a-package").touch()
    assert setup()[0].endswith("a clone[data,test]"), "an interrupted set-up is redone with what it had"
    assert not (clone / ".venv" / "half-a-package").exists(), "and from an empty folder"
    (clone / "constraints" / "py312.txt").write_text("jax==0.12.0\n", encoding="utf-8")
    assert len(setup()) == 1, "changed constraints reach the environment"
    assert setup() == []


def test_a_failed_install_says_so_and_is_tried_again(clone: Path, python: Path, tmp_path: Path) -> None:
    (tmp_path / "disk-full").touch()
    for _ in range(2):
        done = run("setup", "--extras", "serve", cwd=clone, script=clone / "run", DSV3_PYTHON=str(python))
        assert done.returncode == 1
        assert "No space left" in done.stderr and "setup.log" in done.stderr
        assert not (clone / ".venv" / ".setup").exists()
    (tmp_path / "disk-full").unlink()
    done = run("setup", cwd=clone, script=clone / "run", DSV3_PYTHON=str(python))
    assert done.returncode == 0
    assert "serve" not in (tmp_path / "calls").read_text(encoding="utf-8").splitlines()[-2], (
        "asked once, not kept"
    )


@pytest.mark.parametrize(("version", "extra"), [("13.1", "cuda13"), ("12.8", "cuda12")])
def test_gpu_picks_the_build_for_the_driver(
    clone: Path, python: Path, graphics_card: Callable[[str], str], version: str, extra: str
) -> None:
    done = run(
        "setup",
        "--gpu",
        cwd=clone,
        script=clone / "run",
        DSV3_PYTHON=str(python),
        PATH=graphics_card(version),
    )
    assert done.returncode == 0, done.stderr
    assert (clone / ".venv" / ".setup").read_text(encoding="utf-8").splitlines()[1] == extra


def test_an_unused_gpu_is_mentioned_in_one_line(
    clone: Path, python: Path, graphics_card: Callable[[str], str]
) -> None:
    path = graphics_card("13.1")
    done = run("setup", cwd=clone, script=clone / "run", DSV3_PYTHON=str(python), PATH=path)
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and "NVIDIA H100" in notes[0] and "./run setup --gpu" in notes[0]
    (clone / ".venv/lib/python3.11/site-packages/jax_cuda13_plugin").mkdir(parents=True)
    done = run("setup", cwd=clone, script=clone / "run", DSV3_PYTHON=str(python), PATH=path)
    assert "note: " not in done.stderr


def test_gpu_without_a_gpu_exits_2(clone: Path, graphics_card: Callable[[str], str]) -> None:
    path = graphics_card("none")
    done = run("setup", "--gpu", cwd=clone, script=clone / "run", PATH=path)
    assert done.returncode == 2 and "--gpu" in done.stderr
    assert not (clone / ".venv").exists()


def test_the_extras_exist_and_the_default_install_has_no_torch() -> None:
    project = metadata()["project"]
    assert set(project["optional-dependencies"]) == EXTRAS
    assert not words(project["dependencies"]) & {"torch", "transformers"}
    users_of_torch = {
        name
        for name, lines in project["optional-dependencies"].items()
        if words(lines) & {"torch", "transformers"}
    }
    assert users_of_torch == {"parity"}
    assert "torch==2.13.*" in project["optional-dependencies"]["parity"]


def test_no_exact_flax_in_pyproject() -> None:
    requirements = [line for line in metadata()["project"]["dependencies"] if line.startswith("flax")]
    assert len(requirements) == 1 and "==" not in requirements[0]


@pytest.mark.parametrize("name", ["py311.txt", "py312.txt"])
def test_constraints_are_names_and_versions_alone(name: str) -> None:
    lines = (REPO / "constraints" / name).read_text(encoding="utf-8").splitlines()
    assert [
        line for line in lines if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][A-Za-z0-9.]*", line)
    ] == []
    pinned = words(lines)
    assert len(pinned) == len(lines), "a name is pinned twice"
    project = metadata()["project"]
    needed = words(project["dependencies"])
    for extra, requirements in project["optional-dependencies"].items():
        needed |= set() if extra.startswith("cuda") else words(requirements)
    needed.discard(project["name"])  # an extra that includes another
    missing = {name.replace("_", "-") for name in needed} - {name.replace("_", "-") for name in pinned}
    assert missing == set(), "pyproject.toml asks for something that constraints/ does not pin"


def test_every_conversion_is_a_command() -> None:
    tools = sorted(
        file.stem for file in (REPO / "convert").glob("*.py") if "\n    command(" in file.read_text()
    )
    assert len(tools) >= 9
    (listed,) = re.findall(r"^    ([a-z_ |]+)\) shift ;;$", RUN.read_text(), re.M)
    assert sorted(listed.split(" | ")) == tools
    for tool in tools:
        assert re.search(rf"^  convert TOOL .*\b{tool}\b", RUN.read_text(), re.M), tool
