"""The verify service: holds the target model and decides every token.

It sees tokens and trees, never text, users or drafters.
"""
