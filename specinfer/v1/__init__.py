"""Generated from protos/specinfer/v1 by `make protos`. Never edited by hand."""
