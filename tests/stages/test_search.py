from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.data.histories import user_bucket
from pipeline.data.lists import Lists
from pipeline.errors import InfrastructureError, InputError, MismatchError
from pipeline.io.histories import bucket_claims, read_bucket, read_item_ids, read_items, write_bucket
from pipeline.io.publication.units import finished_units, units_of
from pipeline.native.loader import Kernels
from pipeline.retrieval import backends
from pipeline.retrieval.backends import describe_backend
from pipeline.retrieval.search import QUERIES_AT_ONCE
from pipeline.settings import SearchSettings
from pipeline.stages.candidates import CandidateSink
from pipeline.stages.embed import embed_corpora
from pipeline.stages.encode import encode_queries, encode_sequences
from pipeline.stages.lists import search_units
from pipeline.stages.queries import TonightsUsers, group_by_bucket
from pipeline.stages.search import Wave, plan_waves
from tests.stages.worlds import (
    RecordingRunner,
    World,
    make_world,
    model_of,
    read_table,
    replace_items,
    retrieve,
    search_of,
    write_histories,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def expected(world: World) -> pa.Table:
    return retrieve(world)


def test_exact_search_equals_brute_force_in_float64(world: World, expected: pa.Table):
    model = model_of(world)
    items = model.item_side(torch.arange(model.num_items))
    mol = model.mol.double()
    components, gate = items.components_NXD.double(), items.gate_NP.double()
    lists = []
    for unit in range(world.settings.output.num_buckets):
        bucket = read_bucket(world.storage, world.night.histories, unit)
        queries = encode_sequences(model_of(world), bucket.cut("whole"), bucket.user_keys)
        scores = mol(
            type(queries)(queries.components_BQD.double(), queries.gate_BP.double()), type(items)(components, gate)
        )
        for query, user in enumerate(bucket.user_ids.to_pylist()):
            seen = bucket.item_rows[bucket.offsets[query] : bucket.offsets[query + 1]]
            scores[query, torch.from_numpy(np.unique(seen)).long()] = -torch.inf
            rows = sorted(range(model.num_items), key=lambda r: (-float(scores[query, r]), r))[:10]
            lists += [(user, rank, f"i{row:06d}", float(scores[query, row])) for rank, row in enumerate(rows, 1)]
    lists.sort()
    table = expected.to_pydict()
    assert list(zip(table["user_id"], table["rank"], table["item_id"], strict=True)) == [entry[:3] for entry in lists]
    np.testing.assert_allclose(table["score"], [entry[3] for entry in lists], rtol=1e-6)


@pytest.mark.parametrize("num_shards", [1, 2, 7])
def test_exact_lists_do_not_depend_on_shards(world, expected, num_shards):
    assert retrieve(world.with_settings(f"corpus.num_shards={num_shards}")).equals(expected)


@pytest.mark.parametrize("stages_per_wave", [1, 2, 3])
def test_exact_lists_do_not_depend_on_waves(world, expected, stages_per_wave):
    other = world.with_settings("corpus.num_shards=5", f"output.surface=w{stages_per_wave}")
    runner = RecordingRunner(other.settings, shards_at_once=stages_per_wave)
    lists = retrieve(other, runner)
    assert lists.drop_columns("surface").equals(expected.drop_columns("surface"))
    searches = [stages for stages, _ in runner.ran if stages.startswith("QueryEncoder")]
    assert len(searches) == -(-5 // stages_per_wave)
    assert [s.endswith("+Writer") for s in searches] == [False] * (len(searches) - 1) + [True]
    assert not other.storage.list(f"{other.night.run.prefix}/_wave")


def test_lists_do_not_depend_on_the_number_of_buckets(tmp_path: Path, expected: pa.Table):
    other = make_world(tmp_path, overrides=["output.num_buckets=11"])
    assert retrieve(other).equals(expected)


def test_preselecting_everything_is_exact(world, expected):
    other = world.with_settings("search.method=topk_avg", "search.num_preselected=120")
    assert retrieve(other).equals(expected)


def test_a_shard_without_items_is_skipped(tmp_path: Path):
    world = make_world(tmp_path, num_users=5, num_items=4, overrides=["search.k=2", "corpus.num_shards=9"])
    more = world.with_settings("corpus.num_shards=1")
    assert retrieve(world).equals(retrieve(more))


def test_an_interrupted_search_takes_up_what_was_set_aside(tmp_path: Path, expected: pa.Table):
    world = make_world(tmp_path, overrides=["output.num_buckets=3"])
    runner = RecordingRunner(world.settings, shards_at_once=1)
    embed_corpora(runner, world.night, world.settings)

    class FailingSink(CandidateSink):
        def write(self, unit, batch, result):
            raise OSError("the store is gone")

    search = search_of(world)
    with pytest.raises(OSError, match="the store is gone"):
        search_units(runner, search, range(3), FailingSink)
    assert len(world.storage.list(search.scratch)) == 2 * 3 * 2  # two waves, three units, data and claim
    world.storage.delete(search.running_claims(2).key(1))
    runner.ran.clear()
    search_units(runner, search, range(3), CandidateSink)
    assert [units for _, units in runner.ran] == [[1], [0, 1, 2]]
    assert read_table(world, "candidates").equals(expected)
    assert not world.storage.list(search.scratch)


def test_a_unit_names_every_backend_that_searched_for_it_also_before_an_interruption(tmp_path: Path, monkeypatch):
    world = make_world(tmp_path, overrides=["output.num_buckets=1"])
    runner = RecordingRunner(world.settings, shards_at_once=1)
    embed_corpora(runner, world.night, world.settings)

    class FailingSink(CandidateSink):
        def write(self, unit, batch, result):
            raise OSError("the store is gone")

    search = search_of(world)
    monkeypatch.setattr(backends, "native_kernels", lambda: Kernels(None, reason="no kernels: no C++ compiler"))
    with pytest.raises(OSError, match="the store is gone"):
        search_units(runner, search, [0], FailingSink)
    monkeypatch.undo()
    search_units(runner, search, [0], CandidateSink)
    (sidecar,) = finished_units(world.storage, world.night.run, 1).values()
    after = str(describe_backend(SearchSettings(), "cpu"))
    assert set(sidecar.backends) == {"torch (no kernels: no C++ compiler)", after}


def lost(storage, claims):
    storage.delete(claims.key(1))


def damaged(storage, claims):
    key = f"{claims.prefix}/{claims.read(1).key}"
    data = bytearray(storage.read(key))
    data[len(data) // 2] ^= 1
    storage.delete(key)
    storage.create(key, bytes(data))


def of_other_queries(storage, claims):
    storage.delete(claims.key(1))
    storage.create(claims.key(1), storage.read(claims.key(0)))


@pytest.mark.parametrize("spoil", [lost, damaged, of_other_queries])
def test_a_running_top_k_that_cannot_be_used_is_made_again_by_the_next_run(tmp_path: Path, expected, spoil):
    world = make_world(tmp_path, overrides=["output.num_buckets=3"])
    runner = RecordingRunner(world.settings, shards_at_once=1)
    embed_corpora(runner, world.night, world.settings)

    class Spoils(CandidateSink):
        """Unit 0 is written; then what was set aside for unit 1 is spoilt."""

        def write(self, unit, batch, result):
            spoil(world.storage, search.running_claims(2))
            super().write(unit, batch, result)

    search = search_of(world)
    with pytest.raises(InfrastructureError, match=r"[Rr]un again"):
        search_units(runner, search, range(3), Spoils)
    runner.ran.clear()
    search_units(runner, search, range(3), CandidateSink)
    assert [units for _, units in runner.ran] == [[1], [0, 1, 2]]
    assert read_table(world, "candidates").equals(expected)


def test_waves_are_even():
    assert plan_waves(3, 1) == (Wave(0, 1), Wave(1, 2), Wave(2, 3))
    assert plan_waves(4, 4) == (Wave(0, 4),)
    assert plan_waves(6, 5) == (Wave(0, 3), Wave(3, 6))
    assert plan_waves(5, 2) == (Wave(0, 1), Wave(1, 3), Wave(3, 5))


def test_k_is_at_most_the_number_of_items(tmp_path: Path):
    whole = make_world(tmp_path / "whole", num_users=2, num_items=10, overrides=["corpus.num_shards=1"])
    assert 0 < retrieve(whole).num_rows < 20  # what they have seen is left out
    with pytest.raises(InputError, match=r"search\.k is 10, but the corpus has 4 items"):
        retrieve(make_world(tmp_path, num_users=2, num_items=4))


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch can use a GPU here")
@pytest.mark.parametrize("key", ["cluster.gpus_per_actor", "cluster.gpus_per_encoder"])
def test_gpus_that_pytorch_cannot_use_are_not_replaced_by_the_cpu_in_silence(tmp_path: Path, key: str):
    world = make_world(tmp_path, num_users=2)
    retrieve(world)
    with pytest.raises(InputError, match=r"0\.5 GPUs, but PyTorch can use none on"):
        retrieve(world.with_settings(f"{key}=0.5"))


def test_a_user_who_was_taken_for_a_bot_gets_the_reason_and_no_list(tmp_path: Path):
    world = make_world(tmp_path, num_users=2, num_items=40, overrides=["output.num_buckets=1"])
    bucket = read_bucket(world.storage, world.night.histories, 0)
    rest = bucket.cut("whole").take(np.array([1]))
    bot = replace(
        bucket,
        offsets=np.array([0, 0, len(rest.values)]),
        item_rows=rest.values.astype(np.int32),
        hides=bucket.hides[bucket.offsets[1] :],
        num_train=np.array([0, 1], dtype=np.int32),
        num_validation=np.zeros(2, dtype=np.int32),
        left_out=pa.array(["taken for a bot: over 9 events on a day", ""]),
        also_seen=Lists.empty(2),
    )
    world.storage.delete(bucket_claims(world.storage, world.night.histories).key(0))
    write_bucket(world.storage, world.night.histories, 0, bot)
    assert set(retrieve(world)["user_id"].to_pylist()) == {"u00001"}
    accounts = read_table(world, "users").select(["user_id", "status", "num_returned", "reason"]).to_pylist()
    assert [tuple(account.values()) for account in accounts] == [
        ("u00000", "skipped", 0, "taken for a bot: over 9 events on a day"),
        ("u00001", "ok", 10, ""),
    ]


def test_an_item_that_the_catalogue_hides_is_shown_to_nobody_and_counted(tmp_path: Path):
    world = make_world(tmp_path, num_users=30, num_items=40, overrides=["search.k=9"])
    shown = retrieve(world)
    items = read_items(world.storage, world.night.histories)
    hidden = set(items["item_id"].to_pylist()[::3])
    eligible = pa.array([item not in hidden for item in items["item_id"].to_pylist()])
    other = make_world(tmp_path / "other", num_users=30, num_items=40, overrides=["search.k=9"])
    column = items.column_names.index("is_eligible")
    replace_items(other.night, items.set_column(column, items.field(column), eligible))
    lists = retrieve(other)
    assert hidden & set(shown["item_id"].to_pylist())
    assert not hidden & set(lists["item_id"].to_pylist())
    for account in read_table(other, "users").to_pylist():
        seen = seen_by(other, account["user_id"])
        assert account["num_rule_filtered"] == len(hidden - seen)
        assert account["num_returned"] == min(9, 40 - len(hidden | seen))


def seen_by(world: World, user_id: str) -> set[str]:
    item_ids = read_item_ids(world.storage, world.night.histories).to_pylist()
    (unit,) = user_bucket(pa.array([user_id]), world.settings.output.num_buckets)
    bucket = read_bucket(world.storage, world.night.histories, int(unit))
    rows = bucket.cut("whole")[bucket.user_ids.to_pylist().index(user_id)]
    return {item_ids[row] for row in rows}


def test_a_bucket_of_more_queries_than_are_searched_at_once_gives_the_lists_of_small_buckets(tmp_path: Path):
    num_users = 2 * QUERIES_AT_ONCE + 100

    def lists_in(num_buckets: int) -> list[dict]:
        keys = [f"output.num_buckets={num_buckets}", "search.k=3", "corpus.num_shards=2"]
        world = make_world(tmp_path / str(num_buckets), num_users=num_users, num_items=40, overrides=keys)
        return retrieve(world).sort_by([("user_id", "ascending"), ("rank", "ascending")]).to_pylist()

    whole = lists_in(1)
    assert whole == lists_in(9)
    assert len({row["user_id"] for row in whole}) == num_users


def test_every_user_is_accounted_for(tmp_path: Path):
    world = make_world(tmp_path, num_users=6, num_items=12, overrides=["search.k=9", "output.num_buckets=2"])
    for info in world.storage.list(world.night.histories.prefix + "/bucket"):
        world.storage.delete(info.key)
    histories = {
        "greedy": np.arange(11),
        "none left": np.arange(12),
        "often": np.array([3, 3, 3, 5]),
        "plain": np.array([1]),
    }
    write_histories(world.night, 2, histories)
    lists = retrieve(world).to_pydict()
    users = read_table(world, "users").to_pylist()
    accounts = {u["user_id"]: (u["status"], u["num_returned"], u["num_seen_filtered"], u["reason"]) for u in users}
    assert accounts == {
        "greedy": ("short", 1, 11, "only 1 items may be shown"),
        "none left": ("short", 0, 12, "only 0 items may be shown"),
        "often": ("ok", 9, 2, ""),
        "plain": ("ok", 9, 1, ""),
    }
    assert lists["user_id"] == ["greedy"] + ["often"] * 9 + ["plain"] * 9
    assert lists["item_id"][0] == "i000011"
    assert not {"i000003", "i000005"} & set(lists["item_id"][1:10])


def test_a_list_comes_with_its_certificate(tmp_path: Path):
    """Exact search proves every list; an approximate search proves some, and no list misses more than its gap."""
    world = make_world(tmp_path, num_users=40, num_items=150)
    exact = retrieve(world).to_pylist()
    users = read_table(world, "users").to_pylist()
    assert all(user["is_proven"] and user["max_gap"] == 0 for user in users)
    unknown = world.with_settings("search.method=topk_avg", "search.num_preselected=20")
    retrieve(unknown)
    assert {(u["is_proven"], u["max_gap"]) for u in read_table(unknown, "users").to_pylist()} == {(False, None)}
    bounded = world.with_settings("search.method=topk_per_embd", "search.num_per_embd=10")
    lists = retrieve(bounded).to_pylist()
    certificates = {user["user_id"]: user for user in read_table(bounded, "users").to_pylist()}
    assert all(user["max_gap"] is not None for user in certificates.values())
    for row, true in zip(lists, exact, strict=True):
        user = certificates[row["user_id"]]
        assert (row["user_id"], row["rank"]) == (true["user_id"], true["rank"])
        assert row["score"] + user["max_gap"] >= true["score"]
        assert not user["is_proven"] or row["item_id"] == true["item_id"]


def test_nested_lists_hold_the_same_as_long_ones(world, expected):
    nested = retrieve(world.with_settings("output.layout=nested")).to_pylist()
    flat = [
        (row["user_id"], rank, item, score)
        for row in nested
        for rank, (item, score) in enumerate(zip(row["item_ids"], row["scores"], strict=True), 1)
    ]
    long = expected.to_pydict()
    assert flat == list(zip(long["user_id"], long["rank"], long["item_id"], long["score"], strict=True))


def test_a_query_table_chooses_users_and_names_those_without_history(tmp_path: Path):
    queries = tmp_path / "queries.parquet"
    ids = pa.array(["u00003", "nobody", "u00001", "u00003"]).dictionary_encode()
    pa.parquet.write_table(pa.table({"user_id": ids, "market": ["de"] * 4}), queries)
    world = make_world(tmp_path / "root", overrides=[f"queries.uri={queries}"])
    lists = retrieve(world)
    assert set(lists["user_id"].to_pylist()) == {"u00001", "u00003"}
    users = read_table(world, "users").to_pylist()
    assert [(u["user_id"], u["status"], u["reason"]) for u in users] == [
        ("nobody", "skipped", "no history"),
        ("u00001", "ok", ""),
        ("u00003", "ok", ""),
    ]


@pytest.mark.parametrize("layout", ["long", "nested"])
def test_a_user_without_a_history_gets_the_most_popular_items_that_they_have_not_seen(tmp_path: Path, layout):
    queries = tmp_path / "queries.parquet"
    pa.parquet.write_table(pa.table({"user_id": ["u00003", "nobody", "u00001", "a passer-by"]}), queries)
    overrides = [f"queries.uri={queries}", "queries.cold_users=fallback", "output.num_buckets=1", "search.k=5"]
    world = make_world(tmp_path / "root", num_items=40, overrides=[*overrides, f"output.layout={layout}"])
    items = read_items(world.storage, world.night.histories)
    is_eligible = np.arange(40) % 4 != 3
    num_events = np.minimum(np.arange(40), 30) + 2**24  # the last ten are equally popular, and more than float32 tells
    columns = {"num_events": pa.array(num_events), "is_eligible": pa.array(is_eligible)}
    for name, column in columns.items():
        items = items.set_column(items.column_names.index(name), items.schema.field(name), column)
    replace_items(world.night, items)
    passes_by_with_items(world, "a passer-by", [38, 38, 30])
    flat = retrieve(world).to_pylist()
    lists: dict[str, list] = {}
    for row in flat:
        many = layout == "nested"
        pairs = zip(row["item_ids"], row["scores"], strict=True) if many else [(row["item_id"], row["score"])]
        lists.setdefault(row["user_id"], []).extend(pairs)
    users = {user["user_id"]: user for user in read_table(world, "users").to_pylist()}
    popularity = dict(zip(items["item_id"].to_pylist(), num_events.astype(np.float32).tolist(), strict=True))
    shown = [item for row, item in enumerate(items["item_id"].to_pylist()) if is_eligible[row]]
    for user, seen in (("nobody", set()), ("a passer-by", {"i000038", "i000030"})):
        best = sorted((item for item in shown if item not in seen), key=lambda item: (-popularity[item], item))
        assert lists[user] == [(item, popularity[item]) for item in best[:5]]
        account = users[user]
        assert (account["status"], account["num_returned"]) == ("fallback", 5)
        assert (account["num_seen_filtered"], account["num_rule_filtered"]) == (len(seen), 10)
        assert account["reason"] == "no history: the most popular items"
    assert users["u00001"]["status"] == users["u00003"]["status"] == "ok"
    assert list(lists) == sorted(lists)


def passes_by_with_items(world: World, user: str, rows: list[int]) -> None:
    """Write the only bucket again with a user of whom all events were set aside."""
    bucket = read_bucket(world.storage, world.night.histories, 0)
    assert user < bucket.user_ids[0].as_py()
    with_user = replace(
        bucket,
        user_ids=pa.concat_arrays([pa.array([user]), bucket.user_ids]),
        offsets=np.concatenate([[0], bucket.offsets]),
        num_train=np.concatenate([[0], bucket.num_train]).astype(np.int32),
        num_validation=np.concatenate([[0], bucket.num_validation]).astype(np.int32),
        left_out=pa.concat_arrays([pa.array([""]), bucket.left_out]),
        also_seen=Lists.concat([Lists.of([rows]), bucket.also_seen]),
    )
    world.storage.delete(bucket_claims(world.storage, world.night.histories).key(0))
    write_bucket(world.storage, world.night.histories, 0, with_user)


@pytest.mark.parametrize(
    ("ids", "complaint"),
    [
        (pa.array([1, 2]), "user_id is int64 there, but string in the log"),
        (pa.array(["a", None]), "1 rows have no user_id"),
        (pa.array([1.5]), "'user_id' is double; an id must be"),
    ],
)
def test_an_unusable_query_table_is_refused(tmp_path: Path, ids, complaint):
    queries = tmp_path / "queries.parquet"
    pa.parquet.write_table(pa.table({"user_id": ids}), queries)
    with pytest.raises(InputError, match=complaint):
        retrieve(make_world(tmp_path / "root", overrides=[f"queries.uri={queries}"]))


def test_a_sidecar_says_what_its_unit_holds(world):
    other = world.with_settings("output.surface=counted")
    retrieve(other)
    for unit, sidecar in units_of(other.storage, other.night.run).done().items():
        users = read_bucket(other.storage, other.night.histories, unit).num_users
        assert (sidecar.users.rows, sidecar.num_candidates, sidecar.statuses) == (users, 10 * users, {"ok": users})


def test_a_source_sees_only_its_part_of_a_history(world):
    bucket = read_bucket(world.storage, world.night.histories, 0)
    batch = encode_queries(model_of(world), bucket, TonightsUsers(None, 3, part="before_test"), 0)
    lengths = np.diff(bucket.offsets)
    assert batch.reasons.to_pylist() == ["" if length > 1 else "no history" for length in lengths]
    for query, user in enumerate(batch.searched):
        low, high = bucket.offsets[user], bucket.offsets[user + 1] - 1
        seen = batch.excluded[query]
        assert seen.tolist() == sorted(set(bucket.item_rows[low:high].tolist()))


def test_a_query_that_is_not_finite_is_named_and_not_searched(world):
    model = model_of(world)
    bucket = read_bucket(world.storage, world.night.histories, 0)
    alone = int(bucket.item_rows[bucket.offsets[1] - 1])  # the last item of the first user
    model.item_embedding.weight[alone] = torch.nan
    batch = encode_queries(model, bucket, TonightsUsers(None, 3), 0)
    assert batch.reasons[0].as_py() == "the query is not a finite number"
    assert torch.isfinite(batch.queries.components_BQD).all()
    assert len(batch.searched) == len(batch.excluded) == len(batch.queries.gate_BP) < bucket.num_users


@pytest.mark.parametrize("part", ["components_BQD", "gate_BP"])
def test_one_number_that_is_not_finite_is_enough(world, monkeypatch, part):
    @torch.inference_mode()
    def spoilt(*arguments):
        queries = encode_sequences(*arguments)
        getattr(queries, part)[1].view(-1)[-1] = torch.inf
        return queries

    monkeypatch.setattr("pipeline.stages.encode.encode_sequences", spoilt)
    batch = encode_queries(
        model_of(world), read_bucket(world.storage, world.night.histories, 0), TonightsUsers(None, 3), 0
    )
    assert [place for place, why in enumerate(batch.reasons.to_pylist()) if why] == [1]
    assert batch.searched.tolist() == [0, *range(2, len(batch.reasons))]


def test_histories_of_another_catalogue_are_refused(world):
    model = model_of(world)
    model.num_items = 50
    bucket = read_bucket(world.storage, world.night.histories, 0)
    with pytest.raises(MismatchError, match="the model knows 50 items"):
        encode_queries(model, bucket, TonightsUsers(None, 3), 0)
    model.num_items = int(bucket.item_rows.max())
    with pytest.raises(MismatchError, match="train on these histories"):
        encode_queries(model, bucket, TonightsUsers(None, 3), 0)


def test_a_query_does_not_depend_on_who_else_is_encoded(world):
    model = model_of(world)
    bucket = read_bucket(world.storage, world.night.histories, 1)
    together = encode_sequences(model, bucket.cut("whole"), bucket.user_keys)
    for user in range(bucket.num_users):
        row = np.array([user])
        alone = encode_sequences(model, bucket.cut("whole").take(row), bucket.user_keys[row])
        assert torch.equal(alone.components_BQD[0], together.components_BQD[user])
        assert torch.equal(alone.gate_BP[0], together.gate_BP[user])


def test_requested_ids_are_grouped_by_their_bucket():
    ids = pa.array([f"user-{number}" for number in range(50)])
    groups = group_by_bucket(ids, 7)
    assert sorted(user for group in groups for user in group.to_pylist()) == sorted(ids.to_pylist())
    for bucket, group in enumerate(groups):
        assert set(user_bucket(group, 7).tolist()) <= {bucket}


def test_low_rank_search_finds_more_than_the_mean_component_at_equal_cost(tmp_path: Path):
    world = make_world(tmp_path, num_users=200, num_items=600, overrides=["corpus.low_rank.ranks=[32]"])
    pairs = {}
    for method in ("exact", "topk_avg", "topk_low_rank"):
        table = retrieve(world.with_settings(f"search.method={method}", "search.num_preselected=40"))
        pairs[method] = set(zip(table["user_id"].to_pylist(), table["item_id"].to_pylist(), strict=True))
    assert len(pairs["exact"]) == 2_000
    hits = {method: len(pairs_of_method & pairs["exact"]) for method, pairs_of_method in pairs.items()}
    assert hits["topk_low_rank"] > hits["topk_avg"]
    assert hits["topk_low_rank"] > 1_600, hits
