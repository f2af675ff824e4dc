"""Exit 0 when the gRPC server at ADDRESS reports itself as serving: a container's health check.

Knows the standard health service and none of ours.
"""

import sys
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_SECONDS = 3.0


def is_serving(address: str) -> bool:
    """Ask the server once; no answer in time counts as not serving."""
    with grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_SECONDS)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: probe.py HOST:PORT", file=sys.stderr)
        return 2
    return 0 if is_serving(sys.argv[1]) else 1


if __name__ == "__main__":
    sys.exit(main())
