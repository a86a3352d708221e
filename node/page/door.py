"""Who may see the page, and whose taps count. No I/O: headers and the time come in.

Rules:
 * Where the node has a key (api.key_file), a person types it once; the browser then holds a signed pass, never the key itself.
 * The pass is `EXPIRES.MAC`, MAC = HMAC-SHA256(key, "milpa page EXPIRES"): nothing is stored, a power cut logs nobody out, a new key logs
   out everybody.
 * A tap counts only from our own page: the browser says where a form came from (Origin, else Sec-Fetch-Site), and one that says neither
   is refused. No token in the form: an open page stays good over a restart of the node.
 * The pass opens the page and nothing else; programs send the key with each request, as before.
Limits: plain HTTP. On a network with strangers in it, put TLS in front; the pass and the key can be read on the way.
"""

import hashlib
import hmac
from collections.abc import Mapping
from urllib.parse import urlsplit

COOKIE = "milpa_node"
PASS_S = 90 * 86_400  # seconds a pass is good; a season
OURS = "/page/"  # everything below it is the page's, and these:
ALSO_OURS = ("/", "/login", "/logout")


def guards(path: str) -> bool:
    """Whether this path is the page's: then the page itself asks for the pass, with a form where one is missing."""
    return path in ALSO_OURS or path.startswith(OURS)


def new_pass(key: str, now: float) -> str:
    """A pass from now on."""
    expires = int(now) + PASS_S
    return f"{expires}.{_mac(key, expires)}"


def is_good(given: str, key: str, now: float) -> bool:
    """Whether `given` is a pass under this key that has not expired. Without a key everybody who can reach the node may enter."""
    if not key:
        return True
    told, _, mac = given.partition(".")
    if not (told.isascii() and told.isdigit() and len(told) <= 12):
        return False
    return hmac.compare_digest(mac.encode(), _mac(key, int(told)).encode()) and now < int(told)


def same_key(given: str, key: str) -> bool:
    """Whether somebody typed the key, in constant time."""
    return bool(key) and hmac.compare_digest(given.strip().encode(), key.encode())


def from_our_page(headers: Mapping[str, str]) -> bool:
    """Whether the browser says that this request came from a page of this very address."""
    origin = headers.get("origin")
    if origin is None:
        return headers.get("sec-fetch-site") == "same-origin"
    try:
        return bool(origin) and urlsplit(origin).netloc == headers.get("host")
    except ValueError:
        return False


def _mac(key: str, expires: int) -> str:
    return hmac.new(key.encode(), f"milpa page {expires}".encode(), hashlib.sha256).hexdigest()
