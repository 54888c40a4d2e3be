from index_builder.dumps.cleaning import caption_key
from index_builder.dumps.deduplication import Deduplicator, Row, UniqueCaption


def row(text: str, source: int = 0, image: str | None = None, **more: object) -> Row:
    return Row(caption_key(text), text, (source,), () if image is None else (image,), **more)  # type: ignore[arg-type]


def by_text(*rows: Row) -> tuple[dict[str, UniqueCaption], int]:
    unique = Deduplicator()
    unique.add(rows)
    captions = list(unique.captions())
    assert [caption.key for caption in captions] == sorted(caption.key for caption in captions)
    return {caption.text: caption for caption in captions}, unique.duplicates


def test_the_first_text_is_kept_with_every_source_and_image() -> None:
    captions, duplicates = by_text(
        row("A dog", 0, "a"), row("a dog", 0), row("a DOG", 1, "b"), row("A cat", 1), row("a dog", 2, "a")
    )
    assert list(captions["A dog"].image_ids) == ["a", "b"]
    assert list(captions["A dog"].sources) == [0, 1, 2]
    assert list(captions["A cat"].image_ids) == []
    assert duplicates == 3


def test_a_vector_belongs_to_its_text_and_not_to_its_key() -> None:
    captions, _ = by_text(
        row("A dog"),
        row("a dog", vector=b"lower"),  # the same caption, embedded from another spelling
        row("A dog", vector=b"first"),
        row("A dog", vector=b"second"),
    )
    assert captions["A dog"].vector == b"first"


def test_lenders_only_lend() -> None:
    captions, duplicates = by_text(
        row("A dog"), row("A dog", vector=b"lent", lends_vector=True), row("A cat", vector=b"lent", lends_vector=True)
    )
    assert captions["A dog"].vector == b"lent"
    assert list(captions) == ["A dog"]
    assert duplicates == 0


def test_a_known_caption_grows_only_by_what_is_new() -> None:
    captions, duplicates = by_text(
        row("A dog", 0, "a", known_id=7),
        row("A cat", 0, "a", known_id=8),
        row("a dog", 0, "a"),
        row("a cat", 1, "a"),
        row("A bird", 1, "c"),
    )
    assert (captions["A dog"].known_id, captions["A dog"].has_grown) == (7, False)
    assert (captions["A cat"].known_id, captions["A cat"].has_grown) == (8, True)
    assert (captions["A bird"].known_id, captions["A bird"].has_grown) == (None, False)
    assert duplicates == 2
