"""Train the retrieval model on the prepared histories and leave it as a Checkpoint."""

from typing import TYPE_CHECKING

from pipeline.command import EXISTS, MADE, Outcome, command, on_night, open_runner

if TYPE_CHECKING:
    from pipeline.io.night import Night
    from pipeline.settings import Settings


def run(settings: "Settings", night: "Night") -> Outcome:
    from pipeline.io.checkpoint import read_metrics
    from pipeline.stages.train import are_trained, remove_states, train_checkpoint

    status = EXISTS
    if not are_trained(night):
        train_checkpoint(open_runner(settings), night, settings)
        status = MADE
    else:
        remove_states(night)  # what a crash at the very end has left
    metrics = read_metrics(night.storage, night.checkpoint)
    return {
        "status": status,
        "checkpoint": night.checkpoint.id,
        "uri": f"{night.storage.uri}/{night.checkpoint.prefix}",
        **metrics.model_dump(exclude={"history"}),
    }


if __name__ == "__main__":
    command(__doc__ or "", on_night(run))
