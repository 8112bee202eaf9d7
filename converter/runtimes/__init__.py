"""Runtimes: what loads and runs OUT."""
