"""A `python` that starts in milliseconds: it asks a server that has imported everything to fork.

Importing torch and Lightning takes seconds of each process, and tests of launchers start many. The server imports once;
`warm_python` in `tests/conftest.py` is the path of an executable that takes a script (or `-m module`) and its arguments
as `python` does, and runs them in a fresh fork with the caller's environment, folder and standard streams. It is a
process like any other: signals are passed on, killing it kills what it runs, and it ends as that ends. Launchers that
start `sys.executable` start it again.
"""

import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRELOADED = (
    "torch.distributed.run",
    "lightning.pytorch",
    "sklearn.datasets",
    "lightning_unlearn.api",
    "lightning_unlearn.callbacks",
    "lightning_unlearn.callbacks.subject_grouping",
    "lightning_unlearn.demo.digits",
)
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

CLIENT = """#!{python} -IS
import json, os, signal, socket, sys

with socket.socket(socket.AF_UNIX) as server:
    blocked = {{{signals}}}
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    server.connect({address!r})
    job = dict(argv=sys.argv[1:], env=dict(os.environ), cwd=os.getcwd(), executable=os.path.abspath(__file__))
    message = json.dumps(job).encode()
    socket.send_fds(server, [len(message).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(message)
    answers = server.makefile("r")
    pid = int(answers.readline())
    for signum in blocked:
        signal.signal(signum, lambda signum, frame: os.kill(pid, signum))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
    status = int(answers.readline() or -9)
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if status != -9 else None
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


def write_client(path, address):
    """Write the executable."""
    signals = ", ".join(str(int(signum)) for signum in PASSED_ON)
    path.write_text(CLIENT.format(python=sys.executable, address=str(address), signals=signals))
    path.chmod(0o755)


def start_server(address):
    """Start the server; it is ready when the socket is there, which `wait_for_server` waits for."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.helpers.warm_python", str(address)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)  # noqa: S603


def _run(job):
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    sys.executable = job["executable"]
    argv = [argument for argument in job["argv"] if argument != "-u"]
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            sys.path[0] = os.path.dirname(os.path.abspath(argv[0]))
            runpy.run_path(argv[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _attend(connection):
    """One client: fork what it asks for, wait for its end, and kill it if the client goes away."""
    size, fds, _, _ = socket.recv_fds(connection, 4, 3)
    job = json.loads(connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
    pid = os.fork()
    if not pid:
        connection.close()
        for target, fd in enumerate(fds):
            os.dup2(fd, target)
            os.close(fd)
        return job
    for fd in fds:
        os.close(fd)
    connection.sendall(f"{pid}\n".encode())
    ended = os.pidfd_open(pid)
    ready, _, _ = select.select([ended, connection], [], [])
    if ended not in ready:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if ended in ready:
        connection.sendall(f"{status}\n".encode())
    os._exit(0)


def main():
    """Import, listen, and fork until the parent goes away."""
    for module in PRELOADED:
        __import__(module)
    parent = os.getppid()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1])
        listener.listen()
        listener.settimeout(1)
        print("ready", flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for attendants
        while os.getppid() == parent:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            if not os.fork():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                return _attend(connection)
            connection.close()
    return None


if __name__ == "__main__":
    job = main()
    if job is not None:
        _run(job)
