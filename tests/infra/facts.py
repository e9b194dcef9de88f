"""What the files of infra/ are held against: the pins of the project and the parser of its jobs."""

import argparse
import re
import tomllib
from pathlib import Path

from pipeline.command import _parser

ROOT = Path(__file__).parents[2]


def pinned(package: str) -> str:
    """The one version that constraints.txt allows."""
    text = (ROOT / "constraints.txt").read_text()
    (version,) = re.findall(rf"^{re.escape(package)}==(\S+)$", text, re.MULTILINE)
    return version


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def parse_command(words: list[str]) -> tuple[Path, argparse.Namespace]:
    """The job and its flags of `python /app/jobs/x.py …`; paths of the image become those of the repository."""
    python, script, *flags = (re.sub(r"^/app/", f"{ROOT}/", word) for word in words)
    assert python == "python"
    path = ROOT / script
    assert path.is_file(), f"{script} does not exist"
    return path, _parser("").parse_args(flags)
