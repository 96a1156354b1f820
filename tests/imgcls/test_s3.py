"""Objects on a real S3 server, and through a proxy that hands them on badly."""

import errno
import random
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import aiohttp
import pytest
import torch
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError, create_parser
from botocore.session import Session
from fsspec.exceptions import FSTimeoutError
from s3fs.errors import translate_boto_error

from imgcls import s3 as s3_errors
from imgcls import storage
from imgcls.errors import MissingError, StorageError
from imgcls.remedies import remedy_for
from imgcls.runs import CheckpointFacts
from imgcls.s3 import S3
from imgcls.training.checkpoints import CheckpointStore
from sandbox.s3.proxy import FAULTS, Proxy, faulty
from sandbox.s3.server import READER, Server
from tests.conftest import ROOT, own_certificate, reached_by
from tests.processes import until

BODY = random.Random(0).randbytes(300_000)


@pytest.fixture
def url(s3: Server, request: pytest.FixtureRequest) -> Iterator[str]:
    with reached_by(s3.env()):
        yield f"s3://runs/{abs(hash(request.node.name))}"


@pytest.fixture
def proxied(s3: Server, url: str) -> Iterator[Proxy]:
    with faulty(s3.host, s3.port, fail=1.0, most=0) as proxy, reached_by(s3.env(port=proxy.port)):
        yield proxy


def test_objects_are_written_read_listed_moved_and_deleted(url: str):
    storage.write_bytes(f"{url}/a/one", b"1")
    storage.write_bytes(f"{url}/a/one", b"2")
    storage.write_bytes(f"{url}/a/b/two", BODY)
    assert storage.read_bytes(f"{url}/a/one") == b"2"
    assert (storage.files(f"{url}/a"), storage.folders(f"{url}/a")) == (["one"], ["b"])
    storage.move(f"{url}/a/b/two", f"{url}/a/three")
    assert storage.files(f"{url}/a") == ["one", "three"]
    assert storage.read_bytes(f"{url}/a/three") == BODY
    storage.delete(f"{url}/a")
    storage.delete(f"{url}/a")
    assert not storage.exists(f"{url}/a/one")
    assert storage.read_bytes_if_there(f"{url}/a/one") is None
    with pytest.raises(MissingError, match="does not exist"):
        storage.read_bytes(f"{url}/a/one")


def test_an_object_that_marks_a_folder_is_not_in_it(url: str):
    fs, path = storage._split(url)
    fs.pipe_file(f"{path}/folder/", b"")
    storage.write_bytes(f"{url}/folder/one", b"1")
    assert (storage.files(f"{url}/folder"), storage.folders(url)) == (["one"], ["folder"])
    storage.delete(f"{url}/folder/one")
    assert storage.files(f"{url}/folder") == []


def test_what_another_process_wrote_is_seen_at_once(url: str):
    assert storage.files(url) == []
    code = f"from imgcls import storage; storage.write_bytes('{url}/new', b'1')"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert storage.files(url) == ["new"]


