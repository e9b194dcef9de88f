"""Choose tonight's search: the cheapest method that reaches search.target_recall, measured on a sample of users."""

from typing import TYPE_CHECKING

from pipeline.command import EXISTS, MADE, SKIPPED, Outcome, command, log, on_night, open_runner

if TYPE_CHECKING:
    from pipeline.io.night import Night
    from pipeline.settings import Settings


def run(settings: "Settings", night: "Night") -> Outcome:
    if settings.search.method != "tuned":
        return {"status": SKIPPED, "method": settings.search.method}
    from pipeline.io.tuning import CHOSEN, read_tuning
    from pipeline.stages.tune import tune_search

    choice, status = read_tuning(night), EXISTS
    if choice is None:
        choice, status = tune_search(open_runner(settings), night, settings), MADE
    log.info("search is %s: %s", choice.method, choice.reason)
    return {
        "status": status,
        "uri": f"{night.storage.uri}/{night.tuning.prefix}",
        "reason": choice.reason,
        **choice.model_dump(include=CHOSEN),
    }


if __name__ == "__main__":
    command(__doc__ or "", on_night(run))
