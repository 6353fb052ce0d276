"""For mkdocs: pages link to `../results` and the like, as GitHub needs it; the site has those folders beside them."""

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`](../results/x.md)` becomes `](results/x.md)`, where a symbolic link stands for the folder."""
    return re.sub(r"\]\(\.\./(results|examples|experiments)\b", r"](\1", markdown)
