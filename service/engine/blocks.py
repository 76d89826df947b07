"""Bookkeeping of key/value blocks: which are free, which belong to whom, and what is in them. The tensors live in kv_cache.py.

free      holds nothing that anyone could use
in use    held by one or more sequences; several share only blocks that are full, and nobody writes to those again
cached    held by none, but its content has a name: kept until its space is needed, least recently used first
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from itertools import takewhile


class OutOfBlocks(Exception):
    """Fewer blocks are available than were asked for. Internal: the scheduler answers it by preempting."""


class BlockPool:
    """A fixed number of blocks, each holding the keys and values of `block_tokens` tokens in every layer."""

    def __init__(self, total: int, block_tokens: int) -> None:
        if total < 1 or block_tokens < 1:
            raise ValueError(f"need at least one block of at least one token, not {total} of {block_tokens}")
        self.total = total
        self.block_tokens = block_tokens
        self._free = list(range(total - 1, -1, -1))  # popped from the end: low ids first, so that memory is touched late
        self._users = [0] * total  # sequences that hold each block
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, tuple[bytes, str | None]] = {}  # block to digest and owner, the inverse of `_block_of`
        self.evictions = 0
        """Cached blocks whose space was needed."""

    @property
    def available(self) -> int:
        """Number of blocks that `allocate` could hand out: free or cached."""
        return len(self._free) + len(self._cached)

    @property
    def cached(self) -> int:
        """Number of blocks that nobody holds and whose content is kept."""
        return len(self._cached)

    @property
    def used(self) -> int:
        """Number of blocks that sequences hold."""
        return self.total - self.available

    @property
    def capacity_tokens(self) -> int:
        """Tokens that fit when nothing is in use."""
        return self.total * self.block_tokens

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` tokens occupy."""
        return -(-tokens // self.block_tokens)

    def allocate(self, count: int) -> list[int]:
        """Hand out `count` blocks, free ones first.

        Raises:
            OutOfBlocks: fewer are available; nothing was handed out.
        """
        if count > self.available:
            raise OutOfBlocks
        taken = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in taken:
            self._users[block] = 1
        return taken

    def share(self, digests: Iterable[bytes]) -> list[int]:
        """Hand out the blocks that hold these contents, up to the first that none holds."""
        shared = [self._block_of[digest] for digest in takewhile(self._block_of.__contains__, digests)]
        for block in shared:
            self._cached.pop(block, None)
            self._users[block] += 1
        return shared

    def name(self, block: int, digest: bytes, owner: str | None) -> None:
        """Make the content of a full block in use findable, unless another block already holds the same.

        Args:
            block: never written to again while it has this name.
            digest: of its content; equal digests mean equal content.
            owner: whose content it is, for `forget`.
        """
        if digest not in self._block_of and block not in self._name_of:
            self._block_of[digest] = block
            self._name_of[block] = digest, owner

    def release(self, blocks: Sequence[int]) -> None:
        """Take back what one sequence held. Blocks that no other holds are cached if their content has a name, else free."""
        for block in reversed(blocks):  # the end of a chain goes first: it is of no use without what comes before it
            self._users[block] -= 1
            if self._users[block] > 0:
                continue
            if block in self._name_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def forget(self, owner: str) -> None:
        """Let nobody find an owner's contents any more; those that are cached become free."""
        for block in [block for block, (_, whose) in self._name_of.items() if whose == owner]:
            self._unname(block)
            if block in self._cached:
                del self._cached[block]
                self._free.append(block)

    def check_integrity(self, held: Sequence[Sequence[int]]) -> None:
        """Assert that each block is free, cached or in use by exactly the sequences that hold the lists `held`.

        Raises:
            AssertionError: naming what does not add up.
        """
        users = Counter(block for blocks in held for block in blocks)
        if any(self._users[block] != users[block] for block in range(self.total)):
            raise AssertionError(f"blocks are counted as held {sum(self._users)} times and are held {users.total()} times")
        if sorted([*self._free, *self._cached, *users]) != list(range(self.total)):
            counts = f"{len(self._free)} free, {len(self._cached)} cached and {len(users)} used"
            raise AssertionError(f"{counts} blocks are not the {self.total} there are")
        if {digest: block for block, (digest, _) in self._name_of.items()} != self._block_of:
            raise AssertionError("names and blocks do not match")
        if not self._cached.keys() <= self._name_of.keys() or not self._name_of.keys().isdisjoint(self._free):
            raise AssertionError("a cached block has no name, or a free one has")

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._unname(block)
        self.evictions += 1
        return block

    def _unname(self, block: int) -> None:
        digest, _ = self._name_of.pop(block)
        del self._block_of[digest]
