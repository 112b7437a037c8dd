"""A real etcd on loopback for tests; where there is none they skip."""

from __future__ import annotations

import os
import shutil

import pytest

from torus_actors.scenarios.etcd_server import EtcdServer

__all__ = ["EtcdServer", "require_etcd"]


def require_etcd() -> None:
    """Skip the calling test where etcd is not installed; fail instead where CI=true."""
    if shutil.which("etcd") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("etcd is not installed")
        pytest.skip("etcd is not installed")
