from itertools import chain
from pathlib import Path

import pytest

from smallcap.training.example_stream import ExampleStream
from tests.feature_files import write_store

Named = tuple[str, int]


@pytest.fixture
def stream(tmp_path: Path) -> ExampleStream:
    """24 examples of 12 images in 3 parts, two of which are held together; batches of 5."""
    parts = write_store(tmp_path)
    return ExampleStream(str(tmp_path / "features"), str(tmp_path / "candidates"), parts, 5, 2, seed=0)


def names(stream: ExampleStream, epoch: int = 0, first: int = 0, rank: int = 0, world: int = 1) -> list[list[Named]]:
    batches = stream.batches(epoch, first, rank, world)
    return [[(example.image_id, example.number) for example in batch] for batch in batches]


def test_an_epoch_has_every_example_once_in_an_order_of_its_own(stream: ExampleStream) -> None:
    batches = names(stream)
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 4]
    assert stream.batches_per_epoch == 5
    everything = [(f"{part}-{image}", number) for part in range(3) for image in range(4) for number in range(2)]
    assert sorted(chain(*batches)) == everything
    assert names(stream, 1) == names(stream, 1)
    assert names(stream, 0) != names(stream, 1)
    assert list(chain(*names(stream))) != sorted(chain(*names(stream)))


@pytest.mark.parametrize("first", range(6))
def test_an_epoch_goes_on_where_it_was_interrupted(stream: ExampleStream, first: int) -> None:
    assert names(stream, 1, first) == names(stream, 1)[first:]


@pytest.mark.parametrize("world", [2, 3, 7])
def test_workers_share_the_same_batches(stream: ExampleStream, world: int) -> None:
    shares = [names(stream, rank=rank, world=world) for rank in range(world)]
    for batch, of_workers in zip(names(stream), zip(*shares, strict=True), strict=True):
        assert sorted(chain(*of_workers)) == sorted(batch)


def test_what_is_skipped_is_not_read(stream: ExampleStream) -> None:
    order = names(stream)
    first_window = {image.split("-")[0] for image, _ in chain(*order[:3])}
    for part in stream.parts:
        if str(int(part.name.split("-")[1])) in first_window:
            Path(stream.features, "train", part.name).unlink()
    assert names(stream, first=4) == order[4:]


def test_drawn_captions_depend_on_example_and_epoch(stream: ExampleStream) -> None:
    examples = list(chain(*stream.batches(0)))
    first, again, other = (examples[0].retrieved(4, "sample-k", (0, epoch)) for epoch in (0, 0, 1))
    assert first == again
    assert first != other
    assert len({tuple(example.retrieved(4, "sample-k", (0, 0))) for example in examples}) > 20
    assert examples[0].retrieved(2, "top-k", (0, 0)) == ["near 0", "near 1"]
    plain = ExampleStream(stream.features, None, stream.parts, 5, 2, seed=0)
    assert next(plain.batches(0))[0].candidates == []
