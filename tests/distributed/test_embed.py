import pytest
import torch

from pipeline.distributed import embed
from pipeline.distributed.cluster import Cluster, Node
from pipeline.distributed.embed import ShardEmbedder, embed_corpus, embed_items
from pipeline.errors import InputError, MismatchError
from pipeline.io.corpus import done_shards, open_corpus, read_shard
from pipeline.io.histories import read_items
from pipeline.io.parquet import write_parquet_bytes
from pipeline.settings import ClusterSettings
from tests.distributed.worlds import World, make_world, model_of, without_ray


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), num_items=130)


@pytest.fixture(autouse=True)
def _tiles(monkeypatch):
    monkeypatch.setattr(embed, "ITEM_TILE", 16)


@pytest.mark.parametrize("num_shards", [1, 2, 7, 200])
def test_shards_hold_every_item_once_whatever_their_number(world, monkeypatch, num_shards):
    without_ray(monkeypatch)
    other = world.with_settings(f"corpus.num_shards={num_shards}")
    manifest = embed_corpus(other.storage, other.night, other.settings)
    assert len(manifest.files) == num_shards
    assert manifest.counts["num_items"] == 130
    shards = [read_shard(other.storage, other.night.corpus, entry) for entry in manifest.files]
    assert [shard.first_row for shard in shards] == [s * 130 // num_shards for s in range(num_shards)]
    whole = embed_items(model_of(world), 0, 130)
    for name in ("components_NXD", "gate_NP"):
        found = torch.cat([getattr(shard.items, name) for shard in shards])
        assert torch.equal(found, getattr(whole.items, name))  # to the last bit
    assert torch.equal(torch.cat([shard.mean_ND for shard in shards]), whole.mean_ND)


def test_items_are_embedded_as_the_model_does(world):
    model = model_of(world)
    expected = model.item_side(torch.arange(40, 73))
    shard = embed_items(model, 40, 73)
    torch.testing.assert_close(shard.items.components_NXD, expected.components_NXD)
    torch.testing.assert_close(shard.items.gate_NP, expected.gate_NP)
    torch.testing.assert_close(shard.mean_ND, expected.mean_ND)


def test_a_rerun_embeds_only_what_is_missing(tmp_path, monkeypatch):
    ran = without_ray(monkeypatch)
    world = make_world(tmp_path, overrides=["corpus.num_shards=4"])
    manifest = embed_corpus(world.storage, world.night, world.settings)
    prefix = world.night.corpus.prefix
    for key in ("manifest.json", "shard-00001.json", manifest.files[2].key):
        world.storage.delete(f"{prefix}/{key}")
    assert sorted(done_shards(world.storage, world.night.corpus)) == [0, 3]
    ran.clear()
    again = embed_corpus(world.storage, world.night, world.settings)
    assert [units for _, units in ran] == [[1, 2]]
    assert again.files == manifest.files
    ran.clear()
    assert embed_corpus(world.storage, world.night, world.settings) == again
    assert not ran


def test_an_item_that_is_not_finite_stops_the_embedding_by_name(tmp_path, monkeypatch):
    without_ray(monkeypatch)
    world = make_world(tmp_path, num_items=50)

    def broken(storage, checkpoint):
        model = model_of(world)
        model.item_embedding.weight[33] = torch.nan
        return model

    monkeypatch.setattr(embed, "load_model", broken)
    with pytest.raises(InputError, match="item 'i000033'"):
        embed_corpus(world.storage, world.night, world.settings)
    with pytest.raises(InputError, match="there is no such corpus"):
        open_corpus(world.storage, world.night.corpus)


def test_a_model_of_another_catalogue_is_refused(tmp_path):
    world = make_world(tmp_path, num_items=50)
    items = read_items(world.storage, world.night.histories)
    world.storage.delete(world.night.histories.items_key)
    world.storage.create(world.night.histories.items_key, write_parquet_bytes(items.slice(1)))
    with pytest.raises(MismatchError, match=r"knows 50 items, but histories .* have 49"):
        ShardEmbedder(world.storage.uri, world.night, world.settings)


def test_embedders_leave_room_and_share_gpus():
    nodes = Cluster((Node(16.0), Node(16.0, 4.0)), is_local=False)
    assert embed._num_embedders(nodes, ClusterSettings()) == 8
    assert embed._num_embedders(nodes, ClusterSettings(gpus_per_actor=2.0)) == 2
    assert embed._num_embedders(Cluster((Node(2.0),), is_local=True), ClusterSettings()) == 1
