"""The image: what it is made of, and that it runs as nobody in particular."""

import fnmatch
import re

from tests.infra.facts import ROOT, parse_command, pinned, project

TEXT = (ROOT / "infra" / "Dockerfile").read_text()
LINES = [line for line in TEXT.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]


def instructions(name: str, lines: list[str] = LINES) -> list[str]:
    return [line.removeprefix(name).strip() for line in lines if line.startswith(f"{name} ")]


def test_the_base_is_pinned_to_a_python_that_the_project_takes():
    assert re.findall(r"^FROM (\S+)", TEXT, re.MULTILINE) == ["${BASE}", "${BASE}"]
    base = next(text for text in instructions("ARG") if text.startswith("BASE="))
    match = re.fullmatch(r"BASE=python:(\d+\.\d+)\.\d+-slim-\w+", base)
    assert match, "a full version and a named Debian release"
    assert project()["requires-python"] == f">={match[1]}"


def test_it_does_not_run_as_root():
    assert instructions("USER") == ["10001:10001"], "by number: Kubernetes cannot check a name"
    assert LINES.index("USER 10001:10001") > max(n for n, line in enumerate(LINES) if line.startswith("COPY"))


def test_every_package_is_a_locked_one():
    installs = [
        command.strip() for line in instructions("RUN") for command in line.split("&&") if "pip install" in command
    ]
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in command for command in installs)
    for package in ("torch", "ray", "pyarrow"):
        assert f"=={pinned(package)}" in next(d for d in project()["dependencies"] if d.startswith(package))


def test_the_runtime_stage_installs_nothing():
    runtime = LINES[max(n for n, line in enumerate(LINES) if line.startswith("FROM")) :]
    words = " ".join(runtime)
    for word in ("apt-get", "pip install", "curl", "wget", "gcc", "build-essential"):
        assert word not in words
    assert "RAY_AUTH_MODE=token" in words


def test_everything_that_is_copied_exists_and_is_sent_to_the_builder():
    ignore = [line for line in (ROOT / "infra" / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    sent = {line.removeprefix("!") for line in ignore}
    copied = {source for copy in instructions("COPY") if not copy.startswith("--from") for source in copy.split()[:-1]}
    assert copied == sent
    for name in copied - {"README.md"}:
        assert (ROOT / name).exists(), name


def test_no_secret_can_be_baked_in():
    assert not any(fnmatch.fnmatch(line, pattern) for line in LINES for pattern in ("*AWS_*", "*TOKEN=*", "*PASSWORD*"))


def test_its_default_command_is_one_that_the_job_takes():
    (command,) = instructions("CMD")
    words = command.strip("[]").replace('"', "").split(", ")
    assert words[-1] == "--help"
    script, _ = parse_command(words[:-1])
    assert script.name == "nightly_candidates.py"
