"""The Corpus artifact: one safetensors file per item shard, with everything item-side computed once.

A shard is written as `shard-<n>-<sha16>.safetensors`, then its sidecar `shard-<n>.json` makes it count: whoever comes
later finds it done. Names carry the content's hash, so that two attempts with different last bits never collide.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, astuple

import pyarrow as pa
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from pipeline.artifacts import Corpus, FileEntry, Manifest, Night
from pipeline.errors import InputError
from pipeline.io.artifacts import file_entry, now, read_manifest, versions, write_manifest
from pipeline.io.storage.base import ObjectNotFoundError, Storage, put
from pipeline.model.mol import ItemSide, QuerySide
from pipeline.retrieval.low_rank import DistilledMap, Fit, LowRank, RankTrial
from pipeline.retrieval.shard import Shard
from pipeline.settings import Settings

SIDECAR = re.compile(r"shard-(\d{5,})\.json")
NAMES = ("components", "gate", "mean", "low_rank")


def write_shard(storage: Storage, corpus: Corpus, index: int, shard: Shard, item_ids: pa.Array) -> FileEntry:
    """Write one shard and its sidecar; `item_ids` are those of the shard's items.

    When another attempt was first, its entry stands and is returned. Raises InputError that names the first item
    whose vectors are not finite: one such item would rank first for every query.
    """
    tensors = dict(
        zip(NAMES, (shard.items.components_NXD, shard.items.gate_NP, shard.mean_ND, shard.low_rank_NR), strict=True)
    )
    _check_finite(tensors, item_ids)
    tensors = {name: tensor.float().contiguous().cpu() for name, tensor in tensors.items()}
    data = save_tensors(tensors | {"first_row": torch.tensor([shard.first_row])})
    key = f"shard-{index:05d}-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
    put(storage, f"{corpus.prefix}/{key}", data)
    return _claim(storage, corpus, _sidecar_key(corpus, index), file_entry(key, data, rows=len(shard)))


def done_shards(storage: Storage, corpus: Corpus) -> dict[int, FileEntry]:
    """The shards with a sidecar whose file exists with the right size."""
    sizes = _sizes(storage, corpus)
    found = {}
    for key in sizes:
        match = SIDECAR.fullmatch(key.removeprefix(f"{corpus.prefix}/"))
        entry = _read_sidecar(storage, key, sizes) if match else None
        if match and entry:
            found[int(match[1])] = entry
    return found


def read_shard(storage: Storage, corpus: Corpus, entry: FileEntry) -> Shard:
    """One shard on the CPU. Raises InputError when it is missing or damaged."""
    key, tensors = f"{corpus.prefix}/{entry.key}", _read_tensors(storage, corpus, entry)
    try:
        components_NXD, gate_NP, mean_ND, low_rank_NR = (tensors[name] for name in NAMES)
        first_row = int(tensors["first_row"])
    except KeyError as error:
        raise InputError(f"{storage.uri}/{key}: not a shard of ours ({error}); embed again") from None
    if not len(components_NXD) == len(gate_NP) == len(mean_ND) == len(low_rank_NR) == entry.rows:
        raise InputError(f"{storage.uri}/{key}: {len(mean_ND)} items, but the manifest says {entry.rows}; embed again")
    return Shard(first_row, ItemSide(components_NXD, gate_NP), mean_ND, low_rank_NR)


def write_low_rank(storage: Storage, corpus: Corpus, fit: Fit) -> None:
    """Keep the fit of the low-rank table, before any shard is made. When another attempt was first, its fit stands."""
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
    key = f"low-rank-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
    put(storage, f"{corpus.prefix}/{key}", data)
    _claim(storage, corpus, _low_rank_key(corpus), file_entry(key, data, rows=len(fit.low_rank.at_A)))


def low_rank_entry(storage: Storage, corpus: Corpus) -> FileEntry | None:
    """The fit's file, None when there is no fit."""
    return _read_sidecar(storage, _low_rank_key(corpus), _sizes(storage, corpus))


def read_low_rank(storage: Storage, corpus: Corpus) -> Fit | None:
    """The fit of the corpus's low-rank table, None when it has none. Raises InputError when it is damaged."""
    entry = low_rank_entry(storage, corpus)
    if entry is None:
        return None
    tensors = _read_tensors(storage, corpus, entry)
    anchors = QuerySide(tensors["anchor_components"], tensors["anchor_gate"])
    query_map = DistilledMap(tensors["map_centre"], tensors["map_weights"])
    trials = tuple(RankTrial(int(rank), *rest) for rank, *rest in tensors["trials"].tolist())
    low_rank = LowRank(anchors, tensors["anchor_at"], tensors["basis"], tensors["centre"])
    ridge, mean_weight, top_weight = tensors["choice"].tolist()
    return Fit(low_rank, query_map, ridge, mean_weight, top_weight, trials)


