"""Low-bit linears for GPUs, in Triton and Gluon. Imported when the dispatch table asks for one of them."""
