"""Benchmarks that a user can run: ``torchquant bench linear``, ``roofline``, ``isa``, ``overhead``.

Each benchmark measures the machine's limits in the same run, names the limit that applies, and uses
the peers that are installed. ``benchmarks/README.md`` in the repository describes the method.
"""
