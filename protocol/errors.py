"""Every error a caller can act on, in one tree.

MilpaError
 |- BadInput              what came in is not usable; nothing was changed; the message says what to do
 |   |- MalformedMessage   bytes from a wire or a file that do not decode
 |   |- UnknownName        a task, site, verdict or setting nobody here knows (with a suggestion)
 |   `- TooLarge           over a stated limit
 |- TrustError            the bytes are not to be used; the previous release stays active
 |   |- NumberAlreadySeen  an older release replayed
 |   |- ExpiredRelease     past `expires`; check the site's clock first
 |   |- WrongDigest        a file is not what the signed metadata says
 |   `- DoesNotFit         signed and intact, but not for this machine or this base model
 |- Unavailable           something outside did not answer within its deadline; try again later
 |   |- PortInUse          another program listens where we should
 |   `- ConnectionLost     a message was under way when its connection ended: it may or may not have arrived
 `- NotEnough             disk, memory, examples or time: the message names the figure and the need

Command lines print `str(error)` as one line and exit with `exit_code`.
"""


class MilpaError(Exception):
    """Base of all errors Milpa raises on purpose."""

    exit_code = 1


class BadInput(MilpaError):
    """What came in is not usable. Nothing was changed."""

    exit_code = 2


class MalformedMessage(BadInput):
    """Bytes from a wire or a file that do not decode."""


class UnknownName(BadInput):
    """A task, site, verdict or setting nobody here knows."""


class TooLarge(BadInput):
    """Over a stated limit."""


class TrustError(MilpaError):
    """The bytes are not to be used. The previous release stays active."""

    exit_code = 3


class NumberAlreadySeen(TrustError):
    """An older release, replayed."""


class ExpiredRelease(TrustError):
    """Past `expires`; check the site's clock first. Inference goes on."""


class WrongDigest(TrustError):
    """A file is not what the signed metadata says."""


class DoesNotFit(TrustError):
    """Signed and intact, but not for this machine or this base model."""


class Unavailable(MilpaError):
    """Something outside did not answer within its deadline."""

    exit_code = 4


class PortInUse(Unavailable):
    """Another program listens where we should."""


class ConnectionLost(Unavailable):
    """A message was under way when its connection ended. It may or may not have arrived."""


class NotEnough(MilpaError):
    """Disk, memory, examples or time; the message names figure and need."""

    exit_code = 5
