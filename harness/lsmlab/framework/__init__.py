"""The frameworks, by name; None stands for the control."""

from __future__ import annotations

from lsmlab.framework.apparmor import Apparmor
from lsmlab.framework.base import FrameworkDriver
from lsmlab.framework.dac import NoFramework
from lsmlab.framework.selinux import Selinux
from lsmlab.terms import Framework

FRAMEWORKS: dict[Framework | None, FrameworkDriver] = {
    None: NoFramework(),
    Framework.SELINUX: Selinux(),
    Framework.APPARMOR: Apparmor(),
}
