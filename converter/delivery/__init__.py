"""Delivery: the folder OUT and its manifest."""
