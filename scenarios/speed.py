"""How fast the simulator is: always the same five nodes, load and faults.

Simulated seconds of a whole cluster for each second of one core. Neither more load nor another
draw can change the figure, as they do that of ``explore``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torus_actors.scenarios.cluster import Shape
from torus_actors.scenarios.run import Result, run
from torus_actors.scenarios.spec import Drawn, Scenario
from torus_actors.scenarios.workload import Workload

SEEDS = (1, 2, 3)

SPEED = Scenario(
    "speed",
    "Five nodes under the load of a scenario's mean, with faults that do not stop its clients",
    {
        "crash_node": (8, 8),
        "cut_peers": (10, 10),
        "slow_disk": (10, 10),
        "slow_network": (5, 5),
        "reset_connections": (5, 5),
        "kill_actor": (5, 5),
        "collect_now": (5, 5),
    },
)

DRAWN = Drawn(
    Shape(
        nodes=5,
        replication=2,
        volume_bytes=(1 << 20, 1 << 20),
        store_bytes=160 << 20,
        write_cache_bytes=256 << 10,
    ),
    duration_s=60.0,
    faults={kind: every_s for kind, (every_s, _) in SPEED.faults.items()},
    workload=Workload(),
    broken_max=1,
)


@dataclass(frozen=True, slots=True)
class Speed:
    """What was measured, over all runs."""

    results: list[Result]

    @property
    def simulated_s(self) -> float:
        """Virtual time, of each whole cluster."""
        return sum(result.virtual_s for result in self.results)

    @property
    def cpu_s(self) -> float:
        """Processor time."""
        return sum(result.cpu_s for result in self.results)

    @property
    def factor(self) -> float:
        """Simulated seconds for each second of one core."""
        return self.simulated_s / self.cpu_s

    def describe(self) -> str:
        """In a line."""
        operations = sum(result.operations for result in self.results)
        return (
            f"{DRAWN.shape.nodes} nodes, {operations} operations: {self.simulated_s:.0f} simulated "
            f"seconds in {self.cpu_s:.2f} s of a core, {self.factor:.0f} for each"
        )


def measure(seeds: tuple[int, ...] = SEEDS) -> Speed:
    """Run it with each of the seeds; the first run is made twice, and counts once it is warm."""
    run(SPEED, seeds[0], drawn=DRAWN)
    return Speed([run(SPEED, seed, drawn=DRAWN) for seed in seeds])
