"""The server process: how it listens and how it stops."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress
from typing import Any

import uvicorn
from fastapi import FastAPI


class Server(uvicorn.Server):
    """Uvicorn's server. When it is stopped, answers have `grace` seconds to finish; writes, and requests that have not
    fully arrived, end at once.

    Args:
        app (`FastAPI`): what `create_app` returned.
        grace (`int`): as in `Limits`.
        options: other arguments of `uvicorn.Config`.
    """

    def __init__(self, app: FastAPI, *, grace: int, **options: Any) -> None:
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=grace, **options))
        self._stop_writes = app.state.writes.stop

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop writes and tell their clients, drop clients that are still sending, and let the others get answers."""
        self._stop_writes()
        for connection in self.server_state.connections:
            request = getattr(connection, "cycle", None)  # None before the first request; missing for a websocket
            if request is not None and request.more_body:
                connection.transport.close()
        await super().shutdown(sockets)


def check_address(host: str, port: int) -> None:
    """Raise unless a server can listen at an address, before the model is loaded.

    Raises:
        OSError: the address is in use, needs other permissions, or is not one of this machine.
    """
    failed: list[OSError] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise OSError(f"Cannot listen at {host}: {error.strerror}. Pass another --host.") from error
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                if os.name == "posix":  # on Windows, this option would allow an address that is in use
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
        except OSError as error:
            failed.append(error)
    # A host name may have an address that this machine lacks, such as IPv6 in some containers.
    for one in failed:
        if len(failed) == len(found) or one.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            told = f"Cannot listen at {host}, port {port}: {one.strerror}. Pass another --port or --host."
            raise OSError(told) from one


def run(app: FastAPI, *, host: str, port: int, grace: int) -> None:
    """Serve until a signal stops the server."""
    keep_alive = 75  # longer than clients do: otherwise they may use a connection that has just been closed
    server = Server(app, grace=grace, host=host, port=port, timeout_keep_alive=keep_alive, server_header=False)
    with suppress(KeyboardInterrupt):
        server.run()
