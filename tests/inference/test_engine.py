"""The engine: the same tokens as the model without a cache, and as alone, whatever the neighbours."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.errors import DataError
from dsv3_jax.inference import Engine, EngineOptions, Request, Sampling, Update, steps
from dsv3_jax.inference.progress import summary
from dsv3_jax.inference.weights import unstack_layers
from dsv3_jax.model import Cache, PagedCache, Transformer, init_variables, make_cache, make_pages
from tests.inference import exactness, tiny


@pytest.fixture(scope="module", params=["v3", "v2", "v32"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny.engine("v3")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_greedy_is_that_of_the_model_without_a_cache(family: str) -> None:
    sampling = Sampling(max_new_tokens=20, ignore_eos=True, logprobs=2)
    prompts = [tiny.prompt(n) for n in (1, 17, 30)]
    found = tiny.finish(tiny.engine(family), [Request(ids, sampling, at) for at, ids in enumerate(prompts)])
    for at, ids in enumerate(prompts):
        new = found[at].token_ids
        assert len(new) == 20
        # Given what came before, every token is the likeliest one of a pass over all of them at once.
        logits = tiny.full_logits(family, ids + new)[len(ids) - 1 : -1]
        assert logits[:, : tiny.VOCAB_LIMIT].argmax(-1).tolist() == new


def test_tokens_and_logprobs_do_not_depend_on_neighbours_or_order(family: str) -> None:
    engine, rng = tiny.engine(family), random.Random(3)
    lengths = [1, 9, 30, 40, 60]
    requests = [
        Request(
            tiny.prompt(rng.choice(lengths), at),
            Sampling(
                max_new_tokens=rng.choice([1, 6, 30, 150]),
                temperature=rng.choice([0, 0.8, 1.5]),
                top_k=rng.choice([0, 5]),
                top_p=rng.choice([1, 0.8]),
                min_p=rng.choice([0, 0.1]),
                seed=rng.randrange(3),
                logprobs=2,
            ),
            at,
        )
        for at in range(12)
    ]
    together = tiny.finish(engine, requests)
    assert {result.finish_reason for result in together.values()} == {"stop", "length"}
    shuffled = rng.sample(requests, len(requests))
    assert tiny.finish(engine, shuffled) == together
    for request in requests[:4]:
        assert tiny.finish(engine, [request])[request.index] == together[request.index]


def test_other_options_and_lengths_need_no_other_program(engine: Engine) -> None:
    first = [Request(tiny.prompt(5), Sampling(max_new_tokens=9, logprobs=2), 0)]
    tiny.finish(engine, first)
    compiled = engine.stats.programs
    others = [
        Request(
            tiny.prompt(3 + at),
            Sampling(10 + at, temperature=at / 3, top_k=at, top_p=0.9, min_p=0.1, seed=at, logprobs=2),
            at,
        )
        for at in range(5)
    ]
    tiny.finish(engine, others)
    assert engine.stats.programs == compiled


def test_seed_prompt_and_position_give_the_draw(engine: Engine) -> None:
    def text(seed: int, ids: list[int]) -> list[int]:
        sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=seed, ignore_eos=True, logprobs=2)
        return tiny.finish(engine, [Request(ids, sampling)])[0].token_ids

    ids = tiny.prompt(8)
    assert text(1, ids) == text(1, ids)
    assert text(1, ids) != text(2, ids)


def test_end_of_sequence_ends_a_row_and_is_not_kept() -> None:
    ids = tiny.prompt(6)
    whole = tiny.finish(tiny.engine("v3"), [Request(ids, Sampling(8, ignore_eos=True, logprobs=2))])[
        0
    ].token_ids
    assert len(whole) == 8
    cut = next(at for at in range(2, 8) if whole[at] not in whole[:at])
    ending = tiny.engine("v3", eos_ids=[269, whole[cut]])
    result = tiny.finish(ending, [Request(ids, Sampling(8, logprobs=2))])[0]
    assert (result.token_ids, result.finish_reason) == (whole[:cut], "stop")
    assert result.logprobs is not None and len(result.logprobs) == cut
    on = tiny.finish(ending, [Request(ids, Sampling(8, ignore_eos=True, logprobs=2))])[0]
    assert (on.token_ids, on.finish_reason) == (whole, "length")


def test_watch_ends_a_row_where_it_says(engine: Engine) -> None:
    ids = tiny.prompt(6)
    sampling = Sampling(max_new_tokens=30, ignore_eos=True, logprobs=2)
    whole = tiny.finish(engine, [Request(ids, sampling)])[0]
    seen: list[int] = []

    def watch(_: Request, new: list[int]) -> int | None:
        seen.extend(new)
        return len(new) - (len(seen) - 8) if len(seen) >= 8 else None

    cut = tiny.finish(engine, [Request(ids, sampling)], watch)[0]
    assert (cut.token_ids, cut.finish_reason) == (whole.token_ids[:8], "stop")
    assert whole.logprobs is not None and cut.logprobs == whole.logprobs[:8]


def test_logprobs_are_of_the_raw_logits(engine: Engine) -> None:
    ids = tiny.prompt(12)
    sampling = Sampling(max_new_tokens=5, temperature=3.0, top_k=2, logprobs=2, ignore_eos=True)
    result = tiny.finish(engine, [Request(ids, sampling)])[0]
    want = log_softmax(tiny.full_logits("v3", ids + result.token_ids)[len(ids) - 1 : -1])
    assert result.logprobs is not None
    for at, (entry, token) in enumerate(zip(result.logprobs, result.token_ids, strict=True)):
        assert entry["token_id"] == token
        assert entry["logprob"] == pytest.approx(want[at, token], abs=1e-4)
        assert [index for index, _ in entry["top"]] == np.argsort(-want[at], kind="stable")[:2].tolist()
        np.testing.assert_allclose(
            [value for _, value in entry["top"]], np.sort(want[at])[::-1][:2], atol=1e-4
        )


@pytest.mark.parametrize("new", [0, 3])
def test_prompt_logprobs_score_every_token_given_those_before(
    monkeypatch: pytest.MonkeyPatch, new: int
) -> None:
    monkeypatch.setattr(
        steps, "SCORE_FLOATS", 4 * 270 * 5
    )  # chunks of 5 of a tile's 8 tokens, the last shorter
    engine = tiny.engine("v3")
    prompts = [tiny.prompt(32), tiny.prompt(1), tiny.prompt(20)]
    requests = [
        Request(ids, Sampling(new, logprobs=2, prompt_logprobs=at, ignore_eos=True), at)
        for at, ids in enumerate(prompts)
    ]
    found = tiny.finish(engine, requests)
    for at, ids in enumerate(prompts):
        entries = found[at].prompt_logprobs
        assert found[at].finish_reason == "length" and len(found[at].token_ids) == new
        assert entries is not None and len(entries) == len(ids) and entries[0] is None
        want = log_softmax(tiny.full_logits("v3", ids))
        for t, entry in enumerate(entries[1:], 1):
            assert entry is not None and entry["token_id"] == ids[t] and len(entry["top"]) == at
            assert entry["logprob"] == pytest.approx(want[t - 1, ids[t]], abs=1e-4)


def test_nothing_asked_nothing_computed(engine: Engine) -> None:
    before = engine.stats.prefill_tokens
    result = tiny.finish(engine, [Request(tiny.prompt(4), Sampling(max_new_tokens=0))])[0]
    assert (result.token_ids, result.finish_reason, engine.stats.prefill_tokens) == ([], "length", before)


def test_a_row_that_is_not_finite_ends_alone() -> None:
    tree = tiny.variables("v3")
    broken = {**tree, "params": {**tree["params"], "embed_VD": tree["params"]["embed_VD"].at[5].set(jnp.nan)}}
    sampling = Sampling(max_new_tokens=6, ignore_eos=True, logprobs=2)
    good = [Request([7, 8, 9 + at], sampling, at) for at in range(3)]
    alone = tiny.finish(tiny.engine("v3"), good)
    engine = tiny.engine("v3", broken)
    scored = dataclasses.replace(sampling, prompt_logprobs=2)
    bad = [Request([7, 5, 8], sampling, 7), Request([7, 5, 8], scored, 8)]
    found = tiny.finish(engine, [good[0], bad[0], good[1], bad[1], good[2]])
    for at in (7, 8):
        assert found[at].finish_reason == "error" and "not finite" in str(found[at].error)
        assert found[at].token_ids == []
    assert {at: found[at] for at in range(3)} == alone
    assert tiny.finish(engine, good) == alone, "the next batch must not see the broken row's cache"


@pytest.mark.parametrize(
    ("ids", "new", "message"),
    [
        ([], 1, "no tokens"),
        ([3, 270], 1, "token id 270 is out of range"),
        ([-1], 1, "token id -1 is out of range"),
        ([1] * 240, 17, "together more than the context of 256"),
    ],
)
def test_bad_prompts_are_refused(engine: Engine, ids: list[int], new: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tiny.finish(engine, [Request(ids, Sampling(max_new_tokens=new))])


def test_prompt_and_new_tokens_may_fill_the_context(engine: Engine) -> None:
    result = tiny.finish(
        engine, [Request([1] * 30, Sampling(max_new_tokens=226, ignore_eos=True, logprobs=2))]
    )[0]
    assert len(result.token_ids) == 226


def test_weights_are_cast_once_and_routing_stays_float32() -> None:
    cfg = dataclasses.replace(tiny.V32, dtype="bfloat16")
    weights = unstack_layers(cfg, tiny.variables("v32"))
    kept = set()
    for path, leaf in jax.tree_util.tree_flatten_with_path(weights)[0]:
        name = path[-1].key
        if leaf.dtype == jnp.float32:
            kept.add(name)
        else:
            assert leaf.dtype == jnp.bfloat16, name
    assert kept == {"router_ED", "bias_E", "weights_YD"}
    assert len(weights.layers) == cfg.num_hidden_layers


def test_bfloat16_decodes_whatever_the_neighbours() -> None:
    cfg = dataclasses.replace(tiny.V3, dtype="bfloat16", n_routed_experts=0, num_hidden_layers=1)
    options = EngineOptions(rows=3, page_size=16, prefill_tiles=3, tile=8, max_logprobs=2)
    engine = Engine(cfg, init_variables(cfg, jax.random.key(0)), options=options)
    sampling = Sampling(max_new_tokens=10, temperature=0.7, ignore_eos=True, logprobs=2)
    requests = [Request(tiny.prompt(10 + at), sampling, at) for at in range(3)]
    together = tiny.finish(engine, requests)
    assert tiny.finish(engine, [requests[1]])[1] == together[1]
    assert all(math.isfinite(e["logprob"]) for r in together.values() for e in r.logprobs or [])


@pytest.fixture(scope="module")
def tight() -> Engine:
    """An engine whose pages run out."""
    return tiny.engine("v3", pages=26)


@pytest.mark.parametrize("seed", range(20))
def test_the_same_bits_alone_and_in_any_company(tight: Engine, seed: int) -> None:
    exactness.check_case(tight, seed)


def test_pages_that_run_out_change_nothing(tight: Engine) -> None:
    sampling = Sampling(max_new_tokens=90, ignore_eos=True, logprobs=2)
    requests = [Request(tiny.prompt(40 + at), sampling, at) for at in range(4)]
    before = tight.stats.preemptions
    together = tiny.finish(tight, requests)
    assert tight.stats.preemptions > before, "three requests of 130 tokens do not fit 25 pages of 16"
    for request in requests:
        assert exactness.alone(tight, request) == together[request.index]


def test_a_cached_prefix_saves_its_tokens_and_changes_no_bit(engine: Engine) -> None:
    engine.scheduler.pool.clear()
    head = tiny.prompt(50, 9)
    sampling = Sampling(max_new_tokens=6, logprobs=2)
    want = exactness.alone(engine, Request([*head, 5], sampling))
    engine.scheduler.pool.clear()
    computed = engine.stats.prefill_tokens
    for ids, tenant, saved in (([*head, 9], "a", 0), ([*head, 5], "a", 48), ([*head, 5], "b", 0)):
        ticket = engine.submit(Request(ids, sampling, tenant=tenant))
        updates = []
        while not engine.idle:
            updates += [update for update in engine.step() if update.ticket == ticket]
        assert {update.cached_tokens for update in updates} == {saved}
        computed += len(ids) - saved
        assert engine.stats.prefill_tokens == computed
        if ids[-1] == 5:
            assert [t for update in updates for t in update.token_ids] == want.token_ids
            assert [e for update in updates for e in update.logprobs or []] == want.logprobs


def test_nothing_is_compiled_after_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny.engine("v3")
    engine.warm()
    tiny.finish(engine, [Request(tiny.prompt(5), Sampling(max_new_tokens=3))])
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **__: compiled.append(name) if "compile" in name else None
    )
    try:
        for seed in range(3):
            exactness.check_case(engine, seed)
        assert engine.expert_counts() is not None
        assert compiled == []
        jax.jit(lambda x: x + seed)(1.0)
        assert compiled, "the listener hears a compilation"
    finally:
        jax.monitoring.clear_event_listeners()


def test_the_counts_leave_compiling_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that nobody warmed compiles in its first step, before a clock of the counts runs."""
    engine = tiny.engine("v3")
    began: list[str] = []
    timed = type(engine.stats).timed

    def clock(stats: Any, phase: Any) -> Any:
        began.append(phase)
        return timed(stats, phase)

    def compiling(*args: Any, **how: Any) -> Any:
        assert not began and not any(record.admitted for record in engine._records.values())
        compiled.append(args)
        return compile_one(*args, **how)

    compiled: list[Any] = []
    compile_one = engine._device.programs.compile
    monkeypatch.setattr(type(engine.stats), "timed", clock)
    monkeypatch.setattr(engine._device.programs, "compile", compiling)
    tiny.finish(engine, [Request(tiny.prompt(5), Sampling(max_new_tokens=2))])
    assert compiled and set(began) == {"prefill", "decode"}


