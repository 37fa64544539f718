"""Which sessions compute in the next step, and which give way when KV memory runs out (docs/decisions/0005).

A session takes slots as it grows. When there are none left, the youngest sessions are preempted: their slots go back,
and their tokens are computed again, like a prompt, once there is room. The oldest that computes is never preempted, so
there is always progress. Sessions that cannot begin wait, first come first served.

While others decode, prompts that a step has time for are read in the same pass. Longer ones are read in *pieces* on
the side, a few layers after each step: a long context costs too much for even a few rows of it to fit one step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from easyspec.engine.device_thread import Task
from easyspec.engine.prefill_pace import MIN_PROMPT_ROWS, PrefillPace
from easyspec.engine.prompt_shares import served_readers, share_out
from easyspec.engine.room import make_room
from easyspec.errors import CapacityError
from easyspec.model.kv_cache import KvMemory, SessionSlots
from easyspec.speculation.token_tree import TokenTree
from verifier_service.patience import Patience, Returning

# Who had a verdict so recently will soon come with the next tree, and would wait for a long step.
_DECODING_WITHIN_NS = 1_000_000_000
# A session without a tree for so long gives way to any other: a client that reads slowly keeps no session out.
_STALLED_AFTER_NS = 5_000_000_000
_REFUSED_FOR_NS = 100_000_000


@dataclass(frozen=True)
class SchedulerLimits:
    """Rows of a step, slots of a tree, sessions that may wait, and how far prompts may slow others' decoding down.

    `reads_on_the_side` says whether passes can be computed in slices.
    """

    max_batch_rows: int
    prefill_chunk: int
    max_tree_nodes: int
    max_waiting_sessions: int
    retry_after_s: float
    max_prefill_slowdown: float
    reads_on_the_side: bool = True


class ScheduledSession:
    """What the scheduler knows of a session: its tokens, their slots, and the tree it waits for.

    `takes_prefixes` is False for one whose prompt must be computed whatever is cached. `is_admitted` says whether it
    may hold slots. Ids grow with age: the lower, the older. `num_hit_tokens` were there already when they were needed.
    """

    def __init__(self, session_id: int, token_ids: list[int], slots: SessionSlots, *, takes_prefixes: bool) -> None:
        self.session_id = session_id
        self.token_ids = token_ids
        self.slots = slots
        self.takes_prefixes = takes_prefixes
        self.tree: TokenTree | None = None  # waits for a verdict
        self.tree_slots: list[int] = []
        self.is_admitted = False
        self.is_in_piece = False
        self.is_sound = True
        self.has_been_preempted = False
        self.last_verdict_ns: int | None = None
        self.turnaround_ns: float | None = None
        self.last_seen_ns = 0
        self.num_hit_tokens = 0

    @property
    def num_uncached(self) -> int:
        """Committed tokens without K and V; 1 (the root) once the prompt is prefilled."""
        return len(self.token_ids) - self.slots.num_cached


SessionT = TypeVar("SessionT", bound=ScheduledSession)


@dataclass(slots=True)  # not frozen: one a session and step
class Work(Generic[SessionT]):
    """A session's part of a step: its next tokens, whose `slots` it has got, and the tree behind the last of them.

    Without a tree it is a piece of a prompt.
    """

    session: SessionT
    slots: Sequence[int]
    tree: TokenTree | None


@dataclass(slots=True)  # not frozen: one a session and step
class _Share(Generic[SessionT]):
    """What a session is to compute: of a step, or of the piece on the side."""

    session: SessionT
    num_tokens: int
    tree: TokenTree | None
    is_on_the_side: bool = False

    @property
    def num_rows(self) -> int:
        return self.num_tokens + (len(self.tree) if self.tree is not None else 0)


@dataclass(frozen=True)
class _Opening(Generic[SessionT]):
    session: SessionT
    task: Task[int]


@dataclass(frozen=True)
class _Refusal:
    """Who did not get in, when, and how many slots were there: to look for its prefix takes as long as it is."""

    session_id: int
    num_available: int
    at_ns: int

    def stands(self, session_id: int, num_available: int, now_ns: int) -> bool:
        """Whether the answer is still the same: no slots have come, and others' prefixes hardly."""
        is_recent = now_ns - self.at_ns < _REFUSED_FOR_NS
        return is_recent and session_id == self.session_id and num_available <= self.num_available


_NO_REFUSAL = _Refusal(0, 0, -_REFUSED_FOR_NS)


