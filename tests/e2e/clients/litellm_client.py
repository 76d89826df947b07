"""litellm, as it is, by its routes to OpenAI's interface and to vLLM."""

import asyncio
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it looks its prices up on the internet
import litellm

URL = sys.argv[1] + "/v1"
ASKED = {
    "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 6, "temperature": 0, "api_base": URL, "api_key": "none"
}  # fmt: skip

answer = litellm.completion(model="openai/story@4", **ASKED)
text = answer.choices[0].message.content
assert answer.usage.completion_tokens == 6
assert litellm.completion(model="hosted_vllm/story@4", **ASKED).choices[0].message.content == text
chunks = litellm.completion(model="openai/story@4", stream=True, **ASKED)
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
assert asyncio.run(litellm.acompletion(model="openai/story@4", **ASKED)).choices[0].message.content == text
at_four = litellm.completion(model="openai/story", extra_body={"rank": 4}, **ASKED)
assert at_four.choices[0].message.content == text
plain = litellm.text_completion(
    model="text-completion-openai/story@4", prompt="the cat", max_tokens=6, temperature=0, api_base=URL, api_key="none"
)
assert plain.usage.completion_tokens == 6
try:
    litellm.completion(model="openai/nobody", **ASKED)
except litellm.NotFoundError as error:
    assert "nobody" in str(error)
else:
    raise AssertionError("it should have been refused")
