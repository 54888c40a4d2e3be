"""What the exceptions of storage clients mean: a cause in words, the place, and what to do.

botocore, s3fs, obstore, aiohttp, google-auth and the operating system share no exceptions, and obstore tells most
things only in the text of one. `diagnose` reads them all, and `storage_error` makes of them what a person sees. Whether
a request is repeated, and whether a fault ends a run, is not decided here.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from html import unescape
from urllib.parse import urlsplit

from smallcap.errors import SmallCapError, StorageError
from smallcap.phrasing import one_line

WORTH_REPEATING = {408, 429, 500, 502, 503, 504}  # statuses of answers that may be others the next time
_LONGEST_DETAIL = 200  # characters


class Cause(StrEnum):
    """Why storage fails; the values end a sentence, in which the address that was asked takes the place of {host}."""

    MISSING = "it does not exist"
    FORBIDDEN = "access denied"
    NO_BUCKET = "the bucket does not exist"
    NO_REPOSITORY = "the Hub has no such repository or revision, or does not show it with these credentials"
    NO_CREDENTIALS = "there are no credentials"
    BAD_PROFILE = "the credentials' configuration cannot be used"
    EXPIRED = "{host} does not accept the credentials: they have expired"
    REFUSED = "{host} does not accept the credentials: they are missing, wrong or expired"
    BAD_CLOCK = "{host} does not accept the credentials: this machine's clock is wrong"
    BAD_REQUEST = "{host} refuses the request, as it does when credentials have expired"
    ELSEWHERE = "the bucket is in another region"
    SLOW_DOWN = "{host} is too busy to answer"
    FAILING = "{host} fails"
    NO_NAME = "the name of {host} cannot be resolved"
    NO_NAMES = "no name server answers, so the name of {host} cannot be resolved"
    UNREACHED = "{host} cannot be reached"
    NO_TLS = "there is no secure connection to {host}"
    TIMEOUT = "{host} did not answer in time"
    BROKEN_OFF = "the connection to {host} broke off"
    NO_STORE = "{host} does not answer as an object store does"
    FULL = "there is no room left"
    READ_ONLY = "the file system is read-only"
    UNKNOWN = ""


OF_THE_PLACE = {  # no object of a bucket can be had
    *(Cause.NO_BUCKET, Cause.NO_CREDENTIALS, Cause.BAD_PROFILE, Cause.EXPIRED, Cause.REFUSED, Cause.BAD_CLOCK),
    *(Cause.ELSEWHERE, Cause.NO_REPOSITORY),
}
OF_THE_CONNECTION = {  # the service was not asked at all
    *(Cause.NO_NAME, Cause.NO_NAMES, Cause.UNREACHED, Cause.NO_TLS),
}
_PASSING = {Cause.SLOW_DOWN, Cause.NO_NAMES, Cause.UNREACHED, Cause.TIMEOUT, Cause.BROKEN_OFF}
_NEVER_ANSWERED = {501, 505}  # a store that does not know what it is asked for, or how

# The services' codes, in their answers' bodies.
_CAUSE_OF_CODE = {
    code: cause
    for cause, codes in {
        Cause.NO_BUCKET: "NoSuchBucket ContainerNotFound",
        Cause.MISSING: "NoSuchKey BlobNotFound",
        Cause.EXPIRED: "ExpiredToken ExpiredTokenException RequestExpired TokenRefreshRequired",
        Cause.BAD_CLOCK: "RequestTimeTooSkewed",
        Cause.FORBIDDEN: "AccessDenied AllAccessDisabled AuthorizationFailure",
        Cause.FAILING: "InternalError InternalFailure",
        Cause.UNREACHED: "NetworkConnection",  # so called by Arrow
        Cause.REFUSED: "AccountProblem InvalidAccessKeyId InvalidClientTokenId InvalidSecurity InvalidToken "
        "NotSignedUp SignatureDoesNotMatch XAmzContentSHA256Mismatch AuthenticationRequired AuthenticationFailed "
        "InvalidAuthenticationInfo NoAuthenticationInformation UnrecognizedClient InvalidSignature",
        Cause.ELSEWHERE: "AuthorizationHeaderMalformed PermanentRedirect IllegalLocationConstraintException",
        Cause.SLOW_DOWN: "SlowDown ServiceUnavailable ServerBusy TooManyRequests Throttling ThrottlingException "
        "RequestLimitExceeded",
        Cause.TIMEOUT: "RequestTimeout OperationTimedOut",
    }.items()
    for code in codes.split()
}
# The names of the clients' classes: most of these packages may not be installed, and all are slow to import.
_CAUSE_OF_CLASS = {
    name: cause
    for cause, names in {
        Cause.NO_CREDENTIALS: "NoCredentialsError DefaultCredentialsError NoAuthTokenError",
        Cause.BAD_PROFILE: "ProfileNotFound PartialCredentialsError ConfigParseError ConfigNotFound InvalidConfigError",
        Cause.EXPIRED: "UnauthorizedSSOTokenError SSOTokenLoadError LoginRefreshRequired TokenRetrievalError",
        Cause.REFUSED: "UnauthenticatedError CredentialRetrievalError RefreshError ClientAuthenticationError",
        Cause.NO_TLS: "SSLError ClientConnectorSSLError ClientConnectorCertificateError SSLCertVerificationError",
        Cause.NO_NAME: "ClientConnectorDNSError gaierror",
        Cause.UNREACHED: "EndpointConnectionError ClientConnectorError ConnectionRefusedError ProxyConnectionError "
        "ConnectError",
        Cause.TIMEOUT: "ReadTimeoutError ConnectTimeoutError FSTimeoutError TimeoutError ServerTimeoutError "
        "TimeoutException",
        Cause.BROKEN_OFF: "ConnectionClosedError ServerDisconnectedError ClientPayloadError ConnectionResetError "
        "IncompleteReadError ResponseStreamingError ClientOSError BrokenPipeError ReadError RemoteProtocolError",
        Cause.NO_STORE: "ResponseParserError",
    }.items()
    for name in names.split()
}
_CAUSE_OF_HUB_CLASS = {  # of the Hub's client, which makes a FileNotFoundError of some
    "GatedRepoError": Cause.FORBIDDEN,  # before its base class, as each class's own name is looked up first
    "RepositoryNotFoundError": Cause.NO_REPOSITORY,
    "RevisionNotFoundError": Cause.NO_REPOSITORY,
}
_CAUSE_OF_STATUS = {
    **{400: Cause.BAD_REQUEST, 401: Cause.REFUSED, 403: Cause.FORBIDDEN, 404: Cause.MISSING, 408: Cause.TIMEOUT},
    **dict.fromkeys((301, 302, 307, 308), Cause.ELSEWHERE),
    **dict.fromkeys((429, 503), Cause.SLOW_DOWN),
}
_CAUSE_OF_ERRNO = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), Cause.FULL),
    **dict.fromkeys((errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNREFUSED), Cause.UNREACHED),
    **dict.fromkeys((errno.ESTALE, errno.ENOTCONN), Cause.BROKEN_OFF),  # of a mounted file system
    socket.EAI_AGAIN: Cause.NO_NAMES,
    errno.EROFS: Cause.READ_ONLY,
}
# What obstore and its HTTP client write of a connection, in the order in which it counts.
_CAUSE_OF_TEXT = (
    (Cause.ELSEWHERE, re.compile("redirect without LOCATION")),
    (Cause.NO_NAMES, re.compile("Temporary failure in name resolution|contact(ing)? DNS servers")),
    (Cause.NO_NAME, re.compile("dns error|failed to lookup address|Name or service not known")),
    (Cause.NO_TLS, re.compile("InvalidCertificate|InvalidMessage|InvalidContentType|AlertReceived|CERTIFICATE_VERIFY")),
    (Cause.TIMEOUT, re.compile(r"kind: Timeout|\bTimedOut\b|timed out")),
    (Cause.UNREACHED, re.compile(r"kind: Connect\b|Error\(\s*Connect\b|tcp connect error")),
    (Cause.BROKEN_OFF, re.compile(r"kind: (Body|Interrupted|Decode|Request)\b|IncompleteMessage|ConnectionReset")),
    (
        Cause.NO_STORE,
        re.compile("invalid list response|[Nn]on-partial response|is not an instance of|header.* missing"),
    ),
)
# Of obstore, of the libraries of Delta and Lance tables, and of Arrow's own client of S3.
_STATUS_IN_TEXT = re.compile(r"status(?: code)?:? (\d{3})\b|status (?:client|server) error \((\d{3})\b")
_CODE_OF_ARROW = re.compile(r"AWS Error ([A-Z_]+) during")
_CREDENTIALS_OF = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN for temporary ones), or AWS_PROFILE.",
    "gs": "Set GOOGLE_APPLICATION_CREDENTIALS to a key file, or give the machine a service account.",
    "hf": "For what is private or has terms, set HF_TOKEN to a token that may read it.",
    "az": "Set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or give the machine a managed identity.",
}
_AGAIN = "Then run the same command again."


@dataclass(frozen=True)
class Fault:
    """What an exception says."""

    cause: Cause
    detail: str = ""  # the service's or the client's words, in one line; empty where the cause says it all
    host: str = ""  # the address that was asked, if it is known
    status: int | None = None  # of the answer, in HTTP
    code: str = ""  # the service's name of the error, such as SlowDown

    @property
    def passes(self) -> bool:
        """Whether the same request may be answered otherwise a while later, with nothing mended by a person."""
        if self.cause is Cause.FAILING:
            status = self.status or 500  # a code alone
            return status in WORTH_REPEATING or (status >= 500 and status not in _NEVER_ANSWERED)
        return self.cause in _PASSING

    def describe(self) -> str:
        """Returns the cause in words, for the end of a sentence; the client's words where it is unknown."""
        if self.cause is Cause.UNKNOWN:
            return self.detail
        words = self.cause.format(host=self.host or "the service")
        return f"{words} ({self.detail})" if self.detail else words

    def remedy(self, uri: str) -> str:
        """Returns what a person can do."""
        scheme = uri.split("://", 1)[0] if "://" in uri.removeprefix("file://") else ""
        endpoint = "AWS_ENDPOINT_URL, " if scheme == "s3" else ""
        credentials = _CREDENTIALS_OF.get(scheme, "Check the credentials.")
        service = f"Check {endpoint}the network and the service. {_AGAIN}"
        remedies = {
            Cause.MISSING: "Check the path.",
            Cause.FORBIDDEN: (credentials if scheme == "hf" else "Check the credentials.")
            if scheme
            else "Check the permissions there.",
            Cause.NO_REPOSITORY: f"Check the name. {credentials}",
            Cause.NO_BUCKET: f"Check the bucket's name{', and AWS_ENDPOINT_URL' if scheme == 's3' else ''}. {_AGAIN}",
            Cause.ELSEWHERE: "Set AWS_REGION to the bucket's region.",
            Cause.SLOW_DOWN: "Run the same command again later, or with fewer jobs at once.",
            Cause.BAD_CLOCK: f"Set the clock of this machine. If it is right: {credentials} {_AGAIN}",
            Cause.NO_TLS: "Check that the address begins with https:// only where the service speaks it, and that this "
            "machine trusts its certificate.",
            Cause.FULL: f"Make room. {_AGAIN}",
            Cause.READ_ONLY: "Choose another folder.",
            Cause.BAD_REQUEST: f"Check the credentials, the region and the endpoint. {_AGAIN}",
            **dict.fromkeys((Cause.NO_CREDENTIALS, Cause.BAD_PROFILE), credentials),
            **dict.fromkeys((Cause.EXPIRED, Cause.REFUSED), f"{credentials} {_AGAIN}"),
        }
        return remedies.get(self.cause, service if scheme else "")


