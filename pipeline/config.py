"""Strict configuration: YAML and `--set a.b=c` into frozen pydantic models, all faults in one message."""

import difflib
import hashlib
import json
import re
from collections.abc import Hashable, Iterable, Mapping
from datetime import date
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from pipeline.errors import InputError

MAX_CONFIG_BYTES = 1 << 20
DAY = re.compile(r"\d{4}-\d{2}-\d{2}")


class Config(BaseModel):
    """A part of the configuration: frozen, strictly typed, an unknown key is refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


ConfigT = TypeVar("ConfigT", bound=Config)


class _Loader(yaml.SafeLoader):
    """Plain values only. No aliases, which can blow up a small file, and no key twice, of which one would be lost."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            problem = "aliases (*name) are not read here; write the value out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"the key {key.value!r} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e-3 for a word; everybody else takes it for a number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse_yaml(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date such as 2026-02-30
        mark = getattr(error, "problem_mark", None)
        problem = (
            f"{getattr(error, 'problem', error)} (line {mark.line + 1}, column {mark.column + 1})" if mark else error
        )
        raise InputError(f"not valid YAML: {problem}") from None


def load_config(model: type[ConfigT], path: Path, overrides: Iterable[str] = ()) -> ConfigT:
    """Read a YAML file, apply `a.b=value` overrides, and validate.

    Raises InputError that lists every fault with its key and, for a misspelt one, the nearest known key.
    """
    return validate(model, apply_overrides(read_yaml(path), overrides), origin=str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping at the top of a YAML file; an empty file is an empty mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such configuration file; {_nearby_files(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from None
    if len(text) > MAX_CONFIG_BYTES:
        raise InputError(f"{path}: {len(text)} bytes is no configuration; at most {MAX_CONFIG_BYTES} are read")
    try:
        loaded = _parse_yaml(text)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: the top of the file must be a mapping of keys, not a {type(loaded).__name__}")
    return loaded


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `values` with each `a.b=value` set; the value is read as YAML."""
    changed: dict[str, Any] = _copy(values)
    for override in overrides:
        dotted, equals, text = override.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            raise InputError(f"--set {override!r}: write --set section.key=value")
        try:
            value = _parse_yaml(text)
        except InputError as error:
            raise InputError(f"--set {override!r}: the value is {error}") from None
        place = changed
        for key in keys[:-1]:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise InputError(f"--set {override!r}: {key!r} holds a value, not a section")
        place[keys[-1]] = value
    return changed


def validate(model: type[ConfigT], values: Mapping[str, Any], origin: str) -> ConfigT:
    """Build `model` from plain values, or raise one InputError that names every fault.

    A rule over several keys can only be checked once each key is sound, so faulty keys are set back to their
    defaults and the rest is checked again until nothing new comes up.
    """
    faults: dict[str, str] = {}
    remaining = _copy(values)
    while True:
        try:
            config = model.model_validate(remaining)
        except ValidationError as failure:
            errors = failure.errors(include_url=False)
            new = {_key(error): _describe(model, error) for error in errors if _key(error) not in faults}
            faults |= new
            dropped = [_drop(remaining, error["loc"]) for error in errors]
            if not new or not any(dropped):
                break
        else:
            if not faults:
                return config
            break
    lines = "\n".join(f"  {key}: {text}" if key else f"  {text}" for key, text in sorted(faults.items()))
    raise InputError(f"{origin}: {len(faults)} fault{'s' if len(faults) > 1 else ''} in the configuration\n{lines}")


def fingerprint(*parts: object) -> str:
    """16 hex digits that stand for the parts: Config models, or anything JSON can hold."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def parse_day(text: str, name: str) -> date:
    """A real calendar day, written YYYY-MM-DD. Raises InputError that begins with `name`."""
    try:
        if DAY.fullmatch(text):
            return date.fromisoformat(text)
    except ValueError:
        pass
    raise InputError(f"{name} {text!r}: give a day as YYYY-MM-DD, for example 2026-11-20")


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the known words when none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"


def _describe(model: type[BaseModel], error: ErrorDetails) -> str:
    parts = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden":
        parent = _model_at(model, parts[:-1])
        return "unknown key" + (nearest(parts[-1], parent.model_fields) if parent else "")
    if error["type"] == "missing":
        return "this key is required"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message
    given = json.dumps(error["input"], default=str, ensure_ascii=False)
    hint = nearest(str(error["input"]), _choices(error)) if error["type"] == "literal_error" else ""
    return f"{message[0].lower()}{message[1:]}, not {given[:80]}{hint}"


def _choices(error: ErrorDetails) -> list[str]:
    expected = str(error.get("ctx", {}).get("expected", ""))
    return [word.strip(" '\"") for word in expected.replace(" or ", ",").split(",") if word.strip()]


def _key(error: ErrorDetails) -> str:
    return ".".join(str(part) for part in error["loc"])


def _model_at(model: type[BaseModel], path: list[str]) -> type[BaseModel] | None:
    for name in path:
        field = model.model_fields.get(name)
        found = _models_in(field.annotation) if field else []
        if not found:
            return None
        model = found[0]
    return model


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, dict, tuple, list):
        return [model for part in get_args(annotation) for model in _models_in(part)]
    return []


def _drop(values: dict[str, Any], location: tuple[int | str, ...]) -> bool:
    """Remove the deepest given key on the way to `location`, so that its default is tried instead."""
    place: Any = values
    for depth, part in enumerate(location):
        if not isinstance(place, dict) or part not in place:
            return False
        inner = place[part]
        if depth == len(location) - 1 or not isinstance(inner, dict):
            del place[part]
            return True
        place = inner
    return False


def _copy(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {key: _copy(value) for key, value in values.items()}
    return list(values) if isinstance(values, list) else values


def _nearby_files(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("conf")
    names = sorted(str(p) for p in folder.glob("*.yaml")) if folder.is_dir() else []
    close = difflib.get_close_matches(str(path), names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    return f"there are: {', '.join(names)}" if names else "name an existing file with --config"
