"""Fetches many small objects at once; decides whether a failure means another attempt, a row's error or a run's end.

Attempts are counted here instead of in the clients, so that a run can say how often its storage failed.
`smallcap.images.fetch_sources` knows how one object is got from its place.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Self

from smallcap.config import InputConfig
from smallcap.errors import ErrorCode, RowError
from smallcap.images.fetch_sources import LOCAL, FetchFailure, Sources, is_object_store, place_of
from smallcap.images.kinds import MAX_IMAGE_BYTES
from smallcap.images.place_check import ask_once, check_place, known_good, note_served
from smallcap.images.public_addresses import PublicOnly
from smallcap.patience import Wait
from smallcap.s3 import s3_endpoint
from smallcap.storage_faults import Cause, Fault, diagnose, error_of

if TYPE_CHECKING:
    import aiohttp

FETCH_CONCURRENCY = 64
_OUTAGE_OBJECTS = 16  # this many failed objects of one place without a single answer are not an accident
_MIN_IN_FLIGHT = 4  # fewer requests would not relieve a service, but would starve the run


@dataclass(frozen=True)
class FetchOptions:
    """How objects are fetched."""

    concurrency: int = FETCH_CONCURRENCY
    """The most requests in flight."""
    timeout_s: float = 30.0
    """The time limit of one request, its body included."""
    attempts: int = 6
    """Requests for one object before it counts as failed."""
    first_backoff_s: float = 0.5
    """The longest wait before the second attempt; it doubles with each one. The wait is drawn between 0 and that."""
    max_backoff_s: float = 30.0
    """The longest wait, even where Retry-After asks for more."""
    max_bytes: int = MAX_IMAGE_BYTES
    """The most bytes of an object; larger ones are `too_large`, and not downloaded."""
    private_hosts: bool = False
    """Whether URLs of the web may lead to addresses that are not public."""

    @classmethod
    def of(cls, config: InputConfig) -> Self:
        """Returns the options of a job's config."""
        return cls(
            timeout_s=config.fetch_timeout_s,
            attempts=config.fetch_attempts,
            private_hosts=config.allow_private_hosts,
        )


@dataclass(frozen=True)
class Fetched:
    """The results for a list of URIs."""

    data: list[bytes | RowError]
    """The bytes or the error of each URI, in their order."""
    retries: int
    """The number of repeated requests."""


def fetch_objects(uris: Sequence[str], options: FetchOptions = FetchOptions()) -> Fetched:
    """Fetches many objects at once; a URI that occurs twice is fetched once.

    Requests are repeated after 408, 429, 500, 502, 503, 504, failed connections, time-outs and truncated bodies.

    Args:
        uris: Local paths, s3://, gs://, az://, http(s):// and other fsspec URIs in any mix.
        options: Limits on concurrency, time, attempts and size.

    Returns:
        Bytes or a `RowError` for each URI: `not_found`, `forbidden` (also by the rules for lists and hosts),
        `too_large`, `invalid_uri`, `timeout` or `unavailable`.

    Raises:
        StorageError: A store fails as a whole: no such bucket, refused credentials, a bucket that is forbidden, or no
            answer for as long as the patience lasts. Other servers never raise it: only their rows fail.
    """
    results, retries = asyncio.run(_fetch_all(list(dict.fromkeys(uris)), options))
    return Fetched([results[uri] for uri in uris], retries)


async def _fetch_all(uris: Sequence[str], options: FetchOptions) -> tuple[dict[str, bytes | RowError], int]:
    executor = ThreadPoolExecutor(options.concurrency, thread_name_prefix="fetch")
    sources = Sources(
        executor,
        lambda public_only: _open_session(options, public_only),
        options.timeout_s,
        options.max_bytes,
        options.private_hosts,
    )
    fetching = _Fetching(sources, options)
    try:
        results = await asyncio.gather(*(fetching.fetch(uri) for uri in uris))
    finally:
        await sources.close()
        executor.shutdown(wait=False, cancel_futures=True)  # a disk that hangs must not hold up other images
    await fetching.check_refused()
    return dict(zip(uris, results, strict=True)), fetching.retries


def _open_session(options: FetchOptions, public_only: bool) -> aiohttp.ClientSession:
    import aiohttp

    guard = PublicOnly() if public_only else None
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=options.concurrency, socket_factory=guard.make_socket if guard else None),
        middlewares=(guard.check_request,) if guard else (),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": "smallcap", "Accept-Encoding": "identity"},  # images are compressed already
        timeout=aiohttp.ClientTimeout(total=None),  # each attempt has our own time limit
        trust_env=True,  # HTTPS_PROXY and NO_PROXY
    )


