"""nmsparse: post-training N:M activation sparsity for Hugging Face language models, to ONNX."""
