"""A state machine over the engine on `fake.FakeDevice`: requests come, are cancelled, lose their pages, and end.

Checked after every rule: the page and row counts add up, nothing is owned twice, earlier requests run before later
ones. Checked of every request: its tokens are those of `fake.reference`, and it ends within the steps that it and
the requests before it can need.
"""

from __future__ import annotations

import dataclasses
from unittest import mock

import hypothesis
import jax
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from dsv3_jax.config import MeshConfig
from dsv3_jax.inference import Engine, EngineOptions, Request, Sampling, Update
from dsv3_jax.inference import engine as engine_module
from dsv3_jax.inference.shards import Shards
from dsv3_jax.inference.weights import Weights
from dsv3_jax.parallel.mesh import make_mesh
from tests.inference import fake, tiny

CONTEXT = 40
CFG = dataclasses.replace(
    tiny.V3, vocab_size=fake.VOCAB, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=(fake.EOS,)
)


def engine(options: EngineOptions, shards: int = 1) -> Engine:
    """The engine over a fake device, or over several with pages of their own."""
    mesh = None
    if shards > 1:
        mesh = make_mesh(MeshConfig(data=shards, fsdp=1, expert=1, tensor=1), jax.devices()[:shards])
    with mock.patch.object(engine_module, "Device", fake.FakeDevice):
        return Engine(CFG, Weights({}, []), options=options, mesh=mesh)


