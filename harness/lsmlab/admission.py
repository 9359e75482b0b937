"""What a scenario changes of a machine that is kept, and whether the journal provably covers it. No guest is asked.

Strict and simple: what is not known to be covered is refused, with the reason, before anything is changed.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lsmlab.container import install
from lsmlab.container.spec import Container
from lsmlab.errors import DefinitionError
from lsmlab.scenario import Attempt, Scenario, Step, read_file
from lsmlab.terms import AttemptKind, Framework

SCHEME, VAGRANT = "ssh:", "vagrant:"
AREAS = ("/etc", "/srv", "/var/www", "/opt", "/usr/local", "/home", "/root")
"""Below these, files are kept and put back. Not elsewhere: logs and data that others write at the same time."""
OBEYED = (
    *(
        f"/etc/{name}"
        for name in (
            "NetworkManager/", "anacrontab", "apt/", "audit", "bash", "binfmt.d", "cron", "crypttab", "csh", "dbus",
            "default/grub", "dnf/", "environment", "fstab", "init", "kernel/", "ld.so", "logrotate", "modprobe.d",
            "modules", "netplan", "network", "nsswitch", "pam.d", "polkit", "profile", "rc", "resolv", "security",
            "selinux/", "ssh/", "sudoers", "sysctl", "systemd", "tmpfiles.d", "udev", "update-motd.d", "xdg/systemd",
            "yum", "zsh",
        )
    ),
    "/root/.", "/usr/local/bin", "/usr/local/lib/systemd", "/usr/local/sbin",
)  # fmt: skip
"""What the whole machine obeys: written there, it acts beyond what the journal can undo."""
OBEYED_AT_HOME = re.compile(r"/home/[^/]+/\.|.*/\.ssh(?:/|$)")
"""What a login obeys."""
ALWAYS = ("/etc", "/run/lsmlab-arm")
"""Kept for every scenario: what a step does by a program lies there."""
APPARMOR_CACHE = "/var/cache/apparmor"
PATH_PROGRAMS = {
    "cp": r"-[rRfpnvPaHLu]+|--recursive|--force",
    "mv": r"-[fnvu]+|--force",
    "ln": r"-[sfnvP]+|--force",
    "mkdir": r"-[pv]+|--parents|--mode=[0-7]+",
    "install": r"-[pv]+|--mode=[0-7]+|--(owner|group)=[a-z-]+",
    "chmod": r"-[Rfv]+|--recursive",
    "chown": r"-[RfvhP]+|--recursive",
    "chgrp": r"-[RfvhP]+|--recursive",
    "touch": r"-[amh]+",
    "rm": r"-[rRfv]+|--recursive|--force",
    "rmdir": r"-v",
    "setfacl": r"-[RP]+",
    "chcon": r"-[Rhv]+",
    "restorecon": r"-[Rrv]+",
}
"""They change the files that their arguments name, and no others: with these options, and those of `VALUED`."""
VALUED = {
    "mkdir": frozenset({"-m"}), "install": frozenset({"-m", "-o", "-g"}), "setfacl": frozenset({"-m"}),
    "chcon": frozenset({"-u", "-r", "-t"}),
}  # fmt: skip
"""Their options whose next word is no file."""
VALUE_FIRST = frozenset({"chmod", "chown", "chgrp", "chcon"})
"""Their first word, where no option of `VALUED` is there, is a mode, an owner or a context, and no file."""
FROM_AND_TO = frozenset({"cp", "mv", "ln", "install"})
UNIT_VERBS = frozenset({"start", "stop", "restart", "enable", "disable"})
READERS = frozenset({"cat", "head", "tail", "ls", "stat", "id", "wc", "cmp"})
"""They change nothing."""
GROUP_CHANGE = re.compile(r"(?:usermod (?:-aG|-a -G|--append --groups) [a-z0-9_,-]+ [a-z0-9_-]+)|groupadd [a-z0-9_-]+")
VOLUME = re.compile(rf"({install.VOLUMES}/[A-Za-z0-9][A-Za-z0-9_.-]*)/_data(?:/|$)")
"""A volume of a container's. It must not be there yet, and is gone at the end: nobody else's is ever used."""
GIVEN = re.compile(r"/(?:etc|usr)(?:/|$)")
"""What of the machine a container may be given, read-only: where no program has its socket."""
COVERED = frozenset({"run", "binds", "security_opt", "user", "network"})
"""Keys of a container with which it can change nothing but itself and its volumes."""
BEYOND = {
    "privileged": "is privileged, so that all of the machine is its own",
    "cap_add": "has capabilities beyond the engine's own",
    "pid": "sees the processes of the whole machine",
    "image": "is made of an image, which the engine there would keep",
}
LOOSE = ("seccomp=unconfined", "systempaths=unconfined")
SERVER = re.compile(r"httpd -f -p 127\.0\.0\.1:[0-9]{4,5} -h /[^\s]*")
"""All that a container may run that has the machine's network: BusyBox's web server, for who is on the machine."""
PROFILE_HEAD = re.compile(r"""^(?:profile[ \t]+\S+|[/@]\S+|"[^"]+").*\{[ \t]*(?:#.*)?$""", re.MULTILINE)
"""The first line of a profile, which a file may have several of."""
PLAIN_PATTERN = re.compile(r"[^\\.*+?\[\]{}^$]*")
"""A regular expression that matches some words and nothing else: it can show nothing of what leaked."""