class Scheduler(Generic[SessionT]):
    """Sessions from opening to closing. Runs on the device thread; `clock` counts nanoseconds."""

    def __init__(self, memory: KvMemory, limits: SchedulerLimits, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._memory = memory
        self._limits = limits
        self._clock = clock
        self._patience = Patience()
        self._pace = PrefillPace(limits.max_prefill_slowdown, limits.prefill_chunk)
        self._openings: deque[_Opening[SessionT]] = deque()
        self._sessions: dict[int, SessionT] = {}  # open ones, in the order of their age
        self._waiting: dict[int, SessionT] = {}  # for a verdict, by id, least recently served first
        self._refusal = _NO_REFUSAL
        self.piece: list[Work[SessionT]] | None = None
        self._num_step_rows = 0  # of the sessions that decode in the present step
        self._has_read_prompts = False

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    def get(self, session_id: int) -> SessionT | None:
        """An open session."""
        return self._sessions.get(session_id)

    def open(self, session: SessionT, task: Task[int]) -> None:
        """Let a session in, now or as soon as there is room; raises CapacityError if too many wait already.

        `task` is answered with the session's id when it is in; a session whose task is cancelled is forgotten.
        """
        self._openings = deque(opening for opening in self._openings if not opening.task.future.cancelled())
        self._openings.append(_Opening(session, task))
        self._admit()
        if len(self._openings) > self._limits.max_waiting_sessions:
            self._openings.pop()
            raise CapacityError(
                f"KV memory is full: {self._memory.num_available} of {self._memory.num_slots} token slots free, "
                f"{len(self._openings)} sessions waiting for some",
                self._limits.retry_after_s,
            )

    def submit(self, session: SessionT, tree: TokenTree, arrived_ns: int | None = None) -> None:
        """The session waits for a verdict on `tree`, which came at `arrived_ns` (now, if unset)."""
        session.tree = tree
        session.last_seen_ns = self._clock()
        self._patience.came_back(session, session.last_seen_ns if arrived_ns is None else arrived_ns)
        self._waiting[session.session_id] = session

    def close(self, session_id: int) -> None:
        """Forget a session; what it has computed stays as a prefix for others. Idempotent.

        What others read in the same piece is not lost: its slots go back when the piece is done.
        """
        session = self._sessions.pop(session_id, None)
        if session is None:
            return
        self._waiting.pop(session_id, None)
        # Slots that a piece still writes to are freed when it is done.
        if not session.is_in_piece:
            self._free(session)
        elif not any(work.session.session_id in self._sessions for work in self.piece or ()):
            self.drop_piece()

    def _free(self, session: SessionT) -> None:
        self._memory.free(session.tree_slots)
        session.tree_slots = []
        if session.is_sound:  # K and V of a broken step must not become a prefix
            session.slots.share(session.token_ids)
        session.slots.release()

    def fail(self, session: SessionT) -> None:
        """The session's part of a step cannot be computed: it waits for nothing, and shares nothing any more."""
        session.is_sound = False
        session.tree = None
        self._waiting.pop(session.session_id, None)

    def abandon(self) -> list[SessionT]:
        """A step broke: no session waits any more. Returns the sessions that did; their K and V may be half written."""
        abandoned = [*self._waiting.values()]
        piece, self.piece = self.piece, None
        for session in abandoned:
            self.fail(session)
        for work in piece or ():
            work.session.is_in_piece = work.session.is_sound = False
            if work.session.session_id not in self._sessions:
                self._free(work.session)
        return abandoned

    def fail_openings(self, error: BaseException) -> None:
        """Fail every session that waits to be let in."""
        while self._openings:
            self._openings.popleft().task.fail(error)

    def patience_s(self) -> float:
        """How long the next step should wait for sessions that are about to come back."""
        if self.piece is not None or not self._waiting:
            return 0.0
        absent = (session for session in self._sessions.values() if session.tree is None)
        return self._patience.wait_ns(absent, self._clock(), self._is_absent) / 1e9

    def _is_absent(self, session: Returning) -> bool:
        assert isinstance(session, ScheduledSession), "one of ours"
        return session.tree is None and session.session_id in self._sessions

    def plan(self) -> list[Work[SessionT]]:
        """Who computes what next; they have got the slots for it. All are to be given to `computed`.

        May also make a new `piece`.
        """
        self._admit()
        ready = [session for session in self._waiting.values() if session.is_admitted and not session.is_in_piece]
        for session in ready:
            num_tokens = self._take_prefix(session)
            if not session.has_been_preempted:  # else it meets what it has computed itself
                self._memory.num_hit_tokens += num_tokens
                session.num_hit_tokens += num_tokens
        prefilling = [session for session in ready if session.num_uncached > 1]
        num_left = self._limits.max_batch_rows - (MIN_PROMPT_ROWS if prefilling else 0)
        shares: list[_Share[SessionT]] = []
        for session in ready:
            if session.num_uncached > 1:
                continue
            assert session.tree is not None, "it waits for a verdict"
            if shares and 1 + len(session.tree) > num_left:
                break  # not continue: small trees would overtake a large one for ever
            num_left -= 1 + len(session.tree)
            shares.append(_Share(session, 1, session.tree))
        self._num_step_rows = sum(1 + len(share.tree or ()) for share in shares)
        prompts = self._prompts(prefilling, num_left)
        self._has_read_prompts = not all(share.is_on_the_side for share in prompts)
        shares += prompts
        works: list[Work[SessionT]] = []
        piece: list[Work[SessionT]] = []
        # Oldest first: a younger session that must give way has then no part in this step yet.
        for share in sorted(shares, key=lambda share: share.session.session_id):
            work = self._with_slots(share)
            if work is not None:
                share.session.is_in_piece = share.is_on_the_side
                (piece if share.is_on_the_side else works).append(work)
        if piece:
            self.piece = piece
        return works

    def _prompts(self, prefilling: Sequence[SessionT], num_left: int) -> list[_Share[SessionT]]:
        """What is read of prompts: in the step, and on the side if nothing is being read there."""
        if not prefilling:
            return []
        num_rows = self._limits.max_batch_rows - MIN_PROMPT_ROWS - num_left
        is_anyone_decoding = self._is_anyone_decoding()
        pace = self._pace.num_prompt_rows(num_rows, is_anyone_decoding=is_anyone_decoding)
        most = min(pace, num_left + MIN_PROMPT_ROWS)
        if not is_anyone_decoding or not self._limits.reads_on_the_side:
            return self._fair_shares(prefilling, most)
        # A session whose prompt rows are read for log-probabilities keeps its place in the step.
        short = [session for session in prefilling if session.num_uncached <= pace or not session.takes_prefixes]
        long = [session for session in prefilling if session not in short]
        shares = self._fair_shares(short, most) if short else []
        if long and self.piece is None:
            shares += self._fair_shares(long, self._pace.num_sliced_rows(), is_on_the_side=True)
        return shares

    def computed(self, works: Sequence[Work[SessionT]], elapsed_ns: int) -> None:
        """A step is over: prompts read become prefixes for others, and the clock tells what rows cost."""
        num_prompt_rows = num_decode_rows = 0
        now = self._clock()
        for work in works:
            session, num_tokens = work.session, len(work.slots)
            if num_tokens > 1:
                num_prompt_rows += num_tokens
                session.slots.share(session.token_ids)
            if work.tree is not None:
                num_decode_rows += len(work.tree) + (num_tokens == 1)
                session.tree = None
                session.last_verdict_ns = now
            # To the end of the queue, if it has more to read: others were waiting longer.
            del self._waiting[session.session_id]
            if work.tree is None:
                self._waiting[session.session_id] = session
        self._patience.stepped(elapsed_ns)
        if self.piece is None:  # reading on the side slows steps down: what it does must not become its measure
            self._pace.observe(num_decode_rows, num_prompt_rows, elapsed_ns)

    def slice_ns(self) -> float | None:
        """How long the piece may be worked on after this step; None is without limit."""
        if not self._is_anyone_decoding():
            return None
        return 0.0 if self._has_read_prompts else self._pace.slice_ns(self._num_step_rows)

    def piece_advanced(self, num_layers: int, elapsed_ns: int, *, is_computed: bool) -> None:
        """Layers of the piece have been computed; the last ones make prefixes of it."""
        assert self.piece is not None, "there is a piece"
        self._pace.observe_layers(sum(len(work.slots) for work in self.piece), num_layers, elapsed_ns)
        if not is_computed:
            return
        for work in self.piece:
            session = work.session
            session.is_in_piece = False
            if session.session_id not in self._sessions:
                self._free(session)
                continue
            session.slots.share(session.token_ids)
            del self._waiting[session.session_id]
            self._waiting[session.session_id] = session
        self.piece = None

    def drop_piece(self) -> None:
        """What its sessions have begun is begun again, if they are still there."""
        piece, self.piece = self.piece, None
        for work in piece or ():
            work.session.is_in_piece = False
            work.session.slots.truncate(work.session.slots.num_cached - len(work.slots))
            if work.session.session_id not in self._sessions:
                self._free(work.session)

    @property
    def is_anyone_waiting(self) -> bool:
        return bool(self._waiting)

    def _admit(self) -> None:
        """Let in sessions that have room: first the preempted, oldest first, then newcomers in order."""
        outside = [session for session in self._waiting.values() if not session.is_admitted]
        for session in sorted(outside, key=lambda session: session.session_id):
            if not self._try_to_admit(session):
                return  # no younger one overtakes it
        while self._openings:
            opening = self._openings[0]
            if not opening.task.future.cancelled() and not self._try_to_admit(opening.session):
                return
            self._openings.popleft()
            self._enter(opening)

    def _enter(self, opening: _Opening[SessionT]) -> None:
        session = opening.session
        session.last_seen_ns = self._clock()
        self._sessions[session.session_id] = session
        num_hit_tokens = session.slots.num_cached
        if not opening.task.finish(session.session_id):
            self.close(session.session_id)
            return
        self._memory.num_query_tokens += len(session.token_ids) - 1
        self._memory.num_hit_tokens += num_hit_tokens
        session.num_hit_tokens = num_hit_tokens

    def _try_to_admit(self, session: SessionT) -> bool:
        """Whether there is room for all that the session has to compute, a tree, and some growth."""
        num_available, now_ns = self._memory.num_available, self._clock()
        if self._refusal.stands(session.session_id, num_available, now_ns):
            return False
        self._take_prefix(session)
        wanted = session.num_uncached + self._limits.max_tree_nodes + MIN_PROMPT_ROWS
        is_oldest = not any(other.is_admitted for other in self._sessions.values() if other is not session)
        session.is_admitted = self._make_room(wanted, session) or is_oldest
        if not session.is_admitted:
            session.slots.release()
            self._refusal = _Refusal(session.session_id, num_available, now_ns)
        return session.is_admitted

    def _take_prefix(self, session: SessionT) -> int:
        """How many tokens were there already. The last one is left out: its row is the root of the tree."""
        if not session.takes_prefixes or session.num_uncached == 1:
            return 0
        return session.slots.take_prefix(session.token_ids, len(session.token_ids) - 1)

    def _is_anyone_decoding(self) -> bool:
        since = self._clock() - _DECODING_WITHIN_NS
        return any(
            session.last_verdict_ns is not None and session.last_verdict_ns > since
            for session in self._sessions.values()
        )

    def _fair_shares(
        self, prefilling: Sequence[SessionT], num_rows: int, *, is_on_the_side: bool = False
    ) -> list[_Share[SessionT]]:
        """Give rows to the prompts that waited longest, equal shares; what short prompts leave goes to long ones."""
        shares: list[_Share[SessionT]] = []

        def give(session: SessionT, num_tokens: int) -> int:
            assert session.tree is not None, "it waits for a verdict"
            tree = session.tree if num_tokens == session.num_uncached else None
            num_left = num_rows - sum(share.num_rows for share in shares)
            if tree is not None and (is_on_the_side or num_tokens + len(tree) > num_left):
                num_tokens, tree = num_tokens - 1, None  # the root comes with its tree, in a later step
            if num_tokens == 0:
                return 0
            shares.append(_Share(session, num_tokens, tree, is_on_the_side))
            return shares[-1].num_rows

        share_out(served_readers(prefilling, self._memory, num_rows), num_rows, _num_uncached, give)
        return shares

    def _with_slots(self, share: _Share[SessionT]) -> Work[SessionT] | None:
        """Take the slots, preempting younger sessions; None if there are too few. Called for the oldest first."""
        session, tree = share.session, share.tree
        num_nodes = len(tree) if tree is not None else 0
        if not session.is_admitted or not self._make_room(share.num_tokens + num_nodes, session):
            return None
        slots = session.slots.extend(share.num_tokens)
        session.tree_slots = self._memory.allocate(num_nodes)
        return Work(session, slots, tree)

    def _make_room(self, num_slots: int, session: SessionT) -> bool:
        return make_room(self._memory, num_slots, self._victims(session), self._preempt)

    def _victims(self, session: SessionT) -> Iterator[SessionT]:
        """The sessions that give way to one: first the stalled ones, then the younger ones, the youngest first."""
        stalled_since = self._clock() - _STALLED_AFTER_NS
        others = [other for other in self._sessions.values() if other is not session and other.is_admitted]
        stalled = [other for other in others if other.tree is None and other.last_seen_ns < stalled_since]
        younger = [other for other in reversed(others) if other.session_id > session.session_id]
        yield from dict.fromkeys([*stalled, *younger])

    def _preempt(self, victim: SessionT) -> None:
        """Take a session's slots; while no session needs them, they keep what it had computed."""
        assert not victim.tree_slots, "it has no part in this step"
        if victim.is_in_piece:
            self.drop_piece()
        victim.slots.share(victim.token_ids)
        victim.slots.release()
        victim.is_admitted = False
        victim.has_been_preempted = True
        self._memory.num_preemptions += 1


def _num_uncached(session: ScheduledSession) -> int:
    return session.num_uncached
