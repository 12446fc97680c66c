"""metrics.jsonl, the printed step line, TensorBoard."""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.hardware import peak_flops
from dsv3_jax.model.counts import train_flops_per_token

Record = dict[str, Any]
_BLOCK = 1 << 16  # read at once


class MetricsLog:
    """Appends one JSON object a line. `sync` puts everything written on disk."""

    def __init__(self, path: str | Path) -> None:
        """Opens the file; a line that a killed process left half-written is cut off."""
        self._file = open(path, "a+b")  # noqa: SIM115  closed by close()
        self._file.truncate(_end_of_lines(self._file))

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line; floats keep full precision, those that are not finite become null."""
        line = json.dumps({key: _json_value(value) for key, value in record.items()}, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Flush to the disk: called before the checkpoint of the last step written."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close."""
        self.sync()
        self._file.close()


def _end_of_lines(file: BinaryIO) -> int:
    """Where the last whole line ends, looked for from the end."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(end - _BLOCK, 0)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _json_value(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_metrics(path: str | Path) -> list[Record]:
    """The record of each step in ascending order; of lines for the same step the last counts.

    `expert_counts` is an array of int32 [L, E] (thousands of numbers a step; lists take nine times the memory).
    Raises DataError naming the line that is not a JSON object with a step. A last line without its end is left out.
    """
    records: dict[int, Record] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                if "expert_counts" in record:
                    record["expert_counts"] = np.asarray(record["expert_counts"], np.int32)
                records[int(record["step"])] = record
            except (ValueError, TypeError, KeyError, OverflowError):
                raise DataError(
                    f"{path}:{number}: expected a JSON object with a step, found {line[:60]!r}"
                ) from None
    return [records[step] for step in sorted(records)]


def record_of(step: int, metrics: Mapping[str, Any]) -> Record:
    """The line of a step from the metrics of `train_step` (numpy scalars and the array of expert counts).

    `expert_counts` holds the tokens each expert got, a list per expert layer (the multi-token module's last), and
    `bias_std` the standard deviation of each such layer's selection biases.
    """
    record: Record = {"step": step}
    for name, value in metrics.items():
        array = np.asarray(value)
        if name == "expert_counts_LE":
            record["dead_experts"] = int(np.sum(array == 0))
            record["expert_counts"] = array.astype(np.int64).tolist()
        elif name == "bias_std_L":
            record["bias_std"] = [float(spread) for spread in array]
        else:
            record[name] = int(array) if array.dtype.kind in "iu" else float(array)
    return record


class Pace:
    """Step times of the recent past, for tokens/s and the time left."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=50)

    def add(self, seconds: float) -> None:
        """A step's seconds."""
        self._seconds.append(seconds)

    def left(self, steps: int) -> float:
        """Seconds that `steps` more steps take."""
        return statistics.median(self._seconds) * steps if self._seconds else 0.0


class Speed:
    """Arithmetic per second of a run, and its share of what the devices can do."""

    def __init__(
        self, model: ModelConfig, seq_len: int, mesh: jax.sharding.Mesh, *, frozen: bool = False
    ) -> None:
        """Counts the operations of one token: see `train_flops_per_token`.

        Frozen weights have no gradient of their own, a third of the operations; the pairs' own are not counted.
        """
        self._flops = train_flops_per_token(model, seq_len) * (2 / 3 if frozen else 1)
        peak = peak_flops(mesh.devices.flat[0].device_kind)
        self._peak = None if peak is None else peak * mesh.size

    def of(self, tokens_per_s: float) -> Record:
        """`tflops` over all devices and, where their peak is known, `mfu` (0 to 1, of the bfloat16 peak)."""
        rate = self._flops * tokens_per_s
        record: Record = {"tflops": rate / 1e12}
        if self._peak is not None:
            record["mfu"] = rate / self._peak
        return record


def duration(seconds: float) -> str:
    """12s, 4.2m or 3.1h."""
    if seconds < 60:
        return f"{seconds:.0f}s"
    return f"{seconds / 60:.1f}m" if seconds < 3600 else f"{seconds / 3600:.1f}h"


def memory_gib() -> float:
    """Peak memory of the busiest local device; of this process where devices do not report any (CPU)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    return (max(peaks) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30


def step_line(record: Mapping[str, Any], steps: int, eta: float) -> str:
    """What is printed for a step, e.g. `step 00120/01000 (12.0%) | loss 3.211 | ... | eta 4.2m`."""
    step = record["step"]
    width = max(5, len(str(steps)))
    parts = [
        f"step {step:0{width}d}/{steps:0{width}d} ({100 * step / steps:.1f}%)",
        f"loss {record['loss']:.3f}",
        f"lr {record['lr']:.1e}".replace("e-0", "e-"),
        f"gnorm {record['grad_norm']:.2f}",
        f"{record['tokens_per_s']:,.0f} tok/s",
        _tflops(record),
    ]
    if "maxvio" in record:
        parts.append(f"maxvio {record['maxvio']:.2f}")
    if record.get("val_loss") is not None:
        parts.append(f"val {record['val_loss']:.3f}")
    if record["skipped"]:
        parts.append(f"NOT APPLIED ({'spike' if record.get('spike') else 'not finite'})")
    if "trainable_parameters" in record:
        parts.append(f"trains {short(record['trainable_parameters'])}/{short(record['parameters'])}")
    return " | ".join([*parts, f"mem {record['mem_gib']:.1f}GiB", f"eta {duration(eta)}"])


def short(count: int) -> str:
    """A count as 812, 3.2M or 671B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)


def _tflops(record: Mapping[str, Any]) -> str:
    """8.1 TFLOP/s, two digits below 1, and the share of the devices' peak where it is known."""
    rate = record["tflops"]
    text = f"{rate:,.1f} TFLOP/s" if rate >= 1 else f"{rate:.2g} TFLOP/s"
    return f"{text} (mfu {100 * record['mfu']:.1f}%)" if "mfu" in record else text


def _flat(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{key}", inner) for key, inner in value.items())
        else:
            yield name, value


class TensorBoard:
    """Scalars of every step as TensorBoard events."""

    def __init__(self, folder: str | Path) -> None:
        """Raises ConfigError when tensorboardX is not installed."""
        try:
            from tensorboardX import SummaryWriter
        except ModuleNotFoundError:
            raise ConfigError(
                "logging.tensorboard needs the package tensorboardX: ./run setup --extras tb"
            ) from None
        self._writer = SummaryWriter(str(folder))

    def write(self, record: Mapping[str, Any]) -> None:
        """Every number of a record; those of a mapping under name/key."""
        for name, value in _flat(record):
            if isinstance(value, (int, float)) and name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()