def test_the_rate_of_decoding_counts_what_decode_steps_gave() -> None:
    """The first token of a request comes with its prompt, in the prompt's time."""
    engine = tiny.engine("v3")
    tiny.finish(engine, [Request(tiny.prompt(5), Sampling(max_new_tokens=1, ignore_eos=True))])
    assert engine.stats.first_tokens == 1 and "decode nothing" in summary(engine.stats)
    tiny.finish(engine, [Request(tiny.prompt(5), Sampling(max_new_tokens=4, ignore_eos=True))] * 2)
    assert (engine.stats.first_tokens, engine.stats.decode_tokens) == (3, 6)


def test_many_short_prompts_do_not_wait_for_a_long_one(engine: Engine) -> None:
    long = engine.submit(Request(tiny.prompt(200), Sampling(max_new_tokens=5)))
    short = [engine.submit(Request(tiny.prompt(5, at), Sampling(max_new_tokens=5))) for at in range(3)]
    first = [update.ticket for update in engine.step()]
    assert sorted(first) == short and long not in first
    while not engine.idle:
        engine.step()


def test_the_first_tokens_come_with_what_they_waited_for(engine: Engine) -> None:
    engine.warm()
    began = time.perf_counter()
    tickets = [engine.submit(Request(tiny.prompt(20, at), Sampling(max_new_tokens=3))) for at in range(9)]
    updates: dict[int, list[Update]] = {ticket: [] for ticket in tickets}
    while not engine.idle:
        for update in engine.step():
            updates[update.ticket].append(update)
    took = time.perf_counter() - began
    for first, *rest in updates.values():
        assert first.queue_seconds is not None and first.prefill_seconds is not None
        assert first.queue_seconds >= 0 < first.prefill_seconds
        assert first.queue_seconds + first.prefill_seconds <= took
        assert all(update.queue_seconds is update.prefill_seconds is None for update in rest)
    assert engine.options.rows < len(tickets), "the last one must have waited for a row"
    queued = [one[0].queue_seconds or 0.0 for one in updates.values()]
    assert queued[-1] > 2 * queued[0]


