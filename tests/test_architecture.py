"""The rules of the house, held: who may import whom, where each heavy library lives, and what a node's daemon never loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SIDES = ("protocol", "node", "coordinator", "deploy")
MAY_IMPORT = {
    "protocol": {"protocol"},
    "node": {"protocol", "node"},
    "coordinator": {"protocol", "coordinator"},
    "deploy": {"protocol", "node", "coordinator", "deploy"},
}
# rule 3: every heavy third-party library has named homes; a new one needs a row
HOMES = {
    "torch": ("protocol/models/", "coordinator/forge/", "node/learn/train.py"),
    "transformers": ("protocol/models/", "coordinator/forge/"),
    "accelerate": ("coordinator/forge/training/scale.py",),
    "trl": (),  # a baseline of bench/ and an oracle of tests
    "peft": (),  # the oracle of tests/forge/test_peft_parity.py, and needed nowhere else
    "gguf": ("protocol/models/", "coordinator/forge/"),
    "llama_cpp": ("protocol/models/", "coordinator/forge/"),
    "flwr": ("coordinator/federation/", "node/learn/"),
    "tuf": ("coordinator/fleet/", "node/update/"),
    "securesystemslib": ("coordinator/fleet/", "node/update/"),
    "apsw": ("node/memory/vectors.py",),
    "cryptography": ("coordinator/fleet/", "node/doctor/certificates.py"),
    "sqlite_vec": ("node/memory/vectors.py",),
    "paho": ("protocol/mqtt.py",),
    "iotcore": ("deploy/broker.py",),
    "aquacrop": ("coordinator/ranch/",),
    "pvlib": ("coordinator/ranch/",),
    "sklearn": ("coordinator/ranch/", "coordinator/forge/"),
    "matplotlib": ("coordinator/forge/",),
    "sacrebleu": ("coordinator/forge/",),
    "wordfreq": ("coordinator/forge/students/trim.py",),
    "py3langid": ("coordinator/forge/synthesis/language.py",),
    "alembic": ("coordinator/fleet/",),
    "argon2": ("coordinator/dashboard/",),
    "fastapi": ("coordinator/",),  # with pydantic 13 MiB that the node does not have
    "pydantic": (),
    "openai": (),  # tests drive the node with it
}
# rule 2: decisions take clocks, files and randomness as arguments
PURE = (
    "protocol/names.py", "protocol/messages.py", "protocol/tasks.py", "protocol/releases.py", "protocol/adapters.py",
    "protocol/codec.py", "protocol/topics.py", "protocol/confidence.py", "protocol/models/spelling.py", "protocol/models/logits.py",
    "protocol/links.py", "protocol/frames.py", "coordinator/federation/merge.py",
    "coordinator/federation/admission.py", "coordinator/federation/gate.py", "coordinator/forge/synthesis/gates.py",
    "coordinator/forge/judging/categories.py", "coordinator/forge/judging/metrics.py", "coordinator/forge/judging/regressions.py",
    "coordinator/forge/judging/claims.py", "coordinator/forge/judging/economics.py",
    "protocol/words.py", "protocol/reasons.py", "node/page/door.py", "node/page/html.py", "node/page/pages.py", "node/page/words.py",
    "node/reload.py", "node/escalation/consensus.py", "node/memory/rules.py", "node/energy/rules.py", "node/learn/rules.py",
    "node/confidence/budget.py", "node/confidence/refit.py", "protocol/likeness.py",
)  # fmt: skip
IMPURE_MODULES = {"time", "os", "socket", "random", "subprocess", "threading", "requests", "httpx", "pathlib", "sqlite3", "sqlalchemy"}


def sources() -> list[Path]:
    return sorted(path for side in SIDES for path in (ROOT / side).rglob("*.py"))


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for part in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(part, ast.Import):
            found |= {alias.name for alias in part.names}
        elif isinstance(part, ast.ImportFrom) and part.module and not part.level:
            found.add(part.module)
    return found


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", sources(), ids=name)
def test_a_side_imports_only_what_it_may(path: Path) -> None:
    side = name(path).split("/")[0]

    ours = {module.split(".")[0] for module in imports(path)} & set(SIDES)

    assert ours <= MAY_IMPORT[side], f"{name(path)} imports {ours - MAY_IMPORT[side]}"


@pytest.mark.parametrize("path", sources(), ids=name)
def test_a_heavy_library_stays_in_its_home(path: Path) -> None:
    strays = {
        module for module in imports(path)
        if (homes := HOMES.get(module.split(".")[0])) and not any(name(path).startswith(home) for home in homes)
    }  # fmt: skip

    assert not strays, f"{name(path)} is no home of {strays}; see HOMES"


@pytest.mark.parametrize("file", PURE)
def test_a_rules_file_does_no_input_or_output(file: str) -> None:
    path = ROOT / file

    found = {module.split(".")[0] for module in imports(path)} & IMPURE_MODULES

    assert not found, f"{file} imports {found}: hand it in as an argument"


def test_federation_uses_the_forge_by_its_public_functions_only() -> None:
    private = [
        f"{name(path)}: {alias.name}"
        for path in (ROOT / "coordinator/federation").rglob("*.py")
        for part in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(part, ast.ImportFrom) and (part.module or "").startswith("coordinator.forge")
        for alias in part.names
        if alias.name.startswith("_")
    ]

    assert not private


@pytest.mark.parametrize("module", ["node.app", "node.cli", "node.learn.commands"])
def test_the_node_daemon_loads_no_training_library(module: str) -> None:
    heavy = {"torch", "transformers", "flwr", "peft", "sklearn", "apsw", "sqlite_vec"}
    check = f"import sys, {module}; print(*sorted({heavy} & set(sys.modules)))"

    loaded = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)

    assert loaded.stdout.strip() == ""


def test_no_file_swallows_every_error() -> None:
    silent = [
        f"{name(path)}:{part.lineno}"
        for path in sources()
        for part in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(part, ast.ExceptHandler)
        and (part.type is None or (isinstance(part.type, ast.Name) and part.type.id in {"Exception", "BaseException"}))
        and all(isinstance(line, ast.Pass) for line in part.body)
    ]

    assert not silent


def test_every_room_has_a_map() -> None:
    without = [name(path) for path in sources() if path.name == "__init__.py" and not ast.get_docstring(ast.parse(path.read_text("utf-8")))]

    assert not without


def test_every_module_says_its_job_first() -> None:
    without = [
        name(path)
        for path in sources()
        if "migrations/versions" not in name(path) and not ast.get_docstring(ast.parse(path.read_text("utf-8")))
    ]

    assert not without
