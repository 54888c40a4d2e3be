"""Captions images in several ways at once: with other models, prompts, numbers of captions, or ways to decode.

What is the same for all is done once: the pixels go up, each vision encoder and the retrieval encoder run, and each
number of captions is retrieved. Every way yields what a `Captioner` of its own would.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from torch import Tensor

from smallcap.captioned import CaptionedBatch, PreparedBatch
from smallcap.captioner import MORE_ROOM, Batch, Captioner, Values
from smallcap.captioner_setup import CaptionerOptions
from smallcap.decoding.micro_batches import MicroBatches
from smallcap.images.crops import Pixels
from smallcap.index.merged import CaptionSearch, MergedSearch
from smallcap.index.retriever import Neighbours, Retriever
from smallcap.machine.side_thread import SideThread
from smallcap.model.checkpoint import load_checkpoint, share_vision_encoder, tokenizer_source
from smallcap.model.prompt import load_tokenizer


class VariantCaptioner:
    """Captions images in several ways.

    Args:
        captioners: A captioner for each way. They share the device, the retrieval encoder and the index, and may share
            models; all take the same crops.
    """

    def __init__(self, captioners: Sequence[Captioner]) -> None:
        self.captioners = tuple(captioners)
        first, *others = captioners
        first.take_turns_with(others)
        self._preparing = MicroBatches("the encoders or the search", first.free_memory, relief=MORE_ROOM)
        self._beside = SideThread(first.model.device, "prepare")

    @classmethod
    def from_pretrained(
        cls, ways: Sequence[tuple[str, CaptionerOptions]], index: str | Sequence[str] | CaptionSearch | None = None
    ) -> VariantCaptioner:
        """Loads what the ways need, each model and each vision encoder once.

        Args:
            ways: Model and options of each way, as for `Captioner.from_pretrained`; the first one's options of loading
                hold for all. If any way retrieves, the first one does.
            index: URI of a published index, or of several, or an open index.

        Raises:
            ConfigError: As `Captioner.from_pretrained`.
            CheckpointError: A model or the encoder cannot be loaded.
            ManifestError: There is no published index.
            IndexIntegrityError: The index is damaged, or was built with another encoder.
        """
        (source, options), *others = ways
        first = Captioner.from_pretrained(source, index, options, search_device="cpu")  # until all models are there
        captioners, models = [first], {source: first.model}
        for other, other_options in others:
            if other not in models:
                model = load_checkpoint(other, str(first.model.device), str(first.model.dtype).removeprefix("torch."))
                same = [known for name, known in models.items() if share_vision_encoder(other, name)]
                if same:
                    model.encoder = same[0].encoder
                models[other] = model
            tokenizer = load_tokenizer(tokenizer_source(other))
            captioners.append(
                Captioner(models[other], tokenizer, first.retrieval_encoder, first.retriever, other_options)
            )
        for captioner in captioners[1:]:  # not before all have compared weights
            captioner.pack()
            if options.compile_encoders:
                captioner.compile_encoders()
        if isinstance(first.retriever, Retriever | MergedSearch):
            first.retriever.use_device(str(first.model.device), options.search_device)
        return cls(captioners)

    def caption_columns(self, batches: Iterable[Batch], ways: Sequence[int]) -> Iterator[list[CaptionedBatch]]:
        """Captions batch after batch, as `Captioner.caption_columns` does.

        Args:
            batches: Arguments of `Captioner.caption_batch` for each batch.
            ways: The numbers of those ways in which they are captioned, at least one.

        Yields:
            What became of each batch, by way.
        """
        prepare, finish = partial(self._prepare, ways), partial(self._finish, ways)
        if self.captioners[0].model.device.type == "cuda":
            return self._beside.prepare_ahead(batches, prepare, finish)
        return (finish(prepare(*batch)) for batch in batches)

    def _prepare(
        self, ways: Sequence[int], pixels: Sequence[Pixels], exclude_image_ids: Values, indexes: Values = None
    ) -> list[list[PreparedBatch]]:
        """Returns the parts of a batch, each prepared for every way."""

        def prepare(rows: slice) -> list[PreparedBatch]:
            exclude, names = exclude_image_ids and exclude_image_ids[rows], indexes and indexes[rows]
            return self._prepare_part(ways, pixels[rows], exclude, names)

        return self._preparing.run(len(pixels), prepare)

    def _prepare_part(
        self, ways: Sequence[int], pixels: Sequence[Pixels], exclude_image_ids: Values, indexes: Values
    ) -> list[PreparedBatch]:
        captioners = [self.captioners[way] for way in ways]
        encoded: dict[int, tuple[Tensor, Tensor]] = {}
        found: dict[int, Neighbours] = {}
        for captioner in captioners:
            encoder = id(captioner.model.encoder)
            if encoder not in encoded:
                encoded[encoder] = captioner.encode(pixels)
        embedding = min(captioners, key=lambda captioner: not captioner.shares_encoder)  # the cheapest
        embeddings = embedding.embed(pixels, encoded[id(embedding.model.encoder)][1])
        for captioner in captioners:
            if captioner.k not in found:
                found[captioner.k] = captioner.retrieve(embeddings, exclude_image_ids, indexes)
        return [
            PreparedBatch(
                pixels,
                encoded[id(captioner.model.encoder)][0],
                embeddings,
                found[captioner.k],
                captioner.prompt(found[captioner.k]),
            )
            for captioner in captioners
        ]

    def _finish(self, ways: Sequence[int], parts: Sequence[Sequence[PreparedBatch]]) -> list[CaptionedBatch]:
        return [self.captioners[way].finish([part[place] for part in parts]) for place, way in enumerate(ways)]
