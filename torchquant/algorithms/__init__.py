"""Accuracy without training: algorithms on a prepared model, each a pure function and a verb."""
