"""The CUDA backend: the walk of the Triton backend in CUDA C++."""
