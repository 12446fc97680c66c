from dsv3_jax.kernels.quantized_matmul.api import grouped_quantized_matmul, quantized_matmul
from dsv3_jax.kernels.quantized_matmul.coding import Coding, dequantize

__all__ = ["Coding", "dequantize", "grouped_quantized_matmul", "quantized_matmul"]
