"""What a person writes is checked whole, before anything starts, and answered with the way out."""

import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.config import MAX_CONFIG_BYTES, apply_overrides, fingerprint, load_config, nearest, read_yaml, validate
from pipeline.errors import InputError
from pipeline.settings import Settings, default_root

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "conf").glob("*.yaml"))
REQUIRED = {"explain.py": ("--user", "u")}
PROGRAMS = sorted(path for path in (ROOT / "jobs").glob("*.py") if path.name != "__init__.py")
JOBS = [
    path for path in PROGRAMS if path.name not in ("study.py", "compare.py", "init_source.py")
]  # with a configuration


def fault(values: dict, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        validate(Settings, apply_overrides(values, overrides), origin="mine.yaml")
    return str(caught.value)


def settings(*overrides: str) -> Settings:
    return validate(Settings, apply_overrides({}, overrides), origin="test")


def test_every_default_fits_every_other():
    assert settings().search.k == 100


def test_settings_are_frozen():
    with pytest.raises(ValidationError):
        settings().search.k = 5


def test_settings_survive_the_way_to_another_process():
    given = settings("search.k=7", "simulate.last_day=2026-11-19")
    assert pickle.loads(pickle.dumps(given)) == given  # noqa: S301
    assert Settings.model_validate(given.model_dump()) == given
    assert Settings.model_validate_json(given.model_dump_json()) == given


# Unknown keys and words


def test_a_misspelt_key_is_refused_with_the_nearest_one():
    assert fault({"serch": {"k": 5}}) == (
        "mine.yaml: 1 fault in the configuration\n  serch: unknown key; did you mean 'search'?"
    )
    assert "search.methd: unknown key; did you mean 'method'?" in fault({"search": {"methd": "exact"}})
    assert "model.mol.temprature: unknown key; did you mean 'temperature'?" in fault({}, "model.mol.temprature=0.1")


def test_a_key_that_resembles_nothing_is_answered_with_all_that_exist():
    assert "split.zzz: unknown key; known: method, test_days, validation_days" in fault({"split": {"zzz": 1}})


def test_an_unknown_word_is_answered_with_the_known_ones():
    message = fault({"search": {"method": "exakt"}})
    assert "search.method" in message
    assert "did you mean 'exact'?" in message


def test_an_override_is_checked_like_a_line_of_the_file():
    assert "search.kk: unknown key" in fault({}, "search.kk=5")


# Wrong types


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("search.k=ten", 'search.k: input should be a valid integer, not "ten"'),
        ("search.k='10'", 'search.k: input should be a valid integer, not "10"'),
        ("search.k=10.0", "search.k: input should be a valid integer"),
        ("search.k=true", "search.k: input should be a valid integer"),
        ("search.k=null", "search.k: input should be a valid integer"),
        ("search.k=0", "search.k: input should be greater than 0, not 0"),
        ("search.k=-3", "search.k: input should be greater than 0, not -3"),
        ("search=5", "search: input should be a valid dictionary"),
        ("train.use_gpu=1", "train.use_gpu: input should be a valid boolean"),
        ("model.dropout=1.0", "model.dropout: input should be less than 1"),
        ("prepare.max_bad_share=1.5", "prepare.max_bad_share: input should be less than or equal to 1"),
        ("train.learning_rate=.nan", "train.learning_rate: input should be a finite number"),
        ("train.weight_decay=.inf", "train.weight_decay: input should be a finite number"),
        ("root=''", "root: string should have at least 1 character"),
        ("evaluate.cutoffs=[]", "evaluate.cutoffs"),
        ("evaluate.cutoffs=[10, 0]", "evaluate.cutoffs.1: input should be greater than 0, not 0"),
        ("simulate.last_day=yesterday", "simulate.last_day"),
        ("model.positions=end", "model.positions: "),
        ("memory.weights=[1, -2]", "memory.weights.1: input should be greater than or equal to 0, not -2"),
        ("memory.weights=[]", "memory.weights: "),
        ("memory.scales=[0.0]", "memory.scales.0: input should be greater than or equal to 0.000001, not 0.0"),
        ("memory.max_items=0", "memory.max_items: input should be greater than 0, not 0"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(override, expected):
    assert expected in fault({}, override)


def test_a_whole_number_serves_where_a_fraction_is_asked():
    assert settings("model.mol.temperature=1").model.mol.temperature == 1.0


def test_a_number_may_be_written_with_an_exponent():
    assert settings("train.learning_rate=1e-3").train.learning_rate == 0.001
    assert settings("train.learning_rate=2.5E-4").train.learning_rate == 0.00025
    assert settings("name=1e3x").name == "1e3x"


def test_a_day_may_be_written_plain_or_quoted():
    assert settings("simulate.last_day=2026-11-19") == settings("simulate.last_day='2026-11-19'")


# Rules over several keys


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["search.method=topk_avg", "search.num_preselected=50"],
            "search.num_preselected (50) must be at least search.k (100)",
        ),
        (["model.dim=65"], "model.dim (65) must be a multiple of model.num_heads (2)"),
        (
            ["model.positions=relative"],
            "model.positions (relative) means nothing to model.encoder sasrec; it takes start",
        ),
        (
            ["model.encoder=bag", "model.positions=both"],
            "model.positions (both) means nothing to model.encoder bag; it takes none",
        ),
        (
            ["model.encoder=ligr", "model.reads_times=true"],
            "model.reads_times (true) means nothing to model.encoder ligr; set it to false, or take hstu",
        ),
        (
            ["search.method=topk_per_embd", "search.num_per_embd=3"],
            "search.num_per_embd (3) times 32 pairs of components must be at least search.k (100)",
        ),
        (
            ["train.num_workers=9"],
            "train.num_workers (9) must be at most output.num_buckets (8): each worker trains on buckets of its own",
        ),
        (["cluster.gpus_per_actor=1.5"], "1.5: give a share of one GPU, or a whole number of GPUs"),
        (
            ["model.mol.num_user_hashes=10", "model.mol.num_query_components=1"],
            "mol.num_query_components must be at least 2",
        ),
        (["log.source=default"], "give log.uri with every log.source but 'simulated'"),
        (["log.uri=/data/log"], "give log.uri with every log.source but 'simulated'"),
        (
            ["simulate.num_items=128"],
            "train.num_negatives (128) must be less than the number of items (simulate.num_items: 128)",
        ),
        (["search.k=3000"], "search.k (3000) must be at most the number of items (simulate.num_items: 2000)"),
        (
            ["simulate.num_days=2"],
            "split.validation_days + split.test_days (2) must leave days of simulate.num_days (2)",
        ),
        (["name=My Table"], "'My Table': lower-case letters, digits"),
        (["name=../../etc"], "'../../etc': lower-case letters, digits"),
    ],
)
def test_an_impossible_combination_is_refused(overrides, expected):
    assert expected in fault({}, *overrides)


