"""int8 from layer to layer: steps, their meaning in Python, and their program in C++."""
