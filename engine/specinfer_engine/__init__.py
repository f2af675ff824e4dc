"""The torch half that draft and verify share: models on paged keys and values, in ragged passes.

Import from the modules: `loader`, `runner`, `batch`, `blocks`, `sequence`, `logits`, `acceptance`,
`thread`. The package knows no transport, no event loop and no session of a user.
"""
