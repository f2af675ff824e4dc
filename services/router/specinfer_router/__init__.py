"""The router: holds conversations, runs the session loop and streams tokens to users.

It knows tokens, trees and text. It knows no tensors and no model: those live behind gRPC in the
draft and verify tiers.
"""
