"""OpenAI's interface: completions, chat completions and models, with vLLM's further parameters and the rank."""
