"""The command as a person calls it, for tests over real guests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lsmlab import paths

REPO = Path(__file__).resolve().parents[2]
MINE = REPO / "tests" / "vm" / "scenarios"


def environment(state: Path, **more: str) -> dict[str, str]:
    """This machine's environment with an outcome store of its own; images and saved guests stay shared."""
    return {**os.environ, "XDG_STATE_HOME": str(state), "COLUMNS": "100", **more}


def _same_code(env: Mapping[str, str]) -> dict[str, str]:
    """`env`, in which Python finds the lsmlab that the tests find: in a worktree, not the one that is installed."""
    return {**{name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}, **env}


def lsmlab(
    *arguments: str, env: Mapping[str, str], code: int | None = 0, timeout: float = 1700, cwd: Path = REPO
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end. Fails with all that it printed unless it ends with `code`."""
    done = subprocess.run(
        [sys.executable, "-m", "lsmlab.cli", *arguments],
        cwd=cwd, env=_same_code(env), capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    if code is not None:
        assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def start(*arguments: str, env: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start the command; its progress comes line by line on stderr."""
    return subprocess.Popen(
        [sys.executable, "-m", "lsmlab.cli", *arguments],
        cwd=REPO, env=_same_code(env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def outcomes(document: str) -> dict[tuple[str, str], dict[str, Any]]:
    """The outcomes of `--json`, by scenario and framework."""
    report = json.loads(document)
    assert report["schema"] == 1
    return {(o["scenario"], o["framework"]): o for o in report["outcomes"]}


def guests_of(root: int) -> set[int]:
    """The QEMU processes below process `root`."""
    return {pid for pid in _below(root) if _command(pid).startswith("qemu-system")}


def _below(root: int) -> Iterator[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    pending = [root]
    while pending:
        for child in children.get(pending.pop(), []):
            yield child
            pending.append(child)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode().rpartition("/")[2]
    except OSError:
        return ""


def alive(pid: int) -> bool:
    """True while the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False


def gone_within(pids: set[int], seconds: float) -> float:
    """Wait until none of `pids` is alive; how long it took. Fails after `seconds`."""
    begin = time.monotonic()
    while left := {pid for pid in pids if alive(pid)}:
        assert time.monotonic() - begin < seconds, f"still alive after {seconds} s: {left}"
        time.sleep(0.01)
    return time.monotonic() - begin


def kill(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> str:
    """Signal the command and collect it; what it printed on stderr."""
    process.send_signal(number)
    return process.communicate(timeout=60)[1]


def scratch() -> set[Path]:
    """What lies in the cache's scratch folder, and in the images and states a run could have left half-written."""
    root = paths.cache()
    half = {
        p
        for kind in ("images", "states", "policies")
        for p in (root / kind).glob("*")
        if not (p / "manifest.json").exists()
    }
    return half | set((root / "scratch").glob("*"))
