"""A chain that answers from retrieved documents, with memory in place of their text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_core.documents import Document
from langchain_core.messages import BaseMessage
from langchain_core.output_parsers import BaseOutputParser, StrOutputParser
from langchain_core.prompts import BasePromptTemplate, PromptTemplate, format_document
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda

from .document_compressors import GradMemCompressor
from .references import attach_documents, marker, references_of

if TYPE_CHECKING:
    from .chat_models import ChatGradMem

_TEXT_ALONE = PromptTemplate.from_template("{page_content}")


def create_gradmem_stuff_chain(
    llm: ChatGradMem,
    prompt: BasePromptTemplate,
    *,
    compressor: GradMemCompressor | None = None,
    output_parser: BaseOutputParser | None = None,
    document_prompt: BasePromptTemplate | None = None,
    document_separator: str = "\n\n",
    document_variable_name: str = "context",
) -> Runnable[dict[str, Any], Any]:
    """LangChain's `create_stuff_documents_chain`, for documents that the model reads from memory.

    Documents are written when first seen. In the prompt, a marker, which the model is not shown, takes the place of a
    document's text; the metadata that `document_prompt` uses stay text. Documents that the compressor leaves as text
    (`fallback="text"`) appear as text.

    Args:
        llm (`ChatGradMem`): the model that answers; it may be bound, have retries or fallbacks, ...
        prompt (`BasePromptTemplate`): a prompt of messages or of one string, with a human message and the documents'
            variable.
        compressor (`GradMemCompressor`, *optional*): writes the documents; None: the chat model's pipeline, into its
            store.
        output_parser (`BaseOutputParser`, *optional*): parses the answer; None: the answer's text.
        document_prompt (`BasePromptTemplate`, *optional*): the prompt for one document; None: its text alone.
        document_separator (`str`, *optional*): the text between documents.
        document_variable_name (`str`, *optional*, defaults to `"context"`): the input that holds the documents.

    Returns:
        `Runnable[dict, Any]`: takes the prompt's variables, with the documents as a list.

    Raises:
        TypeError: `llm` does not hold a `ChatGradMem`, for example because it has a schema; or, in a call, the
            documents are a text.
        ValueError: the prompt has no variable for the documents.
    """
    if document_variable_name not in prompt.input_variables:
        raise ValueError(
            f"The prompt needs the variable {document_variable_name!r} for the documents, but has "
            f"{', '.join(prompt.input_variables) or 'none'}. Add it, or pass another name as document_variable_name."
        )
    writer = GradMemCompressor.from_chat(llm) if compressor is None else compressor

    def shown(document: Document) -> str:
        markers = " ".join(map(marker, references_of(document)))
        if markers:
            document = document.model_copy(update={"page_content": markers})
        return format_document(document, document_prompt or _TEXT_ALONE)

    def messages(inputs: dict[str, Any], config: RunnableConfig) -> list[BaseMessage]:
        documents = inputs[document_variable_name]
        if isinstance(documents, str):
            raise TypeError(
                f"{document_variable_name!r} must be a list of Documents, got a string. Leave out the function that "
                "joins them (format_docs), so that they can be read from memory."
            )
        found = writer.compress_documents(documents, "", callbacks=config.get("callbacks"))
        text = document_separator.join(map(shown, found))
        value = prompt.invoke({**inputs, document_variable_name: text}, config)
        return attach_documents(value, [document for document in found if references_of(document)])

    chain = RunnableLambda(messages).with_config(run_name="format_inputs") | llm | (output_parser or StrOutputParser())
    return chain.with_config(run_name="gradmem_stuff_chain")
