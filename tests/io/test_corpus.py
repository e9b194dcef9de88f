import pyarrow as pa
import pytest
import torch
from safetensors.torch import save

from pipeline.artifacts import Artifact, FileEntry
from pipeline.errors import InputError
from pipeline.io.artifacts import write_file
from pipeline.io.corpus import (
    NAMES,
    open_corpus,
    read_low_rank,
    read_shard,
    seal_corpus,
    shard_claims,
    shard_entries,
    write_low_rank,
    write_shard,
)
from pipeline.io.storage import open_storage
from pipeline.io.storage.base import Storage
from pipeline.model.mol import ItemSide, QuerySide
from pipeline.retrieval.low_rank import DistilledMap, Fit, LowRank, RankTrial
from pipeline.retrieval.shard import Shard, make_shard
from pipeline.settings import Settings
from tests.stages.worlds import SMALL, night_of

CORPUS = Artifact("corpora", "0123456789abcdef")
IDS = pa.array([f"i{number}" for number in range(5)])


@pytest.fixture
def storage(tmp_path) -> Storage:
    return open_storage(str(tmp_path))


def a_shard(num_items: int = 5, seed: int = 0) -> Shard:
    generator = torch.Generator().manual_seed(seed)
    components = torch.randn(num_items, 2, 4, generator=generator)
    return make_shard(100, ItemSide(components, torch.randn(num_items, 6, generator=generator)))


def test_a_shard_comes_back_as_it_was_written(storage):
    shard = a_shard()
    entry = write_shard(storage, CORPUS, 3, shard, IDS)
    found = read_shard(storage, CORPUS, entry)
    assert entry.rows == 5
    assert found.first_row == 100
    assert torch.equal(found.items.components_NXD, shard.items.components_NXD)
    assert torch.equal(found.items.gate_NP, shard.items.gate_NP)
    assert torch.equal(found.mean_ND, shard.items.components_NXD.mean(dim=1))


def test_an_empty_shard_can_be_written(storage):
    entry = write_shard(storage, CORPUS, 0, a_shard(0), IDS[:0])
    assert len(read_shard(storage, CORPUS, entry)) == entry.rows == 0


