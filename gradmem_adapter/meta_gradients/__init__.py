"""How outer gradients cross a write step, one strategy a file."""
