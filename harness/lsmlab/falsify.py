"""Could it have come out otherwise? A containing policy weakened by what it denied, and a wrong expectation.

A scenario that says CONTAINED proves something only if it would have said otherwise of another policy. Two checks:

- the policy is weakened by exactly the rules whose absence the kernel recorded, and each attack must then succeed;
- another denial is expected than the one recorded, and the verdict must become UNATTRIBUTED.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lsmlab import cache, evidence, verdict
from lsmlab.bench import Bench, guest_pool
from lsmlab.errors import LsmlabError, PolicyError
from lsmlab.evidence import Denial
from lsmlab.outcome import ArmRecord, Falsification, Outcome
from lsmlab.run import Case, run_boot
from lsmlab.scenario import Scenario, Step, Write, read_file
from lsmlab.terms import ENFORCING_ARM, Arm, AttemptKind, Framework, Result, Verdict

MOST_ROUNDS = 8
"""A rule added may let the attack come to the next one that is missing: so often it is tried again."""
FILE_LETTERS = {"c": "w", "d": "w", "x": "ix"}
"""AppArmor's records have letters that its rules say otherwise: create, delete, exec."""
GUEST_MODULE = "/root/lsmlab-weaker.cil"
APPEND = 'printf "%s" "$1" >> "$2"'


def run(bench: Bench, contained: Sequence[tuple[Case, Outcome]]) -> Iterator[Outcome]:
    """Each outcome again with its falsification, in the order given. Guests die with an interruption."""
    with guest_pool(bench, "falsify") as pool:
        yield from pool.map(lambda pair: _falsified(bench, *pair), contained)


def _falsified(bench: Bench, case: Case, outcome: Outcome) -> Outcome:
    with cache.scratch("weaker") as folder:
        found = weaken_until_it_succeeds(bench, case, outcome, folder)
    misled = with_another_expectation(case, outcome, bench.lab.id)
    return outcome.model_copy(update={"falsification": found.model_copy(update={"misled": misled})})


def weaken_until_it_succeeds(bench: Bench, case: Case, outcome: Outcome, folder: Path) -> Falsification:
    """Run the attacks under a policy with the denied rules added, until they succeed or nothing more is denied.

    `folder`: where the weakened policy is written. What breaks is an error in the answer, never a success.
    """
    own = case.scenario.expectation(case.framework, bench.lab.id).falsified_by
    rules = () if own else rules_for(case.framework, _denials(outcome.arms))
    arm = ENFORCING_ARM[case.framework]
    more = rules
    record = None
    for _ in range(MOST_ROUNDS):
        rules = tuple(dict.fromkeys((*rules, *more)))
        try:
            weaker = _replaced(case, own) if own else weakened(case.scenario, case.framework, rules, folder)
        except (LsmlabError, OSError, ValueError) as error:
            return Falsification(rules=rules, verdict=Verdict.ERROR, reason=str(error))
        record = run_boot(bench, weaker, (arm,))[arm]
        more = tuple(r for r in rules_for(case.framework, _denials([record])) if r not in rules)
        if own or record.error or _all_succeed(record) or not more:
            break
    assert record is not None
    shown = tuple(str(path.name) for path in own) or rules
    if record.error:
        return Falsification(rules=shown, verdict=Verdict.ERROR, reason=record.error)
    others = {a.arm: _attacks_of(a) for a in outcome.arms if a.arm is not arm}
    found = verdict.conclude(case.framework, {**others, arm: record}, case.scenario.control)
    held = next((a for a in record.attempts if a.result is not Result.ALLOWED), None)
    if held is not None:  # one that is let in is not enough: each block is to be the policy's doing
        kept = Verdict.INCONCLUSIVE if found.verdict is Verdict.NOT_CONTAINED else found.verdict
        return Falsification(rules=shown, verdict=kept, reason=f"{held.attempt}: {held.result}: {held.reason}")
    return Falsification(rules=shown, verdict=found.verdict, reason=found.reason)


