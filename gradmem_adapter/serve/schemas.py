"""What requests may say."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeAlias

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
from typing_extensions import Self

Text: TypeAlias = Annotated[str, Field(min_length=1)]
AUTO: Literal["auto"] = "auto"


# What may be one thing or another is made one thing before it is looked at. Of a union pydantic would put the names of
# its types into the places of errors, which clients do not know.


def _as_list(value: Any) -> list[Any]:
    if not isinstance(value, str | list):
        raise ValueError("Send a text, or a list of them")
    return [value] if isinstance(value, str) else value


def _as_parts(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else _as_list(content)


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
        """An unknown field is told with the one that may have been meant; other errors stay as they are."""
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
            said = f"This server does not take it; {f'did you mean {meant[0]}?' if meant else 'leave it out'}"
        return PydanticCustomError(error["type"], said)


class MemoryRequest(_Body):
    """A text to write.

    Args:
        text (`str`): of any length.
        name (`str`, *optional*): what it is called.
        steps (`int`, *optional*): write steps; None: the adapter's.
        lr (`float`, *optional*): write learning rate; None: the adapter's.
        fidelity (`bool`, *optional*, defaults to `False`): measure how much the memory gives back, which takes longer
            than the writing.
        stream (`bool`, *optional*, defaults to `False`): send each write step as a server-sent event.
    """

    text: Text
    name: Annotated[str | None, Field(max_length=500)] = None
    steps: Annotated[int | None, Field(ge=0)] = None
    lr: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    fidelity: bool = False
    stream: bool = False


class RecitalRequest(_Body):
    """What greedy decoding gets from a memory alone.

    Args:
        memory (`str`): its id.
        segment (`int`, *optional*, defaults to `0`): which segment of its text.
        max_tokens (`int`, *optional*): most tokens; None: as many as the segment has.
        stream (`bool`, *optional*, defaults to `False`): send each piece of text as a server-sent event.
    """

    memory: Text
    segment: Annotated[int, Field(ge=0)] = 0
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    stream: bool = False


class StreamOptions(_Body):
    """Of a stream; `include_obfuscation` changes nothing."""

    include_usage: bool = False
    include_obfuscation: bool = False


class _Generation(_Body):
    """What both ways to ask have in common. What this server cannot do may be named with the value that asks nothing.

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
    # These say nothing of the answer.
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
    """A message of a chat. Other fields that clients give back, such as an answer's, are passed over."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_as_parts, json_schema_input_type=str | list[Part])]

    def as_template_has_it(self) -> dict[str, str]:
        """For the model's chat template."""
        content = "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


def _with_a_question(messages: list[Message]) -> list[Message]:
    asked = [message for message in messages if message.role == "user"]
    if not asked:
        raise ValueError("There is no message of the user to answer.")
    if not asked[-1].as_template_has_it()["content"].strip():
        raise ValueError("The user's last message is empty: there is nothing to answer.")
    return messages


class ChatRequest(_Generation):
    """OpenAI's `/v1/chat/completions`, with `memory`.

    Args:
        support (`bool`, *optional*, defaults to `False`): say how far memory supports an answer, before it begins.
    """

    messages: Annotated[list[Message], Field(min_length=1), AfterValidator(_with_a_question)]
    support: bool = False
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    response_format: dict[str, Any] | None = None
    logprobs: Literal[False] | None = False
    parallel_tool_calls: bool | None = None


class CompletionRequest(_Generation):
    """OpenAI's `/v1/completions`, with `memory`. A prompt is put into the adapter's query format."""

    prompt: Annotated[list[Text], Field(min_length=1), _ONE_OR_MANY]
    echo: Literal[False] | None = False
    best_of: Literal[1] | None = 1
    logprobs: None = None
    suffix: None = None
