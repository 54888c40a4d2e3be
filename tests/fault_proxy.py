"""A reverse proxy in front of an S3 server that injects faults, the same ones in every run with the same seed.

As a process of its own:
    python tests/fault_proxy.py --port 9001 --target http://127.0.0.1:9000 --rates '{"reset": 0.1, "slow_down": 0.1}'
What fault an attempt at an object meets is decided by hash(seed, method, key, attempt number), so that it depends
neither on the order nor on the time of the requests. `GET /__faults__` says what was done; `POST /__faults__` with
a `FaultPlan` as JSON replaces the plan, and forgets attempts and counts.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import re
import socket
import struct
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from aiohttp import ClientError, ClientSession, DummyCookieJar, web
from yarl import URL

FAULTS = ("slow_down", "reset", "truncated", "lost", "slow", "error")
_CONTROL = "/__faults__"
_OF_ONE_CONNECTION = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect", "date", "server"}
_CONDITIONS = {"if-match", "if-none-match"}
_UPLOAD_ID = re.compile(r"uploadId=[^&]*")
_ABORT_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: closing sends a reset


@dataclass(frozen=True)
class FaultPlan:
    """Which requests meet which fault."""

    seed: int = 0
    rates: dict[str, float] = field(default_factory=dict)
    """Share of the attempts that meet each of `FAULTS`, such as {"slow_down": 0.1}."""
    schedule: list[str | None] = field(default_factory=list)
    """The fault of an object's first attempt, its second and so on; `rates` rule from its end on."""
    methods: list[str] = field(default_factory=list)
    """Only these, such as ["GET"]; all where empty."""
    match: str = ""
    """Only paths that have this in them."""
    outage: bool = False
    """Every connection is reset."""
    begins_at: int = 0
    """So many of the requests that the plan is about pass before."""
    requests: int | None = None
    """How many of them it is about then; None for all."""
    for_s: float | None = None
    """How long faults last after the first one, in seconds; None for ever."""
    slow_s: float = 5.0
    """How long a `slow` answer waits."""
    error_status: int = 403
    error_code: str = "AccessDenied"
    """Of the `error` answers, whose XML body is S3's."""
    drop_conditions: bool = False
    """Pass requests on without their conditions, as to a store that knows no conditional writes."""

    def fault(self, method: str, path: str, attempt: int) -> str | None:
        """Returns what the attempt (from 0 on) meets, None for nothing."""
        if self.outage:
            return "reset"
        if self.match not in path or (self.methods and method not in self.methods):
            return None
        if attempt < len(self.schedule):
            return self.schedule[attempt]
        digest = hashlib.sha256(f"{self.seed} {method} {path} {attempt}".encode()).digest()
        drawn = int.from_bytes(digest[:8], "big") / 2**64
        for name in FAULTS:
            drawn -= self.rates.get(name, 0.0)
            if drawn < 0:
                return name
        return None


