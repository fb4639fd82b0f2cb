"""Keeps what the scripts share the same in all of them.

    python tests/sync.py NAME --from ppo.py    copies a definition to every other script that has one of that name
    python tests/sync.py --check               prints what differs under one name, and exits with 1 if anything does

NAME is a function or a class at the top level, `plumbing` or `speed` (the blocks between comment rules) or `metadata`
(the first lines, for uv). --check also compares the fields of `Args`: type and help text, not the default value.
"""
import argparse
import ast
import difflib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RULED = r"^# -{100,}\n# %s.*?\n(# -{100,}\n).*?\n\1"
BLOCKS = {"plumbing": RULED % "Plumbing", "speed": RULED % "Speed", "metadata": r"\A# /// script\n.*?^# ///\n"}
OWN = ("Args", "train")  # every script has one, and each is different


def spans(text: str) -> dict[str, tuple[int, int]]:
    """Where each definition and each block begins and ends, as positions in the text."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name not in OWN:
            first = min(x.lineno for x in (node, *node.decorator_list))
            found[node.name] = starts[first - 1], starts[node.end_lineno]
    for name, pattern in BLOCKS.items():
        if block := re.search(pattern, text, re.DOTALL | re.MULTILINE):
            found[name] = block.span()
    return found


def shared(text: str) -> dict[str, str]:
    """What --check compares: definitions (those of the plumbing as one block), blocks, and the fields of Args."""
    where = spans(text)
    low, high = where.get("plumbing", (0, 0))
    parts = {name: text[a:b] for name, (a, b) in where.items() if name in BLOCKS or not low <= a < high}
    if args := re.search(r"^class Args.*?(?=^\S)", text, re.DOTALL | re.MULTILINE):
        for name, kind, comment in re.findall(r"^    (\w+): (.+?) = [^#\n]*(#.*)?$", args[0], re.MULTILINE):
            parts[f"Args.{name}"] = f"{name}: {kind}  {comment}\n"
    return parts


def differences(scripts: dict[str, str]) -> str:
    """Unified diffs of each part that differs from its first occurrence; scripts are texts under their names."""
    first, diffs = {}, []
    for script, text in scripts.items():
        for name, part in shared(text).items():
            origin, original = first.setdefault(name, (script, part))
            labels = f"{origin}: {name}", f"{script}: {name}"
            diffs += difflib.unified_diff(original.splitlines(True), part.splitlines(True), *labels)
    return "".join(diffs)


def main() -> None:
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", nargs="?")
    parser.add_argument("--from", dest="source", metavar="SCRIPT")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    scripts = {path.name: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py"))}
    try:
        places = {script: spans(text) for script, text in scripts.items()}
    except SyntaxError as error:
        parser.error(f"one of {', '.join(scripts)} is not Python: {error}")
    if options.check and not options.name:
        print(diffs := differences(scripts), end="")
        raise SystemExit(bool(diffs))
    if not options.name or not options.source or options.check:
        parser.error("give either --check, or a NAME and --from SCRIPT")
    if options.source not in scripts:
        parser.error(f"there is no script {options.source}; there are {', '.join(scripts)}")
    if options.name not in places[options.source]:
        parser.error(f"{options.source} has no {options.name} at its top level")
    new = scripts[options.source][slice(*places[options.source][options.name])]
    for script, old in scripts.items():
        if script != options.source and options.name in places[script]:
            first, last = places[script][options.name]
            (ROOT / script).write_text(old[:first] + new + old[last:], encoding="utf-8", newline="\n")
            print(f"{script}: {'unchanged' if old[first:last] == new else 'changed'}")


if __name__ == "__main__":
    main()
