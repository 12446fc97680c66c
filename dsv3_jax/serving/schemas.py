"""What the generating routes take. Unknown keys, wrong types and numbers out of range are a 400 naming the field."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dsv3_jax.serving.api_errors import ApiError, bad_request
from dsv3_jax.serving.settings import MAX_CHOICES

MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_MESSAGES = 4096

Text = Annotated[str, Field(min_length=0)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Penalty = Annotated[float, Field(allow_inf_nan=False, ge=-2, le=2)]
Bias = Annotated[float, Field(allow_inf_nan=False, ge=-100, le=100)]
Count = Annotated[int, Field(ge=0, lt=2**31)]


class Strict(BaseModel):
    """No conversions ("1" is no number, true is no integer) and no unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class Message(Strict):
    """What every message has; roles, parts, calls and results are checked where they are rendered (`turns`)."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1024)] | None = None


class Tool(Strict):
    """A function; checked in full where it is rendered."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    function: dict[str, Any]


class NamedTool(Strict):
    type: Literal["function"]
    function: dict[str, str]


class JsonSchema(Strict):
    name: Annotated[str, Field(max_length=256)]
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_with_its_type(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema, and only with it")
        return self


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class StructuredOutputs(Strict):
    """What the answer must be; exactly one of them."""

    json_: Annotated[dict[str, Any] | None, Field(alias="json")] = None
    json_object: Literal[True] | None = None
    regex: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    choice: (
        Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1000)] | None
    ) = None

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        if sum(value is not None for value in (self.json_, self.json_object, self.regex, self.choice)) != 1:
            raise ValueError("give exactly one of json, json_object, regex and choice")
        return self


class Options(Strict):
    """Sampling options that all routes share; null is as good as absent."""

    temperature: Annotated[float, Field(allow_inf_nan=False, ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(allow_inf_nan=False, gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(allow_inf_nan=False, ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Stops | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=16)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(allow_inf_nan=False, ge=0.01, le=100)] | None = None
    logit_bias: (
        Annotated[dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Bias], Field(max_length=300)] | None
    ) = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    stream: bool | None = None

    @model_validator(mode="after")
    def _temperature(self) -> Options:
        if self.temperature is not None and 0 < self.temperature < 1e-5:
            raise ValueError("temperature is 0 (greedy), or 1e-5 to 100")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        stop = self.stop
        return () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)


class OpenAIOptions(Options):
    """What both OpenAI routes take beside their prompt."""

    model: Annotated[str, Field(max_length=256)]
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=1024)] | None = None

    @model_validator(mode="after")
    def _stream_options(self) -> OpenAIOptions:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self


class ChatRequest(OpenAIOptions):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    thinking: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    store: Literal[False] | None = None

    @model_validator(mode="after")
    def _together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_tokens or max_completion_tokens, not both")
        if self.response_format is not None and self.structured_outputs is not None:
            raise ValueError("give response_format or structured_outputs, not both")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        return self


class CompletionRequest(OpenAIOptions):
    """POST /v1/completions."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_CHOICES)]
    )
    max_tokens: Count | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _choices(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of other than n is not supported")
        if len(self.prompts) * (self.n or 1) > MAX_CHOICES:
            raise ValueError(f"prompts times n must be at most {MAX_CHOICES}")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else given


class GenerateRequest(Options):
    """POST /generate: one of prompt, prompt_token_ids and messages."""

    prompt: str | None = None
    prompt_token_ids: TokenIds | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    max_new_tokens: Count | None = None

    @model_validator(mode="after")
    def _one_prompt(self) -> GenerateRequest:
        given = [self.prompt is not None, self.prompt_token_ids is not None, self.messages is not None]
        if sum(given) != 1:
            raise ValueError("give exactly one of prompt, prompt_token_ids and messages")
        return self


Model = TypeVar("Model", bound=Strict)
REQUESTS: tuple[type[Strict], ...] = (ChatRequest, CompletionRequest, GenerateRequest)
_KNOWN = {
    field.alias or name
    for model in (Strict.__subclasses__() + Options.__subclasses__() + OpenAIOptions.__subclasses__())
    for name, field in model.model_fields.items()
}


def validate(model: type[Model], data: dict[str, Any]) -> Model:
    """`data` as `model`, or a 400 about the first thing that is wrong. Repeats nothing of what was sent."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _told(model, error, data) from None


def _told(model: type[Strict], error: ValidationError, data: dict[str, Any]) -> ApiError:
    found = max(error.errors(include_url=False, include_input=False, include_context=False), key=_depth)
    parts = [
        f"[{part}]" if isinstance(part, int) else f".{part}"
        for part in found["loc"]
        if isinstance(part, int) or part in _KNOWN
    ]
    param = "".join(parts).removeprefix(".") or None
    if found["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(found["loc"][-1]), sorted(model.model_fields), 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return bad_request(
            f"an unknown key{f' in {param}' if param else ''}{hint}", param, "unknown_parameter"
        )
    message = found["msg"].removeprefix("Value error, ")
    return bad_request(f"{param}: {message}" if param else message, param, "invalid_value")


def _depth(entry: Any) -> int:
    """Of the branches of a union the deepest one is most to the point."""
    return len(entry["loc"])
