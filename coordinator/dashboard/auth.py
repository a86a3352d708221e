"""Who may see the dashboard: the first account by a one-time token, argon2id, sessions that live on the server, CSRF, a brake on guessing.

Rules:
 * No default password. Until the first account exists, a token stands in the log and in a file of mode 0600; it dies with its use.
 * A browser holds a random session token; the ledger holds its SHA-256. Every unsafe request repeats the session's CSRF token; before a
   login (no session yet) a cookie and the form must carry the same random value.
 * FAILURES wrong tries within WINDOW_S close the door for that address and for that name; hashing runs one at a time (64 MiB each).
Limits: one role; no second factor; the brake forgets at a restart.
"""

import hashlib
import hmac
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from coordinator.fleet.ledger import Ledger, WebSession
from protocol.errors import BadInput
from protocol.names import checked_name

SESSION_S = 12 * 3_600  # a working day
PASSWORD_LEAST, PASSWORD_MOST = 12, 200  # characters
FAILURES = 5
WINDOW_S = 300.0
TRACKED = 4_096  # addresses and names the brake remembers


class TooManyTries(BadInput):
    """Wait, then try again."""


class WrongLogin(BadInput):
    """Name or password is wrong; which of them is not said."""


class Brake:
    """Counts failures by key within a sliding window."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures: dict[str, deque[float]] = {}
        self._lock = threading.Lock()

    def check(self, *keys: str) -> None:
        """Raises:
        TooManyTries: one of `keys` failed too often.
        """
        with self._lock:
            for key in keys:
                if len(self._recent(key)) >= FAILURES:
                    raise TooManyTries("too many tries")

    def failed(self, *keys: str) -> None:
        """Remember a failure."""
        with self._lock:
            for key in keys:
                self._failures.setdefault(key, deque(maxlen=FAILURES)).append(self._clock())
            while len(self._failures) > TRACKED:
                self._failures.pop(next(iter(self._failures)))

    def _recent(self, key: str) -> deque[float]:
        times = self._failures.get(key, deque())
        while times and times[0] <= self._clock() - WINDOW_S:
            times.popleft()
        return times


class Door:
    """Accounts and sessions over the ledger."""

    def __init__(
        self, ledger: Ledger, token_file: Path, *, hasher: PasswordHasher | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self.ledger = ledger
        self.token_file = token_file
        self.brake = Brake(clock)
        self._hasher = hasher or PasswordHasher()
        self._hashing = threading.Lock()
        self._nobody = self._hasher.hash(secrets.token_urlsafe(16))  # so that an unknown name takes as long as a wrong password
        self._token = ""

    def prepare(self) -> str:
        """Make the set-up token if there is no account yet. Returns it, or "" when there is an account."""
        if self.ledger.has_users():
            self.token_file.unlink(missing_ok=True)
            return ""
        self._token = secrets.token_urlsafe(24)
        self.token_file.parent.mkdir(parents=True, exist_ok=True)
        self.token_file.unlink(missing_ok=True)
        handle = os.open(self.token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(self._token + "\n")
        return self._token

    @property
    def needs_setup(self) -> bool:
        """Whether the first account is still to be made."""
        return not self.ledger.has_users()

    def set_up(self, token: str, name: str, password: str, *, address: str) -> str:
        """Make the first account and log it in. Returns the session token.

        Raises:
            TooManyTries, WrongLogin: the set-up token.
            BadInput: a name or password that cannot be one.
        """
        self.brake.check(f"address {address}")
        if not self._token or not hmac.compare_digest(token.strip().encode(), self._token.encode()):
            self.brake.failed(f"address {address}")
            raise WrongLogin("wrong set-up token")
        checked_name(name, what="user")
        if not PASSWORD_LEAST <= len(password) <= PASSWORD_MOST:
            raise BadInput("password length")
        with self._hashing:
            hashed = self._hasher.hash(password)
        if not self.ledger.add_first_user(name, hashed):
            raise WrongLogin("there is an account already")
        self._token = ""
        self.token_file.unlink(missing_ok=True)
        return self._open(name)

    def log_in(self, name: str, password: str, *, address: str) -> str:
        """Check a password. Returns the session token.

        Raises:
            TooManyTries, WrongLogin
        """
        keys = (f"address {address}", f"name {name[:64]}")
        self.brake.check(*keys)
        user = self.ledger.user(name) if name.isprintable() and len(name) <= 64 else None
        try:
            with self._hashing:
                self._hasher.verify(user.password if user else self._nobody, password[:PASSWORD_MOST])
        except (VerificationError, InvalidHashError) as error:
            self.brake.failed(*keys)
            if user is not None:
                self.ledger.note(user.name, "login refused", f"user {user.name}", {"address": address})
            raise WrongLogin("wrong name or password") from error
        if user is None:  # the dummy's password was guessed: not in this universe
            raise WrongLogin("wrong name or password")
        return self._open(user.name)

    def session(self, token: str) -> WebSession | None:
        """The session of a cookie, if it is one of ours and not over."""
        return self.ledger.session(_hash(token)) if token else None

    def log_out(self, token: str) -> None:
        """End a session."""
        self.ledger.close_session(_hash(token))

    def _open(self, name: str) -> str:
        token = secrets.token_urlsafe(32)
        self.ledger.open_session(_hash(token), name, secrets.token_urlsafe(24), lifetime_s=SESSION_S)
        return token


def same(one: str, other: str) -> bool:
    """Whether two secrets are equal and not empty, in constant time."""
    return bool(one) and hmac.compare_digest(one.encode(), other.encode())


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