def storage_error(error: BaseException, doing: str, uri: str, endpoint: str | None = None) -> StorageError:
    """Returns the error that a person sees.

    Args:
        error: A client's exception.
        doing: What could not be done, such as `read this file`.
        uri: What it could not be done with.
        endpoint: The address that was set for its service.
    """
    return error_of(diagnose(error), doing, uri, endpoint)


def error_of(fault: Fault, doing: str, uri: str, endpoint: str | None = None, tried: str = "") -> StorageError:
    """Returns the error that a person sees of a fault; see `storage_error`.

    Args:
        fault: The fault.
        doing: See `storage_error`, as for the next two.
        uri: What it could not be done with.
        endpoint: The address that was set for its service.
        tried: How long it was tried, as `, in every attempt for 5 min`.
    """
    where = uri
    if fault.cause is not Cause.MISSING and "://" in uri.removeprefix("file://"):
        named = ""
        if endpoint:
            host = urlsplit(endpoint).netloc.rpartition("@")[2]  # without a name and password
            named, fault = f" (endpoint {host})", replace(fault, host=fault.host or host)
        where = f"{uri}{named}, on {this_node()}"
    if fault.cause is Cause.UNKNOWN:
        return StorageError(f"Cannot {doing}.", where=where, found=fault.detail, remedy=fault.remedy(uri))
    return StorageError(f"Cannot {doing}: {fault.describe()}{tried}.", where=where, remedy=fault.remedy(uri))


