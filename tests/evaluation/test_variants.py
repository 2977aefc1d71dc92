"""Every way to load a backbone is right, or refused when the adapter is attached."""

import json

import pytest
from typer.testing import CliRunner

from evaluation.cli import app
from evaluation.tables.variants import variants as table
from evaluation.variants import VARIANTS, check, missing

FAST = ("bfloat16", "gradient checkpointing, attention sdpa", "one layer on a disk")


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=() if v.name in FAST else pytest.mark.slow, id=v.name) for v in VARIANTS if not missing(v)],
)
def test_a_variant_is_right_or_refused(variant):
    found = check(variant)
    assert found["verdict"] in ("passes", "refused"), found


def test_results_are_recorded(tmp_path):
    path = tmp_path / "variants.jsonl"
    found = CliRunner().invoke(app, ["variants", "WRITE in CUDA graphs", "float16", "--results", str(path)])
    assert found.exit_code == 0, found.output
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["dataset"] for record in records] == ["float16", "WRITE in CUDA graphs"]
    assert records[0]["facts"]["verdict"] == "passes"
    found = CliRunner().invoke(app, ["variants", "float8", "--results", str(path)])
    assert found.exit_code != 0
    assert "no variant float8; there are" in " ".join(found.output.split())


def test_the_table_has_every_variant():
    assert set(table()["backbone"]) == {variant.name for variant in VARIANTS}
    assert not set(table()["found"]) & {"wrong", "crashes later"}
