"""WRITE: gradient steps that store a context in memory, one equation per file."""
