"""What was found out about a model: findings, and how a report of them looks."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

Level = Literal["ok", "note", "warning"]
STYLES: dict[Level, str] = {"ok": "green", "note": "cyan", "warning": "bold yellow"}
WIDTH = 100  # characters of a line of plain text


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    topic : str
    level : {"ok", "note", "warning"}
        A note is worth knowing; a warning makes numbers wrong or stops ``sample``.
    text : str
        What was found and what to do about it.
    values : dict
        The same for programs: numbers, names, or lists of them.
    """

    topic: str
    level: Level
    text: str
    values: dict[str, Any]


@dataclass(frozen=True, repr=False)
class ModelReport:
    """What :func:`basinscope.check_model` found; ``print`` shows it.

    Attributes
    ----------
    model : str
        The model's class.
    parameters : int
        Its weights.
    findings : tuple of Finding
        In the order of reading; ``report["batch"]`` gives one by its topic.
    """

    model: str
    parameters: int
    findings: tuple[Finding, ...]

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that are warnings."""
        return tuple(finding for finding in self.findings if finding.level == "warning")

    def __getitem__(self, topic: str) -> Finding:
        found = {finding.topic: finding for finding in self.findings}
        if topic not in found:
            raise KeyError(f"no finding {topic!r}; there are {', '.join(found)}")
        return found[topic]

    def __str__(self) -> str:
        lines = [self._heading()]
        widest = max((len(finding.topic) for finding in self.findings), default=0)
        for finding in self.findings:
            start = f"{finding.level:8} {finding.topic:{widest}}  "
            lines += textwrap.wrap(
                finding.text,
                WIDTH,
                initial_indent=start,
                subsequent_indent=" " * len(start),
                break_long_words=False,
            )
        return "\n".join(lines)

    __repr__ = __str__

    def __rich__(self) -> Table:
        table = Table(title=self._heading(), title_justify="left", show_edge=False)
        for heading in ("", "about", "found"):
            table.add_column(heading)
        for finding in self.findings:
            level = Text(finding.level, STYLES[finding.level])
            table.add_row(level, finding.topic, Text(finding.text))
        return table

    def _heading(self) -> str:
        return f"{self.model}, {self.parameters:,} weights"
