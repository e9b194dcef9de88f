"""Measure tonight's model and search on held-out events, beside popularity and item-to-item counts, and the search
against exact search."""

from typing import TYPE_CHECKING

from pipeline.command import EXISTS, MADE, Outcome, command, log, on_night, open_runner

if TYPE_CHECKING:
    from pipeline.io.night import Night
    from pipeline.settings import Settings


def run(settings: "Settings", night: "Night") -> Outcome:
    from pipeline.io.evaluation import card_key, read_metrics
    from pipeline.io.tuning import as_chosen
    from pipeline.quality.report import metrics_table, warnings_of

    metrics, status = read_metrics(night.storage, night.evaluation), EXISTS
    if metrics is None:
        from pipeline.stages.evaluate import evaluate  # imports torch, which reading the metrics does not need

        metrics, status = evaluate(open_runner(settings), night, as_chosen(night, settings)), MADE
    card = f"{night.storage.uri}/{card_key(night)}"
    log.info("evaluation %s, its model card is %s\n%s", night.evaluation.id, card, metrics_table(metrics))
    warnings = warnings_of(metrics)
    for warning in warnings:
        log.warning(warning)
    return {
        "status": status,
        "evaluation": night.evaluation.id,
        "uri": f"{night.storage.uri}/{night.evaluation.prefix}",
        "card": card,
        "queries": metrics.queries,
        **{name: round(value.mean, 4) for name, value in metrics.model.items()},
        "popularity": {name: round(value.mean, 4) for name, value in metrics.popularity.items()},
        "counts": {name: round(value.mean, 4) for name, value in metrics.counts.items()},
        **({"mol": {name: round(value.mean, 4) for name, value in metrics.mol.items()}} if metrics.mol else {}),
        "overlap": round(metrics.overlap.mean, 4),
        "warnings": warnings,
    }


if __name__ == "__main__":
    command(__doc__ or "", on_night(run))
