"""Data through Hugging Face ``datasets``: hub ids, saved folders, parquet, csv, json, images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfstep.errors import UserError
from sources.context import Context, Pools
from sources.processors import unreachable
from sources.tabular import Tabular

BUILDERS = ("parquet", "csv", "json", "text", "arrow", "imagefolder", "audiofolder")


@dataclass(frozen=True, kw_only=True)
class Datasets(Tabular):
    """``path`` is a hub id, a folder written by ``save_to_disk``, or one of `BUILDERS` with its
    ``files`` by pool, or the ``folder`` of images that ``imagefolder`` reads."""

    path: str
    name: str | None = None
    revision: str | None = None
    files: dict[str, str] | None = None
    folder: str | None = None
    options: dict[str, Any] | None = None
    """What else the builder takes: {delimiter: ";"} for csv."""

    def load(self, context: Context) -> Pools:
        tables = self._tables()
        identity = {name: table._fingerprint for name, table in tables.items()}
        return self.pools(tables, identity, context)

    def _tables(self) -> Mapping[str, Any]:
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity_error()
        folder = Path(self.path).expanduser()
        if (folder / "dataset_dict.json").is_file():
            return dict(datasets.load_from_disk(str(folder)).items())  # type: ignore[union-attr]
        if (folder / "state.json").is_file():
            return {"train": datasets.load_from_disk(str(folder))}
        options: dict[str, Any] = dict(self.options or {})
        if self.path == "parquet":
            # Arrow otherwise keeps every column chunk that it has read until the file is done.
            import pyarrow.dataset

            scan = pyarrow.dataset.ParquetFragmentScanOptions(pre_buffer=False)
            options.setdefault("fragment_scan_options", scan)
        if self.files:
            options["data_files"] = {k: self._file(v) for k, v in self.files.items()}
        if self.folder:
            options["data_dir"] = str(Path(self.folder).expanduser())
            if not Path(options["data_dir"]).is_dir():
                raise UserError(f"data.folder: {self.folder} is not a folder")
        if self.path in BUILDERS and not (self.files or self.folder):
            raise UserError(f"data.path: {self.path} needs files (by pool) or a folder")
        try:
            return dict(
                datasets.load_dataset(
                    self.path, self.name, revision=self.revision, **options
                ).items()
            )
        except Exception as error:  # the library raises its own, the hub's and the OS's types
            raise unreachable(f"data set {self.path!r}", error) from error

    def _file(self, name: str) -> str:
        path = Path(name).expanduser()
        if "*" not in name and not path.is_file():
            near = sorted(p.name for p in path.parent.glob("*")) if path.parent.is_dir() else []
            hint = f"; {path.parent} holds {', '.join(near[:8]) or 'nothing'}" if near else ""
            raise UserError(f"data.files: {name} does not exist{hint}")
        return str(path)