def write_corpus_manifest(
    storage: Storage, night: Night, settings: Settings, shards: Mapping[int, FileEntry]
) -> Manifest:
    """Make the corpus exist, once all its shards do."""
    files = tuple(shards[index] for index in sorted(shards))
    num_items = sum(entry.rows for entry in files)
    counts = {
        "num_items": num_items,
        "num_shards": len(files),
        "bytes_per_item": round(sum(entry.bytes for entry in files) / max(1, num_items), 1),
    }
    extra, fit = low_rank_entry(storage, night.corpus), read_low_rank(storage, night.corpus)
    if fit is not None:
        chosen = {name: getattr(fit, name) for name in ("ridge", "mean_weight", "top_weight")} | asdict(fit.chosen)
        chosen["num_anchors"] = len(fit.low_rank.at_A)
        counts |= {f"low_rank_{name}": value for name, value in chosen.items()}
        counts |= {f"low_rank_{trial.rank}_num_needed": trial.num_needed for trial in fit.trials}
    manifest = Manifest(
        kind="corpus",
        id=night.corpus.id,
        lineage={"checkpoint": night.checkpoint.id, "histories": night.histories.id},
        settings={"corpus": settings.corpus.model_dump(mode="json")},
        files=files if extra is None else (*files, extra),
        counts=counts,
        created_at=now(),
        versions=versions(),
    )
    write_manifest(storage, night.corpus.prefix, manifest)
    return manifest


def shard_entries(manifest: Manifest) -> tuple[FileEntry, ...]:
    """The shards of a corpus that hold items, in order."""
    return tuple(entry for entry in manifest.files if entry.key.startswith("shard-") and entry.rows)


def open_corpus(storage: Storage, corpus: Corpus) -> Manifest:
    """The manifest of the corpus. Raises InputError when it was not embedded."""
    manifest = read_manifest(storage, corpus.prefix)
    if manifest is None:
        raise InputError(f"{storage.uri}/{corpus.prefix}: there is no such corpus; run jobs/embed_items.py first")
    return manifest


def _check_finite(tensors: Mapping[str, torch.Tensor], item_ids: pa.Array) -> None:
    is_finite_N = torch.stack([t.isfinite().flatten(1).all(dim=1) for t in tensors.values()]).all(dim=0)
    if not is_finite_N.all():
        bad = (~is_finite_N).nonzero()[:, 0]
        raise InputError(
            f"item {item_ids[int(bad[0])].as_py()!r}: its vectors are not finite numbers, nor are those of "
            f"{len(bad) - 1} others; the model has diverged: train again with a lower train.learning_rate"
        )


def _claim(storage: Storage, corpus: Corpus, sidecar: str, entry: FileEntry) -> FileEntry:
    """Make a file count by its sidecar; the first of several attempts stands and is returned."""
    while not storage.create(sidecar, entry.model_dump_json(indent=1).encode()):
        first = _read_sidecar(storage, sidecar, _sizes(storage, corpus))
        if first is not None:
            return first
        storage.delete(sidecar)  # it names a file that is gone
    return entry


def _read_tensors(storage: Storage, corpus: Corpus, entry: FileEntry) -> dict[str, torch.Tensor]:
    key = f"{corpus.prefix}/{entry.key}"
    try:
        data = storage.read(key)
    except ObjectNotFoundError:
        raise InputError(f"{storage.uri}/{key}: the file is gone; remove the corpus and embed again") from None
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise InputError(f"{storage.uri}/{key}: damaged, its SHA-256 is not that of the manifest; embed again")
    try:
        tensors: dict[str, torch.Tensor] = load_tensors(data)
    except SafetensorError as error:
        raise InputError(f"{storage.uri}/{key}: not a file of ours ({error}); embed again") from None
    return tensors


def _low_rank_key(corpus: Corpus) -> str:
    return f"{corpus.prefix}/low-rank.json"


def _sidecar_key(corpus: Corpus, index: int) -> str:
    return f"{corpus.prefix}/shard-{index:05d}.json"


def _sizes(storage: Storage, corpus: Corpus) -> dict[str, int]:
    return {info.key: info.size for info in storage.list(f"{corpus.prefix}/")}


def _read_sidecar(storage: Storage, key: str, sizes: Mapping[str, int]) -> FileEntry | None:
    try:
        entry = FileEntry.model_validate_json(storage.read(key))
    except (ObjectNotFoundError, ValidationError):
        return None
    return entry if sizes.get(f"{key.rpartition('/')[0]}/{entry.key}") == entry.bytes else None
