"""`python -m modeling_xlstm serve`: Transformers' own server with a model of this package, and two clients at once."""

import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import transformers
import uvicorn
from models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cli.serving import server as transformers_server

import modeling_xlstm.__main__
from modeling_xlstm import XLSTMForCausalLM


ROOT = Path(__file__).parents[1]
DEMO = ROOT / "checkpoints" / "xlstm-demo"
PAGE = (ROOT / "notebooks" / "generation.md").read_text(encoding="utf-8")
COMMAND = shlex.split(re.search(r"^python (-m modeling_xlstm serve .*)$", PAGE, re.MULTILINE)[1])  # type: ignore[index]
REQUEST = json.loads(re.search(r"^curl .*/v1/completions .*'(.*)'$", PAGE, re.MULTILINE)[1])  # type: ignore[index]
PROMPTS = ("My lord,", "The function returns")
TOKENS = 16
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
CHAT = [{"role": "user", "content": PROMPTS[1]}]


class Server:
    """The command of the page in a process of its own, and what its clients do."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = free.getsockname()[1]
        self.log = folder / "server.log"
        command = [sys.executable, *COMMAND, "--device", "cpu", "--port", str(self.port)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)

    def request(self, method: str, path: str, body: Any = b"") -> tuple[http.client.HTTPConnection, Any]:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("localhost", self.port, timeout=60)
        connection.request(method, path, content, {"Content-Type": "application/json"})
        return connection, connection.getresponse()

    def is_healthy(self) -> bool:
        try:
            connection, response = self.request("GET", "/health")
        except ConnectionRefusedError:
            return False
        connection.close()
        return response.status == 200

    def wait(self) -> None:
        end = time.monotonic() + 120
        while not self.is_healthy():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.1)

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and answer, of a stream the list of its events."""
        connection, response = self.request("POST", path, body)
        text = response.read().decode()
        connection.close()
        if response.getheader("Content-Type", "").startswith("text/event-stream"):
            return response.status, [json.loads(event) for event in re.findall(r"^data: (.*)$", text, re.MULTILINE)]
        return response.status, json.loads(text)

    def complete(self, prompt: str, **fields: Any) -> str:
        status, answer = self.post("/v1/completions", {"prompt": prompt, "max_tokens": TOKENS, **fields})
        assert status == 200, answer
        return "".join(event["choices"][0]["text"] for event in (answer if isinstance(answer, list) else [answer]))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    """A server of the demo, which for these tests has a chat template."""
    folder = tmp_path_factory.mktemp("serve")
    shutil.copytree(DEMO, folder / "checkpoints" / "xlstm-demo")
    (folder / "checkpoints" / "xlstm-demo" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    server = Server(folder)
    try:
        server.wait()
        yield server
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == -signal.SIGTERM
        assert "Application shutdown complete." in server.log.read_text()
    finally:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    """What the model writes after each prompt without a server."""
    model: Any = AutoModelForCausalLM.from_pretrained(DEMO, dtype="float32")
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO)
    texts = {}
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        texts[prompt] = tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert texts[PROMPTS[0]] != texts[PROMPTS[1]]
    return texts


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_two_clients_at_once_get_the_text_that_generate_writes(server, expected, stream):
    start = threading.Barrier(2, timeout=60)

    def client(prompt: str) -> list[str]:
        start.wait()
        return [server.complete(prompt, stream=stream) for _ in range(2)]

    with ThreadPoolExecutor(2) as clients:
        assert list(clients.map(client, PROMPTS)) == [[expected[prompt]] * 2 for prompt in PROMPTS]


def test_a_stream_comes_in_pieces_and_ends_with_its_length(server):
    _, events = server.post("/v1/completions", {"prompt": PROMPTS[0], "stream": True, "max_tokens": TOKENS})
    assert len(events) > TOKENS // 2
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert events[-1]["usage"]["completion_tokens"] == TOKENS


def test_a_client_that_leaves_in_the_middle_does_not_hold_up_the_other(server, expected):
    endless = {"prompt": PROMPTS[0], "max_tokens": 1_000_000, "stream": True}
    connection, response = server.request("POST", "/v1/completions", endless)
    assert response.status == 200
    assert response.readline().startswith(b"data: ")
    with ThreadPoolExecutor(1) as clients:
        other = clients.submit(server.complete, PROMPTS[1], stream=True)
        time.sleep(0.5)
        assert not other.done()  # one text after the other
        response.close()
        connection.close()
        assert other.result(60) == expected[PROMPTS[1]]


@pytest.mark.parametrize(
    "path, body, status, sentence",
    [
        ("/v1/completions", {"prompt": "a", "model": "nowhere"}, 400, "requested 'nowhere'"),
        ("/v1/completions", {"prompt": "a", "nonsense": 1}, 422, "Unexpected fields in the request: {'nonsense'}"),
        ("/v1/completions", {"prompt": ["a", "b"]}, 400, "prompt must be a string"),
        ("/v1/completions", b"{", 422, "JSON decode error"),
        ("/v1/nowhere", {}, 404, "Not Found"),
    ],
)
def test_a_bad_request_is_refused_in_a_sentence_and_the_server_lives(server, expected, path, body, status, sentence):
    refused, answer = server.post(path, body)
    assert refused == status
    assert sentence in str(answer)
    assert expected[PROMPTS[0]].startswith(server.complete(PROMPTS[0], max_tokens=4))


