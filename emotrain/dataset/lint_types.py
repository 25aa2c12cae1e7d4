"""What lint says: findings, and the tables that a report shows besides them (no torch)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from emotrain.dataset.examples import Severity

SCHEMA_VERSION = 1
RANK = {"error": 0, "warning": 1, "info": 2}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, odd or worth knowing.

    `code` is a short stable word; `file` the picture's id or the file's name (None: the data set as
    a whole); `message` reads on after it; `hint` says how to fix it. `others` are the further
    files that the finding is about.
    """

    code: str
    severity: Severity
    file: str | None
    message: str
    hint: str | None = None
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class BucketRow:
    """One bucket: sides in pixels, pictures in it, the mean and largest share cut off (0..1)."""

    width: int
    height: int
    pictures: int
    mean_crop: float
    largest_crop: float


@dataclass(frozen=True)
class TagRow:
    """One tag: in how many captions it is, and the share of all captions (0..1)."""

    tag: str
    count: int
    share: float


@dataclass(frozen=True)
class FolderRow:
    """One folder: pictures in it, and how often an epoch shows one of them."""

    name: str
    pictures: int
    shown: int
    prior: bool = False


@dataclass(frozen=True)
class PictureRow:
    """One picture as the report shows it. `preview` is a small re-encoded JPEG, or empty."""

    id: str
    width: int
    height: int
    captions: tuple[str, ...]
    bucket: tuple[int, int] | None = None
    crop: float = 0.0
    sharpness: float | None = None
    preview: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class Report:
    """The whole answer of lint. `resolution` is None where no bucket could be chosen."""

    findings: tuple[Finding, ...]
    pictures: tuple[PictureRow, ...] = ()
    buckets: tuple[BucketRow, ...] = ()
    tags: tuple[TagRow, ...] = ()
    folders: tuple[FolderRow, ...] = ()
    totals: str = ""
    resolution: tuple[int, ...] = ()
    trigger: str | None = None
    seconds: float = 0.0
    assumed: str = ""  # what the sizes are held against, where no preset says it

    @property
    def has_errors(self) -> bool:
        """Whether anything stops a run."""
        return any(finding.severity == "error" for finding in self.findings)

    def counts(self) -> dict[str, int]:
        counted = Counter(finding.severity for finding in self.findings)
        return {name: counted[name] for name in ("error", "warning", "info")}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; previews are left out."""
        return {
            "schema_version": SCHEMA_VERSION,
            "totals": self.totals,
            "counts": self.counts(),
            "trigger": self.trigger,
            "resolution": list(self.resolution),
            "findings": [asdict(finding) for finding in self.findings],
            "folders": [asdict(row) for row in self.folders],
            "buckets": [asdict(row) for row in self.buckets],
            "tags": [asdict(row) for row in self.tags],
            "pictures": [
                {key: value for key, value in asdict(row).items() if key != "preview"} for row in self.pictures
            ],
            "seconds": round(self.seconds, 3),
        }


def in_order(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Errors first; then by code, the data set as a whole before its files, files by name."""
    return tuple(sorted(findings, key=lambda f: (RANK[f.severity], f.code, f.file is not None, f.file or "")))
