"""Code that tries to get out: to the network, to files, processes and rights of the host."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from tests.grading.sandbox.sandboxes import grader, open_sandbox


@pytest.fixture(autouse=True)
def _the_warm_parent_survives(sandbox):
    assert sandbox.run_grade(grader("return 1"), [({}, {})])[0].value == 1.0
    before = list(sandbox._alive)
    yield
    assert sandbox.run_grade(grader("return 2"), [({}, {})])[0].value == 2.0
    assert list(sandbox._alive) == before


REFUSED = """
import errno
try:
    {}
except OSError as error:
    print(errno.errorcode[error.errno])
    return 0
return 1
"""
"""0 and the error's name, or 1 if the host let it happen."""


def refused(grade, attempt: str, *errors: str) -> None:
    result = grade(REFUSED.format(attempt.replace("\n", "\n    ")))
    assert result.value == 0.0, result
    assert result.stdout.strip() in errors


def test_a_server_on_the_hosts_loopback_cannot_be_reached(grade):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        address = server.getsockname()
        socket.create_connection(address).close()  # it is there
        server.accept()[0].close()
        refused(grade, f"import socket\nsocket.create_connection({address!r}, timeout=5)", "EPERM")
        with pytest.raises(BlockingIOError):
            server.accept()


FAMILIES = {
    "AF_INET": 2,
    "AF_INET6": 10,
    "AF_NETLINK": 16,
    "AF_PACKET": 17,
    "AF_CAN": 29,
    "AF_TIPC": 30,
    "AF_BLUETOOTH": 31,
    "AF_ALG": 38,
    "AF_VSOCK": 40,
}
"""Linux's numbers; not every Python knows all names."""


@pytest.mark.parametrize("family", FAMILIES)
def test_no_socket_but_a_unix_one_can_be_made(grade, family):
    for kind in (1, 2, 3):
        refused(grade, f"import socket\nsocket.socket({FAMILIES[family]}, {kind})", "EPERM")
        refused(grade, f"import socket\nsocket.socketpair({FAMILIES[family]}, {kind})", "EPERM")


def test_there_is_no_network_even_without_the_filter(grade):
    """The namespace has a loopback of its own and nothing else."""
    result = grade("print(open('/proc/self/net/dev').read())\nreturn 1")
    devices = [line.partition(":")[0].strip() for line in result.stdout.splitlines() if ":" in line]
    assert devices == ["lo"]


def test_the_hosts_unix_sockets_cannot_be_reached(grade, tmp_path):
    abstract = f"\0graft-test-{os.getpid()}"
    for address in (abstract, str(tmp_path / "socket")):
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(address)
            server.listen()
            attempt = f"import socket\nsocket.socket(socket.AF_UNIX).connect({address!r})"
            refused(grade, attempt, "ECONNREFUSED", "ENOENT", "EACCES")


def test_unix_sockets_between_own_processes_work(grade):
    assert (
        grade("import socket\na, b = socket.socketpair()\na.send(b'7')\nreturn int(b.recv(9))").value == 7.0
    )


