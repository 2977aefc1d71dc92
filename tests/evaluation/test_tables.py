"""Tables from result files, and the blocks of pages that they fill."""

import pandas as pd
import pytest
from typer.testing import CliRunner

from evaluation import tables
from evaluation.cli import app
from evaluation.paper import KV_RETRIEVAL
from evaluation.results import RESULTS, load_records
from evaluation.tables import ROOT, TABLES, fill, markdown
from evaluation.tables.cells import grid, line_title, percent


@pytest.mark.parametrize("name", sorted(TABLES))
def test_every_table_can_be_made(name):
    table = TABLES[name]()
    assert len(table)
    lines = markdown(table).splitlines()
    assert len(lines) == len(table) + 2
    assert {line.count("|") for line in lines} == {len(table.columns) + 1}


def test_readme_and_docs_agree_with_the_result_files():
    assert fill(ROOT, write=False) == [], "run `python -m evaluation tables`"


def test_every_result_file_is_readable_and_without_duplicates():
    files = sorted(RESULTS.glob("*.jsonl"))
    assert len(files) > 5
    for file in files:
        keys = [record.key for record in load_records(file)]
        assert len(set(keys)) == len(keys), file


def test_key_value_retrieval_has_lines_for_our_results_and_the_papers():
    table = TABLES["kv_retrieval"]().set_index("pairs")
    assert table.loc["GradMem, 1 step", "16"] == "97.7"
    assert table.loc["GradMem, 5 steps", "64"] == "100"
    assert table.loc["forward-only memory, 2 passes", "32"] == "25.1"
    assert table.loc[f"paper: {KV_RETRIEVAL[0][0]}", "32"] == "86.9"
    assert not [name for name in table.index if "trained" in name]


def test_answers_come_from_the_shipped_adapters():
    table = TABLES["answers"]().set_index("exact match %")
    babi = "bAbI adapter, from 16 vectors, no gradient step (its default), trained for 14.2 minutes"
    general = "the same, one gradient step, trained for 12.5 minutes"
    assert table.loc[general, "FairytaleQA (F1)"] == "34.4"
    assert table.loc[babi, "bAbI 2"] == "98.5"
    assert pd.isna(table.loc[babi, "FairytaleQA (F1)"])


def test_blocks_are_filled_and_checked(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    page, readme = tmp_path / "docs" / "page.md", tmp_path / "README.md"
    readme.write_text("Nothing here.\n")
    page.write_text("Before.\n\n<!-- table: small -->\nold\n<!-- /table -->\n\nAfter.\n")
    monkeypatch.setitem(tables.TABLES, "small", lambda: pd.DataFrame({"a": [1, None], "b": ["x", "y"]}, dtype=object))
    command = ["tables", "--root", str(tmp_path)]
    result = CliRunner().invoke(app, [*command, "--check"])
    assert result.exit_code == 1
    assert "differs: page.md: small" in result.output
    assert "old" in page.read_text()
    assert CliRunner().invoke(app, command).exit_code == 0
    assert page.read_text() == (
        "Before.\n\n<!-- table: small -->\n| a | b |\n| --- | --- |\n| 1 | x |\n| | y |\n<!-- /table -->\n\nAfter.\n"
    )
    assert CliRunner().invoke(app, [*command, "--check"]).exit_code == 0
    page.write_text("<!-- table: none -->\n<!-- /table -->\n")
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "a block for the unknown table 'none'" in " ".join(result.stderr.split())


def test_cells_and_titles_are_formatted():
    assert (percent(0.3333), percent(0.5, 0.01)) == ("33.3", "50.0 ± 1.0")
    titles = [line_title("gradmem", 1), line_title("forward_memory", 2), line_title("full_context", 0)]
    assert titles == ["GradMem, 1 step", "forward-only memory, 2 passes", "full context"]
    table = grid(
        pd.DataFrame({"v": [1, 2, 3]}), ["a", "b", "a"], ["x", "x", "y"], lambda found: str(found["v"].iloc[0])
    )
    assert table.fillna("").to_numpy().tolist() == [["a", "1", "3"], ["b", "2", ""]]
