"""convert.quantize and convert.compare as commands: what is written, what it costs, what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import calibrate, compare, from_hf, inspect, quantize
from dsv3_jax.checkpoint import read_manifest, validate_step
from dsv3_jax.checkpoint.jobs import JOURNAL
from dsv3_jax.checkpoint.source import Source, open_source
from dsv3_jax.errors import ConfigError, StorageError
from dsv3_jax.hf.rules import HFEntry, flatten_paths, unflatten_paths
from dsv3_jax.quantization import formats
from dsv3_jax.quantization.awq import FOLDS
from dsv3_jax.quantization.choose import choose_formats
from dsv3_jax.quantization.formats import parse_format
from dsv3_jax.quantization.gptq import gptq
from dsv3_jax.quantization.leaf import Quantized
from tests.convert import folders
from tests.convert.test_interrupted import Killed, stop_after


class Ascii:
    """A tokenizer of 96 ids."""

    def encode_text(self, text: str) -> list[int]:
        return [ord(character) % 96 for character in text]


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    raw, tensors = folders.tensors_of("v3")
    return folders.write(tmp_path / "hf", {**raw, "vocab_size": 96}, tensors, shards=2)


@pytest.mark.parametrize(
    ("method", "size", "want"), [("int8", None, "int8"), ("int4", 16, "int4:16"), ("fp8", None, "fp8")]
)
def test_codes_are_those_of_rounding_to_nearest(
    hf: Path, tmp_path: Path, method: str, size: int, want: str
) -> None:
    """Every tensor against the formats' own rounding of the whole matrix; what is not chosen is untouched."""
    quantize.convert(hf, tmp_path / "q", method=method, group_size=size)  # type: ignore[arg-type]
    assert validate_step(tmp_path / "q", hashes=True) == []
    before, after = (open_source(tmp_path / name, folders.abstract_variables) for name in ("hf", "q"))
    exact, coded = flatten_paths(before.load("float32")), flatten_paths(after.load(formats=after.formats))
    assert set(after.formats.values()) == {want}
    held = f"{len(after.formats)} {want} of {len(exact)} leaves"
    assert dict(inspect.facts(after))["quantised"] == held and "quantised" not in dict(inspect.facts(before))
    for entry in before.entries:
        leaf, block = coded[entry.path], exact[entry.path][entry.index]
        if not isinstance(leaf, Quantized):
            assert leaf[entry.index].tobytes() == block.tobytes(), entry.name
            continue
        fmt = parse_format(after.formats[entry.path])
        parts = formats.quantize(block.reshape(entry.hf_shape), fmt)
        assert leaf.codes[entry.index].tobytes() == parts.codes.tobytes(), entry.name
        assert leaf.scales[entry.index].tobytes() == parts.scales.tobytes(), entry.name
    # 32 columns hold two groups of 16; 28, 20 and 44 columns are left alone, and say so.
    assert ("params/moe/mlp/experts/down_EDF" in after.formats) == (method != "int4")


def test_rounding_at_load_gives_the_same_codes(hf: Path, tmp_path: Path) -> None:
    quantize.convert(hf, tmp_path / "q", method="int8")
    before, after = (open_source(tmp_path / name, folders.abstract_variables) for name in ("hf", "q"))
    stored, rounded = (flatten_paths(s.load(formats=after.formats)) for s in (after, before))
    for path in after.formats:
        assert stored[path].codes.tobytes() == rounded[path].codes.tobytes()


def test_the_report_says_sizes_and_errors(hf: Path, tmp_path: Path) -> None:
    quantize.convert(hf, tmp_path / "q", method="int8", skip=("*kv_b*",), kinds=("attention", "experts"))
    report = json.loads((tmp_path / "q" / "quantization.json").read_text())
    paths = {leaf["path"] for leaf in report["leaves"]}
    assert "params/moe/mlp/experts/gate_up_EPFD" in paths
    assert not any(
        "kv_b" in path or "shared" in path or path.startswith("params/dense/mlp") for path in paths
    )
    before, after = (open_source(tmp_path / name, folders.abstract_variables) for name in ("hf", "q"))
    exact, near = flatten_paths(before.load("float32")), flatten_paths(after.load("float32"))
    for leaf in report["leaves"]:
        for layer, error in enumerate(leaf["by_layer"]):
            a, b = exact[leaf["path"]][layer].astype(float), near[leaf["path"]][layer].astype(float)
            assert error == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-6)
            assert 0 < error < 0.02
    assert (tmp_path / "q" / "quantization.svg").read_text().startswith("<svg")


