"""The dashboard's texts for a reader: `protocol.words` over the dashboard's catalogue, and texts with markup. No I/O."""

from collections.abc import Mapping
from typing import Any, ClassVar

from markupsafe import Markup, escape

from coordinator.dashboard.catalogue import TEXTS
from protocol import words
from protocol.words import NO_VALUE, THIN, language

__all__ = ["NO_VALUE", "THIN", "Words", "language", "texts_used"]


class Words(words.Words, frozen=True):
    """How this reader is spoken to."""

    texts: ClassVar[Mapping[str, tuple[str, str]]] = TEXTS

    def strong(self, key: str, **values: Any) -> Markup:
        """As `text`, for HTML, with every filled-in value in <b>. Values are escaped."""
        pattern = escape(self.pattern(key, values))
        return Markup(str(pattern).format(**{name: Markup("<b>{}</b>").format(value) for name, value in values.items()}))


def texts_used(source: str) -> Mapping[str, None]:
    """Catalogue keys that a template names in full, for the test that holds both together."""
    import re

    return dict.fromkeys(re.findall(r"""\b(?:t|tb)\(\s*["']([a-z0-9.-]+)["']""", source))