class Machine(RuleBasedStateMachine):
    """See the module; `rules` counts over all runs."""

    rules = 0
    seen: dict[str, int]
    """What happened over all runs, so that a test can say that it did happen."""

    @initialize(
        rows=st.integers(2, 4),
        page_size=st.integers(1, 5),
        tiles=st.integers(1, 3),
        tile=st.integers(1, 6),
        most=st.integers(1, 6),
        tight=st.sampled_from([0.5, 0.6, 0.7, 0.9, 1.2]),
        prefix_cache=st.integers(0, 4).map(lambda n: n < 4),
        shards=st.sampled_from(range(1, min(len(jax.devices()), 2) + 1)),
    )
    def start(
        self,
        rows: int,
        page_size: int,
        tiles: int,
        tile: int,
        most: int,
        tight: float,
        prefix_cache: bool,
        shards: int,
    ) -> None:
        pages = 2 + int(tight * CONTEXT / page_size)  # for about one request of full length
        options = EngineOptions(
            rows=rows * shards,
            page_size=page_size,
            pages=pages * shards,
            context=CONTEXT,
            prefill_tiles=tiles * shards,
            tile=tile,
            prefix_cache=prefix_cache,
            steps_per_call=most,
            max_logprobs=1,
        )
        self.engine = engine(options, shards)
        self.requests: dict[int, Request] = {}
        self.tokens: dict[int, list[int]] = {}
        self.deadline: dict[int, int] = {}
        self.steps = 0

    @rule(
        head=st.integers(0, 3),
        length=st.integers(1, 20),
        tail=st.integers(0, 3),
        max_new=st.integers(0, 20),
        tenant=st.sampled_from(["", "other"]),
        stream=st.booleans(),
        scored=st.integers(0, 5).map(lambda n: n == 0),
        bad=st.integers(0, 9).map(lambda n: n == 0),
        copies=st.integers(1, 4),
    )
    def submit(
        self,
        head: int,
        length: int,
        tail: int,
        max_new: int,
        tenant: str,
        stream: bool,
        scored: bool,
        bad: bool,
        copies: int,
    ) -> None:
        # Prompts begin alike, so that they share pages, and end differently.
        ids = [1 + (head * 7 + at * (3 + head)) % 40 for at in range(length)]
        sampling = Sampling(min(max_new, CONTEXT - length), prompt_logprobs=0 if scored else None)
        if not self.engine.scheduler.fits(length, sampling.max_new_tokens):
            self._count("refused")
            return
        for copy in range(copies):
            last = fake.BAD if bad else 41 + (tail + copy) % 8
            request = Request([*ids[:-1], last], sampling, tenant=tenant, stream=stream)
            ticket = self.engine.submit(request)
            self.requests[ticket], self.tokens[ticket] = request, []
            need = sum(map(self._most_steps, self.requests.values()))
            self.deadline[ticket] = self.steps + need

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.steps += 1
            for update in self.engine.step():
                self._take(update)

    @rule(which=st.integers(0, 30))
    def cancel(self, which: int) -> None:
        if which < len(self.requests):
            ticket = sorted(self.requests)[which]
            self.engine.cancel(ticket)
            updates = {update.ticket: update for update in self.engine._ready}
            if updates[ticket].finish_reason != "cancelled":
                return  # it had ended: nothing was to be computed
            self._count("cancelled")
            del self.requests[ticket], self.tokens[ticket], self.deadline[ticket]

    @rule()
    def preempt(self) -> None:
        """What the scheduler does by itself when pages are short; here without that reason."""
        whole = self.engine.scheduler
        for scheduler in whole.schedulers if isinstance(whole, Shards) else [whole]:
            if len(scheduler.running) > 1:  # the oldest is never the one
                scheduler._preempt(scheduler.running[-1])

    @invariant()
    def adds_up(self) -> None:
        Machine.rules += 1
        if not hasattr(self, "engine"):
            return
        self.engine.scheduler.check()
        late = [ticket for ticket, deadline in self.deadline.items() if self.steps > deadline]
        assert not late, f"requests {late} still wait"

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self._count("preempted", self.engine.stats.preemptions)
        self._count("prefix_hit_tokens", self.engine.stats.prefix_hit_tokens)
        self._count("evictions", self.engine.scheduler.pool.evictions)
        self._count("on_two_devices", isinstance(self.engine.scheduler, Shards))
        while not self.engine.idle:
            self.step(1)
            self.adds_up()
        assert not self.requests, "a request has no end"
        assert self.engine.scheduler.pool.used == 0, "pages are lost"

    def _most_steps(self, request: Request) -> int:
        """Steps in which a request is done once nothing before it is left, computing everything again included."""
        return -(-len(request.ids) // self.engine.options.tile) + request.sampling.max_new_tokens + 2

    def _take(self, update: Update) -> None:
        if update.ticket not in self.requests:
            assert update.finish_reason == "cancelled"
            return
        request, tokens = self.requests[update.ticket], self.tokens[update.ticket]
        tokens += update.token_ids
        if request.stream:
            assert len(update.token_ids) <= 1, "a streamed request gets token after token"
        if update.finish_reason is None:
            assert update.token_ids
            return
        scored = request.sampling.prompt_logprobs is not None
        if request.sampling.max_new_tokens or scored:
            want = fake.reference(list(request.ids), request.sampling.max_new_tokens)
        else:
            want = ([], "length")
        assert (tokens, update.finish_reason) == want, f"request {update.ticket}"
        self._count(str(update.finish_reason))
        del self.requests[update.ticket], self.tokens[update.ticket], self.deadline[update.ticket]

    def _count(self, what: str, count: int = 1) -> None:
        Machine.seen[what] = Machine.seen.get(what, 0) + count


Machine.seen = {}


def run(rules: int, *, seed: int | None = None, shrink: bool = True) -> dict[str, int]:
    """Run the machine until about that many rules were followed; what was seen.

    Args:
      seed: of other sequences than the default ones.
      shrink: look for the shortest sequence that fails.
    Raises AssertionError from the first sequence that fails.
    """
    Machine.rules, Machine.seen = 0, {}
    settings = hypothesis.settings(
        max_examples=max(1, rules // 60),
        stateful_step_count=50,
        deadline=None,
        database=None,
        derandomize=seed is None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[phase for phase in hypothesis.Phase if shrink or phase.name == "generate"],
    )
    machine = Machine
    rounds = 0
    while Machine.rules < rules:
        if seed is not None:
            machine = hypothesis.seed(seed + rounds)(type("Machine", (Machine,), {}))
        run_state_machine_as_test(machine, settings=settings)
        rounds += 1
        if seed is None:
            break
    return {"rules": Machine.rules, **Machine.seen}
