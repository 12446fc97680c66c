"""Which implementation computes each kernel: what `--kernels` says."""

from __future__ import annotations

import dataclasses

from dsv3_jax.errors import ConfigError

IMPLEMENTATIONS = ("auto", "reference", "mosaic", "batched", "cudnn", "tokamax")


@dataclasses.dataclass(frozen=True)
class Kernels:
    """An implementation for each kernel of the model; static, and an argument of the modules that call them.

    "auto" takes the first that can run and, for hand-written kernels, was shown correct on this device. A named one
    that cannot run, or refuses its arguments, is an error when the program is traced.
    """

    attention: str = "auto"
    """Expanded attention: training, and prefill in that form."""
    grouped_matmul: str = "auto"
    """The experts' products."""
    latent_attention: str = "auto"
    """Absorbed attention over the latent cache."""
    quantized_matmul: str = "auto"
    """Products with quantised weights, dense and the experts'; forward and input gradient of FP8 training."""


AUTO_KERNELS = Kernels()
OPERATIONS = tuple(field.name for field in dataclasses.fields(Kernels))


def parse_kernels(text: str) -> Kernels:
    """`mosaic`, or with exceptions `mosaic,attention=reference`; `attention=mosaic` alone leaves the others at auto.

    Raises ConfigError naming the part.
    """
    chosen: dict[str, str] = {}
    everything = "auto"
    for at, part in enumerate(text.split(",")):
        operation, equals, name = part.rpartition("=")
        if name not in IMPLEMENTATIONS or (equals and operation not in OPERATIONS) or (at and not equals):
            raise ConfigError(
                f"kernels: {part!r} in {text!r}; expected one of {', '.join(IMPLEMENTATIONS)}, then OPERATION=NAME for "
                f"exceptions, OPERATION one of {', '.join(OPERATIONS)}"
            )
        if not equals:
            everything = name
        elif operation in chosen:
            raise ConfigError(f"kernels: {operation} is given twice in {text!r}")
        else:
            chosen[operation] = name
    return Kernels(**{operation: chosen.get(operation, everything) for operation in OPERATIONS})
