"""How far a request is that has not said anything yet."""

from __future__ import annotations

import asyncio


class Progress:
    """One request on its way to its first token, for code that waits for it.

    `num_prompt_tokens` is known once it is admitted. It does not move while its verifier is lost.
    """

    def __init__(self) -> None:
        self._admitted = asyncio.Event()
        self._moving = asyncio.Event()
        self._moving.set()
        self._num_stalled = 0
        self.num_prompt_tokens = 0

    def admit(self, num_prompt_tokens: int) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self._admitted.set()

    def stall(self) -> None:
        """A choice has lost its verifier."""
        self._num_stalled += 1
        self._moving.clear()

    def resume(self) -> None:
        """A choice has its verifier again. One that is given up ends the request, which does not move until then."""
        self._num_stalled -= 1
        if not self._num_stalled:
            self._moving.set()

    async def wait_admitted(self) -> None:
        await self._admitted.wait()

    async def wait_moving(self) -> None:
        await self._moving.wait()
