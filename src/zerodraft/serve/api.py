"""What requests may hold, and how errors look: OpenAI's form, strictly.

A field that is not here is refused by name, since an answer that ignores half of what was asked for is a wrong one. A
field that is null counts as not given.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from zerodraft.common.files import whole_characters

LOWEST_TEMPERATURE = 1e-4
"""Below this, and above 0, probabilities are no numbers any more."""

LOWEST_PENALTY = 0.01
"""Scores are divided by it, and have to stay finite."""


class ApiError(Exception):
    """What a client is told: one sentence, and which field is to blame.

    Args:
        status: Of HTTP.
        message: Says what was given, what is expected and what to do.
        param: The field.
        code: A word for programs.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Strict(BaseModel):
    """No conversions, no unknown fields, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, given: Any) -> Any:
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


def _whole(text: str) -> str:
    if whole_characters(text) != text:
        raise ValueError("half of a surrogate pair is no character")
    return text


Text = Annotated[str, AfterValidator(_whole)]


class StreamOptions(Strict):
    """OpenAI's."""

    include_usage: bool = False


class Extra(Strict):
    """What OpenAI's form has no place for."""

    trace: bool = False
    """Tell of every step what was drafted and what became text."""
    drafts: bool = True
    """Without them the answer is the same and comes by plain decoding, to compare the speed."""


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """One of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]


class JsonSchema(Strict):
    """A schema with its name, as OpenAI wraps it."""

    name: str = ""
    description: str = ""
    json_schema: dict[str, Any] = Field(alias="schema")
    # the schema is always followed
    strict: bool = True


class ResponseFormat(Strict):
    """What form the answer has."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


StopText = Annotated[Text, StringConstraints(min_length=1, max_length=1000)]
TokenKey = Annotated[str, StringConstraints(pattern="^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Asked(Strict):
    """What both kinds of requests have in common."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=LOWEST_PENALTY, le=10)
    logit_bias: dict[TokenKey, Bias] = Field(default_factory=dict, max_length=1024)
    n: int = Field(1, ge=1, le=128)
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] = Field(default_factory=list)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    response_format: ResponseFormat | None = None
    # labels of the client's own, which change nothing
    user: str = ""
    metadata: dict[str, str] = Field(default_factory=dict)
    zerodraft: Extra = Extra()

    @model_validator(mode="after")
    def _fits_together(self) -> "Asked":
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "'stream_options' needs 'stream': true.", "stream_options")
        if 0 < self.temperature < LOWEST_TEMPERATURE:
            raise ApiError(400, f"'temperature' has to be 0 or from {LOWEST_TEMPERATURE} up.", "temperature")
        form = self.response_format
        if form is not None and (form.type == "json_schema") != (form.json_schema is not None):
            raise ApiError(
                400,
                "'response_format' has a 'json_schema' if its type is json_schema, and only then.",
                "response_format",
            )
        return self

    @property
    def stops(self) -> list[str]:
        """The texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)

    @property
    def longest(self) -> int | None:
        """The most tokens of an answer."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many of the most probable tokens are wanted beside each token; None: no log probabilities at all."""
        raise NotImplementedError


class ChatRequest(Asked):
    """The body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @model_validator(mode="after")
    def _chat_fits_together(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "'top_logprobs' needs 'logprobs': true.", "top_logprobs")
        if None not in (both := {self.max_tokens, self.max_completion_tokens}) and len(both) > 1:
            raise ApiError(400, "'max_tokens' and 'max_completion_tokens' differ; give one of them.", "max_tokens")
        return self

    @property
    def longest(self) -> int | None:
        return self.max_tokens or self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(Asked):
    """The body of `/v1/completions`."""

    prompt: Text | Ids | Annotated[list[Text], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def prompts(self) -> "Sequence[str | list[int]]":
        """One or several, as texts or tokens."""
        prompt: Any = self.prompt
        return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


class TokenizeRequest(Strict):
    """The body of `/tokenize`: a text, or a conversation in the model's template."""

    model: str = ""
    prompt: Text | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "Give either 'prompt' or 'messages'.", "prompt")
        return self


NESTED = (StreamOptions, Extra, TextPart, Message, JsonSchema, ResponseFormat)
KNOWN = {field.alias or name for schema in (*NESTED, ChatRequest) for name, field in schema.model_fields.items()}
"""What fields are called, at any depth."""


def misfit(errors: Sequence[Any]) -> ApiError:
    """What pydantic has to say against a body, as an error that names the field. What was given is not repeated."""
    # of a field that takes several types, the one that fits best got furthest: into a list, or past the type
    same = [error for error in errors if error["loc"][:2] == errors[0]["loc"][:2]]
    error = max(same, key=lambda error: (len(error["loc"]), not error["type"].endswith("_type")))
    where = [part for part in error["loc"] if part != "body"]
    if error["type"] == "json_invalid" or not where:
        return ApiError(
            400, "The body has to be one JSON object in UTF-8, with the header 'Content-Type: application/json'."
        )
    unknown, missing = error["type"] == "extra_forbidden", error["type"] == "missing"
    param = str(where[0])
    for before, part in pairwise(where):
        if isinstance(part, int):
            param += f"[{part}]"
        elif part in KNOWN or (unknown and part is where[-1] and before in KNOWN):
            param += f".{part}"
        else:
            # the rest says which of several types was tried
            break
    if unknown:
        return ApiError(400, f"'{param}' is not supported; leave it out.", param, "unsupported_parameter")
    if missing:
        return ApiError(400, f"'{param}' is missing.", param, "missing_required_parameter")
    said = error["msg"].removeprefix("Value error, ")
    said = said[:1].lower() + said[1:]
    return ApiError(400, f"'{param}' does not fit: {said}.", param)
