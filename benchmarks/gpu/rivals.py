"""torch on the same device and data: SDPA with its back ends, flex attention, grouped products. Optional."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.kernels.attention.shapes import SHAPES
from dsv3_jax.kernels.cases import Case

Row = dict[str, Any]
Call = Callable[..., Any]


def why_not() -> str | None:
    """Why torch cannot be asked here."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return None if torch.cuda.is_available() else "torch sees no GPU"


def run(
    case: Case,
    sets: list[tuple[jax.Array, ...]],
    wanted: Any,
    calls: int,
    error_of: Callable[[Any, Any], float],
    device: str = "cuda",
) -> Iterator[tuple[str, Row]]:
    """(name, result) of every rival that knows this kernel and program; those that cannot run say why."""
    names = RIVALS.get((case.kernel, case.program), {})
    if not names:
        return
    reason = why_not() if device == "cuda" else None
    if reason is not None:
        yield from ((name, {"refused": reason}) for name in names)
        return
    import torch

    tensors = [tuple(to_torch(a, device) for a in arrays) for arrays in sets]
    for name, make in names.items():
        try:
            call = make(case)
            found = call(*tensors[0])
        except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
            yield name, {"refused": str(error).splitlines()[0][:200]}
            continue
        outputs = found if isinstance(found, tuple) else (found,)
        result: Row = {"error": error_of([o.detach().float().cpu().numpy() for o in outputs], wanted)}
        result["right"] = (
            result["error"] <= 2 * case.bound
        )  # a rival is told apart from a wrong set-up, not judged
        if result["right"]:
            result["time"] = timed(torch, call, tensors, calls, device)
        yield name, result


def to_torch(array: jax.Array, device: str) -> Any:
    """The same values in torch."""
    import torch

    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(np.array(array)).to(device)


def timed(torch: Any, call: Call, tensors: list[tuple[Any, ...]], calls: int, device: str) -> Row:
    """Milliseconds by device events, or of a CPU by its clock."""
    import time

    for arguments in tensors:
        call(*arguments)
    samples = []
    for n in range(calls):
        arguments = tensors[n % len(tensors)]
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call(*arguments)
            end.record()
            torch.cuda.synchronize()
            samples.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            call(*arguments)
            samples.append(1e3 * (time.perf_counter() - start))
    return {
        "median": round(statistics.median(samples), 5),
        "least": round(min(samples), 5),
        "most": round(max(samples), 5),
        "calls": calls,
        "method": "events" if device == "cuda" else "calls",
    }


# --- attention: arguments are q, k, v (B S H D), then the cotangent in backward ----------------------------------


def _scale(q: Any) -> float:
    return q.shape[-1] ** -0.5


def _causal(case: Case) -> bool:
    """Whether the named shape is causal. Raises NotImplementedError for packed segments."""
    shape = SHAPES.get(case.shape)
    if shape is not None and shape.segments:
        raise NotImplementedError("packed segments are not compared with torch")
    return shape is None or shape.causal


def _sdpa(backend: str | None) -> Callable[[Case], Call]:
    def make(case: Case) -> Call:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        causal = _causal(case)

        def attend(q: Any, k: Any, v: Any) -> Any:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            how = dict(is_causal=causal, scale=_scale(q), enable_gqa=q.shape[1] != k.shape[1])
            product = torch.nn.functional.scaled_dot_product_attention
            if backend is None:
                return product(q, k, v, **how).transpose(1, 2)
            with sdpa_kernel([getattr(SDPBackend, backend)]):
                return product(q, k, v, **how).transpose(1, 2)

        return _gradients(attend, 3) if case.program == "backward" else attend

    return make


def _flex(case: Case) -> Call:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length, causal = case.arguments[0].shape[1], _causal(case)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mask = None
    if causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)
    compiled = torch.compile(flex_attention)

    def attend(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        return compiled(q, k, v, block_mask=mask, scale=_scale(q), enable_gqa=grouped).transpose(1, 2)

    return _gradients(attend, 3) if case.program == "backward" else attend


def _gradients(function: Call, count: int) -> Call:
    """Forward and backward: gradients of the first `count` arguments for the cotangent, which is the last."""

    def run(*arguments: Any) -> Any:
        import torch

        leaves = [a.detach().requires_grad_() for a in arguments[:count]]
        out = function(*leaves, *arguments[count:-1])
        return torch.autograd.grad(out, leaves, arguments[-1])

    return run


# --- grouped products: arguments are x (N D), w (E F D), group sizes (E), then the cotangent in backward -----------


def _grouped_mm(case: Case) -> Call:
    import torch

    def forward(x: Any, w: Any, sizes: Any) -> Any:
        ends = torch.cumsum(sizes, 0).to(torch.int32)
        return torch._grouped_mm(x, w.transpose(1, 2), offs=ends)

    def dx(x: Any, w: Any, sizes: Any, ct: Any) -> Any:
        return torch._grouped_mm(ct, w, offs=torch.cumsum(sizes, 0).to(torch.int32))

    def dw(x: Any, w: Any, sizes: Any, ct: Any) -> Any:
        return torch._grouped_mm(ct.t(), x, offs=torch.cumsum(sizes, 0).to(torch.int32))

    return {"forward": forward, "dx": dx, "dw": dw}[case.program]


_ATTENTION: dict[str, Callable[[Case], Call]] = {
    "torch sdpa": _sdpa(None),
    "torch sdpa cudnn": _sdpa("CUDNN_ATTENTION"),
    "torch sdpa flash": _sdpa("FLASH_ATTENTION"),
    "torch flex": _flex,
}
RIVALS: dict[tuple[str, str], dict[str, Callable[[Case], Call]]] = {
    ("attention", "forward"): _ATTENTION,
    ("attention", "backward"): _ATTENTION,
    **{("grouped_matmul", program): {"torch grouped_mm": _grouped_mm} for program in ("forward", "dx", "dw")},
}
