"""Structured output: the guide that keeps an answer to JSON, a schema, an expression or a choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.inference.guides import Guide, Guides
from dsv3_jax.serving.api_errors import ApiError, bad_request
from dsv3_jax.serving.schemas import ChatRequest, Options, StructuredOutputs


def asked_for(options: Options) -> StructuredOutputs | None:
    """What a request wants, however it spells it."""
    if not isinstance(options, ChatRequest) or options.response_format is None:
        return options.structured_outputs
    form = options.response_format
    if form.type == "text":
        return None
    if form.json_schema is None:
        return StructuredOutputs(json_object=True)
    return StructuredOutputs.model_validate({"json": form.json_schema.schema_})


class GuideMaker:
    """Makes guides. The tables of the tokenizer are made when first needed, half a second for 128k ids."""

    def __init__(self, make: Callable[[], Guides]) -> None:
        """`make`: for the served tokenizer; raises ConfigError where there can be none."""
        self._make = make
        self._guides: Guides | None = None

    def __call__(self, wanted: StructuredOutputs) -> Guide:
        """The guide of one request, to be copied for each sequence. Takes up to some hundred milliseconds.

        Raises a 400 for what cannot be used. It does not say more: the library's words would repeat the schema.
        """
        try:
            guides = self._guides = self._guides or self._make()
        except ConfigError:
            raise _unsupported() from None
        try:
            if wanted.regex is not None:
                return guides.regex(wanted.regex)
            if wanted.choice is not None:
                return guides.choice(wanted.choice)
            return guides.json_object() if wanted.json_ is None else guides.json_schema(wanted.json_)
        except DataError:
            told = "the schema, expression or choice is invalid, too large, or uses what is not supported"
            raise bad_request(told, code="invalid_schema") from None


def _unsupported() -> ApiError:
    return bad_request("this server has no structured output", code="unsupported")


async def guide_for(options: Options, primer: list[int], service: Any) -> Callable[[], Any] | None:
    """Makes a fresh guide for each sequence of a request, or None for free text.

    Args:
      primer: the opened reasoning or call of the prompt: an answer that begins within one cannot be guided.
    """
    wanted = asked_for(options)
    if wanted is None:
        return None
    if service.guides is None:
        raise _unsupported()
    if primer:
        raise bad_request(
            "structured output needs an answer that begins at once: thinking: false", "thinking"
        )
    guide = await service.text(lambda: service.guides(wanted))
    return lambda: guide.copy()
