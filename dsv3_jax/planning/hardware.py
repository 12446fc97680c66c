"""The hardware table: what the makers state, and the shares of it that a plan counts on."""

from __future__ import annotations

import dataclasses

from dsv3_jax.config import nearest
from dsv3_jax.errors import ConfigError
from dsv3_jax.hardware import peak_flops

# Devices of one node, joined by NVLink: the HGX and DGX boards of every GPU below hold eight.
NODE = 8
# Share of a GPU's memory that a step may fill. The rest holds CUDA's context, NCCL's buffers and fragments of the
# allocator. JAX itself takes 75 % unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
USABLE = 0.92
# Assumptions of the expected time, none of them measured here: the share of the stated bf16 rate that the products
# of a layer reach, and the share of the stated link rate that a large collective reaches.
MATMUL_SHARE = 0.60
LINK_SHARE = 0.80


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One kind of GPU in nodes of NODE.

    Attributes:
      flops: dense bfloat16 operations a second, without sparsity.
      flops32: float32 operations a second outside of the tensor cores (products in float32 are never TF32 here).
      memory: bytes of HBM.
      memory_rate: bytes a second of HBM.
      nvlink: bytes a second that a GPU sends to the others of its node (one direction).
      network: bytes a second that a GPU sends to other nodes (one direction, one adapter a GPU).
    """

    name: str
    flops: float
    flops32: float
    memory: float
    memory_rate: float
    nvlink: float
    network: float

    def rate(self, dtype: str) -> float:
        """Operations a second of products in a compute type."""
        return self.flops if dtype == "bfloat16" else self.flops32


# NVIDIA's data sheets state sparse rates and both directions of NVLink; both are halved here.
# bfloat16 rates are those of `dsv3_jax.hardware`, by which a run's MFU is told too.
HARDWARE: dict[str, Hardware] = {
    name.lower(): Hardware(name, peak_flops(name) or 0.0, *rest)
    for name, *rest in (
        # https://www.nvidia.com/en-us/data-center/h100/ (SXM5: 1,979 TFLOP/s sparse, 80 GB, 3.35 TB/s, 900 GB/s);
        # https://docs.nvidia.com/dgx/dgxh100-user-guide/ (eight 400 Gb/s ConnectX-7).
        ("H100", 67e12, 80e9, 3.35e12, 450e9, 50e9),
        # https://www.nvidia.com/en-us/data-center/h200/ (SXM: 1,979 TFLOP/s sparse, 141 GB, 4.8 TB/s, 900 GB/s);
        # https://docs.nvidia.com/dgx/dgxh100-user-guide/ (DGX H200: the same eight adapters).
        ("H200", 67e12, 141e9, 4.8e12, 450e9, 50e9),
        # https://www.nvidia.com/en-us/data-center/dgx-b200/ (eight GPUs: 1,440 GB, 64 TB/s, 14.4 TB/s of NVLink);
        # https://www.nvidia.com/en-us/data-center/hgx/ (HGX B200: 36 PFLOP/s FP16/BF16 sparse for eight);
        # https://docs.nvidia.com/dgx/dgxb200-user-guide/introduction-to-dgxb200.html (eight 400 Gb/s ConnectX-7).
        ("B200", 75e12, 180e9, 8.0e12, 900e9, 50e9),
        # https://www.nvidia.com/en-us/data-center/a100/ (SXM4 80 GB: 312 TFLOP/s dense, 2,039 GB/s, 600 GB/s);
        # https://docs.nvidia.com/dgx/dgxa100-user-guide/ (eight 200 Gb/s ConnectX-6).
        ("A100", 19.5e12, 80e9, 2.039e12, 300e9, 25e9),
    )
}


def hardware(name: str) -> Hardware:
    """The row of a GPU by its name in any case. Raises ConfigError with the nearest known name."""
    if name.lower() not in HARDWARE:
        close = nearest(name.lower(), HARDWARE).replace("valid keys", "known")
        raise ConfigError(f"--hardware is {name!r}; {close}")
    return HARDWARE[name.lower()]
