"""Names that mean whatever model is served, for clients whose model names are fixed."""

from __future__ import annotations

from fnmatch import fnmatchcase


class Aliases:
    """Patterns with `*`, `?` and `[...]`; case does not matter."""

    def __init__(self, patterns: tuple[str, ...] = ()) -> None:
        self.patterns = tuple(pattern.lower() for pattern in patterns)

    @classmethod
    def parse(cls, text: str) -> Aliases:
        """From patterns with commas between them; an empty text has none."""
        return cls(tuple(pattern for part in text.split(",") if (pattern := part.strip())))

    def match(self, name: str) -> bool:
        """Whether `name` means whatever is served."""
        return any(fnmatchcase(name.lower(), pattern) for pattern in self.patterns)
