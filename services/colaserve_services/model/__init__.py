"""Cola-DLM in pure PyTorch: Text VAE, block-causal DiT prior, flow matching, caches, checkpoints. Knows no gRPC."""
