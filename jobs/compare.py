"""Compare the lists of two evaluations on the users that both have: a paired test of every metric.

Give two evaluations by the `uri` that jobs/evaluate.py prints, for example those of two models of the same log and day.
Positive differences speak for the second one.
"""

import argparse
from typing import TYPE_CHECKING

from pipeline.command import MADE, Outcome, log, plain_command
from pipeline.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.evaluation.results import Metrics


RANKINGS = ("model", "mol", "popularity", "counts")  # as in `schema.EVALUATED`, without an import of pyarrow


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name in ("first", "second"):
        parser.add_argument(name, metavar=f"{name.upper()}_EVALUATION", help="<root>/evaluations/<id>")
    parser.add_argument(
        "--rankings",
        nargs=2,
        choices=RANKINGS,
        default=("model", "model"),
        metavar=("OF_FIRST", "OF_SECOND"),
        help=f"whose lists to compare, each one of {', '.join(RANKINGS)} (default: model model)",
    )


def run(first: str, second: str, rankings: tuple[str, str]) -> Outcome:
    from pipeline.evaluation.paired import common_users, differences
    from pipeline.quality.report import differences_table

    evaluations = [read(uri, ranking) for uri, ranking in zip((first, second), rankings, strict=True)]
    metrics, users = zip(*evaluations, strict=True)
    common = common_users(*users)
    k = min(each.k for each in metrics)
    cutoffs = sorted({cutoff for cutoff in metrics[0].cutoffs if cutoff in metrics[1].cutoffs}) or [k]
    found = differences((common[0], rankings[0]), (common[1], rankings[1]), k, cutoffs)
    alone = [len(of_one) - len(common[0]) for of_one in users]
    log.info(
        "%d users had to find the same items in both evaluations; %d of the first and %d of the second are left out:"
        "\n%s",
        len(common[0]),
        *alone,
        differences_table("first", "second", found),
    )
    return {
        "status": MADE,
        "first": first,
        "second": second,
        "users": len(common[0]),
        "left_out": alone,
        "differences": {name: value.model_dump() for name, value in found.items()},
    }


def read(uri: str, ranking: str) -> "tuple[Metrics, pa.Table]":
    """Read an evaluation. Raises InputError when there is none, or when it has no such ranking."""
    from pipeline.artifacts import Artifact
    from pipeline.io.evaluation import read_metrics, read_users
    from pipeline.io.storage import open_storage

    root, slash, identity = uri.rstrip("/").rpartition("/evaluations/")
    if not slash or not root or not identity or "/" in identity:
        raise InputError(f"{uri!r} is not an evaluation; give <root>/evaluations/<id>, as jobs/evaluate.py prints it")
    storage, evaluation = open_storage(root), Artifact("evaluations", identity)
    metrics = read_metrics(storage, evaluation)
    if metrics is None:
        raise InputError(f"{uri}: not there, or not finished; run jobs/evaluate.py first")
    users = read_users(storage, evaluation)
    if users[f"{ranking}_ranks"].null_count:
        raise InputError(f"{uri}: counts have no part in its scores, so `mol` is the same as `model`; compare that")
    return metrics, users


if __name__ == "__main__":
    plain_command(__doc__ or "", add_arguments, run)
