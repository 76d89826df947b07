"""What `model` may name."""

from service.http.adapters.schemas import QualityOut
from service.http.adapters.served_adapter import AdapterState, ServedAdapter
from service.http.generation.selection import select
from service.http.openai.answer_schemas import Model
from service.http.services import Services

_OWNER = "dylora-serve"


def list_models(services: Services, viewer: str) -> list[Model]:
    """The base model, and the adapters that a caller may use."""
    adapters = (_adapter(each, services) for each in services.registry.list(viewer))
    return [_base(services), *(each for each in adapters if each is not None)]


def find_model(services: Services, name: str, viewer: str) -> Model:
    """One of them.

    Raises:
        InvalidRequest, IllegalRank: what follows its "@" is no rank, or none of the adapter's.
        UnknownAdapter, AdapterUnfit, NotReady: there is none that can be used.
    """
    base = _base(services)
    if name in (base.id, "base"):
        return base
    # Whatever a request may name has an entry; of "name@8" it is the adapter's.
    at_rank = select(name, None, None, {}, field="model")
    name = at_rank.adapter or name
    if isinstance(at_rank.rank, int):
        services.registry.resolve(name, viewer).choice(at_rank.rank)
    found = _adapter(services.registry.resolve(name, viewer), services)
    assert found is not None, "what resolves can be served"
    return found


def _base(services: Services) -> Model:
    model = services.engine.model
    return Model(id=model.name, created=services.started_at, owned_by=_OWNER, max_model_len=model.max_context_tokens)


def _adapter(served: ServedAdapter, services: Services) -> Model | None:
    """None for an adapter that can't be served."""
    stored = served.stored
    if stored is None or served.state is not AdapterState.READY:
        return None
    model = services.engine.model
    return Model(
        id=served.name,
        created=int(stored.created.timestamp()),
        owned_by=served.owner or _OWNER,
        parent=model.name,
        max_model_len=model.max_context_tokens,
        kind=stored.config.kind,
        ranks=list(stored.config.ranks),
        quality=QualityOut.of(stored.quality),
    )
