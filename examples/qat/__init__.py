"""The parts of qat_text.py."""
