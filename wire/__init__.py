"""The protocol between nodes: frames and the message codec, without I/O."""

if __name__ != "torus_actors.wire":
    raise ImportError("import torus_actors.wire, not wire")
