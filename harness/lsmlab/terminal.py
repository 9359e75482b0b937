"""How text from a guest is made harmless: what a terminal would obey is shown instead."""

from __future__ import annotations

import unicodedata

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories that are not seen but act: controls, bidirectional overrides, surrogates, line separators."""


def clean(text: str) -> str:
    """`text` with everything that a terminal would obey made visible (`\\x1b`); line ends and tabs stay."""
    return text.translate({ord(c): c.encode("unicode_escape").decode("ascii") for c in _acting(text)})


def clean_json(text: str) -> str:
    """The same JSON as `text`, with such characters as JSON's own escapes."""
    return text.translate({ord(c): _json_escape(c) for c in _acting(text)})


def _acting(text: str) -> set[str]:
    return {c for c in set(text) if c not in "\n\t" and unicodedata.category(c) in _HIDDEN}


def _json_escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))
