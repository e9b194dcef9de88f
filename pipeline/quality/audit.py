"""Does a run keep its promises? Every row of every unit is held against them, or nothing is published."""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import InvalidRunError
from pipeline.quality.promises import (
    Expected,
    Place,
    Rows,
    Violation,
    accounting_faults,
    flatten,
    history_faults,
    list_faults,
    provenance_faults,
    schema_faults,
)


@dataclass(frozen=True)
class UnitAudit:
    """The outcome for one unit; `num_rows` counts user-item pairs in either layout."""

    num_rows: int
    num_users: int
    statuses: dict[str, int]
    violations: tuple[Violation, ...]


def audit_unit(candidate_table: pa.Table, user_table: pa.Table, expected: Expected) -> UnitAudit:
    """Check every row of a unit against every promise."""
    wrong = [*schema_faults(candidate_table, user_table, expected)]
    if wrong:  # nothing else can be asked of other columns
        return UnitAudit(candidate_table.num_rows, user_table.num_rows, {}, tuple(wrong))
    rows = flatten(candidate_table) if expected.layout == "nested" else Rows.of(candidate_table)
    place = Place.of(rows, user_table["user_id"], expected.item_ids)
    violations = [
        *list_faults(rows, place),
        *history_faults(rows, place, user_table["user_id"], expected),
        *accounting_faults(user_table, place, expected),
        *provenance_faults(candidate_table, user_table, expected),
    ]
    statuses = {entry["values"]: entry["counts"] for entry in pc.value_counts(user_table["status"]).to_pylist()}
    return UnitAudit(len(rows.scores), user_table.num_rows, statuses, tuple(violations))


def require_sound(audit: UnitAudit, origin: str) -> None:
    """Raise InvalidRunError that names the unit and the first places where it breaks a promise."""
    if audit.violations:
        lines = "\n".join(f"  {violation}" for violation in audit.violations)
        raise InvalidRunError(
            f"{origin}: {len(audit.violations)} promises are broken, so nothing is published\n{lines}"
        )
