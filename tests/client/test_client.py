"""The client with a server that works: calls, order, encoding, settings."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import polar_ft
from polar_ft.client import RewardModelClient, RewardServerError
from polar_ft.client.encoded_text import EncodedText
from polar_ft.errors import PolarError
from polar_ft.reward_scale import RewardScale
from polar_ft.template import PolarTemplate
from tests import tokenizers_zoo
from tests.client.conftest import make_data
from tests.client.fake_server import FakeServer, reward_of
from tests.encoding import encode, ids_of

ENGINES = ("sglang", "vllm", "lmdeploy", "polar_ft")


def expected(template: PolarTemplate, data: list[dict]) -> list[float]:
    """The right rewards: one at a time, with the template alone."""

    def text(value: str | list[dict]) -> str:
        return value if isinstance(value, str) else "\n".join(message["content"] for message in value)

    rewards = []
    for row in data:
        fields = (text(row["prompt"]), text(row["reference"]), [text(row["output"])])
        encoded = encode(template, *fields, wrapper=row.get("wrapper", "sft"))
        rewards.append(reward_of(ids_of(encoded)[0]))
    return rewards


@pytest.mark.parametrize("engine", ENGINES)
def test_rewards_in_order(serve, connect, template, data, engine):
    client = connect(serve(engine))
    assert client(data) == pytest.approx(expected(template, data), abs=0)


@pytest.mark.parametrize("engine", ["sglang", "vllm", "lmdeploy"])
def test_published_calls(serve, connect, template, data, engine):
    """encode, then the call named after the engine."""
    client = connect(serve(engine), server_type=engine)
    encoded = client.encode(data)
    assert all(isinstance(text, str) for text in encoded)
    call = getattr(client, f"{engine}_request_reward")
    assert call(encoded) == call(encoded, retry_delay=0.1, max_retries=2) == expected(template, data)


def test_published_constructor():
    """Names and order of xtuner 0.2.0's `RewardModelClient.__init__`, for positional calls."""
    parameters = list(inspect.signature(RewardModelClient).parameters.values())
    published = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert published == [
        "path",
        "max_length",
        "max_response_length",
        "response_cut_side",
        "server_type",
        "server_address",
    ]


def test_spelling_is_the_published_one(connect, serve):
    """As xtuner 0.2.0's `_encode` spells it, by hand."""
    client = connect(serve())
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    row = {"prompt": messages, "reference": "4", "output": "four"}
    text = client.encode(row)
    assert text == "Be brief.\n2 + 2?\n4<|reward|>Be brief.\n2 + 2?\nfour[UNUSED_TOKEN_130]"
    # A pass-through: what is encoded already stays.
    assert client.encode([text])[0].ids == text.ids
    pretrain = client.encode({**row, "prompt": "2 + 2 = ", "wrapper": "pretrain"})
    assert pretrain == "2 + 2 = 4<|reward|>2 + 2 = four[UNUSED_TOKEN_130]"
    # One token a byte, BOS in front, two control tokens in place of their spelling.
    spelled = len(text.encode()) - len("<|reward|>[UNUSED_TOKEN_130]")
    assert len(text.ids) == 1 + spelled + 2


def test_ids_are_those_of_the_template(connect, serve, template):
    client = connect(serve())
    ids = client.encode({"prompt": "p", "reference": "", "output": "<|reward|>[UNUSED_TOKEN_130]"}).ids
    assert ids == ids_of(encode(template, "p", "", ["<|reward|>[UNUSED_TOKEN_130]"]))[0]
    # What a text spells is no control token: there is one of each.
    assert ids.count(template.separator_id) == ids.count(template.reward_token_id) == 1


