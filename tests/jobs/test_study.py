"""The door to the studies: python jobs/study.py."""

import subprocess
import sys
from pathlib import Path

import pytest

from jobs import study

SCRIPT = Path(study.__file__)
WITHOUT_TORCH = (
    "import runpy, sys; sys.modules['torch'] = sys.modules['ray'] = None; "  # an import of either would fail
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def test_every_file_with_a_main_is_a_study_and_every_study_has_one():
    files = {path for path in study.FOLDER.glob("*/*.py") if "\ndef main(" in path.read_text()}
    modules = {".".join(path.relative_to(study.FOLDER).with_suffix("").parts) for path in files}
    assert modules - {"search.memory"} == {
        each.module for each in study.STUDIES.values()
    }  # its main is a child process


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in study.STUDIES)], ids=" ".join)
def test_help_answers_without_torch_or_ray(words: list[str]):
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, SCRIPT, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    docstrings = {name: each.docstring for name, each in study.STUDIES.items()}
    for line in docstrings[words[0]].splitlines() if words[0] in docstrings else docstrings:
        assert line in done.stdout


def test_an_unknown_name_is_refused_with_a_suggestion(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        study.main(["serch"])
    assert "no study is called 'serch'; did you mean 'search'?" in capsys.readouterr().err


def test_bad_input_ends_with_what_to_do_and_without_a_traceback(tmp_path: Path):
    with pytest.raises(SystemExit, match="study dtypes: no model is called 'warm': give SET/WAY/SEED"):
        study.main(["dtypes", "warm", "--data", str(tmp_path)])
