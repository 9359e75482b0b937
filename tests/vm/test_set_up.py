"""What a set-up does without starting a program in the guest is what the distribution's own program does there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lsmlab import attempt, discovery, prepare
from lsmlab.bench import Bench
from lsmlab.framework import FRAMEWORKS
from lsmlab.image import profile
from lsmlab.scenario import Scenario, read_file
from lsmlab.terms import Arm, Framework, Kernel

pytestmark = pytest.mark.lsmlab_vm

COMPILE = "apparmor_parser --skip-kernel-load --skip-cache --ofile /dev/stdout"
HASHES = "cd /sys/kernel/security/apparmor/policy/profiles && cat nginx.*/sha* own-*/sha*"
OTHERS = b"""
profile own-one /opt/one {
  include <abstractions/base>
  /srv/one r,
  ^hat {
    /srv/hat r,
  }
}
profile own-two /opt/two { /srv/two r, }
"""
LOGO, PAGE = "/srv/www/logo.svg", "/var/www/html/index.html"


@pytest.fixture(scope="module")
def flagship() -> Scenario:
    return discovery.load_scenarios(["nginx-reads-shadow"])[0]


def test_profiles_are_compiled_as_in_the_guest(bench: Bench, flagship: Scenario) -> None:
    """Byte for byte: the flagship's own, one with a rule in a local file, and one that the distribution ships."""
    (own,) = flagship.apparmor.profiles
    path, shipped = f"/etc/apparmor.d/{own.name}", "/etc/apparmor.d/usr.sbin.named"
    assert bench.image is not None
    with bench.guest(Kernel.APPARMOR, "set-up profiles") as machine:
        channel = machine.channel
        written = {path: read_file(own), "/etc/apparmor.d/local/usr.sbin.named": b"/srv/zones/** r,\n"}
        features = channel.ask("apparmor_features")
        assert "policy {" in features and "file {" in features
        found = {}
        for files, name in (({}, shipped), (written, path), (written, shipped)):
            for file, data in files.items():
                channel.write_file(file, data)
            compiled = profile.compile_file(bench.image.need_policy_tree(), bench.image.digest, features, files, name)
            assert compiled is not None, name
            for option, here in (("", compiled.enforce), (" --Complain", compiled.complain)):
                there = channel.run(["sh", "-c", f"{COMPILE}{option} {name}"]).check().stdout
                assert len(there) > 1000
                assert here == there, f"{name}{option}"
                found[name, len(files), option] = here
            names = channel.run(["apparmor_parser", "--names", name]).check().out.split()
            assert compiled.names == tuple(names) != ()
        assert len(set(found.values())) == len(found), "each is another, also by its local file"


@pytest.mark.parametrize("arm", [Arm.APPARMOR_ENFORCE, Arm.APPARMOR_COMPLAIN])
def test_the_kernel_has_the_profiles_that_the_guests_parser_would_load(
    bench: Bench, flagship: Scenario, arm: Arm, tmp_path: Path
) -> None:
    """Several of one file: the flagship's, another with a hat, and one in the other's place."""
    (own,) = flagship.apparmor.profiles
    file = tmp_path / own.name
    file.write_bytes(read_file(own) + OTHERS)
    seen = []
    for known in (True, False):
        plan = prepare.plan_of(flagship, bench.lab)
        written = {**(plan.policy.written or {}), f"/etc/apparmor.d/{own.name}": file.read_bytes()}
        policy = dataclasses.replace(plan.policy, apparmor_profiles=(file,), written=written if known else None)
        with bench.guest(arm.kernel, "set-up loading") as machine:
            channel = machine.channel
            if known:  # nothing but the kernel itself can load them then
                channel.run(["mv", "/usr/sbin/apparmor_parser", "/root"]).check()
            FRAMEWORKS[arm.framework].load(channel, bench.image, policy)
            FRAMEWORKS[arm.framework].enter(channel, arm, bench.image, policy)
            listed = channel.run(["grep", "-E", "^(nginx|own)", "/sys/kernel/security/apparmor/profiles"]).check().out
            hashes = channel.run(["sh", "-c", HASHES]).check().out
            seen.append((sorted(listed.splitlines()), sorted(hashes.splitlines())))
    assert seen[0] == seen[1]
    listed_here, hashes_here = seen[0]
    mode = "complain" if arm.logging else "enforce"
    assert listed_here == [f"{name} ({mode})" for name in ("nginx", "own-one", "own-one//hat", "own-two")]
    assert len(hashes_here) == len(set(hashes_here)) >= 3


