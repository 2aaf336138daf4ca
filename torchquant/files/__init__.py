"""Saving models to safetensors files, and loading them."""
