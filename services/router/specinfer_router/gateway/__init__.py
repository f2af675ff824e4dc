"""The HTTP side of a router: what it answers beside gRPC, in the same event loop.

Each module here holds one thing: `server` the listening socket, `operator` health and metrics. The
package knows nothing of workers or protobuf; what generates is `router.py`.
"""
