"""The parts of bench_cuda.py."""
