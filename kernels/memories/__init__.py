"""The kinds of memory: one file each, listed in kinds.py."""
