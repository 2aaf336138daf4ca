"""What a model's modules and forwards look like: owners, ties, traces, dataflow."""
