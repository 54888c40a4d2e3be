from pathlib import Path

import pytest

import index_builder.dumps.buckets as buckets_module
from index_builder.dumps.buckets import (
    DedupeTask,
    UniqueCaptions,
    count_captions_per_image,
    deal_dumps,
    dedupe_bucket,
    plan_buckets,
    plan_counting,
    plan_dealing,
)
from index_builder.dumps.cleaning import caption_key
from index_builder.dumps.files import find_dumps, scan_dump
from smallcap.captions.rows import CaptionColumns
from smallcap.config import CleaningConfig

COLUMNS = CaptionColumns("caption", "image")


def unique_rows(dumps: list[str], work: Path) -> tuple[list[dict[str, object]], int]:
    """Runs the stages without Ray; returns all unique captions in the order of their ids, and the most per image."""
    scans = [scan_dump((dump, COLUMNS)) for dump in find_dumps(dumps)]
    buckets = plan_buckets(sum(scan.bytes for scan in scans))
    tasks = plan_dealing(scans, str(work), COLUMNS, CleaningConfig(tokenizer=None), buckets, 0, range(len(scans)))
    dealt = [deal_dumps(task) for task in tasks]
    chunks = tuple(chunk for task in dealt for chunk in task.chunks)
    deduped = [dedupe_bucket(DedupeTask(str(work), bucket, chunks)) for bucket in range(buckets)]
    captions = UniqueCaptions(str(work), [bucket.captions for bucket in deduped])
    rows = captions.read(0, len(captions)).to_pylist()
    assert captions.read(2, 7).to_pylist() == rows[2:7]
    assert sum(bucket.duplicates for bucket in deduped) + len(rows) == sum(sum(task.rows) for task in dealt)
    return rows, max(count_captions_per_image(task) for task in plan_counting(str(work), deduped))


@pytest.mark.parametrize("bytes_per_bucket", [150, 1 << 20])
@pytest.mark.parametrize("chunk_bytes", [3000, 1 << 20])
def test_ids_and_contents_do_not_depend_on_buckets_and_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_per_bucket: int, chunk_bytes: int
) -> None:
    monkeypatch.setattr(buckets_module, "BYTES_PER_BUCKET", bytes_per_bucket)
    monkeypatch.setattr(buckets_module, "_CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(buckets_module, "_CLEANED_AT_ONCE", 5)
    monkeypatch.setattr(buckets_module, "_IMAGES_PER_COUNT", 10)
    expected: dict[bytes, tuple[str, list[int], list[str]]] = {}
    for source, name in enumerate(["a.csv", "b.csv"]):
        lines = [(f"img{number % 9}", f"{'Dog' if source else 'dog'} number {number % 20}") for number in range(30)]
        (tmp_path / name).write_text("image,caption\n" + "".join(f"{image},{text}\n" for image, text in lines))
        for image, text in lines:
            _, sources, images = expected.setdefault(caption_key(text), (text, [], []))
            sources.append(source)
            images.append(image)
    rows, most = unique_rows([f"{tmp_path}/a.csv", f"{tmp_path}/b.csv"], tmp_path / "work")
    assert rows == [
        {
            "key": key,
            "text": text,
            "source": [*dict.fromkeys(sources)],
            "image_id": [*dict.fromkeys(images)],
            "vector": None,
        }
        for key, (text, sources, images) in sorted(expected.items())
    ]
    per_image = [image for row in rows for image in row["image_id"]]  # type: ignore[attr-defined]
    assert most == max(per_image.count(image) for image in per_image)


def test_captions_without_images(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("caption\n" + "".join(f"text {number}\n" for number in range(10)))
    rows, most = unique_rows([f"{tmp_path}/a.csv"], tmp_path / "work")
    assert most == 0
    assert all(row["image_id"] is None for row in rows)
