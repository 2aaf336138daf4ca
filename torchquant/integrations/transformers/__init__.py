"""Hugging Face transformers: attention on torchquant's operator."""
