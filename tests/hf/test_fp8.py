"""FP8 dequantisation: bit-equal to the formula, partial blocks, block size from the config alone."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.hf import fp8
from dsv3_jax.hf.safetensors import SafetensorsFolder
from dsv3_jax.hf.tensors import StoredTensor
from tests.convert import folders

F8, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_all_codes_bit_equal_to_the_formula(dtype: type) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128).view(F8)
    for scale in (1.0, 0.1, 3.0e-5, 7.77e3, 2.0**-100):
        scales = np.array([[scale]], np.float32)
        found = fp8.dequantize(codes, scales, (128, 128), np.dtype(dtype))
        expected = np.array([[np.float32(float(code)) * np.float32(scale) for code in row] for row in codes])
        with np.errstate(invalid="ignore"):
            expected = expected.astype(dtype)
        assert found.dtype == dtype
        np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
        keep = ~np.isnan(expected)
        assert found[keep].tobytes() == expected[keep].tobytes()
    assert np.isnan(found.astype(np.float32)).sum() == 2  # 0x7f and 0xff


def test_576_rows_have_five_blocks_of_128(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 120, (576, 300), dtype=np.uint8).view(F8)
    scale = rng.uniform(0.5, 2, (5, 3)).astype(np.float32)
    found = fp8.dequantize(codes, scale, (128, 128), np.dtype(np.float32))
    expected = codes.astype(np.float32) * np.kron(scale, np.ones((128, 128), np.float32))[:576, :300]
    assert found.tobytes() == expected.tobytes()


def test_a_streamed_tensor_equals_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3_jax.hf.tensors.PIECE_BYTES", 4 * 300 * 128)
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 120, (576, 300), dtype=np.uint8).view(F8)
    scale = rng.uniform(0.5, 2, (5, 3)).astype(np.float32)
    folder = SafetensorsFolder(folders.write(tmp_path / "f", {}, {"w": codes, "w_scale_inv": scale})).check()
    info, scales = folder.tensors["w"], folder.tensors["w_scale_inv"]
    tensor = StoredTensor("w", info.dtype, info.shape, info.file, info.offset, scales, "fp8")
    pieces = list(map(np.copy, tensor.pieces("F32")))
    assert len(pieces) == 5
    expected = fp8.dequantize(codes, scale, (128, 128), np.dtype(np.float32))
    assert np.concatenate(pieces).tobytes() == expected.tobytes()
    assert tensor.read("BF16").tobytes() == expected.astype(BF16).tobytes()


def test_a_scale_of_another_shape_is_refused() -> None:
    with pytest.raises(DataError, match=r"shape \[4, 1\], not \[5, 1\]"):
        fp8.dequantize(
            np.zeros((576, 128), F8), np.ones((4, 1), np.float32), (128, 128), np.dtype(np.float32)
        )


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "fp8"}, "weight_block_size is None"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [128, True]}, "weight_block_size"),
        ({"quant_method": "gptq", "weight_block_size": [128, 128]}, "gptq"),
        ({"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]}, "e5m2"),
        ("fp8", "object"),
    ],
)
def test_the_block_size_is_read_never_guessed(quantization: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fp8.block_size({"quantization_config": quantization})
    assert fp8.block_size({}) is None
    assert fp8.block_size(
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 32]}}
    ) == (64, 32)