def test_what_generate_refuses_ends_its_stream_with_the_reason_and_the_server_lives(server, expected):
    _, events = server.post("/v1/completions", {"prompt": PROMPTS[0], "max_tokens": 0, "stream": True})
    assert events == [{"error": "`max_new_tokens` must be greater than 0, but is 0."}]
    assert expected[PROMPTS[0]].startswith(server.complete(PROMPTS[0], max_tokens=4))


def test_a_chat_continues_what_the_template_makes_of_it(server, expected):
    status, answer = server.post("/v1/chat/completions", {"messages": CHAT, "max_tokens": TOKENS})
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == expected[PROMPTS[1]]
    _, events = server.post("/v1/chat/completions", {"messages": CHAT, "stream": True, "max_tokens": TOKENS})
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == expected[PROMPTS[1]]
    status, answer = server.post("/v1/responses", {"input": PROMPTS[1], "max_output_tokens": TOKENS, "stream": False})
    assert status == 200
    assert answer["output"][0]["content"][0]["text"] == expected[PROMPTS[1]]


def test_the_request_of_the_readme_is_answered(server, expected):
    assert server.complete(**REQUEST | {"max_tokens": TOKENS}) == expected[REQUEST["prompt"]]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_command_of_the_page_streams_a_text(server):
    line = re.search(r"^curl .*$", PAGE, re.MULTILINE)[0].replace("localhost:8000", f"localhost:{server.port}")
    printed = subprocess.run(shlex.split(line), capture_output=True, text=True, check=True).stdout
    assert printed.startswith("data: {")
    assert '"text"' in printed


@pytest.fixture
def serve(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """Runs the command in this process, up to where it would wait for requests: exit code, its models and output."""
    managers: list[Any] = []
    build_server = transformers_server.build_server

    def build(manager: Any, *args: Any, **kwargs: Any) -> Any:
        managers.append(manager)
        return build_server(manager, *args, **kwargs)

    monkeypatch.setattr(transformers_server, "build_server", build)
    monkeypatch.setattr(uvicorn.Server, "run", lambda server: None)
    monkeypatch.setattr(transformers, "XLSTMForCausalLM", None, raising=False)  # removes it afterwards
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def loaded() -> list[Any]:
        return [timed.model for manager in managers for timed in manager.loaded_models.values()]

    def call(*options: object) -> tuple[Any, list[Any], str, str]:
        code: Any
        try:
            code = modeling_xlstm.__main__.main(["serve", "--port", "0", *map(str, options)])
        except SystemExit as stop:
            code = stop.code
        return code, loaded(), *capsys.readouterr()

    return call


@pytest.mark.parametrize("original_format", [False, True], ids=["ours", "Transformers' own xLSTM"])
def test_checkpoints_are_served_by_the_classes_of_this_package(serve, tmp_path, original_format):
    tiny_model(vocab_size=4096).save_pretrained(tmp_path, save_original_format=original_format)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(tmp_path)
    code, models, _, err = serve(tmp_path, "--device", "cpu")
    assert code == 0, err
    assert [type(model) for model in models] == [XLSTMForCausalLM]


def test_options_are_those_of_transformers(serve):
    code, _, out, _ = serve("--help")
    assert code == 0
    assert out.startswith("Usage: python -m modeling_xlstm serve [OPTIONS]")
    assert "--model-timeout" in out
    code, _, _, err = serve("--nonsense")
    assert code == 2
    assert "No such option: --nonsense" in err


@pytest.mark.parametrize(
    "options, sentence",
    [
        (("no/such/folder",), "error: The server cannot start with no/such/folder, which is no directory here: "),
        ((ROOT / "README.md",), f"error: The model must be a directory, got {ROOT / 'README.md'}, which is not one."),
        ((ROOT / "tests",), f"error: {ROOT / 'tests'} must hold the config.json of an xLSTM: "),
        ((DEMO, "--dtype", "float33"), "error: The server cannot start: Unsupported dtype: 'float33'"),
        ((DEMO, "--log-level", "loud"), "error: The server cannot start: there is no 'loud'"),
        ((DEMO, "--port", "99999999"), "error: The server cannot listen on port 99999999 of localhost: bind(): port "),
        ((DEMO, "--port", "9" * 30), f"error: The server cannot listen on port {'9' * 30} of localhost: "),
        ((DEMO, "--host", "ä" * 99), f"error: The server cannot listen on port 0 of {'ä' * 99}: "),
        ((DEMO, "--continuous-batching"), "error: Continuous batching pages the keys and values of attention"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_sentence(serve, options, sentence):
    code, models, out, err = serve(*options)
    assert code == 1
    assert not models
    assert out == ""
    assert err.splitlines()[-1].startswith(sentence)
    assert "Traceback" not in err


def test_a_port_in_use_is_refused_before_a_model_is_loaded(serve):
    with socket.create_server(("localhost", 0)) as used:
        port = used.getsockname()[1]
        code, models, _, err = serve(DEMO, "--port", port)
    assert code == 1
    assert not models
    assert err.startswith(f"error: The server cannot listen on port {port} of localhost: ")
    assert "in use" in err


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_models_may_be_left_to_the_requests(serve, host):
    assert serve("--host", host) == (0, [], "", "")


def test_without_its_packages_the_server_says_how_to_install_them(serve, monkeypatch):
    monkeypatch.setattr(modeling_xlstm.__main__, "is_serve_available", lambda: False)
    code, _, _, err = serve(DEMO)
    assert code == 1
    assert err == "error: The server needs packages that are missing: pip install 'transformers[serving]'.\n"
