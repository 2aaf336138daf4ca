"""Failures that are not the library's: each with its reason."""

KNOWN: dict[tuple[str, str], str] = {}
