"""Run many requests to their end, with a hand on each while it grows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from dsv3_jax.inference.requests import Request, Result, Update

Watch = Callable[[Request, list[int]], int | None]


class Stepper(Protocol):
    """What `run` needs of an engine."""

    def submit(self, request: Request) -> int:
        """Queue a request; its ticket."""

    def cancel(self, ticket: int) -> None:
        """End a request."""

    def step(self) -> list[Update]:
        """What one more step brought."""


def run(engine: Stepper, requests: Iterable[Request], watch: Watch | None = None) -> Iterator[list[Result]]:
    """Decode all requests; yields after every step the results that became known, often none.

    Args:
      watch: called with the new ids of a request as they come; a number says to keep that many of them and
        end the request with "stop". Log-probabilities are cut alike.
    Raises:
      DataError: a request is refused (`Engine.submit`); then none is decoded.
    """
    going: dict[int, Result] = {}
    try:
        for request in requests:
            ticket = engine.submit(request)
            logprobs = None if request.sampling.logprobs is None else []
            going[ticket] = Result(request, [], "", logprobs=logprobs)
        while going:
            finished = []
            for update in engine.step():
                if update.ticket not in going:
                    continue  # of a request that was cancelled here
                result = going[update.ticket] = _add(going[update.ticket], update, watch)
                if result.finish_reason:
                    del going[update.ticket]
                    finished.append(result)
                    if update.finish_reason is None:
                        engine.cancel(update.ticket)
            yield finished
    finally:
        for ticket in going:
            engine.cancel(ticket)


def _add(result: Result, update: Update, watch: Watch | None) -> Result:
    new, logprobs, reason = update.token_ids, update.logprobs, update.finish_reason or ""
    keep = watch(result.request, new) if watch is not None and new else None
    if keep is not None:
        new, logprobs, reason = new[:keep], None if logprobs is None else logprobs[:keep], "stop"
    result.token_ids.extend(new)
    if result.logprobs is not None and logprobs is not None:
        result.logprobs.extend(logprobs)
    failed = reason == "error"
    return dataclasses.replace(
        result,
        finish_reason=reason,
        error=update.error if keep is None else None,
        logprobs=None if failed else result.logprobs,
        prompt_logprobs=None if failed else update.prompt_logprobs or result.prompt_logprobs,
    )
