"""`gradmem serve`: memories over HTTP, and answers from them through OpenAI's API."""

from gradmem_adapter.serve.app import create_app, is_loopback
from gradmem_adapter.serve.limits import Limits
from gradmem_adapter.serve.server import Server, check_address, run
from gradmem_adapter.serve.stores import TENANTS, store_of, unseen
from gradmem_adapter.serve.tenants import Tenants

__all__ = [
    "TENANTS",
    "Limits",
    "Server",
    "Tenants",
    "check_address",
    "create_app",
    "is_loopback",
    "run",
    "store_of",
    "unseen",
]
