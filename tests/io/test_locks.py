"""Locks on directories."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from basinscope.io.locks import locked


def test_who_is_refused_keeps_nothing_open(tmp_path: Path) -> None:
    held = OSError("held")
    with locked(tmp_path, held):
        before = os.listdir("/proc/self/fd")
        for _ in range(3):
            with pytest.raises(OSError, match="held"), locked(tmp_path, held, patience=0):
                pass
        assert os.listdir("/proc/self/fd") == before
    with locked(tmp_path, held):
        pass
