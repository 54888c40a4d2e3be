"""Searches a published index with an image or a text, to show people what is retrieved."""

from __future__ import annotations

from jobs.terminal.call_options import SearchOptions
from smallcap import storage
from smallcap.errors import ConfigError, RowError
from smallcap.index.manifest import load_manifest
from smallcap.index.retriever import Neighbour, Retriever


def search(options: SearchOptions) -> list[Neighbour]:
    """Returns the captions nearest to an image or a text.

    Raises:
        ConfigError: There is not exactly one query, or the image cannot be used.
        RunError: The index or its encoder cannot be used.
    """
    index, image, text, k = options.index, options.image, options.text, options.k
    if (image is None) == (text is None):
        raise ConfigError("A search takes one query.", expected="either --image or --text")
    manifest = load_manifest(index)
    from smallcap.model.clip_encoder import load_retrieval_encoder, normalise_pixels, resolve_encoder_identity

    spec = options.encoder or manifest.encoder.spec
    retriever = Retriever.open(index, encoder=resolve_encoder_identity(spec), index_id=manifest.index_id)
    loaded = load_retrieval_encoder(spec)
    if text is not None:
        return retriever.search(loaded.encode_texts([text]), k)[0]
    assert image is not None
    import torch

    from smallcap.images.decode import crop_pixels, decode_image

    try:
        pixels = crop_pixels(decode_image(storage.read_bytes(image), where=image), loaded.preprocessing)
    except RowError as error:
        raise ConfigError("The image cannot be used.", where=image, found=str(error)) from error
    batch = normalise_pixels(torch.from_numpy(pixels[None]), loaded.preprocessing, torch.float32)
    return retriever.search(loaded.encode_images(batch).numpy(), k)[0]
