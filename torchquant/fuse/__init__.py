"""What may be computed together with the quantized layers: found by tracing, checked, reported."""
