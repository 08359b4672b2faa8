"""Two origins on the loopback, served by one thread."""

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from tests.hub.calls import Call
from tests.hub.connection import Connection
from tests.hub.faults import Fault
from tests.hub.wire import Request, Response

LONGEST_HEAD = 1 << 20
Result = TypeVar("Result")


class Service(Protocol):
    """What answers: the first argument of each is the name of the origin."""

    def find(self, origin: str, method: str, path: str) -> Fault | None: ...

    def note(self, origin: str, request: Request, query: str) -> Call: ...

    def answer(self, origin: str, request: Request) -> Response: ...


class Origins:
    """Serves each of `names` on a port of its own, in one new thread, until `close`."""

    def __init__(self, names: Sequence[str], service: Service) -> None:
        self.service = service
        self.running: dict[asyncio.Task[None], Connection] = {}
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="local-hub", daemon=True)
        self.thread.start()
        self.servers = [self.wait(self.listen(name)) for name in names]
        ports = [server.sockets[0].getsockname()[1] for server in self.servers]
        self.urls = [f"http://127.0.0.1:{port}" for port in ports]

    def wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of a coroutine that runs in the thread."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    async def listen(self, name: str) -> asyncio.Server:
        """Opens a port for an origin."""

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = Connection(
                (reader, writer),
                find=lambda method, path: self.service.find(name, method, path),
                answer=lambda request: self.service.answer(name, request),
                note=lambda request, query: self.service.note(name, request, query),
            )
            task = self.loop.create_task(connection.serve())
            self.running[task] = connection
            task.add_done_callback(self.running.pop)

        return await asyncio.start_server(connected, "127.0.0.1", 0, backlog=1024, limit=LONGEST_HEAD)

    def hang_up(self) -> None:
        """Ends every connection, whatever it is about."""
        self.wait(self.end_connections())

    async def end_connections(self) -> None:
        """Ends every connection."""
        running = dict(self.running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for connection in running.values():
            await connection.hang_up()

    async def end(self) -> None:
        """Closes the ports and every connection."""
        for server in self.servers:
            server.close()
        await self.end_connections()
        for server in self.servers:
            await server.wait_closed()

    def close(self) -> None:
        """Closes everything; the thread ends."""
        self.wait(self.end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
