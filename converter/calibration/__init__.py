"""Calibration: text, and the walk over the blocks that fits each layer."""
