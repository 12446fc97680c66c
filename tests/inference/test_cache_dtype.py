"""A cache in codes keeps the engine's promises, costs little and takes the bytes that it says."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from dsv3_jax.config import MeshConfig, ModelConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.inference import Engine, EngineOptions, Request, Sampling, settings
from dsv3_jax.kernels.mla_decode import CodedPages
from dsv3_jax.model import init_variables
from dsv3_jax.parallel.mesh import make_mesh
from tests.inference import exactness, tiny
from tests.inference.test_speculative import Always

V3 = ModelConfig(kv_lora_rank=512, qk_rope_head_dim=64, num_hidden_layers=61, dtype="bfloat16")
V32 = dataclasses.replace(
    V3, index_n_heads=64, index_head_dim=128, index_topk=2048, model_type="deepseek_v32"
)


CODED = pytest.mark.parametrize(("name", "dtype"), [("v3", "int8"), ("v3", "fp8"), ("v32", "fp8")])
OPTIONS: dict[str, Any] = dict(pages=26)  # one set of compiled programs a model and format


@CODED
def test_prompts_are_scored_almost_as_without_a_cache(name: str, dtype: str) -> None:
    ids = tiny.prompt(60)  # over several pages and tiles
    request = Request(ids, Sampling(1, prompt_logprobs=0))
    found = tiny.finish(tiny.engine(name, cache_dtype=dtype, **OPTIONS), [request])[0].prompt_logprobs
    got = [entry["logprob"] for entry in (found or [])[1:] if entry is not None]
    logits = tiny.full_logits(name, ids).astype(np.float64)
    want = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(59), ids[1:]]
    off = np.abs(np.asarray(got) - want)
    assert len(off) == 59
    # More than sums in another order are: numbers were rounded. (V3.2 may select other tokens of about equal scores.)
    assert 1e-4 < np.median(off) < {"int8": 0.02, "fp8": 0.1}[dtype]


@CODED
def test_a_request_gets_the_same_bits_in_any_company(name: str, dtype: str) -> None:
    """Chunks, neighbours, prefix hits, lost pages; and nothing compiled after the first request."""
    engine = tiny.engine(name, cache_dtype=dtype, **OPTIONS)
    engine.warm()
    compiled = engine.stats.programs
    seen = sum((exactness.check_case(engine, seed) for seed in range(5)), start=collections.Counter())
    assert seen["cases"] == 5 and seen["neighbours"] > 10
    assert engine.stats.preemptions > 0 and engine.stats.prefix_hit_tokens > 0
    assert engine.stats.programs == compiled


SMALL = dataclasses.replace(tiny.V3, num_hidden_layers=1, num_nextn_predict_layers=1)
"""One dense layer and a multi-token module: little to compile."""


def small_engine(mesh: Any = None, **options: Any) -> Engine:
    sizes = dict(rows=8, page_size=16, prefill_tiles=8, tile=8, max_logprobs=None, context=128)
    cfg = SMALL if options.get("speculative") else dataclasses.replace(SMALL, num_nextn_predict_layers=0)
    return Engine(
        cfg,
        init_variables(cfg, jax.random.key(7)),
        options=EngineOptions(**sizes | {"cache_dtype": "fp8"} | options),
        eos_ids=cfg.eos_token_id,
        vocab_limit=tiny.VOCAB_LIMIT,
        mesh=mesh,
    )


def test_drafts_and_devices_do_not_change_the_text() -> None:
    """The drafts' module has its own layer of pages; each of eight devices has the pages of its rows."""
    requests = [Request(tiny.prompt(5 + 9 * at, at), Sampling(8, ignore_eos=True), at) for at in range(5)]
    want = tiny.finish(small_engine(), requests)
    assert len({tuple(result.token_ids) for result in want.values()}) > 1
    ahead = small_engine(speculative=2)
    ahead._pace = Always()
    over = small_engine(make_mesh(MeshConfig(data=8, fsdp=1, expert=1, tensor=1)))
    for engine in (ahead, over):
        got = tiny.finish(engine, requests)
        assert [got[at].token_ids for at in range(5)] == [want[at].token_ids for at in range(5)]
    assert ahead.stats.drafted > 0
    pages = over._device._memory.latent_NPJ
    assert isinstance(pages, CodedPages)
    for part in jax.tree.leaves(pages):
        assert part.addressable_shards[0].data.shape[0] * 8 == pages.shape[0]


def test_bytes_of_a_token_are_those_of_the_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny.engine("v32", cache_dtype="fp8", **OPTIONS)
    memory, options = engine._device._memory, engine.options
    nbytes = sum(x.nbytes for x in jax.tree.leaves((memory.latent_NPJ, memory.index_NPZ)))
    assert settings.token_bytes(tiny.V32, "fp8") * 26 * options.page_size == nbytes

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(settings, "free_bytes", lambda: 10**9)
    for dtype in ("int8", "fp8"):
        for cfg, bfloat16, codes in ((V3, 1152, 656), (V32, 1408, 788)):
            assert settings.token_bytes(cfg, "bfloat16") == 61 * bfloat16
            # 512 + 4 * 4 + 64 * 2; 128 + 4 of an index key
            assert settings.token_bytes(cfg, dtype) == 61 * codes
        pages = [settings.resolve(EngineOptions(cache_dtype=name), V3).pages for name in ("bfloat16", dtype)]
        assert pages == [222, 390]


def test_other_types_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="cache-dtype is 'int4'; expected one of float32, bfloat16, int8, fp8"
    ):
        EngineOptions(cache_dtype="int4")
