"""What must hold of a program compiled for H200s; each rule returns the breaches in words."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from typing import Any

from benchmarks.h200.compiler import SHARED_LIMIT, Report
from benchmarks.h200.programs import Program
from dsv3_jax.planning.hlo import SHAPE, Instruction, computations_of

TOLERANCE = 0.05  # of the recorded temporary bytes


def of_kernels(report: Report) -> list[str]:
    """No spills, no serialised WGMMA, shared memory within the device's limit."""
    wrong = [
        f"{kernel['name']}: {kernel['spilled']} bytes spilled with {kernel['registers']} registers"
        for kernel in report.kernels
        if kernel["spilled"]
    ]
    if (report.shared_bytes or 0) > SHARED_LIMIT:
        wrong.append(f"{report.shared_bytes} bytes of shared memory, above {SHARED_LIMIT}")
    return wrong + report.warnings


def against_record(report: Report, recorded: dict[str, Any] | None) -> list[str]:
    """Temporary bytes within TOLERANCE of the recorded ones, or less than a mebibyte from them."""
    if recorded is None:
        return ["nothing recorded: run with --record"]
    was, now = recorded["temporary_bytes"], report.temporary_bytes
    if abs(now - was) <= max(TOLERANCE * was, 2**20):
        return []
    return [f"{now:,} temporary bytes, recorded {was:,}"]


def of_program(report: Report, program: Program) -> list[str]:
    """No dense product over all experts, no gathered expert weight, no copy of the cache."""
    return [
        *dense_products(report.text, program),
        *gathered_experts(report.text, program),
        *cache_copies(report.text, program),
    ]


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product: its floating-point operations, its result's sizes, and the JAX operation it comes from."""

    flops: int
    sizes: tuple[int, ...]
    where: str | None


def products(text: str) -> Iterator[Product]:
    """Every matrix product of an optimised program: dots, also inside fusions, and cuBLAS calls."""
    computations, _ = computations_of(text)
    for instructions in computations.values():
        for one in instructions.values():
            contracted = _contracted(one)
            if contracted is None:
                continue
            left = _dims(instructions[one.operands[0]].type)
            # A cuBLAS call's result may be a tuple with its workspace: the first part is meant.
            out = tuple(_dims(one.type))
            flops = 2 * math.prod(out) * math.prod(left[d] for d in contracted)
            where = re.search(r'op_name="([^"]*)"', one.rest)
            yield Product(flops, out, where[1] if where else None)


def _dims(type_text: str) -> list[int]:
    match = SHAPE.search(type_text)
    assert match, type_text
    return [int(d) for d in match[2].split(",") if d]


def _contracted(one: Instruction) -> list[int] | None:
    """Dimensions of the left side that are summed over; None where this is no product."""
    if one.opcode == "dot":
        match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
        assert match, one
        return [int(d) for d in match[1].split(",") if d]
    if one.opcode == "custom-call" and re.search(r'custom_call_target="__cublas\$', one.rest):
        match = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', one.rest)
        assert match, one
        return [int(d) for d in json.loads(match[1])]
    return None


def dense_products(text: str, program: Program) -> list[str]:
    """Products of the expert layers as large as one over all experts for every token, whatever their shapes."""
    cfg = program.model
    each = program.tokens * cfg.n_routed_experts // program.expert
    limit = 2 * each * cfg.moe_intermediate_size * cfg.hidden_size
    return [
        f"{product.where}: a product of {product.flops:.2e} operations; all experts on all tokens take {limit:.2e}"
        for product in products(text)
        if product.flops >= limit
        # Without a name it may be theirs; the vocabulary's it is not.
        and ("experts" in product.where if product.where else cfg.vocab_size not in product.sizes)
    ]


TRAVELS = ("all-gather", "all-gather-start", "all-to-all", "collective-permute", "collective-permute-start")


def gathered_experts(text: str, program: Program) -> list[str]:
    """Expert weights that travel between devices: operands with both widths of an expert among their sizes, and as
    many elements as a device's experts have in one of their three matrices (tokens can have the first by chance)."""
    cfg = program.model
    width = cfg.moe_intermediate_size
    least = cfg.n_routed_experts // program.expert * width * cfg.hidden_size
    found = []
    computations, _ = computations_of(text)
    for instructions in computations.values():
        for one in instructions.values():
            if one.opcode not in TRAVELS:
                continue
            for name in one.operands:
                sizes = _dims(instructions[name].type) if name in instructions else []
                if cfg.hidden_size not in sizes or math.prod(sizes) < least:
                    continue
                others = list(sizes)
                others.remove(cfg.hidden_size)  # where 2 * width is the model's width, one size is not both
                if width in others or 2 * width in others:
                    found.append(f"{one.name}: {one.opcode} of {sizes}, an expert weight")
    return found


def cache_copies(text: str, program: Program) -> list[str]:
    """Instructions that copy or convert the whole latent cache: as many elements, in rows of a token's values."""
    if not program.cache_elements:
        return []
    width = program.model.kv_lora_rank + program.model.qk_rope_head_dim
    computations, _ = computations_of(text)
    return [
        f"{one.name}: {one.opcode} of the whole cache, {one.type}"
        for instructions in computations.values()
        for one in instructions.values()
        if one.opcode in ("copy", "copy-start", "convert", "transpose")
        and not one.type.startswith("(")
        and width in _dims(one.type)
        and math.prod(_dims(one.type)) == program.cache_elements
    ]
