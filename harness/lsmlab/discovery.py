"""Finding labs and scenarios: in the folders of whoever runs us, and in the library that comes with lsmlab."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from lsmlab import definition, lab, scenario
from lsmlab.errors import DefinitionError
from lsmlab.lab import Lab
from lsmlab.scenario import Scenario

T = TypeVar("T")
SKIPPED = frozenset({".git", ".venv", "node_modules", "__pycache__", "build", "dist"})
DEFAULT_LAB = "debian-13"


def library() -> Path:
    """The folder that holds lsmlab's own `labs` and `scenarios`: in the package, or in the source tree."""
    installed = Path(__file__).parent / "library"
    return installed if installed.is_dir() else Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Found(Generic[T]):
    """What a search found: files by id, those of the current folder before the library's."""

    own: dict[str, Path]
    built_in: dict[str, Path]

    def get(self, name: str) -> Path | None:
        """The file of one id, or None."""
        return self.own.get(name) or self.built_in.get(name)

    @property
    def ids(self) -> list[str]:
        """Every id, sorted."""
        return sorted({*self.own, *self.built_in})


def scenario_files(root: Path) -> dict[str, Path]:
    """Every scenario file below `root`, by id (its folder's name). Raises DefinitionError where two share one."""
    return _by_id(
        ((p.parent.name, p) for p in named_like_scenarios(root) if definition.peek_kind(p) == scenario.KIND),
        "scenario",
    )


def named_like_scenarios(root: Path) -> list[Path]:
    """Every file below `root` that is called as scenarios are, of whatever kind; `root` itself where it is a file."""
    return list(_walk(root, scenario.FILE_NAME))


def lab_files(root: Path) -> dict[str, Path]:
    """Every lab file directly in `root`, by id."""
    return _by_id(((p.stem, p) for p in named_like_labs(root) if definition.peek_kind(p) == lab.KIND), "lab")


def named_like_labs(root: Path) -> list[Path]:
    """Every file directly in `root` that is called as labs are, of whatever kind."""
    return sorted(root.glob("*.yaml")) if root.is_dir() else []


def roots(folder: str, base: Path | None = None) -> tuple[Path, ...]:
    """Where labs or scenarios are looked for: the folder of `base` (the current one), and the library's if another."""
    own, built_in = ((base or Path.cwd()) / folder).resolve(), (library() / folder).resolve()
    return (built_in,) if own == built_in else (own, built_in)


def _walk(root: Path, name: str) -> Iterable[Path]:
    if root.is_file():
        yield root
        return
    for folder in sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else ():
        if folder.name in SKIPPED or folder.is_symlink():  # a link may lead back up
            continue
        if (folder / name).is_file():
            yield folder / name
        yield from _walk(folder, name)


def _by_id(pairs: Iterable[tuple[str, Path]], what: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name, path in pairs:
        if name in found:
            raise DefinitionError(
                f"two {what}s are called {name!r}: {found[name]} and {path}", hint="Rename one of them."
            )
        found[name] = path
    return found


def _search(folder: str, files: Callable[[Path], dict[str, Path]], base: Path | None) -> Found[T]:
    *own, built_in = roots(folder, base)
    return Found(files(own[0]) if own else {}, files(built_in))


def scenarios(base: Path | None = None) -> Found[Scenario]:
    """The scenarios of `base`/scenarios (the current folder's by default) and of the library."""
    return _search("scenarios", scenario_files, base)


def labs(base: Path | None = None) -> Found[Lab]:
    """The labs of `base`/labs and of the library."""
    return _search("labs", lab_files, base)


def load_lab(name: str = DEFAULT_LAB, base: Path | None = None) -> Lab:
    """The lab called `name`. Raises DefinitionError with the nearest name."""
    found = labs(base)
    path = found.get(name)
    if path is None:
        raise definition.unknown_name("lab", name, found.ids)
    return lab.load(path, found.get)


def load_scenario_file(path: Path, base: Path | None = None) -> Scenario:
    """One scenario file; what it extends is looked for beside it, in the current folder and in the library."""
    return _load(path, scenarios(base))


def _load(path: Path, found: Found[Scenario]) -> Scenario:
    beside = path.resolve().parent.parent

    def find(name: str) -> Path | None:
        sibling = beside / name / scenario.FILE_NAME
        return sibling if sibling.is_file() else found.get(name)

    return scenario.load(path, find)


def load_scenarios(names: Iterable[str] = (), base: Path | None = None) -> tuple[Scenario, ...]:
    """The scenarios called `names`: ids, folders or files. None named: all of the current folder, else the library's.

    Raises DefinitionError for a name that stands for nothing, and for a folder without scenarios.
    """
    found = scenarios(base)
    paths: dict[Path, None] = {}
    for name in names:
        direct = found.get(name)
        if direct is not None:
            paths[direct.resolve()] = None
            continue
        place = Path(name)
        if not place.exists():
            raise definition.unknown_name("scenario", name, found.ids)
        paths |= dict.fromkeys(p.resolve() for p in _in_place(place))
    if not paths:
        paths = dict.fromkeys((found.own or found.built_in).values())
    loaded = {path: _load(path, found) for path in paths}
    _by_id(((scenario.id, path) for path, scenario in loaded.items()), "scenario")
    return tuple(loaded.values())


def _in_place(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    below = list(scenario_files(place).values())
    if (place / scenario.FILE_NAME).is_file():
        below = [place / scenario.FILE_NAME, *below]
    if not below:
        raise DefinitionError(
            f"{place}: no {scenario.FILE_NAME} with `kind: {scenario.KIND}` in it",
            hint="Name a scenario, its folder or its file; `lsmlab scenarios` lists those that are known.",
        )
    return below
