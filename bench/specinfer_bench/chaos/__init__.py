"""Faults on purpose: a cluster of real processes, load on it, and what its users noticed.

This package starts and breaks processes; it knows nothing of how the cluster survives that.
"""
