"""A hook of mkdocs: every page of docs/decisions stands in the navigation, under Design."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    pages = sorted(Path(config.docs_dir, "decisions").glob("*.md"))
    design = next(part["Design"] for part in config.nav if "Design" in part)
    if not any("Decisions" in one for one in design):
        design.append({"Decisions": [f"decisions/{page.name}" for page in pages]})
    return config
