"""Puts what Ray raises where it does not start, or cannot be joined, into one message with a remedy.

Ray raises exceptions of a dozen kinds then, and tells most of them apart by their words alone.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from jobs.cluster.addresses import Address
from jobs.cluster.errors import causes
from jobs.cluster.tokens import GET_A_TOKEN
from smallcap.errors import RunError

_LONGEST = 500  # characters of what Ray said
_NOISE = re.compile(  # the beginning of its log's lines, and its excuse
    r"\[[-\d]+ [\d:,]+ [^]]*\] (\(\w+\) )?\S+:\d+:|An unexpected system state has occurred\..*?Check failed:"
)
_SHORT_FOLDER = "Set RAY_TMPDIR to a folder with a short name that you may write to, such as /tmp."
_ERRNO_KINDS = {
    "full": (errno.ENOSPC, errno.EDQUOT),
    "processes": (errno.EAGAIN, errno.ENOMEM),
    "files": (errno.EMFILE, errno.ENFILE),
    "folder": (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR),
}
_WORDS = {  # in this order: the first that is found
    "sockets": r"AF_UNIX path|File name too long",
    "shared memory": r"/dev/shm|object store memory|plasma directory",
    "full": r"No space left on device|Disk quota exceeded",
    "port": r"Address already in use|[Pp]ort \S+ is already|port number \d+ that is used|bind on port|Failed to bind",
    "processes": r"can't start new thread|Resource temporarily unavailable|Cannot allocate memory",
    "files": r"Too many open files",
    "head": r"Failed to start GCS",
    "raylet": r"timed out during startup|raylet",
}
_START_MESSAGES = {
    "sockets": ("Ray cannot make its sockets: the name of its folder is too long.", _SHORT_FOLDER),
    "shared memory": (
        "There is too little shared memory for Ray.",
        "Enlarge /dev/shm (a container: docker run --shm-size=8g), or remove what fills it. With "
        "RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE=1 Ray uses its folder on disk, which is slow.",
    ),
    "full": (
        "The disk is full on which Ray has its folder.",
        "Free some of it (old folders session_* are of runs that have ended), or set RAY_TMPDIR to a short folder on "
        "another disk.",
    ),
    "port": (
        "A port that Ray was told to use is taken.",
        "Unset the variable that names it (RAY_GCS_SERVER_PORT), or end what listens there; by itself Ray takes free "
        "ports.",
    ),
    "processes": (
        "Ray cannot start its processes: there is no memory, or no room for more processes, for this user.",
        "Raise the limit (ulimit -u; a container: --pids-limit), or end other programs.",
    ),
    "files": ("Ray cannot open as many files as it needs.", "Raise the limit: ulimit -n 65536."),
    "folder": ("Ray cannot use its folder.", _SHORT_FOLDER),
    "package": ("A file of the installed Ray cannot be used.", "Install Ray again, with constraints.txt."),
    "head": ("Ray's head process (GCS) does not start on this machine.", "Its log there says why: gcs_server.out."),
    "raylet": (
        "Ray's process on this machine (raylet) does not start.",
        "Its logs there say why: raylet.out and raylet.err. Often memory is short (free -h, df -h /dev/shm).",
    ),
    "": ("Ray does not start on this machine.", "Its logs there may say more; smallcap doctor looks at this machine."),
}


def ray_folder() -> str:
    """Returns the folder in which Ray has its sessions on this machine, as Ray chooses it."""
    return os.path.join(os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp")), "ray")


def newest_logs() -> str:
    """Returns the folder in which Ray has the newest logs on this machine."""
    return f"{ray_folder()}/session_latest/logs"


def explain_start(error: Exception, printed: str = "") -> RunError:
    """Returns what to say where a local Ray does not start.

    Args:
        error: What Ray has raised.
        printed: What its C++ side has printed.
    """
    kind = _kind_of(error)
    what, remedy = _START_MESSAGES[kind]
    found = _said(error)
    if not kind:
        found = "; ".join([f"{type(error).__name__}: {found}", *_one_line(printed)])
    where = next(_own_files(error)) if kind == "package" else ray_folder()
    return RunError(what, where=where, found=found, remedy=remedy)


def explain_join(error: Exception, address: Address, printed: str = "") -> RunError:
    """Returns what to say where a cluster cannot be joined.

    Args:
        error: What Ray has raised.
        address: The cluster's.
        printed: What Ray's C++ side has printed.
    """
    said = _said(error)
    if re.search(r"[Aa]uthenticat|InvalidAuthToken", " ".join([said, *(type(e).__name__ for e in causes(error))])):
        alone = " --address local starts a Ray for this job alone." if address.was_found else ""
        return RunError(
            "The Ray cluster wants a token that this process does not have.",
            where=address.where,
            found=said,
            remedy=GET_A_TOKEN + alone,
        )
    if re.search(r"[Vv]ersion mismatch|versions? do(es)? not match", said):
        return RunError(
            "The Ray cluster has other versions of Ray or Python than this process.",
            where=address.where,
            found=said,
            remedy="Use the same versions here and on all nodes; smallcap doctor --address compares them.",
        )
    return RunError(
        "This process cannot join the Ray cluster.",
        where=address.where,
        expected="a cluster that answers, with this environment's versions of Ray and Python",
        found="; ".join([f"{type(error).__name__}: {said}", *_one_line(printed)]),
        remedy="On the head node, ray status shows the cluster. --address local starts a Ray for this job alone.",
    )


def _kind_of(error: Exception) -> str:
    said = " ".join(str(cause) for cause in causes(error))
    for kind, words in _WORDS.items():
        if re.search(words, said):
            return kind
    numbers = {cause.errno for cause in causes(error) if isinstance(cause, OSError)}
    kind = next((kind for kind, known in _ERRNO_KINDS.items() if numbers.intersection(known)), "")
    return "package" if kind == "folder" and any(_own_files(error)) else kind


def _own_files(error: Exception) -> Iterator[str]:
    """Yields the files of Ray's package at which the system refused something."""
    spec = find_spec("ray")
    package = Path(spec.origin).parent if spec and spec.origin else None
    for cause in causes(error):
        name = cause.filename if isinstance(cause, OSError) else None
        if package and isinstance(name, str) and package in Path(name).parents:
            yield name


def _said(error: Exception) -> str:
    """Returns the words of the innermost exception in a line, without the tracebacks that Ray quotes."""
    *_, innermost = causes(error)
    words, _, quoted = str(innermost).partition("Traceback (most recent call last):")
    lines = [" ".join(_NOISE.sub("", words).split()), *quoted.strip().splitlines()[-1:]]
    return " ".join(lines).strip()[:_LONGEST] or type(innermost).__name__


def _one_line(printed: str) -> list[str]:
    """Returns the last line that says something, if there is one."""
    lines = [line.strip() for line in printed.splitlines() if line.strip() and not line.startswith("    @")]
    return lines[-1:] and [lines[-1][:_LONGEST]]
