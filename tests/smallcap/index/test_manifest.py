import json
from pathlib import Path
from typing import Any

import pytest

from smallcap.errors import IndexIntegrityError, ManifestError, StorageError
from smallcap.index.manifest import (
    POINTER_FILE,
    EncoderIdentity,
    IndexManifest,
    load_manifest,
    load_pointer,
    manifest_uri,
    write_pointer,
)
from smallcap.records import parse_record


def values(**changes: Any) -> dict[str, Any]:
    def entry(file: str) -> dict[str, Any]:
        return {"file": file, "bytes": 1, "sha256": "a" * 64}

    return {
        "format_version": 1,
        "encoder": {"spec": "hf:x", "weights_sha256": "b" * 64, "dim": 4},
        "dim": 4,
        "index_key": "Flat",
        "template": entry("files/template"),
        "shards": [
            entry("files/shard-0") | {"rows": 3, "first_id": 0},
            entry("files/shard-1") | {"rows": 2, "first_id": 3},
        ],
        "captions": [entry("files/captions-0") | {"rows": 5, "first_id": 0}],
        "max_captions_per_image": 5,
        "sources": [{"uri": "a.csv", "name": "a.csv", "rows": 7, "sha256": "c" * 64}],
        "filters": {"max_tokens": 25},
        "dropped": {"empty": 2},
        "builder_version": "0.1.0",
        "created_at": "2026-01-01T00:00:00+00:00",
    } | changes


def parse(**changes: Any) -> IndexManifest:
    return parse_record(IndexManifest, json.dumps(values(**changes)).encode(), "manifest.json", ManifestError)


def test_round_trip() -> None:
    manifest = parse().with_index_id()
    assert parse_record(IndexManifest, manifest.to_json().encode(), "x", ManifestError) == manifest
    assert manifest.ntotal == 5
    assert [entry.file for entry in manifest.files] == [
        "files/template",
        "files/shard-0",
        "files/shard-1",
        "files/captions-0",
    ]


def test_the_id_is_of_the_content_and_of_how_it_is_searched() -> None:
    index_id = parse().with_index_id().index_id
    told = {"created_at": "2027-01-01T00:00:00+00:00", "builder_version": "9", "sources": [], "dropped": {}}
    told["recall"] = [{"k": 4, "recall": 1, "queries": 5, "queries_per_s": 1.5}]
    assert parse(**told).with_index_id().index_id == index_id
    assert parse(template=values()["template"] | {"sha256": "d" * 64}).with_index_id().index_id != index_id
    other = {"spec": "hf:x", "weights_sha256": "e" * 64, "dim": 4}
    assert parse(encoder=other).with_index_id().index_id != index_id
    removed = {"file": "files/removed", "bytes": 1, "sha256": "a" * 64, "rows": 2}
    manifest = parse(removed=removed)
    assert (manifest.id_count, manifest.ntotal) == (5, 3)
    assert manifest.files[-1].file == "files/removed"
    ids = {parse(**changes).with_index_id().index_id for changes in ({}, {"nprobe": 4}, {"k_factor": 2})}
    assert len({*ids, manifest.with_index_id().index_id}) == 4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"nonsense", "manifest.json is malformed"),
        (b"[]", "manifest.json is malformed"),
        (b"{}", "manifest.json is malformed"),
        (
            json.dumps(values(format_version=2)).encode(),
            r"cannot read(.|\n)*expected: 1(.|\n)*found: 2(.|\n)*release that wrote it",
        ),
        (json.dumps(values(dim="x")).encode(), r"field of manifest.json(.|\n)*dim"),
        (json.dumps(values(unknown=1)).encode(), r"field of manifest.json(.|\n)*unknown"),
        (json.dumps(values(metric="l2")).encode(), r"field of manifest.json(.|\n)*metric"),
        (json.dumps(values(shards=[])).encode(), r"field of manifest.json(.|\n)*shards"),
    ],
)
def test_manifests_that_cannot_be_read(data: bytes, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        parse_record(IndexManifest, data, "manifest.json", ManifestError)


@pytest.mark.parametrize(
    "file",
    ["../escape", "/etc/passwd", "files/../../x", "files//0", "files/..", "", "a\\b", "files/0\n", "verified/x.json"],
)
def test_a_file_elsewhere_than_in_files_is_refused(file: str) -> None:
    with pytest.raises(ManifestError, match="template"):
        parse(template=values()["template"] | {"file": file})


def test_encoder_check_names_both() -> None:
    manifest = parse()
    manifest.check_encoder(EncoderIdentity(spec="open_clip:elsewhere", weights_sha256="b" * 64, dim=4), "here")
    with pytest.raises(IndexIntegrityError, match=r"hf:x(.|\n)*hf:y"):
        manifest.check_encoder(EncoderIdentity(spec="hf:y", weights_sha256="f" * 64, dim=4), "here")


class TestPublished:
    def publish(self, index: Path) -> IndexManifest:
        manifest = parse().with_index_id()
        file = Path(manifest_uri(str(index), manifest.index_id))
        file.parent.mkdir(parents=True)
        file.write_text(manifest.to_json())
        write_pointer(str(index), manifest.index_id)
        return manifest

    def test_the_pointer_leads_to_the_manifest(self, tmp_path: Path) -> None:
        manifest = self.publish(tmp_path)
        assert load_pointer(str(tmp_path)).index_id == manifest.index_id
        assert load_manifest(str(tmp_path)) == manifest
        with pytest.raises(StorageError, match="does not exist"):
            load_manifest(str(tmp_path), "0" * 16)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (None, r"no published index(.|\n)*build-index"),
            ("{", "malformed"),
            ('{"format_version": 1, "index_id": "../x"}', r"field of current\.json(.|\n)*index_id"),
            ('{"format_version": 2, "index_id": "0123456789abcdef"}', "cannot read"),
        ],
    )
    def test_pointers_that_lead_nowhere(self, tmp_path: Path, data: str | None, message: str) -> None:
        if data is not None:
            (tmp_path / POINTER_FILE).write_text(data)
        with pytest.raises(ManifestError, match=message):
            load_pointer(str(tmp_path))

    def test_a_manifest_in_anothers_folder(self, tmp_path: Path) -> None:
        manifest = self.publish(tmp_path)
        folder = Path(manifest_uri(str(tmp_path), manifest.index_id)).parent
        folder.rename(folder.with_name("0" * 16))
        with pytest.raises(IndexIntegrityError, match="does not belong"):
            load_manifest(str(tmp_path), "0" * 16)
