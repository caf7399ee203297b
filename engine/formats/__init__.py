"""Checkpoint formats: how a file stores a module. A dialect never leaves this folder."""
