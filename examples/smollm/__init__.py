"""What `smollm2.py` consists of: inputs, engines, and the workers that serve them."""
