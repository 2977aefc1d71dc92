"""The server as a process: what listens, and how it ends."""

from __future__ import annotations

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