@pytest.mark.parametrize("kind", tokenizers_zoo.KINDS)
def test_spelling_gives_the_same_ids_to_the_models_own_tokenizer(tmp_path, kind):
    """As the published transformers quick start does: tokenizer(client.encode(data))."""
    transformers = pytest.importorskip("transformers")
    tokenizers_zoo.save(tokenizers_zoo.train(kind), tmp_path)
    client = RewardModelClient(tmp_path, max_length=300, max_response_length=20)
    # Characters of the zoo's corpus alone: its byte tokens are added tokens, which real tokenizers' are not.
    question = {"prompt": "What is the capital of France?", "reference": "Paris."}
    long = {"prompt": "the quick brown fox. " * 30, "reference": "reward " * 40, "output": "jumps " * 40}
    rows = [{**question, "output": output} for output in ("Paris", "Japan.", "", "中文文本", " and again")]
    texts = client.encode([*rows, long, {**long, "wrapper": "pretrain"}])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(texts)["input_ids"] == [text.ids for text in texts]


def test_stored_strings_are_tokenized_as_an_engine_would(connect, serve, template, data):
    client = connect(serve())
    stored = [str(text) for text in client.encode(data)]
    assert not isinstance(stored[0], EncodedText)
    assert client(stored) == expected(template, data)
    assert client([stored[0], data[1]]) == expected(template, data[:2])


@pytest.mark.parametrize(
    "text",
    [
        "no template at all",
        "a<|reward|>b",
        "a[UNUSED_TOKEN_130]",
        "a<|reward|>b<|reward|>c[UNUSED_TOKEN_130]",
    ],
)
def test_strings_that_are_no_input_are_refused(connect, serve, text):
    with pytest.raises(PolarError, match=r"data\[1\]: is no encoded text"):
        connect(serve())([{"prompt": "p", "reference": "r", "output": "o"}, text])


def test_one_element_and_none(connect, serve, data, template):
    server = serve()
    client = connect(server)
    assert client([]) == []
    assert server.bodies == []
    assert client(data[0]) == expected(template, data[:1])
    assert client(row for row in data) == expected(template, data)


def test_cut_as_in_training_and_reported(serve, connect, template, tokenizer_dir, caplog):
    """A response is cut on the right; 30 tokens, BOS counted, are 29 bytes."""
    client = connect(serve(), max_length=300, max_response_length=30)
    row = {"prompt": "p", "reference": "r" * 50, "output": "abc" + "o" * 50}
    tight = PolarTemplate.from_pretrained(tokenizer_dir, max_length=300, max_response_length=30)
    with caplog.at_level(logging.WARNING, "polar_ft.client"):
        assert client([row, {**row, "reference": "", "output": ""}]) == expected(
            tight, [row, {**row, "reference": "", "output": ""}]
        )
    assert "1 of 2 inputs were cut" in caplog.text
    assert row["reference"] not in caplog.text
    assert client.encode(row) == f"p\n{'r' * 29}<|reward|>p\nabc{'o' * 26}[UNUSED_TOKEN_130]"


def test_left_cut_is_refused_with_the_reason(tokenizer_dir):
    with pytest.raises(PolarError, match="training cuts a response on the right"):
        RewardModelClient(tokenizer_dir, response_cut_side="left")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"server_type": "tgi"}, "server_type='tgi'"),
        ({"server_address": ""}, "names no server"),
        ({"server_address": "a:1,a:1"}, "names a:1 twice"),
        ({"server_address": "ftp://a:1"}, "is no address"),
        ({"server_address": "host:99999"}, "is no address"),
        ({"timeout": 0}, "timeout=0"),
        ({"max_retries": True}, "max_retries=True"),
        ({"max_length": 10}, "max_length=10 leaves no room"),
    ],
)
def test_wrong_settings(tokenizer_dir, settings, message):
    with pytest.raises(PolarError, match=message):
        RewardModelClient(tokenizer_dir, **settings)


