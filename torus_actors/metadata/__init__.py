"""Cluster metadata: one service over a small key-value interface with three backends."""
