"""Documents that could go stale are held to the code: commands and options that they name exist, every command explains itself."""

import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer

import coordinator.cli
import deploy.cli
import node.cli
import node.settings
from coordinator.commands.publish import GOES_WITHOUT
from coordinator.settings import load_settings
from deploy import settings_page
from protocol.links import LEAVES, LINKS

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "docker-compose.yml", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))


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
    apart = re.sub(r"\s(?:&&|\|)\s", "\n", re.sub(r"\s*\\\n\s*", " ", text))
    found = re.findall(r"(?:^|[`\s])((?:milpa-coordinator|milpa-node|milpa-fleet) [a-z][^\n`]*)", apart)
    return [re.split(r"\s+[#>]|\s{2,}|[;,]\s", line)[0].strip().rstrip(".,;:") for line in found]


def lines() -> list[str]:
    return [line for file in DOCUMENTS for line in named((ROOT / file).read_text(encoding="utf-8"))]


@pytest.mark.parametrize("line", sorted(set(lines())))
def test_a_command_that_a_document_names_exists_with_its_options(line: str) -> None:
    words = shlex.split(line.replace("...", ""))
    path = next((" ".join(words[:n]) for n in (3, 2) if " ".join(words[:n]) in ALL), None)

    assert path, f"{line!r}: no such command"
    command = ALL[path]
    try:
        command.make_parser(click.Context(command)).parse_args(words[len(path.split()) :])
    except click.UsageError as error:
        pytest.fail(f"{line!r}: {error.format_message()}")


def test_the_readme_s_release_goes_without_nothing_and_its_round_calibrates_the_next() -> None:
    told = named((ROOT / "README.md").read_text(encoding="utf-8"))
    options = {
        command: " ".join(line for line in told if line.startswith(f"milpa-coordinator {command} ")) for command in ("publish", "round")
    }
    asked = {f"--{option}" for option in GOES_WITHOUT} - {"--min-memory-mb"} | {"--evidence"}  # where the memory figure comes from

    assert asked <= set(options["publish"].split())
    assert "--dev general=" in options["round"]
    assert any(line.startswith("milpa-coordinator calibrate ") for line in told)


def test_the_settings_page_is_what_the_declarations_say() -> None:
    assert settings_page.PAGE.read_text(encoding="utf-8") == settings_page.page(), "write it anew: python -m deploy.settings_page"


@pytest.mark.parametrize(
    ("read", "heading"), [(node.settings.read, "## Node"), (load_settings, "## Coordinator")], ids=["node", "coordinator"]
)
def test_the_settings_page_has_every_key_that_config_show_has(read: Any, heading: str) -> None:
    part = settings_page.PAGE.read_text(encoding="utf-8").split(heading)[1].split("\n## ")[0]
    told = set()
    for section in part.split("### [")[1:]:
        told |= {f"{section.split(']')[0]}.{key}" for key in re.findall(r"^\| `(\w+)` ", section, re.MULTILINE)}

    assert told == {origin.name for origin in read()[1]}


def test_a_key_of_the_settings_page_says_what_it_is_for() -> None:
    keys = re.findall(r"^\| `(\w+)` \| `.*?` \| (.*?) \|", settings_page.page(), re.MULTILINE)

    assert {key for key, meaning in keys if not meaning.strip()} <= {"port"}


def test_the_links_page_says_what_the_classes_of_link_allow() -> None:
    text = (ROOT / "docs/low-bandwidth-links.md").read_text(encoding="utf-8")

    for name, rules in LINKS.items():
        (row,) = (line.split(" | ") for line in text.splitlines() if line.startswith(f"| `{name}` | "))
        least = [f"{value:,.0f} s" if value and math.isfinite(value) else "never" if value else "as set"
                 for value in (rules.heartbeat_s, rules.poll_s, rules.window_s)]  # fmt: skip
        assert row[2:6] == [f"{rules.bytes_a_day:,}" if rules.bytes_a_day else "no limit", *least]
    shares = [int(share) for share in re.findall(r"^\| [a-z' ]+ \| (\d+)% \|$", text, re.MULTILINE)]
    assert shares == [round(100 * share) for share in LEAVES.values()]


def test_the_pages_tell_about_what_was_measured() -> None:
    measured = json.loads((ROOT / "bench/results/node.json").read_text(encoding="utf-8"))["figures"]
    idle, student = measured["idle_bytes_day"], measured["footprint_2"]
    billed, stream, lan = (
        value / 1000 for value in (idle["figure"], *(idle["against"][f"{link}, the stream alone"] for link in ("cellular", "lan")))
    )
    told = {
        ("README.md", r"an idle day costs (\d+) kB"): billed,
        ("docs/low-bandwidth-links.md", r"idle node costs (\d+) kB"): billed,
        ("docs/low-bandwidth-links.md", r"(\d+) kB of stream"): stream,
        ("docs/low-bandwidth-links.md", r"the stream alone (\d+) kB"): lan,
        ("docs/running-a-node.md", r"without a model takes (\d+) MiB"): measured["footprint"]["figure"],
        ("docs/running-a-node.md", r"with a (\d+) MiB student"): student["against"]["size of the model, MiB"],
        ("docs/running-a-node.md", r"MiB student (\d+) MiB"): student["figure"],
    }

    for (name, pattern), figure in told.items():
        (number,) = re.findall(pattern, (ROOT / name).read_text(encoding="utf-8"))
        assert float(number) == pytest.approx(figure, rel=0.05), (name, pattern)


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
