"""Rules of the demo's queue, by which a request is run only while its page waits for the answer."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

from gemma_scope_tl.demo.world import wanted

WAITING = 64
"""Maximum number of waiting requests."""
WAITING_OF_A_PAGE = 8
"""Maximum number of waiting requests of one page."""
SECONDS = 10.0
"""Time for which a request is kept without a stream of answers, which its page opens after sending the request."""


class QueueRules:
    """Replaces two methods of a Gradio queue by methods with the rules of this module.

    A request whose page has no open stream of answers is not run, or its run is ended. It is removed after
    :data:`SECONDS`, or earlier if the queue is full and another request arrives. Abandoned requests therefore take
    neither the model's time nor space in the queue.

    Args:
        queue: queue of a ``Blocks`` that is not yet served.
    """

    def __init__(self, queue: Any) -> None:
        self.queue = queue
        self.listening: Counter[str] = Counter()
        self._streams: set[asyncio.Future[None]] = set()
        self._ended = False
        self._push, self._events = queue.push, queue.get_events
        queue.push, queue.get_events = self.push, self.events

    def came(self, session: str) -> asyncio.Future[None]:
        """Register that a page listens for answers. The future is done when the page stops listening."""
        stream = asyncio.get_running_loop().create_future()
        self._streams.add(stream)
        self.listening[session] += 1
        stream.add_done_callback(lambda done: self._left(done, session))
        if self._ended:  # read after the stream is registered, so that either this or end() finishes it
            _finish(stream)
        return stream

    def end(self) -> None:
        """End all streams of answers, from any thread, and those that pages open later."""
        self._ended = True
        for stream in list(self._streams):
            stream.get_loop().call_soon_threadsafe(_finish, stream)

    def _left(self, stream: asyncio.Future[None], session: str) -> None:
        self._streams.discard(stream)
        self.listening[session] -= 1
        if self.listening[session] <= 0:
            del self.listening[session]

    async def push(self, body: Any, request: Any, username: str | None) -> tuple[bool, Any, str]:
        """Gradio's ``push``, preceded by the removal of abandoned requests and with a limit for each page."""
        if body.fn_index not in self.queue.blocks.fns:
            return False, "The demo has no such function: reload its page.", "error"
        self._forget_abandoned()
        own = sum(event.session_hash == body.session_hash for event in self._waiting())
        if own >= WAITING_OF_A_PAGE:
            return False, f"{own} of your requests are waiting: let them finish first.", "queue_full"
        if len(self.queue) >= WAITING:
            unheard = [event for event in self._waiting() if event.session_hash not in self.listening]
            for event in sorted(unheard, key=lambda event: event.enqueue_time)[:1]:
                self._forget(event)
        return await self._push(body=body, request=request, username=username)

    def events(self) -> Any:
        """Gradio's ``get_events`` for requests whose pages listen. Gradio calls it often, holding the queue's lock."""
        self._forget_abandoned()
        waiting = self._waiting()
        unheard = [event for event in waiting if event.session_hash not in self.listening]
        if len(unheard) == len(waiting):
            return None
        lines = self.queue.event_queue_per_concurrency_id
        for event in unheard:
            lines[event.concurrency_id].queue.remove(event)
        try:
            found = self._events()
            if found:
                session = found[0][0].session_hash
                wanted.set(lambda: session in self.listening)  # Gradio runs the request in a copy of this context
            return found
        finally:
            for event in unheard:
                lines[event.concurrency_id].queue.append(event)
            for line in lines.values() if unheard else ():
                line.queue.sort(key=lambda event: event.enqueue_time)

    def _waiting(self) -> list[Any]:
        return [event for line in self.queue.event_queue_per_concurrency_id.values() for event in line.queue]

    def _forget_abandoned(self) -> None:
        now = time.monotonic()
        for event in self._waiting():
            if event.session_hash not in self.listening and now - event.enqueue_time > SECONDS:
                self._forget(event)

    def _forget(self, event: Any) -> None:
        queue, session = self.queue, event.session_hash
        queue.event_queue_per_concurrency_id[event.concurrency_id].queue.remove(event)
        queue.event_ids_to_events.pop(event._id, None)
        ids = queue.pending_event_ids_session.get(session, set())
        ids.discard(event._id)
        if not ids:
            queue.pending_event_ids_session.pop(session, None)
            if session not in self.listening:
                queue.pending_messages_per_session.pop(session, None)


def _finish(stream: asyncio.Future[None]) -> None:
    if not stream.done():
        stream.set_result(None)
