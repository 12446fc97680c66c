"""Where an engine's arrays are when it runs on several devices.

Rows, tiles and pages are cut over all devices: each holds the pages of its own rows and a scheduler's worth of them.
Experts are cut over the mesh axis "expert" by the rules of `parallel.rules`; everything else is on every device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.inference.weights import Weights
from dsv3_jax.parallel.dispatch import Dispatch, make_dispatch
from dsv3_jax.parallel.mesh import BATCH_AXES
from dsv3_jax.parallel.rules import compute_spec

HERE = P()


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh, or None for one device."""

    mesh: Mesh | None = None

    @property
    def axes(self) -> tuple[str, ...]:
        """Mesh axes that rows are cut over."""
        sizes = {} if self.mesh is None else dict(self.mesh.shape)
        return tuple(axis for axis in BATCH_AXES if sizes.get(axis, 1) > 1)

    @property
    def shards(self) -> int:
        """Parts that rows, tiles and pages are cut into."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in self.axes)

    @property
    def cut(self) -> P:
        """Of an array whose first dimension is rows, tiles or pages."""
        return P(self.axes) if self.axes else HERE

    @property
    def cut_second(self) -> P:
        """Of an array whose second dimension is rows."""
        return P(None, self.axes) if self.axes else HERE

    def check(self) -> None:
        """Raises ConfigError for a mesh that decoding cannot use."""
        if self.mesh is not None and self.mesh.shape.get("tensor", 1) > 1:
            raise ConfigError(
                f"mesh.tensor is {self.mesh.shape['tensor']}; decoding needs 1: use data and expert"
            )

    def dispatch(self, cfg: ModelConfig) -> Dispatch | None:
        """How tokens find their experts."""
        if self.mesh is None:
            return None
        platform = self.mesh.devices.flat[0].platform
        return make_dispatch(cfg, self.mesh.shape.get("expert", 1), platform=platform)

    def send(self, tree: Any, spec: P = HERE) -> Any:
        """Arrays of the host to the devices."""
        if self.mesh is None:
            return jax.device_put(tree)
        return jax.device_put(tree, NamedSharding(self.mesh, spec))

    def weight_specs(self, weights: Weights) -> Weights:
        """The partition of every weight."""
        mesh = self.mesh

        def spec(path: Any, leaf: Any) -> P:
            if mesh is None:
                return HERE
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            name = name.replace("/base", "")  # of a leaf with a LoRA pair
            parent, _, part = name.rpartition("/")
            # Of a quantised leaf or a LoRA pair: whole matrices, experts on their device.
            if part in ("codes", "scales", "zeros", "a", "b"):
                cut = "/experts/" in name and mesh.shape.get("expert", 1) > 1
                assert not cut or parent.rpartition("_")[2].startswith("E"), name
                return P("expert") if cut else HERE
            return compute_spec(name, leaf, mesh)

        return Weights(
            jax.tree_util.tree_map_with_path(spec, weights.top),
            [jax.tree_util.tree_map_with_path(spec, layer) for layer in weights.layers],
            jax.tree_util.tree_map_with_path(spec, weights.mtp),
        )

    def send_weights(self, weights: Weights) -> Weights:
        """Weights where they are used; as they are on one device."""
        if self.mesh is None:
            return weights
        mesh = self.mesh
        place = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))  # noqa: E731
        return jax.tree.map(place, weights, self.weight_specs(weights))

    def spread(
        self, function: Callable[..., Any], in_specs: Any, out_specs: Any, *, local: bool = True
    ) -> Any:
        """`function` jitted, each device with its own part; `local=False` leaves the parts to the partitioner.

        Returns a function of the arguments of `jax.jit` that makes it.
        """
        if self.mesh is None:
            return lambda **options: jax.jit(function, **options)
        mesh = self.mesh
        if local:
            function = jax.shard_map(
                function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
            )

        def shardings(specs: Any) -> Any:
            return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, P))

        return lambda **options: jax.jit(
            function, in_shardings=shardings(in_specs), out_shardings=shardings(out_specs), **options
        )
