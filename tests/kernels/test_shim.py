"""One spelling of Pallas Mosaic GPU on every supported jax."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import export

from dsv3_jax.kernels import shim
from dsv3_jax.kernels.shim import pl, plgpu

needs_mosaic = pytest.mark.skipif(shim.why_not_mosaic() is not None, reason=str(shim.why_not_mosaic()))
needs_interpreter = pytest.mark.skipif(
    shim.why_not_interpret() is not None, reason=str(shim.why_not_interpret())
)


def test_importing_touches_no_device():
    program = (
        "import dsv3_jax.kernels.shim, dsv3_jax.kernels.registry, dsv3_jax.kernels.attention\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, xla_bridge._backends\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("Tesla T4", "T4"), ("cpu", "cpu")],
)  # fmt: skip
def test_devices_are_named_by_family(kind, name):
    assert shim.family(kind) == name


def test_the_target_is_the_device_traced_for():
    assert shim.target().platform == "cpu"
    with shim.compiling_for("NVIDIA H200", 132):
        assert shim.target() == shim.Target("gpu", "H200", 132)
        assert shim.sm_count() == 132


def doubled(x):
    """2 x through shared memory, with the first half of the rows read and written apart."""

    def body(x_ref, out_ref, tile, barrier):
        plgpu.copy_gmem_to_smem(x_ref, tile, barrier)
        plgpu.barrier_wait(barrier)
        tile[...] = shim.load(tile) * 2
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, out_ref)
        plgpu.wait_smem_to_gmem(0)

    run = shim.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()],
        compiler_params=shim.compiler_params(),
        cost_estimate=pl.CostEstimate(flops=x.size, transcendentals=0, bytes_accessed=2 * x.nbytes),
    )
    return run(x)


@needs_mosaic
def test_a_kernel_lowers_for_cuda_on_a_machine_without_a_gpu():
    x = jax.ShapeDtypeStruct((128, 128), jnp.float32)
    custom = [export.DisabledSafetyCheck.custom_call(name) for name in ("mosaic_gpu", "mosaic_gpu_v2")]
    with shim.compiling_for():
        text = export.export(jax.jit(doubled), platforms=["cuda"], disabled_checks=custom)(x).mlir_module()
    assert "mosaic_gpu" in text


@needs_interpreter
def test_a_kernel_is_interpreted_and_only_inside_the_context():
    x = jnp.arange(128 * 128, dtype=jnp.float32).reshape(128, 128)
    function = jax.jit(doubled)
    with shim.interpret(detect_races=True):
        assert shim.interpreting()
        assert (function(x) == 2 * x).all()
    assert not shim.interpreting()
    with pytest.raises(ValueError, match="interpret"):
        function(x)
