"""Numbers, times and texts for a reader: language, decimal sign and time zone in one value. No I/O.

A side gives its own catalogue: `class Words(words.Words): texts = TEXTS`. `{name}` in a text is filled in. A text of the form "one|many"
follows the value `n`.
"""

from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta, tzinfo
from typing import Any, ClassVar

import msgspec

LANGUAGES = ("en", "es")
POINT_REGIONS = frozenset(("MX", "GT", "HN", "SV", "NI", "PA", "DO", "PR", "PE", "US", "419"))  # Spanish with a decimal point (CLDR)
MONTHS = {
    "en": ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"),
    "es": ("ene", "feb", "mar", "abr", "may", "jun", "jul", "ago", "sep", "oct", "nov", "dic"),
}
NO_VALUE = "\N{EN DASH}"
THIN = "\N{NARROW NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"


class Words(msgspec.Struct, frozen=True):
    """How this reader is spoken to."""

    texts: ClassVar[Mapping[str, tuple[str, str]]] = {}  # key -> the text in each of LANGUAGES; "ago" is asked for by `age`

    lang: str
    comma: bool  # 3,1 instead of 3.1
    zone: tzinfo
    now: int  # seconds since 1970; ages are counted from it

    def text(self, key: str, **values: Any) -> str:
        """The catalogue's text for `key`.

        Raises:
            KeyError: no such key; a test walks all that pages use.
        """
        return self.pattern(key, values).format(**values)

    def pattern(self, key: str, values: Mapping[str, Any]) -> str:
        """The text for `key` before it is filled in, one or many."""
        one, _, many = self.texts[key][LANGUAGES.index(self.lang)].partition("|")
        return many if many and values.get("n") != 1 else one

    def word(self, key: str, otherwise: str) -> str:
        """The catalogue's text for `key`, or `otherwise` where it has none."""
        return self.text(key) if self.known(key) else otherwise

    def known(self, key: str) -> bool:
        """Whether the catalogue has `key`: kinds that nodes send may be newer than we are."""
        return key in self.texts

    def number(self, value: float | None, digits: int = 0) -> str:
        """1234.5 -> "1,234.5" or "1.234,5"; None -> a dash."""
        if value is None:
            return NO_VALUE
        told = f"{abs(value):,.{digits}f}"
        if self.comma:
            told = told.translate(str.maketrans(",.", ".,"))
        return (MINUS if value < 0 and told.strip("0.,") else "") + told

    def signed(self, value: float | None, digits: int = 1) -> str:
        """+1.2, −0.4."""
        return self.number(value, digits) if value is None or value <= 0 else "+" + self.number(value, digits)

    def percent(self, share: float | None, digits: int = 1) -> str:
        """0.031 -> "3.1%"; no digits where they would be noise."""
        return NO_VALUE if share is None else self.number(100 * share, 0 if share in (0, 1) else digits) + "%"

    def measured(self, value: float | None, unit: str) -> str:
        """A value in the unit of a series."""
        if value is None:
            return NO_VALUE
        if unit == "share":
            return self.percent(value)
        if unit == "bytes":
            return self.size(value)
        if unit == "ms":
            return self.number(value, 0 if value >= 10 else 1) + THIN + "ms"
        if unit == "wh":
            return self.number(value, 1) + THIN + "Wh"
        return self.number(value)

    def size(self, count: float | None) -> str:
        """Bytes in the unit that fits, decimal."""
        if count is None:
            return NO_VALUE
        for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
            if count >= scale:
                return self.number(count / scale, 1) + THIN + unit
        return self.number(count) + THIN + "B"

    def span(self, seconds: float) -> str:
        """A length of time: "40 s", "12 min", "3 h", "5 d"."""
        for unit, scale in (("d", 86_400), ("h", 3_600), ("min", 60)):
            if seconds >= 2 * scale or (unit == "min" and seconds >= scale):
                return f"{int(seconds // scale)}{THIN}{unit}"
        return f"{max(0, int(seconds))}{THIN}s"

    def age(self, at: int) -> str:
        """How long ago: "40 s ago"."""
        return self.text("ago", span=self.span(self.now - at)) if at else NO_VALUE

    def clock(self, at: int) -> str:
        """The hour when it is today, else day and hour."""
        when = self._local(at)
        if when is None:
            return NO_VALUE
        told = f"{when:%H:%M}"
        today = self._local(self.now)
        return told if today is not None and when.date() == today.date() else f"{self.day(when.date())}, {told}"

    def date_of(self, at: int) -> str:
        """The day alone."""
        when = self._local(at)
        return NO_VALUE if when is None else self.day(when.date())

    def last(self, seconds: int) -> str:
        """ "Last 30 days", "Last hour": the heading of what charts show."""
        unit, scale = ("days", 86_400) if seconds >= 2 * 86_400 else ("hours", 3_600)
        return self.text(f"last-{unit}", n=seconds // scale, count=seconds // scale)

    def time(self, at: int) -> str:
        """Day, hour and zone."""
        when = self._local(at)
        return NO_VALUE if when is None else f"{self.day(when.date())} {when.year}, {when:%H:%M:%S} {when:%Z}"

    def iso(self, at: int) -> str:
        """For machines."""
        when = self._local(at)
        return when.astimezone(UTC).isoformat() if when is not None else ""

    def day(self, day: date) -> str:
        """ "22 Nov"."""
        return f"{day.day} {MONTHS[self.lang][day.month - 1]}"

    def _local(self, at: int) -> datetime | None:
        try:
            return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=at)).astimezone(self.zone) if at else None
        except OverflowError:  # a node's clock may say anything
            return None


def language(asked: str, cookie: str, header: str) -> tuple[str, bool]:
    """(language, decimal comma) from ?lang=, the cookie, and Accept-Language, in that order."""
    tags = [part.split(";")[0].strip() for part in header.split(",")][:16]
    for tag in (asked, cookie, *tags):
        lang, _, region = tag.partition("-")
        if lang.lower() in LANGUAGES:
            regions = {tag.partition("-")[2].upper() for tag in tags if tag.lower().startswith("es-")} | {region.upper()}
            return lang.lower(), lang.lower() == "es" and not regions & POINT_REGIONS
    return "en", False
