"""A real node's HTTP faces: OpenAI's API by its own client and by raw HTTP, tokens, metrics, control."""

from __future__ import annotations

import json
import stat
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import pytest
import trio

from mycel.compute.infer.request import GenerateRequest
from mycel.node.answer import BODY_BYTES_MAX
from mycel.node.client import Client, ControlError, NotRunning
from mycel.node.running import Node

T = TypeVar("T")
UNSUPPORTED = "unsupported_parameter"
NodeMaker = Callable[..., AbstractAsyncContextManager[Node]]
TicketOf = Callable[[Node], str]
WaitUntil = Callable[[Callable[[], bool]], Awaitable[None]]


async def aside(call: Callable[[], T]) -> T:
    """Run a blocking client in a thread while the node runs in this one."""
    return await trio.to_thread.run_sync(call)


async def text_of(node: Node, prompt: str, tokens: int, **settings: Any) -> str:
    request = GenerateRequest(model="tiny", prompt=prompt, max_tokens=tokens, **settings)
    async with node.generator.generate(request) as generation:
        return "".join([piece.text async for piece in generation])


def base_of(node: Node) -> str:
    return node.api.removesuffix("/v1")


async def post(node: Node, path: str, body: object, **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(timeout=30) as client:
        return await client.post(f"{node.api}/{path}", json=body, headers=headers)


async def test_the_openai_client_streams_a_chat(make_node: NodeMaker, byte_model: Path) -> None:
    async with make_node("a", web=True) as node:
        await node.serve(str(byte_model), None)

        def ask() -> tuple[list[Any], Any]:
            with openai.OpenAI(base_url=node.api, api_key="none", max_retries=0) as client:
                assert [model.id for model in client.models.list()] == ["tiny"]
                messages: Any = [{"role": "user", "content": "hello"}]
                settings: Any = {"model": "tiny", "messages": messages, "max_tokens": 9, "temperature": 0}
                stream = client.chat.completions.create(
                    **settings, stream=True, stream_options={"include_usage": True}
                )
                return list(stream), client.chat.completions.create(**settings)

        chunks, whole = await aside(ask)
        expected = await text_of(node, "User: hello\nAssistant:", 9)
        deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
        assert deltas[0].role == "assistant"
        assert "".join(delta.content or "" for delta in deltas) == expected
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
        assert chunks[-1].usage.completion_tokens == 9
        assert whole.choices[0].message.content == expected
        assert whole.usage.prompt_tokens == len("User: hello\nAssistant:")
        assert len({chunk.id for chunk in chunks}) == 1


async def test_completions_of_several_prompts_and_choices(make_node: NodeMaker, byte_model: Path) -> None:
    async with make_node("a", web=True) as node:
        await node.serve(str(byte_model), None)
        body = {"model": "tiny", "prompt": ["ab", "cd"], "n": 2, "max_tokens": 6, "seed": 5, "logprobs": 2}
        once = (await post(node, "completions", body)).json()
        again = (await post(node, "completions", body)).json()
        assert [choice["index"] for choice in once["choices"]] == [0, 1, 2, 3]
        texts = [choice["text"] for choice in once["choices"]]
        assert texts == [choice["text"] for choice in again["choices"]]
        assert texts[0] != texts[1]
        count = 0
        for choice in once["choices"]:
            logprobs = choice["logprobs"]
            assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"])
            assert all(1 <= len(top) <= 2 for top in logprobs["top_logprobs"])
            assert (len(logprobs["tokens"]) == 6) == (choice["finish_reason"] == "length")
            count += len(logprobs["tokens"])
        assert once["usage"] == {
            "prompt_tokens": 4, "completion_tokens": count, "total_tokens": 4 + count
        }  # fmt: skip


async def test_stop_and_echo(make_node: NodeMaker, byte_model: Path) -> None:
    async with make_node("a", web=True) as node:
        await node.serve(str(byte_model), None)
        text = await text_of(node, "ab", 24)
        printable = next(char for char in text[4:] if char.isprintable() and char != "�")
        body = {"model": "tiny", "prompt": "ab", "max_tokens": 24, "temperature": 0}
        stopped = (await post(node, "completions", body | {"stop": printable})).json()["choices"][0]
        assert stopped["text"] == text[: text.index(printable)]
        assert stopped["finish_reason"] == "stop"
        echoed = (await post(node, "completions", body | {"echo": True})).json()["choices"][0]
        assert echoed["text"] == "ab" + text


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "text"),
    [
        ("completions", {"model": "no", "prompt": "a"}, 404, "model_not_found", "no"),
        ("chat/completions", {"model": "no", "messages": [{"role": "user"}]}, 404, "model_not_found", "no"),
        ("completions", {"model": "tiny"}, 400, None, "prompt"),
        ("completions", {"model": "tiny", "prompt": "a", "x": 1}, 400, None, "Unrecognized request argument"),
        ("completions", {"model": "tiny", "prompt": ""}, 400, "invalid_value", "prompt"),
        ("completions", {"model": "tiny", "prompt": "a" * 513}, 400, "invalid_value", "512"),
        (
            "completions",
            {"model": "tiny", "prompt": "a", "suffix": "b"},
            400,
            "unsupported_parameter",
            "suffix",
        ),
        ("nothing", {}, 404, None, "/v1/nothing"),
    ],
)
async def test_errors_have_openais_shape(
    make_node: NodeMaker,
    byte_model: Path,
    path: str,
    body: object,
    status: int,
    code: str | None,
    text: str,
) -> None:
    async with make_node("a", web=True) as node:
        await node.serve(str(byte_model), None)
        answer = await post(node, path, body)
        told = answer.json()["error"]
        assert (answer.status_code, told["code"]) == (status, code), told
        assert text in told["message"]
        assert set(told) == {"message", "type", "param", "code"}


