"""Keeps what stands below the rule the same in all scripts.

    python tests/sync.py NAME --from ppo.py    copies a definition to the other scripts that have it
    python tests/sync.py --check               prints what differs, and exits with 1 if anything does

NAME is a function, a class, a constant, `main` (if __name__ ...) or `metadata`.
"""

import argparse
import ast
import difflib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = "# /// script\n"


def parts(text: str) -> dict[str, str]:
    """The text of each part below the rule."""
    lines = text.splitlines(keepends=True)
    rule = next(n for n, line in enumerate(lines, 1) if line.startswith("# -----"))
    found = {"metadata": "".join(lines[lines.index(BLOCK) :])}
    for node in ast.parse(text).body:
        first = min(part.lineno for part in (node, *getattr(node, "decorator_list", [])))
        name = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else getattr(node, "name", "main")
        if first > rule:
            found[name] = "".join(lines[first - 1 : node.end_lineno])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("name", nargs="?")
    parser.add_argument("--from", dest="source")
    parser.add_argument("--check", action="store_true")
    options, first, diffs = parser.parse_args(), {}, []
    texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py"))}
    wanted = parts(texts[options.source]).get(options.name) if options.source in texts else None
    if not options.check and not wanted:
        parser.error("give --check, or a NAME and the script that has it")
    for script, text in texts.items():
        for name, part in parts(text).items():
            if options.check:
                origin, original = first.setdefault(name, (script, part))
                labels = f"{origin}: {name}", f"{script}: {name}"
                diffs += difflib.unified_diff(original.splitlines(True), part.splitlines(True), *labels)
            elif name == options.name:
                (ROOT / script).write_text(text.replace(part, wanted), encoding="utf-8", newline="\n")
    print("".join(diffs), end="")
    raise SystemExit(bool(diffs))


if __name__ == "__main__":
    main()
