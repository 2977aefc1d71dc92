"""Results on key-value retrieval: which measurements stand in one line."""

from gradmem_adapter.tasks.kv_results import KVRecord, by_line, plot, table
from gradmem_adapter.tasks.records import pyplot


def record(method="gradmem", trained_steps="1-20", pairs=16, write_steps=1, exact_match=0.5):
    return KVRecord(method, trained_steps, pairs, write_steps, exact_match, 512, 0, 100, "CPU")


RECORDS = [
    record("full_context", "0", write_steps=0, exact_match=1.0),
    record(trained_steps="2", write_steps=10, exact_match=0.9),
    record(trained_steps="2", write_steps=2, exact_match=0.8),
    record(trained_steps="1", exact_match=0.7),
    record(write_steps=10, exact_match=0.6),
    record(),
    record(pairs=32, exact_match=0.4),
    record("forward_memory", "1-5", exact_match=0.3),
]


def test_models_trained_with_one_number_of_steps_have_lines_of_their_own():
    assert by_line(RECORDS) == {
        "GradMem, 1 step": {16: 50, 32: 40},
        "GradMem, 10 steps": {16: 60},
        "GradMem trained with K=1, 1 step": {16: 70},
        "GradMem trained with K=2, 2 steps": {16: 80},
        "GradMem trained with K=2, 10 steps": {16: 90},
        "forward-only memory, 1 pass": {16: 30},
        "full context": {16: 100},
    }
    assert list(by_line(RECORDS)) == list(by_line(reversed(RECORDS)))
    assert table(RECORDS).row_count == 7


def test_plots_leave_their_lines_to_the_heat_map(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(pyplot(), "close", closed.append)
    files = plot(RECORDS, tmp_path)
    assert [file.stat().st_size > 0 for file in files] == [True, True]
    labels = closed[0].axes[0].get_legend_handles_labels()[1]
    assert not [label for label in labels if "trained" in label]
    assert "GradMem, 1 step" in labels
    rows = [label.get_text() for label in closed[1].axes[0].get_yticklabels()]
    assert rows == ["16 pairs, K=1", "16 pairs, K=2", "16 pairs, K=1-20", "32 pairs, K=1-20"]