@pytest.mark.parametrize("method", ["exact", "tuned"])
def test_preselection_may_be_smaller_than_k_where_no_setting_says_how_much_is_preselected(method):
    assert settings("search.num_preselected=50", f"search.method={method}").search.num_preselected == 50


def test_days_of_the_split_do_not_matter_when_the_last_event_is_left_out():
    assert settings("simulate.num_days=2", "split.method=leave_one_out").simulate.num_days == 2


# All faults in one message


def test_all_faults_come_in_one_message_each_on_its_line():
    message = fault(
        {"serch": {}, "search": {"k": "x", "method": "exakt"}, "train": {"num_negatives": 5000}, "name": "No"},
        "model.dim=65",
    )
    lines = message.splitlines()
    assert lines[0] == "mine.yaml: 6 faults in the configuration"
    for start in (
        "name:",
        "search.k:",
        "search.method:",
        "serch:",
        "model: model.dim (65)",
        "train.num_negatives (5000)",
    ):
        assert sum(line.strip().startswith(start) for line in lines) == 1, (start, message)


def test_a_default_that_depends_on_a_faulty_key_is_no_second_fault():
    assert fault({}, "model.encoder=hst").splitlines()[0] == "mine.yaml: 1 fault in the configuration"
    assert fault({}, "model.encoder=bag", "model.dim=-1").splitlines()[1:] == [
        "  model.dim: input should be greater than 0, not -1"
    ]


