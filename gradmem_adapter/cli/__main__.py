"""Lets torchrun start the command: `torchrun -m gradmem_adapter.cli train ...`."""

from gradmem_adapter.cli.main import app

app()
