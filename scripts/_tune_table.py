"""The table of tuned launch configurations: what is shipped, what a file holds, and writing it whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from _kernel_cases import Row
from nearfield.ops.triton.configs import SHIPPED, Config, read_table

__all__ = ["Table"]


@dataclass
class Table:
    """Rows of one architecture, as they grow, over the shipped ones.

    Attributes:
        file: what is written.
        arch: whose rows are tuned.
        shipped: the shipped rows. rows: those of the file, of any architecture, by key.
        earlier: how and where rows of the file were measured before.
    """

    file: Path
    arch: str
    shipped: Mapping[str, Config]
    rows: dict[str, Config] = field(default_factory=dict)
    earlier: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def read(file: Path, arch: str) -> Table:
        """The table of a file that need not exist yet.

        Raises:
            ValueError: it is damaged.
        """
        table = Table(file, arch, read_table(SHIPPED))
        if file.is_file():
            table.rows = read_table(file)
            content = json.loads(file.read_text(encoding="utf-8"))
            table.earlier = [*content.get("earlier", []), *filter(None, [content.get("measured")])]
        return table

    def default(self, row: Row) -> Config:
        """The shipped configuration of a row."""
        # cells that fit no registers have a row for the interpreter alone: tuning may find them one
        keys = (row.key(self.arch), row.key("*"), row.key("cpu"))
        return next(self.shipped[key] for key in keys if key in self.shipped)

    def current(self, row: Row) -> Config:
        """What a call takes with this file."""
        return self.rows.get(row.key(self.arch)) or self.default(row)

    def has(self, row: Row) -> bool:
        """Whether the file has this row."""
        return row.key(self.arch) in self.rows

    def write(self, measured: Mapping[str, Any] | None) -> None:
        """Write the file whole or not at all. measured: where and how; None where nothing was measured."""
        rows = [f"{json.dumps(key)}: {json.dumps(astuple(self.rows[key]))}" for key in sorted(self.rows)]
        head = {"measured": measured, "earlier": self.earlier}
        top = "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_name(f".{self.file.name}.{os.getpid()}.part")
        try:
            part.write_text("{\n" + top + '"configs": {\n' + ",\n".join(rows) + "\n}\n}\n", encoding="utf-8")
            part.replace(self.file)
        finally:
            part.unlink(missing_ok=True)
