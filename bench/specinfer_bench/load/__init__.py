"""Load on a running cluster, through the SDK alone. Knows nothing of how clusters are started."""
