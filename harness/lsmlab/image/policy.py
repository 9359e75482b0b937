"""SELinux policies compiled natively, with the distribution's own tools, in the image's own root tree.

Under emulation `semodule` takes half a minute in a guest and five seconds here; the guest only loads the result.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lsmlab import cache, host, paths
from lsmlab.definition import digest_of
from lsmlab.errors import HostError, ImageError, PolicyError
from lsmlab.scenario import read_file

COMPILE = """
set -eu
cd "$1"
mkdir tree
tar -C tree -xf "$2"
cp tree/etc/selinux/default/contexts/files/file_contexts file_contexts.before
mkdir tree/modules
cp modules/* tree/modules/
PATH=$PATH:/usr/sbin:/sbin
contexts=etc/selinux/default/contexts/files
policy=$(cd tree && ls -v etc/selinux/default/policy/policy.* | tail -n 1)
if [ -f tree/usr/lib/lsmlab/policy.cil ]; then # from elsewhere: there is no store of modules to build it from
    compile='secilc --policyvers "$1" --output "/$2" --filecontext /more "$3" /modules/*'
    chroot tree sh -c "$compile" compile "${policy##*.}" "$policy" /usr/lib/lsmlab/policy.cil > compiler.log 2>&1 ||
        { cat compiler.log >&2; exit 1; }
    if [ -s tree/more ]; then
        cat tree/more >> tree/$contexts/file_contexts
        chroot tree sefcontext_compile /$contexts/file_contexts
    fi
else
    chroot tree sh -c 'cd /modules && semodule --noreload --install *' 2> compiler.log ||
        { cat compiler.log >&2; exit 1; }
fi
cp "tree/$policy" policy
for name in file_contexts file_contexts.bin; do
    if cmp -s file_contexts.before tree/$contexts/file_contexts; then : > $name; else cp tree/$contexts/$name $name; fi
done
rm -rf tree
"""

FILES = ("policy", "file_contexts", "file_contexts.bin")

_ATTRIBUTE = re.compile(r"^\(typeattribute (\w+)\)$", re.MULTILINE)
_ATTRIBUTE_LINE = re.compile(r"\((?:typeattribute|typeattributeset|expandtypeattribute) \(?(\w+)\b")
_EMPTY_BRANCH = re.compile(r"\((?:true|false)\s*\)")
_EMPTY_CONDITION = re.compile(r"\(booleanif \([^()]*(?:\([^()]*\)[^()]*)*\)\s*\)|\(booleanif \w+\s*\)")


def decisions(cil: str) -> str:
    """A policy dump without what decides nothing: dontaudit rules, and conditions that only held such rules."""
    text = "\n".join(line.strip() for line in cil.splitlines() if not line.lstrip().startswith("(dontaudit"))
    text = _EMPTY_BRANCH.sub("", text)
    text = _EMPTY_CONDITION.sub("", text)
    return "\n".join(line for line in text.splitlines() if line)


def _without_idle_attributes(shipped: str, audited: str) -> list[str]:
    """The lines of `shipped`, less those of attributes that `audited` lacks and no rule of `shipped` names.

    `secilc` drops an attribute that no rule uses, and what dontaudit rules alone used as well.
    """
    there = set(_ATTRIBUTE.findall(audited))
    lacking = {name for name in _ATTRIBUTE.findall(shipped) if name not in there}
    kept = [line for line in shipped.splitlines() if not ((m := _ATTRIBUTE_LINE.match(line)) and m[1] in lacking)]
    named = lacking.intersection(re.findall(r"\w+", "\n".join(kept)))
    if named:
        raise ImageError(f"the policy without dontaudit rules lacks the attribute {min(named)}, which rules name")
    return kept


def prove_same_decisions(shipped: str, audited: str, *, any_silent: bool = True) -> int:
    """Compare the distribution's policy with the one without dontaudit rules; how many such rules are gone.

    Both are dumps in CIL. `any_silent`: it is known that there are such rules. Raises ImageError where they differ in
    anything else, or where nothing was compared.
    """
    silent = shipped.count("(dontaudit")
    if (any_silent and not silent) or "(allow " not in audited:
        raise ImageError("the policies compared hold no dontaudit or no allow rules: nothing was proved")
    if "(dontaudit" in audited:
        raise ImageError(f"{audited.count('(dontaudit')} dontaudit rules are left in the policy that should have none")
    decided = decisions(audited)
    left, right = _without_idle_attributes(decisions(shipped), decided), decided.splitlines()
    if left != right:
        pairs = itertools.zip_longest(left, right, fillvalue="nothing")
        different = next(pair for pair in pairs if pair[0] != pair[1])
        raise ImageError(
            "the policy without dontaudit rules decides otherwise than the distribution's: "
            f"{different[0]} / {different[1]}"
        )
    return silent


@dataclass(frozen=True, slots=True)
class Compiled:
    """A policy for the kernel, and the labels of files, as text and compiled; no labels where the modules add none."""

    policy: bytes
    file_contexts: bytes
    file_contexts_bin: bytes


def compile_modules(policy_tree: Path, image_digest: str, modules: Sequence[Path]) -> Compiled:
    """The image's policy with `modules` (CIL) added; cached by the digest of all that goes in.

    Raises PolicyError with the compiler's own message.
    """
    sources = [(m.name, read_file(m)) for m in modules]
    key = digest_of("policy-3", image_digest, *(part for source in sources for part in source))
    target = paths.cache() / "policies" / key[:24]
    with cache.lock(paths.cache() / "locks" / f"policy-{key[:24]}"):
        with cache.use(target):
            manifest = cache.read_manifest(target)
            if manifest is not None and not cache.damage(target, manifest, full=True):
                return _compiled(target)
        host.need_x86("compiling an SELinux policy with the image's own tools")
        with cache.making("policy", "a policy was compiled") as work:
            (work / "modules").mkdir()
            for name, data in sources:
                (work / "modules" / name).write_bytes(data)
            try:
                host.run(
                    host.in_namespace(["sh", "-c", COMPILE, "compile", str(work), str(policy_tree)]),
                    what="compiling the SELinux policy",
                )
            except HostError as error:
                names = ", ".join(str(m) for m in modules)
                raise PolicyError(f"{names}: does not compile:\n{error.message.partition(chr(10))[2]}") from error
            compiled = _compiled(work)
            cache.publish(work, target, FILES, {"modules": [m.name for m in modules], "image": image_digest})
    return compiled


def _compiled(folder: Path) -> Compiled:
    return Compiled(*((folder / name).read_bytes() for name in FILES))
