"""A trained model for other engines, and back: one file a format, each with its own optional dependency.

`lmlight export FORMAT CHECKPOINT TARGET`, `lmlight import FORMAT SOURCE CHECKPOINT`. Free of lightning.
"""
