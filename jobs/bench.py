"""How fast the search is: `make bench`. Ratios against the paper's public way of searching, measured side by side.

The last line on standard output is one JSON object with the table; everything else goes to standard error. The trained
model is made once and kept in the cache, which takes minutes.
"""

import argparse
import importlib.util
import json
import logging
import sys
from pathlib import Path

from pipeline.errors import InputError


def main() -> None:
    """Measure and print."""
    options = parse()
    if importlib.util.find_spec("faiss") is None:
        sys.exit("bench: faiss is not installed; `make bench` installs it, so does pip install -e '.[bench]'")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    from jobs.studies.search.figures import Plan, measure  # here, so that --help does not wait for torch

    try:
        rows = measure(Plan(**vars(options)))
    except InputError as error:
        sys.exit(f"bench: {error}")
    print(json.dumps({"rows": rows}))  # noqa: T201


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=["books", "books-hard", "m100k", "synthetic"], default="books")
    parser.add_argument("--num-items", type=int, help="another size than the world's own")
    parser.add_argument("--k", type=int, nargs="+", default=[100, 200])
    parser.add_argument("--target", type=float, default=0.99, help="recall@k against exact search")
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 64, 128, 256], help="of the low-rank table")
    parser.add_argument("--num-sample", type=int, default=2_048, help="queries that the low-rank table is fitted on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--methods", type=Path, metavar="FOLDER", help="also compare all algorithms, and draw them there"
    )
    parser.add_argument("--cache", type=Path, help="where the trained model is kept")
    return parser.parse_args()


if __name__ == "__main__":
    main()
