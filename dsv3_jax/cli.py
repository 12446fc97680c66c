"""Command line of a training run: a config file, then flags on top of it."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from dsv3_jax.config import (
    MixtureSource,
    RunConfig,
    RunSection,
    TrainingConfig,
    from_mapping,
    load_yaml,
    nearest,
    to_mapping,
)
from dsv3_jax.errors import ConfigError
from dsv3_jax.hf.any_config import load_model_config

_REGISTRY = tyro.constructors.ConstructorRegistry()
USAGE = "python train.py --config FILE [--run.dir DIR] [--launch local:N] [--section.key VALUE ...]"


def load_run_config(path: str | Path, lora_base: str | None = None) -> RunConfig:
    """A RunConfig from a run's YAML; or the defaults with the model of anything that holds a model's config.

    Such a thing is a Hugging Face config.json or folder, a native checkpoint, or a YAML of the model's keys alone.
    A YAML file without a `run.name` gives the run its own name. With a `lora.base` in the file, or given, the model is
    the base's, and keys of the file's `model` add to it. Raises ConfigError naming file and key.
    """
    path = Path(path)
    data = {} if path.is_dir() or path.suffix == ".json" else load_yaml(path)
    if "model" not in data and _base_of(data) is None and not (data and lora_base):
        model, _ = load_model_config(path)
        name = path.stem if path.is_dir() or path.suffix != ".json" else path.absolute().parent.name
        training = TrainingConfig(seq_len=min(TrainingConfig().seq_len, model.max_position_embeddings))
        return RunConfig(model=model, run=RunSection(name=name), training=training)
    base = lora_base or _base_of(data)
    if base is not None:  # the model is the base's; the file's keys add to it
        model, _ = load_model_config(base)
        data = {**data, "model": {**to_mapping(model), **(data.get("model") or {})}}
        lora = data.get("lora")
        if isinstance(lora, dict) and lora.get("rank"):
            data["lora"] = {**lora, "base": base}
    run = data.get("run") or {}
    try:
        named = {"name": path.stem, **run} if isinstance(run, dict) else run
        return from_mapping(RunConfig, {**data, "run": named})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_run_config(arguments: Sequence[str]) -> RunConfig:
    """The run's config from command-line arguments; flags override the file.

    Without --config, that of an existing --run.dir is used, else the model of --init.checkpoint or --lora.base.
    Raises ConfigError (exit 2) naming the flag; prints the help and exits 0 for --help.
    """
    arguments = list(arguments)
    help_asked = any(argument in ("-h", "--help") for argument in arguments)
    path, rest = _take(arguments, "--config")
    base = _take(rest, "--lora.base")[0]
    if path is None:
        folder = _take(rest, "--run.dir")[0]
        init = _take(rest, "--init.checkpoint")[0] or base
        run_config = None if folder is None else Path(folder) / "config.yaml"
        if run_config is not None and run_config.is_file():
            path = str(run_config)
        elif init is not None:
            path = init
        elif not help_asked:
            raise ConfigError(f"--config is missing. Usage: {USAGE}")
    default = RunConfig() if path is None else load_run_config(path, base)
    return tyro.cli(
        RunConfig,
        prog="train.py --config FILE",
        default=default,
        args=rest if help_asked else list(_checked(rest, default)),
        use_underscores=True,
        registry=_REGISTRY,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
    )


@_REGISTRY.primitive_rule
def _mixture_flag(info: Any) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """`--data.mixture NAME=WEIGHT,NAME=WEIGHT`."""
    if info.type != tuple[MixtureSource, ...]:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME=WEIGHT,...",
        instance_from_str=lambda values: parse_mixture(values[0]),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda mixture: [",".join(f"{part.source}={part.weight:g}" for part in mixture)],
    )


def parse_mixture(text: str) -> tuple[MixtureSource, ...]:
    """The flag form of `data.mixture`; nothing for an empty text. Raises ConfigError naming the part."""
    parts = []
    for part in filter(None, text.split(",")):
        source, equals, weight = part.rpartition("=")
        try:
            parts.append(MixtureSource(source, float(weight)))
        except ValueError as error:
            told = (
                error
                if isinstance(error, ConfigError) and equals
                else "expected NAME=WEIGHT, such as python-docs=0.7"
            )
            raise ConfigError(f"--data.mixture: {part!r}: {told}") from None
    return tuple(parts)


def _base_of(data: Mapping[str, Any]) -> str | None:
    """`lora.base` of a run's YAML."""
    lora = data.get("lora")
    base = lora.get("base") if isinstance(lora, Mapping) else None
    return base if isinstance(base, str) else None


def _take(arguments: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of `flag` (the last one given) and the other arguments."""
    value, rest, at = None, [], 0
    while at < len(arguments):
        argument = arguments[at]
        if argument == flag:
            if at + 1 == len(arguments):
                raise ConfigError(f"{flag} needs a value")
            value, at = arguments[at + 1], at + 1
        elif argument.startswith(f"{flag}="):
            value = argument.partition("=")[2]
        else:
            rest.append(argument)
        at += 1
    return value, rest


def _flags(config: Any, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """Every flag of a config dataclass and the type of its value."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _flags(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", hints[field.name]


def _checked(arguments: list[str], default: RunConfig) -> Iterator[str]:
    """The arguments with flags spelled as tyro knows them; an unknown flag is refused with the nearest valid one.

    Values may be written as in YAML: true, false, null.
    """
    known = dict(_flags(default))
    hint: Any = None
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            name = name.replace("-", "_").replace("__", "--", 1)
            if name not in known:
                names = [*known, "--config"]
                close = nearest(name, names)
                told = close if close.startswith("did") else "--help lists all"
                raise ConfigError(f"unknown flag {name!r}; {told}")
            hint = known[name]
            yield f"{name}={_value(value, hint)}" if equals else name
        elif hint is None:
            raise ConfigError(f"unexpected argument {argument!r}. Usage: {USAGE}")
        else:
            yield _value(argument, hint)


def _value(text: str, hint: Any) -> str:
    if hint is bool and text.lower() in ("true", "false"):
        return text.capitalize()
    optional = typing.get_origin(hint) in (typing.Union, types.UnionType) and type(None) in typing.get_args(
        hint
    )
    return "None" if optional and text.lower() in ("null", "none") else text
