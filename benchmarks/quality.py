"""What each format and way of rounding costs a trained model, beside other libraries on the same weights.

Called by `python -m benchmarks.quantized quality`, on texts that no setting was chosen on (`benchmarks.rounding_choice`
has its own). Every variant is put back in the model as float32 values, so that
one program runs them all, and compared with the model itself on texts that it was neither trained nor calibrated on
(`convert.compare`). qwix and torchao round to nearest; where one is not installed its rows say so.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.common import environment
from convert import compare, quantize
from convert.calibrate import read_tokens
from dsv3_jax.checkpoint.source import Source, open_source
from dsv3_jax.hf.rules import flatten_paths, unflatten_paths
from dsv3_jax.model import abstract_variables
from dsv3_jax.quantization.formats import Format, parse_format

# "gptq+order" is the default of convert.quantize; "gptq" takes columns as they come.
ROUNDINGS = {
    "int8": ("nearest", "gptq", "gptq+order", "qwix", "torchao"),
    "fp8": ("nearest", "qwix", "torchao"),
    "int4:128": ("nearest", "gptq", "gptq+order", "awq", "qwix", "torchao"),
    "int4:64": ("nearest", "gptq", "gptq+order", "awq", "qwix", "torchao"),
    "int4a:64": ("nearest", "gptq", "gptq+order", "torchao"),
    "int4:32": ("nearest", "gptq", "gptq+order"),
}
Flat = dict[str, np.ndarray]


def quality(
    run: Path,
    texts: list[Path],
    calibration: Path,
    tokens: int,
    window: int,
    formats: list[str],
    roundings: list[str] | None = None,
    each: Callable[[dict[str, Any]], Any] = lambda _: None,
) -> dict[str, Any]:
    """Sizes, errors of weights, perplexity, KL and agreement by format and rounding.

    Args:
      tokens: at most so many of each text.
      window: tokens that the model reads in one go, in texts and calibration.
      roundings: these alone, of ROUNDINGS.
      each: takes the result so far after each variant, so that a run that is cut off leaves what it had.
    """
    before = environment()
    source = open_source(run, abstract_variables)
    exact = flatten_paths(source.load("float32"))
    references = []
    for text in texts:
        windows = read_tokens(source, text, tokens, window, "--text")
        references.append(compare.Reference(source.cfg, unflatten_paths(exact), windows, keep=True))
    columns = {entry.path: entry.hf_shape[-1] for entry in source.entries}
    rows: list[dict[str, Any]] = []
    nearest: list[tuple[np.ndarray, ...]] = []
    half: list[tuple[np.ndarray, ...]] = []
    chosen = {name: [x for x in ROUNDINGS[name] if roundings is None or x in roundings] for name in formats}
    result = {
        "environment": before,
        "parameters": source.count_parameters(),
        "step": source.step,
        "trained": _trained(run),
        "window": window,
        "texts": [text.stem for text in texts],
        "calibration": calibration.stem,
        "rows": rows,
    }
    for row, flat in _variants(source, run, calibration, window, exact, columns, chosen):
        if flat is not None:
            found = [one.tokens(source.cfg, unflatten_paths(flat)) for one in references]
            row["texts"] = [dataclasses.asdict(compare.Reference.measured(*one)) for one in found]
            half = half or found
            if row["rounding"] == "nearest":
                nearest = found
            for text, ours, theirs, bf16 in zip(row["texts"], found, nearest, half, strict=True):
                text["against_nearest"] = against(ours, theirs)
                text["against_bfloat16"] = against(ours, bf16)
        print(row, file=sys.stderr, flush=True)
        rows.append(row)
        each(result)
    return result


def against(ours: tuple[np.ndarray, ...], theirs: tuple[np.ndarray, ...]) -> dict[str, float]:
    """Perplexity over that of another variant, and how much more KL, over the same tokens.

    Standard errors are of the differences: `.._error` over windows (bootstrap), `.._token_error` over tokens as if each
    were drawn by itself. `kl_z` and `kl_token_z` are the difference in KL over them: below -3 is better beyond doubt.
    """
    change_BT, more_BT = (ours[i] - theirs[i] for i in (1, 2))
    ratio, kl = float(np.exp(change_BT.mean())), float(more_BT.mean())
    errors = [
        (compare.bootstrap_error(x.mean(1)), float(x.std(ddof=1) / x.size**0.5)) for x in (change_BT, more_BT)
    ]
    return {
        "perplexity_ratio": ratio,
        "perplexity_ratio_error": ratio * errors[0][0],
        "perplexity_ratio_token_error": ratio * errors[0][1],
        "kl": kl,
        "kl_error": errors[1][0],
        "kl_token_error": errors[1][1],
        "kl_z": kl / (errors[1][0] or 1.0),
        "kl_token_z": kl / (errors[1][1] or 1.0),
        "tokens_with_less_kl": float((more_BT < 0).mean()),
    }


def _variants(
    source: Source,
    run: Path,
    calibration: Path,
    window: int,
    exact: Flat,
    columns: dict[str, int],
    roundings: dict[str, list[str]],
) -> Iterator[tuple[dict[str, Any], Flat | None]]:
    half = {path: np.asarray(jnp.asarray(leaf, jnp.bfloat16), np.float32) for path, leaf in exact.items()}
    every = [path for path in exact if path in columns]
    yield (
        {"format": "bfloat16", "rounding": "nearest", "share_of_float32": 0.5, **_errors(exact, half, every)},
        half,
    )
    for name in roundings:
        nearest: Flat = {}
        chosen: list[str] = []
        for rounding in roundings[name]:
            row: dict[str, Any] = {"format": name, "rounding": rounding}
            if rounding in PEERS:
                try:
                    convert = PEERS[rounding]()
                except ImportError as error:
                    yield {**row, "skipped": str(error)}, None
                    continue
                theirs = dict(exact)
                for path in chosen:
                    fmt = parse_format(name).fitting(columns[path])
                    assert fmt is not None
                    matrix = exact[path].reshape(-1, columns[path])
                    theirs[path] = convert(matrix, fmt).reshape(exact[path].shape)
                same = [np.isclose(theirs[p], nearest[p], rtol=1e-5, atol=0).ravel() for p in chosen]
                row["same_as_nearest"] = float(np.concatenate(same).mean())
                yield {**row, **_errors(exact, theirs, chosen)}, theirs
                continue
            with tempfile.TemporaryDirectory() as folder:
                row |= quantized(run, Path(folder) / "out", name, rounding, calibration, window)
                made = open_source(Path(folder) / "out", abstract_variables)
                ours, chosen = flatten_paths(made.load("float32")), sorted(made.formats)
            if rounding == "nearest":
                nearest = ours
            yield row, ours


def quantized(
    run: Path, dst: Path, name: str, rounding: str, calibration: Path, window: int
) -> dict[str, Any]:
    """The quantised leaves' share of float32, seconds, and errors as reported: of AWQ, those of the scaled weights."""
    fmt, started = parse_format(name), time.perf_counter()
    how: dict[str, Any] = {}
    if rounding != "nearest":
        how = {"calibration": calibration, "calibration_window": window, "rounding": rounding.split("+")[0]}
        if rounding != "awq":
            how["act_order"] = rounding == "gptq+order"
    quantize.convert(
        run, dst, method=fmt.kind, group_size=fmt.group or None, asymmetric=fmt.asymmetric, **how
    )
    seconds = time.perf_counter() - started
    leaves = json.loads((dst / "quantization.json").read_text())["leaves"]
    errors = {leaf["path"]: round(float(np.mean(leaf["by_layer"])), 6) for leaf in leaves}
    return {
        "seconds": seconds,
        "share_of_float32": sum(leaf["nbytes"] for leaf in leaves)
        / (4 * sum(leaf["values"] for leaf in leaves)),
        "error": float(np.mean(list(errors.values()))),
        "errors": errors,
    }


