"""huggingface_hub.InferenceClient, as it is."""

import asyncio
import sys

from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import ValidationError

URL = sys.argv[1]
PROMPT = "the cat"
MESSAGES = [{"role": "user", "content": "the cat"}]

client = InferenceClient(base_url=URL)
text = client.text_generation(PROMPT, max_new_tokens=6, adapter_id="story@4")
told = client.text_generation(
    PROMPT, max_new_tokens=6, adapter_id="story@4", details=True, decoder_input_details=True, top_n_tokens=2
)
assert told.generated_text == text
assert told.details is not None
assert told.details.generated_tokens == 6
assert told.details.finish_reason == "length"
assert "".join(token.text for token in told.details.tokens) == text
assert len(told.details.prefill) >= 2
assert [len(each) for each in told.details.top_tokens or []] == [2] * 6

assert "".join(client.text_generation(PROMPT, max_new_tokens=6, adapter_id="story@4", stream=True)) == text
*_, last = client.text_generation(PROMPT, max_new_tokens=6, adapter_id="story@4", stream=True, details=True)
assert last.generated_text == text
assert last.details is not None
assert (last.details.generated_tokens, last.details.finish_reason) == (6, "length")
drawn = [client.text_generation(PROMPT, max_new_tokens=6, do_sample=True, temperature=0.9, seed=3) for _ in range(2)]
assert drawn[0] == drawn[1]

try:
    client.text_generation(PROMPT, max_new_tokens=10**6)
except ValidationError as error:
    assert "max_new_tokens" in str(error)
else:
    raise AssertionError("it should have been refused")

chat = client.chat_completion(MESSAGES, max_tokens=6, temperature=0, model="story@4", logprobs=True, top_logprobs=1)
answer = chat.choices[0]
assert (answer.message.role, answer.finish_reason) == ("assistant", "length")
assert chat.usage.completion_tokens == 6
chunks = client.chat_completion(MESSAGES, max_tokens=6, temperature=0, model="story@4", stream=True)
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.message.content
assert client.chat_completion(MESSAGES, max_tokens=2, seed=1).usage.completion_tokens == 2  # it names no model


async def asynchronous() -> str:
    async with AsyncInferenceClient(base_url=URL) as client:
        return "".join([t async for t in await client.text_generation(
            PROMPT, max_new_tokens=6, adapter_id="story@4", stream=True
        )])  # fmt: skip


assert asyncio.run(asynchronous()) == text