def host_of(lab: str) -> str | None:
    """The machine that `--lab ssh:HOST` or `--lab vagrant:NAME` names; None for the name of a lab."""
    if lab.startswith(SCHEME):
        return lab.removeprefix(SCHEME)
    return lab if lab.startswith(VAGRANT) else None


@dataclass(frozen=True, slots=True)
class Changes:
    """What is kept aside, and what is said of it."""

    trees: tuple[str, ...]
    units: tuple[str, ...]
    profiles: tuple[str, ...]
    subjects: tuple[str, ...]
    words: tuple[str, ...]
    new: tuple[str, ...] = ()
    """Paths that must not be there yet."""
    given: tuple[str, ...] = ()
    """Folders of the machine that containers are given to read, with nothing mounted below."""
    engine: bool = False
    """Containers are made."""


def changes_of(scenario: Scenario, framework: Framework, unit: str, program: str, steps: Sequence[Step]) -> Changes:
    """What `scenario` changes under one framework, where its service is `unit`, started from the file `program`.

    `steps`: of its set-up and after its start, as they are done there.

    Raises DefinitionError where it does what cannot be undone, or is not known to.
    """
    _admit_attempts(scenario)
    container = scenario.subject.container
    if scenario.subject.service is None and container is None:
        raise _refused(scenario, f"{unit} is a service of its own, and what its program does is not known")
    if framework is Framework.SELINUX and scenario.selinux.modules:
        raise _refused(scenario, "it loads SELinux modules, which are compiled with an image's tools")
    paths: list[str] = []
    words: list[str] = []
    for number, step in enumerate(steps, 1):
        more, said = _step(scenario, number, step, unit)
        paths += more
        words.append(said)
    for attempt in scenario.attempts:
        if attempt.canary is not None:
            paths.append(_allowed(scenario, attempt.canary.file))
            words.append(f"a line is added to {attempt.canary.file}")
    if framework is Framework.APPARMOR:
        _admit_profiles(scenario)
    if container is not None:
        return _with_containers(scenario, framework, unit, paths, words)
    mac = _mac(scenario, framework, program)
    if framework is Framework.SELINUX:
        paths.append(program)
    else:
        paths.append(APPARMOR_CACHE)
    words += [*mac, f"{unit} is stopped and started in each arm, and serves what the steps say meanwhile"]
    subject = scenario.subject_name(framework)
    trees = tuple(dict.fromkeys((*ALWAYS, *sorted(paths))))
    profiles = (subject,) if framework is Framework.APPARMOR else ()
    return Changes(trees, (unit,), profiles, (subject,), tuple(dict.fromkeys(words)))


def _with_containers(
    scenario: Scenario, framework: Framework, unit: str, paths: Sequence[str], words: Sequence[str]
) -> Changes:
    """The same for containers, of which the engine knows more than the files do."""
    assert scenario.subject.container is not None
    given: list[str] = []
    for one in (scenario.subject.container, *scenario.subject.beside):
        given += _binds(scenario, one)
        why = _beyond(one, [spec.id for spec in scenario.attempts if spec.run is not None])
        if why:
            raise _refused(scenario, f"its container {why}")
    volumes = [match[1] for path in (*paths, *given) if (match := VOLUME.match(path))]
    control = "label=disable" if framework is Framework.SELINUX else "apparmor=unconfined"
    own = [f"/etc/apparmor.d/{path.name}" for path in scenario.apparmor.profiles]
    said = [
        *words,
        *(f"a container is given the machine's {path}, to read" for path in given if not VOLUME.match(path)),
        f"{install.SETTINGS_PATH} has one more runtime, and Docker Engine reads it again; no container is restarted",
        f"an image {install.IMAGE!r} and containers of it are made and removed; for the control with {control}",
    ]
    if framework is Framework.SELINUX:
        said += [
            f"boolean {name} is set, which holds for the whole engine" for name in sorted(scenario.selinux.booleans)
        ]
    else:
        said += [f"the profile of {path} is loaded, and for the control it is not" for path in own]
        said += ["AppArmor logs explicit denials as well"]
    if scenario.subject.container.network == "host":
        said += ["who is on that machine can ask the container's server for the same as the attempts do"]
    cached = [APPARMOR_CACHE] if framework is Framework.APPARMOR else []
    files = {path for path in paths if not VOLUME.match(path)}
    new = (*dict.fromkeys(volumes), install.RUNTIME_PATH, install.AUID_PATH)
    return Changes(
        trees=tuple(dict.fromkeys((*ALWAYS, *sorted({*files, *volumes, *cached, install.RUNTIME_PATH})))),
        units=(unit,),
        profiles=(scenario.subject_name(framework),) if own and framework is Framework.APPARMOR else (),
        subjects=(),
        words=tuple(dict.fromkeys(said)),
        new=new,
        given=tuple(dict.fromkeys(path for path in given if not VOLUME.match(path))),
        engine=True,
    )


