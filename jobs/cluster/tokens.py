"""The token by which Ray's processes know each other: finds it where Ray does, and makes one for a local Ray.

Ray's C++ side ends the process without an exception where it cannot read a token that it needs.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from smallcap.errors import ConfigError, RunError

GET_A_TOKEN = (
    "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the cluster's token (on its head, ray get-auth-token prints it), "
    "or copy the head's ~/.ray/auth_token to this machine."
)


def make_token_for_local_ray() -> None:
    """Gives this process, and the Ray that it will start, a token of their own where the user has none.

    Ray would write one to the home folder, which some machines do not have, or do not let anyone write.

    Raises:
        ConfigError: RAY_AUTH_TOKEN_PATH names a file without a token.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() == "token" and not has_token():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def check_token_for_cluster() -> None:
    """Checks that there is a token, if RAY_AUTH_MODE says that the cluster wants one.

    Raises:
        ConfigError: RAY_AUTH_TOKEN_PATH names a file without a token.
        RunError: There is no token.
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token" and not has_token():
        raise RunError(
            "RAY_AUTH_MODE=token asks for the cluster's token, and there is none.",
            expected="RAY_AUTH_TOKEN, a file that RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token",
            remedy=GET_A_TOKEN,
        )


def has_token() -> bool:
    """Returns whether Ray finds a token in its environment or in a file.

    Raises:
        ConfigError: RAY_AUTH_TOKEN_PATH names a file without a token.
    """
    if given := os.environ.get("RAY_AUTH_TOKEN", ""):
        return bool(given.strip())
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH", ""):
        found = _why_without_token(Path(path))
        if found:
            raise ConfigError(
                "There is no token in the file that RAY_AUTH_TOKEN_PATH names.",
                where=path,
                expected="a token in its first line",
                found=found,
                remedy="Name another file, or unset RAY_AUTH_TOKEN_PATH. A local Ray makes its own token.",
            )
        return True
    if os.environ.get("RAY_ENABLE_K8S_TOKEN_AUTH", "").lower() in ("1", "true"):
        return True  # Kubernetes gives each pod one
    home = os.environ.get("HOME", "")
    return bool(home) and not _why_without_token(Path(home, ".ray", "auth_token"))


def _why_without_token(path: Path) -> str:
    """Returns why Ray finds no token in a file; empty where it finds one."""
    try:
        with path.open(errors="replace") as file:
            return "" if file.readline().strip() else "its first line is empty"
    except OSError as error:
        return error.strerror or str(error)
