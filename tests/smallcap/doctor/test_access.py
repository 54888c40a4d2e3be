from pathlib import Path

import pytest

from smallcap import storage
from smallcap.doctor import access
from smallcap.doctor.access import check_encoder, check_index, check_model
from smallcap.doctor.report import Finding, attempt
from smallcap.model.encoder_spec import resolve_encoder_identity
from tests.index_files import PublishIndex, unit_vectors


@pytest.fixture
def publish(publish_index: PublishIndex, tiny_clip: Path) -> PublishIndex:
    """A function that publishes 40 captions, as if embedded by the tiny CLIP, at a place."""
    encoder = resolve_encoder_identity(f"hf:{tiny_clip}")
    vectors = unit_vectors(40, encoder.dim)
    return lambda uri: publish_index(uri, vectors, [f"caption {n}" for n in range(40)], shards=2, encoder=encoder)


def findings(index: str, model: Path | str, cache: Path, encoder: str | None = None) -> list[Finding]:
    return list(attempt("index", lambda: check_index(index, str(model), encoder, str(cache)), "Look."))


def test_a_model_that_loads_and_one_that_is_missing(tiny_smallcap: Path) -> None:
    (finding,) = check_model(str(tiny_smallcap))
    assert (finding.status, finding.found.startswith(f"{tiny_smallcap.name}@")) == ("ok", True)
    (finding,) = attempt("model", lambda: check_model("/nowhere/model"), "Look.")
    assert (finding.status, "There is no such model folder" in finding.found) == ("fail", True)


def test_a_retrieval_encoder_that_is_there_and_one_that_is_missing(tiny_clip: Path) -> None:
    (finding,) = check_encoder(f"hf:{tiny_clip}")
    assert finding.status == "ok"
    (finding,) = attempt("retrieval encoder", lambda: check_encoder("hf:/nowhere/clip"), "Look.")
    assert (finding.status, finding.subject) == ("fail", "retrieval encoder")


def test_a_sound_index(anywhere: str, publish: PublishIndex, tiny_smallcap: Path, tmp_path: Path) -> None:
    manifest = publish(anywhere)
    found = findings(anywhere, tiny_smallcap, tmp_path / "cache")
    assert [(finding.subject, finding.status) for finding in found] == [
        ("index", "ok"),
        ("index cache", "ok"),
        ("index encoder", "ok"),
    ]
    assert f"40 captions in version {manifest.index_id}" in found[0].found
    assert not (tmp_path / "cache").exists()


def test_an_index_whose_files_are_missing(publish: PublishIndex, tiny_smallcap: Path, tmp_path: Path) -> None:
    uri = str(tmp_path / "index")
    manifest = publish(uri)
    storage.remove(storage.join(uri, manifest.shards[1].file))
    storage.write_bytes(storage.join(uri, manifest.captions[0].file), b"cut")
    first, *_ = findings(uri, tiny_smallcap, tmp_path)
    assert first.status == "fail"
    assert "2 files missing or of another size" in first.found
    assert manifest.shards[1].file in first.found


def test_an_index_of_another_encoder(
    publish: PublishIndex, tiny_smallcap: Path, other_clip: Path, tmp_path: Path
) -> None:
    uri = str(tmp_path / "index")
    publish(uri)
    *_, last = findings(uri, tiny_smallcap, tmp_path, f"hf:{other_clip}")
    assert (last.subject, last.status) == ("index encoder", "fail")
    assert "built with another retrieval encoder" in last.found
    assert "rebuild the index" in last.remedy
    *_, last = findings(uri, "demo", tmp_path)
    assert (last.status, "the model was trained with demo" in last.found) == ("warn", True)


def test_no_index_and_a_full_disk(
    s3: str, publish: PublishIndex, tiny_smallcap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (finding,) = findings(f"{s3}/none", tiny_smallcap, tmp_path)
    assert (finding.status, "There is no published index here" in finding.found) == ("fail", True)
    publish(f"{s3}/index")
    monkeypatch.setattr(access.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100}))
    _, cache, _ = findings(f"{s3}/index", tiny_smallcap, tmp_path / "cache")
    assert (cache.status, "0.0 GB free" in cache.found) == ("fail", True)


def test_each_missing_input_fails_in_its_own_line_with_its_own_remedy(
    publish: PublishIndex, tiny_smallcap: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    uri, cache, missing = str(tmp_path / "index"), tmp_path / "cache", tmp_path / "none"
    publish(uri)
    (tmp_path / "file").touch()
    lines = {
        "index": findings(str(missing), tiny_smallcap, cache),
        "index cache": findings(uri, tiny_smallcap, tmp_path / "file" / "cache"),
        "index encoder": findings(uri, tiny_smallcap, cache, f"hf:{missing}"),
    }
    remedies = {"index": "build-index", "index cache": "--cache-dir", "index encoder": "--retrieval-encoder"}
    for subject, found in lines.items():
        (failed,) = [finding for finding in found if finding.status != "ok"]
        assert (failed.subject, failed.status, remedies[subject] in failed.remedy) == (subject, "fail", True), failed


def test_without_a_model_the_index_says_what_it_waits_for(
    publish: PublishIndex, tiny_clip: Path, tmp_path: Path
) -> None:
    uri = str(tmp_path / "index")
    publish(uri)
    index, cache, encoder = findings(uri, tmp_path / "none", tmp_path)
    assert (index.status, cache.status) == ("ok", "ok")
    assert (encoder.status, encoder.remedy) == ("warn", "Mend model first.")
    assert encoder.found.endswith("as the index was built; not compared with the model's, because of model")
