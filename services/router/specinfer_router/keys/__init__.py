"""API keys: how they are made, kept and recognised.

`record` is one key, `file` and `redis_keys` keep many, `control` recognises them. The package knows
nothing of HTTP, gRPC or what a key is used for.
"""
