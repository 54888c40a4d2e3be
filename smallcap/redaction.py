"""Hides secrets in text that is shown, logged or recorded: keys and tokens, signatures of URLs, names and passwords.

Everything that smallcap prints, logs, raises or writes into a record passes here (by `smallcap.phrasing.visible`). What
is hidden is known by its form, or by being the value of an environment variable that is named like a secret. The URIs
of images in a run's list and rows are data and stay as they are: without them nothing could be fetched again.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from typing import Any

HIDDEN = "***"

# What stands before a host. The container of Azure's abfs://CONTAINER@ACCOUNT is no secret: there it needs a colon.
_USER = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<user>[^/\s\"'<>]+)@", re.IGNORECASE)
_CONTAINER_SCHEMES = ("abfs", "abfss", "wasb", "wasbs")
_PARAMETER = re.compile(  # of a URL
    r"([?&;](?:[\w.~%-]*(?:sig|signature|token|secret|passw(?:or)?d|pwd|credentials?|policy|session|auth|api-?key|"
    r"access-?key-?id|accessid|key-pair-id|_key)|key)=)[^&\s\"'<>;#]+",
    re.IGNORECASE,
)
_SETTING = re.compile(  # of a connection string, or as environments and configuration files have them
    r"(\b(?:account_?key|shared_?access_?(?:key|signature)|client_secret|password|"
    r"aws_(?:access_key_id|secret_access_key|session_token))\s?[=:]\s?)[^\s\"'<>;]+",
    re.IGNORECASE,
)
_KNOWN_FORMS = re.compile(
    r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b"  # AWS's access keys
    r"|\bhf_[A-Za-z0-9]{16,}\b"  # the Hugging Face Hub's tokens
    r"|\bgh[opsu]_[A-Za-z0-9]{16,}\b|\bgithub_pat_\w{16,}\b"
    r"|(?<=Bearer )[\w.~+/=-]{8,}|(?<=Basic )[\w+/=-]{8,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)"
)
_SECRET_NAME = re.compile(r"SECRET|TOKEN(?!IZ)|PASSW|(?:^|_)(?:ACCESS|ACCOUNT|API|SAS|STORAGE)_?KEY")
_NO_SECRET_NAME = re.compile(r"(?:_FILE|_PATH|_URI|_URL|_DIR|_MODE)$")
_SHORTEST_SECRET = 8  # a shorter value may be an ordinary word


def hide_secrets(text: str) -> str:
    """Returns text with `***` in place of each secret."""
    known = _of_environment(_secret_values())
    if known is not None:
        text = known.sub(HIDDEN, text)
    if "://" in text:
        text = _USER.sub(_without_user, text)
    if "=" in text or ":" in text:
        text = _SETTING.sub(rf"\g<1>{HIDDEN}", _PARAMETER.sub(rf"\g<1>{HIDDEN}", text))
    return _KNOWN_FORMS.sub(HIDDEN, text)


def without_secrets(value: Any) -> Any:
    """Returns a value of JSON with `hide_secrets` of all its texts, the keys of mappings apart."""
    if isinstance(value, str):
        return hide_secrets(value)
    if isinstance(value, dict):
        return {key: without_secrets(inner) for key, inner in value.items()}
    return [without_secrets(inner) for inner in value] if isinstance(value, list | tuple) else value


def _without_user(found: re.Match[str]) -> str:
    scheme, user = found["scheme"], found["user"]
    if scheme.lower() in _CONTAINER_SCHEMES and ":" not in user:
        return found[0]
    return f"{scheme}://{HIDDEN}@"


def _secret_values() -> tuple[str, ...]:
    """Returns the values of environment variables that are named like secrets, the longest first."""
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST_SECRET and _SECRET_NAME.search(name) and not _NO_SECRET_NAME.search(name)
    }
    return tuple(sorted(values, key=len, reverse=True))


@lru_cache(4)
def _of_environment(values: tuple[str, ...]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, values))) if values else None
