"""Check that readers find things: no class name twice, no file name twice in a package, no crowded folder."""

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "mixtera_hpc"
FILES = sorted(PACKAGE.rglob("*.py"))

MAX_FILES = 15
"""Modules of a folder, without `__init__.py`."""

CROWDED_FOLDERS = {
    "cli/verbs": "one module per verb, as users type them",
}
"""Folder → why it may hold more than `MAX_FILES` modules."""

NESTED_TWICE = {"Config"}
"""Names that a component's nested class may share: every mixing algorithm owns its `Config`."""


def test_no_class_name_is_used_twice() -> None:
    places = defaultdict(list)
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name not in NESTED_TWICE:
                places[node.name].append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert not twice, f"class names that are used twice: {twice}"


def test_no_file_name_is_used_twice_in_a_package() -> None:
    places = defaultdict(list)
    for path in FILES:
        relative = path.relative_to(PACKAGE)
        if len(relative.parts) > 1 and path.stem not in ("__init__", "__main__"):
            places[relative.parts[0], path.name].append(str(relative))
    twice = [where for where in places.values() if len(where) > 1]
    assert not twice, f"files of one name in a package: {twice}"


def test_no_folder_is_crowded_without_a_reason() -> None:
    sizes: dict[str, int] = defaultdict(int)
    for path in FILES:
        if path.name != "__init__.py":
            sizes[str(path.parent.relative_to(PACKAGE))] += 1
    crowded = {folder: size for folder, size in sizes.items() if size > MAX_FILES and folder not in CROWDED_FOLDERS}
    assert not crowded, (
        f"more than {MAX_FILES} modules: {crowded}; make subfolders, or give a reason in CROWDED_FOLDERS"
    )
    idle = [folder for folder in CROWDED_FOLDERS if sizes[folder] <= MAX_FILES]
    assert not idle, f"CROWDED_FOLDERS names folders that are not crowded: {idle}"
