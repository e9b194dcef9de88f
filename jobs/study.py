"""Measure something: python jobs/study.py NAME [arguments]. Each study's own --help says what it prints."""

import argparse
import ast
import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import InputError

FOLDER = Path(__file__).with_name("studies")
Parser = argparse.ArgumentParser


@dataclass(frozen=True)
class Study:
    """A module of `jobs/studies` whose `main` takes the arguments by name."""

    module: str  # room.file
    arguments: Callable[[Parser], None]

    @property
    def docstring(self) -> str:
        """The module's docstring, read without importing the module, so that --help does not wait for torch."""
        source = (FOLDER / f"{self.module.replace('.', '/')}.py").read_text(encoding="utf-8")
        return ast.get_docstring(ast.parse(source)) or ""


def main(words: Sequence[str]) -> None:
    """Run the study that the first word names with the other words as its arguments."""
    name, study, options = parse(words)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    try:
        importlib.import_module(f"jobs.studies.{study.module}").main(**options)
    except (InputError, ModuleNotFoundError) as error:
        sys.exit(f"study {name}: {error}")


def parse(words: Sequence[str]) -> tuple[str, Study, dict[str, object]]:
    """The study's name, the study, and the arguments of its `main`."""
    parser = Parser(description=__doc__, epilog=listing(), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.name not in STUDIES:
        from pipeline.config import nearest  # here, so that --help needs the standard library only

        parser.error(f"no study is called {given.name!r}{nearest(given.name, STUDIES)}")
    study = STUDIES[given.name]
    own = Parser(
        prog=f"python jobs/study.py {given.name}",
        description=study.docstring,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    study.arguments(own)
    return given.name, study, vars(own.parse_args(given.arguments))


def listing() -> str:
    """One line per study."""
    return "\n".join(f"  {name:12} {study.docstring.splitlines()[0]}" for name, study in STUDIES.items())


def _world(parser: Parser) -> None:
    parser.add_argument("--world", choices=["books", "books-hard", "m100k", "synthetic"], default="books")
    parser.add_argument("--num-items", type=int, help="another size than the world's own")
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 64, 128, 256], help="ranks of the low-rank table")
    parser.add_argument("--num-sample", type=int, default=2_048, help="queries that the low-rank table is fitted on")
    parser.add_argument("--threads", type=int, default=2)


def _search(parser: Parser) -> None:
    _world(parser)
    parser.add_argument("--k", type=int, nargs="+", default=[100, 200], help="lengths of the lists")
    parser.add_argument("--target", type=float, default=0.99, help="recall@k against exact search")
    parser.add_argument("--rounds", type=int, default=5, help="times that each contender is timed")


def _methods(parser: Parser) -> None:
    _world(parser)
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="where the figures and the picture go (default: here)"
    )


def _bonuses(parser: Parser) -> None:
    _world(parser)
    parser.set_defaults(world="m100k", threads=1)
    parser.add_argument("--k", type=int, default=100, help="length of the lists")
    parser.add_argument("--target", type=float, default=0.99, help="recall@k of the approximate search")


def _scaling(parser: Parser) -> None:
    sizes = [25_000, 50_000, 100_000, 200_000, 400_000]
    parser.add_argument("--num-items", type=int, nargs="+", default=sizes, help="the middle one is used for the rest")


def _train(parser: Parser) -> None:
    parser.add_argument("models", nargs="*", metavar="MODEL")
    _folders(parser)


def _models(parser: Parser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL")
    _folders(parser)


def _folders(parser: Parser) -> None:
    parser.add_argument("--data", type=Path, default=Path("logs"), help="folder of the real logs (default: logs)")
    parser.add_argument("--out", type=Path, default=Path("models"), help="folder of the models (default: models)")


def _cadence(parser: Parser) -> None:
    parser.add_argument("--root", type=Path, default=Path("cadence"), help="folder of the nights (default: cadence)")
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="where the table and the picture go (default: here)"
    )
    parser.add_argument("--nights", type=int, default=10, help="nights that are run, the last ones of the log")
    _overrides(parser)


def _approximation(parser: Parser) -> None:
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="where the table and the picture go (default: here)"
    )
    parser.add_argument("--steps", type=int, default=2_000, help="of the training on each matrix")


def _variants(parser: Parser) -> None:
    parser.add_argument("--root", type=Path, default=Path("variants"), help="folder of the nights (default: variants)")
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="where the table and the picture go (default: here)"
    )
    parser.add_argument("--config", type=Path, help="the night's configuration (default: a simulated log)")
    _overrides(parser)


def _gpu_compile(parser: Parser) -> None:
    parser.add_argument("only", nargs="?", default="", help="a part of the names of the cases (default: all)")


def _gpu_speed(parser: Parser) -> None:
    parser.add_argument("--num-queries", type=int, default=1_024)
    parser.add_argument("--num-items", type=int, nargs="+", default=[1_000_000, 10_000_000])


def _training_speed(parser: Parser) -> None:
    parser.add_argument("--num-items", type=int, nargs="+", default=[46_000, 1_000_000], help="sizes of the item table")
    parser.add_argument("--rounds", type=int, default=7, help="times that each contender is timed")


def _memory(parser: Parser) -> None:
    parser.add_argument(
        "job", choices=["prepare", "count_pairs", "train", "choose_memory", "embed_items", "retrieve", "evaluate"]
    )
    parser.add_argument("num_users", type=int, nargs="+", metavar="USERS")
    _overrides(parser)


def _ray_cost(parser: Parser) -> None:
    parser.add_argument("num_users", type=int, nargs="?", default=200_000, metavar="USERS")
    parser.add_argument("num_items", type=int, nargs="?", default=100_000, metavar="ITEMS")
    _overrides(parser)


def _overrides(parser: Parser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", dest="overrides", help="override a key of the night"
    )


STUDIES = {
    "search": Study("search.figures", _search),
    "methods": Study("search.methods", _methods),
    "scaling": Study("search.scaling", _scaling),
    "bonuses": Study("search.bonuses", _bonuses),
    "train": Study("models.train", _train),
    "recall": Study("models.recall", _models),
    "dtypes": Study("models.dtypes", _models),
    "breaks": Study("models.breaks", _models),
    "cadence": Study("models.cadence", _cadence),
    "approximation": Study("models.approximation", _approximation),
    "balance": Study("settings.balance", _variants),
    "pairs": Study("settings.pairs", _variants),
    "adds": Study("settings.adds", _variants),
    "train-speed": Study("kernels.training_speed", _training_speed),
    "gpu-compile": Study("kernels.gpu_compile", _gpu_compile),
    "gpu-speed": Study("kernels.gpu_speed", _gpu_speed),
    "memory": Study("cluster.memory", _memory),
    "ray-cost": Study("cluster.ray_cost", _ray_cost),
}

if __name__ == "__main__":
    main(sys.argv[1:])
