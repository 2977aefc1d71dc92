"""The `gradmem` command, a thin layer over the API: one file per subcommand."""

from gradmem_adapter.cli.main import app

__all__ = ["app"]