async def test_a_body_that_is_no_json_and_missing_layers(make_node: NodeMaker, byte_model: Path) -> None:
    async with make_node("a", web=True, layers_wait_s=0.1) as node:
        await node.serve(str(byte_model), (0, 2))
        async with httpx.AsyncClient() as client:
            headers = {"content-type": "application/json"}
            answer = await client.post(f"{node.api}/completions", content=b"{", headers=headers)
            assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
            answer = await client.get(f"{node.api}/models")
            assert answer.json()["data"] == []
        answer = await post(node, "completions", {"model": "tiny", "prompt": "a"})
        told = answer.json()["error"]
        assert (answer.status_code, told["code"]) == (503, "layers_missing")
        assert "mycel serve" in told["message"]
        assert "2:4" in told["message"]


async def test_a_body_out_of_bounds_is_refused(make_node: NodeMaker) -> None:
    async with make_node("a", web=True) as node:
        for path in ("/v1/completions", "/control/ticket"):
            token = json.loads((node.config.home / "api.json").read_text())["token"]
            async with httpx.AsyncClient(timeout=30) as client:
                answer = await client.post(
                    base_of(node) + path,
                    content=b"x" * (BODY_BYTES_MAX + 1),
                    headers={"content-type": "application/json", "authorization": f"Bearer {token}"},
                )
            assert answer.status_code in (400, 413)
            assert "larger than" in answer.text


async def test_a_client_that_goes_away_cancels_its_session(
    make_node: NodeMaker, byte_model: Path, wait_until: WaitUntil
) -> None:
    async with make_node("a", web=True, step_s=0.05) as node:
        await node.serve(str(byte_model), None)
        (stage,) = node.stages.stages
        for stream in (True, False):
            body = {"model": "tiny", "prompt": "a", "max_tokens": 500, "stream": stream}
            async with trio.open_nursery() as nursery:
                nursery.start_soon(post, node, "completions", body)
                await wait_until(lambda: len(stage.sessions) == 1)
                nursery.cancel_scope.cancel()
            await wait_until(lambda: not stage.sessions)
        assert [report.finish for report in node.reports()] == ["cancelled", "cancelled"]
        assert all(report.tokens < 500 for report in node.reports())


async def test_a_token_is_wanted_where_one_is_set(make_node: NodeMaker) -> None:
    settings = {"api": "0.0.0.0:0", "api_token": "secret"}
    async with make_node("a", web=True, **settings) as node, httpx.AsyncClient() as client:
        for headers, status in (
            ({}, 401),
            ({"authorization": "Bearer wrong"}, 401),
            ({"authorization": "secret"}, 401),
            ({"authorization": "Bearer secret"}, 200),
        ):
            for path in ("/v1/models", "/metrics"):
                answer = await client.get(base_of(node) + path, headers=headers)
                assert answer.status_code == status
                if status == 401:
                    assert answer.json()["error"]["code"] == "invalid_api_key"


