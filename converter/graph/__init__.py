"""The graph: the op, the trace of a model, and the ONNX file.

A pass is a verb that takes a graph and returns the one to go on with, which of `onnx_ir` is the same one, changed, and
of `onnx` a copy: `stamp`, `give_phase`, `merge` and `to_plugin` (beside its rows); `densify`, `lower` and `widen`.
"""