def this_node() -> str:
    """Returns the machine on which this process runs, in words."""
    return f"node {socket.gethostname()}"


def diagnose(error: BaseException) -> Fault:
    """Returns what an exception, and those that led to it, say."""
    chain = list(_chain(error))
    text = "\n".join(map(str, chain))
    status = _status(chain, text)
    code, message = _code(chain, text)
    cause = _cause(chain, text, status, code)
    if status is not None or code:
        answer = " ".join(word for word in (str(status or ""), code) if word)
        detail = one_line(": ".join(word for word in (answer, message.rstrip(". ")) if word), _LONGEST_DETAIL)
    else:
        detail = _detail(cause, chain, text)
    if cause is Cause.ELSEWHERE and (region := _region(chain, text)):
        detail = region
    if cause in (Cause.MISSING, Cause.NO_BUCKET, Cause.NO_REPOSITORY, Cause.NO_CREDENTIALS, Cause.TIMEOUT):
        detail = ""
    return Fault(cause, detail, _host(text), status, code)


def brief(error: BaseException) -> str:
    """Returns an exception in one line, without the debugging text of obstore, which repeats the message."""
    text = one_line(str(error).split("\n\nDebug source", 1)[0], _LONGEST_DETAIL)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an exception and those that led to it: one answer of a service may say what a later one does not.

    An error of smallcap among them was told before, and is about something else.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen and not isinstance(error, SmallCapError):
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _status(chain: Sequence[BaseException], text: str) -> int | None:
    for link in chain:
        response = getattr(link, "response", None)
        metadata = response.get("ResponseMetadata", {}) if isinstance(response, Mapping) else {}
        answered = getattr(response, "status_code", None)  # of httpx2
        named = (metadata.get("HTTPStatusCode"), getattr(link, "status", None), getattr(link, "status_code", answered))
        for status in named:
            if isinstance(status, int) and status >= 300:
                return status
    match = _STATUS_IN_TEXT.search(text)
    return int(match[1] or match[2]) if match else None


