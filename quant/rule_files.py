"""Reading rule tables: TOML with a closed schema, described in docs/rules.md.

Whatever is not understood is refused with the file, the rule's number and what would have been right: a rule that is
silently ignored would cost quality unseen.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

from gguforge.quant.errors import InputError
from gguforge.quant.layer_sets import parse_layer_set
from gguforge.quant.overrides import parse_type
from gguforge.quant.presets import PRESETS
from gguforge.quant.rule_tables import Rule, RuleTable, Situation, Target, Test

FORMAT = 1
FROZEN = "llama.cpp"
BUILT_IN = ("modern",)

TABLE_KEYS = frozenset({"format", "name", "description", "otherwise", "roles", "rule"})
RULE_KEYS = frozenset({"role", "match", "layers", "when", "presets", "type", "at_least", "at_most", "reason"})
COUNTS: dict[str, Callable[[Situation], int]] = {
    "experts": lambda s: s.model.experts,
    "gqa": lambda s: s.model.gqa,
    "layers": lambda s: s.model.layers,
}
FLAGS: dict[str, Callable[[Situation], bool]] = {"tied": lambda s: s.tied, "importance": lambda s: s.importance}
CONDITIONS = frozenset({*COUNTS, *FLAGS, "architecture"})
COMPARISONS = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt,
}  # fmt: skip


def find_rules(name: str) -> RuleTable | None:
    """A table by the name of a built-in one or by its file; None for llama.cpp's own rules, which are code.

    Raises:
        InputError: no such table, or a file that is damaged or not understood.
    """
    if name == FROZEN:
        return None
    if name in BUILT_IN:
        return read_rules(rules_text(name), name)
    try:
        text = Path(name).read_text(encoding="utf-8")
    except FileNotFoundError:
        remedy = f"Give a file, or one of: {', '.join((FROZEN, *BUILT_IN))}."
        raise InputError("no such rules", path=name, remedy=remedy) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"rules cannot be read: {error}", path=name) from None
    return read_rules(text, name)


def rules_text(name: str) -> str:
    """The text of a built-in table, to copy and edit.

    Raises:
        InputError: no such table.
    """
    if name not in BUILT_IN:
        remedy = f"Tables: {', '.join(BUILT_IN)}. The rules of llama.cpp are code; docs/rules.md tells what they do."
        raise InputError(f"{name!r} is no built-in table", remedy=remedy)
    return (resources.files("gguforge.quant") / f"{name}.toml").read_text(encoding="utf-8")


def read_rules(text: str, path: str) -> RuleTable:
    """A table from its text; `path` names it in errors.

    Raises:
        InputError: it is no TOML, or breaks the schema.
    """
    import tomllib  # most runs read no table

    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"rules are no TOML: {error}", path=path) from None
    table = Section(data, path)
    if table.take("format", int) != FORMAT:
        table.fail("format is not understood", expected=FORMAT, found=data["format"])
    table.only(TABLE_KEYS)
    roles = Section(table.take("roles", dict, {}), path, "roles: ")
    patterns = {role: roles.pattern(role) for role in roles.data}
    otherwise = table.take("otherwise", str, FROZEN)
    if otherwise not in (FROZEN, "base"):
        table.fail("otherwise is not understood", expected=f"{FROZEN!r} or 'base'", found=repr(otherwise))
    table.take("description", str, "")
    rules = table.take("rule", list, [])
    read = tuple(_rule(number, rule, patterns, path) for number, rule in enumerate(rules, 1))
    return RuleTable(table.take("name", str), read, plain=otherwise == "base")


@dataclass(frozen=True)
class Section:
    """A TOML table with its place, for errors."""

    data: Mapping[str, Any]
    path: str
    place: str = ""

    def fail(self, what: str, **more: Any) -> NoReturn:
        """Refuse the file."""
        raise InputError(self.place + what, path=self.path, **more)

    def only(self, known: frozenset[str]) -> None:
        """Refuse keys that are not in the schema."""
        for key in self.data.keys() - known:
            near = get_close_matches(key, known, 1, 0.5)
            remedy = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(sorted(known))}."
            self.fail(f"unknown key {key!r}", remedy=remedy)

    def take(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of the right kind, or the default; without a default, the key is required."""
        if key not in self.data and default is not None:
            return default
        if key not in self.data:
            self.fail(f"{key} is missing")
        value = self.data[key]
        if type(value) is not kind:
            self.fail(f"{key} has the wrong kind", expected=kind.__name__, found=type(value).__name__)
        return value

    def words(self, key: str) -> tuple[str, ...]:
        """A word or a list of words."""
        value = self.data[key]
        words = value if isinstance(value, list) else [value]
        if not words or not all(isinstance(word, str) for word in words):
            self.fail(f"{key} has the wrong kind", expected="a text or a list of texts", found=repr(value))
        return tuple(words)

    def pattern(self, key: str) -> re.Pattern[str]:
        """A regular expression."""
        text = self.take(key, str)
        try:
            return re.compile(text)
        except re.error as error:
            self.fail(f"{key} is no regular expression: {error}")


