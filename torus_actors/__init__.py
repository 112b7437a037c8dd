"""torus-actors: a distributed block store built from supervised actors."""

__version__ = "0.1.0"
