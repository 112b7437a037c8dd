"""Storing blocks on a disk."""
