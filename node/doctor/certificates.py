"""The TLS files of the node's brokers and of its SuperLink: expired, soon expired, not yet valid, not matching their key, open to others.

Of several authorities in a file the one that lasts longest counts: an old one may stay beside the new one.
"""

import datetime
import stat
from pathlib import Path
from typing import Any

from node.doctor.finding import Finding
from node.settings import Account, NodeSettings, located
from protocol.errors import BadInput

SOON_S = 30 * 86_400  # seconds; an operator may visit a site once a month
DAY_S = 86_400


def every(settings: NodeSettings, now: float) -> list[Finding]:
    """Of the fleet's broker, of the site's, and of the SuperLink; one finding for each that uses TLS."""
    found = []
    sections: tuple[tuple[str, Account, str], ...] = (
        ("broker certificate", settings.broker, settings.node.name),
        ("topic certificate", settings.topic, ""),
    )
    for name, section, user in sections:
        if section.host and (section.ca_file or section.cert_file):
            found.append(look(name, *section.tls_files(), user=user, now=now))
    if settings.learn.superlink and settings.learn.superlink_ca_file:
        found.append(look("SuperLink certificate", located(settings.learn.superlink_ca_file), None, None, user="", now=now))
    return found


def look(what: str, ca: Path | None, cert: Path | None, key: Path | None, *, user: str, now: float) -> Finding:
    """The worst thing about these files.

    Args:
        user: the common name the broker expects; "" for any.
    """
    try:
        authorities, own = _read(ca), _read(cert)
        if problem := _key_problem(own[0], key) if own else "":
            return Finding(what, "bad", problem, "issue a certificate for exactly this key, on the broker's side")
    except BadInput as error:
        return Finding(what, "bad", str(error), "bring the file again")
    longest = sorted(authorities, key=lambda one: one.not_valid_after_utc)[-1:]
    chain = [*((cert, one) for one in own), *((ca, one) for one in longest)]
    for path, one in sorted(chain, key=lambda pair: pair[1].not_valid_after_utc):
        left = one.not_valid_after_utc.timestamp() - now
        until = one.not_valid_after_utc.date().isoformat()
        if left < 0:
            return Finding(what, "bad", f"{path} expired on {until}", "issue a new one; if the clock is wrong, set it first")
        if one.not_valid_before_utc.timestamp() > now:
            begins = one.not_valid_before_utc.date().isoformat()
            return Finding(what, "bad", f"{path} is valid from {begins} on only", "the clock of this node is behind: set it")
        if left < SOON_S:
            return Finding(what, "warn", f"{path} expires in {int(left / DAY_S)} days, on {until}", "issue a new one before that")
    if user and own and (name := _common_name(own[0])) != user:
        return Finding(what, "bad", f"{cert} is for {name!r}, this node is {user!r}", "the broker takes the certificate's name as the user")
    if key is not None and key.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        return Finding(what, "warn", f"{key} can be read by other users of this machine", f"chmod 600 {key}")
    first = min((one.not_valid_after_utc for _, one in chain), default=datetime.datetime.fromtimestamp(now, datetime.UTC))
    return Finding(what, "good", f"valid until {first.date().isoformat()}")


def _read(path: Path | None) -> list[Any]:
    """The certificates in a PEM file.

    Raises:
        BadInput: it cannot be read, or has none.
    """
    if path is None:
        return []
    from cryptography import x509

    try:
        return list(x509.load_pem_x509_certificates(path.read_bytes()))
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise BadInput(f"{path} is not a PEM certificate") from error


def _key_problem(own: Any, key: Path | None) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    if key is None:
        return "there is a certificate and no key beside it"
    try:
        private = load_pem_private_key(key.read_bytes(), password=None)
    except OSError as error:
        return f"cannot read {key}: {error.strerror}"
    except (ValueError, TypeError):
        return f"{key} is not a PEM key without a password"
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    same = private.public_key().public_bytes(*form) == own.public_key().public_bytes(*form)
    return "" if same else f"{key} is not the key of the certificate"


def _common_name(certificate: Any) -> str:
    from cryptography.x509.oid import NameOID

    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""
