"""Rules for whole lists: nights whose lists are those that a loop over the whole ranking chooses."""

import json
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from jobs import prepare
from pipeline.config import apply_overrides
from pipeline.errors import InputError
from pipeline.io.histories import read_item_ids
from pipeline.io.night import Night
from pipeline.io.publication.reader import read_latest
from pipeline.quality.explain import explain
from pipeline.settings import Settings
from pipeline.stages.row_rules import PublishedLists
from tests.jobs.lakes import opened, run_here, tables_of, write_lake

NUM_USERS, NUM_ITEMS, K = 40, 60, 8
KEYS = {
    "cluster.mode": "local",
    "train.num_negatives": 8,
    "train.max_epochs": 2,
    "split.method": "leave_one_out",
    "search.method": "exact",
    "evaluate.cutoffs": "[3]",
    "output.num_buckets": 2,
    "queries.cold_users": "fallback",
}
RULES = {
    "rules.at_most.genres": 2,
    "rules.at_most.seller": 1,
    "rules.at_least.fresh": json.dumps({"items": 2, "of": "item.released >= CURRENT_DATE - INTERVAL 6 DAY"}),
    "rules.at_least.local": json.dumps({"items": 1, "of": "item.local"}),
}
ITEMS = [
    {
        "item_id": f"i{item:02d}",
        "genres": [[f"g{item % 7}", f"g{item % 5}"], [f"g{item % 7}"], [], None][item % 4],
        "seller": f"s{item % 9}" if item % 10 else None,
        "released": date(2026, 11, 20) - timedelta(days=item % 50),
        "local": item % 13 == 0,
    }
    for item in range(NUM_ITEMS)
]
NEED_NAMES = ("rules.at_least.fresh", "rules.at_least.local")


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lake")
    write_lake(folder, ITEMS, NUM_USERS, num_new=3, num_steps=9)
    return folder


def run_night(lake: Path, root: Path, **keys: object) -> None:
    run_here(root, **(KEYS | tables_of(lake) | keys))


def night_of(lake: Path, root: Path, **keys: object) -> tuple[Settings, Night]:
    return opened(root, **(KEYS | tables_of(lake) | {"search.k": K} | keys))