def _code(chain: Sequence[BaseException], text: str) -> tuple[str, str]:
    """Returns the service's name of the error and its message; both may be empty."""
    for link in chain:
        response = getattr(link, "response", None)
        answer = response.get("Error", {}) if isinstance(response, Mapping) else {}
        code = str(answer.get("Code", getattr(link, "error_code", None) or ""))
        if code and not code.isdigit():  # a number where the answer had no body
            return code, str(answer.get("Message", ""))
    if (of_arrow := _CODE_OF_ARROW.search(text)) and of_arrow[1] != "UNKNOWN":
        return "".join(map(str.capitalize, of_arrow[1].split("_"))), ""
    code_found, message = re.search(r"<Code>\s*(\w+)", text), re.search(r"<Message>([^<]*)", text)
    return code_found[1] if code_found else "", unescape(message[1]) if message else ""


def _cause(chain: Sequence[BaseException], text: str, status: int | None, code: str) -> Cause:
    if code in _CAUSE_OF_CODE:
        return _CAUSE_OF_CODE[code]
    classes = (kind.__name__ for link in chain for kind in type(link).__mro__)
    if of_hub := next((_CAUSE_OF_HUB_CLASS[name] for name in classes if name in _CAUSE_OF_HUB_CLASS), None):
        return of_hub
    told = re.sub(r"https?://[^\s\"']+", "", text)  # a name may hold any word
    by_text = next((cause for cause, pattern in _CAUSE_OF_TEXT if pattern.search(told)), None)
    if "token request" in told and (by_text in OF_THE_CONNECTION or (status or 500) not in WORTH_REPEATING):
        return Cause.NO_CREDENTIALS  # there is neither a key file nor a service that gives tokens
    if status is not None:
        return _CAUSE_OF_STATUS.get(status, Cause.FAILING)
    is_of_file = isinstance(chain[0], OSError) and bool(chain[0].filename)
    return _cause_of_class(chain) or (None if is_of_file else by_text) or Cause.UNKNOWN


