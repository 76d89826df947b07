"""What a body of /generate asks for."""

from collections.abc import Sequence

from service.core import EngineProtocol, SamplingParams
from service.http.generation.fan_out import drawn_seed
from service.http.generation.submit import Task
from service.http.generation.token_limits import TokenFields, TokenLimits
from service.http.schemas import DEFAULT_MAX_NEW_TOKENS, GenerateParameters, GenerateRequest, given_or

FIELDS = TokenFields("inputs", "max_new_tokens", "min_new_tokens", "truncate")


def generate_task(body: GenerateRequest) -> Task:
    """The task of a checked body."""
    parameters = body.parameters

    def encode(engine: EngineProtocol, limits: TokenLimits) -> tuple[tuple[int, ...], ...]:
        if parameters.truncate:
            return (engine.encode(body.inputs)[-parameters.truncate :],)
        limits.check_text(body.inputs, FIELDS)
        return (engine.encode(body.inputs),)

    def sampling(prompt: Sequence[int], limits: TokenLimits) -> SamplingParams:
        least = parameters.min_new_tokens or 0
        new_tokens = limits.new_tokens(prompt, parameters.max_new_tokens, DEFAULT_MAX_NEW_TOKENS, least, FIELDS)
        return _sampling(parameters, new_tokens)

    return Task(
        adapter=parameters.adapter_id,
        rank=parameters.rank,
        policy=parameters.rank_policy,
        encode=encode,
        sampling=sampling,
        characters=len(body.inputs),
        copies=parameters.best_of or 1,
        slo=parameters.slo,
    )


def _sampling(parameters: GenerateParameters, new_tokens: int) -> SamplingParams:
    do_sample = parameters.is_sampling
    temperature = parameters.temperature
    return SamplingParams(
        max_new_tokens=new_tokens,
        min_new_tokens=parameters.min_new_tokens or 0,
        repetition_penalty=given_or(parameters.repetition_penalty, 1.0),
        presence_penalty=given_or(parameters.presence_penalty, 0.0),
        frequency_penalty=given_or(parameters.frequency_penalty, 0.0),
        logit_bias=tuple(parameters.logit_bias.items()),
        do_sample=do_sample,
        temperature=temperature if do_sample and temperature is not None else 1.0,
        top_k=parameters.top_k,
        top_p=given_or(parameters.top_p, 1.0),
        min_p=given_or(parameters.min_p, 0.0),
        typical_p=given_or(parameters.typical_p, 1.0),
        seed=drawn_seed() if parameters.seed is None else parameters.seed,
        is_repeatable=parameters.seed is not None or parameters.details,  # which tell the seed that is drawn
        stop=tuple(parameters.stop),
        stop_token_ids=tuple(parameters.stop_token_ids),
        include_stop=parameters.include_stop_str_in_output,
        ignore_eos=parameters.ignore_eos_token,
        alternatives=max(parameters.top_n_tokens or 0, parameters.return_k_alternatives or 0),
        prompt_logprobs=parameters.decoder_input_details,
    )
