"""Load on `gradmem serve`: how fast it answers, and whether it stays correct whatever clients do.

    python -m benchmarks.serve checkpoints/smollm2-135m-qa [--clients 1 8 32] [--seconds 20] [--stress 600]

The server is a separate process on this machine. First, each number of clients asks one question after another for
`--seconds`. Then, for `--stress` seconds, clients of three tenants write, read, stream, list and delete; in between
they send wrong keys, ask for other tenants' memories and for states that are not finite, send bodies that are too long,
cancel requests and drop connections. Finally, the server is killed by SIGKILL under this load and started again.

    requests_per_second, p50_ms, p95_ms: for whole answers.
    errors: answers with an unexpected status.
    wrong: answers that differ from the answer to the same question asked alone.
    crossed: memories that were shown to another tenant.
    lost: memories that were written but are missing, also after the kill.
    growth_mib: growth of the server's resident memory since a third of the time.
"""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks import common
from benchmarks.service import requests
from gradmem_adapter import MemoryStore
from gradmem_adapter.serve import TENANTS
from gradmem_adapter.store import files

KEYS = {name: f"{name}-key-for-the-benchmark" for name in ("anna", "bert", "cleo")}
BODY_BYTES = 2**16
STRESS_CLIENTS = 12
SHORT_TIMEOUT = 0.05
"""Seconds after which a request is cancelled."""