class FaultProxy:
    """The proxy's handlers and what it has counted."""

    def __init__(self, target: str, plan: FaultPlan) -> None:
        self.target, self.plan = target.rstrip("/"), plan
        self.attempts: Counter[tuple[str, str]] = Counter()
        self.done: Counter[str] = Counter()
        self.met, self.failed_at = 0, 0.0  # the requests that the plan is about; when the first of them failed

    async def control(self, request: web.Request) -> web.Response:
        """Answers what was done, after taking over a new plan where one is posted."""
        if request.method == "POST":
            self.plan = FaultPlan(**await request.json())
            self.attempts.clear()
            self.done.clear()
            self.met, self.failed_at = 0, 0.0
        return web.json_response({"plan": asdict(self.plan), "done": dict(self.done)})

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Passes one request on, or has it fail."""
        body = await request.read()
        key = (request.method, _UPLOAD_ID.sub("", request.raw_path))  # the server draws those ids anew in every run
        attempt = self.attempts[key]
        self.attempts[key] += 1
        fault = self.plan.fault(*key, attempt)
        if fault is not None and not self._is_its_time():
            fault = None
        self.done["requests"] += 1
        self.done[fault or "passed"] += 1
        if fault == "reset":
            return _reset(request)
        if fault == "slow_down":
            return _error(503, "SlowDown", "Please reduce your request rate.", request)
        if fault == "error":
            return _error(self.plan.error_status, self.plan.error_code, "An error by the fault proxy.", request)
        if fault == "slow":
            await asyncio.sleep(self.plan.slow_s)
        try:
            status, headers, content = await self._pass_on(request, body)
        except ClientError:  # the server is gone: nobody would answer
            return _reset(request)
        if fault == "lost":  # what was asked for has been done, and nobody is told
            return _reset(request)
        response = web.StreamResponse(status=status, headers=headers)
        response.content_length = len(content)
        if request.method == "HEAD":
            response.headers["Content-Length"] = headers.get("Content-Length", "0")
        await response.prepare(request)
        if request.method != "HEAD":
            await response.write(content[: len(content) // 2] if fault == "truncated" else content)
        if fault == "truncated":
            assert request.transport is not None
            request.transport.close()  # after what was written
            return response
        await response.write_eof()
        return response

    def _is_its_time(self) -> bool:
        """Says whether a fault that the plan has for a request happens: by the requests and the time so far."""
        plan, number, now = self.plan, self.met, time.monotonic()
        self.met += 1
        if number < plan.begins_at or (plan.requests is not None and number >= plan.begins_at + plan.requests):
            return False
        self.failed_at = self.failed_at or now
        return plan.for_s is None or now < self.failed_at + plan.for_s

    async def _pass_on(self, request: web.Request, body: bytes) -> tuple[int, dict[str, str], bytes]:
        dropped = _OF_ONE_CONNECTION | (_CONDITIONS if self.plan.drop_conditions else set())
        headers = {name: text for name, text in request.headers.items() if name.lower() not in dropped}
        session: ClientSession = request.app["session"]
        url = URL(self.target + request.raw_path, encoded=True)  # the Host header stays the one that was signed
        async with session.request(request.method, url, headers=headers, data=body, allow_redirects=False) as response:
            kept = {
                name: text
                for name, text in response.headers.items()
                if name.lower() not in _OF_ONE_CONNECTION or (request.method == "HEAD" and name == "Content-Length")
            }
            return response.status, kept, await response.read()


def _reset(request: web.Request) -> web.Response:
    transport = request.transport
    assert transport is not None
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT_ON_CLOSE)
    transport.abort()
    return web.Response()  # goes nowhere


def _error(status: int, code: str, message: str, request: web.Request) -> web.Response:
    text = f"<Error><Code>{code}</Code><Message>{message}</Message><Resource>{request.path}</Resource></Error>"
    xml = '<?xml version="1.0" encoding="UTF-8"?>\n' + text
    return web.Response(status=status, text=xml, content_type="application/xml")


def make_app(target: str, plan: FaultPlan) -> web.Application:
    """Returns the proxy as an aiohttp application."""
    proxy = FaultProxy(target, plan)
    app = web.Application(client_max_size=1 << 30)

    async def with_session(app: web.Application) -> Any:
        async with ClientSession(auto_decompress=False, cookie_jar=DummyCookieJar()) as session:
            app["session"] = session
            yield

    app.cleanup_ctx.append(with_session)
    app.router.add_route("GET", _CONTROL, proxy.control)
    app.router.add_route("POST", _CONTROL, proxy.control)
    app.router.add_route("*", "/{path:.*}", proxy.handle)
    return app


def main() -> None:
    """Serves until it is terminated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--target", required=True, help="endpoint of the S3 server")
    parser.add_argument("--rates", type=json.loads, default={}, help='such as {"slow_down": 0.05, "reset": 0.02}')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slow-s", type=float, default=FaultPlan.slow_s)
    given = parser.parse_args()
    plan = FaultPlan(seed=given.seed, rates=given.rates, slow_s=given.slow_s)
    web.run_app(make_app(given.target, plan), host="127.0.0.1", port=given.port, print=None, access_log=None)


if __name__ == "__main__":
    main()
