"""Strict configuration: turn YAML and `--set a.b=c` into frozen pydantic models; one error lists all faults."""

import difflib
import hashlib
import json
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin
from zoneinfo import ZoneInfo

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from pipeline.errors import InputError

MAX_CONFIG_BYTES = 1 << 20
DAY = re.compile(r"\d{4}-\d{2}-\d{2}")


class Config(BaseModel):
    """A part of the configuration: frozen, strictly typed, without unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


def _known_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (OSError, ValueError, KeyError):  # not there; not a name; ZoneInfoNotFoundError
        raise ValueError(f"{name!r} is no time zone that this machine knows; give one like 'Europe/Berlin'") from None
    return name


TimeZone = Annotated[str, AfterValidator(_known_zone)]

ConfigT = TypeVar("ConfigT", bound=Config)


class _Loader(yaml.SafeLoader):
    """Reads plain values. Refuses aliases, which can blow up a small file, and a key that is given twice."""

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


# PyYAML follows YAML 1.1, which reads 1e-3 as text; people mean the number.
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

    Raises InputError that lists every fault with its key and, for a misspelt key, the nearest known key.
    """
    return validate(model, apply_overrides(read_yaml(path), overrides), origin=str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping at the top of a YAML file; an empty file gives an empty mapping. Raises InputError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such configuration file; {_nearby_files(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from None
    if len(text) > MAX_CONFIG_BYTES:
        raise InputError(f"{path}: {len(text)} characters is no configuration; at most {MAX_CONFIG_BYTES} are read")
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
    """Copy `values` and set each `a.b=value` in the copy; the value is read as YAML. Raises InputError."""
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
        section = changed
        for key in keys[:-1]:
            section = section.setdefault(key, {})
            if not isinstance(section, dict):
                raise InputError(f"--set {override!r}: {key!r} holds a value, not a section")
        section[keys[-1]] = value
    return changed


def validate(model: type[ConfigT], values: Mapping[str, Any], origin: str) -> ConfigT:
    """Build `model` from plain values. Raises one InputError that begins with `origin` and lists every fault."""
    try:
        return model.model_validate(_copy(values))
    except ValidationError:
        faults = _find_faults(model, _copy(values))
    lines = [f"  {key}: {fault}" if key else f"  {fault}" for key, fault in faults]
    count = f"{len(lines)} fault{'s' if len(lines) > 1 else ''}"
    raise InputError("\n".join([f"{origin}: {count} in the configuration", *lines]))


def _find_faults(model: type[BaseModel], values: dict[str, Any]) -> list[tuple[str, str]]:
    """List the faults in order of key: the key `a.b` ("" for a rule over several keys), and what is wrong with it.

    pydantic checks a rule over several keys only when each of them is sound. So the faulty keys are removed from
    `values`, which sets them to their defaults, and the rest is checked again until no new fault comes up.
    """
    messages: dict[str, str] = {}
    while True:
        try:
            model.model_validate(values)
            break
        except ValidationError as failure:
            # a default that depends on a faulty key is no fault of its own
            errors = [e for e in failure.errors(include_url=False) if e["type"] != "default_factory_not_called"]
        new = {_key(error): _describe(model, error) for error in errors if _key(error) not in messages}
        # a rule of a section that lacks a removed key would say what is not true
        messages |= {key: text for key, text in new.items() if not (key and _is_within(messages, key))}
        removed = [_drop(values, error["loc"]) for error in errors]
        if not new or not any(removed):
            break
    # A validator that finds several faults raises one ValueError with a line for each.
    return [(key, line) for key, message in sorted(messages.items()) for line in message.splitlines()]


def _is_within(keys: Iterable[str], section: str) -> bool:
    return any(key.startswith(f"{section}.") for key in keys)


def fingerprint(*parts: object) -> str:
    """Hash the parts, Config models or anything that JSON can hold, into 16 hex digits."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def parse_day(text: str, name: str) -> date:
    """Read a calendar day, written YYYY-MM-DD. Raises InputError that begins with `name`, the flag or argument."""
    try:
        if DAY.fullmatch(text):
            return date.fromisoformat(text)
    except ValueError:
        pass
    raise InputError(f"{name} {text!r}: give a day as YYYY-MM-DD, for example 2026-11-20")


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message: `; did you mean 'x'?`, or all known words when none of them is near."""
    names = sorted(known)
    same = [name for name in names if _letters(name) == _letters(word)]
    if same:
        return f"; did you mean {same[0]!r}?"
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"


def _letters(word: str) -> str:
    """The word without case, spaces, hyphens and underscores: UserID, user_id and ' User Id' are alike."""
    return re.sub(r"[\W_]", "", word).casefold()


def _describe(model: type[BaseModel], error: ErrorDetails) -> str:
    """Say in one line what is wrong with the key of this error; the key itself is not repeated."""
    path = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden":
        section = next(_models_in(_type_at(model, path[:-1])), None)
        return "unknown key" + (nearest(path[-1], section.model_fields) if section else "")
    if error["type"] == "missing":
        return "this key is required"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message
    given = json.dumps(error["input"], default=str, ensure_ascii=False)
    hint = nearest(str(error["input"]), _choices_in(_type_at(model, path))) if error["type"] == "literal_error" else ""
    return f"{message[0].lower()}{message[1:]}, not {given[:80]}{hint}"


def _key(error: ErrorDetails) -> str:
    return ".".join(str(part) for part in error["loc"])


def _type_at(model: type[BaseModel], path: Sequence[str]) -> Any:
    """The declared type of the field at `path`; None when there is no such field."""
    declared: Any = model
    for name in path:
        section = next(_models_in(declared), None)
        if section is not None:  # else `name` is a position in a list or a key of a dict
            declared = section.model_fields[name].annotation if name in section.model_fields else None
    return declared


def _parts_of(declared: Any) -> Iterator[Any]:
    """The type and all types inside it: `tuple[Literal["a"], ...] | None` contains a Literal."""
    yield declared
    for part in get_args(declared):
        yield from _parts_of(part)


def _models_in(declared: Any) -> Iterator[type[BaseModel]]:
    return (part for part in _parts_of(declared) if isinstance(part, type) and issubclass(part, BaseModel))


def _choices_in(declared: Any) -> list[str]:
    literals = (part for part in _parts_of(declared) if get_origin(part) is Literal)
    return [str(choice) for literal in literals for choice in get_args(literal)]


def _drop(values: dict[str, Any], location: tuple[int | str, ...]) -> bool:
    """Remove the key at `location`, or the list or value that holds it; False when nothing was given there."""
    section: Any = values
    for depth, part in enumerate(location):
        if not isinstance(section, dict) or part not in section:
            return False
        inner = section[part]
        if depth == len(location) - 1 or not isinstance(inner, dict):
            del section[part]
            return True
        section = inner
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