def test_a_member_is_made_as_usermod_makes_one(bench: Bench) -> None:
    files = "cat /etc/group /etc/gshadow; stat -c '%n %a %U %G %C' /etc/group /etc/gshadow; id www-data; id bind"
    users = [("www-data", "shadow"), ("bind", "shadow"), ("www-data", "adm"), ("www-data", "shadow")]
    seen = []
    for ours in (True, False):
        with bench.guest(Kernel.SELINUX, "set-up members") as machine:
            for user, group in users:
                if ours:
                    machine.channel.ask("join", user=user, group=group)
                else:
                    machine.channel.run(["usermod", "--append", "--groups", group, user]).check()
            assert machine.channel.run(["grpck", "--read-only"]).ok
            seen.append(machine.channel.run(["sh", "-c", files]).check().out)
    assert seen[0] == seen[1]
    assert "shadow:x:42:www-data,bind\n" in seen[0]


def test_files_have_the_labels_that_restorecon_gives(bench: Bench) -> None:
    changes = ["semanage", "fcontext", "--add", "--type", "var_lib_t", "/srv/www(/.*)?"]
    with bench.guest(Kernel.SELINUX, "set-up labels") as machine:
        channel = machine.channel
        for path in (LOGO, PAGE, "/etc/nginx/sites-enabled/default", "/opt/a b/é"):
            channel.write_file(path, b"x")
        channel.run(["chcon", "--user", "user_u", "--type", "shadow_t", "/srv/www", LOGO, PAGE]).check()
        folders = ["/srv/www", "/var/www/html", "/etc/nginx/sites-enabled", "/opt/a b"]
        left = ["restorecon", "-RFnv", *folders]
        assert LOGO in channel.run(left).check().out, "nothing was to be done"
        channel.run(["mv", "/usr/sbin/restorecon", "/usr/sbin/later"]).check()  # it is for what the library may not do
        left[0] = "/usr/sbin/later"
        channel.ask("relabel", within=60, paths=folders)
        assert channel.run(left).check().out == ""
        assert "httpd_sys_content_t" in channel.run(["stat", "-c", "%C", LOGO]).check().out
        channel.run(changes, timeout=120).check()
        channel.ask("relabel", within=120, paths=folders)
        assert "var_lib_t" in channel.run(["stat", "-c", "%C", LOGO]).check().out, "the labels of before were given"
        assert channel.run(left).check().out == ""


def test_what_a_permissive_domain_does_is_logged_in_each_attempt(bench: Bench) -> None:
    """Also where it did the same before, at its start: the kernel caches what it only logs as granted."""
    read = ["runcon", "system_u:system_r:httpd_t:s0", "cat", "/etc/shadow"]
    with bench.guest(Kernel.SELINUX, "set-up permissive") as machine:
        channel = machine.channel
        channel.ask("start_unit", within=90, unit="nginx.service", seconds=60)
        assert channel.ask("permissive", unit="nginx.service") is False
        channel.run(["semanage", "permissive", "--add", "httpd_t"], timeout=120).check()
        assert channel.ask("permissive", unit="nginx.service") is True
        assert channel.ask("permissive", unit="auditd.service") is False

        def logged() -> bool:
            before = attempt.open_window(channel, "nginx.service", None).audit
            channel.run(read)
            return "permissive=1" in attempt.close_window(channel, "nginx.service", before)[1]

        assert logged()
        assert not logged(), "the kernel does not cache it: there is nothing to flush"
        FRAMEWORKS[Framework.SELINUX].settle(channel, Arm.SELINUX_ENFORCING, "nginx.service", started=True)
        assert logged()
