"""Requests and answers. Unknown fields of a request are ignored, as OpenAI does; those of ``rheostat`` are an error."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from rheostat.serving.server import limits

Mode = Literal["adapt", "commit", "static"]


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


class RheostatOptions(BaseModel):
    """What to do with the adapter.

    ``mode``: ``adapt`` lets it decide whatever sampling parameters the request names, ``commit`` likewise with its most
    probable action at every token, ``static`` leaves it out. By default ``adapt``, and ``static`` where the request
    names sampling parameters. ``trace``: say how every token was drawn.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    mode: Mode | None = None
    trace: bool = False


class StreamOptions(_Request):
    """``include_usage``: a last chunk with the usage."""

    include_usage: bool = False


StopString = Annotated[str, Field(min_length=1, max_length=limits.STOP_LENGTH)]


class Sampled(_Request):
    """The fields that both kinds of requests have."""

    model: Annotated[str, Field(max_length=500)]
    n: int = Field(1, ge=1, le=limits.SAMPLES, description="parallel budget B")
    temperature: float | None = Field(None, ge=0, le=10)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 31, description="0 and -1: off")
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: StopString | Annotated[list[StopString], Field(max_length=limits.STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0, description="not supported")] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0, description="not supported")] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0, description="not supported")] | None = None
    rheostat: RheostatOptions | None = None

    @field_validator("n", "stream", mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def samples_explicitly(self) -> bool:
        """Whether it names sampling parameters."""
        return any(value is not None for value in (self.temperature, self.top_p, self.top_k, self.min_p))


class TextPart(_Request):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(_Request):
    """One turn of a conversation; content in parts is joined."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @field_validator("content", mode="before")
    @classmethod
    def _text_only(cls, value: Any) -> Any:
        parts = value if isinstance(value, list) else []
        if any(isinstance(part, dict) and part.get("type") not in (None, "text") for part in parts):
            raise PydanticCustomError("text_only", "only parts of type text are read: no images, sound or files")
        return value

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Sampled):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=limits.MESSAGES)
    max_tokens: int | None = Field(None, ge=1, le=limits.MAX_TOKENS, description="token budget b")
    max_completion_tokens: int | None = Field(None, ge=1, le=limits.MAX_TOKENS, description="wins over max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=limits.TOP_LOGPROBS)
    tools: Annotated[list[Any], Field(max_length=0, description="not supported")] | None = None
    response_format: dict[str, Any] | None = Field(None, description="type text only")

    @model_validator(mode="after")
    def _supported(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs: true")
        if self.response_format is not None and self.response_format.get("type") != "text":
            raise PydanticCustomError("response_format", "response_format: only {'type': 'text'} is supported")
        return self


Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(Sampled):
    """``POST /v1/completions``."""

    prompt: (
        str
        | Tokens
        | Annotated[list[str], Field(min_length=1, max_length=limits.PROMPTS)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=limits.PROMPTS)]
    )
    max_tokens: int | None = Field(None, ge=1, le=limits.MAX_TOKENS, description="token budget b")
    logprobs: int | None = Field(None, ge=0, le=limits.TOP_LOGPROBS)
    echo: Literal[False] | None = Field(None, description="true is not supported")
    suffix: Literal[""] | None = Field(None, description="not supported")
    best_of: int | None = Field(None, ge=1, description="not supported beyond n")

    @model_validator(mode="after")
    def _supported(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != self.n:
            raise PydanticCustomError("best_of", "best_of is not supported: ask for n and choose")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # a list of numbers is one prompt
        return list(self.prompt)


# ---- answers: documentation of what answers.py builds ----


class TraceToken(BaseModel):
    """How one token was drawn."""

    text: str
    action: int | None = Field(description="position among the actions; null: no token policy decided")
    temperature: float
    top_p: float
    entropy: float = Field(description="of the model's distribution, in nats")
    p_max: float = Field(description="the model's largest probability")
    pi: list[float] | None = Field(description="probability of each action")
    remaining: int = Field(description="b_t: tokens left, this one included")


class Choice(BaseModel):
    """What a sequence-level adapter chose for one prompt, and the trace of one completion."""

    strategy: str | None = None
    probabilities: dict[str, float] | None = None
    trace: list[TraceToken] | None = None


class RheostatInfo(BaseModel):
    """How an answer was sampled. ``strategy`` is null where it changes from token to token."""

    mode: Mode
    adapter: str | None
    level: Literal["sequence", "token", "autodeco"] | None
    seed: int
    actions: list[str] | None = Field(description="what the adapter chooses from")
    strategy: str | None = Field(description="of the first prompt")
    probabilities: dict[str, float] | None = Field(description="of a sequence-level adapter's actions, first prompt")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


Finish = Literal["stop", "length"]


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of the model's own distribution, before temperature and truncation."""

    content: list[TokenLogprob]


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    finish_reason: Finish
    logprobs: ChatLogprobs | None
    rheostat: Choice | None = None


class ChatAnswer(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    rheostat: RheostatInfo


class TextLogprobs(BaseModel):
    """Of the model's own distribution, before temperature and truncation."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    finish_reason: Finish
    logprobs: TextLogprobs | None
    rheostat: Choice | None = None


class CompletionAnswer(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    rheostat: RheostatInfo


class ModelInfo(BaseModel):
    """What rheostat says about a model; ``chat``: it has a template for conversations."""

    adapter: str | None
    level: Literal["sequence", "token", "autodeco"] | None
    actions: list[str] | None
    budgets: list[int] | None
    context_length: int
    chat: bool


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    rheostat: ModelInfo


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    """``draining``: what runs is finished, and nothing new is taken."""

    status: Literal["ok", "draining"]
    running: int
    waiting: int
