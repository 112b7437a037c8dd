"""Cluster metadata: one service over a small key-value interface with three backends.

Where to read: ``kv`` (the interface of a store), ``service`` (what it is used for, and where each
part is), ``keys`` (every key there is), ``opening`` (from a URL to a service). ``memory`` is the
reference among the backends; ``sqlite`` and ``etcd`` behave alike. docs/metadata.md says what can
be relied on.
"""