def _errors(exact: Flat, other: Flat, paths: list[str]) -> dict[str, Any]:
    """|w - w'| / |w| of every leaf and its mean over leaves."""
    errors = {
        p: round(float(np.linalg.norm(exact[p] - other[p]) / np.linalg.norm(exact[p])), 6) for p in paths
    }
    return {"error": float(np.mean(list(errors.values()))), "errors": errors}


def _trained(run: Path) -> dict[str, Any]:
    """The last held-out loss of a training run."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [step for step in steps if "val_loss" in step][-1]
    return {key: last[key] for key in ("step", "tokens", "val_loss", "val_perplexity")}


def _qwix() -> Callable[[np.ndarray, Format], np.ndarray]:
    import qwix  # type: ignore[import-not-found,unused-ignore]

    types = {"int8": jnp.int8, "int4": jnp.int4, "fp8": jnp.float8_e4m3fn}

    def convert(matrix_RK: np.ndarray, fmt: Format) -> np.ndarray:
        tiles = {1: fmt.group} if fmt.group else {}
        coded = qwix.quantize(jnp.asarray(matrix_RK), types[fmt.kind], channelwise_axes=[0], tiled_axes=tiles)
        return np.asarray(qwix.dequantize(coded), np.float32)

    return convert


def _torchao() -> Callable[[np.ndarray, Format], np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from torchao import quantization as ao  # type: ignore[import-not-found,unused-ignore]
        from torchao.quantization.quant_primitives import (  # type: ignore[import-not-found,unused-ignore]
            MappingType,
        )

    def convert(matrix_RK: np.ndarray, fmt: Format) -> np.ndarray:
        if fmt.kind == "fp8":
            config: Any = ao.Float8WeightOnlyConfig()
        else:
            config = ao.IntxWeightOnlyConfig(
                weight_dtype=torch.int8 if fmt.kind == "int8" else torch.int4,
                granularity=ao.PerGroup(fmt.group) if fmt.group else ao.PerAxis(0),
                mapping_type=MappingType.ASYMMETRIC if fmt.asymmetric else MappingType.SYMMETRIC,
            )
        linear = torch.nn.Linear(matrix_RK.shape[1], matrix_RK.shape[0], bias=False)
        linear.weight.data = torch.from_numpy(np.ascontiguousarray(matrix_RK))
        ao.quantize_(linear, config)
        return linear.weight.dequantize().detach().float().numpy()

    return convert


PEERS = {"qwix": _qwix, "torchao": _torchao}
