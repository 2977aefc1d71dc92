"""The bodies of requests."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

Text: TypeAlias = Annotated[str, Field(min_length=1)]
AUTO: Literal["auto"] = "auto"


# Values that may have one of two types are converted to one type before validation. For a union, pydantic would put its
# type names into the locations of errors, which mean nothing to clients.


def _as_list(value: Any) -> list[Any]:
    if not isinstance(value, str | list):
        raise ValueError("Send a string or a list of strings")
    return [value] if isinstance(value, str) else value


def _as_parts(content: Any) -> list[Any]:
    if not isinstance(content, str | list):
        raise ValueError("Send a string or a list of parts, such as {'type': 'text', 'text': ...}")
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _ids_or_auto(value: Any, ids: ValidatorFunctionWrapHandler) -> Any:
    if value != AUTO and not isinstance(value, list):
        raise ValueError(f"Send a list of ids, or {AUTO!r}")
    return value if value == AUTO else ids(value)


_ONE_OR_MANY = BeforeValidator(_as_list, json_schema_input_type=Text | list[Text])
_IDS_OR_AUTO = WrapValidator(_ids_or_auto, json_schema_input_type=list[str] | Literal["auto"])


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="wrap")
    @classmethod
    def _name_what_was_meant(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Suggest a known field for an unknown one; other errors stay as they are."""
        try:
            return handler(values)
        except ValidationError as error:
            told = [InitErrorDetails(type=cls._told(one), loc=one["loc"], input=one["input"]) for one in error.errors()]
            raise ValidationError.from_exception_data(cls.__name__, told) from None

    @classmethod
    def _told(cls, error: ErrorDetails) -> PydanticCustomError:
        said = error["msg"]
        if error["type"] == "extra_forbidden" and len(error["loc"]) == 1:
            meant = get_close_matches(str(error["loc"][0]), cls.model_fields, n=1)
            said = f"This server does not support it; {f'did you mean {meant[0]}?' if meant else 'leave it out'}"
        return PydanticCustomError(error["type"], said)


class MemoryRequest(_Body):
    """A text to write.

    Args:
        text (`str`): the text, of any length.
        name (`str`, *optional*): a name for it.
        steps (`int`, *optional*): write steps; None: the adapter's.
        lr (`float`, *optional*): write learning rate; None: the adapter's.
        fidelity (`bool`, *optional*, defaults to `False`): measure how much of the text greedy decoding from memory
            gets back, which takes longer than writing.
        stream (`bool`, *optional*, defaults to `False`): send each write step as a server-sent event.
    """

    text: Text
    name: Annotated[str | None, Field(max_length=500)] = None
    steps: Annotated[int | None, Field(ge=0)] = None
    lr: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    fidelity: bool = False
    stream: bool = False


class RecitalRequest(_Body):
    """Decode a segment's text greedily, from memory alone.

    Args:
        memory (`str`): the memory's id.
        segment (`int`, *optional*, defaults to `0`): the number of the segment.
        max_tokens (`int`, *optional*): the most tokens; None: as many as the segment has.
        stream (`bool`, *optional*, defaults to `False`): send each piece of text as a server-sent event.
    """

    memory: Text
    segment: Annotated[int, Field(ge=0)] = 0
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    stream: bool = False


class StreamOptions(_Body):
    """Options of a streamed answer; `include_obfuscation` is accepted and ignored."""

    include_usage: bool = False
    include_obfuscation: bool = False


class _Generation(_Body):
    """The fields that both kinds of request have in common. Fields that this server does not support are accepted only
    with the value that changes nothing.

    Args:
        memory (`list[str]` or `"auto"`, *optional*): the memories to answer from; `"auto"`: the store chooses. None:
            the backbone answers.
    """

    model: str
    memory: Annotated[list[str], Field(max_length=64), _IDS_OR_AUTO] | None = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: Annotated[list[Text], Field(max_length=4), _ONE_OR_MANY] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = 1
    frequency_penalty: Literal[0] | None = 0
    presence_penalty: Literal[0] | None = 0
    logit_bias: dict[str, float] | None = Field(default=None, max_length=0)
    # These do not affect the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return tuple(self.stop or ())


class Part(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a chat. Other fields are ignored: clients send them back with earlier answers."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_as_parts, json_schema_input_type=str | list[Part])]

    def as_template_has_it(self) -> dict[str, str]:
        """The message as the model's chat template takes it."""
        content = "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


def _with_a_question(messages: list[Message]) -> list[Message]:
    asked = [message for message in messages if message.role == "user"]
    if not asked:
        raise ValueError("There is no message with the role user to answer.")
    if not asked[-1].as_template_has_it()["content"].strip():
        raise ValueError("The last user message is empty: there is nothing to answer.")
    return messages


class ChatRequest(_Generation):
    """OpenAI's `/v1/chat/completions`, with `memory`.

    Args:
        support (`bool`, *optional*, defaults to `False`): say how far memory supports an answer, before the answer.
    """

    messages: Annotated[list[Message], Field(min_length=1), AfterValidator(_with_a_question)]
    support: bool = False
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    response_format: dict[str, Any] | None = None
    logprobs: Literal[False] | None = False
    parallel_tool_calls: bool | None = None


class CompletionRequest(_Generation):
    """OpenAI's `/v1/completions`, with `memory`. Each prompt is put into the adapter's query format."""

    prompt: Annotated[list[Text], Field(min_length=1), _ONE_OR_MANY]
    echo: Literal[False] | None = False
    best_of: Literal[1] | None = 1
    logprobs: None = None
    suffix: None = None