def _binds(scenario: Scenario, container: Container) -> list[str]:
    """What of the machine is mounted into a container."""
    sources = []
    for bind in container.binds:
        source, _, options = (*bind.split(":", 2), "")[:3]
        asked = set(options.split(","))
        _plain(scenario, source)
        if not VOLUME.match(source):
            if asked & {"z", "Z"}:
                raise _refused(scenario, f"the engine would label {source} anew for its container")
            if "ro" not in asked:
                raise _refused(scenario, f"its container may write to {source}, which is no volume of its own")
            if not GIVEN.match(source):
                raise _refused(
                    scenario,
                    f"its container is given {source}, where programs may have their sockets, the engine among them",
                )
        sources.append(source.rstrip("/"))
    return sources


def _beyond(container: Container, commands: Sequence[str]) -> str:
    """Why a container might change more of the machine than its volumes; empty where it cannot."""
    asked = container.model_dump(exclude_defaults=True).keys() - COVERED
    if asked:
        name = min(asked)
        return BEYOND.get(name, f"asks for {name}, and what that changes is not known to be covered")
    loose = next((option for option in LOOSE if option in container.security_opt), None)
    if loose is not None:
        return f"has {loose}, so that more of the kernel is open to it"
    if container.network != "host":
        return ""
    if commands:
        return f"has the machine's network, and attempt {commands[0]} runs a command in it"
    if not SERVER.fullmatch(" ".join(container.run)):
        return "has the machine's network, and its `run` is not [httpd, -f, -p, 127.0.0.1:PORT, -h, FOLDER]"
    return ""


def all_of(changes: Iterable[Changes]) -> Changes:
    """What several change together."""
    found = list(changes)

    def joined(name: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(value for one in found for value in getattr(one, name)))

    parts = ("trees", "units", "profiles", "subjects", "words", "new", "given")
    return Changes(**{name: joined(name) for name in parts}, engine=any(one.engine for one in found))


def _refused(scenario: Scenario, why: str) -> DefinitionError:
    return DefinitionError(
        f"scenario {scenario.id} is not run on a machine that is kept: {why}",
        hint=f"Run it in a guest that is thrown away: `lsmlab run {scenario.id}`.",
    )


def _admit_attempts(scenario: Scenario) -> None:
    for spec in scenario.attempts:
        why = _against(spec, inside=scenario.subject.container is not None)
        if why:
            raise _refused(scenario, f"attempt {spec.id} {why}")


def _against(spec: Attempt, *, inside: bool) -> str:
    """Why an attempt may change what no journal covers; empty where it only reads. `inside`: a container, which is
    thrown away."""
    if spec.changes_mac:
        return "changes MAC"
    if spec.allowed_if.effect is not None:
        return "is proved by an effect, so it changes something"
    if spec.run is not None and spec.run[0] not in READERS and not inside:
        return f"runs {spec.run[0]}, which is not known to change nothing (known: {', '.join(sorted(READERS))})"
    if spec.http is not None and (spec.http.method not in {"GET", "HEAD"} or spec.http.body is not None):
        return f"sends a {spec.http.method}, or a body, by which a service may change things"
    pattern = next((b.output for b in spec.blocked_if if b.output and not PLAIN_PATTERN.fullmatch(b.output)), None)
    if pattern is not None:
        return f"looks for {pattern!r}, which could match what leaked; plain words, and | between them, could not"
    return "" if spec.kind is AttemptKind.BENIGN or spec.canary is not None else "reads without a canary"


