"""How many prompt tokens a step takes in, where requests beside them generate and wait for the step."""


def prompt_tokens_beside(decoding: int, entering: int, chunk_tokens: int) -> int:
    """Most prompt tokens of a step. The scheduler keeps to it, and auto-rank predicts by it.

    A step's time grows with its rows from a fixed part on, so a row of a prompt for each that generates, and a few more,
    bound the time of a step beside which one prompt enters to a multiple of one without. Where many enter, those who
    generate wait longer, once: at the pace of one prompt a burst would keep the batch small, and each of its own tokens
    dear, for as many steps as it has prompts. So the second prompt adds twice what the first does, the third three times,
    and so on.

    Args:
        decoding: rows that generate in the step, at least one.
        entering: prompts that are being read, or wait and have a place.
        chunk_tokens: for one prompt that enters alone.
    """
    return decoding + chunk_tokens * entering * (entering + 1) // 2
