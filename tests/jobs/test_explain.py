"""Explaining a user's list and the absence of an item, after whole nights with rules, in words and as JSON."""

import re
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import load_config
from pipeline.data.lists import Lists
from pipeline.errors import InputError
from pipeline.io.night import open_night
from pipeline.io.publication.reader import read_latest
from pipeline.quality.exact_list import ExactList
from pipeline.quality.explain import _why, explain
from pipeline.quality.explanation import Explanation
from pipeline.retrieval.list_rules import ListRules, Need, Quota
from pipeline.settings import Settings
from tests.jobs.nightly import TINY, Ended, run_job
from tests.jobs.test_rules import (
    CONDITIONS,
    KEYS,
    NUM_ITEMS,
    accounting,
    lake,
    lists,
    may_be_shown,
    root,
    seen,
    tables_of,
    with_rules,
)

__all__ = ["lake", "root"]  # fixtures
GENRES = Lists.of([[0], [], [], [], [1], [], [], [1], [], []])  # 4 and 7 have the same
FIRST = np.arange(10) == 0


def ask(lake: Path, root: Path, user: str, item: str | None = None) -> Ended:
    command = ["--user", user] + ([] if item is None else ["--item", item])
    keys = KEYS | tables_of(lake) | with_rules(lake)
    return run_job("explain", str(root), arguments=command, **keys)


def explained(lake: Path, root: Path, user: str, item: str | None = None) -> Explanation:
    """The same in this process, which takes a tenth of the time."""
    keys = TINY | KEYS | tables_of(lake) | with_rules(lake) | {"root": root}
    settings = load_config(Settings, Path("conf/nightly.yaml"), [f"{key}={value}" for key, value in keys.items()])
    return explain(open_night(settings), settings, user, item, 10)


def test_it_tells_the_history_the_filters_and_the_list_that_was_published(lake, root):
    allowed, histories, published = may_be_shown(lake), seen(lake), lists(root)
    user = next(user for user, items in published.items() if len(items) == 10 and user < "u60")
    ended = ask(lake, root, user)
    assert ended.code == 0, ended.stderr[-4_000:]
    found = ended.last_line
    assert (found["status"], found["user_id"], found["user_status"], found["num_events"]) == ("made", user, "ok", 9)
    assert {event["item"].partition(" ")[0] for event in found["last_events"]} == histories[user]
    assert all(event["is_hidden"] for event in found["last_events"])
    assert found["hidden"]["seen by the user"] == len(histories[user])
    assert set(found["hidden"]) == {
        "seen by the user",
        "hidden by the catalogue",
        *(f"rules.show_if.{name}" for name in CONDITIONS),
        "rules.block.legal",
        "rules.block.reports",
    }
    assert found["num_shown"] == len(allowed[user] - histories[user])
    assert [each["item_id"] for each in found["best"]] == published[user]
    assert [each["published_rank"] for each in found["best"]] == list(range(1, 11))
    assert (found["num_published"], found["num_common"]) == (10, 10)
    rows = read_latest(str(root), "candidates").to_pylist()
    scores = [row["score"] for row in rows if row["user_id"] == user]
    assert [each["score"] for each in found["best"]] == pytest.approx(scores, abs=1e-6)
    for each in found["best"]:
        assert each["pairs"]
        assert 0 < sum(weight for _, weight, _ in each["pairs"]) <= 1 + 1e-5
        mixed = sum(weight * logit for _, weight, logit in each["pairs"])
        assert abs(mixed) < 50
    assert f"of {NUM_ITEMS} items {found['num_shown']} may be shown" in ended.stderr


def test_it_says_what_became_of_an_item(lake, root):
    allowed, histories, published = may_be_shown(lake), seen(lake), lists(root)
    user = next(user for user, items in published.items() if len(items) == 10 and user < "u60")
    item = sorted(histories[user])[0]
    assert str(explained(lake, root, user, item).why).startswith("it is seen by the user")
    assert explained(lake, root, user, published[user][2]).why == "it is published, at rank 3"
    assert "hidden by rules.block.legal" in str(explained(lake, root, user, "i04").why)
    left = sorted(allowed[user] - histories[user] - {*published[user]})
    for item in left[:1]:
        assert "by exact search it has rank" in str(explained(lake, root, user, item).why)


