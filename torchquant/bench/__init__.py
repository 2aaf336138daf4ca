"""Benchmarks that a user can run: ``torchquant bench linear``, ``roofline``, ``isa``, ``overhead``.

Each measures the machine's own limits in the same run, says which of them binds, and runs with
whatever peers are installed. ``benchmarks/README.md`` in the repository says how and why.
"""
