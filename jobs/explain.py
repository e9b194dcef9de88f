"""Explain why a user was shown their list, and with --item what became of an item: from the artifacts of a night.

Says which events were read, how many items each filter hides, the best items of exact search with the parts of their
scores, and how many of them the published list has. Needs no cluster; reads one bucket and the corpus.
"""

import argparse
from dataclasses import asdict
from datetime import date
from typing import TYPE_CHECKING

from pipeline.command import MADE, Outcome, command, log

if TYPE_CHECKING:
    from pipeline.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--user", required=True, metavar="ID", help="the user, by the id of the log")
    parser.add_argument("--item", default=None, metavar="ID", help="an item whose absence or place is to be explained")
    parser.add_argument("--best", type=int, default=10, metavar="N", help="items of the list to explain (default: 10)")


def run(settings: "Settings", ds: date | None, user: str, item: str | None, best: int) -> Outcome:
    from pipeline.io.night import open_night
    from pipeline.quality.explain import explain
    from pipeline.quality.explanation import explanation_text

    explanation = explain(open_night(settings, ds), settings, user, item, best)
    log.info("\n%s", explanation_text(explanation))
    return {"status": MADE, **asdict(explanation)}


if __name__ == "__main__":
    command(__doc__ or "", run, add_arguments)
