"""What the studio may read: folders of the project, and texts that were uploaded. Everything else is refused.

A path from the browser goes through `Places.inside`, an uploaded file through `Places.keep_text`.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
MAX_UPLOAD_BYTES = 20 << 20  # a corpus for a model of a few million parameters; training reads it into memory
MOST_TEXT_BYTES = 50 * MAX_UPLOAD_BYTES  # of all kept texts together


class Refused(ValueError):
    """Something the studio does not do; the message says what, and what to do instead."""


@dataclass(frozen=True)
class Places:
    """`home` is the studio's own folder; files are opened below `roots` only (home is one of them)."""

    home: Path
    roots: tuple[Path, ...]

    @classmethod
    def of(cls, home: str | Path | None = None) -> Places:
        """The project's folders of runs and records, and `home` (default: lab/out/studio)."""
        home = Path(home).resolve() if home else REPO / "lab" / "out" / "studio"
        return cls(home, (REPO / "records", REPO / "lab" / "out", REPO / "local", home))

    @property
    def trainings(self) -> Path:
        """The queue: a folder a training."""
        return self.home / "trainings"

    @property
    def texts(self) -> Path:
        """Uploaded corpora that passed `keep_text`."""
        return self.home / "texts"

    @property
    def reports(self) -> Path:
        """Reports made for download."""
        return self.home / "reports"

    @property
    def pictures(self) -> Path:
        """Pictures and numbers of analyses."""
        return self.home / "pictures"

    @property
    def trash(self) -> Path:
        """Trainings that were removed; delete them there for good."""
        return self.home / "trash"

    @property
    def uploads(self) -> Path:
        """Where Gradio puts what arrives, before anybody looked at it."""
        return self.home / "uploads"

    def inside(self, path: str | Path | None) -> Path:
        """`path` (relative to the project if it is not absolute) with links followed; Refused outside, and where
        nothing was chosen."""
        text = str(path or "").strip()
        if not text or "\0" in text:
            raise Refused("nothing is chosen; choose from the list first")
        resolved = (REPO / text).resolve()
        if not any(resolved.is_relative_to(root.resolve()) for root in self.roots):
            allowed = ", ".join(self.shown(root) for root in self.roots)
            raise Refused(f"{text} is outside of the folders that the studio opens ({allowed})")
        return resolved

    def checkpoint(self, path: str | Path | None) -> Path:
        """`path` as an existing .safetensors file inside; Refused otherwise. Other formats may carry code."""
        if not path:
            raise Refused("choose a model first")
        resolved = self.inside(path)
        if resolved.suffix != ".safetensors":
            raise Refused(f"{resolved.name} is not a .safetensors file; other kinds of checkpoints can run code")
        if not resolved.is_file():
            raise Refused(f"there is no checkpoint {self.shown(resolved)}; refresh the list")
        return resolved

    def shown(self, path: str | Path) -> str:
        """`path` as the page shows it: relative to the project where it is inside."""
        path = Path(path)
        return str(path.relative_to(REPO)) if path.is_relative_to(REPO) else str(path)

    def keep_text(self, upload: str | Path) -> Path:
        """Check an uploaded file and keep it below `texts`, named after itself and its content. What is refused
        is deleted.

        Refused: not from the upload folder, larger than MAX_UPLOAD_BYTES, empty, not UTF-8 text, or one more than
        MOST_TEXT_BYTES allow."""
        upload = Path(upload).resolve()
        if not upload.is_relative_to(self.uploads.resolve()) or not upload.is_file():
            raise Refused("the text must be uploaded through the page")
        try:
            return self._keep(upload)
        finally:
            upload.unlink(missing_ok=True)

    def _keep(self, upload: Path) -> Path:
        size = upload.stat().st_size
        if size > MAX_UPLOAD_BYTES:
            raise Refused(
                f"{upload.name} has {size / 1e6:.1f} MB; at most {MAX_UPLOAD_BYTES / 1e6:.0f} MB can be uploaded. "
                "Larger texts: python -m lab.train --path=FILE"
            )
        raw = upload.read_bytes()
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise Refused(f"{upload.name} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
        if "\0" in text:
            raise Refused(f"{upload.name} is not text: it has a zero byte at character {text.index(chr(0))}")
        if not text.strip():
            raise Refused(f"{upload.name} is empty; a model needs text")
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", upload.stem).strip("-")[:40] or "text"
        kept = self.texts / f"{stem}-{hashlib.sha256(raw).hexdigest()[:8]}.txt"
        self.texts.mkdir(parents=True, exist_ok=True)
        if not kept.exists():
            if sum(f.stat().st_size for f in self.texts.glob("*.txt")) + size > MOST_TEXT_BYTES:
                raise Refused(f"{self.shown(self.texts)} is full; delete texts there that you no longer need")
            upload.replace(kept)
        return kept
