"""Compute ops: one table, a torch reference for each, faster implementations beside it."""
