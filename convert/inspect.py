"""Show what a checkpoint folder holds, from its config and headers.

    python -m convert.inspect DIR [--hashes]

DIR is a native checkpoint, a training run (its newest valid step) or a Hugging Face folder. Exit 65 when something
is wrong with it.
"""

from __future__ import annotations

import collections
from pathlib import Path

from tyro.conf import Positional

from convert.common import command
from dsv3_jax.checkpoint.layout import describe, kind_of
from dsv3_jax.checkpoint.manifest import problems_of
from dsv3_jax.checkpoint.source import Source, open_source
from dsv3_jax.errors import DataError
from dsv3_jax.hf.config import load_hf_config
from dsv3_jax.hf.rules import flatten_paths
from dsv3_jax.hf.safetensors import SafetensorsFolder


def active_parameters(source: Source) -> int:
    """Parameters that one token meets: of the routed experts only those chosen for it."""
    cfg, total = source.cfg, 0
    for path, leaf in flatten_paths(source.abstract).items():
        share = cfg.num_experts_per_tok / cfg.n_routed_experts if "/experts/" in path else 1
        size = 1
        for n in leaf.shape:
            size *= n
        total += round(size * share)
    return total


def facts(source: Source) -> list[tuple[str, str]]:
    """The rows of the table."""
    cfg = source.cfg
    stored: collections.Counter[str] = collections.Counter(tensor.dtype for tensor in source.tensors.values())
    disk = describe(source.folder)
    counts = collections.Counter(source.formats.values())
    formats = ", ".join(f"{count} {fmt}" for fmt, count in counts.most_common())
    layers = f"{cfg.num_dense_layers} dense + {cfg.num_moe_layers} expert"
    if cfg.num_nextn_predict_layers:
        layers += f" + {cfg.num_nextn_predict_layers} multi-token prediction"
    experts = f"{cfg.n_routed_experts} routed (top {cfg.num_experts_per_tok}) + {cfg.n_shared_experts} shared"
    rows = [
        ("kind", {"native": "native checkpoint", "hf": "Hugging Face folder"}[source.kind]),
        ("folder", str(source.folder)),
        ("family", cfg.model_type),
        ("step", "" if source.step is None else f"{source.step:,}"),
        ("parameters", f"{source.count_parameters():,} ({active_parameters(source):,} active per token)"),
        ("layers", layers),
        ("experts", experts if cfg.num_moe_layers else "none"),
        ("width", f"{cfg.hidden_size}, {cfg.num_attention_heads} heads, vocabulary {cfg.vocab_size:,}"),
        ("tensors", f"{len(source.entries):,} + {len(source.aliases)} copies of another"),
        ("dtypes", ", ".join(f"{name} {count:,}" for name, count in stored.most_common())),
        ("quantised", f"{formats} of {len(source.leaf_dtypes)} leaves" if formats else ""),
        ("on disk", f"{disk['bytes'] / 1e9:.3f} GB in {disk['files']:,} files"),
        ("tokenizer", "none" if source.tokenizer_dir is None else str(source.tokenizer_dir)),
    ]
    return [row for row in rows if row[1]]


def bare_facts(folder: Path) -> list[tuple[str, str]]:
    """What can be said of a folder that does not fit its config or manifest."""
    disk = describe(folder)
    rows = [("kind", f"{kind_of(folder)}, not whole"), ("folder", str(folder))]
    if kind_of(folder) == "hf":
        stored = collections.Counter(tensor.dtype for tensor in SafetensorsFolder(folder).tensors.values())
        rows.append(("family", load_hf_config(folder)[0].model_type))
        rows.append(("dtypes", ", ".join(f"{name} {count:,}" for name, count in stored.most_common())))
    return [*rows, ("on disk", f"{disk['bytes'] / 1e9:.3f} GB in {disk['files']:,} files")]


def show(rows: list[tuple[str, str]]) -> None:
    """Print rows of a table."""
    for name, value in rows:
        print(f"{name:<10}  {value}")


def main(folder: Positional[Path], hashes: bool = False) -> None:
    """Show what a checkpoint folder holds.

    Args:
      folder: native checkpoint, training run folder, or Hugging Face folder.
      hashes: of a native checkpoint read every byte and compare its SHA-256.
    """
    from dsv3_jax.model import abstract_variables

    try:
        source = open_source(folder, abstract_variables)
    except DataError:
        show(bare_facts(folder))
        raise
    show([*facts(source), *(("note", note) for note in source.notes)])
    if source.kind == "native" and hashes:
        problems = problems_of(source.folder, hashes=True)
        if problems:
            raise DataError("\n  ".join([f"{folder}: {len(problems)} problem(s)", *problems[:50]]))
    show([("problems", "none")])


if __name__ == "__main__":
    command("inspect", main)