def test_two_impossible_combinations_are_both_told():
    first_line, *faults = fault({}, "simulate.num_items=50").splitlines()
    assert first_line == "mine.yaml: 2 faults in the configuration"
    assert [line.split(" (")[0] for line in faults] == ["  train.num_negatives", "  search.k"]


# The file


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_a_file_and_overrides_make_the_settings(tmp_path):
    path = write(tmp_path, "search:\n  k: 20\n  num_per_embd: 64\n")
    loaded = load_config(Settings, path, ["search.k=30", "name=books"])
    assert (loaded.search.k, loaded.search.num_per_embd, loaded.name) == (30, 64, "books")


def test_an_empty_file_means_all_defaults(tmp_path):
    assert load_config(Settings, write(tmp_path, "# nothing\n")) == settings()


def test_a_missing_file_is_answered_with_what_is_there(tmp_path):
    write(tmp_path, "")
    with pytest.raises(InputError, match=r"no such configuration file; did you mean .*mine\.yaml\?"):
        read_yaml(tmp_path / "mime.yaml")
    with pytest.raises(InputError, match=r"there are: .*mine\.yaml"):
        read_yaml(
            tmp_path / "zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz"
        )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n- b\n", "the top of the file must be a mapping of keys, not a list"),
        ("just words", "must be a mapping of keys, not a str"),
        ("search: {k: 5", "not valid YAML"),
        ("search: {k: 5}\nsearch: {k: 6}\n", r"the key 'search' is given twice \(line 2, column 1\)"),
        ("search: {k: 5, k: 6}", "the key 'k' is given twice"),
        ("search: &one {k: 5}\nmodel: *one", r"aliases \(\*name\) are not read here"),
        ("day: 2026-02-30", "day is out of range"),
        ("[a]: 5", "unhashable key"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("[" * 3_000, "not valid YAML"),
        ("a: " + "x" * MAX_CONFIG_BYTES, "is no configuration"),
    ],
    ids=["list", "words", "unclosed", "twice", "twice inside", "alias", "date", "key", "code", "deep", "large"],
)
def test_what_is_no_configuration_is_refused(tmp_path, text, expected):
    with pytest.raises(InputError, match=expected):
        read_yaml(write(tmp_path, text))


def test_a_file_that_is_no_text_or_no_file_is_refused(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "binary.yaml", tmp_path):
        with pytest.raises(InputError, match="cannot be read as text"):
            read_yaml(path)


def test_aliases_that_would_fill_the_memory_are_refused_at_once(tmp_path):
    """Thirty lines of `b: &b {x: *a, y: *a}` are 2^30 mappings once they are copied or printed."""
    names = [f"n{i}" for i in range(30)]
    bomb = "n0: &n0 {x: 1}\n" + "".join(f"{b}: &{b} {{x: *{a}, y: *{a}}}\n" for a, b in itertools.pairwise(names))
    with pytest.raises(InputError, match="aliases"):
        load_config(Settings, write(tmp_path, bomb))


# Overrides


@pytest.mark.parametrize("override", ["search.k", "=5", "search..k=5", ".k=5", "search.=5", ""])
def test_an_override_without_key_or_value_is_refused(override):
    with pytest.raises(InputError, match=r"write --set section\.key=value"):
        apply_overrides({}, [override])


def test_an_override_below_a_value_or_with_broken_yaml_is_refused():
    with pytest.raises(InputError, match="'name' holds a value, not a section"):
        apply_overrides({"name": "x"}, ["name.first=y"])
    with pytest.raises(InputError, match="the value is not valid YAML"):
        apply_overrides({}, ["evaluate.cutoffs=[1, 2"])


KEY = st.text("abcdefghij_", min_size=1, max_size=6)
VALUE = st.one_of(st.integers(), st.booleans(), st.text("xyz 123", max_size=6), st.lists(st.integers(), max_size=3))
TREE = st.dictionaries(KEY, st.one_of(VALUE, st.dictionaries(KEY, VALUE, max_size=3)), max_size=4)


def flat(tree: dict, prefix: str = "") -> dict[str, object]:
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


