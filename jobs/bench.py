"""How fast the search is: `make bench`. Ratios against the paper's public way of searching, measured side by side.

The last line on standard output is one JSON object with the table; everything else goes to standard error. The trained
model is made once and kept in the cache, which takes minutes.
"""

import argparse
import json
import logging
import platform
import sys
from pathlib import Path

import torch

from jobs.benchmarks.figures import (
    choose,
    compare,
    compare_faiss,
    filtering,
    has_amx,
    memory,
    prepare,
    scaling,
    share_of_peak,
)
from jobs.benchmarks.timing import Row
from jobs.benchmarks.worlds import load_bench_world
from pipeline.retrieval.native_library import native_library

log = logging.getLogger("nightrails")


def main() -> None:
    """Measure and print."""
    options = parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    torch.set_num_threads(options.threads)
    native_library()
    log.info("%s; %d threads; AMX: %s", processor(), options.threads, "yes" if has_amx() else "no, half of each ratio")
    world = load_bench_world(options.world, options.num_items, options.cache)
    log.info("%s: %d items, %s", options.world, len(world.item_rows_NE), world.mol.settings)
    prepared = prepare(world, options.rank, options.num_sample)
    log.info(
        "low rank %d: fitted in %.1f s (recall %.3f), table in %.1f s",
        options.rank, prepared.fit_seconds, prepared.fit_recall, prepared.table_seconds,
    )  # fmt: skip
    rows: list[Row] = []
    for k in options.k:
        rows += compare(prepared, k, options.target, options.rounds)
    _, best = choose(prepared, prepared.native, options.k[0], options.target, 64)
    rows.append(compare_faiss(prepared, options.threads, options.rounds))
    rows.append(share_of_peak(prepared, options.rounds))
    rows.append(scaling(prepared, best, options.threads, options.rounds))
    rows.append(filtering(prepared, best, options.rounds))
    rows.append(memory(prepared))
    for each in rows:
        log.info("%-58s %10.3f  must %-10s proud %-10s %s", each["figure"], each["value"], each["must"], each["proud"],
                 "holds" if each["holds"] else "DOES NOT HOLD")  # fmt: skip
    print(json.dumps({"rows": rows}))  # noqa: T201


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=["books", "m100k", "synthetic"], default="books")
    parser.add_argument("--num-items", type=int, help="another size than the world's own")
    parser.add_argument("--k", type=int, nargs="+", default=[100, 200])
    parser.add_argument("--target", type=float, default=0.99, help="recall@k against exact search")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--num-sample", type=int, default=2_048, help="queries that the low-rank table is fitted on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache", type=Path, help="where the trained model is kept")
    return parser.parse_args()


def processor() -> str:
    """What the machine calls its CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


if __name__ == "__main__":
    main()
