"""What Linux offers to shut a process in: namespaces, a file system of its own, an unprivileged user.

Runs inside the sandbox's own processes (see ``sandbox_child.py``) and needs the standard library only. Every function
raises OSError where the kernel, or a container's policy, refuses.
"""

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

_NOBODY = 65534  # Linux's overflow uid: owns nothing

_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWUSER = 0x20000, 0x8000000, 0x10000000  # linux/sched.h
_CLONE_NEWPID, _CLONE_NEWNET = 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18  # linux/mount.h
_MNT_DETACH, _AT_FDCWD, _AT_RECURSIVE, _SYS_MOUNT_SETATTR = 2, -100, 0x8000, 442
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID = 1, 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38  # linux/prctl.h
_CAPABILITY_VERSION_3 = 0x20080522

_DEVICES = ("null", "zero", "full", "random", "urandom")
_LIBRARIES = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/nix/store")
_OLD = "/.old"

_libc = ctypes.CDLL(None, use_errno=True)


def _call(function: str, *arguments: object) -> None:
    converted = [a.encode() if isinstance(a, str) else a for a in arguments]
    if getattr(_libc, function)(*converted) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{function}: {os.strerror(code)}")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    _call("mount", source, target, kind, ctypes.c_ulong(flags), data)


def leave_host() -> None:
    """Move this process into a user, network, mount and IPC namespace of its own, and its next child into a process
    namespace as process 1. Root maps itself and nobody, any other user only itself."""
    uid, gid, pid = os.geteuid(), os.getegid(), os.getpid()
    ready, tell = os.pipe()
    helper = os.fork()
    if helper == 0:  # a map with nobody in it can be written from outside the new namespace only
        os._exit(0 if os.read(ready, 1) and _write_maps(pid, uid, gid) else 1)
    try:
        _call("unshare", _CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWNET | _CLONE_NEWIPC)
        os.write(tell, b"x")
    finally:
        os.close(tell)
        os.close(ready)
        _, status = os.waitpid(helper, 0)
    if status != 0:
        raise OSError(0, "the user namespace's maps cannot be written")
    # Inside a further user namespace a program would be privileged: it could mount file systems without a size limit.
    Path("/proc/sys/user/max_user_namespaces").write_text("0")


def _write_maps(pid: int, uid: int, gid: int) -> bool:
    nobody = f"\n{_NOBODY} {_NOBODY} 1" if uid == 0 else ""
    try:
        if uid != 0:
            Path(f"/proc/{pid}/setgroups").write_text("deny")
        Path(f"/proc/{pid}/uid_map").write_text(f"{uid} {uid} 1{nobody}")
        Path(f"/proc/{pid}/gid_map").write_text(f"{gid} {gid} 1{nobody if gid == 0 else ''}")
    except OSError:
        return False
    return True


def build_root() -> None:
    """Replace the file system by one with the interpreter, the system's libraries, a few devices and the new process
    namespace's /proc, all read-only; the rest of the host's files is gone. For process 1."""
    _call("prctl", _PR_SET_PDEATHSIG, 9, 0, 0, 0)
    _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=1m")
    Path(f"/tmp{_OLD}").mkdir()
    _call("pivot_root", "/tmp", f"/tmp{_OLD}")
    os.chdir("/")
    Path("/tmp").mkdir()
    bound: list[str] = []
    for path in (*_LIBRARIES, sys.base_prefix, sys.base_exec_prefix):
        if not any(Path(path).is_relative_to(other) for other in bound) and os.path.lexists(_OLD + path):
            _bind(path)
            bound.append(path)
    for device in _DEVICES:
        _bind(f"/dev/{device}", read_only=False)
    Path("/proc").mkdir()
    with suppress(PermissionError):  # in containers that hide parts of /proc; programs do without it
        _mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        Path("/dev", name).symlink_to(f"/proc/self/fd{target}")
    _call("umount2", _OLD, _MNT_DETACH)
    Path(_OLD).rmdir()
    _read_only("/")


def _bind(path: str, read_only: bool = True) -> None:
    source, target = Path(_OLD + path), Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        target.symlink_to(source.readlink())
        return
    if source.is_dir():
        target.mkdir(exist_ok=True)
    else:
        target.touch()
    _mount(str(source), path, None, _MS_BIND | _MS_REC)
    if read_only:
        _read_only(path, _AT_RECURSIVE)


def _read_only(path: str, flags: int = 0) -> None:
    attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    _call("syscall", _SYS_MOUNT_SETATTR, _AT_FDCWD, path, flags, ctypes.byref(attributes), ctypes.sizeof(attributes))


def enter_work_directory(size: int) -> None:
    """A mount and an IPC namespace for one run, with an empty working directory /tmp of ``size`` bytes. The kernel
    drops both when the run's last process ends."""
    _call("unshare", _CLONE_NEWNS | _CLONE_NEWIPC)
    owner = _NOBODY if os.getuid() == 0 else os.getuid()
    options = f"size={size},nr_inodes=1024,mode=700,uid={owner}"
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, options)
    os.chdir("/tmp")


def drop_privileges() -> None:
    """Give up root and every capability, for good; nobody of the same user can read this process's memory either."""
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    header, nothing = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    _call("capset", ctypes.byref(header), ctypes.byref(nothing))
    _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)
