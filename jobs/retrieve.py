"""Search the corpus for every user's top-k and write the run's candidates and accounting, unit by unit."""

from datetime import date
from typing import TYPE_CHECKING

from pipeline.command import Outcome, command

if TYPE_CHECKING:
    from pipeline.settings import Settings


def run(settings: "Settings", ds: date | None) -> Outcome:
    from pipeline.distributed.queries import TonightsUsers
    from pipeline.distributed.search import search_units
    from pipeline.distributed.sinks import CandidateSink
    from pipeline.io.night import open_night
    from pipeline.io.runs import done_units
    from pipeline.io.tunings import tuned

    storage, night = open_night(settings, ds)
    settings = tuned(storage, night, settings)
    done = done_units(storage, night.run)
    pending = [unit for unit in range(settings.output.num_buckets) if unit not in done]
    search_units(storage.uri, night, settings, pending, TonightsUsers, CandidateSink, f"{night.run.prefix}/_wave")
    return {
        "status": "retrieved",
        "run_id": night.run.run_id,
        "uri": f"{storage.uri}/{night.run.prefix}",
        "units": settings.output.num_buckets,
        "computed": len(pending),
    }


if __name__ == "__main__":
    command(__doc__ or "", run)
