"""Count which item follows which in the training events: for each item, the items that follow it most.

Writes <root>/neighbours/<id>/: a Parquet file per range of items, and manifest.json. The evaluation ranks by these
counts too: a model that finds less than they do is not worth its training.
"""

from typing import TYPE_CHECKING

from pipeline.command import EXISTS, MADE, Outcome, command, on_night, open_runner

if TYPE_CHECKING:
    from pipeline.io.night import Night
    from pipeline.settings import Settings


def run(settings: "Settings", night: "Night") -> Outcome:
    from pipeline.io.artifacts import read_manifest
    from pipeline.stages.neighbours import count_neighbours, remove_scratch

    manifest, status = read_manifest(night.storage, night.neighbours.prefix), EXISTS
    if manifest is None:
        manifest, status = count_neighbours(open_runner(settings), night, settings), MADE
    else:
        remove_scratch(night)  # left by a crash right after the manifest
    return {
        "status": status,
        "neighbours": manifest.id,
        "uri": f"{night.storage.uri}/{night.neighbours.prefix}",
        **manifest.counts,
    }


if __name__ == "__main__":
    command(__doc__ or "", on_night(run))
