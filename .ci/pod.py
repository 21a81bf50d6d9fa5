#!/usr/bin/env python3
"""Runs a program of an image as the manifests run it: user 65532, a read-only root, no capabilities, no new privileges, and only
the network of the machine.

    pod.py ROOT PROGRAM [ARGUMENT...]

The process replaces itself, so that signals reach the program.
"""

import ctypes
import os
import sys

libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS = 0x20000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
PR_CAPBSET_READ, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 23, 24, 38
USER = 65532


def call(name, *arguments):
    if getattr(libc, name)(*arguments) != 0:
        sys.exit(f"{name}: {os.strerror(ctypes.get_errno())}")


def mount(source, target, flags):
    call("mount", source and source.encode(), target.encode(), None, flags, None)


def main():
    root, program, *arguments = sys.argv[1:]
    call("unshare", CLONE_NEWNS)
    mount(None, "/", MS_REC | MS_PRIVATE)
    mount(root, root, MS_BIND)
    # A container runtime mounts these.
    for path in ("/proc", "/dev", "/etc/resolv.conf", "/etc/hosts"):
        inside = root + path
        if os.path.isdir(path):
            os.makedirs(inside, exist_ok=True)
        elif not os.path.exists(inside):
            open(inside, "w").close()
        mount(path, inside, MS_BIND | MS_REC)
    mount(None, root, MS_REMOUNT | MS_BIND | MS_RDONLY)
    os.chroot(root)
    os.chdir("/")
    capability = 0
    while libc.prctl(PR_CAPBSET_READ, capability, 0, 0, 0) >= 0:
        call("prctl", PR_CAPBSET_DROP, capability, 0, 0, 0)
        capability += 1
    os.setgroups([])
    os.setgid(USER)
    # Leaving user 0 clears all capabilities that the process holds.
    os.setuid(USER)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.execve(f"/usr/local/bin/{program}", [program, *arguments], os.environ)


main()
