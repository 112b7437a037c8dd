"""Failure scenarios: workload, faults and checks as data."""

if __name__ != "torus_actors.scenarios":
    raise ImportError("import torus_actors.scenarios, not scenarios")
