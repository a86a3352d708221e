"""A certificate authority for tests, P-256."""

import datetime
import ipaddress
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Authority:
    """Signs certificates for a test; its name is its folder's."""

    def __init__(self, folder: Path, *, days: float = 300) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.key = folder, ec.generate_private_key(ec.SECP256R1())
        self.ca = self._write("ca.pem", self._certificate(folder.name, self.key, ca=True, days=days))

    def issue(self, name: str, *, days: float = 300, since: float = -1, address: str = "127.0.0.1") -> tuple[Path, Path]:
        """A certificate for that common name and address, and its key; valid from `since` to `days` from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        certificate = self._certificate(name, key, days=days, since=since, address=address)
        return self._write(f"{name}.pem", certificate), self._write(f"{name}.key", private)

    def _certificate(
        self, name: str, key: Any, *, days: float = 300, since: float = -1, ca: bool = False, address: str = "127.0.0.1"
    ) -> bytes:
        def named(common: str) -> x509.Name:
            return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])

        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder().subject_name(named(name)).issuer_name(named(self.folder.name)).public_key(key.public_key())
            .serial_number(x509.random_serial_number()).not_valid_before(now + datetime.timedelta(days=since))
            .not_valid_after(now + datetime.timedelta(days=days)).add_extension(x509.BasicConstraints(ca, None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), critical=False)
        )  # fmt: skip
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _write(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        path.chmod(0o600)
        return path
