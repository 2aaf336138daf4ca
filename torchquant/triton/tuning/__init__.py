"""Chooses kernel configurations by measuring, and keeps the choices in a file."""
