"""Architectures, losses and optimiser recipes."""
