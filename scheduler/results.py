"""What the ranks bring: tokens to the sequences that they belong to, and who ends by them."""

from __future__ import annotations

from treadle.errors import ProtocolError
from treadle.kvcache.arrays import all_of, any_of
from treadle.transport.codec import Int32, pack, unpack, unpack_unsigned
from treadle.transport.messages import RowFault, StepResult, TokenLogprobs

from .flight import Flight
from .request import NO_ROW, Output, Outputs, Sequence
from .rows import Int64, Rows1D
from .running import Running
from .unfinished import Unfinished
from .waiting import Waiting

Details = dict[Sequence, Output]


Sampled = tuple[Rows1D, Int32]
"""What a step has sampled, in the order of its result: rows, and token ids."""


class Results:
    """generated: tokens that were committed."""

    def __init__(self, vocab_size: int, running: Running, waiting: Waiting, unfinished: Unfinished) -> None:
        self.generated = 0
        self._vocab_size = vocab_size
        self._running = running
        self._waiting = waiting
        self._unfinished = unfinished

    def read(self, flight: Flight, result: StepResult) -> Sampled:
        """One id per sampling row; a row that reports a fault has one too, of any value. Changes nothing.

        Raises ProtocolError for a result that does not fit the plan.
        """
        rows = flight.sampling_rows
        tokens, ids = unpack(result.tokens), unpack_unsigned(result.tokens)
        if tokens.size != rows.size:
            raise ProtocolError(f"step {result.step}: {tokens.size} tokens for {rows.size} rows that sample")
        if not ids.size or ids.item(ids.argmax()) < self._vocab_size:
            return rows, tokens
        outside = (ids >= self._vocab_size).nonzero()[0]
        if not {fault.row for fault in result.faults}.issuperset(rows[outside].tolist()):
            raise ProtocolError(f"step {result.step}: sampled ids outside [0, {self._vocab_size})")
        return rows, tokens

    def commit(self, flight: Flight, result: StepResult, sampled: Sampled, outputs: Outputs, now: float) -> None:
        """Everybody gets what `read` gave, but for those who have ended meanwhile. Adds to `outputs`."""
        rows, tokens = sampled
        for fault in result.faults:
            self._fail_row(flight, fault, outputs, now)
        details = self._details(flight, result.logprobs) if result.logprobs else {}
        at = flight.at if flight.sampling is None else rows
        if flight.stops != self._running.stops:
            live = (self._running.rows.admission == flight.taken)[at]
            if not all_of(live):
                gone = rows[~live]
                flight.sampled[gone] = 0
                self._commit_parked(flight.taken[gone], tokens[~live], outputs, details, now)
                at = rows = rows[live]
                tokens = tokens[live]
        if rows.size:
            self._commit(rows, at, flight.sampled, tokens, outputs, details, now)
        outputs.others += details.values()

    def owners(self, flight: Flight) -> dict[int, Sequence]:
        """Whose the rows of the step are; rows whose sequence has ended are left out."""
        arrays, parked = self._running.rows, self._running.parked
        owners: dict[int, Sequence] = {}
        for row, admission in zip(flight.rows.tolist(), flight.admissions.tolist(), strict=True):
            sequence = arrays.owner[row] if arrays.admission[row] == admission else parked.get(admission)
            if sequence is not None:
                owners[row] = sequence
        return owners

    def _commit(
        self,
        rows: Rows1D,
        at: Rows1D | slice,
        sampled: Int64,
        tokens: Int32,
        outputs: Outputs,
        details: Details,
        now: float,
    ) -> None:
        """The hot path: vectors for everybody, Python only for rows that end or carry details."""
        arrays = self._running.rows
        arrays.commit(at, sampled, tokens)
        self._running.publish_decoded(rows, at)
        self.generated += rows.size
        sequences: list[Sequence] = arrays.owner[at].tolist()
        packed = bytearray(tokens.tobytes())
        special = range(rows.size) if details else self._ending(at, tokens)
        apart: list[Output] = []
        for i in reversed(special):
            sequence = sequences[i]
            output = self._settle(sequence, tokens.item(i), self._running.length(sequence), details, now)
            if output is not None:
                apart.append(output)
                del sequences[i]
                del packed[4 * i : 4 * i + 4]
        outputs.others += reversed(apart)
        outputs.sequences, outputs.packed = sequences, bytes(packed)

    def _ending(self, at: Rows1D | slice, tokens: Int32) -> list[int]:
        """Which of the rows, whose tokens these are, may end by them."""
        arrays, stop_ids = self._running.rows, self._unfinished.stop_ids
        full = arrays.known >= arrays.limit
        if stop_ids.counts:
            ending = full[at] | stop_ids.mask.take(tokens)
        elif any_of(full):
            ending = full[at]
        else:
            return []
        indices: list[int] = ending.nonzero()[0].tolist()
        return indices

    def _commit_parked(self, admissions: Int64, tokens: Int32, outputs: Outputs, details: Details, now: float) -> None:
        """Tokens of rows that are no longer: those of preempted sequences count, the rest is discarded."""
        for admission, token in zip(admissions.tolist(), tokens.tolist(), strict=True):
            sequence = self._running.parked.get(admission)
            if sequence is None:
                continue
            self._waiting.extend(sequence, pack([token]))
            self._running.ledger.owe(sequence.lane, 1)
            self._running.tally.late_token(sequence.request.tenant)
            self.generated += 1
            sequence.request.failures = 0
            sequence.in_flight -= 1
            if not sequence.in_flight:
                del self._running.parked[admission]
            output = self._settle(sequence, token, sequence.known, details, now)
            outputs.others.append(output or Output(sequence, token))

    def _settle(self, sequence: Sequence, token: int, length: int, details: Details, now: float) -> Output | None:
        """Ends the sequence if this token does; None when there is nothing to say but the token."""
        output = details.pop(sequence, None)
        request = sequence.request
        if token in request.stop_ids and length >= request.floor:
            output = self._unfinished.end(output or Output(sequence), "stop", now)
            output.stop_token = token
        elif length >= request.limit:
            output = self._unfinished.end(output or Output(sequence), "length", now)
        if output is not None:
            output.tokens.append(token)
        return output

    def _details(self, flight: Flight, logprobs: list[TokenLogprobs]) -> Details:
        """Log-probabilities by the sequence they belong to; prompt positions that were delivered before are dropped."""
        owners = self.owners(flight)
        details: Details = {}
        for item in logprobs:
            sequence = owners.get(item.row)
            if sequence is None:
                continue
            output = details.get(sequence) or Output(sequence)
            if item.position >= sequence.request.prompt_len:
                output.logprobs.append(item)
            elif item.position > sequence.prompt_logprobs_to:
                output.prompt_logprobs.append(item)
                sequence.prompt_logprobs_to = item.position
            else:
                continue
            details[sequence] = output
        return details

    def _fail_row(self, flight: Flight, fault: RowFault, outputs: Outputs, now: float) -> None:
        sequence = self.owners(flight).get(fault.row)
        if sequence is None:
            return
        if sequence.row != NO_ROW:
            self._running.withdraw(sequence.row)
        failed = Output(sequence, error_code=fault.code, error=fault.message)
        outputs.others.append(self._unfinished.end(failed, "error", now))
