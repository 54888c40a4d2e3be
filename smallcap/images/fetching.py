"""Fetches many small objects at once; decides whether a failure means another attempt, a row's error or a run's end.

Attempts are counted here instead of in the clients, so that a run can say how often its storage failed.
`smallcap.images.fetch_sources` knows how one object is got from its place.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from smallcap.config import InputConfig
from smallcap.errors import ErrorCode, RowError, StorageError
from smallcap.images.fetch_sources import FetchFailure, Sources, is_object_store, place_of
from smallcap.images.kinds import MAX_IMAGE_BYTES
from smallcap.images.public_addresses import PublicOnly

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
        StorageError: A store fails as a whole: no such bucket, refused credentials, no connection, or 16 objects that
            failed in every attempt while none had an answer. Other servers never raise it: only their rows fail.
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
    fetching.check_reached()
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


@dataclass
class _Place:
    """The state of a bucket or host in this call."""

    in_flight: AdaptiveLimit
    answered: int = 0  # objects with an answer
    failures: dict[str, FetchFailure] = field(default_factory=dict)  # by URI, for objects that failed in every attempt


class _Fetching:
    """One call of `fetch_objects`."""

    def __init__(self, sources: Sources, options: FetchOptions) -> None:
        self.sources, self.options = sources, options
        self.free = asyncio.Semaphore(options.concurrency)  # for all places together
        self.places: dict[str, _Place] = {}
        self.retries = 0

    async def fetch(self, uri: str) -> bytes | RowError:
        """Fetches one object, in several attempts if need be.

        Raises:
            StorageError: Its place fails as a whole.
        """
        name = place_of(uri)
        place = self.places.setdefault(name, _Place(AdaptiveLimit(self.options.concurrency)))
        attempt = 1
        while True:
            try:
                data = await self._attempt(uri, place)
            except FetchFailure as error:
                failure = error
            else:
                place.answered += 1
                return data
            if not failure.repeat or attempt == self.options.attempts:
                break
            await asyncio.sleep(self._backoff(attempt, failure))
            attempt += 1
            self.retries += 1
        self._count(name, place, uri, failure)
        tried = f", in each of {attempt} attempts" if attempt > 1 else ""
        return RowError(failure.code, f"{failure.what.removesuffix('.')}{tried}.", where=uri)

    async def _attempt(self, uri: str, place: _Place) -> bytes:
        slow_down = False
        entered = await place.in_flight.enter()
        try:
            async with self.free, asyncio.timeout(self.options.timeout_s):
                return await self.sources.get(uri)
        except FetchFailure as failure:
            slow_down = failure.slow_down
            raise
        except TimeoutError as error:
            what = f"No complete answer came within {self.options.timeout_s:g} s."
            raise FetchFailure(ErrorCode.TIMEOUT, what, repeat=True) from error
        finally:
            place.in_flight.leave(entered, slow_down=slow_down)

    def _backoff(self, attempt: int, failure: FetchFailure) -> float:
        """Returns a wait in seconds, drawn from the whole range so that clients do not come back together."""
        longest = min(self.options.max_backoff_s, self.options.first_backoff_s * 2 ** (attempt - 1))
        return max(random.uniform(0, longest), min(self.options.max_backoff_s, failure.retry_after_s or 0.0))

    def _count(self, name: str, place: _Place, uri: str, failure: FetchFailure) -> None:
        if failure.code not in (ErrorCode.UNAVAILABLE, ErrorCode.TIMEOUT):
            place.answered += failure.code != ErrorCode.INVALID_URI  # that was never asked
            return
        place.failures[uri] = failure
        if is_object_store(name) and not place.answered and len(place.failures) >= _OUTAGE_OBJECTS:
            raise _outage(name, place)

    def check_reached(self) -> None:
        """Checks that each object store could be reached, even by fewer objects than an outage takes.

        Raises:
            StorageError: No connection to an object store could be made, for any of its objects.
        """
        for name, place in self.places.items():
            unreached = place.failures and all(failure.unreached for failure in place.failures.values())
            if unreached and not place.answered and is_object_store(name):
                raise _outage(name, place)


def _outage(name: str, place: _Place) -> StorageError:
    uri, failure = next(iter(place.failures.items()))
    unreached = all(failure.unreached for failure in place.failures.values())
    endpoint = "the endpoint (AWS_ENDPOINT_URL), " if name.startswith("s3://") else ""
    return StorageError(
        "The storage service cannot be reached." if unreached else "The storage service failed in all attempts.",
        where=name,
        found=f"no object was fetched, and {len(place.failures)} failed; {uri}: {failure.what}",
        remedy=f"Check {endpoint}the network and the service; then run the same command again.",
    )
