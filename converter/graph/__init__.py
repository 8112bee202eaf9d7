"""The graph: the op, the trace of a model, and the ONNX file."""
