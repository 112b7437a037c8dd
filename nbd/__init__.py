"""The NBD protocol, without I/O, and the server that speaks it."""

if __name__ != "torus_actors.nbd":
    raise ImportError("import torus_actors.nbd, not nbd")