def with_another_expectation(case: Case, outcome: Outcome, lab: str) -> Verdict:
    """The verdict of the same record, had the denials that account for its blocks been expected to be others."""
    arm = ENFORCING_ARM[case.framework]
    expected = case.scenario.expectation(case.framework, lab).denials
    attempts = []
    for attempt in outcome.arms[-1].attempts:
        seen, denial = attempt.observation, next((d for d in expected if d.attempt == attempt.attempt), None)
        if seen is not None and denial is not None and attempt.attribution is not None:
            other = denial.model_copy(update={"permissions": ("another",), "operation": denial.operation and "another"})
            attribution = verdict.attribute(case.scenario, case.framework, other, seen)
            attempt = attempt.model_copy(update={"attribution": attribution})  # noqa: PLW2901 - the same, judged anew
        attempts.append(attempt)
    changed = outcome.arms[-1].model_copy(update={"attempts": tuple(attempts)})
    arms: dict[Arm, ArmRecord] = {a.arm: a for a in outcome.arms} | {arm: changed}
    return verdict.conclude(case.framework, arms, case.scenario.control).verdict


def _attacks_of(record: ArmRecord) -> ArmRecord:
    """The arm without its benign attempts, which are not made under a weakened policy."""
    return record.model_copy(update={"attempts": tuple(a for a in record.attempts if a.kind is AttemptKind.ATTACK)})


def _all_succeed(record: ArmRecord) -> bool:
    return bool(record.attempts) and all(a.result is Result.ALLOWED for a in record.attempts)


def _denials(arms: Iterable[ArmRecord]) -> tuple[Denial, ...]:
    """What was denied to the attacks, logged only or in effect, and what accounts for their blocks."""
    found: list[Denial] = []
    for attempt in (a for arm in arms for a in arm.attempts if a.kind is AttemptKind.ATTACK):
        found += attempt.denials
        if attempt.attribution is not None and attempt.attribution.denial is not None:
            found.append(attempt.attribution.denial)
    return tuple(found)


def rules_for(framework: Framework, denials: Iterable[Denial]) -> tuple[str, ...]:
    """The rules whose absence was recorded, each once, in the framework's own language: CIL, or a profile's."""
    make = _cil if framework is Framework.SELINUX else _profile_rule
    # Complain mode moves a program that may not be run into a profile of its own: what it does there needs no rule
    own = [d for d in denials if d.framework is framework and "//null-" not in d.subject_domain]
    return tuple(dict.fromkeys(rule for d in own if (rule := make(d))))


def _cil(denial: Denial) -> str:
    return f"(allow {denial.subject_domain} {denial.object_type} ({denial.tclass} ({' '.join(denial.permissions)})))"


def _profile_rule(denial: Denial) -> str:
    """A rule, with the profile that it belongs to before it: `PROFILE: RULE`."""
    record = evidence.parse_line(denial.headline)
    fields = record.fields if record else {}
    kind = _class_of(denial, fields)
    peer = f' peer="{fields["peer"]}"' if fields.get("peer") else ""
    access = " ".join(denial.permissions)
    rule = {
        "cap": f"capability {access},",
        "net": f"network {fields['family']} {fields.get('sock_type', '')}," if fields.get("family") else "",
        "unix": "unix,",
        "signal": f"signal ({access}){peer},",
        "ptrace": f"ptrace ({access}){peer},",
        "mount": f"{'pivot_root' if denial.operation == 'pivotroot' else denial.operation},",
        "namespace": "userns,",
        "label": f"change_profile -> {fields.get('name') or fields.get('target', '')},",
        "file": f'"{_literal(denial.name)}" {_letters(denial.permissions)},' if denial.name.startswith("/") else "",
        # A link may have no more permissions than what it links to: the mask is what that lacks
        "link": f'"{_literal(fields.get("target", ""))}" {_letters(denial.permissions)},',
    }.get(kind, "")
    return f"{denial.subject_domain}: {rule}" if rule else ""


def _literal(path: str) -> str:
    """A path in a profile's rule, with nothing in it that stands for more than itself."""
    return re.sub(r'[\\*?\[\]{}^"]', r"\\\g<0>", path)


def _class_of(denial: Denial, fields: dict[str, str]) -> str:
    """The class of the rule that is missing. Kernels from 6.5 on write one, and `file` for more than files."""
    if denial.operation.startswith("change_"):
        return "label"
    if denial.operation == "link" and "l" not in denial.permissions:
        return "link"
    if fields.get("class"):
        return fields["class"]
    if fields.get("capname"):
        return "cap"
    if fields.get("family"):
        return "unix" if fields["family"] == "unix" else "net"
    if denial.operation in {"signal", "ptrace"}:
        return denial.operation
    if "mount" in denial.operation or denial.operation == "pivotroot":
        return "mount"
    return "file"


