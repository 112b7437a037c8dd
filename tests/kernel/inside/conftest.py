"""A cluster in the guest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.cluster import Cluster
from tests.kernel.inside.forked import ForkedProcess
from tests.kernel.inside.system import SIZE
from torus_actors.scenarios import processes


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "DEADLINE_S", 240.0)  # the processor here is emulated
        patch.setattr(processes, "Process", ForkedProcess)
        with Cluster(tmp_path_factory.mktemp("cluster")) as running:
            running.start_nodes(2, replication=2)
            yield running


@pytest.fixture
def volume(cluster: Cluster, request: pytest.FixtureRequest) -> str:
    """A new volume."""
    name = str(request.node.name).replace("_", "-")
    cluster.ctl("volume", "create", name, str(SIZE))
    return name
