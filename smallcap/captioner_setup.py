"""How a captioner is set up: its options, and the search that it retrieves with."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from smallcap.config import Dtype
from smallcap.generation_config import GenerationConfig
from smallcap.index.manifest import load_manifests
from smallcap.index.merged import CaptionSearch, MergedSearch, open_indexes
from smallcap.index.retriever import NeighbourSearch
from smallcap.model.encoder_spec import resolve_encoder_identity
from smallcap.retrieval_config import IndexNames, IndexWeights, SearchDevice, name_indexes
from smallcap.storage import DEFAULT_CACHE_DIR


class CaptionerOptions(GenerationConfig):
    """How images are captioned: the options of decoding and of loading."""

    k: int | None = Field(None, ge=0)
    """Retrieved captions per prompt; by default the checkpoint's number. 0 needs no index."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:N`, or `auto`, which takes a GPU if there is one, else the CPU."""
    dtype: Dtype = "auto"
    """`auto` is what `smallcap.machine.precision` finds fastest on the device."""
    retrieval_encoder: str | None = None
    """Spec of the retrieval encoder; by default the one that the index names."""
    index_id: str | None = None
    """Version of the index; by default the current one. Those of several indexes are joined by `+`."""
    index_names: IndexNames = ()
    """Names of several indexes; by default the last parts of their URIs."""
    index_weights: IndexWeights = ()
    """What the scores of several indexes are multiplied by when their captions are compared; by default 1."""
    cache_dir: str = DEFAULT_CACHE_DIR
    """Folder for copies of remote indexes and models, and for what `auto` means here."""
    search_device: SearchDevice = "auto"
    """Where the index is searched; `auto` is the model's GPU where both fit on it, else the CPU."""
    compile_encoders: bool = False
    """Run the encoders through torch.compile; pays off in long runs."""
    clip_score: bool = True
    """Embed each caption for its cosine with the image."""


def open_search(index: str | Sequence[str] | CaptionSearch, options: CaptionerOptions) -> tuple[CaptionSearch, str]:
    """Opens an index, or several, after a check of their encoder.

    Args:
        index: URI of a published index, or of several, or an open index.
        options: Says which versions to open, their names and weights, and the encoder.

    Returns:
        The search, and the spec of the encoder that makes its queries.

    Raises:
        ConfigError: The indexes have different encoders, or two of them the same name.
        CheckpointError: The encoder cannot be found.
        ManifestError: There is no published index.
        IndexIntegrityError: An index is damaged, or was built with another encoder.
    """
    if isinstance(index, NeighbourSearch | MergedSearch):
        manifests, places = index.manifests, [manifest.index_id for manifest in index.manifests]
    else:
        places = [index] if isinstance(index, str) else list(index)
        indexes = name_indexes(places, options.index_names, options.index_weights)
        manifests = load_manifests(places, options.index_id)
    spec = options.retrieval_encoder or manifests[0].encoder.spec
    identity = resolve_encoder_identity(spec, options.cache_dir)
    for manifest, place in zip(manifests, places, strict=True):
        manifest.check_encoder(identity, place)
    if isinstance(index, NeighbourSearch | MergedSearch):
        return index, spec
    return open_indexes(indexes, manifests, options.cache_dir), spec
