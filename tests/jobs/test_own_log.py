"""The README's own source on a log of its form: a whole night, with everything that a real file brings."""

import gzip
import json
import random
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

from pipeline.io.publication.reader import read_latest
from tests.jobs.nightly import REPOSITORY, run_job

BERLIN = ZoneInfo("Europe/Berlin")
LAST_DAY = datetime(2026, 3, 20, tzinfo=UTC)  # clocks in Berlin go forward nine days later
ITEMS = [f"{number:04d}" for number in range(30)]  # as text: the zeros must stay
KEYS = {
    "cluster.mode": "local",
    "log.source": "shop",
    "log.time_zone": "Europe/Berlin",
    "log.max_age_days": 10**6,
    "prepare.lookback_days": 12,
    "prepare.seen_lookback_days": 300,
    "prepare.max_bad_share": 0.05,
    "prepare.max_duplicate_share": 0.2,
    "items.max_gigabytes": 1,
    "train.num_negatives": 8,
    "search.k": 10,
    "evaluate.cutoffs": "[10]",
    "output.num_buckets": 2,
}


def source_of_the_readme() -> str:
    block = re.search(
        r"```yaml\n(# conf/sources/shop\.yaml\n.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL
    )
    assert block
    return block[1]


def line(customer: str, article: str, moment: datetime, receipt: str) -> str:
    local = moment.astimezone(BERLIN).strftime("%d.%m.%Y %H:%M")
    return f'{customer};{article};{local};{receipt};"two lines;\nof text"\n'


def write_log(folder: Path) -> dict[str, set[str]]:
    """Write the log in two files; returns all articles of each customer, also of rows that are set aside."""
    draw = random.Random(5)
    lines = []
    has: dict[str, set[str]] = {}

    def add(customer: str, article: str, moment: datetime, receipt: str = "") -> None:
        lines.append(line(customer, article, moment, receipt))
        has.setdefault(customer, set()).add(article)

    for number in range(60):
        customer = f"{number:03d}"
        for event in range(12):
            moment = LAST_DAY - timedelta(days=draw.randrange(10), minutes=draw.randrange(1_000), seconds=60 * event)
            add(customer, draw.choice(ITEMS[:24]), moment, f"r{number}-{event}")
            if event == 0:
                lines.append(lines[-1])  # delivered again
        add(customer, draw.choice(ITEMS), LAST_DAY + timedelta(hours=10))
        add(customer, ITEMS[24], LAST_DAY - timedelta(days=100))  # too old to learn from
        lines.append(line(customer, ITEMS[26], LAST_DAY - timedelta(days=400), "ancient"))  # may be shown again
    add("001", ITEMS[25], LAST_DAY + timedelta(days=9_000))  # a wrong clock
    lines.append(line("guest", ITEMS[0], LAST_DAY, "g1") * 20)
    lines.append("not;a row\n")
    for name, half in (("a.csv", lines[::2]), ("b.csv.gz", lines[1::2])):
        text = "exported by the shop\ncustomer;article;sold_at;receipt;note\n" + "".join(half)
        data = text.encode()
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return has


def test_the_readmes_source_reads_a_log_of_its_form_into_a_true_table(tmp_path):
    (tmp_path / "conf" / "sources").mkdir(parents=True)
    (tmp_path / "conf" / "sources" / "shop.yaml").write_text(source_of_the_readme())
    (tmp_path / "lake").mkdir()
    has = write_log(tmp_path / "lake")
    root = tmp_path / "root"
    ended = run_job("nightly_candidates", str(root), folder=tmp_path, **KEYS | {"log.uri": tmp_path / "lake"})
    assert ended.code == 0, ended.stderr[-4_000:]
    assert ended.last_line["ds"] == "2026-03-20"
    (validation,) = root.glob("histories/*/validation-*.json")
    numbers = json.loads(validation.read_text())
    assert numbers["rows"]["nobody"] == 20
    assert numbers["rows"]["duplicates"] == 60
    assert (numbers["rows"]["out_of_lookback"], numbers["rows"]["after_ds"]) == (120, 1)
    assert numbers["quarantined"] == {"row_malformed": 1}
    assert numbers["users"] == 60
    for said in ("20 of ", "of nobody (null_words)", "older than prepare.lookback_days; they still count as seen"):
        assert said in ended.stderr
    shown: dict[str, set[str]] = {}
    for row in read_latest(str(root), "candidates").to_pylist():
        shown.setdefault(row["user_id"], set()).add(row["item_id"])
    assert shown.keys() == has.keys()
    for customer, items in shown.items():
        assert not items & has[customer], f"{customer} has {items & has[customer]}"
        assert items <= set(ITEMS)


def test_a_log_that_is_late_ends_the_night_with_20_and_is_not_already_published(tmp_path):
    (tmp_path / "conf" / "sources").mkdir(parents=True)
    (tmp_path / "conf" / "sources" / "shop.yaml").write_text(source_of_the_readme())
    (tmp_path / "lake").mkdir()
    write_log(tmp_path / "lake")
    keys = KEYS | {"log.uri": tmp_path / "lake", "log.max_age_days": 1}
    ended = run_job("nightly_candidates", str(tmp_path / "root"), folder=tmp_path, **keys)
    assert ended.code == 20
    assert "its newest day is 2026-03-20" in ended.last_line["error"]
    assert "log.max_age_days is 1" in ended.last_line["error"]
