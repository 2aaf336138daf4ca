"""Comparisons of models, such as a converted model with the model that was trained."""
