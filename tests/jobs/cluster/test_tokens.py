"""Where the token of Ray's processes comes from, and what is said where there is none."""

import os
from pathlib import Path

import pytest

from jobs.cluster.tokens import check_token_for_cluster, has_token, make_token_for_local_ray
from smallcap.errors import ConfigError, RunError


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home folder without a token, in an environment that says nothing of tokens."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_K8S_TOKEN_AUTH"):
        monkeypatch.setenv(name, "")  # so that it is gone afterwards as well
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def keep_token(home: Path, text: str = "secret") -> Path:
    path = home / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text(text)
    return path


def test_a_local_ray_gets_a_token_of_its_own(home: Path) -> None:
    make_token_for_local_ray()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert not list(home.iterdir())  # nothing is left behind


@pytest.mark.parametrize("text", ["", "\n", "  \nsecret"])
def test_a_file_without_a_token_in_its_first_line_is_none(home: Path, text: str) -> None:
    keep_token(home, text)
    make_token_for_local_ray()
    assert "RAY_AUTH_TOKEN" in os.environ


@pytest.mark.parametrize("folder", ["/proc/nowhere", "", "/dev/null"])
def test_a_home_that_cannot_be_used_does_not_matter(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    monkeypatch.setenv("HOME", folder)
    make_token_for_local_ray()
    assert "RAY_AUTH_TOKEN" in os.environ


def test_a_token_that_is_there_is_used(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    path = keep_token(home)
    make_token_for_local_ray()
    monkeypatch.setenv("HOME", "/proc/nowhere")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    make_token_for_local_ray()
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("RAY_ENABLE_K8S_TOKEN_AUTH", "true")
    make_token_for_local_ray()
    assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.delenv("RAY_ENABLE_K8S_TOKEN_AUTH")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    make_token_for_local_ray()
    assert os.environ["RAY_AUTH_TOKEN"] == "mine"
    monkeypatch.setenv("RAY_AUTH_TOKEN", " ")
    assert not has_token()


def test_a_ray_without_tokens_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    make_token_for_local_ray()
    check_token_for_cluster()
    assert "RAY_AUTH_TOKEN" not in os.environ


@pytest.mark.parametrize(
    ("name", "why"), [("gone", "No such file"), ("empty", "first line is empty"), (".", "directory")]
)
def test_a_named_file_without_a_token(monkeypatch: pytest.MonkeyPatch, home: Path, name: str, why: str) -> None:
    (home / "empty").write_text("\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / name))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    for check in (make_token_for_local_ray, check_token_for_cluster):
        with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN_PATH") as caught:
            check()
        assert why in caught.value.found


def test_a_cluster_that_wants_a_token(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    check_token_for_cluster()  # Ray sends none unless it is told to
    monkeypatch.setenv("RAY_AUTH_MODE", "Token")
    with pytest.raises(RunError, match="ray get-auth-token"):
        check_token_for_cluster()
    keep_token(home)
    check_token_for_cluster()
