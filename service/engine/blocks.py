"""Bookkeeping of key/value blocks: which are free, which belong to whom. The tensors live in kv_cache.py."""


class OutOfBlocks(Exception):
    """Fewer blocks are free than were asked for. Internal: the scheduler answers it by preempting."""


class BlockPool:
    """A fixed number of blocks, each holding the keys and values of `block_tokens` tokens in every layer."""

    def __init__(self, total: int, block_tokens: int) -> None:
        if total < 1 or block_tokens < 1:
            raise ValueError(f"need at least one block of at least one token, not {total} of {block_tokens}")
        self.total = total
        self.block_tokens = block_tokens
        self._free = list(range(total - 1, -1, -1))  # popped from the end: low ids first, so that memory is touched late

    @property
    def free(self) -> int:
        """Number of free blocks."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Number of blocks handed out."""
        return self.total - len(self._free)

    @property
    def capacity_tokens(self) -> int:
        """Tokens that fit when everything is free."""
        return self.total * self.block_tokens

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` tokens occupy."""
        return -(-tokens // self.block_tokens)

    def allocate(self, count: int) -> list[int]:
        """Hand out `count` blocks.

        Raises:
            OutOfBlocks: fewer are free; nothing was handed out.
        """
        if count > len(self._free):
            raise OutOfBlocks
        if count == 0:
            return []
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        return taken

    def release(self, blocks: list[int]) -> None:
        """Take blocks back."""
        self._free.extend(reversed(blocks))

    def check_integrity(self, held: list[list[int]]) -> None:
        """Assert that free blocks and those `held` by sequences are each block exactly once."""
        everything = sorted(self._free + [block for blocks in held for block in blocks])
        if everything != list(range(self.total)):
            raise AssertionError(f"blocks lost or held twice: {len(everything)} accounted for, {self.total} exist")