def test_no_secret_in_an_error(tokenizer_dir):
    for settings in ({"server_address": "http://me:secret@host:1"}, {"api_key": "sec\nret"}):
        with pytest.raises(PolarError) as caught:
            RewardModelClient(tokenizer_dir, **settings)
        assert "sec" not in str(caught.value).replace("server", "")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "output": "o"}, r"data\[1\]\.reference"),
        ({"prompt": 7, "reference": "r", "output": "o"}, r"data\[1\]\.prompt"),
        (["p", "r", "o"], r"data\[1\]"),
    ],
)
def test_wrong_data_is_named(connect, serve, row, message):
    with pytest.raises(PolarError, match=message):
        connect(serve())([{"prompt": "p", "reference": "r", "output": "o"}, row])


def test_element_that_does_not_fit_is_named(connect, serve):
    client = connect(serve(), max_length=132, max_response_length=64)
    with pytest.raises(PolarError, match=r"data\[1\]: a reference of 64 tokens"):
        client(
            [
                {"prompt": "p", "reference": "", "output": ""},
                {"prompt": "p", "reference": "r" * 99, "output": ""},
            ]
        )


def test_requests_are_cut_by_tokens_and_sent_at_once(serve, connect, template, data):
    gate = threading.Barrier(4, timeout=10)

    def wait_for_others(number: int, rewards: list[float]) -> None:
        if number < 4:
            gate.wait()

    server = serve("sglang", wait_for_others)
    client = connect(server, tokens_per_request=200, concurrency=4)
    assert client(data) == expected(template, data)
    assert server.most_at_once == 4
    # Every request but that of one input keeps to the limit.
    sizes = [[len(ids) for ids in body["input_ids"]] for body in server.bodies[1:]]
    assert len(sizes) > 4
    assert all(sum(lengths) <= 200 or len(lengths) == 1 for lengths in sizes)
    assert sorted(server.scored) == sorted(text.ids for text in client.encode(data))


def test_many_windows_keep_the_order(serve, connect, template):
    """More elements than are encoded at once."""
    data = make_data(2500)
    assert connect(serve("sglang"))(data) == expected(template, data)


@pytest.mark.parametrize("wrong", [{"prompt": "p"}, "no template", {"reference": "r" * 99}])
def test_an_element_of_a_later_window_is_named(serve, connect, monkeypatch, wrong):
    """A dict without a field, a string that is no input, and a reference that leaves no room."""
    monkeypatch.setattr("polar_ft.client.client.ELEMENTS_AT_ONCE", 2)
    client = connect(serve(), max_length=132, max_response_length=64)
    good = {"prompt": "p", "reference": "r", "output": "o"}
    last = {**good, **wrong} if "reference" in wrong else wrong
    with pytest.raises(PolarError, match=r"data\[4\]"):
        client([good, str(client.encode(good)), good, good, last])


def test_load_goes_to_all_servers(serve, connect, template):
    """Each server's first request waits until every server has one."""
    data = make_data(300)
    all_busy = threading.Barrier(3, timeout=20)

    def wait_for_others(number: int, rewards: list[float]) -> None:
        if number == 0:
            all_busy.wait()

    servers = [serve(engine, wait_for_others) for engine in ("sglang", "vllm", "lmdeploy")]
    assert connect(*servers, tokens_per_request=500, concurrency=1, timeout=30.0)(data) == expected(
        template, data
    )
    assert not all_busy.broken


def test_async_and_threads(serve, connect, template, data):
    client = connect(serve())

    async def two_at_once() -> list[list[float]]:
        return await asyncio.gather(client.score_async(data), client.score_async(data[:4]))

    right = expected(template, data)
    assert asyncio.run(two_at_once()) == [right, right[:4]]
    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(client, [data] * 6)) == [right] * 6


def test_in_a_running_loop(serve, connect, template, data):
    """As in a notebook, where the cell is run by a loop that a call must not wait on."""
    client = connect(serve())

    async def cell() -> list[float]:
        return client(data)

    assert asyncio.run(cell()) == expected(template, data)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("parallel", [None, "true"])
