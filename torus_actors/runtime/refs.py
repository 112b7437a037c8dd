"""Object refs: the future answer of a call, and Ray's ``get`` and ``wait`` over them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import pykka

from torus_actors.errors import Closed, DeadlineExceeded
from torus_actors.runtime.messages import Reply

if TYPE_CHECKING:
    from types import TracebackType

    from torus_actors.runtime.system import ActorSystem

T = TypeVar("T")
ExcInfo = tuple[type[BaseException] | None, BaseException | None, "TracebackType | None"]


class ObjectRef(pykka.Future[T]):
    """The answer to one call, now or later.

    Await it on the event loop, or ``get()`` it from another thread. Setting it is safe from every
    thread; the first answer wins and later ones are dropped, because a deadline, a lost peer and
    the real answer may race. A task that is cancelled while it awaits the ref gives the call up;
    ``wait``, and ``get`` with a timeout, leave it be.

    Attributes:
        future: the asyncio future behind it; touch it on the loop's thread only.
        deadline: loop time in seconds when the call is given up, or None.
    """

    def __init__(self, system: ActorSystem, deadline: float | None = None) -> None:
        super().__init__()
        self.system = system
        self.future: asyncio.Future[T] = system.loop.create_future()
        self.deadline = deadline
        if deadline is not None:
            system.deadlines.watch(self)

    def __await__(self) -> Generator[Any, None, T]:
        return self.future.__await__()

    def done(self) -> bool:
        """Whether an answer or an error is there."""
        return self.future.done()

    def set(self, value: Any | None = None) -> None:
        """Answer the call; any thread."""
        system = self.system
        if threading.get_ident() == system.thread_id:
            self._resolve(value)
        else:
            system.on_loop(self._resolve, value)

    def set_exception(self, exc_info: ExcInfo | None = None) -> None:
        """Fail the call with an exception triple, or the one being handled; any thread."""
        error = (exc_info or sys.exc_info())[1]
        self.fail(error if error is not None else RuntimeError("no exception to set"))

    def fail(self, error: BaseException) -> None:
        """Fail the call; any thread."""
        system = self.system
        if threading.get_ident() == system.thread_id:
            self._reject(error)
        else:
            system.on_loop(self._reject, error)

    def _resolve(self, value: Any) -> None:
        future = self.future
        if not future.done():
            future.set_result(value)
            if self.deadline is not None:
                self.system.deadlines.forget(self)

    def _reject(self, error: BaseException) -> None:
        future = self.future
        if not future.done():
            future.set_exception(error)
            # A caller may drop the ref (it asked several peers and one was enough): an error that
            # nobody fetches is then no defect, and asyncio must not print one.
            future._log_traceback = False
            if self.deadline is not None:
                self.system.deadlines.forget(self)

    def add_done_callback(self, callback: Callable[[asyncio.Future[T]], object]) -> None:
        """Run ``callback(future)`` on the loop once the answer is there."""
        self.future.add_done_callback(callback)

    def get(self, *, timeout: float | None = None) -> Any:
        """Block another thread until the answer is there.

        Raises:
            DeadlineExceeded: nothing within ``timeout`` seconds.
            RuntimeError: called on the event loop, which would wait for itself.
        """
        if threading.get_ident() == self.system.thread_id:
            if self.future.done():
                return self.future.result()
            raise RuntimeError("ObjectRef.get() on the event loop: await it instead")
        # No task stands between thread and ref: none is left behind, and the call goes on, if the
        # thread gives up.
        done: concurrent.futures.Future[asyncio.Future[T]] = concurrent.futures.Future()
        self.system.loop.call_soon_threadsafe(self.future.add_done_callback, done.set_result)
        try:
            answered = done.result(timeout)
        except TimeoutError:
            raise DeadlineExceeded(f"no answer within {timeout} s") from None
        if answered.cancelled():
            raise Closed("the call was given up")
        return answered.result()


class RoundtripRef(ObjectRef[Any]):
    """An ObjectRef of the test mode, in which answers too must be able to travel."""

    def _resolve(self, value: Any) -> None:
        roundtrip = self.system.roundtrip
        assert roundtrip is not None
        try:
            if isinstance(value, Reply):
                value = Reply(roundtrip(value.result), value.payload)
            else:
                value = roundtrip(value)
        except Exception as error:
            self._reject(error)
        else:
            super()._resolve(value)


async def get(refs: Any, timeout: float | None = None) -> Any:
    """Wait for one ref or all of a list.

    Args:
        refs: an ObjectRef, or a sequence of them.
        timeout: seconds, None for each call's own deadline.

    Returns:
        The answer, or the list of answers in the order of the refs.

    Raises:
        DeadlineExceeded: not all answered in time.
        TorusError: the first error among the answers.
    """
    single = isinstance(refs, ObjectRef)
    futures = [refs.future] if single else [ref.future for ref in refs]
    if timeout is not None:
        _done, pending = await asyncio.wait(futures, timeout=timeout) if futures else ((), ())
        if pending:
            raise DeadlineExceeded(
                f"{len(pending)} of {len(futures)} without answer in {timeout} s"
            )
    results = [await future for future in futures]
    return results[0] if single else results


async def wait(
    refs: Sequence[ObjectRef[Any]], num_returns: int = 1, timeout: float | None = None
) -> tuple[list[ObjectRef[Any]], list[ObjectRef[Any]]]:
    """Wait until ``num_returns`` refs are answered or failed, or ``timeout`` seconds passed.

    Returns:
        The answered refs and the pending ones, each in the order given.
    """
    loop = asyncio.get_running_loop()
    end = None if timeout is None else loop.time() + timeout
    if timeout is not None and timeout <= 0:
        await asyncio.sleep(0)  # who polls must not keep the answers from coming
    while True:
        pending = [ref for ref in refs if not ref.done()]
        ready_count = len(refs) - len(pending)
        left = None if end is None else end - loop.time()
        if ready_count >= min(num_returns, len(refs)) or (left is not None and left <= 0):
            return [ref for ref in refs if ref.done()], pending
        await asyncio.wait(
            [ref.future for ref in pending], timeout=left, return_when=asyncio.FIRST_COMPLETED
        )


class Deadlines:
    """Fails calls whose deadline passed.

    One sweep over the calls in flight every ``TICK_S`` instead of a timer a call: in flight calls
    are few (windows bound them), calls are many.
    """

    TICK_S = 0.05

    def __init__(self, loop: asyncio.AbstractEventLoop, thread_id: int) -> None:
        self._loop = loop
        self._thread_id = thread_id
        self._pending: dict[ObjectRef[Any], None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, ref: ObjectRef[Any]) -> None:
        """Start watching a ref that has a deadline; any thread."""
        if threading.get_ident() != self._thread_id:
            self._loop.call_soon_threadsafe(self._watch_late, ref)
            return
        self._pending[ref] = None
        if self._timer is None:
            self._timer = self._loop.call_later(self.TICK_S, self._sweep)

    def _watch_late(self, ref: ObjectRef[Any]) -> None:
        if not ref.future.done():
            self.watch(ref)

    def forget(self, ref: ObjectRef[Any]) -> None:
        """The ref was answered."""
        self._pending.pop(ref, None)

    def _sweep(self) -> None:
        now = self._loop.time()
        # A dict, not a set: refs fail in the order they were made, whatever their hashes are.
        late = [r for r in self._pending if r.deadline is not None and r.deadline <= now]
        for ref in late:
            ref.fail(DeadlineExceeded("no answer before the deadline"))
        gone = [ref for ref in self._pending if ref.future.done()]  # cancelled by their waiters
        for ref in gone:
            self._pending.pop(ref, None)
        self._timer = self._loop.call_later(self.TICK_S, self._sweep) if self._pending else None

    def close(self) -> None:
        """Stop sweeping and fail what still waits: no sweep will ever do it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for ref in list(self._pending):
            ref.fail(Closed("the actor system has stopped"))
        self._pending.clear()
