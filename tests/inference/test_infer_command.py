"""infer.py as a command: flags, exit codes, and a kill in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import infer
from convert import to_hf
from dsv3_jax.errors import ConfigError
from dsv3_jax.inference import Engine
from dsv3_jax.inference.batch import Job
from tests.inference import tiny

REPO = Path(__file__).resolve().parents[2]


def command(*flags: object) -> list[str]:
    return [sys.executable, str(REPO / "infer.py"), *map(str, flags)]


def run(*flags: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*flags), capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint", "d", "--prompt", "x", "--max-new-token", "3"], "--max-new-tokens"),
        (["--chekpoint", "d", "--prompt", "x"], "--checkpoint"),
        (["--checkpoint", "d", "--prompt", "x", "--temperature", "warm"], "--temperature"),
        (["--checkpoint", "d", "--prompt", "x", "--dtype", "float16"], "--dtype"),
    ],
)
def test_flags_that_cannot_be_read_exit_2_with_the_nearest(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["infer.py", *flags])
    with pytest.raises(SystemExit) as caught:
        infer.main()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "x"], "--checkpoint DIR is missing"),
        (["--checkpoint", "d"], "give --input FILE"),
        (["--checkpoint", "d", "--prompt", "x", "--input", "a.txt"], "give --input FILE"),
        (["--checkpoint", "d", "--input", "a.txt"], "go together"),
        (["--checkpoint", "d", "--prompt", "x", "--top-p", "0"], "--top-p is '0"),
        (["--checkpoint", "d", "--prompt", "x", "--temperature", "nan"], "--temperature is 'nan'"),
        (["--checkpoint", "d", "--prompt", "x", "--stop", "a", "--stop", ""], "--stop is"),
        (["--checkpoint", "d", "--prompt", "x", "--seed", "-1"], "--seed is '-1'"),
        (["--checkpoint", "d", "--prompt", "x", "--kernels", "fast"], "kernels: 'fast'"),
        (["--checkpoint", "/nowhere", "--prompt", "None"], "/nowhere: no such folder"),
        (["--checkpoint", "d", "--prompt", "x", "--mesh", "tensor=8"], "mesh: 'tensor=8' in 'tensor=8'"),
        (["--checkpoint", "d", "--prompt", "x", "--mesh", "expert"], "expected AXIS=DEVICES"),
        (["--checkpoint", "d", "--prompt", "x", "--mesh", "expert=0"], "mesh: 'expert=0'"),
        (["--checkpoint", "d", "--prompt", "x", "--mesh", "data=2,data=4"], "data is given twice"),
        (
            ["--checkpoint", "d", "--prompt", "x", "--mesh", "expert=3"],
            "= 3 devices; expected 8, as there are",
        ),
    ],
)
def test_flags_that_make_no_sense_are_named(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["infer.py", *flags])
    with pytest.raises(ConfigError) as caught:
        infer.main()
    assert message in str(caught.value)


def test_eight_devices_write_what_one_writes(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": "p" * (1 + 7 * at)}) + "\n" for at in range(5)))
    flags = ["infer.py", "--checkpoint", str(checkpoint), "--input", str(source), "--max-new-tokens", "6"]
    sizes: list[int] = []
    engine = Job.engine

    def noted(job: Job, *args: Any) -> Engine:
        made = engine(job, *args)
        sizes.append(made.options.rows)
        return made

    monkeypatch.setattr(Job, "engine", noted)
    for name, more in (
        ("one", ["--batch-size", "5"]),
        ("eight", ["--batch-size", "5", "--mesh", "data=2,expert=4"]),
    ):
        monkeypatch.setattr(sys, "argv", [*flags, *more, "--output", str(tmp_path / name)])
        assert infer.main() == 0
    assert sizes == [5, 8]
    assert (tmp_path / "eight").read_text() == (tmp_path / "one").read_text()


def test_a_killed_job_goes_on_and_gives_the_same_file(checkpoint: Path, tmp_path: Path) -> None:
    source, output, partial = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    rows = [{"prompt": "p" * (at % 20), "seed": at, "max_new_tokens": 200} for at in range(40)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{bad\n")
    flags = ["--checkpoint", checkpoint, "--input", source, "--batch-size", 4, "--temperature", 1]
    flags += ["--logprobs", 2, "--ignore-eos"]
    with subprocess.Popen(command(*flags, "--output", output), stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 300
        while not partial.is_file() or partial.read_bytes().count(b"\n") < 6:
            assert process.poll() is None and time.monotonic() < deadline, (
                process.stderr and process.stderr.read()
            )
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    done = partial.read_bytes().count(b"\n") - 1
    assert 5 <= done < 40 and not output.exists()
    second = run(*flags, "--output", output)
    assert second.returncode == 65, second.stderr
    assert f"{done} of 40 prompts are done" in second.stderr
    assert "line 41: not valid JSON" in second.stderr and "Traceback" not in second.stderr
    assert not partial.exists()
    whole = run(*flags, "--output", tmp_path / "whole.jsonl")
    assert whole.returncode == 65
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    refused = run(*flags, "--output", output)
    assert refused.returncode == 2 and refused.stderr.startswith("error: ") and "--force" in refused.stderr


def test_a_named_kernel_that_cannot_run_ends_with_the_reason(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--checkpoint", str(checkpoint), "--prompt", "x", "--max-new-tokens", "4"]
    monkeypatch.setattr(sys, "argv", ["infer.py", *flags, "--kernels", "auto,grouped_matmul=mosaic"])
    with pytest.raises(ConfigError, match=r"kernel grouped_.* 'mosaic'"):
        infer.main()


def test_a_prompt_on_the_terminal_from_either_kind_of_folder(checkpoint: Path, tmp_path: Path) -> None:
    to_hf.convert(checkpoint, tmp_path / "hf")
    texts = []
    for folder in (checkpoint, tmp_path / "hf"):
        flags = ["--checkpoint", folder, "--max-new-tokens", 8, "--batch-size", 4, "--ignore-eos"]
        done = run(*flags, "--prompt", "hello")
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("\n") and len(done.stdout) > 1
        assert "tokens/s" in done.stderr
        texts.append(done.stdout)
    assert texts[0] == texts[1]
