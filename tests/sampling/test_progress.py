"""What is said while chains run, and where nobody listens."""

from __future__ import annotations

import sys

import pytest

from basinscope.io.store import DONE
from basinscope.sampling.chain import Progress
from basinscope.sampling.progress import show_count, show_progress


@pytest.mark.parametrize("show", [None, True])
def test_nothing_is_said_where_stderr_is_closed(
    show: bool | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with show_progress([0], 4, 4, 32, show) as report:
        report(Progress(chain=0, step=4, draws=4, loss=3.5, state=DONE))
    with show_count("sequences", 4, show) as say:
        say(4)
    assert capsys.readouterr().out == ""
