"""Choose how to search tonight's corpus: the cheapest way that reaches search.target_recall, measured on a sample."""

import logging
from datetime import date
from typing import TYPE_CHECKING

from pipeline.command import Outcome, command

if TYPE_CHECKING:
    from pipeline.settings import Settings

log = logging.getLogger("nightrails")


def run(settings: "Settings", ds: date | None) -> Outcome:
    if settings.search.method != "tuned":
        return {"status": "not asked for", "method": settings.search.method}
    from pipeline.distributed.tune import tune_search
    from pipeline.io.night import open_night

    storage, night = open_night(settings, ds)
    chosen = tune_search(storage, night, settings)
    log.info("search is %s: %s", chosen.method, chosen.reason)
    return {
        "status": "tuned",
        "uri": f"{storage.uri}/{night.tuning.key}",
        **chosen.model_dump(include={"method", "num_preselected", "num_per_embd", "table_dtype", "reason"}),
    }


if __name__ == "__main__":
    command(__doc__ or "", run)
