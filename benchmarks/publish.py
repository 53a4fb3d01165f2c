"""A benchmark's answer: figures for programs, a page for people."""

import json
from pathlib import Path
from typing import Any


def publish(folder: Path, stem: str, figures: dict[str, Any], page: str) -> None:
    """Write both into the folder, which is made if need be, and print the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps(figures, indent=1) + "\n")
    (folder / f"{stem}.md").write_text(page)
    print(page)