@given(tree=TREE, section=KEY, key=KEY, value=VALUE)
def test_an_override_sets_its_key_and_touches_nothing_else(tree, section, key, value):
    before = yaml.safe_dump(tree)
    given_section = tree.get(section, {})
    override = f"{section}.{key}={yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10)).strip()}"
    if not isinstance(given_section, dict):
        with pytest.raises(InputError, match="holds a value"):
            apply_overrides(tree, [override])
        return
    changed = apply_overrides(tree, [override])
    assert changed[section][key] == value
    assert type(changed[section][key]) is type(value)
    del changed[section][key]
    expected = flat(tree)
    expected.pop(f"{section}.{key}", None)
    assert flat(changed) == expected
    assert yaml.safe_dump(tree) == before, "the mapping that was given is left as it was"


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_of_several_overrides_of_one_key_the_last_holds(numbers):
    assert apply_overrides({}, [f"a.b={n}" for n in numbers]) == {"a": {"b": numbers[-1]}}


# Root and fingerprint


def test_the_root_is_the_environments_or_a_folder_here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIGHTRAILS_ROOT", "s3://bucket/prefix")
    assert settings().root == "s3://bucket/prefix"
    monkeypatch.delenv("NIGHTRAILS_ROOT")
    assert settings().root == str(tmp_path / "nightrails-data")


def test_inside_a_package_that_ray_unpacked_the_root_is_at_home(monkeypatch, tmp_path):
    package = tmp_path / "session" / "_ray_pkg_0123" / "work"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    monkeypatch.delenv("NIGHTRAILS_ROOT", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_root() == str(tmp_path / "home" / "nightrails-data")


def test_a_fingerprint_depends_on_values_and_not_on_the_order_of_keys():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint(settings().search) == fingerprint(settings("search.k=100").search)
    assert fingerprint(settings().search) != fingerprint(settings("search.k=99").search)
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    assert len(fingerprint()) == 16


def test_nearest_names_one_word_or_all():
    assert nearest("exakt", ["exact", "topk_avg"]) == "; did you mean 'exact'?"
    assert nearest("q", ["b", "a"]) == "; known: a, b"


# What is shipped


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_configuration_is_valid(path):
    load_config(Settings, path)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_help_comes_at_once_because_it_needs_the_standard_library_only(path):
    """-S leaves out all installed packages; what takes seconds to import is among them."""
    done = subprocess.run(
        [sys.executable, "-S", path, "--help"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if path in JOBS:
        assert "--config" in done.stdout
        assert "exit codes:" in done.stdout


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_every_job_answers_a_misspelt_key_with_20(path):
    done = subprocess.run(
        [sys.executable, path, "--set", "serch.k=5", *REQUIRED.get(path.name, ())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 20
    assert "serch: unknown key; did you mean 'search'?" in done.stderr


@pytest.mark.parametrize(
    ("lookback", "seen", "types", "read"),
    [(None, None, None, None), (None, 10, None, None), (10, None, None, None), (10, 20, None, 20), (20, 10, None, 20),
     (10, 20, [], 10), (10, None, [], 10), (10, 20, ["buy"], 20)],
)  # fmt: skip
def test_the_days_that_are_read_are_those_to_learn_from_and_those_that_hide(lookback, seen, types, read):
    prepare = {"lookback_days": lookback, "seen_lookback_days": seen, "seen_event_types": types}
    assert Settings.model_validate({"prepare": prepare}).prepare.days_read == read


def test_a_rule_of_a_section_with_a_wrong_key_is_not_told_of():
    """Without `uri`, which is wrong, the rule that it goes with `source` would say what is not true."""
    with pytest.raises(InputError, match="1 fault") as error:
        validate(Settings, {"log": {"uri": ["a", "b"], "source": "default"}}, "test")
    assert "log.uri: input should be a valid string" in str(error.value)


@pytest.mark.parametrize(("given", "meant"), [("User_ID", "user_id"), (" userid ", "user_id"), ("item-id", "item_id")])
def test_case_and_spaces_do_not_hide_the_name_that_was_meant(given, meant):
    assert nearest(given, ["event_ts", "item_id", "user_id"]) == f"; did you mean {meant!r}?"


@pytest.mark.parametrize("zone", ["Mars/Olympus", "", "../etc"])
def test_an_unknown_time_zone_is_refused(zone):
    with pytest.raises(InputError, match="is no time zone that this machine knows"):
        validate(Settings, {"log": {"time_zone": zone}}, "test")