def _rule(number: int, data: Any, roles: Mapping[str, re.Pattern[str]], path: str) -> Rule:
    """One rule."""
    rule = Section(data if isinstance(data, dict) else {}, path, f"rule {number}: ")
    rule.only(RULE_KEYS)
    reason = rule.take("reason", str)
    if not reason.strip():
        rule.fail("reason is empty", remedy="Say why, for whoever reads --explain.")
    tests: list[Test] = [_names(rule, roles)]
    if "layers" in rule.data:
        tests.append(_layers(rule))
    if "presets" in rule.data:
        tests.append(_presets(rule))
    when = Section(rule.take("when", dict, {}), path, f"rule {number}: when: ")
    when.only(CONDITIONS)
    tests += [_condition(when, key) for key in when.data]
    return Rule(number, reason.strip(), tuple(tests), rule.data.get("type") == "keep", **_decision(rule))


def _decision(rule: Section) -> dict[str, Target]:
    """What a rule does: a type, or bounds; nothing to resolve if it keeps."""
    given = {key for key in ("type", "at_least", "at_most") if key in rule.data}
    if not given or ("type" in given and len(given) > 1):
        rule.fail("no single decision", expected="type, or at_least and at_most, or one of these")
    return {key: _target(rule, key) for key in given if rule.data[key] != "keep" or key != "type"}


def _names(rule: Section, roles: Mapping[str, re.Pattern[str]]) -> Test:
    """Names in which a pattern, or that of a role, is found."""
    if ("role" in rule.data) == ("match" in rule.data):
        rule.fail("needs either role or match", remedy="role names a line of [roles]; match is a regular expression.")
    if "match" in rule.data:
        patterns: tuple[re.Pattern[str], ...] = (rule.pattern("match"),)
    else:
        for word in rule.words("role"):
            if word not in roles:
                rule.fail(f"no role {word!r}", expected=f"one of [roles]: {', '.join(roles) or 'none'}")
        patterns = tuple(roles[word] for word in rule.words("role"))
    return lambda s: any(pattern.search(s.name) for pattern in patterns)


def _layers(rule: Section) -> Test:
    """Layers that one of the words stands for."""
    try:
        selected = [parse_layer_set(word) for word in rule.words("layers")]
    except ValueError as error:
        rule.fail(
            f"layers {error} are not understood", remedy="For example: first 1/8, last 2, every 3, 0-4, 7, nextn."
        )
    return lambda s: s.layer >= 0 and any(holds(s.layer, s.model) for holds in selected)


def _presets(rule: Section) -> Test:
    """Presets whose names match one of the words."""
    words = [word.upper() for word in rule.words("presets")]
    for word in words:
        if not any(fnmatchcase(name, word) for name in PRESETS):
            rule.fail(f"no preset is named {word!r}", expected="names with wildcards, for example Q4_K_* or IQ?_*")
    return lambda s: any(fnmatchcase(s.preset.name, word) for word in words)


def _condition(when: Section, key: str) -> Test:
    """A fact about the model."""
    if key == "architecture":
        words = when.words(key)
        return lambda s: any(fnmatchcase(s.model.architecture, word) for word in words)
    if key in FLAGS:
        flag, wanted = FLAGS[key], when.take(key, bool)
        return lambda s: flag(s) is wanted
    found = re.fullmatch(r"(>=|<=|==|!=|>|<)?\s*(\d+)", str(when.data[key]))
    if found is None:
        when.fail(f"{key} is not understood", expected="a number or a comparison, for example '>= 8'")
    count, compare, bound = COUNTS[key], COMPARISONS[found[1] or "=="], int(found[2])
    return lambda s: bool(compare(count(s), bound))


def _target(rule: Section, key: str) -> Target:
    """A type, `base`, or `base+2`."""
    text = rule.take(key, str)
    steps = re.fullmatch(r"base\s*(?:([+-])\s*(\d))?", text)
    if steps is not None:
        return Target(steps=int(f"{steps[1] or ''}{steps[2] or 0}"))
    try:
        return Target(parse_type(text))
    except InputError as error:
        rule.fail(f"{key}: {error.what}", remedy=f"{error.remedy} Or write base, base+1, base-1...")
