"""Structured output: a random model has nothing to say and must still give what the schema asks for."""

import asyncio
import json
from typing import Literal, TypedDict

import pytest
from langchain.agents import create_agent
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import HumanMessage
from langchain_gradmem import ChatGradMem, attach, structured
from llguidance import LLMatcher
from pydantic import BaseModel, Field
from tiny_pipeline import byte_pipeline, tiny_pipeline

from gradmem_adapter.answering import grammar


class Pet(BaseModel):
    """An animal."""

    name: str = Field(max_length=6, pattern="^[a-z]*$")
    kind: Literal["dog", "cat"]
    legs: int = Field(ge=0, le=4)


class Owner(TypedDict):
    """A person."""

    pet: Literal["dog", "cat"]
    happy: bool


@pytest.fixture(scope="module")
def pipeline():
    return byte_pipeline()


@pytest.fixture
def chat(pipeline):
    return ChatGradMem(pipeline=pipeline, max_tokens=120)


@pytest.fixture
def reference(chat):
    return chat.store.write(chat.pipeline, "Rex is a dog.")[0]


class TestAnswers:
    def test_a_pydantic_class_gives_an_instance(self, chat):
        assert isinstance(chat.with_structured_output(Pet).invoke("Who is Rex?"), Pet)

    @pytest.mark.parametrize("schema", [Owner, {"title": "Owner", "type": "object", "properties": {
        "pet": {"enum": ["dog", "cat"]}, "happy": {"type": "boolean"}}, "required": ["pet", "happy"]}])  # fmt: skip
    def test_other_schemas_give_exactly_what_they_name(self, chat, schema):
        answer = chat.with_structured_output(schema).invoke("Who?")
        assert answer.keys() == {"pet", "happy"}
        assert answer["pet"] in ("dog", "cat")
        assert isinstance(answer["happy"], bool)

    def test_memory_is_read_for_structured_answers(self, chat, reference):
        structured = chat.with_structured_output(Pet, include_raw=True)
        without = structured.invoke("Who is Rex?")
        answer = structured.invoke([attach(HumanMessage("Who is Rex?"), [reference])])
        assert isinstance(answer["parsed"], Pet)
        assert answer["raw"].usage_metadata["input_token_details"]["memory_vectors"] == 3
        assert answer["raw"].text != without["raw"].text

    def test_bound_arguments_stay_bound(self, chat, reference):
        bound = chat.bind(memory=reference).with_structured_output(Pet, include_raw=True)
        named = chat.with_structured_output(Pet, include_raw=True, memory=reference)
        answer = bound.invoke("Who is Rex?")
        assert answer["raw"].usage_metadata["input_token_details"]["memory_vectors"] == 3
        assert answer["parsed"] == named.invoke("Who is Rex?")["parsed"]
        with_tools = chat.bind(memory=reference).bind_tools([])
        assert with_tools.invoke("Who?").usage_metadata["input_token_details"]["memory_vectors"] == 3

    def test_sampling_respects_the_schema(self, chat):
        structured = chat.with_structured_output(Pet, temperature=2.0, top_p=0.95)
        for seed in range(5):
            assert isinstance(structured.invoke("Who?", seed=seed), Pet)

    def test_a_batch_gives_the_same_as_single_calls(self, chat, reference):
        structured = chat.bind(memory=reference).with_structured_output(Pet)
        questions = ["Who?", "Who is Rex?", "What kind of animal is he?", "Legs?"]
        assert structured.batch(questions) == [structured.invoke(question) for question in questions]

    async def test_structured_and_free_answers_can_run_at_the_same_time(self, chat):
        answers = await asyncio.gather(
            chat.with_structured_output(Pet).ainvoke("Who?"),
            chat.ainvoke("Who?"),
            chat.with_structured_output(Owner).ainvoke("Who?"),
        )
        assert isinstance(answers[0], Pet)
        assert answers[1].text == chat.invoke("Who?").text
        assert answers[2].keys() == {"pet", "happy"}

    def test_a_stream_grows_into_the_answer(self, chat, reference):
        structured = chat.bind(memory=reference).with_structured_output(Owner)
        pieces = list(structured.stream("Who?"))
        assert len(pieces) > 2
        assert pieces[-1] == structured.invoke("Who?")

    async def test_an_async_stream_ends_with_the_answer(self, chat):
        pieces = [piece async for piece in chat.with_structured_output(Pet).astream("Who?")]
        assert isinstance(pieces[-1], Pet)

    def test_nested_objects_have_exactly_the_named_properties(self, chat):
        class Home(BaseModel):
            pets: list[Pet] = Field(min_length=2, max_length=2)

        answer = json.loads(chat.with_structured_output(Home, include_raw=True).invoke("Who?")["raw"].text)
        assert [pet.keys() for pet in answer["pets"]] == [{"name", "kind", "legs"}] * 2

    @pytest.mark.parametrize("field", ["const", "examples"])
    @pytest.mark.parametrize("keyword", ["$defs", "properties"])
    def test_names_of_fields_may_be_keywords_of_json_schema(self, pipeline, field, keyword):
        pet = {"type": "object", "properties": {"name": {"enum": ["Rex"]}}}
        schema = {"$ref": f"#/$defs/{field}"} if keyword == "$defs" else {"type": "object"}
        said = '{"name": "Rex", "' if keyword == "$defs" else f'{{"{field}": {{"name": "Rex", "'
        wanted = {"type": "json_schema", "json_schema": {"schema": schema | {keyword: {field: pet}}}}
        tokens = pipeline.tokenizer(said, add_special_tokens=False)["input_ids"]
        matcher = LLMatcher(grammar._tokenizer(pipeline), grammar.grammar_of(pipeline, wanted))
        assert matcher.validate_tokens(tokens) == said.index(",")

    def test_strict_requires_all_properties(self, chat):
        class Maybe(BaseModel):
            legs: Literal[1, 2] = 1

        raw = chat.with_structured_output(Maybe, strict=True, include_raw=True).invoke("How many?")["raw"]
        assert json.loads(raw.text).keys() == {"legs"}

    def test_an_agent_uses_structured_output_by_itself(self, chat):
        state = create_agent(chat, tools=[], response_format=Pet).invoke({"messages": [HumanMessage("Who?")]})
        assert isinstance(state["structured_response"], Pet)


