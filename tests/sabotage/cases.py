"""The cases: what is broken, and what is right to say. docs/verdicts.md shows them as a table."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

from lsmlab.definition import Strict
from lsmlab.machine.qemu import QemuMachine
from lsmlab.scenario import DenialExpectation, Scenario, read_file
from lsmlab.terms import Framework, Kernel, Verdict
from sabotage import Change, Proof, Role, Sabotage, Trace

SELINUX, APPARMOR = (Framework.SELINUX,), (Framework.APPARMOR,)
CONTAINED, NOT_CONTAINED = Verdict.CONTAINED, Verdict.NOT_CONTAINED
ERROR, INCONCLUSIVE, UNATTRIBUTED = Verdict.ERROR, Verdict.INCONCLUSIVE, Verdict.UNATTRIBUTED
PUT, CONNECT = "nginx-plants-web-shell", "selinux-database-boolean-off"
RUN, ROOT = "shadow-reader", "vault-reader"
SETUID = "shop-uses-setuid-helper"

SITE = "/etc/nginx/sites-enabled/default"
PROFILE = "/etc/apparmor.d/nginx.apparmor"
IS_SELINUX = "[ -e /sys/fs/selinux/enforce ]"
STATE = "systemctl is-active nginx"
PERMISSIVE = f"if {IS_SELINUX}; then setenforce 0; else printf complain > /sys/module/apparmor/parameters/mode; fi"
ENFORCING = f"if {IS_SELINUX}; then setenforce 1; else printf enforce > /sys/module/apparmor/parameters/mode; fi"
CRASH = "systemctl kill --signal=KILL nginx; until systemctl is-failed --quiet nginx; do sleep 0.2; done"
WHO = "for p in $(pidof nginx); do tr '\\0' '\\n' < /proc/$p/attr/current; done"


def in_site(lines: str) -> str:
    """Shell that adds `lines` to nginx's site, before the location that the attack goes through."""
    return f"sed -i 's#location /static {{#{lines}\\n&#' {SITE}"


# nginx itself answers 403, and the kernel is not asked
APPLICATION_BLOCKS = in_site("location ~ ^/static.*shadow$ { return 403; }")
SAYS_403 = "nginx -T 2>/dev/null | grep 'return 403'"
# Two more ways in, for requests that are not the attack's
OTHER_WAYS_IN = in_site("location /other { alias /srv/; } location /opt { alias /opt/; }")
VISIT = "curl --silent --output /dev/null --path-as-is http://127.0.0.1"


STRANGE = "(allow initrc_t self (process (setcurrent)))\n(allow initrc_t httpd_t (process (dyntransition)))"
"""Lets root's processes become one in nginx's domain."""


def stranger(count: int = 1, path: str = "/etc/shadow") -> str:
    """Shell: a process that is none of the service's, in its domain or profile, is denied an object `count` times."""
    return f"""python3 -c '
import os
apparmor = os.path.exists("/sys/kernel/security/apparmor")
with open("/proc/self/attr/apparmor/current" if apparmor else "/proc/self/attr/current", "w") as file:
    file.write("changeprofile nginx" if apparmor else "system_u:system_r:httpd_t:s0")
for _ in range({count}):
    try:
        os.open(b"{path}", os.O_RDONLY)
    except OSError:
        pass
'"""


# What the kernel would write of nginx, under either framework
FORGED = (
    """auditctl -m "avc:  denied  { read open } for  pid=$(pgrep -u www-data nginx | head -n 1) """
    """comm=\\"nginx\\" name=\\"shadow\\" dev=\\"vda\\" ino=$(stat -c %i /etc/shadow) """
    "scontext=system_u:system_r:httpd_t:s0 tcontext=system_u:object_r:shadow_t:s0 tclass=file permissive=0 "
    """apparmor=\\"DENIED\\" operation=\\"open\\" class=\\"file\\" profile=\\"nginx\\" """
    """requested_mask=\\"r\\" denied_mask=\\"r\\"\""""
)


def drop_in(text: str, unit: str = "nginx") -> str:
    """Shell that adds `text` to the service's unit."""
    folder = f"/etc/systemd/system/{unit}.service.d"
    return f"mkdir -p {folder} && printf '[Service]\\n{text}\\n' > {folder}/sabotage.conf && systemctl daemon-reload"


def profile(pattern: str, replacement: str) -> Change:
    """The scenario with its AppArmor profile changed by a regular expression."""

    def change(scenario: Scenario, folder: Path) -> Scenario:
        (source,) = scenario.apparmor.profiles
        text, count = re.subn(pattern, replacement, read_file(source).decode(), count=1)
        assert count == 1, pattern
        copy = folder / source.name
        copy.write_text(text, "utf-8")
        return _updated(scenario, apparmor={"profiles": (copy,)})

    return change


def module(cil: str) -> Change:
    """The scenario with an SELinux module."""

    def change(scenario: Scenario, folder: Path) -> Scenario:
        file = folder / "sabotage.cil"
        file.write_text(cil + "\n", "utf-8")
        return _updated(scenario, selinux={"modules": (*scenario.selinux.modules, file)})

    return change


def command(*words: str, timeout: int = 15) -> Change:
    """The scenario with another command as its attack."""

    def change(scenario: Scenario, _: Path) -> Scenario:
        attack, *others = scenario.attempts
        other = attack.model_copy(update={"run": words, "timeout": timeout})
        return scenario.model_copy(update={"attempts": (other, *others)})

    return change


