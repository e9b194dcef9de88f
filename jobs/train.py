"""Train the retrieval model on the prepared histories and leave it as a Checkpoint."""

from datetime import date
from typing import TYPE_CHECKING

from pipeline.command import Outcome, command

if TYPE_CHECKING:
    from pipeline.settings import Settings


def run(settings: "Settings", ds: date | None) -> Outcome:
    from pipeline.distributed.train import train_checkpoint
    from pipeline.io.checkpoint import read_metrics
    from pipeline.io.night import open_night

    storage, night = open_night(settings, ds)
    train_checkpoint(storage, night, settings)
    metrics = read_metrics(storage, night.checkpoint)
    return {
        "status": "trained",
        "checkpoint": night.checkpoint.id,
        "uri": f"{storage.uri}/{night.checkpoint.prefix}",
        **{name: value for name, value in metrics.items() if name != "history"},
    }


if __name__ == "__main__":
    command(__doc__ or "", run)
