"""The structure of a model: owners of modules, tied tensors, traces of forwards, dataflow."""