def _admit_profiles(scenario: Scenario) -> None:
    """A profile that is taken out and put back is gone from the processes that it confines: none but the subject's."""
    if scenario.subject.container is not None and scenario.apparmor.shipped:
        raise _refused(scenario, f"{scenario.apparmor.shipped[0]} confines others than its container")
    for path in scenario.apparmor.profiles:
        heads = len(PROFILE_HEAD.findall(read_file(path).decode("utf-8", "replace")))
        if heads != 1:
            raise _refused(scenario, f"{path.name} has to be one profile, the subject's; it seems to have {heads}")


def _step(scenario: Scenario, number: int, step: Step, unit: str) -> tuple[list[str], str]:
    """The trees that a step changes, and how it is said."""
    if step.write is not None:
        path = _allowed(scenario, step.write.path)
        folder = path.rpartition("/")[0]  # with its folder: see prepare.do_steps, which labels it
        return [path, *([folder] if folder.count("/") > 1 else [])], f"{path} is written"
    if step.join is not None:
        return [], f"{step.join.user} is made a member of the group {step.join.group}"
    assert step.run is not None
    name, *rest = step.run
    line = shlex.join(step.run)
    said = f"`{line}` is run"
    operands = [word for word in rest if not word.startswith("-")]
    options = [word for word in rest if word.startswith("-")]
    own = {unit, unit.removesuffix(".service")}
    if name == "systemctl" and len(operands) == 2 and operands[0] in UNIT_VERBS and operands[1] in own and not options:
        return [], said
    if name in {"usermod", "groupadd"} and GROUP_CHANGE.fullmatch(line):
        return [], said
    if name == "setsebool" and not options and len(operands) == 2:
        return [], said
    files = _files(name, rest)
    if files is not None:
        return [_allowed(scenario, path) for path in _targets(scenario, number, name, files)], said
    raise _refused(scenario, f"step {number} is {line[:200]!r}, and what that changes is not known to be covered")


def _files(name: str, words: Sequence[str]) -> list[str] | None:
    """The words of a program of PATH_PROGRAMS that are files; None where it is another, or what they are is unknown."""
    if name not in PATH_PROGRAMS:
        return None
    files: list[str] = []
    left = iter(words)
    value_next = name in VALUE_FIRST
    for word in left:
        if word in VALUED.get(name, ()):
            next(left, None)
            value_next = False
        elif word.startswith("-"):
            if not re.fullmatch(PATH_PROGRAMS[name], word):
                return None
        elif value_next:
            if "/" in word:
                return None
            value_next = False
        else:
            files.append(word)
    return files


def _targets(scenario: Scenario, number: int, name: str, files: Sequence[str]) -> list[str]:
    """Those of `files` that a program of PATH_PROGRAMS changes."""
    if len(files) < (2 if name in FROM_AND_TO else 1) or any(not path.startswith("/") for path in files):
        raise _refused(scenario, f"step {number} of {name} does not name each file by its whole path")
    if name in {"cp", "install"}:  # what they take is not changed
        return [files[-1]]
    return [*reversed(files)] if name == "ln" else [*files]  # written later, a link's other end is changed


def _allowed(scenario: Scenario, path: str) -> str:
    clean = _plain(scenario, path)
    if scenario.subject.container is not None and VOLUME.match(clean):
        return clean
    if not any(clean.startswith(f"{area}/") for area in AREAS):
        raise _refused(scenario, f"it changes {path}; files are put back below {', '.join(AREAS)} alone")
    obeyed = next((o for o in OBEYED if f"{clean}/".startswith(o)), None)
    if obeyed is not None or OBEYED_AT_HOME.match(clean):
        raise _refused(scenario, f"it changes {path}, which the whole machine obeys")
    return clean


def _plain(scenario: Scenario, path: str) -> str:
    clean = path.rstrip("/")
    if any(part in {"", ".", ".."} for part in clean.split("/")[1:]):
        raise _refused(scenario, f"{path}: a plain path is needed")
    return clean


def _mac(scenario: Scenario, framework: Framework, program: str) -> list[str]:
    """What of MAC is changed, in words."""
    if framework is Framework.SELINUX:
        words = [f"for the control, {program} is labelled bin_t, so that the service runs unconfined"]
        return words + [f"boolean {name} is set" for name in sorted(scenario.selinux.booleans)]
    names = [f"/etc/apparmor.d/{path.name}" for path in scenario.apparmor.profiles] + list(scenario.apparmor.shipped)
    return [f"the profiles of {name} are loaded, and for the control none of them is" for name in names] + [
        "AppArmor logs explicit denials as well"
    ]
