"""Simulate an interaction log and its catalogue below the root, to try the other jobs on.

Users and items have hidden tastes that drift; there are repeated, late and unknown events, bots, and cold users and
items. The same `simulate` settings give the same bytes.
"""

from datetime import date
from typing import TYPE_CHECKING

from pipeline.command import EXISTS, MADE, Outcome, command

if TYPE_CHECKING:
    from pipeline.settings import Settings


def run(settings: "Settings", ds: date | None) -> Outcome:
    """Write the log that `settings.simulate` describes. `ds` is not used: the log has all days."""
    from pipeline.data.simulation.log import simulated_prefix
    from pipeline.io.simulated import write_simulated_log
    from pipeline.io.storage import open_storage

    storage = open_storage(settings.root)
    manifest, existed = write_simulated_log(storage, settings.simulate)
    return {
        "status": EXISTS if existed else MADE,
        "uri": f"{storage.uri}/{simulated_prefix(settings.simulate)}",
        **manifest.counts,
    }


if __name__ == "__main__":
    command(__doc__ or "", run)