def both(*changes: Change) -> Change:
    """One change after the other; SELinux's policy and AppArmor's profiles are each used in their own arms."""

    def change(scenario: Scenario, folder: Path) -> Scenario:
        for one in changes:
            scenario = one(scenario, folder)
        return scenario

    return change


def moved_object(path: str) -> Change:
    """The scenario with its object at another path."""

    def change(scenario: Scenario, _: Path) -> Scenario:
        attack, *others = scenario.attempts
        assert attack.canary is not None
        canary = attack.canary.model_copy(update={"file": path})
        attack = attack.model_copy(update={"run": ("cat", path), "canary": canary})
        return _updated(scenario, object={"path": path}).model_copy(update={"attempts": (attack, *others)})

    return change


def expecting_capability(name: str) -> Change:
    """The scenario with the denial of a capability expected to account for its attack's block."""

    def change(scenario: Scenario, _: Path) -> Scenario:
        attack = scenario.attacks[0].id
        keys: dict[Framework, dict[str, object]] = {
            Framework.SELINUX: {"class": "capability", "selinux_object": scenario.subject.selinux},
            Framework.APPARMOR: {"class": "cap", "operation": "capable"},
        }
        denials = {
            f: DenialExpectation.model_validate({"attempt": attack, "permissions": (name,), **keys[f]}) for f in keys
        }
        expected = {f: e.model_copy(update={"denials": (denials[f],)}) for f, e in scenario.expected.items()}
        return scenario.model_copy(update={"expected": expected})

    return change


def attacks_only(scenario: Scenario, _: Path) -> Scenario:
    """The scenario without its benign attempts: nothing is restored after the attack."""
    return scenario.model_copy(update={"attempts": scenario.attacks})


def _updated(scenario: Scenario, **parts: dict[str, object]) -> Scenario:
    changed: dict[str, Strict] = {
        name: getattr(scenario, name).model_copy(update=update) for name, update in parts.items()
    }
    return scenario.model_copy(update=changed)


COMPLAINING = both(
    module("(typepermissive httpd_t)"),
    profile("profile nginx /usr/sbin/nginx", "profile nginx /usr/sbin/nginx flags=(complain)"),
)
SECCOMP = drop_in("SystemCallFilter=~rename renameat renameat2\\nSystemCallErrorNumber=EACCES")


def prohibited(port: int) -> str:
    """Shell: a routing rule refuses connections to `port`, before the rule for this machine's own addresses."""
    return f"ip rule add pref 5 ipproto tcp dport {port} prohibit; ip rule add pref 10 lookup local; ip rule del pref 0"


def page_of_refusal(directive: str) -> str:
    """Shell: nginx answers refusals with a page, by `directive`."""
    page = "/var/www/html/refused.html"
    return (
        f"{in_site(f'{directive} /refused.html;')}; echo refused > {page}; if {IS_SELINUX}; then restorecon {page}; fi"
    )


# The canary on that page
LEAK = "grep ^lsmlab- /etc/shadow >> /var/www/html/refused.html"
LEAKED = "grep -c ^lsmlab- /var/www/html/refused.html"


# Proofs that are no command in the guest


def in_log(pattern: str) -> Proof:
    """The window's log has it."""
    return lambda trace: re.search(pattern, trace.log) is not None


def error(pattern: str) -> Proof:
    """The arm, or its attack, failed with these words."""

    def look(trace: Trace) -> bool:
        words = trace.record.error or trace.attack.reason
        return re.search(pattern, words) is not None

    return look


def denied_a_namesake(trace: Trace) -> bool:
    """A denial in the window is about another object of the same name."""
    seen = trace.attack.observation
    assert seen is not None
    assert seen.object is not None
    return any(
        d.name == "/opt/shadow" or (d.name == "shadow" and d.ino != seen.object.ino) for d in trace.attack.denials
    )


def ended(trace: Trace) -> bool:
    """QEMU is gone."""
    return trace.ended


def freeze(machine: QemuMachine) -> None:
    """Stop the guest's processors; QEMU answers."""
    machine.monitor("stop")


def kill(machine: QemuMachine) -> None:
    """Kill QEMU."""
    os.kill(machine.pid, signal.SIGKILL)
    while machine.running:
        time.sleep(0.01)


def lose_snapshot(machine: QemuMachine) -> None:
    """Delete the snapshot that attempts start from."""
    machine.monitor("human-monitor-command", **{"command-line": "delvm ready"})


