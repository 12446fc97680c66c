"""Log-likelihoods are log_softmax of transformers' logits, whatever is scored beside a text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from convert import to_hf
from dsv3_jax.evaluation.scoring import BatchScorer, Text
from dsv3_jax.inference.load import open_model
from tests.inference import tiny
from tests.parity import hf


@pytest.mark.parametrize("name", ["v3", "v2"])
def test_log_likelihoods_are_transformers(name: str, tmp_path: Path) -> None:
    to_hf.convert(tiny.save(tmp_path, name), tmp_path / "hf")
    oracle = hf.load(tmp_path / "hf")
    opened = open_model(tmp_path / "hf", "float32")
    texts = [Text(tiny.prompt(n, n), start) for n, start in [(5, 1), (20, 19), (33, 8), (64, 40), (20, 4)]]
    texts += [Text([*tiny.prompt(12), last], 12) for last in (7, 70)]
    for text, score in zip(texts, BatchScorer(opened.cfg, opened.load(), rows=4).score(texts), strict=True):
        logits = torch.tensor(hf.logits(oracle, np.asarray([text.ids]))[0])
        all_TV = torch.log_softmax(logits, dim=-1).numpy()
        want = all_TV[np.arange(text.start - 1, len(text.ids) - 1), list(text.ids[text.start :])]
        np.testing.assert_allclose(score.logprobs, want, atol=5e-5)
        assert score.likeliest.tolist() == all_TV[text.start - 1 : -1].argmax(-1).tolist()