def test_calibration_sees_what_each_matrix_is_multiplied_with(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moments of the first layer by numpy; of experts, as many inputs as tokens times experts a token."""
    text = np.random.default_rng(0).integers(32, 96, 1024).astype(np.uint8).tobytes().decode()
    (tmp_path / "text").write_text(text)
    monkeypatch.setattr(calibrate, "SEQUENCE", 64)
    monkeypatch.setattr(calibrate.Tokenizer, "bytes", classmethod(lambda cls: Ascii()))
    source = open_source(hf, folders.abstract_variables)
    columns = {entry.path: entry.hf_shape[-1] for entry in source.entries}
    chosen, _ = choose_formats(columns, {}, parse_format("int4:16"))
    calibrated = calibrate.Calibrated(source, chosen, tmp_path / "text", 1024)
    exact = flatten_paths(source.load("float32"))

    order = calibrated.in_order(source.entries)
    first = next(e for e in order if e.path == "params/dense/attention/kv_a_JD")
    codes = np.concatenate(list(calibrated.pieces(first, "codes")))
    x = exact["params/embed_VD"][np.frombuffer(text.encode(), np.uint8) % 96].astype(float)
    x *= exact["params/dense/attention_norm_D"][0] / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    moment = calibrated._moments.sums[first.path]
    np.testing.assert_allclose(moment, x.T @ x, rtol=1e-4, atol=1e-4 * np.abs(moment).max())
    fmt = parse_format(chosen[first.path])
    w = exact[first.path][0]
    ours = formats.Parts(
        codes.reshape(w.shape[0], -1),
        np.concatenate(list(calibrated.pieces(first, "scales"))).reshape(len(w), -1),
    )
    losses = [
        float((((w - formats.dequantize(parts, fmt, 32)) @ x.T) ** 2).sum())
        for parts in (ours, formats.quantize(w, fmt))
    ]
    assert losses[0] < losses[1]

    last = next(e for e in order if e.path == "params/moe/mlp/experts/gate_up_EPFD")
    list(calibrated.pieces(last, "codes"))
    counts, sums = (getattr(calibrated._moments, name)[last.path] for name in ("counts", "sums"))
    assert counts.sum() == 1024 * source.cfg.num_experts_per_tok and sums.shape == (12, 32, 32)


@pytest.fixture
def calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text of 256 tokens, in sequences of 64."""
    text = np.random.default_rng(0).integers(32, 96, 256).astype(np.uint8).tobytes().decode()
    (tmp_path / "text").write_text(text)
    monkeypatch.setattr(calibrate, "SEQUENCE", 64)
    monkeypatch.setattr(calibrate.Tokenizer, "bytes", classmethod(lambda cls: Ascii()))
    return tmp_path / "text"


def _calibrated(
    folder: Path, fmt: str, text: Path, path: str, act_order: bool = True
) -> tuple[calibrate.Calibrated, np.ndarray]:
    """Experts alone calibrated, and the codes of the last tensor of a leaf's first layer."""
    source = open_source(folder, folders.abstract_variables)
    columns = {entry.path: entry.hf_shape[-1] for entry in source.entries}
    chosen, _ = choose_formats(columns, source.formats, parse_format(fmt), ["experts"])
    found = calibrate.Calibrated(source, chosen, text, 256, act_order=act_order)
    return found, np.concatenate(list(found.pieces(_last(source, path), "codes")))


def _last(source: Source, path: str) -> HFEntry:
    """The last tensor of a leaf's first layer."""
    return [entry for entry in source.entries if entry.path == path and entry.index[0] == 0][-1]


EXPERTS = "params/moe/mlp/experts/gate_up_EPFD"


def test_experts_whose_moments_do_not_fit_share_them(
    hf: Path, calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart, _ = _calibrated(hf, "int8", calibration, EXPERTS)
    monkeypatch.setattr(calibrate, "MOST_EXPERT_BYTES", 0)
    together, codes = _calibrated(hf, "int8", calibration, EXPERTS)
    found, want = together._moments.sums[EXPERTS], apart._moments.sums[EXPERTS].sum(0)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    assert together._moments.counts[EXPERTS] == apart._moments.counts[EXPERTS].sum() > 0
    source = open_source(hf, folders.abstract_variables)
    last = source.tensors[_last(source, EXPERTS).name]
    nearest = formats.quantize(last.read("F32"), parse_format("int8"))
    assert codes.tobytes() != nearest.codes.tobytes()


def test_order_by_activations_is_that_of_the_experts_own_moments(hf: Path, calibration: Path) -> None:
    """The codes of a layer's last expert, and other ones than without the order."""
    plain, codes = _calibrated(hf, "int8", calibration, EXPERTS, act_order=False)
    ordered, others = _calibrated(hf, "int8", calibration, EXPERTS)
    assert str(ordered) != str(plain), "a killed conversion must not go on with the other order"
    last = _last(ordered._source, EXPERTS)
    matrix = ordered._source.tensors[last.name].read("F32")
    moment = ordered._moment(EXPERTS, last.index[1])
    want = gptq(matrix, moment, parse_format("int8"), act_order=True)
    assert others.tobytes() == want.codes.tobytes() != codes.tobytes()


def test_leaves_that_stay_fp8_are_calibrated_with_as_they_are(tmp_path: Path, calibration: Path) -> None:
    """What the experts see is what they see in the same model, its FP8 weights spelled out."""
    raw, tensors = folders.tensors_of("v3")
    raw |= {"vocab_size": 96}
    coded = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
    folders.write(
        tmp_path / "hf", {**raw, "quantization_config": coded}, folders.quantized(tensors, (16, 16))
    )
    from_hf.convert(tmp_path / "hf", tmp_path / "plain", dtype="float32")
    kept, _ = _calibrated(tmp_path / "hf", "int8", calibration, EXPERTS)
    plain, _ = _calibrated(tmp_path / "plain", "int8", calibration, EXPERTS)
    want = plain._moments.sums[EXPERTS]
    np.testing.assert_allclose(kept._moments.sums[EXPERTS], want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("rounding", ["gptq", pytest.param("awq", marks=pytest.mark.slow)])
def test_a_killed_calibration_goes_on_to_the_same_codes(
    hf: Path, tmp_path: Path, calibration: Path, monkeypatch: pytest.MonkeyPatch, rounding: str
) -> None:
    """In the middle of a layer whose codes are partly on the disk."""
    how: Any = {
        "method": "int8",
        "kinds": ("attention",),
        "calibration": calibration,
        "rounding": rounding,
    }
    every = stop_after(monkeypatch, 10**6)
    quantize.convert(hf, tmp_path / "whole", **how, calibration_tokens=256)
    with monkeypatch.context() as patch:
        stop_after(patch, 70)
        with pytest.raises(Killed):
            quantize.convert(hf, tmp_path / "q", **how, calibration_tokens=256)
    done = len((tmp_path / "q.converting" / JOURNAL).read_bytes().splitlines()) - 1
    assert 40 < done <= 70 and not (tmp_path / "q").exists()
    rest = stop_after(monkeypatch, 10**6)
    quantize.convert(hf, tmp_path / "q", **how, calibration_tokens=256)
    assert len(rest) == len(every) - done > 0
    assert read_manifest(tmp_path / "q").tree == read_manifest(tmp_path / "whole").tree
    assert validate_step(tmp_path / "q", hashes=True) == []
    chunks = list((tmp_path / "whole" / "weights").rglob("c.*"))
    assert len(chunks) == len(every)
    for file in chunks:
        other = tmp_path / "q" / file.relative_to(tmp_path / "whole")
        assert other.read_bytes() == file.read_bytes(), file.name
    reports = [(tmp_path / name / "quantization.json").read_text() for name in ("whole", "q")]
    assert reports[0] == reports[1]


def test_awq_folds_scales_without_changing_the_model(
    hf: Path, tmp_path: Path, calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large scales everywhere: the weights that are rounded are others, the float model's outputs the same."""
    monkeypatch.setattr("dsv3_jax.quantization.awq.EXPONENTS", (1.0,))
    made: list[calibrate.Calibrated] = []

    class Kept(calibrate.Calibrated):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(calibrate, "Calibrated", Kept)
    how: Any = {"method": "int8", "calibration": calibration, "calibration_tokens": 256}
    quantize.convert(hf, tmp_path / "q", rounding="awq", **how)
    source, coded = (open_source(tmp_path / name, folders.abstract_variables) for name in ("hf", "q"))
    exact, rounded = flatten_paths(source.load("float32")), flatten_paths(coded.load("float32"))
    (calibrated,) = made
    folded = {path: leaf.copy() for path, leaf in exact.items()}
    changed = set()
    for entry in calibrated.in_order(source.entries):
        before = np.concatenate(list(calibrated.before(entry))).reshape(entry.block_shape)
        if not np.array_equal(before, folded[entry.path][entry.index]):
            changed.add(entry.path.split("/", 2)[-1])
        folded[entry.path][entry.index] = before
    for one in FOLDS:
        if any(path.endswith(f"/{one.source}") for path in exact):
            assert {one.source, *one.readers} & changed, one
    for path in set(exact) - set(coded.formats):
        np.testing.assert_array_equal(rounded[path], folded[path])

    cfg = compare._main_model(source.cfg)
    tokens = np.random.default_rng(1).integers(0, 96, (2, 16)).astype(np.int32)
    outputs = [compare._log_probabilities(cfg, unflatten_paths(v), tokens) for v in (exact, folded, rounded)]
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-5)
    assert 1e-5 < np.median(np.abs(outputs[2] - outputs[0])) < 0.2

    report = json.loads((tmp_path / "q" / "quantization.json").read_text())
    assert report["rounding"] == "awq"
    for leaf in report["leaves"]:
        for layer, error in enumerate(leaf["by_layer"]):
            a, b = folded[leaf["path"]][layer].astype(float), rounded[leaf["path"]][layer].astype(float)
            assert error == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-6)


def test_few_tokens_are_one_short_sequence(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least number of tokens that is taken gives something, in a model of a longer context."""
    (tmp_path / "text").write_text("a" * 1000)
    monkeypatch.setattr(calibrate.Tokenizer, "bytes", classmethod(lambda cls: Ascii()))
    source = open_source(hf, folders.abstract_variables)
    source = dataclasses.replace(source, cfg=dataclasses.replace(source.cfg, max_position_embeddings=4096))
    assert calibrate.read_tokens(source, tmp_path / "text", 256).shape == (1, 256)


def test_a_model_is_like_itself(hf: Path, tmp_path: Path) -> None:
    source = open_source(hf, folders.abstract_variables)
    quality = compare.compare(source, source, np.arange(64, dtype=np.int32).reshape(2, 32))
    assert quality.perplexity_ratio == 1 and quality.kl_mean == 0 and quality.greedy_agreement == 1
    assert quality.tokens == 62


def test_a_file_that_figures_cannot_go_to_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(compare, "open_source", lambda *_: pytest.fail("work began"))
    for place, error in ((tmp_path, ConfigError), (tmp_path / "file" / "x.json", StorageError)):
        with pytest.raises(error, match="folder"):
            compare.main(tmp_path, tmp_path, tmp_path / "text", json_output=place)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"method": "fp8", "group_size": 64}, "group-size"),
        ({"method": "int8", "asymmetric": True}, "asymmetric"),
        ({"group_size": 7}, "group-size is 7"),
        ({"skip": ("*nothing*",)}, "matches no leaf"),
        ({"method": "fp8", "calibration": Path("x")}, "calibration"),
        ({"rounding": "awq"}, "needs --calibration"),
        ({"act_order": True}, "act-order"),
        ({"act_order": True, "calibration": Path("x"), "rounding": "awq"}, "act-order"),
        ({"group_size": 16, "calibration": Path("no such file")}, "no such file"),
    ],
)
def test_flags_that_cannot_be_meant(hf: Path, tmp_path: Path, flags: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize.convert(hf, tmp_path / "q", **flags)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_an_fp8_source_keeps_what_is_not_chosen_again(tmp_path: Path) -> None:
    raw, tensors = folders.tensors_of("v3")
    raw["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
    folders.write(tmp_path / "hf", raw, folders.quantized(tensors, (16, 16)))
    from_hf.convert(tmp_path / "hf", tmp_path / "native")
    quantize.convert(tmp_path / "native", tmp_path / "q", method="int8", kinds=("experts",))
    found = open_source(tmp_path / "q", folders.abstract_variables).formats
    assert (
        found["params/moe/mlp/experts/down_EDF"] == "int8"
        and found["params/moe/attention/o_DHU"] == "fp8:16x16"
    )