def test_files_of_the_host_cannot_be_read(grade, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    paths = [
        secret,
        Path.home() / ".bashrc",
        "/etc/passwd",
        "/etc/shadow",
        "/etc/hostname",
        "/var/log",
        "/sys",
        "/run",
    ]
    paths += [
        __file__,
        Path(__file__).parents[3] / "pyproject.toml",
        "/dev/vda",
        "/dev/mem",
        "/dev/kmsg",
        "/dev/tty",
    ]
    for path in paths:
        for way in ("", "/proc/self/root", "/proc/1/root", "/proc/self/cwd/..", "/proc/thread-self/root"):
            refused(grade, f"import os\nprint(os.stat('{way}{path}'))", "ENOENT", "EACCES", "ENOTDIR")


def test_only_what_is_listed_can_be_seen(grade):
    result = grade(
        "import os\nprint(*sorted(os.listdir('/')), *sorted(os.listdir('/dev')), *os.listdir('/tmp'))\nreturn 1"
    )
    allowed = {"bin", "lib", "lib32", "lib64", "usr", "etc", "nix", "gnu", "dev", "proc", "tmp", "sandbox"}
    allowed |= {
        Path(os.path.realpath(sys.base_prefix)).parts[1],
        "fd",
        "full",
        "null",
        "random",
        "shm",
        "urandom",
        "zero",
    }
    assert set(result.stdout.split()) <= allowed
    assert {"proc", "tmp", "null"} <= set(result.stdout.split())
    assert grade("import os\nprint(*os.listdir('/etc'))\nreturn 1").stdout.split() in ([], ["ld.so.cache"])


@pytest.mark.parametrize(
    "folder",
    [
        "/",
        "/usr/bin",
        "/usr/lib",
        "/dev",
        "/proc",
        "/sandbox",
        "/sandbox/inside",
        "/sandbox/packages/0",
        sys.base_prefix,
    ],
)
def test_nothing_but_the_own_files_can_be_written(grade, folder):
    refused(
        grade, f"open('{os.path.realpath(folder)}/graft-test', 'w')", "EROFS", "EACCES", "EPERM", "ENOENT"
    )
    refused(grade, f"import os\nos.chmod('{os.path.realpath(folder)}', 0o777)", "EROFS", "EPERM")
    assert not os.path.exists(os.path.join(folder, "graft-test"))


def test_a_program_of_the_system_cannot_be_changed(grade):
    refused(grade, "open('/usr/bin/env', 'r+b')", "EROFS", "EACCES")
    refused(grade, "open('/sandbox/inside/run.py', 'a')", "EROFS", "EACCES")


CALLS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
x86 = os.uname().machine == "x86_64"
def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
"""


@pytest.mark.parametrize(
    "attempt",
    [
        "check(libc.unshare(0x10000000))",  # a new user namespace, to be root there
        "check(libc.unshare(0x00020000))",
        "check(libc.setns(os.open('/proc/self/ns/mnt', os.O_RDONLY), 0))",
        "check(libc.syscall(56 if x86 else 220, 0x10000011, 0, 0, 0, 0))",  # clone() into one
        "check(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None))",
        "check(libc.umount2(b'/tmp', 2))",
        "check(libc.umount2(b'/proc', 2))",
        "check(libc.ptrace(0, 0, 0, 0))",
        "check(libc.syscall(310 if x86 else 270, 1, 0, 0, 0, 0, 0))",  # process_vm_readv
        "check(libc.syscall(425, 8, 0))",  # io_uring, whose sockets no filter sees
        "os.memfd_create('x')",
        "os.chroot('/tmp')",
        "os.setuid(0)",
        "os.setgroups([0])",
        "os.mknod('/tmp/disk', 0o60666, os.makedev(254, 0))",
        "os.nice(-1)",
        "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
        "check(libc.sethostname(b'x', 1))",
        "check(libc.reboot(0))",
        "check(libc.klogctl(3, ctypes.create_string_buffer(100), 100))",
        "check(libc.adjtimex(ctypes.create_string_buffer(b'\\x01' * 208)))",
    ],
)
def test_the_kernel_refuses(sandbox, attempt):
    source = CALLS + grader(REFUSED.format(attempt))
    [result] = sandbox.run_grade(source, [({}, {})])
    assert result.value == 0.0, result
    assert result.stdout.strip() in ("EPERM", "EACCES", "EINVAL")


def test_rights_are_gone_and_stay_gone(grade):
    status = grade("print(open('/proc/self/status').read())\nreturn 1").stdout
    fields = dict(line.partition(":\t")[::2] for line in status.splitlines())
    assert [fields[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Amb")] == ["0" * 16] * 4
    assert fields["NoNewPrivs"] == "1"
    assert fields["Seccomp"] == "2"
    assert "0" not in fields["Uid"].split()
    assert fields["Groups"].split() in ([], ["1000"], ["65534"])


@pytest.mark.parametrize("name", ["DATA", "CPU", "FSIZE", "NPROC", "NOFILE", "CORE"])
def test_a_limit_cannot_be_raised(grade, name):
    body = f"""
    import resource
    hard = resource.getrlimit(resource.RLIMIT_{name})[1]
    assert hard != resource.RLIM_INFINITY
    try:
        resource.setrlimit(resource.RLIMIT_{name}, (hard, hard + 1))
    except (ValueError, OSError):
        return 0
    return 1
    """
    assert grade(body).value == 0.0


def test_secrets_of_the_environment_do_not_come_in(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-graft-test-secret")
    with open_sandbox() as fresh:
        body = """
        import glob, os, subprocess
        texts = [repr(dict(os.environ))]
        for path in glob.glob("/proc/*/environ") + glob.glob("/proc/*/cmdline") + glob.glob("/proc/*/task/*/environ"):
            try: texts.append(open(path, "rb").read().decode())
            except PermissionError: pass
        texts.append(subprocess.run(["/usr/bin/env"], capture_output=True, text=True).stdout)
        print(len(texts), *texts)
        return any("sk-graft" in text for text in texts)
        """
        [result] = fresh.run_grade(grader(body), [({}, {})])
    assert result.value == 0.0
    assert int(result.stdout.split()[0]) > 3
    assert "PYTHONHASHSEED" in result.stdout  # so that it did look


def test_no_other_process_can_be_seen(grade):
    body = "import os\nprint(*[p for p in os.listdir('/proc') if p.isdecimal()], os.getpid(), os.getppid())\nreturn 1"
    assert grade(body).stdout.split() == ["1", "1", "0"]


@pytest.mark.parametrize(
    "attempt",
    [
        "os.kill(-1, signal.SIGKILL)",
        "os.kill(0, signal.SIGTERM)",
        "os.killpg(0, signal.SIGINT)",
        "os.killpg(os.getpgrp(), signal.SIGTERM)",
        "os.kill(os.getppid(), signal.SIGTERM)",
        "[os.kill(p, signal.SIGKILL) for p in range(2, 20_000) if alive(p)]",
        "signal.raise_signal(signal.SIGSTOP)",
    ],
)
def test_signals_reach_nobody_else(sandbox, attempt):
    source = f"""
import os, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
def alive(p):
    try: os.kill(p, 0)
    except OSError: return False
    return True
def grade(sample, item):
    try: {attempt}
    except OSError: pass
    return 0.5
"""
    [result] = sandbox.run_grade(source, [({}, {})])
    assert result.value == 0.5  # the fixture looks at the others


def test_a_process_group_kill_that_takes_itself_along(grade):
    assert grade("import os, signal\nos.fork()\nos.killpg(0, signal.SIGKILL)\nreturn 0.5").value in (
        None,
        0.5,
    )


def test_only_the_calls_own_descriptors_are_open(grade):
    body = """
    import os
    print(*[f"{n}:{os.readlink(f'/proc/self/fd/{n}').partition(':')[0]}" for n in sorted(os.listdir('/proc/self/fd'))
            if os.path.lexists(f'/proc/self/fd/{n}')])
    return 1
    """
    # standard input, output, error, the result pipe; the listing itself is closed again
    assert grade(body).stdout.split() == ["0:/dev/null", "1:pipe", "2:pipe", "4:pipe"]
