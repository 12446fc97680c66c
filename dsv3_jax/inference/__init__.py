"""Decoding: the engine (token ids only), sampling, and batch jobs over files of prompts."""

from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.options import Sampling
from dsv3_jax.inference.requests import Request, Result, Update
from dsv3_jax.inference.settings import EngineOptions

__all__ = ["Engine", "EngineOptions", "Request", "Result", "Sampling", "Update"]
