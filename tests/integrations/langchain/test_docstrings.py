"""Every field and every argument of a public name has a line in its docstring."""

import inspect
import re

import langchain_gradmem
import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.retrievers import BaseRetriever
from langchain_gradmem.memory import GradMemConversationMemory
from langchain_gradmem.middleware import GradMemMiddleware
from pydantic import BaseModel

PUBLIC = [getattr(langchain_gradmem, name) for name in langchain_gradmem.__all__]
INHERITED = BaseChatModel.model_fields.keys() | BaseRetriever.model_fields.keys()


@pytest.mark.parametrize("public", [*PUBLIC, GradMemMiddleware, GradMemConversationMemory], ids=lambda p: p.__name__)
def test_arguments_are_explained(public):
    if inspect.isclass(public) and issubclass(public, BaseModel):
        names = public.model_fields.keys() - INHERITED
    elif inspect.isclass(public) and issubclass(public, Exception):
        names = ()
    else:
        names = inspect.signature(public).parameters
    for name in names:
        assert re.search(rf"\b{name} \(", public.__doc__), name
