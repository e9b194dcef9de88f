"""Draw recipes of logs: the choices are independent of each other where they can be."""

from datetime import date
from random import Random

from tests.stages.generated_logs import FAULTS, ONLY_TEXT, Recipe
from tests.stages.generated_times import CSV_TIMES, PARQUET_TIMES

LAST_DAYS = (
    date(2024, 11, 8),
    date(2024, 3, 14),
    date(2024, 2, 29),
)  # after New York changed its clocks, and a leap day


def draw(seed: int) -> Recipe:
    """Draw a recipe; half of the logs have no fault in their files."""
    rng = Random(seed)
    is_csv = rng.random() < 0.5
    ids = rng.choice(("text", "number", "big", "hostile") if is_csv else ("text", "number", "big", "uuid", "hostile"))
    kinds = rng.choice(("none", "column", "error", "ignore", "weight"))
    seen_types = (
        (None, None, None, [], ["view"], ["view", "cart"]) if kinds in ("error", "ignore", "weight") else (None, [])
    )
    recipe: Recipe = {
        "seed": seed,
        "format": "csv" if is_csv else "parquet",
        "ids": ids,
        "declared": rng.choice(("as_is", "string", "int64")) if ids in ("number", "big") else "as_is",
        "layout": rng.choice(("file", "files", "files", "days", "days", "hive", "hive days")),
        "time": rng.choice(CSV_TIMES if is_csv else PARQUET_TIMES),
        "zone": rng.choice(("UTC", "America/New_York", "Asia/Kolkata", "Europe/Berlin")),
        "log_zone": rng.choice(("UTC", "UTC", "America/New_York", "Asia/Tokyo")),
        "last_day": rng.choice(LAST_DAYS).isoformat(),
        "ds": rng.choice(("last", "last", "day before", "newest")),
        "kinds": kinds,
        "has_deliveries": rng.random() < 0.5,
        "value": rng.choice((None, None, "number", "text")),
        "lookback": rng.choice((None, None, 2, 3)),
        "seen_lookback": rng.choice((None, None, None, 1, 3)),
        "seen_types": rng.choice(seen_types),
        "bad_share": rng.choice((0.01, 0.2, 0.9, 0.9)),
        "null_words": rng.choice((None, None, [], ["nan", "None", "\\N", "NULL"])),
        "most_per_day": rng.choice((2_000, 2_000, 7)),
        "catalogue": rng.choice((None, None, "all", "lacks some")),
        "orphan_share": rng.choice((0.05, 0.9, 0.9, 0.9)),
        "rows_per_task": rng.choice((15, 1_000_000)),
        "buckets": rng.choice((1, 1, 2)),
        "markers": rng.random() < 0.3,
        "faults": sorted(
            rng.sample(sorted(FAULTS if is_csv else FAULTS.keys() - ONLY_TEXT), rng.choice((0, 0, 1, 2, 3)))
        ),
    }
    recipe |= _text_choices(rng, recipe) if is_csv else _parquet_choices(rng, recipe)
    if "stray quotes" in recipe["faults"]:
        plain = "text" if ids == "hostile" else ids
        recipe |= {"layout": "file", "quoting": "minimal", "note": "plain", "ids": plain}
        recipe["delimiter"] = rng.choice(("\t", ";"))  # no value needs quotes of its own
    return recipe


def _text_choices(rng: Random, recipe: Recipe) -> Recipe:
    quoting = "all" if recipe["ids"] == "hostile" else rng.choice(("minimal", "all", "never", "single"))
    # without quotes no value may have the delimiter, and some times have a comma
    delimiter = rng.choice((",", ",", "\t", ";", "|") if quoting != "never" else ("\t", ";", "::", "¦", "\x01"))
    has_header = rng.random() < 0.7
    return {
        "delimiter": delimiter,
        "quoting": quoting,
        "end": rng.choice(("\n", "\n", "\r\n", "\r")),
        "encoding": rng.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "latin-1", "cp1252"))
        if recipe["ids"] != "hostile"
        else rng.choice(("utf-8", "utf-8-sig", "utf-16")),
        "compression": rng.choice((None, None, None, "gzip", "bz2", "xz", "zstd", "lz4")),
        "suffix": rng.choice((".csv", ".gz", "", ".txt")),
        "has_header": has_header,
        "head": rng.choice(("none", "none", "skip", "comment", "blank")),
        "blank_lines": rng.random() < 0.2,
        "trailing": rng.random() < 0.15 and (has_header or "malformed" not in recipe["faults"]),
        "note": rng.choice((None, "plain", "lines", "latin", *(["escaped"] if quoting in ("minimal", "all") else []))),
    }


def _parquet_choices(rng: Random, recipe: Recipe) -> Recipe:
    text = ("string", "large_string", "string_view", "dictionary", "binary", "large_binary", "binary_view", "mixed")
    number = ("int64", "int32", "int16", "uint32", "uint64", "uint8", "int8", "dictionary of int64", "mixed numbers")
    # without a declaration a decimal is refused, and text stays text
    number = number if recipe["ids"] == "number" else ("int64", "dictionary of int64")
    number = number if recipe["declared"] == "as_is" else (*number, "decimal", "digits")
    kinds = {"number": number, "big": number, "uuid": ("uuid", "string")}.get(recipe["ids"], text)
    return {
        "user_as": rng.choice(kinds),
        "item_as": rng.choice(kinds),
        "kind_as": rng.choice(("string", "large_string", "dictionary", "binary", "string_view")),
        "delivery_as": rng.choice(("string", "dictionary", "binary_view", "string_view")),
        "group": rng.choice((12, 1_000)),
        "page_version": rng.choice(("1.0", "2.0")),
        "codec": rng.choice(("snappy", "zstd", "gzip", "none")),
        "note": rng.choice((None, "nested", "json", "doubled", "null")),
        "mixed_times": rng.random() < 0.3,
        "empty_file": rng.random() < 0.2,
    }
