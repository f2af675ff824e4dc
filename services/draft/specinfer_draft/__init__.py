"""The draft tier: guesses what the target will say, as token trees, over gRPC.

Import from the modules: `engine`, `servicer`, `settings`, `grow`, `drafters`. Nothing here decides
a token: a wrong guess costs time and never changes an output.
"""
