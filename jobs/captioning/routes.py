"""Which index is searched for an image, where a column of the input says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from smallcap.config import CaptionConfig
from smallcap.errors import ErrorCode, RowError


@dataclass(frozen=True)
class Routes:
    """The column with the names of indexes, and the names that it may have."""

    column: str
    names: tuple[str, ...]

    @classmethod
    def of(cls, config: CaptionConfig) -> Routes | None:
        """Returns what a run's options say; None where all indexes are searched for each image."""
        column = config.retrieval.index_column
        return None if column is None else cls(column, tuple(index.name for index in config.indexes))

    def of_rows(self, rows: pa.Table) -> list[str | None]:
        """Returns the name in each row; None where there is none, so that all indexes are searched."""
        return [(name or "").strip() or None for name in rows[self.column].to_pylist()]

    def refusals(self, names: Sequence[str | None]) -> list[RowError | None]:
        """Returns for each name what is wrong with it; None where nothing is."""
        return [self._refusal(name) if name not in (None, *self.names) else None for name in names]

    def _refusal(self, name: str | None) -> RowError:
        return RowError(
            ErrorCode.UNKNOWN_INDEX,
            f"The run has no index of the name in {self.column}.",
            where=str(name),
            remedy=f"It has {', '.join(self.names)}; a row without a name searches all.",
        )
