"""Embed the items into the Corpus: shards with everything item-side precomputed."""

from datetime import date
from typing import TYPE_CHECKING

from pipeline.command import Outcome, command

if TYPE_CHECKING:
    from pipeline.settings import Settings


def run(settings: "Settings", ds: date | None) -> Outcome:
    from pipeline.distributed.embed import embed_corpus
    from pipeline.io.night import open_night

    storage, night = open_night(settings, ds)
    manifest = embed_corpus(storage, night, settings)
    return {
        "status": "embedded",
        "corpus": night.corpus.id,
        "uri": f"{storage.uri}/{night.corpus.prefix}",
        **manifest.counts,
    }


if __name__ == "__main__":
    command(__doc__ or "", run)