def test_cancelled_pages_are_back_at_once(engine: Engine) -> None:
    tickets = [engine.submit(Request(tiny.prompt(60, at), Sampling(max_new_tokens=50))) for at in range(6)]
    engine.step()
    assert engine.scheduler.pool.used > 0 and engine.stats.waiting == 2
    assert engine.queued_tokens == 2 * 110
    for ticket in tickets:
        engine.cancel(ticket)
    assert engine.scheduler.pool.used == 0 and not engine.idle
    assert [update.finish_reason for update in engine.step()] == ["cancelled"] * 6
    assert engine.idle and engine.step() == []


def test_expert_counts_are_those_of_the_tokens_computed() -> None:
    engine = tiny.engine("v3")
    tiny.finish(engine, [Request(tiny.prompt(20), Sampling(max_new_tokens=9, ignore_eos=True))])
    counts_LE = engine.expert_counts()
    assert counts_LE is not None and counts_LE.shape == (1, 8)
    assert counts_LE.sum() == (20 + 8) * tiny.V3.num_experts_per_tok


@pytest.mark.parametrize("name", ["v3", "v32"])
def test_paged_logits_are_those_of_a_cache_in_one_piece(name: str) -> None:
    cfg, tree, ids = tiny.CONFIGS[name], tiny.variables(name), jnp.asarray([tiny.prompt(40)])
    model = Transformer(cfg, "absorbed")

    @jax.jit
    def part(cache: Cache | PagedCache, ids: jax.Array, positions_BT: jax.Array) -> tuple[Any, jax.Array]:
        out = model.apply(tree, ids, positions_BT=positions_BT, cache=cache)
        return out.cache, model.apply(tree, out.hidden_BTD, method="logits")

    def logits(cache: Cache | PagedCache) -> np.ndarray:
        parts = []
        for start in (0, 20):
            positions = jnp.arange(start, start + 20, dtype=jnp.int32)[None]
            cache, found = part(cache, ids[:, start : start + 20], positions)
            parts.append(np.asarray(found))
        return np.concatenate(parts, axis=1)

    latent, index = make_pages(cfg, 9, 16)
    scattered = jnp.asarray([[7, 2, 5, 0, 0, 0, 0, 0]], jnp.int32)
    paged = logits(PagedCache(latent, index, scattered, 9))
    np.testing.assert_allclose(paged, logits(make_cache(cfg, 1, 256)), atol=1e-5)
