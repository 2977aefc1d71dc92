"""The server as a process: what listens, and how it ends."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress
from typing import Any

import uvicorn
from fastapi import FastAPI


class Server(uvicorn.Server):
    """Uvicorn's. When it is stopped answers have `grace` seconds to end; texts that are being written and requests that
    have not arrived wholly have none.

    Args:
        app (`FastAPI`): what `create_app` made.
        grace (`int`): of `Limits`.
        options: what else `uvicorn.Config` takes.
    """

    def __init__(self, app: FastAPI, *, grace: int, **options: Any) -> None:
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=grace, **options))
        self._stop_writes = app.state.writes.stop

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Tell who waits for a text to be written, leave who still sends, and let the others have their answers."""
        self._stop_writes()
        for connection in self.server_state.connections:
            request = getattr(connection, "cycle", None)  # None before there is one; a websocket has none
            if request is not None and request.more_body:
                connection.transport.close()
        await super().shutdown(sockets)


def check_address(host: str, port: int) -> None:
    """Raise before the work unless a server can listen at an address.

    Args:
        host (`str`), port (`int`): as for `run`.

    Raises:
        OSError: another one listens there, it may not be taken, or it is none of this machine.
    """
    failed: list[OSError] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise OSError(f"Nothing can listen at {host}: {error.strerror}. Take another --host.") from error
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                if os.name == "posix":  # elsewhere it would be given an address that is taken
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
        except OSError as error:
            failed.append(error)
    # One of a name's addresses may be missing, as IPv6 is in some containers.
    for one in failed:
        if len(failed) == len(found) or one.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            told = f"Nothing can listen at {host}, port {port}: {one.strerror}. Take another --port, or --host."
            raise OSError(told) from one


def run(app: FastAPI, *, host: str, port: int, grace: int) -> None:
    """Serve until a signal ends it.

    Args:
        app, grace: as for `Server`.
        host (`str`), port (`int`): where to listen.
    """
    keep_alive = 75  # longer than clients keep a connection, or one would be used that has just been closed
    server = Server(app, grace=grace, host=host, port=port, timeout_keep_alive=keep_alive, server_header=False)
    with suppress(KeyboardInterrupt):
        server.run()
