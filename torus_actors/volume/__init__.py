"""A volume as its client sees it: a file over immutable blocks, with its caches.

Where to read: ``read_side`` and ``file`` (reads and writes), ``write_back`` (what was written and
is not yet in a block), ``session`` (requests, flushes), ``commit`` and ``journal`` (how they become
durable), ``opening`` (lock, fence, replay), ``audit``.
"""