def test_a_user_without_a_history_and_one_who_may_be_shown_nothing_are_explained(lake, root):
    users = accounting(root)
    cold = explained(lake, root, "u61")
    assert cold.user_status == users["u61"]["status"] == "fallback"
    assert (cold.num_events, cold.best) == (0, ())
    nothing = next(user for user, row in users.items() if row["num_returned"] == 0 and user < "u60")
    found = explained(lake, root, nothing, "i10")
    assert (found.num_shown, found.num_published) == (0, 0)
    assert "rules.show_if." in str(found.why)


@pytest.mark.parametrize(
    ("user", "item", "said"),
    [
        ("nobody", None, "user 'nobody': neither a history nor a row of the accounting has this id on 2026-11-20"),
        ("u01", "no such", "item 'no such': not in the catalogue of this night, which has 48 items"),
    ],
)
def test_an_unknown_user_or_item_is_said_to_be_unknown(lake, root, user, item, said):
    with pytest.raises(InputError) as error:
        explained(lake, root, user, item)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("row", "account", "published", "said"),
    [
        (4, {"status": "ok"}, [7, 4, 9], "it is published, at rank 2"),
        (5, {"status": "ok"}, [7, 4, 9], "it is seen by the user and hidden by rules.block.legal"),
        (
            3,
            {"status": "ok"},
            [7, 4, 9],
            "rank 4 of 5, with a score of 1.0000; the last of the 3 that are shown has 2",
        ),
        (
            9,
            {"status": "ok"},
            [7, 4, 2],
            "has rank 3 of 5, with a score of 2.0000, among the 3 that are shown: the app",
        ),
        (9, None, [], "among the 3 that are shown: there is no list of the user yet"),
        (6, {"status": "error", "reason": "not finite"}, [], "the user has no query: not finite"),
    ],
)
def test_what_became_of_an_item_is_one_sentence(row, account, published, said):
    mask = np.zeros(10, dtype=bool)
    seen_N, blocked_N = mask.copy(), mask.copy()
    seen_N[5] = blocked_N[5] = True
    filters = {"seen by the user": seen_N, "hidden by the catalogue": mask, "rules.block.legal": blocked_N}
    rows = np.array([7, 4, 9, 3, 0])
    if account and account["status"] == "error":
        rows = rows[:0]
    scores = np.array([4, 3, 2, 1, 0], dtype=np.float32)
    exact = ExactList(rows, scores, rows[:3], ListRules(), len(rows))
    assert said in _why(row, filters, exact, np.array(published, dtype=np.int64), account)


@pytest.mark.parametrize(
    ("rules", "listed", "row", "said"),
    [
        ({"quotas": (Quota("rules.at_most.genre", 1, GENRES),)}, [7, 9], 4, r"has 1 items .* \(rules.at_most.genre\)$"),
        ({"min_score": 1.5}, [7, 4, 9], 3, "rules.min_score is 1.5"),
        ({"needs": (Need("rules.at_least.new", 1, FIRST),)}, [7, 0], 4, r"went to others \(rules.at_least.new\)$"),
        ({"diversity": 1.0}, [7, 0], 4, r"went to others \(rules.diversity\)$"),
        ({"needs": (Need("rules.at_least.new", 1, FIRST),)}, [7, 4], 0, "the list is chosen from the best 4"),
        ({"diversity": 1.0}, [7, 4], 9, "the last of the 2 that are shown has 3.0000"),
    ],
)
def test_why_an_item_is_not_in_a_list_under_rules(rules, listed, row, said):
    rows, scores = np.array([7, 4, 9, 3, 0]), np.array([4, 3, 2, 1, 0], dtype=np.float32)
    exact = ExactList(rows, scores, np.array(listed), ListRules(**rules), 4)
    assert re.search(said, exact.why_not(row, rows.tolist().index(row)))
