"""train.py as a command: exit codes, weights from a Hugging Face folder, TensorBoard, bfloat16, text and mixtures."""

from __future__ import annotations

import json
import runpy
import struct
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from convert import to_hf
from dsv3_jax.checkpoint import save_checkpoint
from dsv3_jax.config import dump_yaml, to_mapping
from dsv3_jax.model import init_variables
from dsv3_jax.text import Tokenizer
from dsv3_jax.training.metrics import read_metrics
from dsv3_jax.training.prepare import prepare
from dsv3_jax.training.sources import Document
from tests.training import tiny
from tests.training.test_trainer import MODEL, _config

REPO = Path(__file__).resolve().parents[2]
STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    texts = [f"{i}: latent expert router {i * i}" for i in range(80)]
    documents = (Document(str(i), text) for i, text in enumerate(texts))
    prepare(documents, folder / "shards", Tokenizer.bytes(), val_fraction=0.2)
    lines = [json.dumps({"text": f"{i} token bias"}) for i in range(80)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder


def start(monkeypatch: pytest.MonkeyPatch, *flags: object) -> int:
    """train.py with these flags; its exit code."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPO / "train.py"), run_name="__main__")
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def config(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "test.yaml"
    cfg = _config(data / "shards", Path("unused"), steps=STEPS)
    path.write_text(dump_yaml(to_mapping(tiny.replace(cfg, "run", dir=None))))
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with the model of the tests and a tokenizer."""
    folder = tmp_path_factory.mktemp("exported")
    Tokenizer.bytes().save(folder / "tokenizer")
    variables = jax.jit(init_variables, static_argnums=0)(MODEL, jax.random.key(11))
    save_checkpoint(folder / "native", MODEL, variables, tokenizer_dir=folder / "tokenizer")
    to_hf.convert(folder / "native", folder / "hf")
    return folder


def _events(folder: Path) -> dict[str, dict[int, float]]:
    """Scalars by name and step of the event files: records of length, its checksum, data, its checksum."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2", reason="needs the extra `tb`")
    found: dict[str, dict[int, float]] = {}
    for file in folder.iterdir():
        content = file.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + size])
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
            content = content[16 + size :]
    return found


def test_a_run_from_a_hugging_face_folder_is_that_from_the_native_checkpoint(
    config: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for kind in ("native", "hf"):
        run = tmp_path / kind
        flags = ["--run.dir", run, "--init.checkpoint", exported / kind, "--training.steps", 2]
        assert start(monkeypatch, "--config", config, *flags) == 0
        losses.append([record["loss"] for record in read_metrics(run / "metrics.jsonl")])
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert (tmp_path / "hf" / "hf" / "config.json").is_file()


def test_bfloat16_keeps_float32_weights_and_learns_like_float32_with_tensorboard_beside(
    config: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboardX", reason="needs the extra `tb`")
    losses: dict[str, np.ndarray] = {}
    for dtype in ("float32", "bfloat16"):
        flags = ["--run.dir", tmp_path / dtype, "--model.dtype", dtype]
        flags += ["--logging.tensorboard", "true"] if dtype == "bfloat16" else []
        assert start(monkeypatch, "--config", config, *flags) == 0
        losses[dtype] = np.array(
            [record["loss"] for record in read_metrics(tmp_path / dtype / "metrics.jsonl")]
        )
    assert losses["bfloat16"][-1] < losses["bfloat16"][0] - 0.5
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.01)
    assert (losses["bfloat16"] != losses["float32"]).any()
    manifest = json.loads((tmp_path / "bfloat16" / "checkpoints" / str(STEPS) / "manifest.json").read_text())
    assert _dtypes(manifest["tree"]) == {"float32"}
    moments = list((tmp_path / "bfloat16" / "checkpoints" / str(STEPS) / "optimizer").rglob("zarr.json"))
    types = {json.loads(path.read_text()).get("data_type") for path in moments}
    assert types - {None} == {"float32", "int32"}  # the count is an integer
    events = _events(tmp_path / "bfloat16" / "tensorboard")
    assert list(events["loss"]) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(events["loss"].values()), losses["bfloat16"], rtol=1e-6)
    assert {"fill", "lr", "grad_norm", "val_loss"} <= events.keys()


def _dtypes(tree: Any) -> set[str]:
    return {leaf["dtype"] for leaf in tree.values()} if isinstance(tree, dict) else set()


def test_text_and_shards_in_one_mixture(
    config: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("grain", reason="needs the extra `data`")
    mixture = f"{data / 'shards'}=3,{data / 'text.jsonl'}=1"
    flags = ["--run.dir", tmp_path / "run", "--data.mixture", mixture, "--data.workers", 0]
    flags += ["--data.val_fraction", 0.2, "--training.steps", 4]
    assert start(monkeypatch, "--config", config, *flags) == 0
    assert "mixture: 75.0% " in capfd.readouterr().out
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert list(records[-1]["shares"].values()) == [0.75, 0.25] and records[-1]["val_loss"] > 0
    assert all(0.5 < record["fill"] <= 1 for record in records)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "share of real tokens" in page and "text.jsonl" in page


def test_damaged_data_and_checkpoints_exit_65(
    config: Path, data: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def refused(*flags: object) -> str:
        assert start(monkeypatch, "--config", config, "--run.dir", tmp_path / "run", *flags) == 65
        assert not (tmp_path / "run").exists()
        told = capfd.readouterr().err
        assert told.startswith("error: ") and "Traceback" not in told
        return told

    shards = tmp_path / "shards"
    prepare([Document("a", "some text " * 9)], shards, Tokenizer.bytes())
    _flip(shards / "train-00000.bin")
    assert "train-00000.bin: its SHA-256 is not the one" in refused("--data.source", shards)
    (shards / "train-00000.bin").unlink()
    assert "train-00000.bin: is missing" in refused("--data.source", shards)
    weights = next(iter((exported / "native" / "weights").rglob("c.0.0")))
    content = weights.read_bytes()
    weights.write_bytes(content[:-4])
    try:
        assert weights.name in refused("--init.checkpoint", exported / "native")
    finally:
        weights.write_bytes(content)
    model = exported / "hf" / "model.safetensors"
    content = model.read_bytes()
    model.write_bytes(content[:-100])
    try:
        assert "truncated" in refused("--init.checkpoint", exported / "hf")
    finally:
        model.write_bytes(content)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
