"""`python -m treadle.engine`: one rank. Started by the scheduler, never by hand.

The group's secret comes in the environment variable TREADLE_GROUP_TOKEN, which, unlike an argument, other users of the
machine cannot read. Everything before the import of the worker is free of torch: the lifeline must stand first.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import signal
import sys
import threading
from pathlib import Path

import zmq

from treadle.engine import lifeline
from treadle.engine.early import Start, begin, wants_gpu
from treadle.engine.native import load_native
from treadle.engine.phases import Phases, process_age
from treadle.transport.codec import rank_codec
from treadle.transport.messages import PROTOCOL_VERSION, Hello
from treadle.transport.sockets import rank_socket


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m treadle.engine", description=__doc__.splitlines()[0])
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--lifeline", type=int, required=True, metavar="FD")
    parser.add_argument("--leftover", type=Path, action="append", default=[], metavar="PATH")
    parser.add_argument("--stacks", type=Path, metavar="PATH", help="where SIGUSR1 writes the stacks of all threads")
    parser.add_argument("--masks", type=int, default=-1, metavar="FD", help="memory that is shared with the scheduler")
    parser.add_argument("--no-native", action="store_true")
    options = parser.parse_args()
    phases = Phases(process_age())
    lifeline.watch(options.lifeline, options.leftover)
    if options.stacks is not None:  # before the first message: who has not said hello is not sent the signal
        faulthandler.register(signal.SIGUSR1, options.stacks.open("w"), all_threads=True)
    codec = rank_codec()
    socket = rank_socket(zmq.Context.instance(), options.rank)
    socket.connect(options.endpoint)
    token = os.environ.pop("TREADLE_GROUP_TOKEN", "")
    socket.send(codec.encode(Hello(PROTOCOL_VERSION, options.rank, os.getpid(), token)))

    # The first start on a machine compiles kernels; that and the import of torch take seconds each.
    frame = socket.recv()
    phases.end("interpreter")
    on_gpu = wants_gpu(frame, codec)
    compiler = begin(frame, options.rank) if on_gpu else None
    compiling = threading.Thread(target=load_native, name="native")
    native = not options.no_native and not on_gpu
    if native:
        compiling.start()
    gc.disable()  # torch makes objects by the hundred thousand: each collection looks through them, and frees nothing
    from treadle.engine.worker import serve

    gc.freeze()
    gc.enable()
    phases.end("imports")
    if native:
        compiling.join()
        phases.end("native")
    return serve(socket, codec, options.rank, frame, Start(phases, compiler=compiler, masks=options.masks))


if __name__ == "__main__":
    # Skips the interpreter's teardown: collectives and device contexts of a group that is gone can hang there.
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    zmq.Context.instance().destroy(linger=2_000)
    os._exit(code)
