"""Short SQuAD: contexts are the sentences that hold the answers."""

import json

from evaluation.tasks import ShortSquad

CONTEXT = (
    'Dr. A. B. Stone was born in Vell in 1830. "He came to Orm," they say. '
    "In 1851 he built a bridge in Vell, of stone. "
    "It stood for 40.5 years."
)


def test_each_question_gets_the_sentence_of_its_answer(tmp_path):
    asked = [
        ("Where was Stone born?", "Vell"),
        ("Where did he build a bridge of stone?", "Vell"),
        ("How long did it stand?", "40.5 years"),
        ("What is in two sentences?", "of stone. It"),
        ("When did he build a bridge?", "1851"),
    ]
    lines = [{"context": CONTEXT, "query": query, "target": target, "answers": [target]} for query, target in asked]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = ShortSquad(source=str(tmp_path))
    assert task.dataset == f"{tmp_path.name}, sentences"
    rows = {row["context"]: row["queries"] for row in task.rows("test")}
    assert rows["In 1851 he built a bridge in Vell, of stone."] == [asked[1][0], asked[4][0]]
    assert rows["It stood for 40.5 years."] == [asked[2][0]]
    assert sum(map(len, rows.values())) == 4
    assert any("was born in Vell in 1830." in context for context in rows)
