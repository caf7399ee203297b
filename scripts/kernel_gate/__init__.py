"""Compiles the GPU kernels for GPUs that are not here, reads the machine code, and holds it to its budget."""
