"""A plan's advice can be followed, its pictures show every device, its time follows from rates and bytes."""

from __future__ import annotations

import dataclasses
import functools
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from dsv3_jax.cli import parse_run_config
from dsv3_jax.config import RunConfig
from dsv3_jax.parallel import mesh_shape
from dsv3_jax.planning import picture, show
from dsv3_jax.planning.collectives import Collective
from dsv3_jax.planning.hardware import HARDWARE, LINK_SHARE, MATMUL_SHARE, hardware
from dsv3_jax.planning.memory import abstract_mesh, memory
from dsv3_jax.planning.plan import Compiled, Plan, make_plan, times_of_step

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# A sixteenth of Moonlight's layers: two nodes, quick to trace.
SMALL = ["--config", str(CONFIGS / "moonlight-16b-a3b.yaml"), "--model.num_hidden_layers", "3"]
TWO_NODES = [
    *SMALL,
    "--mesh.fsdp",
    "4",
    "--mesh.expert",
    "4",
    "--training.batch_size",
    "64",
    "--training.accumulate",
    "2",
]


@functools.cache
def plan_of(*flags: str, devices: int = 16) -> Plan:
    return make_plan(parse_run_config([*TWO_NODES, *flags]), devices, hardware("h100"), compiles=False)


def peak_of(cfg: RunConfig, devices: int) -> int:
    return memory(cfg, abstract_mesh(mesh_shape(cfg.mesh, devices))).peak


def test_what_helps_can_be_followed_to_the_byte() -> None:
    plan = plan_of("--training.remat", "none", "--training.batch_size", "1024")
    assert not plan.fits and len(plan.knobs) >= 3
    assert min(knob.peak for knob in plan.knobs) <= plan.usable
    assert all(knob.peak < plan.memory.peak for knob in plan.knobs)
    flags = ["--training.remat", "none", "--training.batch_size", "1024"]
    for knob in plan.knobs:
        devices = re.search(r"--devices (\d+)", knob.flags)
        change = re.sub(r"--devices \d+ ?", "", knob.flags).split()
        cfg = parse_run_config([*TWO_NODES, *flags, *change])
        assert peak_of(cfg, int(devices[1]) if devices else 16) == knob.peak, knob
    text = show.text(plan)
    assert "DOES NOT FIT" in text and "What helps" in text and plan.knobs[0].flags in text


def test_a_plan_that_fits_needs_no_advice() -> None:
    plan = plan_of()
    assert plan.fits and not plan.knobs and plan.times is None
    assert "FITS" in show.text(plan) and "What helps" not in show.text(plan)


def test_parts_of_the_peak_add_up() -> None:
    need = plan_of().memory
    assert sum(size for _, size, _ in show.memory_rows(plan_of())) == need.peak == need.phases[need.phase]


def test_links_of_each_axis() -> None:
    links = {axis: link for axis, _, link, _ in show.axis_rows(plan_of())}
    assert links == {"data": "-", "fsdp": "NVLink for 2, network between", "expert": "NVLink", "tensor": "-"}
    large = dataclasses.replace(plan_of(), mesh={"data": 8, "fsdp": 4, "expert": 64, "tensor": 1})
    links = {axis: link for axis, _, link, _ in show.axis_rows(large)}
    assert links["data"] == links["fsdp"] == "network" and links["expert"] == "NVLink for 8, network between"


@pytest.mark.parametrize(
    "mesh",
    [(1, 1, 1, 1), (1, 4, 4, 1), (3, 2, 1, 2), (8, 4, 64, 1)],
    ids=["one device", "two nodes", "a node and a half", "2,048 devices"],
)
def test_the_picture_shows_every_device_once(mesh: tuple[int, int, int, int]) -> None:
    sizes = dict(zip(("data", "fsdp", "expert", "tensor"), mesh, strict=True))
    plan = dataclasses.replace(plan_of(), mesh=sizes)
    svg = ElementTree.fromstring(picture.mesh_svg(plan))
    titles = [
        e.text for e in svg.iter("{http://www.w3.org/2000/svg}title") if (e.text or "").startswith("device")
    ]
    assert len(titles) == len(set(titles)) == plan.devices
    last = ", ".join(f"{axis} {size - 1}" for axis, size in sizes.items())
    assert titles[-1] == f"device {plan.devices - 1}: {last}"
    text = show.mesh_text(plan)
    assert f"{plan.devices:,} device" in text
    if plan.devices <= 64:
        assert all(re.search(rf"[\[| ] *{n}\b", text) for n in range(plan.devices))


def test_the_page_needs_nothing_else() -> None:
    page = picture.page(plan_of("--training.remat", "none", "--training.batch_size", "1024"))
    links = set(re.findall(r'(?:src|href|url)\W+([^"\s>]+)', page))
    assert links == set() and "What helps" in page and "does not fit" in page


def test_time_is_bytes_and_operations_over_rates() -> None:
    plan, gpu = plan_of(), HARDWARE["h100"]
    inside = Collective("all-gather", 10**9, 8, 9, 8, True, "", "bf16")  # 63 GB over NVLink
    across = Collective("all-to-all", 16 * 10**9, 16, 1, 8, True, "", "bf16")  # 8 GB of it to the other node
    uneven = dataclasses.replace(across, counted=False)
    times = times_of_step(plan.memory, 1e15, 2e15, (inside, across, uneven), gpu, "bfloat16")
    assert times.compute == pytest.approx(2e15 / gpu.flops / MATMUL_SHARE)
    assert times.communication == pytest.approx((63e9 / 450e9 + 8e9 / 50e9) / LINK_SHARE)
    assert times.exposed == pytest.approx(times.compute + times.communication + times.update)
    assert times.expected == pytest.approx(max(times.compute, times.communication) + times.update)
    assert times.mfu == pytest.approx(1e15 / gpu.flops / times.expected)
    slow = times_of_step(plan.memory, 1e15, 2e15, (), gpu, "float32")
    assert slow.compute == pytest.approx(2e15 / gpu.flops32 / MATMUL_SHARE)
    shown = dataclasses.replace(
        plan, times=times, compiled=Compiled(1.0, 2.0, 0, 0, (inside, across, uneven))
    )
    assert "further exchanges (15.00 GB for one a layer)" in show.text(shown)
