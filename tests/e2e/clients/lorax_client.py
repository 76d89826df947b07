"""lorax-client, as it is."""

import asyncio
import sys

from lorax import AsyncClient, Client
from lorax.errors import ValidationError

URL = sys.argv[1]
PROMPT = "the cat"

client = Client(URL)
base = client.generate(PROMPT, max_new_tokens=6).generated_text
answer = client.generate(
    PROMPT, max_new_tokens=6, adapter_id="story@4", adapter_source="local", decoder_input_details=True, return_k_alternatives=2
)
text = answer.generated_text
assert text != base
assert answer.details.generated_tokens == 6
assert "".join(token.text for token in answer.details.tokens) == text
assert [len(token.alternative_tokens) for token in answer.details.tokens] == [2] * 6
assert len(answer.details.prefill) >= 2
events = list(client.generate_stream(PROMPT, max_new_tokens=6, adapter_id="story@4"))
assert "".join(event.token.text for event in events) == text
assert events[-1].generated_text == text
stop = text[3:5]
stopped = client.generate(PROMPT, max_new_tokens=6, adapter_id="story@4", stop_sequences=[stop])
assert stopped.generated_text == text[: text.index(stop) + 2]
assert stopped.details.finish_reason == "stop_sequence"
drawn = [client.generate(PROMPT, max_new_tokens=6, do_sample=True, temperature=0.9, seed=3).generated_text for _ in range(2)]
assert drawn[0] == drawn[1]
try:
    client.generate(PROMPT, max_new_tokens=10**6)
except ValidationError as error:
    assert "max_new_tokens" in str(error)
else:
    raise AssertionError("it should have been refused")


async def asynchronous() -> str:
    return str((await AsyncClient(URL).generate(PROMPT, max_new_tokens=6, adapter_id="story@4")).generated_text)


assert asyncio.run(asynchronous()) == text
