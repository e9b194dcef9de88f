"""The Corpus artifact: one safetensors file per item shard, which holds the item side of the model, computed once."""

from collections.abc import Mapping
from dataclasses import asdict, astuple

import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from pipeline.artifacts import Artifact, FileEntry, Manifest
from pipeline.errors import InputError
from pipeline.io.artifacts import Claims, read_file, require_manifest, seal, sizes_of, write_file
from pipeline.io.night import Night
from pipeline.io.storage.base import Storage
from pipeline.model.mol import ItemSide, QuerySide
from pipeline.retrieval.low_rank import DistilledMap, Fit, LowRank, RankTrial
from pipeline.retrieval.shard import Shard
from pipeline.settings import Settings

NAMES = ("components", "gate", "mean", "low_rank")  # tensors of a shard
REMEDY = "remove the corpus and embed again"


def shard_claims(storage: Storage, corpus: Artifact) -> Claims[FileEntry]:
    """The claims of the shards: part n is shard n."""
    return Claims(storage, corpus.prefix, "shard", FileEntry, lambda entry: sizes_of(corpus.prefix, entry))


def low_rank_claims(storage: Storage, corpus: Artifact) -> Claims[FileEntry]:
    """The claim of the low-rank table's fit: part 0 is the only one."""
    return Claims(storage, corpus.prefix, "low-rank", FileEntry, lambda entry: sizes_of(corpus.prefix, entry))


def write_shard(storage: Storage, corpus: Artifact, index: int, shard: Shard, item_ids: pa.Array) -> FileEntry:
    """Write one shard and its claim; `item_ids` has the id of each of its items. The first attempt's entry stands.

    Raises InputError that names the first item with NaN or infinity in a vector: it would rank first for every query.
    """
    tables = (shard.items.components_NXD, shard.items.gate_NP, shard.mean_ND, shard.low_rank_NR)
    tensors = dict(zip(NAMES, tables, strict=True))
    _check_finite(tensors, item_ids)
    tensors = {name: tensor.float().contiguous().cpu() for name, tensor in tensors.items()}
    data = save_tensors(tensors | {"first_row": torch.tensor([shard.first_row])})
    entry = write_file(storage, corpus.prefix, f"shard-{index:05d}.safetensors", data, rows=len(shard))
    return shard_claims(storage, corpus).claim(index, entry)


def read_shard(storage: Storage, corpus: Artifact, entry: FileEntry) -> Shard:
    """Read one shard, on the CPU. Raises InputError when it is missing or damaged."""
    origin, tensors = f"{storage.uri}/{corpus.key(entry.key)}", _read_tensors(storage, corpus, entry)
    try:
        components_NXD, gate_NP, mean_ND, low_rank_NR = (tensors[name] for name in NAMES)
        first_row = int(tensors["first_row"])
    except KeyError as error:
        raise InputError(f"{origin}: the tensor {error} is missing; {REMEDY}") from None
    if not len(components_NXD) == len(gate_NP) == len(mean_ND) == len(low_rank_NR) == entry.rows:
        raise InputError(f"{origin}: {len(mean_ND)} items, but the manifest says {entry.rows}; {REMEDY}")
    return Shard(first_row, ItemSide(components_NXD, gate_NP), mean_ND, low_rank_NR)


