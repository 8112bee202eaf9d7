"""The mathematics of N:M activation sparsity, in torch alone: patterns, criteria, mitigations, the op."""
