"""How tests ask a server."""

import threading
import time
from contextlib import contextmanager

from gradmem_adapter.serve import Server


@contextmanager
def listening(app):
    """The address of an app that listens on a port of this machine."""
    with running(app) as (url, _):
        yield url


@contextmanager
def running(app):
    """The address of an app, and the server, which can be stopped."""
    server = Server(app, grace=30, port=0, log_level="error")
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join()


def written(client, text, **more):
    """Writes a text, and returns its memory."""
    response = client.post("/v1/memories", json={"text": text, **more})
    assert response.status_code == 200, response.text
    return response.json()


def metric(client, name):
    """The value of a metric without labels."""
    (line,) = (line for line in client.get("/metrics").text.splitlines() if line.startswith(f"{name} "))
    return float(line.split()[1])
