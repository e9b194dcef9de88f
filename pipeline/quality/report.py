"""A night as text: its metrics as a table, three of its users, and how to read the published table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.evaluation.results import Difference, Metrics

Row = tuple[str, ...]


@dataclass(frozen=True)
class Event:
    """One event of a user's history."""

    day: str
    item: str  # as `item_name` writes it


@dataclass(frozen=True)
class Suggestion:
    """One published row of a user's list."""

    item: str
    score: float


@dataclass(frozen=True)
class UserStory:
    """One user: the last events, and the first items of the list that was published tonight."""

    user_id: str
    status: str
    reason: str
    num_events: int
    last_events: tuple[Event, ...]  # the newest last
    num_returned: int
    best: tuple[Suggestion, ...]


def item_name(item_id: object, attributes: Mapping[str, object]) -> str:
    """Name an item for people: `Nordic Noir 3 (Crime)` where the catalogue has a title, else the id."""
    title, category = attributes.get("title"), attributes.get("category")
    name = str(title or item_id)
    return f"{name} ({category})" if category else name


def metrics_table(metrics: Metrics) -> str:
    """Write the metrics and their protocol as lines."""
    return "\n".join([f"{metrics.queries} queries: {metrics.protocol}", turnout(metrics), figures_table(metrics)])


def figures_table(metrics: Metrics) -> str:
    """Write the metrics as aligned lines; `counts` are item-to-item counts, `MoL alone` is the model without them."""
    alone = ("MoL alone",) if metrics.mol else ()
    rows: list[Row] = [("", "model", "95 %", *alone, "popularity", "counts", "model / counts")]
    for name, value in metrics.model.items():
        floors = (metrics.popularity[name].mean, metrics.counts[name].mean)
        others = (metrics.mol[name].mean, *floors) if metrics.mol else floors
        ratio = f"{value.mean / floors[1]:.2f} ×" if floors[1] else "-"
        interval = f"{value.low:.4f} to {value.high:.4f}"
        rows.append((name, f"{value.mean:.4f}", interval, *(f"{other:.4f}" for other in others), ratio))
    for name, figure in (("coverage", metrics.coverage), ("gini", metrics.gini)):
        floors = (figure.popularity, figure.counts)
        unknown = ("",) * len(alone)
        cells = (f"{figure.model:.4f}", "", *unknown, *(f"{floor:.4f}" for floor in floors), "")
        rows.append((f"{name}@{metrics.k}", *cells))
    overlap = metrics.overlap
    return "\n".join(
        [
            *_aligned(rows),
            f"search is {metrics.method}: overlap@{overlap.k} with {overlap.against} {overlap.mean:.4f} "
            f"({overlap.low:.4f} to {overlap.high:.4f}, {overlap.queries} queries); "
            f"{metrics.proven:.1%} of the lists are proven to be those of exact search",
        ]
    )


def differences_table(first: str, second: str, differences: Mapping[str, Difference]) -> str:
    """Write the differences between two rankings, by metric, as aligned lines."""
    rows: list[Row] = [("", first, second, "difference", "95 %", "p", "better", "worse")]
    for name, found in differences.items():
        means = (f"{found.first:.4f}", f"{found.second:.4f}", f"{found.mean:+.4f}")
        interval = f"{found.low:+.4f} to {found.high:+.4f}"
        rows.append((name, *means, interval, f"{found.p_value:.2g}", str(found.num_better), str(found.num_worse)))
    return "\n".join(_aligned(rows))


def turnout(metrics: Metrics) -> str:
    """Say how many users with test events left the metrics and why, and who stays without a chance."""
    return (
        f"of {metrics.with_test_events} users with test events, {metrics.only_repeats} left the metrics because they "
        f"had seen all these items before, and {metrics.without_history} because they have no earlier event; "
        f"{metrics.only_unlearned} stay though none of their items has a training event"
    )


def warnings_of(metrics: Metrics) -> list[str]:
    """A warning when the model finds less than item-to-item counts do; else none."""
    name = f"hr@{min(metrics.cutoffs)}"
    model, counts = metrics.model[name].mean, metrics.counts[name].mean
    if model >= counts:
        return []
    difference = metrics.over_counts[name]
    return [
        f"the model is worse than counting which item follows which: {name} is {model:.4f}, that of item-to-item "
        f"counts {counts:.4f} (for the same users {difference.mean:+.4f}, 95 %: {difference.low:+.4f} to "
        f"{difference.high:+.4f}); train longer or with other settings (gates.min_lift_over_counts: 1 would not "
        "publish such a model)"
    ]


def choose_users(num_events: Mapping[str, int], status: Mapping[str, str]) -> list[str]:
    """Choose up to three users to describe: with a long history, with a short one, and without a full list (when all
    lists are full, with a middling history). The same night always gives the same users.

    Long and short mean longer than nine tenths and one tenth of the histories: the very longest is seldom a person's.
    """
    served = sorted((user for user in status if status[user] == "ok"), key=lambda user: (num_events.get(user, 0), user))
    others = sorted(user for user in status if status[user] != "ok")
    tenths = (9, 1) if others else (9, 1, 5)
    chosen = [served[len(served) * tenth // 10] for tenth in tenths if served]
    return list(dict.fromkeys(chosen + others[:1]))


def three_users(stories: Sequence[UserStory]) -> str:
    """Describe a few users: what they did last, and what they get."""
    return "\n\n".join(_story(story) for story in stories)


def how_to_read(root: str, name: str) -> str:
    """Show a line of code for each usual reader; the last commit lists the files, never a glob."""
    files = f"latest_files({root!r}, {name!r})"
    lines = [
        ("", "from pipeline.io.publication.reader import latest_files, read_latest"),
        ("pandas", f"read_latest({root!r}, {name!r}).to_pandas()"),
        ("polars", f"pl.read_parquet({files})"),
        ("DuckDB", f"duckdb.read_parquet({files})"),
        ("Spark", f"spark.read.parquet(*{files})"),
    ]
    return "\n".join(f"  {reader:<7} {line}" for reader, line in lines)


def _story(story: UserStory) -> str:
    num_events = f"{story.num_events} event" + ("s" if story.num_events != 1 else "")
    lines = [
        f"user {story.user_id}: {num_events}, status {story.status}" + (f" ({story.reason})" if story.reason else "")
    ]
    if story.last_events:
        lines.append("  did last")
        lines += [f"    {event.day}  {event.item}" for event in story.last_events]
    if story.best:
        lines.append(f"  gets {story.num_returned} items, first")
        lines += [f"    {rank}. {item.item}  {item.score:.3f}" for rank, item in enumerate(story.best, start=1)]
    else:
        lines.append("  gets nothing tonight")
    return "\n".join(lines)


def _aligned(rows: Sequence[Row]) -> list[str]:
    """Columns of equal width: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]
