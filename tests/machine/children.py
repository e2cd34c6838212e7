"""Work in child processes that may die: what a child said before is kept, and the next child goes on behind it."""

import json
import os
import select
import signal
import sys
import traceback

import torch


def in_children(work, numbers, workers=1, each=200):
    """Runs `work(number)` for numbers, a few hundred per child process, and yields `(number, result)`.

    A result is anything JSON-able. Where a child dies, the result is `{"died": "SIGSEGV"}` and the like; where `work`
    raises, `{"raised": traceback}`.

    Args:
        work (`Callable`): From a number to a result.
        numbers (`Iterable`): JSON-able things, each handed to `work` once.
        workers (`int`): Children at a time.
        each (`int`): Numbers per child; a new one has none of the memory of the old one.
    """
    numbers = list(numbers)
    todo = [numbers[i : i + each] for i in range(0, len(numbers), each)][::-1]
    running, rest = {}, {}
    while todo or running:
        while todo and len(running) < workers:
            chunk = todo.pop()
            reader, pid = _start(work, chunk)
            running[reader], rest[reader] = (pid, chunk, []), b""
        ready, _, _ = select.select(list(running), [], [])
        for reader in ready:
            pid, chunk, told = running[reader]
            data = os.read(reader.fileno(), 1 << 16)
            if data:
                *lines, rest[reader] = (rest[reader] + data).split(b"\n")
                for line in lines:
                    number, result = json.loads(line)
                    told.append(number)
                    yield number, result
                continue
            reader.close()
            del running[reader]
            _, status = os.waitpid(pid, 0)
            left = chunk[len(told) :]
            if left:
                name = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {status}"
                yield left[0], {"died": name}
                if left[1:]:
                    todo.append(left[1:])


def _start(work, chunk):
    reading, writing = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(writing)
        return os.fdopen(reading, "rb", buffering=0), pid
    os.close(reading)
    # torch's own pool of threads is made anew after a fork, and threads that ask for it at once find none.
    torch.set_num_threads(1)
    code = 1
    try:
        with os.fdopen(writing, "w", buffering=1) as out:
            for number in chunk:
                try:
                    result = work(number)
                except Exception:
                    result = {"raised": traceback.format_exc(limit=-4)}
                print(json.dumps([number, result]), file=out, flush=True)
        code = 0
    finally:
        os._exit(code)
