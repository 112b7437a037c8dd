"""A volume as its client sees it: a file over immutable blocks, with its caches.

Where to read: ``file`` (reads and writes), ``write_back`` (what was written and is not yet in a
block), ``commit`` (what a flush does), ``read_cache``.
"""
