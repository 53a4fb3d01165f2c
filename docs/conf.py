"""How Sphinx builds these pages: `make docs`. Warnings are errors there."""

from __future__ import annotations

import os
import posixpath
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import kvkernels  # noqa: E402

project = "kvkernels"
author = copyright = "the kvkernels authors"
version = release = kvkernels.__version__

#: Where the sources are read; a fork says its own.
REPOSITORY = os.environ.get("KVKERNELS_REPOSITORY", "https://github.com/kvkernels/kvkernels/blob/main")

extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"kvkernels {version}"
html_copy_source = False

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # numpydoc's parameters have them
# A class's page lists its methods, not a table of them and a page each.
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
autosummary_generate = False

_LINK = re.compile(r"(?<!!)(\[(?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*\])\(([^)\s#]+)(#[^)]*)?\)")


def links_into_the_repository(docname: str, text: str) -> str:
    """A page's text in which links to files outside of this folder are URLs of the repository."""

    def target(match: re.Match[str]) -> str:
        words, path, anchor = match[1], match[2], match[3] or ""
        place = posixpath.normpath(posixpath.join("docs", posixpath.dirname(docname), path))
        if "://" in path or place.startswith("docs/"):
            return match[0]
        if not (ROOT / place).exists():
            raise FileNotFoundError(f"docs/{docname}.md links to {place}, which is not there")
        return f"{words}({REPOSITORY}/{place}{anchor})"

    return _LINK.sub(target, text)


def setup(app: Sphinx) -> None:
    def read(_: Sphinx, docname: str, source: list[str]) -> None:
        source[0] = links_into_the_repository(docname, source[0])

    app.connect("source-read", read)