def _letters(permissions: Sequence[str]) -> str:
    letters = dict.fromkeys(FILE_LETTERS.get(p, p) for p in permissions)
    if "w" in letters:
        letters.pop("a", None)  # one or the other
    exec_last = sorted(letters, key=lambda letter: letter == "ix")
    return "".join(exec_last)


def weakened(scenario: Scenario, framework: Framework, rules: Sequence[str], folder: Path) -> Scenario:
    """The scenario with its attacks alone and `rules` added to its policy; files are written into `folder`.

    Raises PolicyError where a rule has no place to be put.
    """
    attacks = scenario.model_copy(update={"attempts": scenario.attacks})
    if framework is Framework.SELINUX:
        text = "".join(f"{rule}\n" for rule in rules)
        if any(_changes_policy(step) for step in scenario.setup):  # the guest's own tools would drop ours again
            write = Step(write=Write(path=GUEST_MODULE, content=text))
            install = Step(run=("semodule", "--install", GUEST_MODULE))
            return attacks.model_copy(update={"setup": (*scenario.setup, write, install)})
        module = folder / "lsmlab-weaker.cil"
        module.write_text(text, "utf-8")
        policy = scenario.selinux.model_copy(update={"modules": (*scenario.selinux.modules, module)})
        return attacks.model_copy(update={"selinux": policy})
    profiles, steps, left = [], [], list(rules)
    for profile in scenario.apparmor.profiles:
        text = read_file(profile).decode("utf-8", "surrogateescape")
        for rule in tuple(left):
            name, _, body = rule.partition(": ")
            text, found = _inserted(text, name, body)
            if found:
                left.remove(rule)
        copy = folder / profile.name
        copy.write_bytes(text.encode("utf-8", "surrogateescape"))
        profiles.append(copy)
    own = [rule for rule in left if "//" not in rule.partition(": ")[0]]
    if scenario.apparmor.shipped and own:  # appended: the set-up may have rules of its own there
        local = f"/etc/apparmor.d/local/{scenario.apparmor.shipped[0].rpartition('/')[2]}"
        words = "".join(f"{rule.partition(': ')[2]}\n" for rule in own)
        steps.append(Step(run=("sh", "-c", APPEND, "-", words, local)))
        left = [rule for rule in left if rule not in own]
    if left:
        raise PolicyError(f"no profile of the scenario has a place for the rule {left[0]!r}")
    policy_ = scenario.apparmor.model_copy(update={"profiles": tuple(profiles)})
    return attacks.model_copy(update={"apparmor": policy_, "setup": (*scenario.setup, *steps)})


def _changes_policy(step: Step) -> bool:
    """Whether a step has the guest build its policy anew, or writes what may do so."""
    words = step.write.data() if step.write is not None else " ".join(step.run or ()).encode()
    return re.search(rb"\b(semodule|semanage|setsebool -P)\b", words) is not None


def _inserted(text: str, profile: str, rule: str) -> tuple[str, bool]:
    """`text` with `rule` first in the block of `profile`, a child's by its last name; and whether there is one."""
    name = re.escape(profile.rpartition("//")[2])
    # Its last brace: an attachment may hold others, as in /usr/{s,}bin/nginx
    head = re.compile(
        rf'^[ \t]*(?:(?:profile|hat)[ \t]+|\^)?"?{name}"?(?:[ \t][^\n#]*?)?\{{(?=[ \t]*(?:#.*)?$)', re.MULTILINE
    )
    match = head.search(text)
    if match is None:
        return text, False
    return f"{text[: match.end()]}\n  {rule}{text[match.end() :]}", True


def _replaced(case: Case, files: tuple[Path, ...]) -> Scenario:
    """The scenario with its attacks alone, and `files` as its policy: its author's own way to weaken it."""
    scenario = case.scenario.model_copy(update={"attempts": case.scenario.attacks})
    if case.framework is Framework.SELINUX:
        return scenario.model_copy(update={"selinux": scenario.selinux.model_copy(update={"modules": files})})
    policy = scenario.apparmor.model_copy(update={"profiles": files, "shipped": ()})
    return scenario.model_copy(update={"apparmor": policy})
