"""Quantization methods and the pipeline that runs them block by block."""
