"""Trees of variables with quantised leaves, for tests."""

import jax.numpy as jnp
import numpy as np

from dsv3_jax.hf.rules import flatten_paths, hf_entries, unflatten_paths
from dsv3_jax.model import abstract_variables
from dsv3_jax.quantization.choose import chosen_leaves
from dsv3_jax.quantization.formats import parse_format, quantize
from dsv3_jax.quantization.leaf import Quantized, quantized_leaf


def quantized_variables(cfg, variables, text):
    """The tree with its chosen leaves as `Quantized`, and the tree of what those stand for."""
    entries = {e.path: e for e in hf_entries(cfg, abstract_variables(cfg))}
    flat = flatten_paths(variables)
    coded = dict(flat)
    for path in chosen_leaves(flat):
        entry, leaf = entries[path], np.asarray(flat[path])
        matrices = leaf.reshape(*leaf.shape[: len(entry.index)], *entry.hf_shape)
        fmt = parse_format(text).fitting(matrices.shape[-1])
        if fmt is not None:
            coded[path] = quantized_leaf(
                quantize(matrices, fmt), fmt.coding(matrices.shape[-1]), entry.block_shape
            )
    whole = {
        p: leaf.astype(jnp.float32) if isinstance(leaf, Quantized) else leaf for p, leaf in coded.items()
    }
    return unflatten_paths(coded), unflatten_paths(whole)
