import pytest
import torch

from pipeline.errors import InputError, MismatchError
from pipeline.io.checkpoint import write_checkpoint
from pipeline.io.corpus import open_corpus, read_low_rank, read_shard, shard_claims, shard_entries
from pipeline.io.histories import read_items
from pipeline.model.model import RetrievalModel
from pipeline.model.results import training_metrics
from pipeline.retrieval import shard
from pipeline.stages.embed import ShardEmbedder, embed_corpora, embed_items
from pipeline.stages.local import LocalRunner
from pipeline.stages.low_rank import sample_queries
from tests.model.planted import report
from tests.stages.worlds import RecordingRunner, World, make_world, model_of, replace_items


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), num_items=130)


@pytest.fixture(autouse=True)
def _tiles(monkeypatch):
    monkeypatch.setattr(shard, "ITEM_TILE", 16)


@pytest.mark.parametrize("num_shards", [1, 2, 7, 200])
def test_shards_hold_every_item_once_whatever_their_number(world, num_shards):
    other = world.with_settings(f"corpus.num_shards={num_shards}")
    manifest = embed_corpora(LocalRunner(other.settings), other.night, other.settings)
    assert len(manifest.files) == num_shards
    assert manifest.counts["num_items"] == 130
    shards = [read_shard(other.storage, other.night.corpus, entry) for entry in manifest.files]
    assert [part.first_row for part in shards] == [s * 130 // num_shards for s in range(num_shards)]
    whole = embed_items(model_of(world), 0, 130)
    for name in ("components_NXD", "gate_NP"):
        joined = torch.cat([getattr(part.items, name) for part in shards])
        assert torch.equal(joined, getattr(whole.items, name))  # to the last bit
    assert torch.equal(torch.cat([part.mean_ND for part in shards]), whole.mean_ND)


def test_items_are_embedded_as_the_model_does(world):
    model = model_of(world)
    expected = model.item_side(torch.arange(40, 73))
    embedded = embed_items(model, 40, 73)
    torch.testing.assert_close(embedded.items.components_NXD, expected.components_NXD)
    torch.testing.assert_close(embedded.items.gate_NP, expected.gate_NP)
    torch.testing.assert_close(embedded.mean_ND, expected.mean_ND)


def test_a_rerun_embeds_only_what_is_missing(tmp_path):
    world = make_world(tmp_path, overrides=["corpus.num_shards=4"])
    runner = RecordingRunner(world.settings)
    manifest = embed_corpora(runner, world.night, world.settings)
    prefix = world.night.corpus.prefix
    for key in ("manifest.json", "shard-00001.json", manifest.files[2].key):
        world.storage.delete(f"{prefix}/{key}")
    assert sorted(shard_claims(world.storage, world.night.corpus).done()) == [0, 3]
    runner.ran.clear()
    again = embed_corpora(runner, world.night, world.settings)
    assert [units for _, units in runner.ran] == [[1, 2]]
    assert again.files == manifest.files
    runner.ran.clear()
    assert embed_corpora(runner, world.night, world.settings) == again
    assert not runner.ran


def test_the_corpora_of_both_models_are_made_in_one_chain(tmp_path):
    world = make_world(tmp_path, overrides=["train.refit=0.5", "corpus.num_shards=4"])
    metrics = training_metrics([report(1, 0.1)], 0.1, world.settings.train)
    write_checkpoint(world.night.measurement, RetrievalModel(world.settings.model, 120), world.settings, metrics)
    runner, nights = RecordingRunner(world.settings), (world.night.measurement, world.night)
    serving = embed_corpora(runner, world.night, world.settings)
    assert runner.ran == [("ShardEmbedder", [0, 1, 2, 3])]
    measured, again = (open_corpus(world.storage, night.corpus) for night in nights)
    assert again == serving != measured
    # Killed with one shard of each missing, it makes the two in both, of which the first attempts stand.
    for night, shard_number in zip(nights, (1, 3), strict=True):
        for key in ("manifest.json", f"shard-{shard_number:05d}.json"):
            world.storage.delete(night.corpus.key(key))
    runner.ran.clear()
    assert embed_corpora(runner, world.night, world.settings).files == serving.files
    assert runner.ran == [("ShardEmbedder", [1, 3])]
    assert open_corpus(world.storage, world.night.measured_corpus).files == measured.files


def test_an_item_that_is_not_finite_stops_the_embedding_by_name(tmp_path, monkeypatch):
    world = make_world(tmp_path, num_items=50)
    runner = LocalRunner(world.settings)

    def broken(storage, checkpoint):
        model = model_of(world)
        model.item_embedding.weight[33] = torch.nan
        return model

    monkeypatch.setattr("pipeline.stages.embed.load_model", broken)
    with pytest.raises(InputError, match="item 'i000033'"):
        embed_corpora(runner, world.night, world.settings)
    with pytest.raises(InputError, match=r"not there; run jobs/embed_items\.py first"):
        open_corpus(world.storage, world.night.corpus)


def test_a_model_of_another_catalogue_is_refused(tmp_path):
    world = make_world(tmp_path, num_items=50)
    items = read_items(world.storage, world.night.histories)
    replace_items(world.night, items.slice(1))
    with pytest.raises(MismatchError, match=r"knows 50 items, but histories .* have 49"):
        ShardEmbedder(world.night, world.settings)


def test_the_low_rank_table_is_fitted_once_and_holds_every_item(tmp_path):
    overrides = ["search.method=topk_low_rank", "corpus.low_rank.ranks=[4,8]", "corpus.low_rank.num_queries=60"]
    world = make_world(tmp_path, num_users=100, overrides=overrides)
    runner = RecordingRunner(world.settings)
    manifest = embed_corpora(runner, world.night, world.settings)
    assert [name for name, _ in runner.ran] == ["LowRankFitter", "ShardEmbedder"]
    assert [entry.key.split("-")[0] for entry in manifest.files] == ["shard"] * 3 + ["low"]
    assert 0 < manifest.measures["low_rank_recall"] <= 1
    fit = read_low_rank(world.storage, world.night.corpus)
    assert fit is not None
    model = model_of(world)
    scores = model.mol(fit.low_rank.anchors, model.item_side(torch.arange(120))).detach()
    tables = [read_shard(world.storage, world.night.corpus, e).low_rank_NR for e in shard_entries(manifest)]
    expected = fit.low_rank.item_vectors(scores)
    assert (torch.cat(tables) - expected).norm() < 0.01 * expected.norm()  # scored in bfloat16
    runner.ran.clear()
    world.storage.delete(f"{world.night.corpus.prefix}/manifest.json")
    world.storage.delete(f"{world.night.corpus.prefix}/shard-00001.json")
    assert embed_corpora(runner, world.night, world.settings).files == manifest.files
    assert [name for name, _ in runner.ran] == ["ShardEmbedder"]  # the fit stands


def test_the_sample_is_of_users_with_a_history_and_the_same_every_time(tmp_path):
    world = make_world(tmp_path, num_users=50, overrides=["corpus.low_rank.num_queries=30"])
    model = model_of(world)
    first = sample_queries(world.night, world.settings, model)
    again = sample_queries(world.night, world.settings, model)
    assert len(first.gate_BP) == 30
    assert torch.equal(first.components_BQD, again.components_BQD)
    everybody = world.with_settings("corpus.low_rank.num_queries=500")
    assert len(sample_queries(everybody.night, everybody.settings, model).gate_BP) == 41


def test_a_method_without_the_table_shares_the_corpus_of_another(tmp_path):
    world = make_world(tmp_path)
    ids = {m: world.with_settings(f"search.method={m}").night.corpus.id for m in ("exact", "topk_avg", "topk_low_rank")}
    assert ids["exact"] == ids["topk_avg"] != ids["topk_low_rank"]
    assert world.with_settings("corpus.low_rank.ranks=[9]").night.corpus.id == ids["exact"]
