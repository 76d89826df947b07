"""text-generation, TGI's client, as it is."""

import asyncio
import sys

from text_generation import AsyncClient, Client
from text_generation.errors import ValidationError
from text_generation.types import Message

URL = sys.argv[1]
PROMPT = "the cat"
MESSAGES = [Message(role="user", content="the cat")]

client = Client(URL)
answer = client.generate(PROMPT, max_new_tokens=6, decoder_input_details=True, top_n_tokens=2)
text = answer.generated_text
assert answer.details.generated_tokens == 6
assert "".join(token.text for token in answer.details.tokens) == text
assert [len(each) for each in answer.details.top_tokens] == [2] * 6
events = list(client.generate_stream(PROMPT, max_new_tokens=6))
assert "".join(event.token.text for event in events) == text
assert events[-1].generated_text == text
best = client.generate(PROMPT, max_new_tokens=6, do_sample=True, best_of=2)
assert len(best.details.best_of_sequences) == 1
chat = client.chat(MESSAGES, max_tokens=6, temperature=0.5, seed=1)
assert chat.choices[0].message.role == "assistant"
try:
    client.generate(PROMPT, max_new_tokens=10**6)
except ValidationError as error:
    assert "max_new_tokens" in str(error)
else:
    raise AssertionError("it should have been refused")


async def asynchronous() -> tuple[str, str]:
    """Chats stream here only: the synchronous client of 0.7.0 reads an attribute that its own responses lack."""
    client = AsyncClient(URL)
    whole = await client.generate(PROMPT, max_new_tokens=6)
    chunks = await client.chat(MESSAGES, max_tokens=6, temperature=0.5, seed=1, stream=True)
    return whole.generated_text, "".join([chunk.choices[0].delta.content async for chunk in chunks])


assert asyncio.run(asynchronous()) == (text, chat.choices[0].message.content)
