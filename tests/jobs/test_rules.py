"""Rules about what may be shown: whole nights on a log with a catalogue, a queries table and block lists, judged row by
row by DuckDB."""

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pytest
from pydantic import ValidationError

from jobs import prepare
from pipeline.config import apply_overrides
from pipeline.data.lists import Lists
from pipeline.errors import InputError
from pipeline.io.histories import read_bucket, read_item_ids
from pipeline.io.inputs import list_queries
from pipeline.io.night import Night, open_night
from pipeline.io.publication.reader import read_latest
from pipeline.settings import QueriesSettings, Settings
from pipeline.stages.night_rules import check_rules
from pipeline.stages.queries import TonightsUsers
from pipeline.stages.row_rules import RowRules
from pipeline.stages.rules import TonightsRules
from pipeline.stages.user_rules import UserRulesSource
from tests.jobs.nightly import Ended, run_job

LAST_DAY = datetime(2026, 11, 20, 12, tzinfo=UTC)
NUM_USERS, NUM_ITEMS, K = 60, 48, 10
MARKETS = ["DE", "FR", None]
KEYS = {
    "cluster.mode": "local",
    "train.num_negatives": 8,
    "train.max_epochs": 2,
    "split.method": "leave_one_out",
    "search.k": K,
    "evaluate.cutoffs": "[3]",
    "output.num_buckets": 3,
    "queries.cold_users": "fallback",
}
CONDITIONS = {
    "in_market": "ARRAY_CONTAINS(item.markets, query.market)",
    "not_own": "item.seller <> query.user_id",
    "of_age": "(NOT item.adult OR query.age >= 18) AND query.consents",
    "fresh": "item.created > CURRENT_DATE - INTERVAL 40 DAY AND item.num_events >= 1",
}


def write_lake(folder: Path) -> None:
    """A log of users who look at every fifth item, and three new users who are in the queries table alone."""
    events = [
        {
            "user_id": f"u{user:02d}",
            "item_id": f"i{(user + 5 * step) % NUM_ITEMS:02d}",
            "event_ts": LAST_DAY - timedelta(days=8 - step, minutes=user),
        }
        for user in range(NUM_USERS)
        for step in range(9)
    ]
    items = [
        {
            "item_id": f"i{item:02d}",
            "markets": [["DE"], ["DE", "FR"], ["FR", "IT"], None][item % 4],
            "seller": f"u{item:02d}" if item % 3 else None if item % 2 else "shop",
            "adult": item % 5 == 0,
            "created": date(2026, 11, 20) - timedelta(days=item),
            "category": f"c{item % 4}",
        }
        for item in range(NUM_ITEMS)
    ]
    queries = [
        {
            "user_id": f"u{user:02d}",
            "market": MARKETS[user % 2] if user % 11 else None,
            "age": 12 + user % 20,
            "consents": user % 7 != 0,
        }
        for user in range(NUM_USERS + 3)
    ]
    blocks = [{"user_id": f"u{user:02d}", "item_id": f"i{(user + 2) % NUM_ITEMS:02d}"} for user in range(0, 70, 2)]
    for name, rows in (("log", events), ("items", items), ("queries", queries), ("user_blocks", blocks)):
        pl.DataFrame(rows).write_parquet(folder / f"{name}.parquet")
    everybody = {
        "item_id": ["i04", "i08", "i09", "gone"],
        "until": [None, date(2026, 11, 20), date(2026, 11, 19), None],
    }
    pl.DataFrame(everybody).write_parquet(folder / "blocked.parquet")


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lake")
    write_lake(folder)
    return folder


def tables_of(lake: Path) -> dict[str, object]:
    return {
        "log.uri": lake / "log.parquet",
        "log.source": "default",
        "items.uri": lake / "items.parquet",
        "queries.uri": lake / "queries.parquet",
    }


def run_night(lake: Path, root: Path, **keys: object) -> Ended:
    return run_job("nightly_candidates", str(root), **(KEYS | tables_of(lake) | keys))


def with_rules(lake: Path) -> dict[str, object]:
    conditions = {f"rules.show_if.{name}": json.dumps(sql) for name, sql in CONDITIONS.items()}
    blocks = {"legal": "blocked.parquet", "reports": "user_blocks.parquet"}
    return conditions | {f"rules.block.{name}.uri": lake / file for name, file in blocks.items()}


