"""The decoder, its configuration and its loader."""
