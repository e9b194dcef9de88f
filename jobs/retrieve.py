"""Search the corpus for every user's top-k and write the run's candidates and accounting, unit by unit."""

from typing import TYPE_CHECKING

from pipeline.command import EXISTS, MADE, Outcome, command, on_night, open_runner

if TYPE_CHECKING:
    from pipeline.io.night import Night
    from pipeline.settings import Settings


def run(settings: "Settings", night: "Night") -> Outcome:
    from pipeline.io.publication.units import units_of
    from pipeline.io.tuning import as_chosen
    from pipeline.stages.candidates import CandidateSink
    from pipeline.stages.lists import search_units
    from pipeline.stages.queries import TonightsUsers
    from pipeline.stages.search import Search, remove_running

    num_units = settings.output.num_buckets
    missing, scratch = units_of(night.storage, night.run).missing(range(num_units)), f"{night.run.prefix}/_wave"
    if missing:
        users = TonightsUsers.of(night, num_units)
        search = Search(night, as_chosen(night, settings), users, scratch)
        search_units(open_runner(settings), search, missing, CandidateSink)
    else:
        remove_running(night.storage, scratch)  # what a crash at the very end has left
    return {
        "status": MADE if missing else EXISTS,
        "run_id": night.run.run_id,
        "uri": f"{night.storage.uri}/{night.run.prefix}",
        "units": num_units,
        "computed": len(missing),
    }


if __name__ == "__main__":
    command(__doc__ or "", on_night(run))
