"""Every rule of docs/protocol.md has a test that names it, and no test names another (the habit is Sparkplug's)."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
RULE = re.compile(r"^\| ([a-z]+-\d+) \| \S", re.MULTILINE)


def written() -> list[str]:
    return RULE.findall((ROOT / "docs" / "protocol.md").read_text(encoding="utf-8"))


def marked() -> dict[str, list[str]]:
    """Rule id to the tests that are marked with it."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for part in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(part, ast.FunctionDef) and part.name.startswith("test_"):
                for rule in marks(part):
                    found.setdefault(rule, []).append(f"{path.name}::{part.name}")
    return found


def marks(function: ast.FunctionDef) -> list[str]:
    calls = [mark for mark in function.decorator_list if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.rule"]
    return [argument.value for mark in calls for argument in mark.args if isinstance(argument, ast.Constant)]


def test_every_rule_has_a_test():
    found = marked()

    assert [rule for rule in written() if rule not in found] == []


def test_every_test_names_rules_that_are_written():
    known = written()

    assert {rule: where for rule, where in marked().items() if rule not in known} == {}


def test_no_rule_is_written_twice():
    assert len(written()) == len(set(written())) > 40
