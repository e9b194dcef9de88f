from pathlib import Path

from pipeline.io.storage import open_storage
from tests.jobs.nightly import run_job


def files_below(root: Path) -> dict[str, bytes]:
    storage = open_storage(str(root))
    return {info.key: storage.read(info.key) for info in storage.list() if not info.key.endswith("manifest.json")}


def test_the_log_is_simulated_once_and_the_same_everywhere(tmp_path):
    made = run_job("simulate_log", str(tmp_path / "a"))
    assert made.code == 0
    assert made.last_line["status"] == "made"
    assert made.last_line["days"] == 10
    assert list(Path(made.last_line["uri"]).glob("items-*.parquet"))
    again = run_job("simulate_log", str(tmp_path / "a"))
    assert again.last_line["status"] == "exists"
    assert again.last_line["uri"] == made.last_line["uri"]
    run_job("simulate_log", str(tmp_path / "b"))
    assert files_below(tmp_path / "a") == files_below(tmp_path / "b")
    assert len(files_below(tmp_path / "a")) == 11
