import json
from pathlib import Path
from typing import Any

import pytest

from service import cli
from service.keys import KeyEntry, KeysError, Scope, digest_of, new_token, parse_keys, read_keys

TOKEN, TOKEN_ID = new_token()


def entry(**changes: Any) -> dict[str, Any]:
    return {"tokens": {TOKEN_ID: digest_of(TOKEN)}, "scopes": ["generate"], **changes}


def text(**entries: Any) -> str:
    return json.dumps(entries)


def test_a_key_is_found_by_itself_alone() -> None:
    ring = parse_keys(text(alice=entry(rank_ceiling=8, max_in_flight=2)))
    found = ring.find(TOKEN)
    assert found is not None
    assert (found.name, set(found.scopes), found.bounds.ceiling, found.max_in_flight) == ("alice", {Scope.GENERATE}, 8, 2)
    other, _ = new_token()
    same_id = f"dyl_{TOKEN_ID}_{other[-43:]}"
    for wrong in (other, same_id, TOKEN[:-1], TOKEN + "a", TOKEN.upper(), "", "dyl__", digest_of(TOKEN), TOKEN + "\n"):
        assert ring.find(wrong) is None


def test_a_short_secret_is_not_accepted_though_its_hash_is_in_the_file() -> None:
    short = f"dyl_{TOKEN_ID}_hunter2"
    ring = parse_keys(text(alice=entry(tokens={TOKEN_ID: digest_of(short)})))
    assert ring.find(short) is None


def test_a_key_is_replaced_without_a_gap() -> None:
    new, new_id = new_token()
    ring = parse_keys(text(alice=entry(tokens={TOKEN_ID: digest_of(TOKEN), new_id: digest_of(new)})))
    assert ring.find(TOKEN) == ring.find(new) is not None
    assert [key.name for key in ring] == ["alice"]


def test_keys_are_long_random_and_never_shown() -> None:
    tokens = {new_token()[0] for _ in range(100)}
    assert len(tokens) == 100
    assert {len(token) for token in tokens} == {60}
    ring = parse_keys(text(alice=entry()))
    assert digest_of(TOKEN) not in repr(ring) + repr(list(ring)) + repr(vars(ring.find(TOKEN)))


BAD_FILES = {
    "not JSON": ("{", "not JSON"),
    "a list": ("[]", "the whole: "),
    "no keys": ("{}", "no keys"),
    "an unknown field": (text(alice=entry(role="admin")), "alice.role: "),
    "an unknown scope": (text(alice=entry(scopes=["admin"])), "alice.scopes.0: "),
    "no scope": (text(alice=entry(scopes=[])), "alice.scopes: "),
    "no token": (text(alice={"scopes": ["generate"]}), "alice.tokens: "),
    "no limit at all": (text(alice=entry(max_in_flight=0)), "alice.max_in_flight: "),
    "bounds that cross": (
        text(alice=entry(rank_floor=4, rank_ceiling=2)),
        "rank_ceiling must be at least rank_floor, 4",
    ),
    "a name with a space": (text(**{"a b": entry()}), "a b"),
    "one token twice": (text(alice=entry(), bob=entry()), "in use by alice"),
    "one name twice": ('{"alice": 1, "alice": 2}', "appears more than once in one object: alice"),
}


@pytest.mark.parametrize(("content", "said"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_refused_by_entry_and_field(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content)
    with pytest.raises(KeysError) as caught:
        read_keys(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)


@pytest.mark.parametrize("tokens", [{TOKEN_ID: TOKEN}, {TOKEN: digest_of(TOKEN)}, [TOKEN], TOKEN], ids=range(4))
def test_a_key_in_the_place_of_its_hash_is_not_repeated(tokens: object) -> None:
    with pytest.raises(KeysError, match=r"alice\.tokens: must be 12 hex digits") as caught:
        parse_keys(text(alice=entry(tokens=tokens)))
    assert TOKEN not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="No such file"):
        read_keys(tmp_path / "keys.json")


def test_the_command_makes_a_key_that_the_file_takes(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--scopes", "generate,metrics", "--rank-ceiling", "8", "--requests-per-minute", "60", "--private-uploads"]
    assert cli.main(["keys", "new", "--name", "alice", *options]) == 0
    printed = capsys.readouterr().out
    token = next(word for word in printed.split() if word.startswith("dyl_"))
    assert printed.count(token) == 1
    (found,) = parse_keys(printed[printed.index("{") :])
    assert (found.name, set(found.scopes)) == ("alice", {Scope.GENERATE, Scope.METRICS})
    assert (found.bounds.ceiling, found.requests_per_minute, found.private_uploads) == (8, 60, True)
    assert parse_keys(printed[printed.index("{") :]).find(token) == found


def test_the_command_refuses_bounds_that_cross(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["keys", "new", "--name", "a", "--rank-floor", "4", "--rank-ceiling", "2"]) == cli.BAD_USAGE
    assert "--rank-ceiling 2 is below --rank-floor 4" in capsys.readouterr().err


def test_every_field_of_an_entry_is_an_option_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["keys", "--help"])
    shown = capsys.readouterr().out
    assert [f for f in KeyEntry.model_fields if f != "tokens" and f"--{f.replace('_', '-')}" not in shown] == []
