"""What two spellings of one answer have in common."""

from __future__ import annotations

import unicodedata


def normalize(text: str) -> str:
    """Unicode compatibility form, lower case, single spaces, no final full stop."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).rstrip(".。").strip()
