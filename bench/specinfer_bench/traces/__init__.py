"""Traces as a collector receives them. Knows nothing of how spans are made."""