class TestRefusals:
    def test_a_truncated_answer_is_an_error(self, chat):
        structured = chat.with_structured_output(Owner, max_tokens=12)
        with pytest.raises(OutputParserException, match="by max_tokens: raise max_tokens"):
            structured.invoke("Who?")
        with pytest.raises(OutputParserException, match="by max_tokens: raise max_tokens"):
            list(structured.stream("Who?"))
        answer = chat.with_structured_output(Owner, include_raw=True, max_tokens=12).invoke("Who?")
        assert answer["parsed"] is None
        assert "max_tokens" in str(answer["parsing_error"])
        assert answer["raw"].text.startswith('{"pet": "')

    def test_a_schema_that_cannot_be_enforced_is_refused_at_once(self, chat):
        with pytest.raises(ValueError, match=r"not supported by constrained decoding: .*not"):
            chat.with_structured_output({"title": "Answer", "type": "string", "not": {"const": "a"}})

    @pytest.mark.parametrize("wanted", [{"type": "json_object"}, "json", {"json_schema": {"name": "x"}}])
    def test_other_response_formats(self, chat, wanted):
        with pytest.raises(ValueError, match="as with_structured_output makes it"):
            chat.invoke("Who?", response_format=wanted)

    def test_a_word_tokenizer_is_refused(self):
        with pytest.raises(ValueError, match="decoder type"):
            ChatGradMem(pipeline=tiny_pipeline()).with_structured_output(Pet)

    def test_the_error_without_llguidance_says_what_to_install(self, chat, monkeypatch):
        monkeypatch.setattr(grammar, "AVAILABLE", False)
        with pytest.raises(ModuleNotFoundError, match=r"gradmem-adapter\[structured-output\]"):
            chat.with_structured_output(Pet)
        with pytest.raises(ModuleNotFoundError, match="llguidance"):
            chat.invoke("Who?", response_format=structured.response_format(Pet, None))
