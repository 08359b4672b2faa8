"""kill -9 at a system call of a process, whether Python makes it or a library written in Rust. Needs strace.

`strace` counts the calls of each thread by itself, and kills the process where the first thread comes to its n-th.
"""

import shutil

# What writes, makes durable, names, and sends. Reading and opening change nothing.
CALLS = {
    "write": "write,writev,pwrite64,pwritev,pwritev2,copy_file_range,sendfile,ftruncate,fallocate",
    "fsync": "fsync,fdatasync,sync_file_range,msync",
    "rename": "rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,rmdir,mkdir,mkdirat",
    "send": "connect,sendto,sendmsg,sendmmsg",
}

# Runs `act()` in a fork of this process, traced from its first step; `result` is how it ended.
KILL = """
import os, pathlib, signal, subprocess, time
go, start = os.pipe()
pid = os.fork()
if pid == 0:
    os.close(start)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.read(go, 1)
    try:
        act()
    except SystemExit as end:
        os._exit(end.code or 0)
    os._exit(1)
os.close(go)
command = ["strace", "-f", "-qq", "-o", log, "-e", f"trace={calls}", "-p", str(pid)]
if at:
    command[-2:-2] = ["-e", f"inject={calls}:signal=KILL:when={at}"]
tracer = subprocess.Popen(command, stderr=subprocess.DEVNULL)
status = pathlib.Path(f"/proc/{pid}/status")
while "TracerPid:\\t0\\n" in status.read_text() and tracer.poll() is None:
    time.sleep(0.002)
os.write(start, b"x")
os.close(start)
result = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
tracer.wait()
"""


def can_trace() -> bool:
    """Whether there is a strace here."""
    return shutil.which("strace") is not None
