"""A night that was computed and not yet published, small enough to be published a hundred times in a test."""

import shutil
import uuid
from typing import Any

from pipeline.config import validate
from pipeline.io.histories import write_bucket, write_items
from pipeline.io.night import Night, open_night
from pipeline.io.publication.units import write_unit
from pipeline.io.storage import open_storage
from pipeline.settings import Settings
from tests.item_index import item_index
from tests.quality.units import DS, K, Unit, make_unit

NUM_UNITS = 2
USERS_PER_UNIT = 8


def settings_for(root: str, **sections: Any) -> Settings:
    """Settings of a night of the log of one file below `root`; gates are open."""
    log = f"{root}-log" if root.startswith("memory://") else f"{root}/log"
    open_storage(log).create(f"ds={DS}/events.parquet", b"its content is never read here")
    values = {
        "root": root,
        "name": "home",
        "log": {"uri": log, "source": "default"},
        "search": {"k": K, "method": "exact"},
        "output": {"num_buckets": NUM_UNITS, "surface": "home"},
        "gates": {"min_overlap": 0.0, "min_lift_over_popularity": 0.0},
    }
    return validate(Settings, values | sections, "test")


def other_settings(root: str) -> Settings:
    """The same night searched in another way: another run."""
    return settings_for(root, search={"k": K, "method": "topk_avg"})


def compute_night(settings: Settings) -> Night:
    """Leave what prepare and retrieve would: histories, items, and every unit of the run."""
    night = open_night(settings, DS)
    storage = night.storage
    for unit in range(NUM_UNITS):
        made = unit_of(night, settings, unit)
        write_bucket(storage, night.histories, unit, made.expected.histories)
        write_unit(storage, night.run, unit, *made.tables(), len(made.candidates), {"ok": USERS_PER_UNIT})
    item_ids = made.expected.item_ids
    write_items(storage, night.histories, item_index(item_ids, 1))
    return night


def unit_of(night: Night, settings: Settings, unit: int) -> Unit:
    return make_unit(
        settings.output.layout,
        seed=unit,
        num_users=USERS_PER_UNIT,
        run_id=night.run.run_id,
        model=night.checkpoint.id,
        first_user=100 * unit,
    )


def fresh_memory() -> str:
    return f"memory://{uuid.uuid4().hex}"


def clone(root: str) -> str:
    """Another root with the same objects: to try many things on one night."""
    if not root.startswith("memory://"):
        copied = f"{root}-{uuid.uuid4().hex}"
        shutil.copytree(root, copied)
        return copied
    copied = fresh_memory()
    for end in ("", "-log"):
        to = open_storage(copied + end)
        for info in (source := open_storage(root + end)).list():
            to.create(info.key, source.read(info.key))
    return copied
