"""A guest brought into an arm, over a scripted channel: what is done in which order, and how failures are told."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from builders import audit_state, mode, scenario, subject, target, wire

from fakes import IMAGE, Answer, ScriptedChannel, said
from lsmlab import discovery, prepare
from lsmlab.errors import ChannelError, FrameworkError, LsmlabError, PolicyError, SetupError
from lsmlab.framework import FRAMEWORKS
from lsmlab.framework.apparmor import Apparmor
from lsmlab.framework.base import PolicyUnderTest
from lsmlab.framework.selinux import Selinux
from lsmlab.image import policy as native
from lsmlab.image import profile as profiles
from lsmlab.scenario import Step
from lsmlab.terms import Arm

PERMISSIVE, ENFORCING = Arm.SELINUX_PERMISSIVE, Arm.SELINUX_ENFORCING
COMPLAIN, ENFORCE = Arm.APPARMOR_COMPLAIN, Arm.APPARMOR_ENFORCE
JOIN = {"join": {"user": "www-data", "group": "shadow"}}
WRITE = {"write": {"path": "/srv/a", "content": "x"}}
DONE: list[tuple[str, Answer]] = [(r"touch |cp ", said())]


def steps(*given: Mapping[str, Any] | str) -> tuple[Step, ...]:
    """Steps: a path is a file to write, a mapping is a step as it stands."""
    whole = [{"write": {"path": s, "content": s}} if isinstance(s, str) else s for s in given]
    return tuple(Step.model_validate(s, strict=False) for s in whole)


def run_step(*words: str) -> dict[str, Any]:
    return {"run": words}


# Steps


def test_files_are_labelled_together_before_a_command_may_look_at_them() -> None:
    channel = ScriptedChannel(DONE, {"relabel": None})
    given = steps("/srv/www/a", "/srv/www/b", "/etc/x", run_step("touch", "1"), run_step("touch", "2"), "/srv/app/c")
    prepare.do_steps(channel, given, "setup")
    assert channel.lines == [
        "write /srv/www/a", "write /srv/www/b", "write /etc/x", "ask relabel", "touch 1", "touch 2",
        "write /srv/app/c", "ask relabel",
    ]  # fmt: skip
    # The folder with the file, which may be new; but not a folder like /etc, which is the distribution's
    assert channel.asked_for("relabel") == [{"paths": ["/srv/www", "/etc/x"]}, {"paths": ["/srv/app"]}]


@pytest.mark.parametrize(
    ("path", "labelled"),
    [("/file", "/file"), ("/srv/file", "/srv/file"), ("/srv/www/file", "/srv/www"), ("/srv/www/a b/c", "/srv/www/a b")],
)
def test_what_is_labelled_with_a_file(path: str, labelled: str) -> None:
    channel = ScriptedChannel(asked={"relabel": None})
    prepare.do_steps(channel, steps(path), "setup")
    assert channel.asked_for("relabel") == [{"paths": [labelled]}]


def test_where_nothing_is_written_nothing_is_labelled() -> None:
    channel = ScriptedChannel(DONE)
    prepare.do_steps(channel, steps(run_step("touch", "1")), "setup")
    prepare.do_steps(channel, (), "setup")
    assert channel.lines == ["touch 1"]


def test_a_file_is_written_with_its_rights(tmp_path: Path) -> None:
    source = tmp_path / "file"
    source.write_bytes(b"\xff\x00")
    channel = ScriptedChannel(asked={"relabel": None})
    written = {"path": "/srv/a", "from": source, "mode": "4750", "owner": "www-data:shadow"}
    prepare.do_steps(channel, steps({"write": written}, "/srv/b"), "setup")
    assert channel.written == {"/srv/a": b"\xff\x00", "/srv/b": b"/srv/b"}
    assert channel.rights == {"/srv/a": (0o4750, "www-data:shadow"), "/srv/b": (0o644, "root:root")}


@pytest.mark.parametrize(
    ("answers", "asked", "words"),
    [
        ([(r"write /srv/www/b", ChannelError("no space"))], {}, "setup, step 2: no space"),
        (
            [(r"touch", said("so far", err="no such folder", code=1))],
            {"relabel": None},
            "setup, step 3: in the guest: touch 1: exit status 1\n  no such folder",
        ),
        ([], {"relabel": ChannelError("restorecon: broken")}, "setup, step 3: restorecon: broken"),
        (DONE, {"relabel": None}, "setup, step 4: read-only"),
    ],
)
def test_a_step_that_fails_is_named(answers: list[tuple[str, Answer]], asked: dict[str, Any], words: str) -> None:
    channel = ScriptedChannel([*answers, (r"write /srv/www/late", ChannelError("read-only"))], asked)
    given = steps("/srv/www/a", "/srv/www/b", run_step("touch", "1"), "/srv/www/late")
    with pytest.raises(SetupError) as caught:
        prepare.do_steps(channel, given, "setup")
    assert caught.value.message == words


# The service


@pytest.mark.parametrize(("found", "running"), [([], False), ([481], True), ([481, 482], True)])
def test_a_service_runs_while_it_has_a_process(found: list[int], running: bool) -> None:
    channel = ScriptedChannel(asked={"pids": found})
    assert prepare.is_running(channel, "nginx.service") is running
    assert channel.questions == [("pids", {"unit": "nginx.service"})]


@pytest.mark.parametrize("answer", [None, True, 7, "no", {}, {"pids": []}, ["481"], [None], [1.5]], ids=str)
def test_processes_that_are_none_are_nonsense(answer: object) -> None:
    with pytest.raises(ChannelError):
        prepare.is_running(ScriptedChannel(asked={"pids": answer}), "nginx.service")


@pytest.mark.parametrize(
    ("before", "after", "to_start", "stopped"),
    [([], [], True, False), ([481], [481], True, True), ([], [481], True, True), ([481], [], False, False)],
    ids=["off all along", "on all along", "started by the set-up", "stopped by the set-up"],
)
def test_a_service_that_the_set_up_stopped_stays_stopped(
    before: list[int], after: list[int], to_start: bool, stopped: bool
) -> None:
    looks = iter((before, after))
    answers = [*DONE, (r"systemctl stop", said())]
    channel = ScriptedChannel(answers, asked={"clock": None, "pids": lambda **_: next(looks)})
    plan = prepare.Plan("nginx.service", steps(run_step("touch", "1")), (), PolicyUnderTest(), None)
    assert prepare.set_up(channel, Arm.DAC, plan, None) is to_start
    assert ("systemctl stop nginx.service" in channel.lines) is stopped


def test_a_guest_is_told_the_time_and_its_arm() -> None:
    channel = ScriptedChannel(asked={"clock": None})
    before = time.time()
    prepare.mark(channel, ENFORCING)
    ((operation, arguments),) = channel.questions
    assert operation == "clock"
    assert before <= arguments["seconds"] <= time.time()
    assert channel.written == {"/run/lsmlab-arm": b"selinux-enforcing\n"}


# SELinux


def in_mode(arm: Arm, **changes: Any) -> dict[str, Any]:
    return wire(mode(arm, **changes))


@pytest.mark.parametrize(("arm", "written"), [(PERMISSIVE, b"0"), (ENFORCING, b"1")])
def test_selinux_enters_a_mode_and_reads_it_back(arm: Arm, written: bytes) -> None:
    channel = ScriptedChannel(asked={"mode": in_mode(arm)})
    Selinux().enter(channel, arm, IMAGE, PolicyUnderTest())
    assert channel.written == {"/sys/fs/selinux/enforce": written}
    assert channel.lines == ["write /sys/fs/selinux/enforce", "ask mode"]


@pytest.mark.parametrize("arm", [PERMISSIVE, ENFORCING])
@pytest.mark.parametrize("found", [Arm.DAC, PERMISSIVE, ENFORCING])
def test_selinux_in_another_mode_is_an_error(arm: Arm, found: Arm) -> None:
    channel = ScriptedChannel(asked={"mode": in_mode(found)})
    if arm is found:
        Selinux().enter(channel, arm, IMAGE, PolicyUnderTest())
        return
    with pytest.raises(FrameworkError, match=f"{int(arm.enforcing)} was written, and the mode is (None|True|False)"):
        Selinux().enter(channel, arm, IMAGE, PolicyUnderTest())


@pytest.mark.parametrize("answer", [None, {}, {**in_mode(ENFORCING), "selinux_enforcing": "1"}], ids=str)
def test_selinuxs_mode_is_not_guessed(answer: object) -> None:
    with pytest.raises(ChannelError, match="the agent answered nonsense"):
        Selinux().enter(ScriptedChannel(asked={"mode": answer}), ENFORCING, IMAGE, PolicyUnderTest())


@pytest.mark.parametrize("arm", [PERMISSIVE, ENFORCING])
@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("permissive", [True, False])
def test_selinux_forgets_what_it_has_logged_where_it_logs_once(arm: Arm, *, started: bool, permissive: bool) -> None:
    channel = ScriptedChannel(asked={"permissive": permissive})
    Selinux().settle(channel, arm, "nginx.service", started=started)
    flushed = permissive or (started and arm is PERMISSIVE)
    assert channel.written == ({"/sys/fs/selinux/commit_pending_bools": b"1"} if flushed else {})
    assert channel.asked_for("permissive") == [{"unit": "nginx.service"}]
    assert channel.lines[0] == "ask permissive", "the service has come to rest by then"


def test_selinux_loads_what_was_compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def compile_modules(*arguments: Any) -> native.Compiled:
        compiled.append(arguments)
        return native.Compiled(b"policy", b"", b"")

    monkeypatch.setattr(native, "compile_modules", compile_modules)
    channel = ScriptedChannel(
        [(r"sh -c ls -v ", said("/etc/selinux/default/policy/policy.33\n")), (r"load_policy|setsebool ", said())]
    )
    policy = PolicyUnderTest((Path("/m.cil"),), (("a", True), ("b", False)))
    Selinux().load(channel, IMAGE, policy)
    assert compiled == [(IMAGE.policy_tree, IMAGE.digest, (Path("/m.cil"),))]
    assert channel.lines[1:] == [
        "write /etc/selinux/default/policy/policy.33", "load_policy", "setsebool a on", "setsebool b off",
    ]  # fmt: skip
    assert channel.written == {"/etc/selinux/default/policy/policy.33": b"policy"}


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (PolicyUnderTest((Path("/m.cil"),)), "load_policy: exit status 2: it is broken"),
        (PolicyUnderTest(selinux_booleans=(("a", True),)), "setsebool a: it is broken"),
    ],
)
def test_a_policy_that_selinux_refuses_is_said(
    monkeypatch: pytest.MonkeyPatch, policy: PolicyUnderTest, words: str
) -> None:
    monkeypatch.setattr(native, "compile_modules", lambda *_: native.Compiled(b"policy", b"", b""))
    broken = said(err="it is broken\n", code=2)
    channel = ScriptedChannel([(r"sh -c ls ", said("/policy.33\n")), (r"load_policy|setsebool ", broken)])
    with pytest.raises(PolicyError) as caught:
        Selinux().load(channel, IMAGE, policy)
    assert caught.value.message == words


# AppArmor


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "nginx.apparmor"
    path.write_text("profile nginx {}\n", "utf-8")
    return path


def apparmor_channel(
    loaded: dict[str, str], *, names: str = "nginx\n", answers: tuple[tuple[str, Answer], ...] = ()
) -> ScriptedChannel:
    """A guest whose kernel then has the profiles `loaded`."""
    own: list[tuple[str, Answer]] = [
        (r"apparmor_parser --replace ", said()),
        (r"apparmor_parser --names ", said(names)),
    ]
    return ScriptedChannel([*answers, *own], {"mode": in_mode(ENFORCE, profiles=loaded)})


def test_apparmors_profiles_are_written_before_any_is_loaded(profile: Path) -> None:
    channel = ScriptedChannel()
    Apparmor().load(channel, IMAGE, PolicyUnderTest(apparmor_profiles=(profile,)))
    assert channel.written == {
        "/etc/apparmor.d/nginx.apparmor": b"profile nginx {}\n",
        "/sys/module/apparmor/parameters/audit": b"noquiet",
    }
    Apparmor().load(bare := ScriptedChannel(), IMAGE, PolicyUnderTest())
    assert list(bare.written) == ["/sys/module/apparmor/parameters/audit"], "quiet denials are audited all the same"


@pytest.mark.parametrize(("arm", "option"), [(COMPLAIN, "--Complain "), (ENFORCE, "")])
def test_apparmor_enters_a_mode_and_reads_it_back(profile: Path, arm: Arm, option: str) -> None:
    loaded = {"nginx": "complain" if arm is COMPLAIN else "enforce", "lsb_release": "enforce"}
    channel = apparmor_channel(loaded)
    Apparmor().enter(channel, arm, IMAGE, PolicyUnderTest(apparmor_profiles=(profile,)))
    assert channel.lines == [
        f"apparmor_parser --replace {option}/etc/apparmor.d/nginx.apparmor",
        "apparmor_parser --names /etc/apparmor.d/nginx.apparmor",
        "ask mode",
    ]


@pytest.mark.parametrize(
    ("arm", "loaded", "names", "words"),
    [
        (COMPLAIN, {"nginx": "enforce"}, "nginx\n", "profile nginx: the kernel says 'enforce'"),
        (COMPLAIN, {"nginx": "complain"}, "nginx\nnginx//child\n", "profile nginx//child: the kernel says 'it is not"),
        (COMPLAIN, {"nginx": "complain", "b": "kill"}, "nginx\nb\n", "profile b: the kernel says 'kill'"),
        (ENFORCE, {}, "nginx\n", "profile nginx: the kernel says 'it is not loaded'"),
        (ENFORCE, {"nginx2": "enforce"}, "nginx\n", "profile nginx: the kernel says 'it is not loaded'"),
        (ENFORCE, {"nginx": "complain"}, "nginx\n", ""),  # a profile that is written so is the policy under test
        (COMPLAIN, {"a b": "complain"}, "a b\n\n", ""),
    ],
)
def test_apparmor_in_another_mode_is_an_error(
    profile: Path, arm: Arm, loaded: dict[str, str], names: str, words: str
) -> None:
    channel = apparmor_channel(loaded, names=names)
    policy = PolicyUnderTest(apparmor_profiles=(profile,))
    if not words:
        Apparmor().enter(channel, arm, IMAGE, policy)
        return
    with pytest.raises(FrameworkError) as caught:
        Apparmor().enter(channel, arm, IMAGE, policy)
    assert caught.value.message.startswith(words)


def test_a_kernel_without_apparmor_has_no_profile(profile: Path) -> None:
    channel = apparmor_channel({})
    channel._asked["mode"] = in_mode(Arm.DAC)
    with pytest.raises(FrameworkError, match="it is not loaded"):
        Apparmor().enter(channel, ENFORCE, IMAGE, PolicyUnderTest(apparmor_profiles=(profile,)))


def test_apparmors_modes_are_not_guessed(profile: Path) -> None:
    channel = apparmor_channel({})
    channel._asked["mode"] = {"profiles": {"nginx": "enforce"}}
    with pytest.raises(ChannelError, match="the agent answered nonsense: lsm: Field required"):
        Apparmor().enter(channel, ENFORCE, IMAGE, PolicyUnderTest(apparmor_profiles=(profile,)))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            said(err="AppArmor parser error in /etc/apparmor.d/nginx.apparmor at line 3: syntax error\n", code=1),
            "{0}: apparmor_parser: AppArmor parser error in {0} at line 3: syntax error",
        ),
        (said(code=1), "{0}: apparmor_parser: exit status 1"),
    ],
)
def test_a_profile_that_does_not_compile_is_said_with_its_file_here(profile: Path, answer: Answer, words: str) -> None:
    channel = apparmor_channel({}, answers=((r"apparmor_parser --replace ", answer),))
    with pytest.raises(PolicyError) as caught:
        Apparmor().enter(channel, ENFORCE, IMAGE, PolicyUnderTest(apparmor_profiles=(profile,)))
    assert caught.value.message == words.format(profile)


COMPILED = profiles.Compiled(b"as it is written", b"complaining", ("nginx", "nginx//child"))


@pytest.mark.parametrize(("arm", "data"), [(COMPLAIN, b"complaining"), (ENFORCE, b"as it is written")])
def test_a_profile_that_is_compiled_here_is_only_loaded_there(
    profile: Path, arm: Arm, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def compile_file(*given: Any) -> profiles.Compiled:
        asked.append(given)
        return COMPILED

    monkeypatch.setattr(profiles, "compile_file", compile_file)
    state = "complain" if arm is COMPLAIN else "enforce"
    loaded = in_mode(arm, profiles={"nginx": state, "nginx//child": state})
    channel = ScriptedChannel(asked={"mode": loaded, "apparmor_features": "caps {}"})
    path = "/etc/apparmor.d/nginx.apparmor"
    written = {path: b"profile nginx { } # as it was read", "/etc/apparmor.d/local/nginx": b"/x r,\n"}
    policy = PolicyUnderTest(apparmor_profiles=(profile,), written=written)
    Apparmor().enter(channel, arm, IMAGE, policy)
    assert channel.written == {"/sys/kernel/security/apparmor/.replace": data}
    assert asked == [(IMAGE.policy_tree, IMAGE.digest, "caps {}", written, path)]
    Apparmor().load(channel, IMAGE, policy)
    assert channel.written[path] == written[path], "the guest has what was compiled, whatever is in the file by now"
    lacking = ScriptedChannel(asked={"mode": in_mode(arm, profiles={"nginx": state}), "apparmor_features": ""})
    with pytest.raises(FrameworkError, match="profile nginx//child: the kernel says 'it is not loaded'"):
        Apparmor().enter(lacking, arm, IMAGE, PolicyUnderTest(apparmor_profiles=(profile,), written={}))


def test_a_profile_is_compiled_there_where_this_machine_cannot_know(
    profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiles, "compile_file", lambda *_: None)
    downloaded = dataclasses.replace(IMAGE, files=frozenset({"disk.qcow2"}))
    for image, written in ((IMAGE, {}), (IMAGE, None), (None, {}), (downloaded, {})):
        channel = apparmor_channel({"nginx": "enforce"})
        channel._asked["apparmor_features"] = "caps {}"
        Apparmor().enter(channel, ENFORCE, image, PolicyUnderTest(apparmor_profiles=(profile,), written=written))
        assert "apparmor_parser --replace /etc/apparmor.d/nginx.apparmor" in channel.lines
        assert channel.written == {}


def test_a_file_that_has_no_profile_is_an_error(profile: Path) -> None:
    channel = apparmor_channel({}, names="\n")
    with pytest.raises(PolicyError, match="nginx\\.apparmor: apparmor_parser loads no profile of it"):
        Apparmor().enter(channel, ENFORCE, IMAGE, PolicyUnderTest(apparmor_profiles=(profile,)))


def test_what_the_set_up_writes_is_known_where_it_runs_no_command(profile: Path) -> None:
    lab = discovery.load_lab("debian-13")
    path = "/etc/apparmor.d/nginx.apparmor"
    over = {"write": {"path": path, "content": "x"}}
    for steps_, last in (([JOIN], b"profile nginx {}\n"), ([over], b"x")):
        known = scenario(setup=steps_, apparmor={"profiles": [profile]})
        assert prepare.plan_of(known, lab).policy.written == {path: last}
    joins, commands = scenario(setup=[JOIN, WRITE]), scenario(setup=[WRITE, {"run": ["true"]}])
    assert prepare.plan_of(joins, lab).policy.written == {"/srv/a": b"x"}
    assert prepare.plan_of(scenario(), lab).policy.written == {}
    assert prepare.plan_of(commands, lab).policy.written is None


def test_a_user_joins_a_group_in_its_turn() -> None:
    channel = ScriptedChannel(DONE, {"relabel": None, "join": None})
    prepare.do_steps(channel, steps("/srv/a", JOIN, run_step("touch", "1")), "setup")
    assert channel.lines == ["write /srv/a", "ask join", "ask relabel", "touch 1"]
    assert channel.asked_for("join") == [{"user": "www-data", "group": "shadow"}]
    refused = ScriptedChannel(asked={"join": ChannelError("/etc/group has no group 'shadow'")})
    with pytest.raises(SetupError, match="setup, step 1: /etc/group has no group 'shadow'"):
        prepare.do_steps(refused, steps(JOIN), "setup")


# The whole way


@pytest.mark.parametrize("arm", list(Arm))
def test_every_arm_has_a_driver_that_loads_enters_and_settles(arm: Arm) -> None:
    channel = ScriptedChannel(asked={"mode": in_mode(arm), "permissive": False})
    driver = FRAMEWORKS[arm.framework]
    driver.load(channel, IMAGE, PolicyUnderTest())
    driver.enter(channel, arm, IMAGE, PolicyUnderTest())
    driver.settle(channel, arm, "nginx.service", started=True)
    assert (arm is Arm.DAC) == (channel.lines == [])


def bringing(**asked: Any) -> ScriptedChannel:
    questions = {
        "clock": None, "relabel": None, "pids": [481], "audit_state": audit_state(), "mode": in_mode(PERMISSIVE),
        "start_unit": "", "permissive": False,
    }  # fmt: skip
    return ScriptedChannel([(r"systemctl |touch ", said())], {**questions, **asked})


PLAN = prepare.Plan(
    "nginx.service", steps("/srv/a"), steps(run_step("touch", "late")), PolicyUnderTest(), "/etc/shadow"
)


def test_a_guest_is_brought_into_an_arm() -> None:
    channel = bringing()
    found = prepare.bring_into(channel, PERMISSIVE, PLAN, IMAGE)
    assert found == prepare.Prepared(service_active=True, setup_denials=())
    assert channel.lines == [
        "ask clock", "write /run/lsmlab-arm", "ask pids", "write /srv/a", "ask relabel", "ask pids",
        "systemctl stop nginx.service", "write /sys/fs/selinux/enforce", "ask mode", "ask audit_state",
        "ask start_unit", "touch late", "ask permissive", "write /sys/fs/selinux/commit_pending_bools",
    ]  # fmt: skip


def test_a_guest_is_switched_with_the_service_running() -> None:
    channel = bringing()
    prepare.enter(channel, PERMISSIVE, PLAN, IMAGE, start=False)
    assert channel.lines == ["write /sys/fs/selinux/enforce", "ask mode", "ask permissive"]
    assert channel.written["/sys/fs/selinux/enforce"] == b"0"


def test_a_guest_is_brought_into_an_arm_from_the_one_that_the_service_is_started_in() -> None:
    modes = iter([in_mode(ENFORCING), in_mode(PERMISSIVE)])
    opened = {
        "subject": wire(subject()), "object": wire(target()), "mode": in_mode(ENFORCING), "audit": audit_state(),
        "resting": True, "drained": True,
    }  # fmt: skip
    channel = bringing(mode=lambda: next(modes), open_window=opened)
    found = prepare.bring_into(channel, PERMISSIVE, PLAN, IMAGE, started_in=ENFORCING)
    assert found.service_active
    lines = channel.lines
    assert lines.count("ask start_unit") == lines.count("touch late") == 1
    mode = [n for n, line in enumerate(lines) if line == "write /sys/fs/selinux/enforce"]
    assert len(mode) == 2
    assert mode[0] < lines.index("ask start_unit") < lines.index("touch late") < mode[1]
    assert lines.index("touch late") < lines.index("ask open_window") < mode[1], "it comes to rest in the first mode"
    assert channel.written["/run/lsmlab-arm"] == b"selinux-permissive\n"


@pytest.mark.parametrize(
    ("before", "after", "start", "stopped"),
    [([1], [1], True, True), ([1], [], False, False), ([], [], True, False), ([], [1], True, True)],
)
def test_when_the_service_is_started_in_the_arms_mode(
    before: list[int], after: list[int], start: bool, stopped: bool
) -> None:
    found = iter([before, after])
    channel = bringing(pids=lambda **_: next(found))
    assert prepare.set_up(channel, PERMISSIVE, PLAN, IMAGE) is start
    assert ("systemctl stop nginx.service" in channel.lines) == stopped


def test_where_nothing_is_to_be_started_nothing_is() -> None:
    channel = bringing()
    found = prepare.enter(channel, PERMISSIVE, PLAN, IMAGE, start=False)
    assert found == prepare.Prepared(service_active=False, setup_denials=())
    assert not [line for line in channel.lines if line.startswith(("systemctl", "ask start_unit", "touch"))]


@pytest.mark.parametrize("operation", ["clock", "pids", "relabel", "mode", "audit_state", "start_unit"])
def test_a_guest_that_does_not_answer_on_the_way_is_an_error(operation: str) -> None:
    with pytest.raises(LsmlabError, match="fell silent"):
        prepare.bring_into(bringing(**{operation: ChannelError("fell silent")}), PERMISSIVE, PLAN, IMAGE)
