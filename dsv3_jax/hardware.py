"""What accelerators can do, by the name JAX gives them."""

from __future__ import annotations

# Dense bfloat16 products, FLOP/s, from the vendors' data sheets (not the figures with 2:4 sparsity). The first name
# that a device's kind contains counts, so the longer names come first.
_PEAKS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("GH200", 989.4e12),
    ("H200", 989.4e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989.4e12),
    ("H800", 989.4e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of a device, by `jax.Device.device_kind`; None where it is not known (a CPU).

    >>> peak_flops("NVIDIA H100 80GB HBM3")
    989400000000000.0
    >>> peak_flops("cpu") is None
    True
    """
    kind = device_kind.upper()
    return next((peak for name, peak in _PEAKS if name.upper() in kind), None)
