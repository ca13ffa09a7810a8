"""What must hold after every event. One function per promise; docs/scheduler.md lists them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Ordered

import numpy as np

from treadle.kvcache import CoreInvariantError as CoreInvariantError
from treadle.kvcache.invariant import require

from .config import CoreConfig
from .flight import Flight
from .request import NO_ROW, Request, Sequence
from .rows import NEVER
from .running import Running
from .stop_ids import StopIds
from .waiting import Waiting


def check_core(
    config: CoreConfig,
    running: Running,
    waiting: Waiting,
    flights: Ordered[Flight],
    requests: Mapping[str, Request],
    stop_ids: StopIds,
    in_order: bool,
) -> None:
    """Raises CoreInvariantError with the first broken promise. in_order: equals start in order of arrival."""
    require(len(flights) <= config.pipeline_depth, "more plans in flight than pipeline_depth")
    _check_places(running, waiting, requests)
    waiting.check()
    if in_order:
        _check_order(running, waiting)
    _check_blocks(running)
    running.reservation.check()
    for sequence in running.sequences():
        _check_row(config, running, sequence)
    _check_in_flight(running, waiting, flights)
    _check_stop_ids(requests, stop_ids)


def _check_places(running: Running, waiting: Waiting, requests: Mapping[str, Request]) -> None:
    """Every unfinished sequence either waits or runs, and nothing else does."""
    unfinished = [s for request in requests.values() for s in request.sequences if not s.finish]
    places = Counter(id(s) for s in waiting) + Counter(id(s) for s in running.sequences())
    require(places == Counter(id(s) for s in unfinished), "a sequence is lost, or waits and runs at once")
    for request in requests.values():
        alive = [s for s in request.sequences if not s.finish]
        require(len(alive) == request.unfinished > 0, f"{request.id}: unfinished is miscounted")
        require(sum(s.row != NO_ROW for s in alive) == request.running, f"{request.id}: running is miscounted")
    require(sum(s.known for s in waiting) == waiting.tokens, "waiting tokens are miscounted")
    rows = running.rows
    taken = [row for row, owner in enumerate(rows.owner) if owner is not None]
    guided = [s.row for s in running.sequences() if s.request.guided]
    require(np.flatnonzero(rows.guided).tolist() == sorted(guided), "a row waits for masks, or not, and should not")
    require(rows.guided_count == len(guided), "guided rows are miscounted")
    require(sorted(taken + rows.free) == list(range(len(rows.owner))), "a row is lost, or free and taken at once")
    require(rows.count == len(taken), "rows in use are miscounted")


def _check_order(running: Running, waiting: Waiting) -> None:
    """First come, first served: within a priority nobody who waits came before one who runs.

    But for those that were tried before their turn, since an engine had died under them.
    """
    first_waiting: dict[int, int] = {}
    for sequence in waiting:
        priority = sequence.ticket.priority
        first_waiting[priority] = min(sequence.order, first_waiting.get(priority, sequence.order))
    for sequence in running.sequences():
        if sequence.request.accused:
            continue
        earliest = first_waiting.get(sequence.ticket.priority)
        require(earliest is None or sequence.order < earliest, f"{sequence.request.id} runs before its turn")


def _check_blocks(running: Running) -> None:
    """Every reference count is the number of block tables that name the block."""
    running.cache.check()
    tables = Counter(block for s in running.sequences() for block in running.rows.blocks_of(s.row).tolist())
    refs = {block: count for block, count in enumerate(running.cache.pool.refs.tolist()) if count}
    require(tables == refs, "reference counts differ from block tables")


def _check_row(config: CoreConfig, running: Running, sequence: Sequence) -> None:
    """The counters of a row are in range, its blocks cover them, and what it published is what it knows."""
    rows, row, name = running.rows, sequence.row, sequence.request.id
    require(rows.owner[row] is sequence and rows.order[row] == sequence.order, f"{name}: row {row} is not its own")
    known, frontier, computed = (int(a[row]) for a in (rows.known, rows.frontier, rows.computed))
    limit, nblocks = int(rows.limit[row]), int(rows.nblocks[row])
    require(known < limit == sequence.request.limit <= config.capacity, f"{name}: runs at or past its limit")
    require(known <= frontier <= limit, f"{name}: planned past its limit")
    require(computed < frontier, f"{name}: computed a token that nobody can know")
    require(computed <= nblocks * config.block_size, f"{name}: computed tokens have no block")
    blocks = rows.blocks_of(row).tolist()
    require(0 not in blocks and len(set(blocks)) == nblocks, f"{name}: null or repeated block in its table")
    size = config.block_size
    if not config.prefix_cache:
        require(not len(running.cache), "published although the prefix cache is off")
        return
    due = min(known, computed) // size
    place, publish_at = rows.chain[row], int(rows.publish_at[row])
    followed = None if isinstance(place, str) or place[0].writer != row else place[0]
    require((followed is None) == (publish_at < NEVER), f"{name}: it follows a run and publishes, or does neither")
    published_to = publish_at // size - 1 if followed is None else followed.end
    require(published_to <= due, f"{name}: published what it has not planned")
    for index, block in enumerate(blocks):
        published = running.cache.content(block)
        if published is not None:
            content = rows.tokens[row, index * size : (index + 1) * size].tobytes()
            own = content if index else (sequence.request.salt, content)
            require(index < due and published == own, f"{name}: block {block} is published as something else")
            require(running.cache.depth(block) == index, f"{name}: block {block} is published at another place")


def _check_in_flight(running: Running, waiting: Waiting, flights: Ordered[Flight]) -> None:
    """Tokens that rows and parked sequences wait for are those that plans in flight will bring."""
    coming = Counter(a for flight in flights for a in flight.taken[flight.sampling_rows].tolist())
    rows = running.rows
    for sequence in running.sequences():
        expected = int(rows.frontier[sequence.row] - rows.known[sequence.row])
        require(coming[sequence.admission] == expected, f"{sequence.request.id}: tokens in flight are miscounted")
    for sequence in waiting:
        there = coming[sequence.admission] if sequence.admission else 0
        require(there == sequence.in_flight, f"{sequence.request.id}: parked tokens are miscounted")
        parked = running.parked.get(sequence.admission) is sequence
        require(parked == (sequence.in_flight > 0), f"{sequence.request.id}: parked wrongly")
    require(len(running.parked) == sum(s.in_flight > 0 for s in waiting), "an ended sequence is parked")


def _check_stop_ids(requests: Mapping[str, Request], stop_ids: StopIds) -> None:
    expected = Counter(token for request in requests.values() for token in request.stop_ids)
    require(expected == stop_ids.counts, "stop ids are miscounted")
    require(set(np.flatnonzero(stop_ids.mask).tolist()) == set(expected), "the mask of stop ids is wrong")
