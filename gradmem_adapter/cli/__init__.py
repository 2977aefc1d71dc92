"""The `gradmem` command, thin over the API: a command a file."""

from gradmem_adapter.cli.main import app

__all__ = ["app"]
