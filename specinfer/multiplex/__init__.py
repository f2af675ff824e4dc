"""Many calls over one stream, in frames that hold events of many: both ends of `Multiplex`.

`client.py` is the SDK's end, `server.py` that of whoever serves. They know nothing of what the
calls are about.
"""
