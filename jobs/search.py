"""Searches a published index with an image or a text, to show people what is retrieved."""

from __future__ import annotations

from jobs.terminal.call_options import SearchOptions
from smallcap import storage
from smallcap.errors import ConfigError, RowError
from smallcap.index.manifest import load_manifest
from smallcap.index.retriever import Neighbour, Retriever
from smallcap.model.clip_query import embed_text
from smallcap.model.encoder_spec import resolve_encoder_identity


def search(options: SearchOptions) -> list[Neighbour]:
    """Returns the captions nearest to an image or a text.

    Raises:
        ConfigError: The image cannot be used.
        RunError: The index or its encoder cannot be used.
    """
    index, image, text, k = options.index, options.image, options.text, options.k
    manifest = load_manifest(index)
    spec = options.encoder or manifest.encoder.spec
    data = storage.read_bytes(image) if image is not None else b""
    retriever = Retriever.open(index, encoder=resolve_encoder_identity(spec), index_id=manifest.index_id)
    if text is not None:
        return retriever.search(embed_text(spec, text), k)[0]
    assert image is not None
    import torch  # errors come before

    from smallcap.images.decode import crop_pixels, decode_image
    from smallcap.model.clip_encoder import load_retrieval_encoder, normalise_pixels

    loaded = load_retrieval_encoder(spec)
    try:
        pixels = crop_pixels(decode_image(data, where=image), loaded.preprocessing)
    except RowError as error:
        raise ConfigError("The image cannot be used.", where=image, found=str(error)) from error
    batch = normalise_pixels(torch.from_numpy(pixels[None]), loaded.preprocessing, torch.float32)
    return retriever.search(loaded.encode_images(batch).numpy(), k)[0]
