"""Benchmarks of a cluster: speculation on against off, interleaved, and the same loop in-process.

The parts that time a cluster need the SDK alone; `local` and `grown` need the `model` and `router`
extras. It refuses to know how processes are started: `specinfer bench` does that.
"""
