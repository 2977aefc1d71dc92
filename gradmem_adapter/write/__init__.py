"""WRITE: a context into memory by gradient steps, one equation a file."""