class AdaptiveLimit:
    """A limit on the requests in flight, which halves when the service asks to slow down, and then grows slowly.

    It halves once for all the requests that were in flight when the first of them was refused. It grows by one when as
    many answers have come as it allows at once. Belongs to one asyncio loop.

    Attributes:
        limit: The current limit.
    """

    def __init__(self, most: int) -> None:
        self.limit = self._most = most
        self._free = asyncio.Semaphore(most)
        self._owed = 0  # permits to withhold, because the limit has dropped
        self._grown = 0.0  # fraction of the next permit
        self._halvings = 0

    async def enter(self) -> int:
        """Waits until one more request may begin; returns a value to pass to `leave`."""
        await self._free.acquire()
        return self._halvings

    def leave(self, entered: int, *, slow_down: bool) -> None:
        """Ends a request; `slow_down` says whether the service refused it because there were too many."""
        if slow_down:
            if entered == self._halvings and self.limit > _MIN_IN_FLIGHT:
                lower = max(_MIN_IN_FLIGHT, self.limit // 2)
                self._owed += self.limit - lower
                self.limit, self._halvings, self._grown = lower, self._halvings + 1, 0.0
        elif self.limit < self._most:
            self._grown += 1 / self.limit
            if self._grown >= 1:
                self.limit, self._grown = self.limit + 1, 0.0
                self._free_one()
        self._free_one()

    def _free_one(self) -> None:
        if self._owed:
            self._owed -= 1
        else:
            self._free.release()


def _is_asked(place: _Place) -> bool:
    """Says whether a place can fail as a whole: a bucket, or the disks from which something was read."""
    return is_object_store(place.name) or (place.name == LOCAL and known_good(LOCAL) is not None)


@dataclass
class _Place:
    """The state of a bucket or host in this call; times are those of `time.monotonic`."""

    name: str
    in_flight: AdaptiveLimit
    one_asks: asyncio.Lock = field(default_factory=asyncio.Lock)  # the others wait for what it finds out
    unsettled: int = 0  # objects that are being fetched
    answered_at: float = -math.inf  # with an object, or a definite refusal: when the newest such request began
    back_at: float = -math.inf  # after it had answered nothing
    has_only_lists: bool = False  # and no object, for as long as the patience lasted
    refused: dict[str, ErrorCode] = field(default_factory=dict)  # why, of objects that another attempt would not get

    def note(self, uri: str, outcome: bytes | FetchFailure, began: float) -> None:
        """Takes what one attempt came to, and when it began."""
        if isinstance(outcome, bytes):
            self.answered_at = max(self.answered_at, began)
            note_served(uri)
        elif outcome.code not in (ErrorCode.TIMEOUT, ErrorCode.INVALID_URI):
            if outcome.code is not ErrorCode.UNAVAILABLE:
                self.answered_at = max(self.answered_at, began)
            if outcome.code is not ErrorCode.TOO_LARGE and not outcome.repeat:
                self.refused[uri] = outcome.code


class _Fetching:
    """One call of `fetch_objects`."""

    def __init__(self, sources: Sources, options: FetchOptions) -> None:
        self.sources, self.options = sources, options
        self.free = asyncio.Semaphore(options.concurrency)  # for all places together
        self.places: dict[str, _Place] = {}
        self.retries = 0

    async def fetch(self, uri: str) -> bytes | RowError:
        """Fetches one object, in several attempts if need be; rides out a place that answers nothing.

        Raises:
            StorageError: Its place fails as a whole.
        """
        name = place_of(uri)
        place = self.places.setdefault(name, _Place(name, AdaptiveLimit(self.options.concurrency)))
        place.unsettled += 1
        try:
            while True:
                outcome, attempts, last_began = await self._try(uri, place)
                if isinstance(outcome, bytes) or not outcome.repeat or not _is_asked(place):
                    break
                if not await self._is_back(place, uri, outcome, last_began):
                    # The place may have come back just now: it has shown that it lives, so one attempt more decides.
                    outcome = await self._attempt(uri, place)
                    attempts, self.retries = attempts + 1, self.retries + 1
                    break
        finally:
            place.unsettled -= 1
        if isinstance(outcome, bytes):
            return outcome
        tried = f", in each of {attempts} attempts" if attempts > 1 else ""
        return RowError(outcome.code, f"{outcome.what.removesuffix('.')}{tried}.", where=uri)

    async def _try(self, uri: str, place: _Place) -> tuple[bytes | FetchFailure, int, float]:
        """Returns an object or its last failure, the number of attempts, and when the last one began."""
        attempt = 1
        while True:
            began = time.monotonic()
            outcome = await self._attempt(uri, place)
            if isinstance(outcome, bytes) or not outcome.repeat or attempt == self.options.attempts:
                return outcome, attempt, began
            await asyncio.sleep(self._backoff(attempt, outcome))
            attempt += 1
            self.retries += 1

    async def _attempt(self, uri: str, place: _Place) -> bytes | FetchFailure:
        outcome: bytes | FetchFailure = b""
        entered, began = await place.in_flight.enter(), time.monotonic()
        try:
            async with self.free, asyncio.timeout(self.options.timeout_s):
                outcome = await self.sources.get(uri)
        except FetchFailure as failure:
            outcome = failure
        except TimeoutError:
            what = f"No complete answer came within {self.options.timeout_s:g} s."
            outcome = FetchFailure(ErrorCode.TIMEOUT, what, repeat=True)
        finally:
            place.in_flight.leave(entered, slow_down=isinstance(outcome, FetchFailure) and outcome.slow_down)
        place.note(uri, outcome, began)
        return outcome

    def _backoff(self, attempt: int, failure: FetchFailure) -> float:
        """Returns a wait in seconds, drawn from the whole range so that clients do not come back together."""
        longest = min(self.options.max_backoff_s, self.options.first_backoff_s * 2 ** (attempt - 1))
        return max(random.uniform(0, longest), min(self.options.max_backoff_s, failure.retry_after_s or 0.0))

    async def _is_back(self, place: _Place, uri: str, failure: FetchFailure, last_began: float) -> bool:
        """Says whether an object is worth more attempts, because its place answered nothing and does so again.

        Raises:
            StorageError: The place has answered nothing for as long as the patience lasts.
        """
        async with place.one_asks:
            if place.back_at >= last_began:
                return True
            if place.has_only_lists or place.answered_at >= last_began or await self._answers(place, uri):
                return False
            if await self._wait_for(place, uri, failure):
                place.back_at = time.monotonic()
            else:
                place.has_only_lists = True
        return not place.has_only_lists

    async def _answers(self, place: _Place, uri: str) -> bool:
        """Asks a place once, by another object than the one that failed; where none is known, by a list of objects.

        The list alone says little while other objects fail as well.
        """
        good = known_good(place.name)
        if good is not None and good != uri:
            outcome = await self._attempt(good, place)
            return isinstance(outcome, bytes) or not outcome.repeat
        return place.unsettled == 1 and await self._lists(uri)

    async def _lists(self, uri: str) -> bool:
        try:
            await asyncio.get_running_loop().run_in_executor(None, ask_once, uri)
        except Exception as error:  # noqa: BLE001 - each client has its own
            fault = diagnose(error)
            return fault.status is not None and not fault.passes
        return True

    async def _wait_for(self, place: _Place, uri: str, failure: FetchFailure) -> bool:
        """Waits until a place answers; returns False where it does not, but lists, and only a few objects were asked.

        Raises:
            StorageError: It does not, for as long as the patience lasts.
        """
        fault = failure.fault or Fault(Cause.TIMEOUT)
        wait = Wait(place.name, "fetch images")
        while wait.goes_on(fault):
            for seconds in wait.pauses(fault):
                await asyncio.sleep(seconds)
            outcome = await self._attempt(known_good(place.name) or uri, place)
            if isinstance(outcome, bytes) or not outcome.repeat:
                wait.end()
                return True
            fault = outcome.fault or fault
        if place.unsettled < _OUTAGE_OBJECTS and await self._lists(uri):
            return False
        endpoint = s3_endpoint() if place.name.startswith("s3://") else None
        raise error_of(fault, "fetch images", place.name, endpoint, wait.describe())

    async def check_refused(self) -> None:
        """Asks places that have refused objects whether they serve any: what was served may have been asked before.

        Raises:
            StorageError: One does not.
        """
        for place in self.places.values():
            if place.refused:
                uri, code = next(reversed(place.refused.items()))
                ask = partial(check_place, uri, is_gone=code is ErrorCode.NOT_FOUND, refused=len(place.refused))
                await asyncio.get_running_loop().run_in_executor(None, ask)