@pytest.fixture(scope="module")
def root(lake: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("root")
    ended = run_night(lake, folder, **with_rules(lake))
    assert ended.code == 0, ended.stderr[-4_000:]
    return folder


def may_be_shown(lake: Path) -> dict[str, set[str]]:
    """The items that the rules let each user be shown, those that the user has seen among them, as DuckDB says."""
    found = duckdb.sql(f"""
        SELECT q.user_id, i.item_id FROM '{lake}/queries.parquet' q CROSS JOIN '{lake}/items.parquet' i
        WHERE list_contains(i.markets, q.market) AND i.seller <> q.user_id
          AND (NOT i.adult OR q.age >= 18) AND q.consents
          AND i.created > DATE '2026-11-20' - INTERVAL 40 DAY
          AND i.item_id IN (SELECT item_id FROM '{lake}/log.parquet')
          AND i.item_id NOT IN ('i04', 'i08')
          AND NOT EXISTS (
            SELECT 1 FROM '{lake}/user_blocks.parquet' b WHERE b.user_id = q.user_id AND b.item_id = i.item_id)
    """).fetchall()
    allowed: dict[str, set[str]] = {f"u{user:02d}": set() for user in range(NUM_USERS + 3)}
    for user, item in found:
        allowed[user].add(item)
    return allowed


def seen(lake: Path) -> dict[str, set[str]]:
    rows = pl.read_parquet(lake / "log.parquet").group_by("user_id").agg("item_id").rows()
    return {user: set(items) for user, items in rows}


def accounting(root: Path) -> dict[str, dict]:
    return {row["user_id"]: row for row in read_latest(str(root), "candidates", table="users").to_pylist()}


def lists(root: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in read_latest(str(root), "candidates").to_pylist():
        found.setdefault(row["user_id"], []).append(row["item_id"])
    return found


def test_everybody_gets_what_the_rules_let_them_be_shown_and_nothing_else(lake, root):
    allowed, histories, published, users = may_be_shown(lake), seen(lake), lists(root), accounting(root)
    assert len(users) == NUM_USERS + 3
    sizes = set()
    for user, items in allowed.items():
        fitting = items - histories.get(user, set())
        own = published.get(user, [])
        assert len(own) == min(K, len(fitting)), user
        assert set(own) <= fitting, user
        row = users[user]
        if user < f"u{NUM_USERS}":
            assert row["status"] == ("ok" if len(fitting) >= K else "short")
        else:
            assert row["status"] == "fallback"
        assert row["num_rule_filtered"] == NUM_ITEMS - len(histories.get(user, set()) | items)
        sizes.add(min(K, len(fitting)))
    assert {0, K} < sizes  # there are users who may be shown nothing, some, and more than k


def test_a_rule_only_takes_items_away(lake, root, tmp_path):
    """Exact search: what is left of the list without the rule begins the list with it."""
    ended = run_night(lake, tmp_path, **{f"rules.show_if.{name}": json.dumps(CONDITIONS[name]) for name in ["fresh"]})
    assert ended.code == 0, ended.stderr[-4_000:]
    allowed, fewer_rules = may_be_shown(lake), lists(tmp_path)
    for user, items in lists(root).items():
        if user < f"u{NUM_USERS}":
            kept = [item for item in fewer_rules[user] if item in allowed[user]]
            assert items[: len(kept)] == kept


def test_evaluation_knows_the_rules(root):
    (metrics,) = root.glob("evaluations/*/metrics-*.json")
    found = json.loads(metrics.read_text())
    assert found["queries"] == NUM_USERS
    assert found["overlap"]["mean"] == 1.0  # with brute force, which follows the same rules
    assert 0 <= found["model"]["hr@3"]["mean"] < 1


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"rules.show_if.x": "item.markt = 1"},
            "rules.show_if.x: there is no column item.markt; did you mean 'markets'?",
        ),
        ({"rules.show_if.x": "item.price >"}, "rules.show_if.x: 'item.price >' is no SQL condition"),
        ({"rules.show_if.x": "item.adult = 1.5"}, "rules.show_if.x: "),
        (
            {"rules.show_if.x": "query.market = 'DE'", "queries.uri": None},
            "there is no column query.market; known: user_id; there is no queries table: set queries.uri",
        ),
        (
            {"rules.show_if.x": "item.category < query.user_id", "rules.max_groups": 10},
            "rules.show_if compares query.user_id, which have 60 different values together",
        ),
        ({"rules.show_if.x": "item.category = 'none'"}, "no item is left that may be shown to anybody"),
        ({"rules.block.x.uri": "queries.parquet"}, "queries.parquet: no column 'item_id'"),
        (
            {"queries.uri": "doubled.parquet", "rules.show_if.x": "query.age > 1"},
            "user_id 'u01' has rows with different",
        ),
    ],
)
def test_rules_that_do_not_fit_are_refused_by_prepare(lake, tmp_path, keys, said):
    twice = pl.DataFrame({"user_id": ["u01", "u02", "u01"], "age": [20, 30, 21]})
    twice.write_parquet(lake / "doubled.parquet")
    given = KEYS | tables_of(lake) | {"root": tmp_path}
    given |= {
        key: lake / value if str(value).endswith(".parquet") else json.dumps(value) for key, value in keys.items()
    }
    settings_ = Settings.model_validate(apply_overrides({}, [f"{key}={value}" for key, value in given.items()]))
    with pytest.raises(InputError) as error:
        prepare.run(settings_, open_night(settings_))
    assert said in str(error.value)


