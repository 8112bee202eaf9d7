"""Evaluation: parity with PyTorch, and perplexity."""
