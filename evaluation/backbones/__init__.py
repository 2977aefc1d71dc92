"""Check whether GradMem is right on every causal LM of Transformers."""
