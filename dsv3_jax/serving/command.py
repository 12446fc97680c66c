"""Puts a server together and runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsv3_jax.serving.filter import Filter
from dsv3_jax.serving.guides import GuideMaker
from dsv3_jax.serving.metrics import Metrics
from dsv3_jax.serving.server import Server, listen
from dsv3_jax.serving.service import ServedModel, Service
from dsv3_jax.serving.settings import Settings
from dsv3_jax.serving.worker import Worker


def read_stats(engine: Any) -> dict[str, float]:
    """The engine's numbers under the names of `metrics`. Called in the engine's thread."""
    stats = engine.stats
    found = {
        "running": stats.running,
        "waiting": stats.waiting,
        "pages_used": stats.pages_used,
        "pages_cached": stats.pages_cached,
        "pages_total": stats.pages_total,
        "prefix_hit_tokens": stats.prefix_hit_tokens,
        "preemptions": stats.preemptions,
        "drafted_tokens": stats.drafted,
        "accepted_tokens": stats.accepted,
    }
    if stats.drafted:
        found["acceptance"] = stats.accepted / stats.drafted
    counts = engine.expert_counts()
    if counts is not None and counts.sum():
        mean = counts.mean(axis=-1)
        found["expert_load_max_over_mean"] = float((counts.max(axis=-1)[mean > 0] / mean[mean > 0]).max())
        found["experts_used"] = float((counts > 0).mean())
    return {name: float(value) for name, value in found.items()}


def serve(
    model: ServedModel,
    settings: Settings,
    make_engine: Callable[[], Any],
    *,
    host: str,
    port: int,
    context: int,
    content_filter: Filter | None = None,
    guides: GuideMaker | None = None,
) -> int:
    """Serve until a signal; the exit code.

    Args:
      make_engine: loads the weights; called in the engine's thread. The engine tells its sizes by `options`
        (context, pages, page_size) and `cache_dtype`.
      context: the largest prompt with its answer, until the engine says less.
    Raises:
      ConfigError: the address cannot be had. And whatever `make_engine` or the engine raised.
    """
    sock = listen(host, port)

    def make() -> Any:
        engine = make_engine()
        options = engine.options
        service.size(options.context, (options.pages - 1) * options.page_size)
        metrics.cache_token_bytes.labels(options.cache_dtype).set(engine.stats.cache_token_bytes)
        return engine

    worker = Worker(make, read_stats)
    metrics = Metrics(lambda: {**worker.numbers, "rows": settings.rows, **_reserved(service)})
    service = Service(model, settings, worker, metrics, context, content_filter, guides)
    return Server(service, sock).serve_to_the_end()


def _reserved(service: Service) -> dict[str, float]:
    return {"reserved_tokens": service.admission.tokens, "accepted_sequences": service.admission.sequences}
