"""The bodies that clients send, as OpenAI defines them, with a few fields more.

Every field is checked here, with its path; what depends on the model is checked where it is used. A field that nothing
is known of is an error with a suggestion, so that a typo does not pass in silence; fields of OpenAI's that change no
answer here are accepted.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from satchel.core.errors import nearest
from satchel.core.request import CHOICES, LIKELIEST, Sampling

INT64 = 2**63 - 1
LONGEST = 2**31 - 1  # tokens, milliseconds
TEXTS = 16  # stop texts at most


class Body(BaseModel):
    """An object whose fields are all known. Numbers are numbers: "5" is no 5."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _know_all(cls, values: Any) -> Any:
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for name in values if isinstance(values, dict) else ():
            if name not in known:
                raise ValueError(f"no field '{name[:80]}' here; {nearest(name[:80], known)}")
        return values


def _texts(value: Any) -> Any:
    """One text is a list of one."""
    return [value] if isinstance(value, str) else value


def _prompts(value: Any) -> Any:
    """A text, texts, tokens, or lists of tokens: always a list of texts or of lists."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return [value]
    if (
        isinstance(value, list)
        and value
        and (
            all(isinstance(item, str) for item in value)
            or all(isinstance(item, list) and item and all(type(token) is int for token in item) for item in value)
        )
    ):
        return value
    raise ValueError("a text, a list of texts, a list of token ids, or a list of lists of token ids is expected")


def _content(value: Any) -> Any:
    """Text parts become one text."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        return "".join(_part(part) for part in value)
    raise ValueError("a text or a list of text parts is expected")


def _part(part: dict[str, Any]) -> str:
    kind = str(part.get("type"))[:40]
    if kind != "text":
        raise ValueError(f"a part of type '{kind}'; this model reads text parts only")
    if not isinstance(part.get("text"), str):
        raise ValueError("a text part has a 'text'")
    return part["text"]


def _bias(value: Any) -> Any:
    """Token ids are JSON keys, so texts."""
    if not isinstance(value, dict):
        return value
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit()):
            raise ValueError(f"'{token[:40]}' is no token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of token {token[:40]} lies in [-100, 100]")
    return value


Text = Annotated[str, Field(max_length=50_000_000)]
Stops = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=TEXTS), BeforeValidator(_texts, str)]
Asked = str | list[str] | list[int] | list[list[int]]
Prompts = Annotated[list[Text] | list[list[int]], Field(min_length=1), BeforeValidator(_prompts, Asked)]


class StreamOptions(Body):
    """What a stream says beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Generating(Body):
    """What chat and completions have in common."""

    model: str | None = None  # the served one, or one of its adapters
    temperature: Annotated[float | None, Field(ge=0, le=100)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    n: Annotated[int | None, Field(ge=1, le=CHOICES)] = None
    stop: Stops | None = None
    seed: Annotated[int | None, Field(ge=-INT64, le=INT64)] = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(_bias)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # more than OpenAI's
    top_k: Annotated[int | None, Field(ge=0, le=INT64)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=1000)] = None
    priority: Annotated[int, Field(ge=-INT64, le=INT64)] = 0  # higher goes first
    deadline_ms: Annotated[int | None, Field(ge=1, le=LONGEST)] = None  # after which the answer is worthless
    ignore_eos: bool = False  # do not end where the model ends

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen; OpenAI's default is to draw as trained."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            seed=self.seed,
        )

    def deadline_s(self, limit_s: float) -> float | None:
        """Seconds that the answer may take, within the server's limit."""
        own = math.inf if self.deadline_ms is None else self.deadline_ms / 1000
        return least if math.isfinite(least := min(own, limit_s)) else None


class CompletionBody(Generating):
    """`POST /v1/completions`."""

    prompt: Prompts
    max_tokens: Annotated[int | None, Field(ge=0, le=LONGEST)] = 16
    echo: bool | None = None
    logprobs: Annotated[int | None, Field(ge=0, le=LIKELIEST)] = None
    best_of: Annotated[int | None, Field(ge=1, le=CHOICES)] = None
    suffix: None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _agree(self) -> CompletionBody:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError(f"best_of={self.best_of} is less than n={self.n}; it is at least as much")
        if self.stream and self.best_of is not None and self.best_of > (self.n or 1):
            raise ValueError("the best of many are known at the end only; leave stream or best_of out")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens=0 answers nothing; it needs echo=true")
        return self


class JsonSchema(Body):
    """A named schema that the answer follows."""

    name: str = ""
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Body):
    """Plain text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("type 'json_schema' comes with a field 'json_schema', and no other type does")
        return self


class Function(Body):
    """A function that the model may call."""

    name: Annotated[str, Field(min_length=1, max_length=128)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class Called(Body):
    """A call that the assistant made: the arguments are JSON in a text."""

    name: str
    arguments: str = "{}"


class ToolCall(Body):
    """One of the assistant's calls."""

    id: str = ""
    type: Literal["function"] = "function"
    function: Called
    index: int | None = None


class TextPart(Body):
    """A part of a turn."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """A turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Text | None, BeforeValidator(_content, str | list[TextPart] | None)] = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not self.tool_calls and not (self.role == "assistant" and self.refusal):
            raise ValueError("'content' is missing; a text, or a list of text parts")
        return self


class NamedFunction(Body):
    """The name of a function."""

    name: str


class NamedTool(Body):
    """The one tool to call."""

    type: Literal["function"]
    function: NamedFunction


class ChatBody(Generating):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1, le=LONGEST)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=LONGEST)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=LIKELIEST)] = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    # of OpenAI's, without effect here
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _agree(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if isinstance(self.tool_choice, NamedTool) or self.tool_choice == "required":
            names = [tool.function.name for tool in self.tools or []]
            wanted = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
            if not names or (wanted is not None and wanted not in names):
                raise ValueError(f"tool_choice asks for a tool that is not there; {nearest(wanted or '', names)}")
        return self


class EmbeddingBody(Body):
    """`POST /v1/embeddings`."""

    input: Prompts
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int | None, Field(ge=1, le=LONGEST)] = None
    user: str | None = None


class BatchBody(Body):
    """`POST /v1/batches`."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    completion_window: Literal["24h"] = "24h"
    metadata: dict[str, str] | None = None


class LoadAdapterBody(Body):
    """`POST /v1/load_lora_adapter`, as vLLM has it."""

    lora_name: Annotated[str, Field(min_length=1, max_length=200)]
    lora_path: Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]  # below the folder of adapters


class UnloadAdapterBody(Body):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: Annotated[str, Field(min_length=1, max_length=200)]


CompletionBody.model_rebuild()
