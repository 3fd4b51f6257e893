"""The CPU backend: Gram products by torch's BLAS, fused C++ epilogues on their tiles."""