def test_of_several_that_create_an_object_one_succeeds(url: str):
    made: list[bool] = []
    begin = threading.Barrier(8)

    def create(name: int) -> None:
        begin.wait()
        made.append(storage.create_bytes(f"{url}/one", b"%d" % name))

    threads = [threading.Thread(target=create, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False] * 7 + [True]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_survived_by_reads_and_writes(fault: str, url: str, proxied: Proxy):
    proxied.faults, proxied.stall_s = (fault,), 0.5
    for number, operation in enumerate(
        (
            lambda: storage.write_bytes(f"{url}/a", BODY),
            lambda: storage.read_bytes(f"{url}/a"),
            lambda: storage.create_bytes(f"{url}/new", b"mine"),
            lambda: storage.files(url),
        )
    ):
        proxied.passed.clear()
        proxied.most = 2
        found = operation()
        assert found == (None, BODY, True, ["a", "new"])[number]
        # A stall is waited for, and a listing is asked for twice; a write's answer has no body to be spoilt.
        of_the_body = fault in ("reset-body", "truncate", "short", "corrupt")
        expected = (1, 1, 1, 2) if fault == "stall" else (0, 2, 0, 2) if of_the_body else (2, 2, 2, 2)
        assert len(proxied.injected) == expected[number]
    assert storage.read_bytes(f"{url}/new") == b"mine"


def answer(status: int, code: str) -> Exception:
    """What s3fs raises for this answer of S3."""
    response = {"Error": {"Code": code, "Message": "the answer"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(boto.ClientError(response, "GetObject"))


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], list[str]]:
    """After `failing(error)` the first read raises it, the next ones succeed. The list names all reads."""

    def fail(error: Exception) -> list[str]:
        reads = list[str]()

        async def cat_file(fs: S3, path: str) -> bytes:
            reads.append(path)
            if len(reads) == 1:
                raise error
            return BODY

        monkeypatch.setattr(S3, "_cat_file", cat_file)
        return reads

    return fail


def damaged_listing() -> Exception:
    """What botocore raises for a listing of which one byte is another."""
    shape = Session().get_service_model("s3").operation_model("ListObjectsV2").output_shape
    body = b"<ListBucketResult><Contents><Key>a</Key><Size>1k</Size></Contents></ListBucketResult>"
    with pytest.raises(ValueError, match="1k") as raised:
        create_parser("rest-xml").parse({"status_code": 200, "headers": {}, "body": body}, shape)
    return raised.value


URL = {"endpoint_url": "http://store"}
TRANSIENT = (
    TimeoutError("late"),
    FSTimeoutError(),
    boto.ConnectTimeoutError(**URL),
    boto.ReadTimeoutError(**URL),
    ConnectionResetError(errno.ECONNRESET, "reset"),
    BrokenPipeError(errno.EPIPE, "broken"),
    ssl.SSLError(1, "bad record"),
    boto.EndpointConnectionError(**URL),
    boto.SSLError(**URL, error="bad record"),
    boto.ProxyConnectionError(proxy_url="http://proxy"),
    boto.ConnectionClosedError(**URL),
    boto.ResponseStreamingError(error="cut"),
    boto.HTTPClientError(error=aiohttp.ClientPayloadError("cut")),
    boto.HTTPClientError(error=ConnectionAbortedError(errno.ECONNABORTED, "aborted")),
    aiohttp.ServerDisconnectedError(),
    aiohttp.ClientOSError(errno.ECONNRESET, "reset"),
    aiohttp.ClientPayloadError("cut"),
    aiohttp.ClientResponseError(Mock(), (), message="bad status line"),
    boto.IncompleteReadError(actual_bytes=1, expected_bytes=2),
    boto.ChecksumError(checksum_type="crc32", expected_checksum="a", actual_checksum="b"),
    boto.FlexibleChecksumError(error_msg="Expected checksum a did not match calculated checksum: b"),
    ResponseParserError("no XML"),
    boto.CredentialRetrievalError(provider="role", error_msg="no answer"),
    RuntimeError("Credentials were refreshed, but the refreshed credentials are still expired."),
    *(OSError(number, "network") for number in sorted(s3_errors.BROKEN_NETWORK)),
    *(answer(status, "Any") for status in (408, 425, 429, 500, 502, 503, 504, 509, 520, 524)),
    boto.HTTPClientError(error=UnicodeDecodeError("utf-8", b"\xff", 0, 1, "a damaged header")),
    damaged_listing(),
    *(answer(400, code) for code in sorted(s3_errors.TRY_AGAIN)),
    answer(500, "InternalError"),
    answer(503, "SlowDown"),
    answer(400, "RequestTimeout"),
)


@pytest.mark.parametrize("error", TRANSIENT, ids=lambda error: type(error).__name__)
def test_each_kind_of_transient_error_is_retried(error: Exception, failing: Callable[[Exception], list[str]]):
    reads = failing(error)
    assert storage.read_bytes("s3://runs/a") == BODY
    assert len(reads) == 2


def test_the_transient_errors_of_the_test_are_all_kinds():
    assert not [kind for kind in s3_errors.TRANSIENT if not any(isinstance(e, kind) for e in TRANSIENT)]


@pytest.mark.parametrize(
    "error",
    [
        answer(403, "AccessDenied"),
        answer(404, "NoSuchKey"),
        answer(400, "InvalidArgument"),
        answer(412, "PreconditionFailed"),
        answer(501, "NotImplemented"),
        answer(507, "XMinioStorageFull"),
        OSError(errno.EINVAL, "invalid"),
        boto.NoCredentialsError(),
        boto.ParamValidationError(report="Invalid bucket name"),
        boto.HTTPClientError(error=FileNotFoundError(errno.ENOENT, "no such certificate")),
        boto.HTTPClientError(error=aiohttp.InvalidURL("http://[")),
    ],
    ids=repr,
)
def test_a_definite_answer_is_told_without_a_retry(error: Exception, failing: Callable[[Exception], list[str]]):
    reads = failing(error)
    with pytest.raises(StorageError, match=r"s3://runs/a (cannot be read|does not exist)"):
        storage.read_bytes("s3://runs/a")
    assert len(reads) == 1


@pytest.mark.parametrize(
    "error",
    [TypeError("fault"), KeyError("fault"), RuntimeError("fault"), boto.HTTPClientError(error=TypeError("fault"))],
    ids=repr,
)
def test_a_fault_in_code_is_raised_as_it_is_without_a_retry(error: Exception, failing: Callable[[Exception], list[str]]):
    reads = failing(error)
    with pytest.raises(type(error), match="fault"):
        storage.read_bytes("s3://runs/a")
    assert len(reads) == 1


NO_KEY = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"AWS_ENDPOINT_URL": "nonsense"}, r"Invalid endpoint: nonsense\n  do: .*AWS_ENDPOINT_URL"),
        ({"AWS_ENDPOINT_URL": "http://[x"}, "Invalid IPv6 URL"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:99999"}, "not a valid URI"),
        ({"AWS_ENDPOINT_URL": "https://127.0.0.1:1", "AWS_CA_BUNDLE": "/none"}, "No such file"),
        ({"AWS_PROFILE": "none"}, r"profile \(none\) could not be found"),
        ({"AWS_SECRET_ACCESS_KEY": ""}, "Partial credentials"),
        ({"AWS_DEFAULT_REGION": "no region!"}, "doesn't match a supported format"),
        ({**NO_KEY, "AWS_ROLE_ARN": "arn:aws:iam::1:role/x", "AWS_WEB_IDENTITY_TOKEN_FILE": "/none"}, "No such file.*/none"),
    ],
)
def test_a_wrong_configuration_is_told_without_a_retry(
    s3: Server, environment: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(storage, "PREFLIGHT_S", storage.DEADLINE_S)
    monkeypatch.setattr(storage, "PREFLIGHT_REQUEST_S", storage.REQUEST_S)
    before = storage.traffic.requests
    with reached_by(s3.env() | environment), pytest.raises(StorageError, match=f"s3://runs/a cannot be listed: .*{says}"):
        storage.check_places(reads=["s3://runs/a"])
    assert storage.traffic.requests == before + 1


def test_a_create_whose_answer_was_lost_is_known_as_our_own_and_anothers_is_not(url: str, proxied: Proxy):
    proxied.faults, proxied.most = ("lost",), 1
    assert storage.create_bytes(f"{url}/one", b"mine")
    assert len(proxied.injected) == 1
    proxied.passed.clear()
    assert not storage.create_bytes(f"{url}/one", b"another's")
    assert storage.read_bytes(f"{url}/one") == b"mine"


def test_what_goes_over_the_network_is_counted(url: str, proxied: Proxy):
    before = storage.Traffic(**vars(storage.traffic))
    proxied.faults, proxied.most = ("503",), 1
    storage.write_bytes(f"{url}/a", BODY)
    storage.read_bytes(f"{url}/a")
    now = storage.traffic
    assert (now.requests - before.requests, now.retries - before.retries) == (3, 1)
    assert (now.bytes_written - before.bytes_written, now.bytes_read - before.bytes_read) == (len(BODY), len(BODY))
    assert now.waited_s > before.waited_s


@pytest.mark.parametrize("operation", [lambda url: storage.write_bytes(url, BODY), storage.read_bytes, storage.exists])
def test_a_server_that_never_answers_is_given_up_at_the_deadline(
    operation: Callable[[str], object], url: str, proxied: Proxy, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(storage, "DEADLINE_S", 1.0)
    proxied.faults, proxied.most = ("hang",), None
    began = time.monotonic()
    with pytest.raises(StorageError, match="no answer within 1 s"):
        operation(f"{url}/a")
    assert time.monotonic() - began < 4


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that accepts and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_place_that_cannot_serve_is_refused_soon_and_says_why(s3: Server, silent: int, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = free.getsockname()[1]
    cases = {
        "no answer within 3 s": (s3.env(port=silent), "AWS_ENDPOINT_URL"),
        "Could not connect": (s3.env(port=closed), "AWS_ENDPOINT_URL"),
        "key ID you provided does not exist": (s3.env(("nobody", "x")), "AWS_ENDPOINT_URL"),
        "signature": (s3.env((READER[0], "wrong")), "AWS_SECRET_ACCESS_KEY"),
        "Access Denied": (s3.env(READER), "s3:PutObject"),
    }
    for told, (environment, remedy) in cases.items():
        monkeypatch.setattr(storage, "PREFLIGHT_S", 3.0 if "answer" in told or "connect" in told else 20.0)
        began = time.monotonic()
        with reached_by(environment), pytest.raises(StorageError) as error:
            storage.check_places(writes=["s3://runs/x"])
        assert told in str(error.value)
        assert remedy in str(error.value).partition("\n  do: ")[2]
        assert time.monotonic() - began < 8
    with reached_by(s3.env()), pytest.raises(StorageError, match="bucket does not exist"):
        storage.check_places(writes=["s3://nobucket/x"])
    with reached_by(s3.env(READER)):
        storage.check_places(reads=["s3://runs/x"])


@pytest.mark.slow
def test_a_place_where_one_request_in_five_stalls_is_not_refused(url: str, proxied: Proxy):
    proxied.faults, proxied.fail, proxied.most = ("stall",), 0.2, None
    for _ in range(3):
        storage.check_places(reads=[url], writes=[url])
    until(lambda: bool(proxied.injected), 60, "the end of a stall")


def test_a_store_that_ignores_conditional_writes_is_refused(url: str, monkeypatch: pytest.MonkeyPatch):
    kept = S3._pipe_file
    monkeypatch.setattr(S3, "_pipe_file", lambda self, path, data, **options: kept(self, path, data))
    with pytest.raises(StorageError, match="two commands could work on one run at once"):
        storage.check_places(writes=[url])


def test_a_store_without_conditional_puts_is_told_by_what_it_lacks_and_which_stores_have_it(url: str, proxied: Proxy):
    proxied.lacks = ("501",)
    with pytest.raises(
        StorageError, match=r"not implemented: two commands could work on one run at once\n  do: .*If-None-Match.*MinIO"
    ):
        storage.check_places(writes=[url])
    assert len(proxied.injected) == 1
    assert storage.files(url) == []


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (PermissionError("Access Denied"), "s3:PutObject"),
        (OSError(errno.EINVAL, "the signature is old"), "AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_another_failure_of_a_conditional_put_keeps_its_own_remedy(
    error: OSError, remedy: str, url: str, monkeypatch: pytest.MonkeyPatch
):
    pipe_file = S3._pipe_file

    async def refuse(fs: S3, path: str, data: bytes, *, mode: str) -> None:
        if mode == "create":
            raise error
        await pipe_file(fs, path, data)

    monkeypatch.setattr(S3, "_pipe_file", refuse)
    with pytest.raises(StorageError) as refusal:
        storage.check_places(writes=[url])
    assert "two commands" not in str(refusal.value)
    assert (error.strerror or str(error)) in str(refusal.value)
    assert remedy in str(refusal.value).partition("\n  do: ")[2]
    assert storage.files(url) == []


@pytest.fixture
def secured(s3: Server, url: str, tmp_path: Path) -> Iterator[tuple[Proxy, dict[str, str]]]:
    """A store behind TLS whose certificate no known authority signed, and the environment that reaches it."""
    certificate, tls = own_certificate(tmp_path)
    with faulty(s3.host, s3.port, tls=tls) as proxy:
        endpoint = {"AWS_ENDPOINT_URL": f"https://127.0.0.1:{proxy.port}", "AWS_CA_BUNDLE": str(certificate)}
        yield proxy, s3.env() | endpoint


def test_a_store_that_wants_a_length_with_every_body_is_written_to_and_still_keeps_a_checksum(
    url: str, secured: tuple[Proxy, dict[str, str]]
):
    proxy, environment = secured
    proxy.lacks = ("411",)
    with reached_by(environment):
        storage.check_places(writes=[url])
        storage.write_bytes(f"{url}/a", BODY)
        proxy.faults, proxy.fail, proxy.most = ("corrupt",), 1.0, 1
        assert storage.read_bytes(f"{url}/a") == BODY
        assert len(proxy.injected) == 1
    assert not [one for one in proxy.passed if one.status == 411]


def test_an_authority_of_ones_own_is_answered_with_the_variable_that_names_it(
    url: str, secured: tuple[Proxy, dict[str, str]], monkeypatch: pytest.MonkeyPatch
):
    _, environment = secured
    unknown = {name: value for name, value in environment.items() if name != "AWS_CA_BUNDLE"}
    with monkeypatch.context() as soon, reached_by(unknown):
        soon.setattr(storage, "PREFLIGHT_S", 10.0)
        with pytest.raises(StorageError, match=r"do: AWS_CA_BUNDLE"):
            storage.check_places(reads=[url])
    with reached_by(environment):
        storage.check_places(reads=[url])


def test_checksums_that_a_store_refuses_are_answered_with_the_variable_that_leaves_them_out():
    for told in ("x-amz-content-sha256 does not match", "Unsupported header 'x-amz-checksum-crc32'", "MissingContentLength"):
        assert "AWS_REQUEST_CHECKSUM_CALCULATION=when_required" in remedy_for(f"s3://b/x cannot be written: {told}")


def test_a_connection_that_takes_too_long_is_answered_with_the_endpoint():
    for told in (boto.ConnectTimeoutError(**URL), boto.ReadTimeoutError(**URL)):
        assert "AWS_ENDPOINT_URL" in remedy_for(f"s3://b/x cannot be listed: {told}")


def test_no_checksum_is_sent_where_the_environment_says_so(url: str, proxied: Proxy, monkeypatch: pytest.MonkeyPatch):
    sent = []
    kept = type(proxied)._handed_on
    monkeypatch.setattr(type(proxied), "_handed_on", lambda self, head, body: sent.append(head) or kept(self, head, body))
    storage.write_bytes(f"{url}/a", BODY)
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    S3.clear_instance_cache()
    storage.write_bytes(f"{url}/a", BODY)
    assert [b"x-amz-checksum-crc32" in head.lower() for head in sent] == [True, False]


def test_a_name_is_never_read_as_a_part_of_a_url(url: str):
    storage.write_bytes(f"{url}/a::b/one", b"1")
    storage.write_bytes(f"{url}/a::c/one", b"2")
    assert storage.folders(url) == ["a::b", "a::c"]
    assert storage.read_bytes(f"{url}/a::b/one") == b"1"


def test_a_pickle_of_the_filesystem_holds_no_secret(s3: Server, url: str):
    import pickle

    fs, _ = storage._split(url)
    storage.write_bytes(f"{url}/a", b"1")
    assert s3.env()["AWS_SECRET_ACCESS_KEY"].encode() not in pickle.dumps(fs)
    assert s3.env()["AWS_SECRET_ACCESS_KEY"] not in fs.to_json()


@pytest.mark.slow
def test_a_server_for_trying_out_keeps_what_it_was_given(tmp_path: Path):
    for number in (1, 2):
        command = [sys.executable, "-m", "sandbox.s3", str(tmp_path / "s3"), "--fail", "0.2"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as serving:
            assert serving.stdout is not None
            exports = [serving.stdout.readline().removeprefix("export ").strip().split("=", 1) for _ in range(5)]
            with reached_by(dict(exports)):
                if number == 1:
                    storage.write_bytes("s3://runs/a", BODY)
                assert storage.read_bytes("s3://runs/a") == BODY
            serving.terminate()
        assert serving.returncode == 0


FACTS = CheckpointFacts(step=3, epoch=1, best_step=3, finished=False, run_digest="d", numerics={})


def test_a_checkpoint_in_a_bucket_is_committed_when_it_was_waited_for(url: str):
    store = CheckpointStore(url)
    store.save_checkpoint({"about": "", "weights": torch.arange(1000)}, store.place(3), FACTS)
    store.wait()
    assert [one.step for one in store.committed()] == [3]
    assert torch.equal(store.load_checkpoint(store.place(3))["weights"], torch.arange(1000))


def test_a_checkpoint_that_could_not_be_written_is_told_at_the_next_one_and_never_read(
    url: str, proxied: Proxy, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(storage, "DEADLINE_S", 8.0)
    store = CheckpointStore(url)
    proxied.faults, proxied.most, proxied.match = ("hang",), None, "PUT .*committed"
    store.save_checkpoint({"weights": torch.arange(10)}, store.place(3), FACTS)
    with pytest.raises(StorageError, match=r"committed\.json cannot be written: no answer"):
        store.save_checkpoint({"weights": torch.arange(10)}, store.place(4), FACTS)
    store.teardown()
    assert store.committed() == []
    store.clean()
    assert storage.files(store.place(3)) == []


def test_a_deletion_takes_a_name_as_it_is(url: str):
    for name in ("run1", "run[1]"):
        storage.write_bytes(f"{url}/{name}/a", b"1")
    storage.delete(f"{url}/run[1]")
    assert storage.read_bytes_if_there(f"{url}/run[1]/a") is None
    assert storage.read_bytes(f"{url}/run1/a") == b"1"
