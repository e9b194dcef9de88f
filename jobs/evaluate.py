"""Measure tonight's model and search on held-out events, beside popularity, and the search against exact search."""

import logging
from datetime import date
from typing import TYPE_CHECKING

from pipeline.command import Outcome, command

if TYPE_CHECKING:
    from pipeline.settings import Settings

log = logging.getLogger("nightrails")


def run(settings: "Settings", ds: date | None) -> Outcome:
    from pipeline.io.evaluations import read_metrics
    from pipeline.io.night import open_night
    from pipeline.io.tunings import tuned
    from pipeline.quality.report import metrics_table

    storage, night = open_night(settings, ds)
    settings = tuned(storage, night, settings)
    metrics = read_metrics(storage, night.evaluation)
    status = "already evaluated"
    if metrics is None:
        from pipeline.distributed.evaluate import evaluate

        metrics, status = evaluate(storage, night, settings), "evaluated"
    log.info("evaluation %s\n%s", night.evaluation.id, metrics_table(metrics))
    return {
        "status": status,
        "evaluation": night.evaluation.id,
        "uri": f"{storage.uri}/{night.evaluation.prefix}",
        "queries": metrics["queries"],
        **{name: round(value["mean"], 4) for name, value in metrics["model"].items()},
        "overlap": round(metrics["overlap"]["mean"], 4),
    }


if __name__ == "__main__":
    command(__doc__ or "", run)