def write_low_rank(storage: Storage, corpus: Artifact, fit: Fit) -> None:
    """Write the fit of the low-rank table, before any shard is made; the fit of the first attempt stands."""
    tensors = {
        "anchor_components": fit.low_rank.anchors.components_BQD,
        "anchor_gate": fit.low_rank.anchors.gate_BP,
        "anchor_at": fit.low_rank.at_A,
        "basis": fit.low_rank.basis_AR,
        "centre": fit.low_rank.centre_R,
        "map_centre": fit.query_map.centre_Z,
        "map_weights": fit.query_map.weights_ZR,
        "choice": torch.tensor([fit.ridge, fit.mean_weight, fit.top_weight], dtype=torch.float64),
        "trials": torch.tensor([astuple(trial) for trial in fit.trials], dtype=torch.float64),
    }
    data = save_tensors({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
    entry = write_file(storage, corpus.prefix, "low-rank.safetensors", data, rows=len(fit.low_rank.at_A))
    low_rank_claims(storage, corpus).claim(0, entry)


def read_low_rank(storage: Storage, corpus: Artifact) -> Fit | None:
    """Read the fit of the corpus's low-rank table; None when there is none. Raises InputError when it is damaged."""
    entry = low_rank_claims(storage, corpus).read(0)
    if entry is None:
        return None
    tensors = _read_tensors(storage, corpus, entry)
    anchors = QuerySide(tensors["anchor_components"], tensors["anchor_gate"])
    query_map = DistilledMap(tensors["map_centre"], tensors["map_weights"])
    trials = tuple(RankTrial(int(rank), *rest) for rank, *rest in tensors["trials"].tolist())
    low_rank = LowRank(anchors, tensors["anchor_at"], tensors["basis"], tensors["centre"])
    ridge, mean_weight, top_weight = tensors["choice"].tolist()
    return Fit(low_rank, query_map, ridge, mean_weight, top_weight, trials)


def seal_corpus(night: Night, settings: Settings, shards: Mapping[int, FileEntry]) -> Manifest:
    """Write the corpus's manifest; `shards` has the file of each shard by its number."""
    storage, corpus = night.storage, night.corpus
    files = tuple(shards[index] for index in sorted(shards))
    num_items = sum(entry.rows for entry in files)
    low_rank_file, fit = low_rank_claims(storage, corpus).read(0), read_low_rank(storage, corpus)
    bytes_per_item = round(sum(entry.bytes for entry in files) / max(1, num_items), 1)
    return seal(
        storage,
        corpus,
        kind="corpus",
        lineage={"checkpoint": night.checkpoint.id, "histories": night.histories.id},
        settings=settings.model_dump(mode="json", include={"corpus"}),
        files=files if low_rank_file is None else (*files, low_rank_file),
        counts={"num_items": num_items, "num_shards": len(files)},
        measures={"bytes_per_item": bytes_per_item} | ({} if fit is None else _low_rank_measures(fit)),
    )


def open_corpus(storage: Storage, corpus: Artifact) -> Manifest:
    """Read the manifest of the corpus. Raises InputError when the items are not embedded yet."""
    return require_manifest(storage, corpus, "embed_items")


def shard_entries(manifest: Manifest) -> tuple[FileEntry, ...]:
    """The files of the shards that hold items, in order of shard."""
    return tuple(entry for entry in manifest.files if entry.key.startswith("shard-") and entry.rows)


def _low_rank_measures(fit: Fit) -> dict[str, float]:
    """The figures of the fit that the manifest records, by name."""
    chosen = {name: getattr(fit, name) for name in ("ridge", "mean_weight", "top_weight")} | asdict(fit.chosen)
    chosen["num_anchors"] = len(fit.low_rank.at_A)
    num_needed = {f"{trial.rank}_num_needed": trial.num_needed for trial in fit.trials}
    return {f"low_rank_{name}": value for name, value in (chosen | num_needed).items()}


def _check_finite(tensors: Mapping[str, torch.Tensor], item_ids: pa.Array) -> None:
    is_finite_N = torch.stack([t.isfinite().flatten(1).all(dim=1) for t in tensors.values()]).all(dim=0)
    if not is_finite_N.all():
        bad = (~is_finite_N).nonzero()[:, 0]
        raise InputError(
            f"item {item_ids[int(bad[0])].as_py()!r}: NaN or infinity in its vectors ({len(bad)} of {len(is_finite_N)} "
            "items of the shard); the model has diverged: train again with a lower train.learning_rate"
        )


def _read_tensors(storage: Storage, corpus: Artifact, entry: FileEntry) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = load_tensors(read_file(storage, corpus.prefix, entry, REMEDY))
    except SafetensorError as error:
        raise InputError(
            f"{storage.uri}/{corpus.key(entry.key)}: damaged, it cannot be read as safetensors ({error}); {REMEDY}"
        ) from None
    return tensors
