"""Choose the weight of the item-to-item counts in the score, on validation users; 0 where they do not help.

Writes <root>/memories/<id>/: the choice and all that was tried.
"""

from typing import TYPE_CHECKING

from pipeline.command import EXISTS, MADE, SKIPPED, Outcome, command, log, on_night, open_runner

if TYPE_CHECKING:
    from pipeline.io.memory import MemoryRecord
    from pipeline.io.night import Night
    from pipeline.settings import Settings


def run(settings: "Settings", night: "Night") -> Outcome:
    if not settings.memory.enabled:
        return {"status": SKIPPED, "weight": 0.0}
    from pipeline.io.memory import read_memory

    record, status = read_memory(night), EXISTS
    if record is None:
        from pipeline.stages.memory import choose_memory  # imports torch, which reading the choice does not need

        record, status = choose_memory(open_runner(settings), night, settings), MADE
    log.info(describe(record))
    return {
        "status": status,
        "uri": f"{night.storage.uri}/{night.memory.prefix}",
        **record.model_dump(include={"weight", "scale", "num_users", "ndcg", "ndcg_without"}),
    }


def describe(record: "MemoryRecord") -> str:
    """Say what was chosen and what it brings."""
    users = f"{record.num_users} validation users"
    if not record.weight:
        best = max((trial.ndcg for trial in record.trials), default=record.ndcg_without)
        return (
            f"the score is MoL alone: on {users} its NDCG@10 is {record.ndcg_without:.4f}, and no weight of the "
            f"item-to-item counts is better by more than chance (the best gives {best:.4f})"
        )
    return (
        f"the score is MoL + {record.weight:g} · log(1 + item-to-item count / {record.scale:g}): NDCG@10 "
        f"{record.ndcg:.4f} instead of {record.ndcg_without:.4f} on {users}"
    )


if __name__ == "__main__":
    command(__doc__ or "", on_night(run))
