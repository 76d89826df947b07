from collections.abc import Iterator

import pytest

from adapters.errors import AdapterError, AdapterTooLarge
from service.errors import ServiceError
from service.http.error_table import ERROR_TABLE, KINDS, error_body, kind_of, kind_of_status
from tests.documents import ROOT


def tree(root: type[Exception]) -> Iterator[type[Exception]]:
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


@pytest.mark.parametrize("root", [ServiceError, AdapterError])
def test_every_error_of_both_trees_has_an_entry_of_its_own(root: type[Exception]) -> None:
    ours = [cls for cls in tree(root) if cls.__module__.split(".")[0] in ("adapters", "service")]
    assert len(ours) > 5
    assert [cls.__name__ for cls in ours if cls not in ERROR_TABLE] == []


def test_the_table_names_nothing_else() -> None:
    known = {*tree(ServiceError), *tree(AdapterError)}
    assert [cls.__name__ for cls in ERROR_TABLE if cls not in known] == []


def test_statuses_are_errors_and_waiting_is_advised_only_where_it_helps() -> None:
    for kind in KINDS:
        assert 400 <= kind.status <= 599
        assert kind.type
        assert kind.retry_after_s is None or kind.status in (409, 429, 503)
        assert kind.status not in (429, 503) or kind.retry_after_s


def test_a_status_of_the_framework_s_has_its_kind_from_the_table() -> None:
    assert all(kind_of_status(status) in KINDS for status in (404, 405, 408, 413))
    assert kind_of_status(418).type == "validation"


def test_no_kind_is_made_outside_the_table() -> None:
    makers = [path.name for path in (ROOT / "service").rglob("*.py") if "ErrorKind(" in path.read_text(encoding="utf-8")]
    assert makers == ["error_table.py"]


def test_the_nearest_ancestor_decides() -> None:
    class Huge(AdapterTooLarge):
        pass

    assert kind_of(Huge(["3 GB"])) == ERROR_TABLE[AdapterTooLarge]
    assert error_body(Huge(["3 GB"])) == {"error": "3 GB", "error_type": "too_large"}
    assert kind_of(KeyError("x")).status == 500