def _cause_of_class(chain: Sequence[BaseException]) -> Cause | None:
    if isinstance(chain[0], FileNotFoundError | PermissionError):
        return Cause.MISSING if isinstance(chain[0], FileNotFoundError) else Cause.FORBIDDEN
    for link in reversed(chain):  # what began it says most
        known = _CAUSE_OF_ERRNO.get(link.errno or 0) if isinstance(link, OSError) else None
        names = (kind.__name__ for kind in type(link).__mro__)
        cause = known or next((_CAUSE_OF_CLASS[name] for name in names if name in _CAUSE_OF_CLASS), None)
        if cause:
            return cause
    return None


def _detail(cause: Cause, chain: Sequence[BaseException], text: str) -> str:
    """Returns what the clients say beside the cause."""
    first = chain[0]
    if cause in (Cause.BAD_PROFILE, Cause.EXPIRED, Cause.REFUSED):
        return brief(first).partition(": ")[2]
    words = ""
    if cause in (Cause.UNKNOWN, Cause.FORBIDDEN) and isinstance(first, OSError) and first.filename:
        words = f"{first.strerror}: {first.filename}"
    elif cause in (Cause.UNKNOWN, Cause.NO_STORE, Cause.FAILING):
        return brief(first)
    elif rust := re.search(r'(?:message|error): "([^"]+)"|InvalidCertificate\(\s*(\w+)', text):
        words = (rust[1] or rust[2]).rpartition(": ")[2]
    elif cause in OF_THE_CONNECTION or cause is Cause.FULL:
        words = _words_of_system(chain)
    return one_line(words, _LONGEST_DETAIL)


def _words_of_system(chain: Sequence[BaseException]) -> str:
    """Returns what the operating system or its TLS library says of the innermost failure."""
    innermost = next((link for link in reversed(chain) if isinstance(link, OSError) and link.strerror), None)
    if innermost is None:
        return ""
    if isinstance(innermost, ConnectionError) and innermost.errno:
        return os.strerror(innermost.errno)  # asyncio writes something else
    return re.sub(r"^\[[^]]*\] | \(_ssl[^)]*\)$", "", str(innermost.strerror))


def _region(chain: Sequence[BaseException], text: str) -> str:
    for link in chain:
        response = getattr(link, "response", None)
        metadata = response.get("ResponseMetadata", {}) if isinstance(response, Mapping) else {}
        if region := metadata.get("HTTPHeaders", {}).get("x-amz-bucket-region"):
            return str(region)
    match = re.search(r"<Region>([\w-]+)|expecting '([\w-]+)'", text)
    return (match[1] or match[2]) if match else ""


def _host(text: str) -> str:
    """Returns the first address of a text, with its port and without a name and password."""
    match = re.search(r"https?://(?:[^/\s\"'@]*@)?([\w.:\[\]-]+)|connect to host (\S+)", text)
    return (match[1] or match[2]).rstrip(".:") if match else ""
