"""Nybble: compress a language model, see what that cost in quality, serve it, watch it."""

__version__ = "0.1.0"