def test_a_night_with_a_rule_that_does_not_fit_ends_with_20_before_anything_is_trained(lake, tmp_path):
    ended = run_night(lake, tmp_path, **{"rules.show_if.x": "item.markt = 1"})
    assert ended.code == 20, ended.stderr[-4_000:]
    assert "rules.show_if.x: there is no column item.markt; did you mean 'markets'?" in ended.stderr
    assert not list(tmp_path.glob("models/*"))


def test_a_name_of_a_rule_that_is_no_name_is_refused(tmp_path):
    with pytest.raises(ValidationError, match="show_if"):
        Settings(root=str(tmp_path), rules={"show_if": {"X y": "TRUE"}})


def night_of(lake: Path, root: Path, rules: dict | None = None) -> tuple[Night, Settings]:
    blocks = {
        "legal": {"uri": str(lake / "blocked.parquet")},
        "reports": {"uri": str(lake / "user_blocks.parquet")},
    }
    settings = Settings(
        root=str(root),
        log={"uri": str(lake / "log.parquet"), "source": "default"},
        items={"uri": str(lake / "items.parquet")},
        queries={"uri": str(lake / "queries.parquet")},
        split={"method": "leave_one_out"},
        output={"num_buckets": 3},
        rules={"show_if": CONDITIONS, "block": blocks} if rules is None else rules,
    )
    return open_night(settings), settings


@pytest.mark.parametrize(
    "conditions",
    [
        {},
        {"consents": "query.consents"},
        {"not_own": "item.seller <> query.user_id"},
        {"never": "FALSE OR query.age > 25"},
        {"both": "item.category <> query.market AND query.market <> item.seller"},
        {"either": "item.category = 'c1' OR ARRAY_CONTAINS(item.markets, query.market)"},
        {"unlike": "NOT ARRAY_CONTAINS(item.markets, query.market)"},
        CONDITIONS,
    ],
)
@pytest.mark.parametrize("has_blocks", [True, False])
def test_masks_and_lists_let_through_what_the_rules_say_row_by_row(lake, root, conditions, has_blocks):
    blocks = {"x": {"uri": str(lake / "user_blocks.parquet")}, "y": {"uri": str(lake / "blocked.parquet")}}
    night, settings = night_of(lake, root, {"show_if": conditions, "block": blocks if has_blocks else {}})
    check_rules(night, settings)
    tonight, by_row, source = (
        TonightsRules(night, settings),
        RowRules(night, settings),
        UserRulesSource(night, settings),
    )
    for unit in range(3):
        users = TonightsUsers.of(night, 3).select(unit, read_bucket(night.storage, night.histories, unit)).user_ids
        of_users = source(unit, users)
        assert (of_users is None) == (not has_blocks and not any("query" in sql for sql in conditions.values()))
        rules = tonight.for_queries(Lists.empty(len(users)), None, of_users)
        may_be_shown_UN = np.ones((len(users), NUM_ITEMS), dtype=bool)
        for user in range(len(users)):
            if rules.eligibility is not None:
                group = int(rules.eligibility.group_of_B[user])
                may_be_shown_UN[user] = rules.eligibility.is_eligible_GN[group].numpy()
            may_be_shown_UN[user, rules.excluded[user]] = False
        user_R, item_R = (each.ravel() for each in np.indices(may_be_shown_UN.shape))
        broken = [mask for _, mask in by_row.broken(unit, users, user_R, item_R)]
        is_broken = np.any(broken, axis=0) if broken else np.zeros(len(user_R), dtype=bool)
        assert may_be_shown_UN.ravel().tolist() == (~is_broken).tolist()
        hidden = tonight.num_not_eligible(Lists.empty(len(users)), of_users)
        assert hidden.tolist() == (~may_be_shown_UN).sum(axis=1).tolist()


