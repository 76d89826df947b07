"""Names for the content of full blocks, by which one request finds what another has computed."""

import secrets
from array import array
from collections.abc import Sequence
from hashlib import blake2b

from service.core import AdapterChoice

_DIGEST_BYTES = 16


class PrefixHash:
    """Hashes a block's tokens together with all tokens before it and the (adapter, rank) that they run with.

    The adapter counts by its content digest: one that replaces another under the same name shares nothing with it. The key
    is random for each process and 32 bytes long, so nobody outside can look for two prefixes of one digest, and by chance
    128 bits collide once in 2^64 blocks. That is why equal digests are taken for equal content, without a second look at
    the tokens.
    """

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._key = secrets.token_bytes(32)

    def extend(
        self,
        digests: list[bytes],
        tokens: Sequence[int],
        choice: AdapterChoice | None,
        *,
        blocks: int,
        among: tuple[str | bool | None, ...] = (),
    ) -> None:
        """Add to `digests`, those of the first blocks of `tokens`, what is missing up to `blocks`.

        Args:
            among: sequences find each other's content only where this is equal as well.
        """
        for number in range(len(digests), blocks):
            before = digests[-1] if digests else repr((choice, among)).encode()
            held = array("q", tokens[number * self._block_tokens : (number + 1) * self._block_tokens])
            if len(held) < self._block_tokens:
                raise ValueError(f"{len(tokens)} tokens do not fill {blocks} blocks of {self._block_tokens}")
            # `person` keeps the first link, whose length is not that of a digest, apart from all others.
            link = blake2b(before, key=self._key, digest_size=_DIGEST_BYTES, person=b"next" if digests else b"first")
            link.update(held.tobytes())
            digests.append(link.digest())
