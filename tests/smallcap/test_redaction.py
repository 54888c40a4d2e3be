"""Secrets do not show: in URLs, by their forms, and as values of the environment; what is no secret stays."""

import json
import logging

import pytest

from smallcap.errors import ErrorCode, RowError, StorageError
from smallcap.images.work_list import Marker
from smallcap.phrasing import one_line, visible
from smallcap.redaction import hide_secrets, without_secrets

AKIA = "AKIA" + "ABCDEFGHIJKLMNOP"
HUB = "hf_" + "abcdefghijklmnopqrstuvwxyz"
SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCY"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:p4ss@host/a.jpg", "http://***@host/a.jpg"),
        ("https://token@host:8080/a", "https://***@host:8080/a"),
        ("http://user:p@ss@host/a", "http://***@host/a"),
        (f"s3://{AKIA}:{SECRET.replace('/', '%2F')}@bucket/key", "s3://***@bucket/key"),
        (
            f"https://b.s3.amazonaws.com/k?X-Amz-Credential={AKIA}%2F20260101&X-Amz-Date=1&X-Amz-Signature=ab12cd#x",
            "https://b.s3.amazonaws.com/k?X-Amz-Credential=***&X-Amz-Date=1&X-Amz-Signature=***#x",
        ),
        ("https://h/k?x-amz-security-token=abc&v=1", "https://h/k?x-amz-security-token=***&v=1"),
        (f"https://h/k?AWSAccessKeyId={AKIA}&Signature=a%2Bb", "https://h/k?AWSAccessKeyId=***&Signature=***"),
        ("https://h/k?X-Goog-Signature=12ab&GoogleAccessId=me", "https://h/k?X-Goog-Signature=***&GoogleAccessId=***"),
        ("https://a.blob.core.windows.net/c/k?sv=2021&sig=a%3D", "https://a.blob.core.windows.net/c/k?sv=2021&sig=***"),
        ("https://h/k?key=abc&access_token=def&API-Key=g", "https://h/k?key=***&access_token=***&API-Key=***"),
        (f"The AWS Access Key Id {AKIA} does not exist", "The AWS Access Key Id *** does not exist"),
        (f"token {HUB} is invalid", "token *** is invalid"),
        ("Authorization: Bearer abcdef.12345", "Authorization: Bearer ***"),
        ("DefaultEndpointsProtocol=https;AccountKey=Zm9v==;x", "DefaultEndpointsProtocol=https;AccountKey=***;x"),
        ("aws_secret_access_key = abc/def", "aws_secret_access_key = ***"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "***"),
    ],
)
def test_secrets_are_hidden(text: str, shown: str) -> None:
    assert hide_secrets(text) == shown
    assert hide_secrets(shown) == shown  # a record that is read and written again stays the same


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a@b/c.jpg",
        "hf://user/model@main/model.safetensors",
        "abfs://container@account.dfs.core.windows.net/a",
        "https://host/a?width=3&monkey=1&page=2",
        "write to me@host.org, see https://host/",
        "--max-new-tokens 25, eos_token=. and pad_token=!",
        "sha256 269cca94e11b80851f6bf5e7abc1e3d3",
        "a dog on a beach: 12 = 3 * 4",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert hide_secrets(text) == text


def test_values_of_the_environment_are_hidden_wherever_they_appear(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MY_DB_PASSWORD", "AZURE_STORAGE_ACCOUNT_KEY"):
        monkeypatch.setenv(name, f"{SECRET}{name[0]}")
        assert SECRET not in hide_secrets(f"it says {SECRET}{name[0]}.")
    monkeypatch.setenv("RAY_TOKEN_PATH", "/etc/ray/token")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "not_a_secret")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/etc/google.json")
    text = "/etc/ray/token not_a_secret /etc/google.json"
    assert hide_secrets(text) == text


def test_messages_rows_logs_and_records_pass_there(caplog: pytest.LogCaptureFixture) -> None:
    uri = f"https://me:{SECRET[:5]}pw@host/a.jpg?X-Amz-Signature=feedbeef"
    run = StorageError(f"Cannot read {uri}.", where=uri, expected=uri, found=f"no {uri}", remedy=f"Read {uri}.")
    row = RowError(ErrorCode.NOT_FOUND, "It does not exist.", where=uri, remedy=f"See {uri}.")
    marker = Marker(
        sources=(uri,), listed_at="", images=1, duplicates=0, examples=(), kept_columns={}, kept_schema="", tar_ids=None
    )
    for text in (str(run), str(row), visible(uri), one_line(uri), marker.to_json()):
        assert "feedbeef" not in text
        assert "pw@" not in text
        assert "host/a.jpg" in text
    assert json.loads(marker.to_json())["sources"] == ["https://***@host/a.jpg?X-Amz-Signature=***"]
    assert without_secrets({"a": [uri, 1, None]}) == {"a": [hide_secrets(uri), 1, None]}
    from jobs import screen

    factory = logging.getLogRecordFactory()
    try:
        screen.prepare()
        logging.getLogger("botocore").warning("asked %s", uri)
    finally:
        logging.setLogRecordFactory(factory)
    assert "feedbeef" not in caplog.text