@dataclass
class Server:
    """`gradmem serve` in a separate process.

    Args:
        checkpoint (`str`): a directory with an adapter.
        folder (`Path`): the folder for its store and keys.
    """

    checkpoint: str
    folder: Path
    process: subprocess.Popen[bytes] = field(init=False)
    url: str = ""

    async def start(self) -> None:
        """Start the server and wait until it answers."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        keys = self.folder / "keys"
        keys.write_text("".join(f"{name} {key}\n" for name, key in KEYS.items()))
        command = [sys.executable, "-m", "gradmem_adapter.cli", "serve", self.checkpoint, "--port", str(port)]
        command += ["--store", str(self.folder / "store"), "--keys", str(keys), "--max-body", str(BODY_BYTES)]
        self.url = f"http://127.0.0.1:{port}"
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen(command, stdout=log, stderr=log)
        async with httpx.AsyncClient(base_url=self.url) as client:
            while self.process.poll() is None:
                with suppress(httpx.HTTPError):
                    if (await client.get("/health")).status_code == 200:
                        return
                await asyncio.sleep(0.2)
        raise RuntimeError((self.folder / "log").read_text()[-2000:])

    def client(self, tenant: str) -> httpx.AsyncClient:
        """A client with a tenant's key."""
        headers = {"Authorization": f"Bearer {KEYS[tenant]}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=600)

    def memory(self) -> int:
        """The server's resident memory in bytes."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Stop the server with a signal."""
        self.process.send_signal(number)
        self.process.wait()


@asynccontextmanager
async def running(checkpoint: str) -> AsyncIterator[Server]:
    """A server with an empty store."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(checkpoint, Path(folder))
        await server.start()
        try:
            yield server
        finally:
            server.stop()


async def model_of(client: httpx.AsyncClient) -> str:
    """The name of the served model."""
    return str((await client.get("/v1/models")).json()["data"][0]["id"])


async def ask(client: httpx.AsyncClient, model: str, memory: Any, question: str, **more: Any) -> httpx.Response:
    """Ask a question, with greedy decoding."""
    body = {"model": model, "prompt": question, "memory": memory, "max_tokens": 8}
    return await client.post("/v1/completions", json=body | more)


def said(response: httpx.Response) -> str:
    return str(response.json()["choices"][0]["text"])


async def write(client: httpx.AsyncClient, text: str) -> str:
    """Write a text; returns the id of its memory."""
    return str((await client.post("/v1/memories", json={"text": text})).raise_for_status().json()["id"])


async def throughput(server: Server, clients: int, seconds: float) -> dict[str, float]:
    """Let clients ask one question after another."""
    times, counts = [], Counter[str]()
    async with server.client("anna") as client:
        model, asked = await model_of(client), requests(20)
        ids = [await write(client, inputs["context"][0].page_content) for inputs, _ in asked]
        pairs = [(identity, inputs["question"]) for identity, (inputs, _) in zip(ids, asked, strict=True)]
        alone = {pair: said(await ask(client, model, [pair[0]], pair[1])) for pair in pairs}
        end = time.perf_counter() + seconds

        async def one(number: int) -> None:
            draw = random.Random(number)
            while (start := time.perf_counter()) < end:
                pair = draw.choice(pairs)
                response = await ask(client, model, [pair[0]], pair[1])
                times.append(1000 * (time.perf_counter() - start))
                counts["errors"] += response.status_code != 200
                counts["wrong"] += response.status_code == 200 and said(response) != alone[pair]

        start = time.perf_counter()
        await asyncio.gather(*map(one, range(clients)))
        took = time.perf_counter() - start
    return {
        "requests_per_second": len(times) / took,
        "p50_ms": statistics.median(times),
        "p95_ms": statistics.quantiles(times, n=20)[-1],
        "errors": counts["errors"],
        "wrong": counts["wrong"],
    }


class Tenant:
    """A tenant's clients under stress, and what they expect.

    Args:
        name (`str`): the tenant.
        server (`Server`): the server.
        counts (`Counter`): counts what was done and what went wrong.
    """

    def __init__(self, name: str, server: Server, counts: Counter[str]) -> None:
        self.name, self.server, self.counts = name, server, counts
        self.client = server.client(name)
        self.model = ""
        self.kept: dict[tuple[str, str], str] = {}
        """The answers to questions about permanent memories, each asked alone."""
        self.own: set[str] = set()
        """Every memory that this tenant ever wrote."""
        self.passing: set[str] = set()
        """The ones of these that are stored and may be deleted."""
        self.number = 0
        self.spoiled = ""
        """A memory whose vectors on disk are not finite."""

    async def prepare(self) -> None:
        """Write the permanent memories, and ask about them while no other client does."""
        self.model = await model_of(self.client)
        for inputs, _ in requests(6):
            text = f"{inputs['context'][0].page_content} {self.name} wrote this."
            identity = await write(self.client, text)
            self.own.add(identity)
            question = inputs["question"]
            self.kept[identity, question] = said(await ask(self.client, self.model, [identity], question))
        self.spoiled = await write(self.client, f"{self.name} is spoiled.")
        self.own.add(self.spoiled)
        store = MemoryStore(self.server.folder / "store" / TENANTS / self.name)
        for entry in store.entries(self.spoiled):
            path = files.state_file_of(store.index.states, entry.key)
            tensors, entries = files.read_file(path)
            tensors["vectors"].fill_(float("nan"))
            files.write_file(path, tensors, entries)

    def expect(self, response: httpx.Response, *status: int) -> bool:
        """Whether a response has one of the expected statuses; 429 is never an error."""
        if response.status_code not in (*status, 429):
            self.counts["errors"] += 1
            print(response.request.method, response.request.url.path, response.status_code, response.text, flush=True)
        return response.status_code in status

    async def read(self, draw: random.Random, other: Tenant) -> None:
        (identity, question), answer = draw.choice(list(self.kept.items()))
        response = await ask(self.client, self.model, [identity], question)
        if self.expect(response, 200):
            self.counts["wrong"] += said(response) != answer

    async def stream(self, draw: random.Random, other: Tenant) -> None:
        (identity, question), answer = draw.choice(list(self.kept.items()))
        response = await ask(self.client, self.model, [identity], question, stream=True)
        if self.expect(response, 200):
            lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
            pieces = [choice["text"] for line in lines for choice in httpx.Response(200, text=line).json()["choices"]]
            self.counts["wrong"] += "".join(pieces) != answer

    async def write(self, draw: random.Random, other: Tenant) -> None:
        self.number += 1
        response = await self.client.post("/v1/memories", json={"text": f"{self.name} saw bird number {self.number}."})
        if self.expect(response, 200):
            self.own.add(response.json()["id"])
            self.passing.add(response.json()["id"])

    async def delete(self, draw: random.Random, other: Tenant) -> None:
        if self.passing:
            identity = self.passing.pop()
            if not self.expect(await self.client.delete(f"/v1/memories/{identity}"), 200):
                self.passing.add(identity)

    async def list(self, draw: random.Random, other: Tenant) -> None:
        response = await self.client.get("/v1/memories", params={"limit": 1000})
        if self.expect(response, 200):
            shown = {one["id"] for one in response.json()["data"]}
            self.counts["crossed"] += len(shown & other.own - self.own)
            self.counts["lost"] += len({identity for identity, _ in self.kept} - shown)

    async def another_s(self, draw: random.Random, other: Tenant) -> None:
        identity, question = draw.choice(list(other.kept))
        response = await ask(self.client, self.model, [identity], question)
        self.counts["crossed"] += not self.expect(response, 404) and response.status_code == 200

    async def wrong_key(self, draw: random.Random, other: Tenant) -> None:
        headers = {"Authorization": "Bearer nobody-has-this-key"}
        self.expect(await self.client.get("/v1/memories", headers=headers), 401)

    async def too_long(self, draw: random.Random, other: Tenant) -> None:
        with suppress(httpx.WriteError, httpx.ReadError):  # the server may close the connection early
            self.expect(await self.client.post("/v1/memories", json={"text": "w " * BODY_BYTES}), 413)

    async def not_finite(self, draw: random.Random, other: Tenant) -> None:
        response = await ask(self.client, self.model, [self.spoiled], "Who?")
        self.expect(response, 500)

    async def cancelled(self, draw: random.Random, other: Tenant) -> None:
        (identity, question), _ = draw.choice(list(self.kept.items()))
        with suppress(httpx.TimeoutException):
            await ask(self.client, self.model, [identity], question, max_tokens=64, timeout=SHORT_TIMEOUT)

    async def dropped(self, draw: random.Random, other: Tenant) -> None:
        (identity, question), _ = draw.choice(list(self.kept.items()))
        body = {"model": self.model, "prompt": question, "memory": [identity], "max_tokens": 64, "stream": True}
        request = self.client.build_request("POST", "/v1/completions", json=body)
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        _, writer = await asyncio.open_connection("127.0.0.1", int(self.server.url.rpartition(":")[2]))
        writer.write(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + request.content)
        await writer.drain()
        await asyncio.sleep(draw.random() / 10)
        writer.transport.abort()

    async def check(self) -> None:
        """Count lost memories and wrong answers, while no other client asks."""
        response = await self.client.get("/v1/memories", params={"limit": 1000})
        shown = {one["id"] for one in response.json()["data"]}
        self.counts["lost"] += len(({identity for identity, _ in self.kept} | self.passing) - shown)
        for (identity, question), answer in self.kept.items():
            response = await ask(self.client, self.model, [identity], question)
            self.counts["wrong"] += response.status_code != 200 or said(response) != answer


Action = Callable[[Tenant, random.Random, Tenant], Awaitable[None]]
ACTIONS: dict[Action, int] = {
    Tenant.read: 6, Tenant.stream: 4, Tenant.write: 3, Tenant.delete: 2, Tenant.list: 1, Tenant.another_s: 1,
    Tenant.wrong_key: 1, Tenant.too_long: 1, Tenant.not_finite: 1, Tenant.cancelled: 2, Tenant.dropped: 2,
}  # fmt: skip
"""The actions of clients, with their relative frequencies."""


async def stress(server: Server, seconds: float) -> dict[str, float]:
    """All actions at the same time, then a kill."""
    counts: Counter[str] = Counter()
    tenants = [Tenant(name, server, counts) for name in KEYS]
    for tenant in tenants:
        await tenant.prepare()
    start, killed, resident = time.perf_counter(), asyncio.Event(), []

    async def client(number: int) -> None:
        draw = random.Random(number)
        while not killed.is_set():
            tenant, other = draw.sample(tenants, 2)
            (action,) = draw.choices(list(ACTIONS), list(ACTIONS.values()))
            try:
                await action(tenant, draw, other)
                counts["requests"] += 1
                counts[f"did {action.__name__}"] += 1
            except (httpx.HTTPError, OSError) as error:
                if not killed.is_set():
                    counts["errors"] += 1
                    print(action.__name__, repr(error), flush=True)

    async def watch() -> None:
        while (passed := time.perf_counter() - start) < seconds:
            if passed > seconds / 3:
                resident.append(server.memory() / 2**20)
            await asyncio.sleep(1)
        killed.set()
        server.stop(signal.SIGKILL)

    await asyncio.gather(watch(), *map(client, range(STRESS_CLIENTS)))
    await server.start()
    for tenant in tenants:
        tenant.client = server.client(tenant.name)
        await tenant.check()
    print({name: count for name, count in sorted(counts.items()) if name.startswith("did ")}, flush=True)
    shown = {name: float(counts[name]) for name in ("requests", "errors", "wrong", "crossed", "lost")}
    print("resident MiB:", [round(resident[i * (len(resident) - 1) // 8]) for i in range(9)], flush=True)
    return shown | {"growth_mib": resident[-1] - resident[0], "resident_mib": resident[-1]}


async def measure(args: Namespace, clients: int | None) -> dict[str, float]:
    """One measurement on a new server; `clients` None: the stress."""
    async with running(args.checkpoint) as server:
        return await (stress(server, args.stress) if clients is None else throughput(server, clients, args.seconds))


def run(args: Namespace, clients: int | None) -> dict[str, float]:
    """Run `measure` in a new event loop."""
    return asyncio.run(measure(args, clients))


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, "serve")
    parser.add_argument("checkpoint", help="a directory with an adapter")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8, 32], help="numbers of clients")
    parser.add_argument("--seconds", type=float, default=20, help="seconds for each number of clients")
    parser.add_argument("--stress", type=float, default=0, help="seconds of the stress")
    args = parser.parse_args(argv)
    args.model = args.checkpoint
    for clients in args.clients:
        common.record(args, "serve", "asking", partial(run, args, clients), clients=clients, seconds=args.seconds)
    if args.stress:
        settings = {"clients": STRESS_CLIENTS, "seconds": args.stress}
        common.record(args, "serve", "stress", partial(run, args, None), **settings)


if __name__ == "__main__":
    main()
