"""The engines a user could pick instead, beside ours: `python -m specinfer_bench.peers`."""
