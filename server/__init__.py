"""The serving gateway: HTTP in, token streams out. No torch in this process."""
