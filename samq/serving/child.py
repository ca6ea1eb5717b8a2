"""A child process that is an engine with one model: its start, its answers, its supervision and its end."""

import asyncio
import json
import logging
import re
import shutil
import signal
import subprocess
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

from samq.errors import SamqError
from samq.llamacpp.process import kill_group, start
from samq.llamacpp.reason import reason_in
from samq.llamacpp.runtime import is_out_of_memory
from samq.serving.engine import ENGINES, Files, Loading, environment_of
from samq.serving.limits import STACK_BYTES
from samq.serving.settings import ServingSettings
from samq.serving.source import HeldFile

logger = logging.getLogger(__name__)

_LOG_LINES = 300  # of the engine's log, kept for the reason of its end
_READINESS = "/v1/models"  # answered with 200 when the model is loaded, by every engine
_STACK_BYTES = STACK_BYTES + 8 * 2**20
_OFFLOADED = re.compile(r"offloaded (\d+)/(\d+) layers to GPU")
_ENDING_S = 0.5  # an engine that takes no connection is about to end; if not, the next attempt waits so long
_QUIET_S = 0.5  # a busy engine that has been silent for this long is probed
_SILENT_S = 1.5  # one that has not answered the probe for so long is told to be silent


class LostError(SamqError):
    """The engine ended, or fell silent, before the end of its answer."""


class NotReachedError(LostError):
    """The engine never got the request."""


class StartError(SamqError):
    """The engine ended before it was ready, or took too long."""

    def __init__(self, message: str, *, out_of_memory: bool = False) -> None:
        super().__init__(message)
        self.out_of_memory = out_of_memory


