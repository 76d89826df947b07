"""What a client may cost: time, memory, connections. Over a real socket, where a client can be slow."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.core import GenerationRequest
from tests.fake_engine import FakeEngine
from tests.http_harness import Server, in_process, on_socket
from tests.http_keys import make_key, write_keys

LONG = 2048 * "x"
"""Of more characters than FakeEngine's context can hold, whichever its tokens."""
ENDLESS = {"inputs": "x", "parameters": {"max_new_tokens": 900_000}}


def endless_engine() -> FakeEngine:
    return FakeEngine(max_context_tokens=10**6)


@contextmanager
def raw(server: Server, sent: bytes = b"") -> Iterator[socket.socket]:
    """A connection of our own, on which so much was sent."""
    url = server.client.base_url
    with socket.create_connection((url.host, url.port or 0), timeout=20) as connection:
        connection.sendall(sent)
        yield connection


def rest_of(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    received = b""
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass
    return received


# Deadlines


@pytest.mark.parametrize("route", ["/generate", "/generate_stream"])
@pytest.mark.parametrize("header", ["X-Request-Timeout-Ms", "X-Envoy-Expected-Rq-Timeout-Ms"])
def test_a_request_that_waits_past_its_deadline_is_504_and_its_row_is_free(tmp_path: Path, route: str, header: str) -> None:
    with on_socket(tmp_path) as (server, _), server.engine.paused():
        response = server.client.post(route, json={"inputs": "x"}, headers={header: "800"})
        assert response.status_code == 504
        assert response.json() == {
            "error": "the request was not complete within 0.8 s and was ended",
            "error_type": "timeout",
        }
        assert server.engine.wait_until(lambda stats: stats.running == 0)
        assert server.metric("dylora_refused_total", reason="timeout") == 1
        # Counted by the engine's thread, which the answer did not wait for.
        labels = {"adapter": "base", "rank": "0", "mode": "none", "outcome": "timeout"}
        assert server.engine.wait_until(lambda _: server.metric("dylora_requests_total", **labels) == 1)


def test_the_server_has_a_deadline_of_its_own(tmp_path: Path) -> None:
    with on_socket(tmp_path, request_timeout_s=0.05) as (server, _), server.engine.paused():
        assert server.client.post("/generate", json={"inputs": "x"}).status_code == 504


def test_a_stream_past_its_deadline_ends_with_an_error_event(tmp_path: Path) -> None:
    with on_socket(tmp_path, engine=endless_engine(), max_unread_tokens=10**6) as (server, _):
        headers = {"X-Request-Timeout-Ms": "300"}
        with server.client.stream("POST", "/generate_stream", json=ENDLESS, headers=headers) as response:
            assert response.status_code == 200
            last = [line for line in response.iter_lines() if line][-1]
        assert json.loads(last.removeprefix("data:"))["error_type"] == "timeout"
        assert server.engine.wait_until(lambda stats: stats.running == 0)


def test_a_deadline_that_is_not_reached_changes_nothing(tmp_path: Path) -> None:
    with in_process(tmp_path) as server:
        plain = server.generate(adapter_id="demo")
        assert server.generate(adapter_id="demo", headers={"X-Request-Timeout-Ms": "60000"}).json() == plain.json()


# Slow readers


def test_a_reader_that_falls_behind_is_cut_off_with_a_clear_end(tmp_path: Path) -> None:
    with on_socket(tmp_path, engine=endless_engine(), max_unread_tokens=50) as (server, _):
        with server.client.stream("POST", "/generate_stream", json=ENDLESS) as response:
            # The fake engine makes tokens faster than any reader takes them.
            last = [line for line in response.iter_lines() if line][-1]
        assert json.loads(last.removeprefix("data:")) == {
            "error": "more than 50 tokens of this stream were left unread, and it was ended; read faster",
            "error_type": "slow_reader",
        }
        assert server.engine.wait_until(lambda stats: stats.running == 0)


def test_a_whole_answer_has_no_reader_to_fall_behind(tmp_path: Path) -> None:
    engine = FakeEngine(max_context_tokens=10**6)
    with on_socket(tmp_path, engine=engine, max_unread_tokens=1) as (server, _):
        assert server.generate(max_new_tokens=500).status_code == 200


def test_a_client_that_never_reads_loses_its_connection(tmp_path: Path) -> None:
    with on_socket(tmp_path, write_timeout_s=0.2) as (server, _):
        answer_bytes = len(server.client.get("/openapi.json").content)
        # More answers than all buffers between the two hold.
        times = 16_000_000 // answer_bytes
        with raw(server, b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * times) as connection:
            while server.metric("dylora_refused_total", reason="slow_reader") is None:
                server.client.get("/health").raise_for_status()
            assert len(rest_of(connection)) < times * answer_bytes


def test_a_client_that_goes_away_frees_its_place_though_it_had_asked_for_more(tmp_path: Path) -> None:
    body = b'{"inputs": "x"}'
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    pipelined = head % len(body) + body + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with on_socket(tmp_path) as (server, _), server.engine.paused():
        with raw(server, pipelined):
            assert server.engine.wait_until(lambda stats: stats.running == 1)
        assert server.engine.wait_until(lambda stats: stats.running == 0)


# Slow senders


def test_a_connection_that_says_nothing_is_closed(tmp_path: Path) -> None:
    with on_socket(tmp_path, header_timeout_s=0.1) as (server, _), raw(server) as connection:
        assert rest_of(connection) == b""


@pytest.mark.parametrize("sent", [b"GET /hea", b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_headers_that_do_not_arrive_are_cut_with_408(tmp_path: Path, sent: bytes) -> None:
    with on_socket(tmp_path, header_timeout_s=0.1) as (server, _), raw(server, sent) as connection:
        answer = rest_of(connection)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"the headers did not arrive within 0.1 s" in answer
        assert server.metric("dylora_refused_total", reason="timeout") == 1


@pytest.mark.parametrize("path", ["POST /generate", "PUT /adapters/x"])
def test_a_body_that_trickles_is_cut_with_408(tmp_path: Path, path: str) -> None:
    head = f"{path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/zip\r\nContent-Length: 1000\r\n\r\n"
    with on_socket(tmp_path, body_timeout_s=0.1, min_body_bytes_per_s=10**9) as (server, _):
        with raw(server, head.encode() + b"{") as connection:
            answer = rest_of(connection)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"the body did not arrive in time: 1 bytes in 0.1 s" in answer
        assert server.engine.submitted == []


def test_a_body_that_nobody_reads_does_not_hold_its_connection(tmp_path: Path) -> None:
    key = make_key("alice")
    keys = write_keys(tmp_path / "keys.json", key)
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    with on_socket(tmp_path, body_timeout_s=0.1, api_keys_file=keys) as (server, _), raw(server, head) as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 401 ")
        connection.sendall(b"x")
        assert rest_of(connection) == b""


@pytest.mark.parametrize(("seconds", "is_kept"), [(0.2, False), (60, True)])
def test_an_idle_connection_is_kept_for_as_long_as_the_setting_says(tmp_path: Path, seconds: float, is_kept: bool) -> None:
    with (
        on_socket(tmp_path, keep_alive_s=seconds) as (server, _),
        raw(server, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n") as connection,
    ):
        received = b""
        while not received.endswith(b'{"status":"ok"}'):
            received += connection.recv(65536)
        connection.settimeout(1 if is_kept else 20)
        if is_kept:
            with pytest.raises(TimeoutError):
                connection.recv(1)
        else:
            assert connection.recv(1) == b""


def test_a_request_after_another_on_one_connection_has_its_own_time(tmp_path: Path) -> None:
    request = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with on_socket(tmp_path, header_timeout_s=0.1) as (server, _), raw(server, request) as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET /")
        assert rest_of(connection).startswith(b"HTTP/1.1 408 ")


# Headers


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nX-Large: " + b"x" * 5000 + b"\r\n\r\n",
        b"GET /health?" + b"x" * 5000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"X-Many: x\r\n" * 21 + b"\r\n",
        b"GET /health HTTP/1.1\r\nX-Endless: " + b"x" * 5000,
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"X-Trailer: x\r\n" * 30,
    ],
    ids=["one large", "a long path", "many", "one without end", "trailers"],
)
def test_headers_above_a_limit_are_431(tmp_path: Path, head: bytes) -> None:
    with on_socket(tmp_path, max_header_bytes=4096, max_headers=20) as (server, _):
        with raw(server, head) as connection:
            answer = rest_of(connection)
        if not head.startswith(b"POST"):  # where the request had reached the application, its own answer may come first
            assert answer.startswith(b"HTTP/1.1 431 ")
            assert b"the headers exceed the limit of 4096 bytes or 20 headers" in answer
        assert server.metric("dylora_refused_total", reason="headers_too_large") == 1
        assert server.client.get("/health", headers={"X-Fine": "x" * 3000}).status_code == 200


def test_a_large_body_is_no_large_header(tmp_path: Path) -> None:
    with on_socket(tmp_path, max_header_bytes=4096, engine=endless_engine()) as (server, _):
        body = json.dumps({"inputs": "x" * 100_000, "parameters": {"max_new_tokens": 1}}).encode()
        head = b"POST /generate HTTP/1.1\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        with raw(server, head % len(body) + body) as connection:
            assert rest_of(connection).startswith(b"HTTP/1.1 200 ")


def test_a_large_body_is_no_part_of_the_headers_that_follow_it(tmp_path: Path) -> None:
    body = b'{"inputs": "%s"}' % (b"x" * 400)
    head = b"POST /generate HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    with on_socket(tmp_path, max_header_bytes=300) as (server, _), raw(server, head + body + b"GET /hea") as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"lth HTTP/1.1\r\nConnection: close\r\n\r\n")
        assert b"HTTP/1.1 200 " in rest_of(connection)


def test_what_is_no_http_is_told_so(tmp_path: Path) -> None:
    with on_socket(tmp_path) as (server, _), raw(server, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03") as connection:
        answer = rest_of(connection)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b'{"error": "not a legal HTTP request", "error_type": "validation"}' in answer


# Connections, queue, keys


def test_one_connection_too_many_is_503_and_the_probes_still_answer(tmp_path: Path) -> None:
    with on_socket(tmp_path, max_connections=2) as (server, _), ExitStack() as stack:
        server.client.get("/health").raise_for_status()
        for _ in range(2):
            held = stack.enter_context(raw(server, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"))
            assert held.recv(65536).startswith(b"HTTP/1.1 200 ")
        response = httpx.get(f"{server.client.base_url}/info")
        assert (response.status_code, response.json()["error_type"]) == (503, "overloaded")
        assert response.headers["retry-after"] == "1"
        assert httpx.get(f"{server.client.base_url}/ready").status_code == 200
        assert server.metric("dylora_refused_total", reason="overloaded") == 1


def test_a_full_queue_says_when_it_will_have_drained(tmp_path: Path) -> None:
    with in_process(tmp_path, engine=FakeEngine(max_running=1, max_waiting=2)) as server, server.engine.paused():
        server.services.drain_rate.ended(3.5)
        for number in range(3):
            server.engine.submit(GenerationRequest(str(number), (1,)), lambda event: None)
        response = server.generate()
        assert (response.status_code, response.json()["error_type"]) == (503, "overloaded")
        assert response.headers["retry-after"] == "7"


def test_several_answers_are_queued_together_or_not_at_all(tmp_path: Path) -> None:
    with in_process(tmp_path, engine=FakeEngine(max_running=1, max_waiting=2)) as server:
        with server.engine.paused():
            server.engine.submit(GenerationRequest("before", (1,)), lambda event: None)
            assert server.generate(do_sample=True, best_of=3).status_code == 503
            assert [request.request_id for request in server.engine.submitted] == ["before"]
        assert server.engine.wait_until(lambda stats: not stats.running)
        assert server.generate(do_sample=True, best_of=3).status_code == 200
        assert server.metric("dylora_requests_total", adapter="base", rank="0", mode="base", outcome="ok") == 3
        assert server.metric("dylora_requests_total", adapter="base", rank="0", mode="none", outcome="aborted") is None


def test_a_key_with_too_many_in_flight_waits_and_others_do_not(tmp_path: Path) -> None:
    alice, bob = make_key("alice", max_in_flight=1), make_key("bob")
    keys = write_keys(tmp_path / "keys.json", alice, bob)
    with on_socket(tmp_path, api_keys_file=keys) as (server, _):
        answers: list[httpx.Response] = []
        with server.engine.paused():
            thread = threading.Thread(target=lambda: answers.append(server.generate(headers=alice.headers)))
            thread.start()
            assert server.engine.wait_until(lambda stats: stats.running == 1)
            refused = server.generate(headers=alice.headers)
            assert (refused.status_code, refused.json()["error_type"]) == (429, "rate_limited")
            assert int(refused.headers["retry-after"]) >= 1
            assert server.client.get("/info", headers=bob.headers).status_code == 200
        thread.join(20)
        assert answers[0].status_code == 200
        assert server.generate(headers=alice.headers).status_code == 200


@pytest.mark.parametrize(("limit", "status"), [(5, 200), (4, 422)])
def test_prompts_are_bounded(tmp_path: Path, limit: int, status: int) -> None:
    with in_process(tmp_path, max_prompt_tokens=limit) as server:
        response = server.generate("hello")
        assert response.status_code == status
        said: dict[str, Any] = response.json()
        assert status == 200 or said["error"] == "inputs: 5 prompt tokens are above this server's limit; legal: 1 to 4"


class Reading(FakeEngine):
    """One that takes as long over a text as a test wants."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.is_reading, self.may_end = threading.Event(), threading.Event()

    def encode(self, text: str, *, with_special: bool = True) -> tuple[int, ...]:
        if text.startswith("the first"):
            self.is_reading.set()
            assert self.may_end.wait(20)
        return super().encode(text, with_special=with_special)


def test_a_long_text_that_is_tokenised_delays_no_short_one(tmp_path: Path) -> None:
    engine = Reading(max_context_tokens=10**5)
    with on_socket(tmp_path, engine=engine) as (server, _):
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(server.generate("the first" * 1000)))
        thread.start()
        assert engine.is_reading.wait(20)
        assert server.generate("the second").status_code == 200
        late = server.generate("the third" * 1000, headers={"X-Request-Timeout-Ms": "50"})
        assert late.status_code == 504
        engine.may_end.set()
        thread.join(20)
        assert answers[0].status_code == 200


def test_the_wait_for_the_tokenizer_ends_at_the_deadline(tmp_path: Path) -> None:
    engine = Reading()
    with on_socket(tmp_path, engine=engine) as (server, _):
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(server.generate("the first")))
        thread.start()
        assert engine.is_reading.wait(20)
        late = server.generate("the second", headers={"X-Request-Timeout-Ms": "50"})
        assert (late.status_code, late.json()["error_type"]) == (504, "timeout")
        engine.may_end.set()
        thread.join(20)
        assert answers[0].status_code == 200


class NeverReading(FakeEngine):
    def encode(self, text: str, *, with_special: bool = True) -> tuple[int, ...]:
        raise AssertionError("it is tokenised")


@pytest.mark.parametrize(
    ("route", "body", "said"),
    [
        (
            "/generate",
            {"inputs": LONG},
            "inputs: at least 512 prompt tokens, above the context of 512 tokens; shorten the prompt, or set truncate",
        ),
        ("/v1/completions", {"prompt": ["a", LONG]}, "prompt: at least 512 prompt tokens"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}, "messages: at least 517 prompt tokens"),
    ],
)
def test_a_prompt_that_is_certainly_too_long_is_never_tokenised(
    tmp_path: Path, route: str, body: dict[str, Any], said: str
) -> None:
    with in_process(tmp_path, engine=NeverReading()) as server:
        response = server.client.post(route, json=body)
        assert response.status_code in (400, 422)
        assert said in response.text


def test_what_is_truncated_may_be_of_any_length(tmp_path: Path) -> None:
    with in_process(tmp_path) as server:
        assert server.generate(LONG, truncate=5).status_code == 200
        completion = {"prompt": LONG, "truncate_prompt_tokens": 5}
        assert server.client.post("/v1/completions", json=completion).status_code == 200


def test_each_sequence_counts_as_a_request_in_flight_of_its_key(tmp_path: Path) -> None:
    alice, bob = make_key("alice", max_in_flight=3), make_key("bob")
    keys = write_keys(tmp_path / "keys.json", alice, bob)
    with on_socket(tmp_path, api_keys_file=keys) as (server, _):
        two: dict[str, Any] = {"best_of": 2, "do_sample": True}
        never = server.generate(headers=alice.headers, best_of=4, do_sample=True)
        said = "best_of: 4 sequences are more than this API key may have in flight; legal: up to 3"
        assert (never.status_code, never.json()["error"]) == (422, said)
        several = server.client.post("/v1/completions", json={"prompt": ["a"] * 4}, headers=alice.headers)
        assert several.json()["error"]["param"] == "prompt"
        answers: list[httpx.Response] = []
        with server.engine.paused():
            thread = threading.Thread(target=lambda: answers.append(server.generate(headers=alice.headers, **two)))
            thread.start()
            assert server.engine.wait_until(lambda stats: stats.running == 2)
            refused = server.generate(headers=alice.headers, **two)
            assert (refused.status_code, refused.json()["error_type"]) == (429, "rate_limited")
            assert int(refused.headers["retry-after"]) >= 1
            assert server.client.get("/info", headers=alice.headers).status_code == 200
            assert {each.tenant for each in server.engine.submitted} == {"alice"}
        thread.join(20)
        assert answers[0].status_code == 200
        assert server.generate(headers=alice.headers, best_of=3, do_sample=True).status_code == 200
