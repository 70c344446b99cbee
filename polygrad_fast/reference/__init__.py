"""Plain PyTorch twins of the fused kernels: readable, correct, slow."""
