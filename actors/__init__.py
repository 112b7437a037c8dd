"""The actors of a node, one a file."""

if __name__ != "torus_actors.actors":
    raise ImportError("import torus_actors.actors, not actors")