def test_the_audit_finds_every_pair_that_breaks_a_rule_and_names_the_rule(lake, root):
    night, settings = night_of(lake, root)
    rules, allowed = RowRules(night, settings), may_be_shown(lake)
    items = read_item_ids(night.storage, night.histories).to_pylist()
    promises: set[str] = set()
    for unit in range(3):
        users = TonightsUsers.of(night, 3).select(unit, read_bucket(night.storage, night.histories, unit)).user_ids
        user_R, item_R = (each.ravel() for each in np.indices((len(users), len(items))))
        is_broken = np.zeros(len(user_R), dtype=bool)
        for promise, breaks in rules.broken(unit, users, user_R, item_R):
            promises |= {promise} if breaks.any() else set()
            is_broken |= breaks
        for user, item, broken in zip(user_R, item_R, is_broken, strict=True):
            assert broken == (items[item] not in allowed[users[user].as_py()])
    assert promises == {f"rules.show_if.{name} holds" for name in CONDITIONS} | {
        "rules.block.legal does not block the item",
        "rules.block.reports does not block the item",
    }


def test_masks_are_made_once_for_a_group_and_made_again_when_too_many_are_kept(lake, root, monkeypatch):
    night, settings = night_of(lake, root)
    monkeypatch.setattr("pipeline.stages.rules.KEPT_BYTES", 1)
    users = UserRulesSource(night, settings)(0, read_bucket(night.storage, night.histories, 0).user_ids)
    few, kept = TonightsRules(night, settings), TonightsRules(night, settings)
    kept._masks._max_kept = 1_000
    for _ in range(2):
        for group in range(users.groups.num_rows):
            assert few._masks.of(users.groups, group).tolist() == kept._masks.of(users.groups, group).tolist()
    assert len(few._masks._kept) == 1 < len(kept._masks._kept)


def test_a_shard_knows_the_masks_of_its_own_items(lake, root):
    night, settings = night_of(lake, root)
    users = UserRulesSource(night, settings)(1, read_bucket(night.storage, night.histories, 1).user_ids)
    whole, shard = TonightsRules(night, settings), TonightsRules(night, settings, range(10, 25))
    for group in range(users.groups.num_rows):
        expected = whole._masks.of(users.groups, group)
        expected[:10] = expected[25:] = False
        assert shard._masks.of(users.groups, group).tolist() == expected.tolist()


def test_empty_tables_block_nothing_and_know_nobody(lake, root, tmp_path):
    for name in ("user_blocks", "blocked", "queries"):
        pl.read_parquet(lake / f"{name}.parquet").clear().write_parquet(tmp_path / f"{name}.parquet")
    blocks = {name: {"uri": str(tmp_path / f"{name}.parquet")} for name in ("user_blocks", "blocked")}
    night, settings = night_of(lake, root, {"show_if": CONDITIONS, "block": blocks})
    without, fewer = night_of(lake, root, {"show_if": CONDITIONS})
    users = read_bucket(night.storage, night.histories, 0).user_ids
    masks = [TonightsRules(*each)._masks for each in ((night, settings), (without, fewer))]
    found = UserRulesSource(night, settings)(0, users)
    expected = UserRulesSource(without, fewer)(0, users)
    assert found.blocked.values.tolist() == expected.blocked.values.tolist()
    for group in range(found.groups.num_rows):
        assert masks[0].of(found.groups, group).tolist() == masks[1].of(found.groups, group).tolist()
    nobody = replace(
        night, inputs=replace(night.inputs, queries=list_queries(with_queries(settings, tmp_path), night.ds))
    )
    found = UserRulesSource(nobody, settings)(0, users)
    assert found.groups.num_rows == 1  # of users without a row: the conditions without a query alone
    assert masks[0].of(found.groups, 0).tolist() == TonightsRules(night, settings).is_eligible_N.tolist()


def with_queries(settings: Settings, folder: Path) -> Settings:
    return settings.model_copy(update={"queries": QueriesSettings(uri=str(folder / "queries.parquet"))})
