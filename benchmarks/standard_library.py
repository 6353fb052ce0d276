"""A second kind of text: the modules of Python's standard library, a document each, as a .jsonl file for `--dataset`.

python benchmarks/standard_library.py FILE.jsonl
"""

import json
import random
import sys
import sysconfig
from pathlib import Path

LEAST_CHARACTERS = 8192  # of a module: some 2,000 tokens
SEED = 0  # of the order, so that no split gets one package alone


def main(into: Path) -> None:
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo"}
    paths = [path for path in sorted(root.rglob("*.py")) if not left_out & set(path.relative_to(root).parts)]
    texts = [path.read_text(encoding="utf-8", errors="strict") for path in paths]
    texts = [text for text in texts if len(text) >= LEAST_CHARACTERS]
    random.Random(SEED).shuffle(texts)
    into.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n", encoding="utf-8")
    print(f"{len(texts)} modules, {sum(map(len, texts)) / 1e6:.1f} million characters")  # noqa: T201


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("name the file to write")
    main(Path(sys.argv[1]))