@pytest.mark.parametrize("name", ["components", "gate"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_item_that_is_not_finite_is_named_and_nothing_is_written(storage, name, value):
    shard = a_shard()
    tensor = shard.items.components_NXD if name == "components" else shard.items.gate_NP
    tensor[3].view(-1)[1] = value
    with pytest.raises(InputError, match=r"item 'i3': NaN or infinity in its vectors \(1 of \d+ items"):
        write_shard(storage, CORPUS, 0, shard, IDS)
    assert not storage.list()


def test_only_shards_with_a_sidecar_and_a_whole_file_are_done(storage):
    entries = {index: write_shard(storage, CORPUS, index, a_shard(seed=index), IDS) for index in range(4)}
    assert shard_claims(storage, CORPUS).done() == entries
    storage.delete(f"{CORPUS.prefix}/shard-00000.json")
    storage.delete(f"{CORPUS.prefix}/{entries[1].key}")
    storage.delete(f"{CORPUS.prefix}/{entries[2].key}")
    storage.create(f"{CORPUS.prefix}/{entries[2].key}", b"short")
    assert shard_claims(storage, CORPUS).done() == {3: entries[3]}


def test_of_two_attempts_with_other_last_bits_the_first_stands(storage):
    first = write_shard(storage, CORPUS, 0, a_shard(seed=1), IDS)
    assert write_shard(storage, CORPUS, 0, a_shard(seed=2), IDS) == first
    assert shard_claims(storage, CORPUS).done() == {0: first}
    storage.delete(f"{CORPUS.prefix}/{first.key}")  # a sidecar without its file does not stand in the way
    second = write_shard(storage, CORPUS, 0, a_shard(seed=2), IDS)
    assert second != first
    assert shard_claims(storage, CORPUS).done() == {0: second}


def test_a_damaged_or_missing_shard_is_refused(storage):
    entry = write_shard(storage, CORPUS, 0, a_shard(), IDS)
    data = bytearray(storage.read(f"{CORPUS.prefix}/{entry.key}"))
    data[-1] ^= 1
    storage.delete(f"{CORPUS.prefix}/{entry.key}")
    with pytest.raises(InputError, match="gone since it was written; remove the corpus and embed again"):
        read_shard(storage, CORPUS, entry)
    storage.create(f"{CORPUS.prefix}/{entry.key}", bytes(data))
    with pytest.raises(InputError, match="SHA-256 is not the one that was written"):
        read_shard(storage, CORPUS, entry)


def test_a_shard_with_another_number_of_rows_is_refused(storage):
    entry = write_shard(storage, CORPUS, 0, a_shard(), IDS)
    wrong = FileEntry(key=entry.key, bytes=entry.bytes, rows=6, sha256=entry.sha256)
    with pytest.raises(InputError, match="5 items, but the manifest says 6"):
        read_shard(storage, CORPUS, wrong)


def test_shards_without_items_and_the_low_rank_table_are_not_searched(storage):
    settings = Settings.model_validate({**SMALL, "root": storage.uri})
    night = night_of(settings)
    write_low_rank(storage, night.corpus, a_fit())
    shards = {0: a_shard(2), 1: a_shard(0), 2: a_shard(3)}
    entries = {n: write_shard(storage, night.corpus, n, shard, IDS[: len(shard)]) for n, shard in shards.items()}
    manifest = seal_corpus(night, settings, entries)
    assert [entry.key.partition("-")[0] for entry in manifest.files] == ["shard"] * 3 + ["low"]
    assert shard_entries(manifest) == (entries[0], entries[2])
    assert (manifest.counts["num_items"], manifest.counts["num_shards"]) == (5, 3)


def a_fit(ridge: float = 0.25) -> Fit:
    """Three anchors, rank 2; every number is another one."""
    numbers = iter(torch.arange(1.0, 200.0).split(24))
    anchors = QuerySide(next(numbers).reshape(3, 2, 4), next(numbers)[:18].reshape(3, 6))
    low_rank = LowRank(anchors, torch.tensor([4, 0, 9]), next(numbers)[:6].reshape(3, 2), next(numbers)[:2])
    query_map = DistilledMap(next(numbers)[:5], next(numbers)[:10].reshape(5, 2))
    trials = (RankTrial(2, 30.0, 0.9, 1000.0), RankTrial(4, 20.5, 0.95, 1500.0))
    return Fit(low_rank, query_map, ridge, 0.5, 2.0, trials)


def same(one: Fit, other: Fit) -> bool:
    tensors, plain = [], []
    for fit in (one, other):
        table, query_map = fit.low_rank, fit.query_map
        anchors = (table.anchors.components_BQD, table.anchors.gate_BP)
        tensors.append((*anchors, table.at_A, table.basis_AR, table.centre_R, query_map.centre_Z, query_map.weights_ZR))
        plain.append((fit.ridge, fit.mean_weight, fit.top_weight, fit.trials))
    return plain[0] == plain[1] and all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


def test_a_fit_comes_back_as_it_was_written_and_the_first_one_stands(storage):
    assert read_low_rank(storage, CORPUS) is None
    write_low_rank(storage, CORPUS, a_fit())
    write_low_rank(storage, CORPUS, a_fit(ridge=9.0))
    found = read_low_rank(storage, CORPUS)
    assert same(found, a_fit())
    assert not same(found, a_fit(ridge=9.0))
    assert all(isinstance(trial.rank, int) for trial in found.trials)


def test_a_damaged_fit_is_refused_and_a_lost_one_is_to_do(storage):
    write_low_rank(storage, CORPUS, a_fit())
    (key,) = [info.key for info in storage.list(CORPUS.prefix) if info.key.endswith(".safetensors")]
    data = bytearray(storage.read(key))
    data[-1] ^= 1
    storage.delete(key)
    storage.create(key, bytes(data))
    with pytest.raises(InputError, match="SHA-256 is not the one that was written; remove the corpus and embed again"):
        read_low_rank(storage, CORPUS)
    storage.delete(key)
    assert read_low_rank(storage, CORPUS) is None


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"no tensors", "damaged, it cannot be read as safetensors"),
        (save({"components": torch.zeros(1)}), "the tensor 'gate' is missing"),
        (save({name: torch.zeros(1) for name in NAMES}), "the tensor 'first_row' is missing"),
    ],
    ids=["text", "one tensor", "no first row"],
)
def test_a_file_that_is_no_shard_is_named_with_the_remedy(storage, data, says):
    entry = write_file(storage, CORPUS.prefix, "shard-00000.safetensors", data, rows=1)
    with pytest.raises(
        InputError, match=rf"{CORPUS.prefix}/shard-00000-.*: {says}.*; remove the corpus and embed again"
    ):
        read_shard(storage, CORPUS, entry)


def test_the_manifest_makes_the_corpus_exist(storage):
    settings = Settings.model_validate({**SMALL, "root": storage.uri, "corpus": {"num_shards": 2}})
    night = night_of(settings)
    with pytest.raises(InputError, match=r"run jobs/embed_items\.py first"):
        open_corpus(storage, night.corpus)
    shards = {index: write_shard(storage, night.corpus, index, a_shard(seed=index), IDS) for index in (1, 0)}
    manifest = seal_corpus(night, settings, shards)
    assert open_corpus(storage, night.corpus) == manifest
    assert manifest.files == (shards[0], shards[1])
    assert manifest.counts["num_items"] == 10
    assert manifest.measures["bytes_per_item"] == round(sum(e.bytes for e in manifest.files) / 10, 1)
    assert manifest.lineage["checkpoint"] == night.checkpoint.id