@pytest.fixture(scope="module")
def root(lake: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A night whose lists hold all that may be shown, and one with rules, of the same model."""
    folder = tmp_path_factory.mktemp("root")
    run_night(lake, folder, **{"name": "whole", "search.k": NUM_ITEMS})
    run_night(lake, folder, **RULES, **{"search.k": K})
    return folder


def rankings(root: Path, name: str) -> dict[str, list[tuple[int, float]]]:
    """The item numbers and scores of each user's list."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in read_latest(str(root), name).to_pylist():
        found.setdefault(row["user_id"], []).append((int(row["item_id"][1:]), row["score"]))
    return found


def choose(ranking: list[int]) -> tuple[list[int], list[int]]:
    """The list of a ranking under RULES, best first, and how many of its items are fresh, and local."""
    chosen: list[int] = []
    owed = {"fresh": 2, "local": 1}

    def fulfils(item: int, need: str) -> bool:
        return ITEMS[item]["released"] >= date(2026, 11, 14) if need == "fresh" else ITEMS[item]["local"]

    def is_allowed(item: int) -> bool:
        genres = set(ITEMS[item]["genres"] or [])
        same_seller = [each for each in chosen if ITEMS[each]["seller"] == ITEMS[item]["seller"]]
        return (ITEMS[item]["seller"] is None or not same_seller) and all(
            sum(genre in (ITEMS[each]["genres"] or []) for each in chosen) < 2 for genre in genres
        )

    while len(chosen) < K:
        allowed = [item for item in ranking if item not in chosen and is_allowed(item)]
        if sum(owed.values()) >= K - len(chosen):
            helping = [item for item in allowed if any(left and fulfils(item, need) for need, left in owed.items())]
            if helping:
                allowed = helping
            else:
                owed = {}
        if not allowed:
            break
        chosen.append(allowed[0])
        owed = {need: max(0, left - fulfils(allowed[0], need)) for need, left in owed.items()}
    counts = [sum(fulfils(item, need) for item in chosen) for need in ("fresh", "local")]
    return sorted(chosen, key=ranking.index), counts


def test_every_list_is_the_one_that_a_loop_over_the_whole_ranking_chooses(root):
    whole, published = rankings(root, "whole"), rankings(root, "candidates")
    users = {row["user_id"]: row for row in read_latest(str(root), "candidates", table="users").to_pylist()}
    deep = 0
    for user, ranking in whole.items():
        expected, counts = choose([item for item, _ in ranking])
        scores = dict(ranking)
        assert published[user] == [(item, scores[item]) for item in expected], user
        deep += len(expected) < K or max(scores[item] for item in expected) > ranking[2 * K][1] > min(
            scores[item] for item in expected
        )
        missing = [
            f"{count} of {least} items for {name}"
            for count, least, name in zip(counts, (2, 1), NEED_NAMES, strict=True)
            if count < least
        ]
        short = [f"only {len(expected)} items keep to the rules for lists"] * (len(expected) < K)
        said = "; ".join([*short, *missing])
        row = users[user]
        if user >= f"u{NUM_USERS}":
            assert row["status"] == "fallback"
            said = "; ".join(["no history: the most popular items", *([said] if said else [])])
        else:
            assert row["status"] == ("short" if short else "ok")
            assert row["is_proven"]
        assert row["reason"] == said
    assert deep, "some lists need more than the first round looks at"


def test_the_night_leaves_nothing_of_its_rounds(root):
    assert [path for path in root.glob("**/_wave/**/*") if path.is_file()] == []


def test_a_minimum_score_cuts_lists_and_variety_changes_them(lake, root):
    whole = rankings(root, "whole")
    middle = sorted(score for user, ranking in whole.items() if user < f"u{NUM_USERS}" for _, score in ranking[:K])
    least = round(middle[len(middle) // 2], 3)
    run_night(lake, root, **{"name": "best", "search.k": K, "rules.min_score": least})
    best = rankings(root, "best")
    users = {row["user_id"]: row for row in read_latest(str(root), "best", table="users").to_pylist()}
    for user, ranking in whole.items():
        expected = [each for each in ranking[:K] if user >= f"u{NUM_USERS}" or each[1] >= least]
        assert best.get(user, []) == expected
        reason = users[user]["reason"]
        if user < f"u{NUM_USERS}":
            assert reason == ("" if len(expected) == K else f"only {len(expected)} items keep to the rules for lists")
    run_night(lake, root, **{"name": "varied", "search.k": K, "rules.diversity": 20.0})
    varied = rankings(root, "varied")
    assert all(varied[user][0] == whole[user][0] for user in whole), "the best item is always in the list"
    assert sum(varied[user] != whole[user][:K] for user in whole) > NUM_USERS // 2


def test_the_best_of_a_user_are_looked_at_down_to_max_depth(lake, root):
    run_night(lake, root, **RULES, **{"name": "shallow", "search.k": K, "rules.max_depth": K + 1})
    users = read_latest(str(root), "shallow", table="users").to_pylist()
    reasons = [row["reason"] for row in users if "of the best 9" in row["reason"]]
    assert reasons
    assert all(row["status"] != "ok" or "for rules.at_least" in row["reason"] for row in users if row["reason"])


def test_it_is_told_why_an_item_is_not_in_a_list(lake, root):
    settings, night = night_of(lake, root, **RULES)
    whole, published = rankings(root, "whole"), rankings(root, "candidates")
    said, reasons = set(), {"at_most.genres", "at_most.seller", "at_least", "the last of the"}
    for user in list(whole)[:4]:
        listed = [item for item, _ in published[user]]
        for item, score in whole[user][:16]:
            why = str(explain(night, settings, user, f"i{item:02d}", 3).why)
            assert why.startswith("it is published") == (item in listed)
            assert item in listed or f"with a score of {score:.4f}; " in why
            said |= {words for words in reasons if words in why}
    assert said == reasons


def test_the_audit_finds_lists_that_break_each_rule(lake, root):
    """The items of one genre, the first of a seller, too few fresh ones, and a low score."""
    settings, night = night_of(lake, root, **RULES, **{"rules.min_score": 0.5})
    index = read_item_ids(night.storage, night.histories).to_pylist()
    of_genre = [item for item in range(NUM_ITEMS) if "g1" in (ITEMS[item]["genres"] or [])][:4]
    of_seller = [item for item in range(NUM_ITEMS) if ITEMS[item]["seller"] == "s2"][:4]
    lists = [of_genre, of_seller, [0, 1, 13], [0, 1, 13]]
    users = pa.table({"status": ["ok", "ok", "fallback", "ok"], "reason": ["", "", "", "x"]})
    user_R = np.repeat(np.arange(4), [len(each) for each in lists])
    item_R = np.array([index.index(f"i{item:02d}") for each in lists for item in each])
    score_R = np.where(user_R >= 2, 0.25, 1.0).astype(np.float32)
    broken = dict(PublishedLists(night, settings).broken(users, user_R, item_R, score_R))
    of_rule = {promise.partition(":")[0]: set(user_R[mask].tolist()) for promise, mask in broken.items()}
    assert 0 in of_rule["rules.at_most.genres"]
    assert 1 in of_rule["rules.at_most.seller"]
    assert of_rule["rules.min_score"] == {3}, "the score of a fallback list is no score of the model"
    for number, each in enumerate(lists):
        fresh = sum(ITEMS[item]["released"] >= date(2026, 11, 14) for item in each)
        local = any(ITEMS[item]["local"] for item in each)
        assert (number in of_rule["rules.at_least.fresh"]) == (fresh < 2)
        assert (number in of_rule["rules.at_least.local"]) == (not local)
    assert of_rule["rules.at_least.fresh"]
    assert of_rule["rules.at_least.local"]
    said = users.set_column(1, "reason", pa.array(["0 of 1 items for rules.at_least.local", "", "", ""]))
    again = dict(PublishedLists(night, settings).broken(said, user_R, item_R, score_R))
    (local,) = (mask for promise, mask in again.items() if promise.startswith("rules.at_least.local"))
    assert 0 not in user_R[local]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rules.at_most.genre=3", r"^rules\.at_most\.genre: there is no column item\.genre; did you mean 'genres'\?$"),
        ('rules.at_least.new={"items": 1, "of": "item.relesed > CURRENT_DATE"}', "there is no column item.relesed"),
        ('rules.at_least.new={"items": 1, "of": "item.local AND"}', r"rules\.at_least\.new: .* is no SQL condition"),
        ('rules.at_least.new={"items": 1, "of": "query.age > 3"}', "reads query.age; a condition of at_least is of"),
        ('rules.at_least.new={"items": 1, "of": "item.seller"}', "is a String, and not true or false"),
    ],
)
def test_rules_that_the_catalogue_does_not_fit_are_refused_before_training(lake, root, override, said):
    settings, night = night_of(lake, root, **dict([override.split("=", 1)]))
    with pytest.raises(InputError, match=said):
        prepare.run(settings, night)


def test_a_need_that_nothing_fulfils_tonight_is_said(lake, root, caplog):
    need = json.dumps({"items": 1, "of": "item.released > CURRENT_DATE"})
    settings, night = night_of(lake, root, **{"rules.at_least.new": need})
    prepare.run(settings, night)
    assert "rules.at_least.new: no item fulfils it tonight, so no list will" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["search.k=2", 'rules.at_least.new={"items": 3, "of": "item.local"}'],
            r"rules.at_least asks for 3 items together, but a list has 2 \(search.k\)",
        ),
        (["rules.min_score=1", "rules.max_depth=5"], r"rules.max_depth \(5\) must be at least search.k \(100\)"),
        (["rules.at_most.genres=0"], "greater than 0"),
    ],
)
def test_rules_that_no_list_can_keep_are_refused(overrides, said):
    with pytest.raises(ValidationError, match=said):
        Settings.model_validate(apply_overrides({}, overrides))
