"""Look at a log that is not described yet and write a source file for it: conf/sources/NAME.yaml.

Every guess stands there with its reason. Prints ten rows as the file would be read, and what to look at.
"""

import argparse

from pipeline.command import MADE, Outcome, log, plain_command
from pipeline.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="uri", required=True, metavar="URI", help="a file of the log, or its folder")
    parser.add_argument("--name", required=True, help="of the source file: log.source in the configuration")


def run(uri: str, name: str) -> Outcome:
    from pipeline.io.inputs import SOURCES
    from pipeline.settings import TABLE_NAME, absolute
    from pipeline.stages.init_source import draft_source

    if not TABLE_NAME.fullmatch(name):
        raise InputError(f"--name {name!r}: lower-case letters, digits, - and _, starting with a letter or digit")
    path = SOURCES / f"{name}.yaml"
    draft = draft_source(absolute(uri))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as written:
            written.write(draft.text)
    except FileExistsError:
        raise InputError(f"{path}: there already; remove it, or give another --name") from None
    rows = "\n".join(
        f"  {row['user_id']!s:>20}  {row['item_id']!s:>20}  {row['event_ts']:%Y-%m-%d %H:%M:%S}  {row['event_type']} "
        f"{row['weight']:g}"
        for row in draft.rows
    )
    log.info("%s:\n\n%s\nthe first rows are read as\n%s", path, draft.text, rows)
    for sentence in draft.unsure:
        log.warning("look at this: %s", sentence)
    return {"status": MADE, "source": name, "path": str(path), "rows": draft.rows, "unsure": draft.unsure}


if __name__ == "__main__":
    plain_command(__doc__ or "", add_arguments, run)
