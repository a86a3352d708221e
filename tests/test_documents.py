"""Documents that could go stale are held to the code: commands and options that they name exist, every command explains itself."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

import coordinator.cli
import deploy.cli
import node.cli

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    "README.md",
    "docs/operators-guide.md",
    "docs/power-and-learning.md",
    "docs/ranch.md",
    "docs/cached-teacher-logits.md",
    "docker-compose.yml",
)


def programs() -> dict[str, click.Command]:
    return {
        "milpa-coordinator": typer.main.get_command(coordinator.cli.complete()),
        "milpa-node": typer.main.get_command(node.cli.complete()),
        "milpa-fleet": typer.main.get_command(deploy.cli.app),
    }


def commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from commands(child, f"{path} {name}")
    else:
        yield path, command


ALL = {path: command for name, program in programs().items() for path, command in commands(program, name)}


def named(text: str) -> list[str]:
    """The command lines of ours in a text: from the program's name to the end of the line or the shell's next word."""
    found = re.findall(r"(?:^|[`\s])((?:milpa-coordinator|milpa-node|milpa-fleet) [a-z][^\n`]*)", text.replace("\\\n", " "))
    return [re.split(r"\s+(?:&&|\||#|>)|\s{2,}|[;,]\s", line)[0].strip().rstrip(".,;:") for line in found]


def lines() -> list[str]:
    return [line for file in DOCUMENTS for line in named((ROOT / file).read_text(encoding="utf-8"))]


@pytest.mark.parametrize("line", sorted(set(lines())))
def test_a_command_that_a_document_names_exists_with_its_options(line: str) -> None:
    words = shlex.split(line.replace("...", ""))
    path = next((" ".join(words[:n]) for n in (3, 2) if " ".join(words[:n]) in ALL), None)

    assert path, f"{line!r}: no such command"
    known = {option for parameter in ALL[path].params for option in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [word for word in words if word.startswith("--") and word.split("=")[0] not in known]
    assert not unknown, f"{line!r}: {unknown}"


@pytest.mark.parametrize("path", sorted(ALL))
def test_every_command_has_examples_that_name_it(path: str) -> None:
    told = ALL[path].help or ""

    assert "Examples:" in told
    assert path in told.split("Examples:")[1]


@pytest.mark.parametrize("path", sorted(ALL))
def test_every_option_says_what_it_is_for(path: str) -> None:
    silent = [
        parameter.name for parameter in ALL[path].params if isinstance(parameter, click.Option) and not getattr(parameter, "help", "")
    ]

    assert not silent


def test_the_readme_begins_with_the_two_commands_and_shows_its_pictures() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")

    assert text.index("make demo") < text.index("make test") < text.index("## Use it")
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (ROOT / picture).is_file(), picture


def test_the_readmes_tree_names_files_that_exist_and_every_room() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## Tree")[1].split("```")[1]
    top = ""
    rooms = set()
    for line in tree.strip().splitlines():
        if not line.startswith(" "):
            top = line.split("/")[0]
            continue
        for word in line.split("  ")[1:2][0].split():
            assert (ROOT / top / word).exists(), f"{top}/{word}"
            rooms.add(f"{top}/{word.strip('/')}")
    packages = {
        f"{path.parent.parent.name}/{path.parent.name}" for side in ("coordinator", "node") for path in (ROOT / side).glob("*/__init__.py")
    }
    assert packages <= rooms, f"not in the README's tree: {packages - rooms}"


def test_decisions_are_numbered_without_gaps_and_each_says_what_it_costs() -> None:
    files = sorted((ROOT / "docs/adr").glob("*.md"))

    assert [int(file.name[:4]) for file in files] == list(range(1, len(files) + 1))
    assert all("**Costs.**" in file.read_text(encoding="utf-8") for file in files)


def test_contributing_stays_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) < 60


def test_the_changelog_has_a_place_for_what_comes_next() -> None:
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