async def test_a_web_page_cannot_reach_in_by_a_name_of_its_own(make_node: NodeMaker) -> None:
    async with make_node("a", web=True) as node, httpx.AsyncClient() as client:
        for host, status in (("evil.example:4810", 403), ("localhost:4810", 200), ("127.0.0.1", 200)):
            answer = await client.get(f"{node.api}/models", headers={"host": host})
            assert answer.status_code == status, host


async def test_control_wants_the_token_of_the_home(make_node: NodeMaker) -> None:
    async with make_node("a", web=True) as node:
        path = node.config.home / "api.json"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        status = await aside(lambda: Client(node.config.home).get("status"))
        assert status["peer"] == node.host.peer_id
        async with httpx.AsyncClient() as client:
            for headers in ({}, {"authorization": "Bearer " + "0" * 48}):
                answer = await client.get(f"{base_of(node)}/control/status", headers=headers)
                assert answer.status_code == 401
        home = node.config.home
    assert not path.exists()
    with pytest.raises(NotRunning, match="mycel up"):
        await aside(lambda: Client(home).get("status"))


async def test_control_says_what_is_wrong(make_node: NodeMaker) -> None:
    async with make_node("a", web=True) as node:
        control = Client(node.config.home)
        for path, body, text in (
            ("ticket", {"role": "king"}, "submit, member, admin"),
            ("ticket", {"rolle": "member"}, "unknown field `rolle`"),
            ("serve", {"model": "/nowhere"}, "/nowhere"),
            ("generate", {"model": "no", "prompt": "a"}, "no"),
            ("generate", {"model": "no"}, "prompt or messages"),
            ("nothing", {}, "/control/nothing"),
        ):
            with pytest.raises(ControlError, match=text):
                await aside(lambda path=path, body=body: control.post(path, body))


async def test_a_generation_over_control_streams_and_reports(make_node: NodeMaker, byte_model: Path) -> None:
    async with make_node("a", web=True) as node:
        await node.serve(str(byte_model), None)
        ask = {"model": "tiny", "prompt": "ab", "max_tokens": 8}
        lines = await aside(lambda: list(Client(node.config.home).lines("generate", ask)))
        assert "".join(line.get("text", "") for line in lines) == await text_of(node, "ab", 8)
        report = lines[-1]["report"]
        assert (report["tokens"], report["finish"]) == (8, "length")
        assert lines[-1]["labels"] == {node.host.peer_id: "a"}


async def test_metrics_count_what_happened(
    make_node: NodeMaker, ticket_of: TicketOf, byte_model: Path, wait_until: WaitUntil
) -> None:
    async with make_node("a", web=True) as node, make_node("b", ticket=ticket_of(node)):
        await node.serve(str(byte_model), None)
        await wait_until(lambda: len(node.host.peers) == 1)
        answer = await post(node, "completions", {"model": "tiny", "prompt": "ab", "max_tokens": 7})
        assert answer.status_code == 200
        await wait_until(lambda: node.tally.generations == 1)  # it is counted once it is cleared away
        async with httpx.AsyncClient() as client:
            text = (await client.get(f"{base_of(node)}/metrics")).text
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert values['mycel_peers{role="member"}'] == "1"
        assert int(values['mycel_calls_total{method="mesh.peers"}']) >= 1
        assert values["mycel_tokens_total"] == "7"
        assert values["mycel_generations_total"] == "1"
        assert int(values["mycel_rows_computed_total"]) == 2 + 6
        assert values["mycel_worker_losses_total"] == "0"
        assert values['mycel_reach{verdict="local"}'] == "1"
        assert values['mycel_reach{verdict="public"}'] == "0"
        assert values["mycel_relay_reservations"] == values["mycel_relay_bytes_total"] == "0"
        assert "# TYPE mycel_tokens_total counter" in text


async def test_the_port_of_last_time_is_taken_again(make_node: NodeMaker) -> None:
    async with make_node("a", web=True) as node:
        api = node.api
    async with make_node("a", web=True) as node:
        assert node.api == api


async def test_stopping_over_control_ends_the_node(make_node: NodeMaker) -> None:
    async with make_node("a", web=True) as node:
        await aside(lambda: Client(node.config.home).post("stop", {}))
        with trio.fail_after(10):
            await node.ended.wait()


def test_a_file_that_is_no_api_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "api.json").write_text(json.dumps({"url": 3}))
    with pytest.raises(ControlError, match=r"api\.json"):
        Client(tmp_path).get("status")
