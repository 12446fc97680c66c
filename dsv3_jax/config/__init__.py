"""Configuration: frozen dataclasses, the legend of dimension letters, YAML files.

`ModelConfig` describes one model of the family and uses Hugging Face's key names. `RunConfig` describes a
training run and holds a `ModelConfig`. Merge order: file, then flags.
"""

from dsv3_jax.config.files import dump_yaml, from_mapping, load_yaml, nearest, to_mapping
from dsv3_jax.config.kernels import AUTO_KERNELS, Kernels, parse_kernels
from dsv3_jax.config.model import LEGEND, ModelConfig, RopeScaling, dims, shape_of
from dsv3_jax.config.run import (
    MESH_PRESETS,
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    InitConfig,
    LoggingConfig,
    LoraConfig,
    MeshConfig,
    MixtureSource,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    RunSection,
    TrainingConfig,
)

__all__ = [
    "AUTO_KERNELS",
    "LEGEND",
    "MESH_PRESETS",
    "CheckpointConfig",
    "DataConfig",
    "DistributedConfig",
    "InitConfig",
    "Kernels",
    "LoggingConfig",
    "LoraConfig",
    "MeshConfig",
    "MixtureSource",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RopeScaling",
    "RunConfig",
    "RunSection",
    "TrainingConfig",
    "dims",
    "dump_yaml",
    "from_mapping",
    "load_yaml",
    "nearest",
    "parse_kernels",
    "shape_of",
    "to_mapping",
]
