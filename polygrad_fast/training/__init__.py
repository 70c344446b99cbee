"""Training: the denoiser, A2C in imagination, the loop of Algorithm 3, checkpoints."""
