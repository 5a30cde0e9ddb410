"""The documentation site: ``make docs`` builds it into build/docs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import generate

generate.main(Path(__file__).parent / "reference")

project = "hiermpi"
author = "the hiermpi developers"
extensions = ["myst_parser"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "hiermpi"
exclude_patterns = ["build"]
