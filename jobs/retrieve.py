"""Search the corpus for every user's top-k and write the run's candidates and accounting, unit by unit."""

from datetime import date

from pipeline.command import Outcome, command
from pipeline.settings import Settings


def run(settings: Settings, ds: date | None) -> Outcome:
    from pipeline.distributed.search import search_units
    from pipeline.io.night import open_night
    from pipeline.io.publication.units import done_units
    from pipeline.io.tuning import tuned
    from pipeline.stages.candidates import CandidateSink
    from pipeline.stages.queries import TonightsUsers

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
