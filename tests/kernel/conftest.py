"""Tests that need a kernel which the guest has are for the guest."""

from __future__ import annotations

import os

collect_ignore = [] if "TORUS_GUEST" in os.environ else ["inside"]
