"""The pages that tell users what there is: README and those of the rooms that it leads to."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = tuple(ROOT / folder / "README.md" for folder in (".", "service", "adapters", "docker", "loadtests"))
README, SERVICE, LIBRARY, *_ = (page.read_text(encoding="utf-8") for page in PAGES)
EVERYTHING = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
