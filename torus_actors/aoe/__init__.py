"""ATA over Ethernet: a volume as a disk on the local network, without IP.

Three parts without I/O: ``protocol`` has the frames, ``identify`` what a disk says of itself, and
``target`` what is done with a command and what is not done twice. ``port`` is the socket on a
network interface, and ``endpoint`` moves frames between the two on an event loop.
"""
