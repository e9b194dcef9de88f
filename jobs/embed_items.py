"""Embed the items into the Corpus: shards with everything item-side precomputed.

With a refit there are two: of the model that the evaluation measures, and of the model that serves.
"""

from typing import TYPE_CHECKING

from pipeline.command import EXISTS, MADE, Outcome, command, on_night, open_runner

if TYPE_CHECKING:
    from pipeline.io.night import Night
    from pipeline.settings import Settings


def run(settings: "Settings", night: "Night") -> Outcome:
    from pipeline.io.artifacts import read_manifest
    from pipeline.stages.embed import embed_corpora

    manifest, status = read_manifest(night.storage, night.corpus.prefix), EXISTS
    if manifest is None or (night.has_refit and read_manifest(night.storage, night.measured_corpus.prefix) is None):
        manifest, status = embed_corpora(open_runner(settings), night, settings), MADE
    return {
        "status": status,
        "corpus": night.corpus.id,
        "uri": f"{night.storage.uri}/{night.corpus.prefix}",
        **manifest.counts,
        **manifest.measures,
    }


if __name__ == "__main__":
    command(__doc__ or "", on_night(run))
