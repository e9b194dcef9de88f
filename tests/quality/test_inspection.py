from dataclasses import replace

import pyarrow as pa
import pytest

from pipeline.data.histories import user_bucket
from pipeline.errors import InvalidRunError
from pipeline.io.night import open_night
from pipeline.io.parquet import write_parquet_bytes
from pipeline.io.publication.units import units_of, write_unit
from pipeline.io.storage import open_storage
from pipeline.quality.inspection import inspect_run
from pipeline.stages.queries import TonightsUsers
from tests.quality.nights import NUM_UNITS, compute_night, fresh_memory, settings_for, unit_of
from tests.quality.units import DS, make_unit


def test_files_whose_rows_are_right_but_whose_footer_names_another_run_are_refused() -> None:
    settings = settings_for(fresh_memory())
    night = compute_night(settings)
    other = replace(night.run, fp="other00000000000")
    foreign = write_unit(night.storage, other, 0, *unit_of(night, settings, 0).tables(), 0, {})
    sidecars = units_of(night.storage, night.run).done()
    inspect_run(night, settings, sidecars)
    with pytest.raises(InvalidRunError, match=rf"its footer says .*{other.run_id}.* it is not of {night.run.run_id}"):
        inspect_run(night, settings, sidecars | {0: foreign})


@pytest.mark.parametrize("table", ["candidates", "users"])
def test_a_file_with_another_number_of_rows_than_its_sidecar_says_is_refused(table: str) -> None:
    settings = settings_for(fresh_memory())
    night = compute_night(settings)
    sidecars = units_of(night.storage, night.run).done()
    file = getattr(sidecars[1], table)
    wrong = sidecars[1].model_copy(update={table: file.model_copy(update={"rows": file.rows + 1})})
    with pytest.raises(InvalidRunError, match=rf"{file.key}: {file.rows} rows, but {file.rows + 1} were written"):
        inspect_run(night, settings, sidecars | {1: wrong})


def test_with_a_queries_table_each_unit_accounts_for_its_users_of_the_table_and_no_others() -> None:
    """u0 to u29 are to be served; the log knows other users, and those are not."""
    wanted = [f"u{number}" for number in range(30)]
    root = fresh_memory()
    table = pa.table({"user_id": wanted})
    open_storage(f"{root}-queries").create("queries.parquet", write_parquet_bytes(table))
    night = open_night(settings_for(root, queries={"uri": f"{root}-queries"}), DS)
    users = TonightsUsers.of(night, NUM_UNITS)
    bucket = make_unit().expected.histories
    parts = [users.select(unit, bucket).user_ids.to_pylist() for unit in range(NUM_UNITS)]
    units = user_bucket(table["user_id"], NUM_UNITS).tolist()
    assert parts == [sorted(u for u, n in zip(wanted, units, strict=True) if n == unit) for unit in range(NUM_UNITS)]
    assert all(parts)


def test_without_a_queries_table_each_unit_accounts_for_everybody_with_a_history() -> None:
    bucket = make_unit().expected.histories
    assert TonightsUsers(None, NUM_UNITS).select(0, bucket).user_ids.equals(bucket.user_ids)
