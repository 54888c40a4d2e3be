"""Builds the datastores that the claims compare, in the way that users build theirs."""

import random
from pathlib import Path

from demo.datastore import DATASTORE_SCENES, datastore_rows, write_captions
from demo.world import OTHER, TRAINING
from jobs import build_index
from smallcap.config import CleaningConfig, IndexConfig
from smallcap.model.files import DEMO

STOCK_PHRASES = ("click to enlarge", "photo by the author", "free shipping on all orders", "image not found")


def noise_rows(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Returns captions that describe nothing: the words of a caption in random order, sometimes after a stock phrase.

    Their nouns come from all domains, so images retrieve them.
    """
    rng = random.Random(seed)
    captions = [caption for rows in (datastore_rows(TRAINING), datastore_rows(OTHER)) for _, caption in rows]
    rows = []
    for number, caption in enumerate(rng.sample(captions, count)):
        words = caption.replace(",", "").split()
        rng.shuffle(words)
        phrase = rng.choice(STOCK_PHRASES) + " " if rng.random() < 0.3 else ""
        rows.append((f"noise-{number}.jpg", phrase + " ".join(words)))
    return rows


def build_datastores(work: Path) -> dict[str, str]:
    """Builds an index of each datastore below a folder; an existing one is kept.

    Returns:
        URIs by name. `training` and `other` hold the captions of the training domains and of the held-out domains;
        `other-half` and `other-eighth` hold a share of `other`; `both` holds all. `noisy` is `other` with an equal
        amount of noise, `everything` is `both` with an equal amount of noise.
    """
    training, other = datastore_rows(TRAINING), datastore_rows(OTHER)
    dumps = {
        "training": training,
        "other": other,
        "other-half": datastore_rows(OTHER, DATASTORE_SCENES // 2),
        "other-eighth": datastore_rows(OTHER, DATASTORE_SCENES // 8),
        "both": training + other,
        "noisy": other + noise_rows(len(other)),
        "everything": training + other + noise_rows(len(training) + len(other)),
    }
    work.mkdir(parents=True, exist_ok=True)
    indexes: dict[str, str] = {}
    for name, rows in dumps.items():
        write_captions(rows, work / f"{name}.csv")
        config = IndexConfig(
            dumps=(str(work / f"{name}.csv"),),
            out=str(work / name),
            encoder=DEMO,
            shards=1,
            reuse=tuple(indexes.values()),  # embeddings of the same captions
            cleaning=CleaningConfig(tokenizer=DEMO),
        )
        indexes[name] = build_index.run(config).index_uri
    return indexes
