"""The Triton backend: both Gram products, the score and an epilogue in one kernel on the GPU."""
