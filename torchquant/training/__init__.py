"""Quantizers that train: observers, fake quantization, learned steps, and their state."""
