"""What the paper reports (arXiv 2603.13875), to stand beside our figures."""

KV_RETRIEVAL: tuple[tuple[str, dict[int, float]], ...] = (
    ("GradMem, 1 step", {4: 100, 8: 100, 16: 96, 32: 86.9, 64: 58.6, 96: 33}),
    ("GradMem, 5 steps", {4: 100, 8: 100, 16: 100, 32: 99.8, 64: 99, 96: 88.4}),
    ("forward-only writer (RMT)", {4: 100, 8: 100, 16: 45, 32: 44, 64: 19, 96: 13}),
    ("full context", {4: 100, 8: 100, 16: 100, 32: 99.8, 64: 97, 96: 99}),
)
"""Exact match % by pairs with 8 memory vectors; values read off a plot are rounded."""
KV_METHODS = {
    "GradMem, 1 step": "gradmem",
    "GradMem, 5 steps": "gradmem",
    "forward-only writer (RMT)": "forward_memory",
    "full context": "full_context",
}
