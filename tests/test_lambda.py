"""The HTTP API behind the WSGI adapters of AWS Lambda, with events as AWS documents
them."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from typing import Any, Callable
from urllib.parse import parse_qsl, quote, urljoin

import pytest

import mcpool
import memchunk
import wsgi
from tests.support import Memcached, snippet

# bytes that fit, as base64 and with the rest of the event, in Lambda's 6 MB
LIMIT = 4_500_000

Handler = Callable[[Any, Any], Any]


def documented(adapter: str, application: wsgi.Application) -> Handler:
    """What docs/lambda.md shows for an adapter, with an application of ours."""
    code = snippet("docs/lambda.md", adapter).replace(
        "from wsgi import application\n", ""
    )
    names: dict[str, Any] = {"application": application}
    exec(code, names)
    handler: Handler = names["handler"]
    return handler


def encoded(body: bytes) -> dict[str, Any]:
    return {
        "body": base64.b64encode(body).decode() if body else None,
        "isBase64Encoded": bool(body),
    }


def rest_event(
    method: str, path: str, query: str, headers: dict[str, str], body: bytes
) -> Any:
    """API Gateway, REST API: payload format 1.0. There is no Content-Length in
    these."""
    values = dict(parse_qsl(query))
    return {
        "resource": "/{proxy+}",
        "path": path,
        "httpMethod": method,
        "headers": headers,
        "multiValueHeaders": {key: [value] for key, value in headers.items()},
        "queryStringParameters": values or None,
        "multiValueQueryStringParameters": {
            key: [value] for key, value in values.items()
        }
        or None,
        "pathParameters": {"proxy": path.lstrip("/")},
        "stageVariables": None,
        "requestContext": {
            "resourcePath": "/{proxy+}",
            "httpMethod": method,
            "path": "/prod" + path,
            "stage": "prod",
            "identity": {"sourceIp": "192.0.2.1"},
        },
        **encoded(body),
    }


def http_event(
    method: str, path: str, query: str, headers: dict[str, str], body: bytes
) -> Any:
    """API Gateway, HTTP API, and function URL: payload format 2.0."""
    headers = {key.lower(): value for key, value in headers.items()}
    headers["content-length"] = str(len(body))
    event = {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": path,
        "rawQueryString": query,
        "headers": headers,
        "requestContext": {
            "accountId": "anonymous",
            "apiId": "id",
            "domainName": "id.lambda-url.us-west-2.on.aws",
            "http": {
                "method": method,
                "path": path,
                "protocol": "HTTP/1.1",
                "sourceIp": "192.0.2.1",
                "userAgent": "test",
            },
            "stage": "$default",
        },
        **encoded(body),
    }
    return {key: value for key, value in event.items() if value is not None}


def balancer_event(
    method: str, path: str, query: str, headers: dict[str, str], body: bytes
) -> Any:
    """Application Load Balancer: the query is passed as it came, encoded."""
    pairs = [pair.partition("=") for pair in query.split("&") if pair]
    return {
        "requestContext": {
            "elb": {"targetGroupArn": "arn:aws:elasticloadbalancing:x:1:targetgroup/y"}
        },
        "httpMethod": method,
        "path": path,
        "queryStringParameters": {key: value for key, _, value in pairs},
        "headers": {
            **{key.lower(): value for key, value in headers.items()},
            "content-length": str(len(body)),
            "x-forwarded-for": "192.0.2.1",
            "x-forwarded-port": "443",
            "x-forwarded-proto": "https",
        },
        "body": base64.b64encode(body).decode(),
        "isBase64Encoded": bool(body),
    }


class Client:
    """Calls a handler as Lambda does, and reads its answer as the gateway in front
    does."""

    def __init__(self, handler: Handler, event: Callable[..., Any]) -> None:
        self._handler, self.event = handler, event

    def __call__(
        self, method: str, path: str, body: bytes = b"", query: str = "", **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        names = {key.replace("_", "-"): value for key, value in headers.items()}
        sent = {
            "Host": "example.com",
            "Accept": "*/*",
            "X-Forwarded-Proto": "https",
            **names,
        }
        answer = self._handler(self.event(method, path, query, sent, body), None)
        received = {
            key.lower(): value for key, value in (answer.get("headers") or {}).items()
        }
        for key, values in (answer.get("multiValueHeaders") or {}).items():
            received[key.lower()] = ",".join(values)
        data = answer.get("body") or ""
        if answer.get("isBase64Encoded"):
            return answer["statusCode"], received, base64.b64decode(data)
        return answer["statusCode"], received, data.encode()


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Iterator[wsgi.Application]:
    memcached = Memcached(tmp_path_factory.mktemp("m"))
    settings = wsgi.Settings(max_response=LIMIT)
    with memchunk.FileCache(mcpool.connect(memcached.server)) as cache:
        yield wsgi.Application(cache, settings)
    memcached.kill()


@pytest.fixture(params=["apig-wsgi", "serverless-wsgi", "mangum"])
def adapter(request: Any, application: wsgi.Application) -> Handler:
    return documented(request.param, application)


@pytest.fixture(params=[rest_event, http_event, balancer_event])
def client(request: Any, adapter: Handler) -> Client:
    return Client(adapter, request.param)


def test_binary_up_and_down(client: Client) -> None:
    data = os.urandom(LIMIT)
    for content_type in (
        "application/octet-stream",
        "text/plain",
        "application/json",
        "image/svg+xml",
    ):
        for body in (b"", b"x", bytes(range(256)) * 4, data):
            status, headers, _ = client(
                "PUT", "/files/a", body, content_type=content_type
            )
            assert status in (200, 201)
            read, got, received = client("GET", "/files/a")
            assert (read, received == body) == (200, True)
            assert got["content-type"] == content_type
            assert got["etag"] == headers["etag"]
            assert len(base64.b64encode(received)) + 1000 < 6 * 1024 * 1024


def test_a_form(client: Client) -> None:
    data = bytes(range(256)) * 1000
    body = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.bin"\r\n'
        b"Content-Type: image/png\r\n\r\n" + data + b"\r\n--b--\r\n"
    )
    status, headers, answer = client(
        "POST",
        "/files",
        body,
        "expire=60",
        content_type="multipart/form-data; boundary=b",
    )
    assert status == 201, answer
    url = urljoin("https://example.com/prod/files", headers["location"])
    assert url.startswith("https://example.com/prod/files/")  # API Gateway's stage
    assert client("GET", url.replace("https://example.com/prod", ""))[2] == data


def test_the_other_methods(client: Client) -> None:
    client("PUT", "/files/b", b"0123456789")
    status, headers, data = client("HEAD", "/files/b")
    assert (status, headers["content-length"], data) == (200, "10", b"")
    status, headers, data = client("GET", "/files/b", range="bytes=2-4")
    assert (status, headers["content-range"], data) == (206, "bytes 2-4/10", b"234")
    assert client("GET", "/files/b", if_none_match=headers["etag"])[0] == 304
    assert client("DELETE", "/files/b")[0] == 204
    status, headers, data = client("GET", "/files/b")
    assert (status, headers["content-type"]) == (404, "application/problem+json")
    assert b"No such file" in data
    assert client("GET", "/")[0] == client("GET", "/readyz")[0] == 200
    assert client("GET", "/files/b", accept="text/html")[1]["content-type"].startswith(
        "text/html"
    )


def test_more_than_one_answer_carries(
    client: Client, application: wsgi.Application
) -> None:
    data = os.urandom(3 * LIMIT - 1)
    application.cache.set("big", data)
    status, headers, answer = client("GET", "/files/big")
    assert status == 403
    assert b"Range: bytes=0-" in answer
    received = b""
    while len(received) < len(data):
        status, headers, part = client(
            "GET", "/files/big", range=f"bytes={len(received)}-"
        )
        assert status == 206
        assert 0 < len(part) <= LIMIT
        assert headers["content-range"].startswith(f"bytes {len(received)}-")
        received += part
    assert received == data


@pytest.mark.parametrize("name", ["folder/caf\u00e9 \u4f60.txt", "a%20b %", "a?b#c+d"])
def test_names(client: Client, name: str) -> None:
    status, _, answer = client("PUT", "/files/" + quote(name), name.encode())
    assert status in (200, 201), answer
    assert json.loads(answer)["name"] == name
    assert client("GET", "/files/" + quote(name))[2] == name.encode()


def test_names_that_an_http_api_has_decoded(adapter: Handler) -> None:
    """AWS does so with payload 2.0, not with the others. Adapters decode once more."""
    client = Client(adapter, http_event)
    for path, name in (("a b", "a b"), ("100%", "100%"), ("a%20b", "a b")):
        answer = client("PUT", f"/files/{path}", b"x")[2]
        assert json.loads(answer)["name"] == name
