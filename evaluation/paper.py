"""The paper's figures (arXiv 2603.13875), for comparison with ours."""

KV_RETRIEVAL: tuple[tuple[str, str, dict[int, float]], ...] = (
    ("GradMem, 1 step", "gradmem", {4: 100, 8: 100, 16: 96, 32: 86.9, 64: 58.6, 96: 33}),
    ("GradMem, 5 steps", "gradmem", {4: 100, 8: 100, 16: 100, 32: 99.8, 64: 99, 96: 88.4}),
    ("forward-only writer (RMT)", "forward_memory", {4: 100, 8: 100, 16: 45, 32: 44, 64: 19, 96: 13}),
    ("full context", "full_context", {4: 100, 8: 100, 16: 100, 32: 99.8, 64: 97, 96: 99}),
)
"""The paper's name, our corresponding method, and exact match % by number of pairs with 8 memory vectors.

Values read off a plot are rounded.
"""