class Child:
    """An engine at work. Its process group ends with `stop`, or with this process."""

    def __init__(
        self,
        model: HeldFile,
        mmproj: HeldFile | None,
        name: str,
        loading: Loading,
        settings: ServingSettings,
        printed_ends: tuple[str, ...] = (),
    ) -> None:
        """Starts the process; raises StartError if that is not possible. `until_ready` waits for the model."""
        self.leases = 0  # slots that requests of the server have
        self.killed_for = ""
        self.identity: Callable[[], dict[str, str]] = dict  # headers that name the version
        self.layers: tuple[int, int] | None = None  # on the GPU, of all; None: the engine did not say
        self._engine = ENGINES[settings.engine]
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._log: deque[str] = deque(maxlen=_LOG_LINES)
        self._asking = 0
        self._silent_since: float | None = None  # when it was last asked or heard; None if it owes nothing
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="samq-"))
            files = Files(self._folder, model.name, mmproj.name if mmproj else None, printed_ends)
            command = self._engine.command(files, name, loading, settings)
            self._process = start(
                command.arguments,
                stack=_STACK_BYTES,  # which its threads have too
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment_of(command),
                pass_fds=[file.descriptor for file in (model, mmproj) if file],
            )
        except OSError as error:
            raise StartError(f"cannot start {settings.engine}: {error}; `samq doctor` says what is missing") from error
        self.pid = self._process.pid
        self._client = aiohttp.ClientSession(
            "http://engine",
            # A kept connection may close under a request.
            connector=aiohttp.UnixConnector(str(files.socket), limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(),  # the server has the time limits
        )
        self._ended = asyncio.create_task(self._read_log())
        self._watching = asyncio.create_task(self._watch())

    async def until_ready(self) -> dict[str, Any]:
        """Wait until the model is loaded, and return how the engine describes it; raises StartError."""
        pause = 0.02
        try:
            async with asyncio.timeout(self._settings.start_timeout_s):
                while not self._ended.done():
                    with suppress(LostError):
                        text = await self.get(_READINESS, self._settings.start_timeout_s)
                        described: dict[str, Any] = json.loads(text)["data"][0]
                        return described
                    pause = min(pause * 1.5, 0.5)
                    await asyncio.wait([self._ended], timeout=pause)
        except TimeoutError:
            raise StartError(
                f"{self._settings.engine} was not ready after {self._settings.start_timeout_s:g} s; raise start_timeout_s"
            ) from None
        raise StartError(f"{self._settings.engine} {self.end}", out_of_memory=self._out_of_memory)

    @property
    def _out_of_memory(self) -> bool:
        """Whether its log says so, or the system killed it, as Linux does where memory ends."""
        killed = not self.killed_for and self._process.returncode == -signal.SIGKILL
        return killed or is_out_of_memory(self._log)

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    @property
    def silent_s(self) -> float:
        """Seconds for which it has not responded, though it should have; 0 if it responds."""
        if self._silent_since is None or self._probe_path is None:
            return 0.0
        quiet = self._loop.time() - self._silent_since
        return quiet if quiet > _SILENT_S else 0.0

    @property
    def _probe_path(self) -> str | None:
        """What it answers at once now. A busy engine without such a path responds only at the end of an answer."""
        return self._engine.sign_of_life or (None if self._asking else _READINESS)

    @property
    def end(self) -> str:
        """How the process ended, with the reason in its log: `ended with exit code 1: out of memory`."""
        code = self._process.returncode
        how = self.killed_for or (
            f"was killed by signal {-code}" if code and code < 0 else f"ended with exit code {code}"
        )
        return how if self.killed_for else f"{how}: {reason_in(chr(10).join(self._log))}"

    async def until_ended(self, timeout_s: float | None = None) -> None:
        """Wait for the end of the process, for so long at most."""
        await asyncio.wait([self._ended], timeout=timeout_s)

    @asynccontextmanager
    async def ask(self, path: str, body: bytes | None = None) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request, a POST if it has a body; the answer's body is read by `heard`.

        Raises NotReachedError if the engine never got it, and LostError if it ended meanwhile.
        """
        method, headers = ("GET", {}) if body is None else ("POST", {"content-type": "application/json"})
        if self._silent_since is None:
            self._silent_since = self._loop.time()
        self._asking += 1
        try:
            async with self._client.request(method, path, data=body, headers=headers) as response:
                yield response
            if self._asking == 1:
                self._silent_since = None
        except aiohttp.ClientConnectorError as error:
            await asyncio.wait([self._ended], timeout=_ENDING_S)
            raise NotReachedError(f"the engine takes no connection: {error}") from error
        except aiohttp.ClientError as error:
            raise LostError(f"the engine left a request without an answer: {error!r}") from error
        finally:
            self._asking -= 1

    async def heard(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """The pieces of an answer as they come, an event each if it is a stream. Each shows that the engine responds."""
        async for piece, _ in response.content.iter_chunks():
            self._silent_since = self._loop.time()
            if piece:
                yield piece

    async def get(self, path: str, timeout_s: float) -> str:
        """The text of an answer; raises LostError if there is none in time, or an error."""
        try:
            limit = aiohttp.ClientTimeout(timeout_s)
            async with self._client.get(path, timeout=limit, raise_for_status=True) as answer:
                return await answer.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise LostError(f"the engine did not answer {path}: {error!r}") from error

    async def stop(self) -> None:
        """End the process group at once: it has nothing to save."""
        self._watching.cancel()
        await asyncio.to_thread(kill_group, self._process)
        await self.until_ended()
        await self._client.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _read_log(self) -> None:
        """Read the log until the process ends, which closes it."""
        assert self._process.stdout
        reader = asyncio.StreamReader()
        transport, _ = await self._loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self._process.stdout
        )
        rest = b""
        while piece := await reader.read(2**16):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                text = line.decode(errors="replace")[:1000]
                self._log.append(text)
                logger.debug("%s", text)
                if told := _OFFLOADED.search(text):
                    self.layers = int(told[1]), int(told[2])
            rest = rest[-1000:]
        transport.close()
        while self._process.poll() is None:
            await asyncio.sleep(0.01)

    async def _watch(self) -> None:
        """Kill the process when it hangs: it owes a response, and gives none for `hang_timeout_s`.

        What it owes to a client that has left counts as well. Else clients that give up one after another would hide a hang.
        """
        limit = self._settings.hang_timeout_s
        if not self._engine.sign_of_life:
            limit = max(limit, self._settings.request_timeout_s)
        while True:
            await asyncio.sleep(_QUIET_S)
            if self._silent_since is None or (quiet := self._loop.time() - self._silent_since) < _QUIET_S:
                continue
            if (path := self._probe_path) and quiet < limit:
                with suppress(LostError):
                    await self.get(path, limit - quiet)
                    self._silent_since = self._loop.time() if self._asking else None
            elif quiet >= limit:
                self.killed_for = f"hung: it did not respond for {limit:g} s"
                logger.error("the engine %s; it is killed", self.killed_for)
                await asyncio.to_thread(kill_group, self._process)
                return