CASES = (
    # The service
    Sabotage(
        id="service-stopped",
        breaks="the service was stopped",
        before_window="systemctl stop nginx",
        proof=STATE,
        shows="^inactive",
        verdict=INCONCLUSIVE,
        reason="the service is inactive, not active",
    ),
    Sabotage(
        id="service-failed",
        breaks="the service has crashed",
        before_window=CRASH,
        proof=STATE,
        shows="^failed",
        verdict=INCONCLUSIVE,
        reason="the service is failed, not active",
    ),
    Sabotage(
        id="service-crashes-in-window",
        breaks="the service crashes right before the attack",
        before=CRASH,
        proof=STATE,
        shows="^failed",
        verdict=INCONCLUSIVE,
        reason="neither proof nor sign of a block: .*Connection refused",
    ),
    Sabotage(
        id="service-slow",
        breaks="the service takes eight seconds to start",
        setup=drop_in('ExecStartPre=/bin/sh -c "sleep 8; echo slow > /run/slow"'),
        proof="cat /run/slow",
        shows="^slow",
        verdict=CONTAINED,
        reason="DAC permits read-shadow",
    ),
    Sabotage(
        id="service-replaced",
        breaks="the service is started anew inside the window, outside its domain or profile",
        before=f"if {IS_SELINUX}; then chcon --type bin_t /usr/sbin/nginx; else "
        "mv /usr/sbin/nginx /usr/sbin/nginx2; ln -s nginx2 /usr/sbin/nginx; fi; systemctl restart nginx",
        proof=WHO,
        shows="initrc_t|init_t|unconfined",
        verdict=INCONCLUSIVE,
        reason="the service was started anew during the attempt",
    ),
    # The attack itself
    Sabotage(
        id="tool-missing",
        breaks="the attack's tool is not there",
        base=RUN,
        change=command("lsmlab-no-such-tool", "/etc/shadow"),
        shows=error("no such program"),
        verdict=ERROR,
        reason="lsmlab-no-such-tool: no such program in the guest",
    ),
    Sabotage(
        id="command-times-out",
        breaks="the attack's command does not end",
        base=RUN,
        change=command("sleep", "infinity", timeout=2),
        shows=error("timed out after 2 s"),
        verdict=INCONCLUSIVE,
        reason="timed out",
    ),
    Sabotage(
        id="runcon-fails",
        breaks="the attack's runcon does not work at all, which looks like a block",
        base=RUN,
        frameworks=SELINUX,
        change=command("runcon", "-t", "shadow_t", "--", "cat", "/etc/shadow"),
        shows=lambda trace: "runcon" in (trace.attack.observation.errors if trace.attack.observation else ""),
        verdict=INCONCLUSIVE,
        reason="neither proof nor sign of a block: exit status 125, 'runcon",
    ),
    Sabotage(
        id="domain-change-refused",
        breaks="the attack tries to change its domain first, and is denied that",
        base=RUN,
        frameworks=SELINUX,
        change=command(
            "bash", "-c", "echo system_u:system_r:unconfined_t:s0 > /proc/self/attr/exec && exec cat /etc/shadow"
        ),
        shows=in_log("setexec"),
        verdict=UNATTRIBUTED,
        reason="no effective denial accounts for it; nearest: another (permission|class)",
    ),
    Sabotage(
        id="hostile-process-name",
        breaks="the attacking process gives itself a long name, with a quote and what looks like a record",
        base=RUN,
        change=both(
            command(
                "bash",
                "-c",
                'printf "a \\" b type=AVC msg" > /proc/$$/comm; '
                'while read -r line; do echo "$line"; done < /etc/shadow',
            ),
            profile("# The sites", "@{PROC}/@{pid}/comm rw,\n  /usr/sbin/nginx ix,"),
        ),
        shows=lambda trace: any(d.comm.startswith('a " b') and len(d.comm) <= 15 for d in trace.attack.denials),
        verdict=CONTAINED,
        reason="denies",
    ),
    # The guest
    Sabotage(
        id="out-of-memory",
        breaks="the guest runs out of memory and panics",
        before="sysctl --quiet vm.panic_on_oom=1 kernel.panic=-1; tail /dev/zero",
        shows=ended,
        verdict=ERROR,
        reason="read-shadow: .*(QEMU ended|channel was closed|died)",
    ),
    Sabotage(
        id="disk-full",
        breaks="the guest's disk is full",
        before="fallocate -l $(($(stat -f -c '%f*%S' /))) /full; dd if=/dev/zero of=/full2 bs=4096 2>/dev/null; sync",
        proof="df --output=avail / | tail -n 1",
        shows=r"^\s*0$",
        verdict=ERROR,
        reason="audit log unavailable|canary could not be planted",
    ),
    Sabotage(
        id="panic",
        breaks="the guest's kernel panics",
        before="sysctl --quiet kernel.panic=-1; echo c > /proc/sysrq-trigger",
        shows=ended,
        verdict=ERROR,
        reason="read-shadow: .*(QEMU ended|channel was closed|died)",
    ),
    Sabotage(
        id="reboot",
        breaks="the guest reboots",
        before="echo b > /proc/sysrq-trigger",
        shows=ended,
        verdict=ERROR,
        reason="read-shadow: .*(QEMU ended|channel was closed|died)",
    ),
    Sabotage(
        id="hang",
        breaks="the guest hangs",
        host=freeze,
        within=4,
        change=attacks_only,
        shows=error("no answer|does not answer"),
        verdict=ERROR,
        reason="read-shadow: .*answer",
    ),
    Sabotage(
        id="killed",
        breaks="QEMU is killed before the attack",
        host=kill,
        shows=ended,
        verdict=ERROR,
        reason="read-shadow: .*(QEMU ended|channel was closed|died)",
    ),
    Sabotage(
        id="channel-dies",
        breaks="the agent in the guest dies in the middle of the attempt",
        before="kill -9 $PPID",
        within=6,
        change=attacks_only,
        shows=error("no answer|does not answer"),
        verdict=ERROR,
        reason="read-shadow: .*answer",
    ),
    Sabotage(
        id="snapshot-lost",
        breaks="the snapshot that the next attempt starts from is gone",
        host_after=lose_snapshot,
        shows=lambda trace: bool(trace.snapshots) and "ready" not in trace.snapshots,
        verdict=ERROR,
        reason="front-page: .*loadvm",
    ),
    # The object and its canary
    Sabotage(
        id="object-absent",
        breaks="the object is not there",
        before_window="mv /etc/shadow /etc/shadow.away",
        proof="ls /etc/shadow",
        shows="No such file",
        verdict=INCONCLUSIVE,
        reason="the object /etc/shadow is absent",
    ),
    Sabotage(
        id="object-vanishes",
        breaks="the object is removed right before the attack",
        before="rm /etc/shadow",
        proof="ls /etc/shadow",
        shows="No such file",
        verdict=INCONCLUSIVE,
        reason="neither proof nor sign of a block: HTTP 404",
    ),
    Sabotage(
        id="object-emptied",
        breaks="the object is emptied after its canary was planted; the control reads nothing",
        role=Role.CONTROL,
        before=": > /etc/shadow",
        proof="wc -c < /etc/shadow",
        shows="^0$",
        verdict=INCONCLUSIVE,
        reason="dac: read-shadow: neither proof nor sign of a block: HTTP 200",
    ),
    Sabotage(
        id="object-closed",
        breaks="the object's mode bits forbid the attack already",
        role=Role.CONTROL,
        setup="chmod 0600 /etc/shadow",
        proof="stat -c %a /etc/shadow",
        shows="^600$",
        verdict=Verdict.DAC_BLOCKED,
        reason="DAC alone forbids it",
    ),
    Sabotage(
        id="object-closed-under-mac",
        breaks="only where MAC is enforced, the object's mode bits forbid the attack",
        setup="chmod 0600 /etc/shadow",
        proof="stat -c %a /etc/shadow",
        shows="^600$",
        verdict=UNATTRIBUTED,
        reason="no effective denial accounts for it",
    ),
    Sabotage(
        id="canary-wrong",
        breaks="the canary is another one than was planted",
        role=Role.CONTROL,
        before="sed -i 's/^lsmlab-.*/lsmlab-0123456789abcdef:!:20000:0:99999:7:::/' /etc/shadow; "
        "chgrp shadow /etc/shadow",
        proof="grep -c ^lsmlab-0123456789abcdef: /etc/shadow",
        shows="^1$",
        verdict=INCONCLUSIVE,
        reason="dac: read-shadow: neither proof nor sign of a block: HTTP 200",
    ),
    Sabotage(
        id="canary-on-error-page",
        breaks="the canary comes out on the page that says 403",
        setup=page_of_refusal("error_page 403"),
        before=LEAK,
        proof=LEAKED,
        shows="^1$",
        verdict=INCONCLUSIVE,
        reason="HTTP 403, and yet the canary came out",
    ),
    Sabotage(
        id="canary-after-the-deadline",
        breaks="the page that says 403 comes so slowly that the canary on it is not read",
        setup=page_of_refusal("location = /refused.html { limit_rate_after 400; limit_rate 4; } error_page 403"),
        before=f"printf '%600s\n' >> /var/www/html/refused.html; {LEAK}",
        proof=LEAKED,
        shows="^1$",
        verdict=INCONCLUSIVE,
        reason="HTTP 403, and yet its answer was not over",
    ),
    Sabotage(
        id="canary-on-another-page",
        breaks="the attack is refused, and the canary comes out on a page of the service's own, with status 200",
        setup=page_of_refusal("error_page 403 =200"),
        before=LEAK,
        proof=LEAKED,
        shows="^1$",
        verdict=INCONCLUSIVE,
        reason="the canary was read.* and yet the kernel refused it",
    ),
    Sabotage(
        id="effect-there-before",
        breaks="the attack's effect is there before the attack",
        base=PUT,
        before="echo system > /var/www/html/gallery.php",
        proof="cat /var/www/html/gallery.php",
        shows="^system$",
        verdict=INCONCLUSIVE,
        reason="the effect was there before the attempt",
    ),
    Sabotage(
        id="benign-page-missing",
        breaks="the page of the benign attempt is not there",
        before_window="rm /var/www/html/index.html",
        proof="ls /var/www/html/index.html",
        shows="No such file",
        verdict=INCONCLUSIVE,
        reason="front-page: the canary could not be planted",
    ),
    Sabotage(
        id="benign-overblocked",
        breaks="the policy denies the service's own work as well",
        setup=f"if {IS_SELINUX}; then chcon --type shadow_t /var/www/html/index.html; fi",
        change=profile("/var/www/\\*\\* r,", ""),
        proof="ls -Z /var/www/html/index.html; grep -c '^  /var/www' /etc/apparmor.d/nginx.apparmor",
        shows="shadow_t|^0$",
        verdict=Verdict.OVERBLOCKED,
        reason="front-page: the service's own work is denied",
    ),
    # What blocks, and is not MAC
    Sabotage(
        id="application-blocks",
        breaks="nginx itself refuses the request where MAC is enforced",
        setup=APPLICATION_BLOCKS,
        proof=SAYS_403,
        shows="return 403",
        verdict=UNATTRIBUTED,
        reason="no denial in its window",
    ),
    Sabotage(
        id="application-blocks-everywhere",
        breaks="nginx itself refuses the request without MAC too",
        role=Role.CONTROL,
        setup=APPLICATION_BLOCKS,
        proof=SAYS_403,
        shows="return 403",
        verdict=Verdict.CONTROL_BLOCKED,
        reason="blocked without MAC .*, and DAC is not why",
    ),
    Sabotage(
        id="application-blocks-where-mac-logs",
        breaks="nginx itself refuses the request where MAC only logs",
        role=Role.LOGGING,
        setup=APPLICATION_BLOCKS,
        proof=SAYS_403,
        shows="return 403",
        verdict=UNATTRIBUTED,
        reason="blocked in (selinux-permissive|apparmor-complain) as well",
    ),
    Sabotage(
        id="sandbox-of-the-unit",
        breaks="systemd's sandbox (InaccessiblePaths) hides the object where MAC is enforced",
        setup=drop_in("InaccessiblePaths=/etc/shadow"),
        proof="nsenter --target $(cat /run/nginx.pid) --mount stat -c %a /etc/shadow",
        shows="^0$",
        verdict=UNATTRIBUTED,
        reason="no effective denial accounts for it",
    ),
    Sabotage(
        id="seccomp",
        breaks="a seccomp filter refuses the system call where MAC is enforced",
        base=PUT,
        setup=SECCOMP,
        proof="grep Seccomp: /proc/$(cat /run/nginx.pid)/status",
        shows=r"Seccomp:\s+2",
        verdict=UNATTRIBUTED,
        reason="no denial in its window|no effective denial accounts",
    ),
    Sabotage(
        id="seccomp-everywhere",
        breaks="a seccomp filter refuses the system call without MAC too",
        base=PUT,
        role=Role.CONTROL,
        setup=SECCOMP,
        proof="grep Seccomp: /proc/$(cat /run/nginx.pid)/status",
        shows=r"Seccomp:\s+2",
        verdict=Verdict.CONTROL_BLOCKED,
        reason="blocked without MAC",
    ),
    Sabotage(
        id="read-only-mount",
        breaks="the object lies on a file system that is mounted read-only",
        base=PUT,
        role=Role.CONTROL,
        before_window="mount --bind /var/www/html /var/www/html; mount -o remount,bind,ro /var/www/html",
        proof="touch /var/www/html/probe",
        shows="Read-only",
        verdict=Verdict.CONTROL_BLOCKED,
        reason="blocked without MAC",
    ),
    Sabotage(
        id="firewall",
        breaks="a routing rule forbids the connection without MAC too",
        base=CONNECT,
        role=Role.CONTROL,
        frameworks=SELINUX,
        before_window=prohibited(5432),
        proof="ip rule",
        shows="prohibit",
        verdict=Verdict.CONTROL_BLOCKED,
        reason="blocked without MAC",
    ),
    Sabotage(
        id="firewall-under-mac",
        breaks="MAC permits the connection, and a routing rule forbids it",
        base=CONNECT,
        frameworks=SELINUX,
        setup="setsebool httpd_can_network_connect_db on",
        before_window=prohibited(5432),
        proof="ip rule",
        shows="prohibit",
        verdict=UNATTRIBUTED,
        reason="no effective denial accounts",
    ),
    Sabotage(
        id="service-unreachable",
        breaks="a routing rule keeps visitors from the service",
        before_window=prohibited(80),
        proof="ip rule",
        shows="prohibit",
        verdict=INCONCLUSIVE,
        reason="neither proof nor sign of a block",
    ),
    # The subject
    Sabotage(
        id="no-new-privileges",
        breaks="no_new_privs holds for the service, which enters its domain or profile all the same",
        setup=drop_in("NoNewPrivileges=yes"),
        proof="grep NoNewPrivs /proc/$(cat /run/nginx.pid)/status",
        shows=r"NoNewPrivs:\s+1",
        verdict=CONTAINED,
        reason="denies",
    ),
    Sabotage(
        id="no-new-privileges-in-control",
        breaks="no_new_privs takes the right from a setuid helper, without MAC too",
        base=SETUID,
        role=Role.CONTROL,
        frameworks=APPARMOR,
        setup=drop_in("NoNewPrivileges=yes", "shop"),
        proof="grep NoNewPrivs /proc/$(systemctl show --property=MainPID --value shop)/status",
        shows=r"NoNewPrivs:\s+1",
        verdict=Verdict.CONTROL_BLOCKED,
        reason="blocked without MAC",
    ),
    Sabotage(
        id="wrong-domain",
        breaks="the service's program has a label, or lies at a path, by which its policy is not entered",
        setup=f"if {IS_SELINUX}; then chcon --type bin_t /usr/sbin/nginx; fi",
        change=profile("profile nginx /usr/sbin/nginx", "profile nginx /usr/local/sbin/nginx"),
        proof=WHO,
        shows="initrc_t|init_t|unconfined",
        verdict=INCONCLUSIVE,
        reason="runs in (initrc_t|init_t|unconfined), not in (httpd_t|nginx)",
    ),
    Sabotage(
        id="unconfined",
        breaks="the service's unit starts a copy of its program, which no policy knows",
        setup="cp /usr/sbin/nginx /usr/local/sbin/nginx; "
        f"if {IS_SELINUX}; then restorecon /usr/local/sbin/nginx; fi; "
        + drop_in("ExecStart=\\nExecStart=/usr/local/sbin/nginx"),
        proof=WHO,
        shows="initrc_t|init_t|unconfined",
        verdict=INCONCLUSIVE,
        reason="runs in (initrc_t|init_t|unconfined), not in (httpd_t|nginx)",
    ),
    Sabotage(
        id="profile-removed",
        breaks="the profile was removed from the kernel",
        frameworks=APPARMOR,
        before_window=f"apparmor_parser --remove {PROFILE}",
        proof="grep -c '^nginx ' /sys/kernel/security/apparmor/profiles",
        shows="^0$",
        verdict=INCONCLUSIVE,
        reason="runs in unconfined, not in nginx",
    ),
    Sabotage(
        id="profile-too-late",
        breaks="the profile was loaded after the service had started",
        frameworks=APPARMOR,
        before_window=f"apparmor_parser --remove {PROFILE}; systemctl restart nginx; apparmor_parser --add {PROFILE}",
        proof=WHO,
        shows="unconfined",
        verdict=INCONCLUSIVE,
        reason="runs in unconfined, not in nginx",
    ),
    Sabotage(
        id="permissive-domain",
        breaks="the domain is permissive, or its profile in complain mode",
        change=COMPLAINING,
        shows=lambda trace: any(d.logged_only for d in trace.attack.denials),
        verdict=NOT_CONTAINED,
        reason="the kernel only logged it",
    ),
    Sabotage(
        id="permissive-domain-and-application",
        breaks="the domain is permissive and its record in the window, and nginx itself refuses the request",
        setup=f"{APPLICATION_BLOCKS}; {OTHER_WAYS_IN}",
        change=COMPLAINING,
        before=f"{VISIT}/other../etc/shadow",
        shows=lambda trace: any(d.logged_only for d in trace.attack.denials),
        verdict=UNATTRIBUTED,
        reason="not effective: logged only",
    ),
    Sabotage(
        id="wrong-user",
        breaks="the service's user has lost the group that opened the object to it",
        before_window="gpasswd --delete www-data shadow; systemctl restart nginx",
        proof="id www-data",
        shows=r"www-data\)$",
        verdict=UNATTRIBUTED,
        reason="no effective denial accounts for it",
    ),
    # The mode and the policy
    Sabotage(
        id="framework-off",
        breaks="the framework is off on the kernel's command line",
        kernel=Kernel.NONE,
        shows=lambda trace: trace.kernel is Kernel.NONE and bool(trace.record.error),
        verdict=ERROR,
        reason="/sys/fs/selinux|apparmor",
    ),
    Sabotage(
        id="framework-in-control",
        breaks="the control's kernel has SELinux",
        role=Role.CONTROL,
        kernel=Kernel.SELINUX,
        shows=lambda trace: "selinux" in trace.record.lsm,
        verdict=ERROR,
        reason="SELinux is active in the kernel of the control arm",
    ),
    Sabotage(
        id="permissive",
        breaks="the framework as a whole is permissive or complains",
        before_window=PERMISSIVE,
        proof="getenforce; cat /sys/module/apparmor/parameters/mode",
        shows="Permissive|complain",
        verdict=ERROR,
        reason="wrong mode before the attempt",
    ),
    Sabotage(
        id="permissive-in-window",
        breaks="the framework as a whole is made permissive inside the window",
        before=PERMISSIVE,
        proof="getenforce; cat /sys/module/apparmor/parameters/mode",
        shows="Permissive|complain",
        verdict=ERROR,
        reason="wrong mode after the attempt",
    ),
    Sabotage(
        id="permissive-for-a-moment",
        breaks="the framework as a whole is permissive during the attack, and not before or after it",
        before=PERMISSIVE,
        after=ENFORCING,
        shows=in_log(r'permissive=1|apparmor="ALLOWED"'),
        verdict=ERROR,
        reason="changed inside the window|in mode enforce, and only logged",
    ),
    Sabotage(
        id="enforcing-where-mac-logs",
        breaks="the framework enforces in the arm that only logs",
        role=Role.LOGGING,
        before_window=f"if {IS_SELINUX}; then setenforce 1; else apparmor_parser --replace {PROFILE}; fi",
        proof="getenforce; grep '^nginx ' /sys/kernel/security/apparmor/profiles",
        shows="Enforcing|enforce",
        verdict=ERROR,
        reason="wrong mode before the attempt",
    ),
    Sabotage(
        id="policy-reloaded",
        breaks="the policy is loaded anew inside the window",
        before=f"if {IS_SELINUX}; then load_policy; else apparmor_parser --replace --skip-cache {PROFILE}; fi",
        shows=in_log(r'MAC_POLICY_LOAD|operation="profile_replace"'),
        verdict=ERROR,
        reason="mode or policy changed inside the window",
    ),
    Sabotage(
        id="boolean-for-a-moment",
        breaks="a boolean is switched inside the window, and back",
        frameworks=SELINUX,
        before="setsebool httpd_enable_homedirs on",
        after="setsebool httpd_enable_homedirs off",
        shows=in_log("httpd_enable_homedirs"),
        verdict=ERROR,
        reason="mode or policy changed inside the window",
    ),
    # The evidence
    Sabotage(
        id="auditd-killed",
        breaks="auditd is killed inside the window",
        before="pkill -KILL auditd; sleep 1",
        proof="systemctl show --property=NRestarts --value auditd; pidof auditd > /dev/null || echo none",
        shows="^none|^[1-9]",
        verdict=ERROR,
        reason="audit log unavailable",
    ),
    Sabotage(
        id="auditd-frozen",
        breaks="auditd is frozen: records stay in the kernel's queue",
        before="pkill -STOP auditd",
        proof="ps -o state= -p $(pidof auditd)",
        shows="^T",
        verdict=ERROR,
        reason="audit log unavailable: the sentinel did not come through",
    ),
    Sabotage(
        id="log-rotated",
        breaks="the log is rotated inside the window",
        before="pkill -USR1 auditd; until [ -e /var/log/audit/audit.log.1 ]; do sleep 0.2; done",
        proof="ls /var/log/audit",
        shows="audit.log.1",
        verdict=ERROR,
        reason="audit log unavailable: the log was rotated",
    ),
    Sabotage(
        id="log-truncated",
        breaks="the log is truncated inside the window",
        after=": > /var/log/audit/audit.log",
        proof="stat -c %s /var/log/audit/audit.log",
        shows=r"^\d{1,4}$",
        verdict=ERROR,
        reason="audit log unavailable: the log was truncated|sentinel",
    ),
    Sabotage(
        id="log-wiped-in-place",
        breaks="the denial's own record is overwritten in the log",
        after='sleep 1; python3 -c \'import re; f = open("/var/log/audit/audit.log", "r+b"); d = f.read(); '
        'f.seek(0); f.write(re.sub(rb"type=AVC", b"type=XXX", d))\'',
        shows=in_log("type=XXX"),
        verdict=UNATTRIBUTED,
        reason="no denial in its window",
    ),
    Sabotage(
        id="audit-off",
        breaks="auditing is switched off inside the window",
        before="auditctl -e 0",
        proof="auditctl -s",
        shows="enabled 0",
        verdict=ERROR,
        reason="audit log unavailable: auditing is off|auditing was changed",
    ),
    Sabotage(
        id="audit-off-for-a-moment",
        breaks="auditing is off during the attack, and not before or after it",
        before="auditctl -e 0",
        after="auditctl -e 1",
        proof="auditctl -s",
        shows=lambda trace: (
            "audit_enabled=0 old=1" in trace.log and "enabled 1" in trace.said["audit-off-for-a-moment"]
        ),
        verdict=ERROR,
        reason="auditing was changed inside the window",
    ),
    Sabotage(
        id="audit-rules-deleted",
        breaks="the audit rules are deleted inside the window",
        before="auditctl -D",
        proof="auditctl -l",
        shows="No rules",
        verdict=ERROR,
        reason="auditing was changed inside the window",
    ),
    Sabotage(
        id="denials-filtered",
        breaks="an audit rule keeps denials out of the log",
        before_window="auditctl -a always,exclude -F msgtype=AVC",
        proof="auditctl -l",
        shows="msgtype=AVC",
        verdict=UNATTRIBUTED,
        reason="no denial in its window",
    ),
    Sabotage(
        id="records-lost",
        breaks="the kernel may send one record a second, and drops the rest",
        before="auditctl -r 1",
        proof="auditctl -s",
        shows="lost [1-9]",
        verdict=ERROR,
        reason="records were lost|sentinel did not come|auditing was changed",
    ),
    Sabotage(
        id="dontaudit",
        breaks="the policy has a dontaudit rule for just this denial, compiled by the harness",
        frameworks=SELINUX,
        change=module(
            "(dontaudit httpd_t shadow_t (file (read open getattr)))\n(auditallow httpd_t etc_t (dir (search)))"
        ),
        shows=in_log("granted +{ search }"),
        verdict=CONTAINED,
        reason="SELinux denies httpd_t",
    ),
    Sabotage(
        id="dontaudit-in-force",
        breaks="the policy with its dontaudit rules was loaded behind the harness's back",
        frameworks=SELINUX,
        setup="echo '(dontaudit httpd_t shadow_t (file (read open getattr)))' > /root/quiet.cil; "
        "rm /var/lib/selinux/default/active/disable_dontaudit && semodule --install /root/quiet.cil",
        shows=lambda trace: trace.attack.denials == () and "lsmlab-denied" in trace.log,
        verdict=UNATTRIBUTED,
        reason="no denial in its window",
    ),
    Sabotage(
        id="quiet-deny",
        breaks="an explicit deny rule, which AppArmor does not log of itself",
        frameworks=APPARMOR,
        change=profile("# The sites", "deny /etc/shadow r,"),
        proof=f"grep -c 'deny /etc/shadow' {PROFILE}",
        shows="^1$",
        verdict=CONTAINED,
        reason="AppArmor denies nginx",
    ),
    Sabotage(
        id="quiet-deny-not-audited",
        breaks="an explicit deny rule, and AppArmor told to log no such denial",
        frameworks=APPARMOR,
        change=profile("# The sites", "deny /etc/shadow r,"),
        before_window="printf normal > /sys/module/apparmor/parameters/audit",
        proof="cat /sys/module/apparmor/parameters/audit",
        shows="^normal",
        verdict=UNATTRIBUTED,
        reason="no denial in its window",
    ),
    Sabotage(
        id="kernel-log-limited",
        breaks="the kernel's own log is rate-limited and full",
        before="sysctl --quiet kernel.printk_ratelimit=3600 kernel.printk_ratelimit_burst=1; dmesg --clear",
        proof="sysctl -n kernel.printk_ratelimit",
        shows="^3600$",
        verdict=CONTAINED,
        reason="denies",
    ),
    Sabotage(
        id="denied-then-granted",
        breaks="a capability is denied and recorded, another one then permits the attack",
        base=ROOT,
        setup=f"if {IS_SELINUX}; then chcon --type httpd_sys_content_t /opt/vault/secret; fi",
        change=both(
            profile("capability dac_read_search,", "/opt/vault/secret r,"),
            expecting_capability("dac_read_search"),
        ),
        shows=lambda trace: any("dac_read_search" in d.permissions and d.syscall_success for d in trace.attack.denials),
        verdict=NOT_CONTAINED,
        reason="read-secret succeeds under",
    ),
    Sabotage(
        id="denial-deduplicated",
        breaks="a capability is denied, and the kernel, which has told so of this profile before, tells it no more",
        base=ROOT,
        lab="debian-12",  # a later kernel tells it again
        frameworks=APPARMOR,
        setup="chown root:root /var/log/nginx/*",
        change=both(
            profile(r"capability dac_override,\n  capability dac_read_search,", "/opt/vault/secret r,"),
            expecting_capability("dac_read_search"),
        ),
        before_window=stranger(path="/opt/vault/secret"),
        proof="grep -c 'DENIED.*capname=\"dac_read_search\"' /var/log/audit/audit.log",
        shows="^[1-9]",
        verdict=UNATTRIBUTED,
        reason="no denial in its window",
    ),
    Sabotage(
        id="denial-of-a-stranger",
        breaks="another process in the same domain is denied the object; nginx itself refuses the request",
        setup=APPLICATION_BLOCKS,
        change=module(STRANGE),
        before=stranger(),
        shows=in_log('type=AVC .*comm="python3"'),
        verdict=UNATTRIBUTED,
        reason="nearest: another process",
    ),
    Sabotage(
        id="denial-from-before",
        breaks="the service was denied the object before the window; nginx itself refuses the request",
        setup=f"{APPLICATION_BLOCKS}; {OTHER_WAYS_IN}",
        before_window=f"{VISIT}/other../etc/shadow",
        proof=f"{SAYS_403}; grep -c 'shadow.*nginx\\|nginx.*shadow' /var/log/audit/audit.log",
        shows=r"return 403(.|\n)*^[1-9]",
        verdict=UNATTRIBUTED,
        reason="no denial in its window",
    ),
    Sabotage(
        id="denial-of-a-namesake",
        breaks="the service is denied another file of the same name and type; nginx itself refuses the attack",
        setup=f"{APPLICATION_BLOCKS}; {OTHER_WAYS_IN}; cp -p /etc/shadow /opt/shadow; "
        f"if {IS_SELINUX}; then chcon --type shadow_t /opt/shadow; fi",
        before=f"{VISIT}/opt/shadow",
        shows=denied_a_namesake,
        verdict=UNATTRIBUTED,
        reason="nearest: another object",
    ),
    Sabotage(
        id="forged-record",
        breaks="a program writes the awaited record into the log; nginx itself refuses the request",
        setup=APPLICATION_BLOCKS,
        before=FORGED,
        shows=in_log("type=USER .*denied"),
        verdict=UNATTRIBUTED,
        reason="no effective denial accounts for it",
    ),
    Sabotage(
        id="clock-set-back",
        breaks="the clock is set back by years inside the window",
        before="date --set=2001-02-03",
        proof="date +%Y",
        shows="^2001",
        verdict=CONTAINED,
        reason="denies",
    ),
    Sabotage(
        id="hostile-file-name",
        breaks="the object's name has a quote, a line break, an escape sequence and what looks like a record",
        base=ROOT,
        change=moved_object('/opt/vault/a" \n\x1b[2Jtype=AVC msg=audit(1.0:1): avc:  denied'),
        setup=f"""name="$(printf '/opt/vault/a" \\n\\033[2Jtype=AVC msg=audit(1.0:1): avc:  denied')"; """
        f"""cp -p /opt/vault/secret "$name"; if {IS_SELINUX}; then chcon --type shadow_t "$name"; fi""",
        shows=in_log("2F6F70742F7661756C742F6122"),
        verdict=CONTAINED,
        reason="denies",
    ),
    Sabotage(
        id="name-not-utf-8",
        breaks="a denial in the window is about a file whose name is not UTF-8",
        base=ROOT,
        setup="""cd /opt/vault && touch "$(printf 'b\\377\\376')" && """
        f"if {IS_SELINUX}; then chcon --type shadow_t b*; fi",
        change=module(STRANGE),
        before=stranger(path="/opt/vault/b\\xff\\xfe"),
        shows=in_log("62FFFE"),
        verdict=CONTAINED,
        reason="denies",
    ),
    Sabotage(
        id="denials-by-the-hundred",
        breaks="another process is denied the object three hundred times before the attack is",
        change=module(STRANGE),
        before=stranger(300),
        shows=lambda trace: len(re.findall('type=AVC .*comm="python3"', trace.log)) >= 300,
        verdict=CONTAINED,
        reason="denies",
    ),
    Sabotage(
        id="denial-flood",
        breaks="denials flood the log, more than is read",
        change=module(STRANGE),
        before=stranger(12000),
        shows=error("audit log unavailable"),
        verdict=ERROR,
        reason="audit log unavailable",
    ),
)
