"""One clear line for what a person can act on; the right exit code; progress in a log."""

import errno

import pytest
import typer

from protocol import console
from protocol.errors import BadInput, MilpaError, PortInUse, WrongDigest


def program(error: BaseException) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise error

    return app


@pytest.mark.parametrize(("error", "code"), [(BadInput("no such site"), 2), (WrongDigest("altered"), 3), (PortInUse("port is taken"), 4)])
def test_an_error_a_person_can_act_on_is_one_line_and_an_exit_code(
    error: MilpaError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["milpa"])

    with pytest.raises(SystemExit) as ended:
        console.run(program(error))

    assert ended.value.code == code
    assert capsys.readouterr().err.strip().splitlines() == [f"error: {error}"]


def test_a_full_disk_is_told_as_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["milpa"])

    with pytest.raises(SystemExit) as ended:
        console.run(program(OSError(errno.ENOSPC, "No space left on device", "/var/x")))

    assert ended.value.code == 5
    assert "no space left" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["milpa"])

    with pytest.raises(ZeroDivisionError):
        console.run(program(ZeroDivisionError()))


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "TOLD_EVERY_S", 0.0)

    with console.progress_bar() as bar:
        bar.update(bar.add_task("grinding", total=10), completed=5)

    assert capsys.readouterr().err.strip() == "grinding 50%"
