"""What Prometheus reads at /metrics. One registry a server, so that tests and several servers do not share counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

GAUGES = {
    "running": "Sequences that are being decoded.",
    "waiting": "Sequences that wait for a row.",
    "pages_used": "Pages of the latent cache that a sequence owns.",
    "pages_cached": "Pages kept for the prefix cache alone; free to take.",
    "pages_total": "Pages of the latent cache.",
    "rows": "Sequences decoded together at most.",
    "accepted_sequences": "Sequences accepted and not finished.",
    "reserved_tokens": "Tokens that the accepted sequences may need.",
    "acceptance": "Share of drafted tokens that were accepted, since the start.",
    "expert_load_max_over_mean": "Tokens of the busiest expert over the mean expert's, since the start.",
    "experts_used": "Share of experts (all layers) that were chosen at least once, since the start.",
}
COUNTERS = {
    "preemptions": "Sequences set back to waiting because pages ran out.",
    "prefix_hit_tokens": "Prompt tokens found in the prefix cache.",
    "drafted_tokens": "Tokens the multi-token module drafted.",
    "accepted_tokens": "Drafted tokens that were accepted.",
    "engine_steps": "Steps of the engine.",
}


class Metrics:
    """Counters and histograms of one server; numbers of the engine are read when they are asked for."""

    def __init__(self, engine: Callable[[], dict[str, float]]) -> None:
        """`engine`: the present value of names in GAUGES and COUNTERS; a name may be missing."""
        self.registry = CollectorRegistry()
        registry = self.registry
        self.http_requests = Counter(
            "dsv3_http_requests", "HTTP requests.", ["method", "route", "status"], registry=registry
        )
        self.http_seconds = Histogram(
            "dsv3_http_request_seconds",
            "From header to last byte.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            "dsv3_time_to_first_token_seconds",
            "From a request's header to its first new token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.inter_token = Histogram(
            "dsv3_inter_token_seconds", "Between tokens of a sequence.", buckets=_SECONDS, registry=registry
        )
        self.cache_token_bytes = Gauge(
            "dsv3_cache_token_bytes",
            "Bytes of the latent cache for each token, by its storage type.",
            ["dtype"],
            registry=registry,
        )
        self.queue, self.prefill, self.decode, self.whole = (
            Histogram(f"dsv3_{name}_seconds", told, buckets=_SECONDS, registry=registry)
            for name, told in (
                ("request_queue_time", "From submission to the engine to its first step on a sequence."),
                ("request_prefill_time", "From there to the first new token."),
                ("request_decode_time", "From the first new token to the end of a sequence."),
                ("e2e_request_latency", "From a request's header to the end of a sequence."),
            )
        )
        self.prompt_tokens = Counter("dsv3_prompt_tokens", "Prompt tokens accepted.", registry=registry)
        self.new_tokens = Counter("dsv3_generated_tokens", "New tokens.", registry=registry)
        self.finished = Counter(
            "dsv3_finished", "Sequences by how they ended.", ["reason"], registry=registry
        )
        registry.register(_EngineNumbers(engine))

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self.registry)


class _EngineNumbers(Collector):
    def __init__(self, read: Callable[[], dict[str, float]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        values = self._read()
        for name, told in GAUGES.items():
            if name in values:
                yield GaugeMetricFamily(f"dsv3_{name}", told, value=values[name])
        for name, told in COUNTERS.items():
            if name in values:
                yield CounterMetricFamily(f"dsv3_{name}", told, value=values[name])