def test_a_forked_process_has_connections_and_threads_of_its_own(serve, template, data, tmp_path, parallel):
    """In a process of its own: one with the threads of a test runner cannot be forked safely."""
    (tmp_path / "tokenizer.json").write_text(template.tokenizer_json, encoding="utf-8")
    script = (
        "import faulthandler, json, os, signal, sys\n"
        "faulthandler.register(signal.SIGALRM, chain=True)  # a process that hangs says where\n"
        "signal.alarm(60)\n"
        "from polar_ft import RewardModelClient\n"
        "path, address, data, right = (json.loads(text) for text in sys.argv[1:])\n"
        "client = RewardModelClient(path, server_address=address)\n"
        "assert client(data) == right\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(30)\n"
        "    os._exit(0 if client(data) == right else 1)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
        "assert client(data) == right\n"
    )
    arguments = [str(tmp_path), serve().address, data, expected(template, data)]
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    if parallel is not None:
        environment["TOKENIZERS_PARALLELISM"] = parallel
    command = [sys.executable, "-c", script, *map(json.dumps, arguments)]
    subprocess.run(command, env=environment, check=True, timeout=120)


def test_scale_only_where_asked_for(serve, template, data, tmp_path):
    """(reward - centre) / spread, by hand: centre -5, spread 2."""
    (tmp_path / "tokenizer.json").write_text(template.tokenizer_json, encoding="utf-8")
    server = serve()
    right = expected(template, data)
    with pytest.raises(PolarError, match="polar-ft calibrate"):
        RewardModelClient(tmp_path, server_address=server.address, scale=True)
    RewardScale(centre=-5.0, spread=2.0, within_spread=1.0).save(tmp_path)
    assert RewardModelClient(tmp_path, server_address=server.address)(data) == right
    scaled = RewardModelClient(tmp_path, server_address=server.address, scale=True)
    assert scaled(data) == [(reward + 5) / 2 for reward in right]
    assert asyncio.run(scaled.score_async(data[:2])) == [(reward + 5) / 2 for reward in right[:2]]


def test_closed_and_used_again(serve, connect, template, data):
    client = connect(serve())
    for _ in range(2):
        with client:
            assert client(data) == expected(template, data)


def test_key_from_argument_or_environment(serve, connect, data, monkeypatch):
    server = serve("sglang", key="k1")
    assert len(connect(server, api_key="k1\n")(data)) == len(data)
    monkeypatch.setenv("POLAR_API_KEY", "k1")
    assert len(connect(server)(data)) == len(data)


def test_no_proxy_for_this_machine(serve, connect, data, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert len(connect(serve())(data)) == len(data)


def test_error_can_cross_processes():
    error = pickle.loads(pickle.dumps(RewardServerError("a:1", "HTTP 401", 401)))
    assert (str(error), error.server, error.status) == ("a:1: HTTP 401", "a:1", 401)


def test_encoded_text_can_cross_processes(connect, serve, data):
    text = connect(serve()).encode(data[0])
    again = pickle.loads(pickle.dumps(text))
    assert (again, again.ids) == (text, text.ids)


def test_needs_no_torch(serve, tokenizer_dir, data, template):
    """In an environment without torch, transformers and xtuner the client is imported and gives rewards."""
    server: FakeServer = serve()
    script = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "xtuner", "mmengine", "pyarrow", "datasets"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
from polar_ft import RewardModelClient
print(RewardModelClient({str(tokenizer_dir)!r}, server_address={server.address!r})({data[:3]!r}))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.stdout.strip() == repr(expected(template, data[:3])), ended.stderr


def test_lazy_exports():
    assert polar_ft.RewardModelClient is RewardModelClient
    assert polar_ft.RewardServerError is RewardServerError
    assert {"RewardModelClient", "RewardScorer"} <= set(dir(polar_ft))
    with pytest.raises(AttributeError, match="RewardMdelClient"):
        _ = polar_ft.RewardMdelClient
