"""Count which item follows which: for each item, the items that follow it most.

Writes <root>/neighbours/<id>/: a Parquet file per range of items, and manifest.json. The counts can have a part in the
score (`choose_memory`), and the evaluation ranks by them alone too: a model that finds less than they do is not worth
its training. With a refit there are three: of the training events for choices, of the events before the test for the
evaluation, and of all events to serve.
"""

from typing import TYPE_CHECKING

from pipeline.command import EXISTS, MADE, Outcome, command, on_night, open_runner

if TYPE_CHECKING:
    from pipeline.io.night import Night
    from pipeline.settings import Settings


def run(settings: "Settings", night: "Night") -> Outcome:
    from pipeline.io.artifacts import read_manifest
    from pipeline.stages.neighbours import count_neighbours, remove_scratch

    # Memory needs all three; the evaluation needs its own in any case.
    nights = [night.selection, night.measurement, night] if settings.memory.enabled else [night.measurement]
    nights = nights if night.has_refit else [night]
    status, manifests = EXISTS, []
    for each in nights:
        manifest = read_manifest(night.storage, each.neighbours.prefix)
        if manifest is None:
            manifest, status = count_neighbours(open_runner(settings), each, settings), MADE
        else:
            remove_scratch(each)  # left by a crash right after the manifest
        manifests.append(manifest)
    manifest = manifests[-1]
    return {
        "status": status,
        "neighbours": manifest.id,
        "uri": f"{night.storage.uri}/{nights[-1].neighbours.prefix}",
        **manifest.counts,
    }


if __name__ == "__main__":
    command(__doc__ or "", on_night(run))
