"""The sockets of this project, with the options that each side needs."""

from __future__ import annotations

import zmq

from .codec import MAX_CLIENT_FRAME

_HEARTBEAT_MS = 2_000
_HEARTBEAT_TIMEOUT_MS = 10_000


def _common(sock: zmq.Socket[bytes], high_water: int) -> zmq.Socket[bytes]:
    sock.linger = 0
    sock.sndhwm = sock.rcvhwm = high_water
    sock.heartbeat_ivl = _HEARTBEAT_MS  # finds half-open tcp connections; costs nothing on ipc
    sock.heartbeat_timeout = _HEARTBEAT_TIMEOUT_MS
    return sock


def group_socket(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    """Scheduler's side towards the ranks of one group: a plan to a rank that is gone is an error, never a loss."""
    sock = _common(context.socket(zmq.ROUTER), 1_000)
    sock.router_mandatory = True
    return sock


def rank_socket(context: zmq.Context[zmq.Socket[bytes]], rank: int) -> zmq.Socket[bytes]:
    sock = _common(context.socket(zmq.DEALER), 1_000)
    sock.routing_id = b"rank-%d" % rank
    sock.heartbeat_ivl = 0  # the lifeline tells it of the scheduler's end; a scheduler that was stopped finds it again
    sock.reconnect_ivl = -1  # what was on its way is lost with a connection, so the group is: no second one
    return sock


def service_socket(context: zmq.Context[zmq.Socket[bytes]], high_water: int) -> zmq.Socket[bytes]:
    """Service's side towards clients: bounded per client, and a client that comes back keeps its identity."""
    sock = _common(context.socket(zmq.ROUTER), high_water)
    sock.router_mandatory = True
    sock.router_handover = True
    sock.maxmsgsize = MAX_CLIENT_FRAME
    return sock


def client_socket(context: zmq.Context[zmq.Socket[bytes]], identity: bytes) -> zmq.Socket[bytes]:
    sock = _common(context.socket(zmq.DEALER), 10_000)
    sock.routing_id = identity
    sock.reconnect_ivl = 50
    sock.reconnect_ivl_max = 2_000
    return sock
