"""A raw source as a row of sequences: its lanes, dealt out in turns.

Invariant: the sequences and their order are a function of the source, the seed and the config,
never of the machine. Turn by turn each lane gives its next sequence. A lane whose pass has ended is
left out until all lanes have ended it; then the next pass begins, in another order. A rank reads
the lanes that it owns and tells the others how many sequences these have ready, so that all ranks
deal alike.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any, NamedTuple

from dist_lm.arithmetic import ceil_div
from dist_lm.data.lane import Lane, Status, StreamSpec
from dist_lm.data.order import Ints
from dist_lm.data.packing import PackedSequence
from dist_lm.data.provenance import StreamedSequence
from dist_lm.data.rows import StepRows
from dist_lm.errors import CheckpointError, DataError, UserError, error_with_code

START: dict[str, Any] = {"pass": 0, "turn": 0, "done": [], "lanes": {}}


class Dealt(NamedTuple):
    """A turn of a lane."""

    lane: int
    sequence: PackedSequence | None  # None: another rank reads the lane


class Stream:
    """The lanes of a source. All ranks hold one and deal alike; each reads the lanes it owns.

    Its state is the pass, whose turn it is, the lanes that have ended the pass, and all cursors.
    """

    def __init__(
        self,
        spec: StreamSpec,
        state: dict[str, Any] | None = None,
        *,
        rank: int = 0,
        world: int = 1,
        gather: Callable[[Any], list[Any]] = lambda value: [value],
        pool: Executor | None = None,
        shift: int = 0,
    ):
        begin = state or START
        self.spec = spec
        self.passed: int = begin["pass"]  # passes that have ended
        self._turn: int = begin["turn"]  # the lane whose turn it is, if it has not ended the pass
        self._done: set[int] = set(begin["done"])  # lanes that have ended the pass
        if any(cursor["pass"] > self.passed + 1 for cursor in begin["lanes"].values()):
            raise CheckpointError(
                f"a lane of {spec.name} is passes ahead of the others; rule: a state.json that"
                " train wrote"
            )
        if spec.passes is not None and self.passed > spec.passes:
            raise CheckpointError(
                f"{spec.name} has made {self.passed} passes of {spec.passes}; rule: a state.json"
                " that train wrote"
            )
        self._world = world
        self._shift = shift
        self._gather = gather
        self._pool = pool
        self._lanes: dict[int, Lane] = {}  # those that this rank reads
        for number in range(spec.lanes):
            if self.owner(number) == rank:
                self._lanes[number] = Lane(spec, number, begin["lanes"].get(str(number)))
        self._forget()
        if state:  # an earlier run has seen documents
            self._is_empty = False

    def owner(self, lane: int) -> int:
        """The rank that reads a lane; `shift` lays the sources' first lanes on different ranks."""
        return (lane + self._shift) % self._world

    def snapshot(self) -> dict[str, Any]:
        """The state of the stream, with the cursors of this rank's lanes."""
        return {
            "pass": self.passed,
            "turn": self._turn,
            "done": sorted(self._done),
            "lanes": {str(number): lane.cursor for number, lane in self._lanes.items()},
        }

    def passes(self, given: int) -> float:
        """Passes that have ended."""
        return self.passed

    def fill(self, rows: StepRows, places: Ints, turns: Ints) -> int:
        """Deal sequences to places of the global batch. Returns their number. All ranks."""
        dealt = self.deal(len(places))
        for place, (lane, sequence) in zip(places.tolist(), dealt, strict=False):
            rows.move(place, self.owner(lane), sequence)
            if sequence is not None:
                name = self.spec.name
                rows.origins[place] = StreamedSequence(name, self.spec.reader, sequence)
        return len(dealt)

    def deal(self, count: int) -> list[Dealt]:
        """The next `count` sequences; fewer at the end of the last pass. All ranks."""
        dealt: list[Dealt] = []
        while len(dealt) < count and self.passed != self.spec.passes:
            waiting = [n for n in range(self.spec.lanes) if n not in self._done]
            if not waiting:
                self._begin_next_pass()
                continue
            lane = next((n for n in waiting if n >= self._turn), waiting[0])
            if self._ready[lane]:
                self._ready[lane] -= 1
                self._turn = lane + 1
                dealt.append(Dealt(lane, self._take(lane)))
            elif lane in self._ended:
                self._done.add(lane)
            else:
                missing = count - len(dealt)
                self._read(waiting, ceil_div(missing, len(waiting)))
        self._read_ahead(2 * count)
        return dealt

    def _take(self, lane: int) -> PackedSequence | None:
        return self._lanes[lane].take() if lane in self._lanes else None

    def _read_ahead(self, most: int) -> None:
        """Let this rank's lanes read on in the background, up to `most` sequences each."""
        if self._pool is None:
            return
        for lane in self._lanes.values():
            if len(lane.ready) < most:
                self._pool.submit(lane.read_ahead, most)

    def _begin_next_pass(self) -> None:
        # Where there is a document, it ends up in a sequence, if only after many passes. Without
        # any, passes would follow each other forever.
        if self._is_empty:
            source = self.spec.reader.spec.title
            raise DataError(f"{source}: no document to train on; rule: at least one")
        self.passed += 1
        self._turn = 0
        self._done = set()
        self._forget()

    def _forget(self) -> None:
        """Forget what the lanes had ready. The next pass begins."""
        self._ready = [0] * self.spec.lanes  # sequences of the pass that each lane has ready
        self._ended: set[int] = set()  # lanes of which no more than that will come
        self._is_empty = True  # no lane has found a document

    def _read(self, lanes: Sequence[int], wanted: int) -> None:
        """Read on, and exchange how many sequences of this pass the lanes have ready. All ranks."""
        statuses: dict[int, Status] = {}
        refusal = None
        try:
            statuses = self._fill([n for n in lanes if n in self._lanes], wanted)
        except UserError as error:
            refusal = [str(error), error.code]
        answer = [refusal, [[number, *status] for number, status in statuses.items()]]
        for rank, (refused, told) in enumerate(self._gather(answer)):
            if refused:
                message, code = refused
                where = "" if self._world == 1 else f"rank {rank}: "
                raise error_with_code(f"{where}{message}", code)
            for number, ready, has_ended, is_empty in told:
                self._ready[number] = ready
                if has_ended:
                    self._ended.add(number)
                self._is_empty &= is_empty

    def _fill(self, numbers: list[int], wanted: int) -> dict[int, Status]:
        """Fill lanes of this rank, several at once where there are threads for it."""
        each: Any = self._pool.map if self._pool else map
        statuses = each(lambda number: self._lanes[number].fill(self.passed, wanted), numbers)
        return dict(zip(numbers, statuses, strict=True))
