"""The engine over eight simulated devices: rows and pages cut over all of them, experts over their axis."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from dsv3_jax.config import MeshConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.inference import Engine, EngineOptions, Request, Result, Sampling
from dsv3_jax.parallel.mesh import make_mesh
from tests.inference import tiny
from tests.quantization.coded import quantized_variables

OPTIONS = EngineOptions(rows=8, page_size=16, prefill_tiles=8, tile=8, max_logprobs=2, context=128)


def engine(mesh: jax.sharding.Mesh | None, quantized: str = "", **options: int) -> Engine:
    sizes = {**OPTIONS.__dict__, **options}
    variables = tiny.variables("v3")
    if quantized:
        variables, _ = quantized_variables(tiny.V3, variables, quantized)
    return Engine(
        tiny.V3,
        variables,
        options=EngineOptions(**sizes),
        eos_ids=tiny.V3.eos_token_id,
        vocab_limit=tiny.VOCAB_LIMIT,
        mesh=mesh,
    )


def close(got: Result, want: Result) -> bool:
    """The same tokens, and log-probabilities to 1e-4: the sums over experts are of other lengths."""
    assert got.token_ids == want.token_ids and got.finish_reason == want.finish_reason
    for ours, theirs in ((got.logprobs, want.logprobs), (got.prompt_logprobs, want.prompt_logprobs)):
        assert (ours is None) == (theirs is None)
        for one, other in zip(ours or [], theirs or [], strict=True):
            if one is not None and other is not None:
                np.testing.assert_allclose(one["logprob"], other["logprob"], atol=1e-4)
    return True


def test_eight_devices_give_what_one_gives() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, expert=4, tensor=1))
    requests = [
        Request(
            tiny.prompt(3 + 9 * at, at % 3),
            Sampling(
                max_new_tokens=5 + at,
                temperature=0.8 * (at % 2),
                logprobs=2,
                prompt_logprobs=1 if at % 5 == 0 else None,
                presence_penalty=0.5 * (at % 4 == 1),
            ),
            at,
        )
        for at in range(11)
    ]
    want = tiny.finish(engine(None), requests)
    over = engine(mesh)
    over.warm()
    compiled = over.stats.programs
    got = tiny.finish(over, requests)
    assert all(close(got[at], want[at]) for at in range(len(requests)))
    assert over.stats.programs == compiled
    over.scheduler.check()
    assert over.scheduler.pool.used == 0
    experts = over._device._weights.layers[1]["params"]["mlp"]["experts"]["gate_up_EPFD"]
    assert experts.addressable_shards[0].data.shape[0] == tiny.V3.n_routed_experts // 4
    pages = over._device._memory.latent_NPJ
    assert pages.addressable_shards[0].data.shape[0] == pages.shape[0] // 8
    counts = over.expert_counts()
    tokens = over.stats.prefill_tokens + sum(max(len(got[at].token_ids) - 1, 0) for at in got)
    assert counts is not None and counts.sum() >= tokens * tiny.V3.num_experts_per_tok

    # On a mesh, too, a request gives the same bits alone and in company.
    for at in (0, 4, 9):
        over.scheduler.pool.clear()
        alone = tiny.finish(over, [requests[at]])[at]
        assert alone == got[at]


def test_sizes_that_do_not_divide_are_refused() -> None:
    mesh = make_mesh(MeshConfig(data=8, fsdp=1, expert=1, tensor=1))
    for sizes, message in (({"rows": 4}, "rows is 4"), ({"prefill_tiles": 2}, "prefill-tiles is 2")):
        with pytest.raises(ConfigError, match=f"{message}; expected a multiple of 8"):
            engine(mesh, **sizes)
    with pytest.raises(ConfigError, match="pages is 20; expected a multiple of 8"):
        engine(mesh, pages=20)
    tensor = make_mesh(MeshConfig(data=4, fsdp=1, expert=1, tensor=2))
    with pytest.raises(ConfigError, match=r"mesh\.tensor is 2"):
        engine(tensor)


def test_quantised_experts_stay_on_their_devices() -> None:
    """Codes and scales cut over the expert axis: the same tokens as on one device."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, expert=4, tensor=1))
    requests = [
        Request(tiny.prompt(5 + 3 * at, at), Sampling(max_new_tokens=6, logprobs=1), at) for at in range(4)
    ]
    want = tiny.finish(engine(None, "int8"), requests)
    over = engine(mesh, "int8")
    got = tiny.finish(over, requests)
    assert all(close(got[at], want[at]) for at in range(len(requests)))
    experts = over._device._weights.layers[-1]["params"]["mlp"]["experts"]["gate_up_EPFD"]
    assert experts.codes.sharding.shard_shape(experts.codes.shape)[0] * 4 == tiny.V3.n_routed_experts
